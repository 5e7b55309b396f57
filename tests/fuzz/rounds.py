"""Targets and rounds: a round is a thousand cases or fewer, drawn from the seed and the round's number alone."""

import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

SLOWEST_SECONDS = 20.0
"""Of CPU that a case may take: far more is a case that keeps a run from ending."""

LONGEST_FAILURE = 6000
"""Characters of a failure that are shown: a case may have ten million."""


@dataclass(frozen=True)
class Target:
    """One thing that reads what others wrote."""

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any], str]
    """Returns what became of a case, in a word or two; raises where a promise is broken."""
    share: int
    """Of 100,000 cases, how many are for this target."""
    round_size: int = 1000
    shrinks: bool = True
    """Whether a case takes little enough time to look for the smallest one that fails."""


@cache
def folder(name: str) -> Path:
    """Return a folder of this process for the files of cases."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-"))


@dataclass
class Round:
    """What a round came to."""

    target: str
    number: int
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: float = 0.0
    """Seconds of CPU of its slowest case."""
    failure: str | None = None
    """The error with the smallest case that shows it."""


def run_round(target: Target, seed_number: int, number: int, cases: int) -> Round:
    """Draw and check the cases of a round."""
    result, clock = Round(target.name, number), time.monotonic()

    def check(case: Any) -> None:
        started = time.process_time()
        outcome = target.check(case)
        seconds = time.process_time() - started
        result.outcomes[outcome] += 1
        result.slowest = max(result.slowest, seconds)
        assert seconds < SLOWEST_SECONDS, f"took {seconds:.0f} s of CPU"

    quiet = settings(
        max_examples=cases,
        database=None,
        deadline=None,
        derandomize=False,
        phases=(Phase.generate, Phase.shrink) if target.shrinks else (Phase.generate,),
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    try:
        seed(f"{seed_number} {target.name} {number}")(quiet(given(case=target.cases)(check)))()
    except BaseException as e:
        lines = "".join(traceback.format_exception(e))
        result.failure = lines if len(lines) < LONGEST_FAILURE else f"{lines[:2000]}\n[…]\n{lines[-4000:]}"
    result.seconds = time.monotonic() - clock
    return result
