"""fastft in other people's training loops: ``transformers``, ``lightning`` and ``deepspeed`` in this package.

Import the one you need; each needs its extra.
"""
