"""The command line: `main.py` runs it, every other file is a verb."""
