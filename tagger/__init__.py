"""Tag the new and changed texts of a table with an LLM every day, and pay for each text once."""

__version__ = "0.1.0"
