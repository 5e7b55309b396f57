"""Benchmarks, each beside a baseline that runs in the same minute: trust the ratios, not the seconds."""
