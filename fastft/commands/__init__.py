"""The commands of ``fastft``, each a module with ``add_arguments`` and ``run``, and the shell that runs them."""
