"""The precision benchmark: what 16-bit weights learn, how far an anchor pulls them, bytes and time. README.md says how."""
