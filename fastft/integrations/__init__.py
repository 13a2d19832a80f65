"""fastft in other people's training loops: ``fastft.integrations.transformers``, ``fastft.integrations.lightning``.

Import the one you need; each needs its extra.
"""
