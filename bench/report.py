"""What a benchmark prints, and the JSON file it writes."""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.endpoints import REPOSITORY, Requests

PACKAGES = ("boto3", "gokart", "luigi", "openai", "pyarrow")


def arguments(name: str, about: str | None) -> argparse.ArgumentParser:
    """Return a parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = REPOSITORY / "bench" / "results" / f"{name}.json"
    about_json = f"where the results go (bench/results/{name}.json)"
    parser.add_argument("--json", type=Path, default=default, metavar="FILE", help=about_json)
    return parser


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as text: the first column to the left, the others to the right; floats with two places."""
    shown = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(heads), *shown]) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))

    return "\n".join(["", title, line(heads), line(["-" * width for width in widths]), *map(line, shown)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Bound:
    """What a figure must reach: at least, or at most, the limit."""

    what: str
    measured: float | None
    limit: float
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether the figure is known and within the limit."""
        if self.measured is None:
            return False
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def bounds_table(bounds: Sequence[Bound]) -> str:
    """Return the figures that have a limit, as text."""
    rows = [
        (b.what, b.measured, f"{'>=' if b.at_least else '<='} {b.limit:g}", "yes" if b.reached else "NO")
        for b in bounds
    ]
    return table("Must reach", ("", "measured", "limit", "reached"), rows)


def in_words(counts: dict[str, int], per: int = 1) -> str:
    """Return requests by operation as text, each divided by `per`."""
    words = [f"{count if per == 1 else round(count / per, 3)} {name}" for name, count in sorted(counts.items())]
    return ", ".join(words) or "none"


def total(requests: Requests) -> int:
    """Return the number of all requests."""
    return sum(sum(counts.values()) for counts in requests.values())


def median(values: Iterable[float]) -> float | None:
    """Return the median, or None of nothing."""
    known = list(values)
    return statistics.median(known) if known else None


def ratio(value: float | None, baseline: float | None) -> float | None:
    """Return how many times the baseline a value is, or None where one of them is not known."""
    return value / baseline if value is not None and baseline else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a benchmark's results, with what they were measured on."""
    machine = {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "load_average": os.getloadavg()[0],
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **content}, indent=2) + "\n")
    print(f"\n{path}")
