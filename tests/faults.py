"""The fault campaign as a command: cases by their names, or some of each cell, and the table of what was seen.

python -m tests.faults                          three cases of each cell, as docs/faults.md has them
python -m tests.faults --only tag-s3-lost-3     one case, and all that its commands printed
python -m tests.faults --only tag-s3-lost       all cases of a cell
python -m tests.faults --table docs/faults.md   write the table into that file
"""

import argparse
import atexit
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tests.fault_campaign import Campaign, Case, Result, cells
from tests.fault_proxy import Fault
from tests.fault_site import Site

if TYPE_CHECKING:
    from tests.fault_mails import Mails

BEGIN, END = "<!-- the table: python -m tests.faults --table docs/faults.md -->\n", "<!-- its end -->\n"

FAULTS = {
    "refused": "connection refused",
    "reset": "reset before the request",
    "lost": "reset before the answer",
    "timeout": "no answer",
    "error": "5xx, or the like",
    "slow": "slow answer",
    "half": "half an answer",
    "full": "disk or memory full",
    "kill_before": "kill -9 before a write",
    "kill_after": "kill -9 after a write",
}


def main() -> int:
    """Run the command; return its exit code: 1 where an invariant did not hold."""
    options = _parser().parse_args()
    known = cells()
    if wrong := [name for name in options.only if "-".join(name.split("-")[:3]) not in known]:
        print(f"no such case or cell: {wrong[0]}", file=sys.stderr)
        return 2
    wanted = options.only or known
    results = []
    each = 0 if options.only else options.each
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as workers:
        for found in workers.map(_try, wanted, repeat(options.seed), repeat(each)):
            for result in found:
                results.append(result)
                print(f"{result.case}: {_outcome(result)} {result.seconds:.1f} s {result.says}", flush=True)
                for problem in result.problems:
                    print(f"  WRONG: {problem}", flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    if options.table:
        page = options.table.read_text()
        before, _, rest = page.partition(BEGIN)
        options.table.write_text(
            before + BEGIN + "\n" + "\n".join(table(results)) + "\n\n" + END + rest.partition(END)[2]
        )
    wrong_cases = sum(bool(result.problems) for result in results)
    missed = sum(not result.struck for result in results)
    print(f"{len(results)} cases, {wrong_cases} wrong, {missed} whose moment did not come")
    return 1 if wrong_cases else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="The fault campaign.")
    parser.add_argument("--seed", type=int, default=0, help="of the cases that are drawn")
    parser.add_argument("--each", type=int, default=3, metavar="K", help="cases of each cell")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="these cases, or all of these cells")
    parser.add_argument("--workers", type=int, default=2, help="deployments side by side")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table into this page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen of each case, one a line")
    return parser


@cache
def _campaign() -> Campaign:
    """Make this process's deployment; it ends with the process."""
    stack = ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tagger-faults-", ignore_cleanup_errors=True))
    return Campaign(stack.enter_context(Site(Path(folder))))


@cache
def _mails() -> "Mails":
    from tests.fault_mails import Mails  # imports Airflow

    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(Mails(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tagger-mails-")))))


def _try(name: str, seed: int, each: int) -> list[Result]:
    """Try a case, all cases of a cell that is asked for by its name, or some."""
    campaign = _mails() if name.startswith("mail-") else _campaign()
    cell, moment = name.split("-")[:3], name.split("-")[3:]
    if moment:
        kind: Any = cell[2]
        step: Any = cell[0]
        fault = Fault(kind, int(moment[0].rstrip("+")), moment[0].endswith("+"))
        return [campaign.try_(Case(step, cell[1], fault))]
    cases = campaign.cases(name)
    if each:
        cases = Random(f"{seed} {name}").sample(cases, min(each, len(cases)))
    return [campaign.try_(case) for case in cases]


def _outcome(result: Result) -> str:
    ended = {0: "went on", -9: "killed", -15: "timed out"}.get(result.code, f"ended with {result.code}")
    return ended if result.struck else f"{ended} (its moment did not come)"


def table(results: Iterable[Result]) -> Iterator[str]:
    """Yield the lines of a table: a row for each cell."""
    by_cell: dict[str, list[Result]] = {}
    for result in results:
        if result.struck:
            by_cell.setdefault(result.cell, []).append(result)
    yield "| step, server | fault | cases | seen | it says, for instance |"
    yield "|---|---|---|---|---|"
    last = ""
    for cell, tried in by_cell.items():
        step, server, kind = cell.split("-")
        outcomes = Counter(map(_outcome, tried))
        again = sum(result.asked_again for result in tried)
        seen = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        seen += f"; {again} calls in flight were made again" if again else ""
        says = next((result.says for result in tried if result.says), "")
        name = f"{step}, {server}"
        yield f"| {name if name != last else ''} | {FAULTS[kind]} | {len(tried)} | {seen} | {says.replace('|', '/')} |"
        last = name


if __name__ == "__main__":
    sys.exit(main())
