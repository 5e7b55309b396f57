"""The commands that measure and correct tags: evaluate, compare, review."""

import argparse
from collections.abc import Callable

from tagger.connections import Connections
from tagger.dataset import Dataset
from tagger.dataset_files import find_dataset, load_dataset

Add = Callable[[str, Callable[[argparse.Namespace, Connections], None], str], argparse.ArgumentParser]
"""Adds a command: its name, its function, its help."""


def add_commands(add: Add) -> None:
    """Add the commands of this module."""
    _add_evaluate(add)
    _add_compare(add)
    _add_review(add)


def _add_evaluate(add: Add) -> None:
    """evaluate."""


def _add_compare(add: Add) -> None:
    """compare."""


def _add_review(add: Add) -> None:
    """review."""


def _dataset(name: str) -> Dataset:
    return load_dataset(find_dataset(name))
