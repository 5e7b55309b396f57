"""Hostile input, made from a seed: each module has a target, `python -m tests.fuzz` runs them.

A target draws cases and says what became of each; a broken promise is an assertion, and any exception that the product
does not document is a failure. `docs/hostile-input.md` tells what is promised, and what was run.
"""
