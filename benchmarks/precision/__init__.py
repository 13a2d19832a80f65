"""The precision benchmark: what 16-bit weights learn, how far an anchor pulls them, bytes, time. README.md says how."""
