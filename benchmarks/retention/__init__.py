"""The retention benchmark: how much each method keeps, and its cost on the new task. README.md says how."""
