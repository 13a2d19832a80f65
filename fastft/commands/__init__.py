"""The commands of ``fastft``."""
