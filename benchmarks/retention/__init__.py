"""What each way of keeping knowledge keeps, and what it costs on the new task: README.md says how it is measured."""
