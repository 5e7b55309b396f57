"""All targets by name, and what a process of `python -m tests.fuzz` does with them."""

import logging
import tempfile

from tagger import engine, tasks  # noqa: F401 - Hypothesis draws words of the modules loaded: always the same ones
from tests.fuzz import (
    answers,
    batch_lines,
    connection_variables,
    csv_files,
    dataset_files,
    records,
    run_files,
    texts,
    whole_runs,
)
from tests.fuzz.rounds import Round, run_round

_MODULES = (
    dataset_files,
    csv_files,
    texts,
    answers,
    batch_lines,
    records,
    run_files,
    connection_variables,
    whole_runs,
)

TARGETS = {module.TARGET.name: module.TARGET for module in _MODULES}


def prepare(folder: str) -> None:
    """Let this process make its files in a folder, and log nothing to the screen."""
    tempfile.tempdir = folder
    logging.getLogger().addHandler(logging.NullHandler())


def run_target(name: str, seed: int, number: int, cases: int) -> Round:
    """Draw and check the cases of a round of a target."""
    return run_round(TARGETS[name], seed, number, cases)
