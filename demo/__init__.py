"""The demo: sample data, an offline stand-in for the LLM, and the runner."""
