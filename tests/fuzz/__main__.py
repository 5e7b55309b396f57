"""`python -m tests.fuzz`: hostile input for everything that reads what others wrote, made from a seed."""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed

from tests.fuzz.rounds import Round, Target
from tests.fuzz.targets import TARGETS, prepare, run_target


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the targets; returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET[:ROUND]", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same cases")
    parser.add_argument("--cases", type=int, default=100_000, help="in all, as if all targets were run")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    wanted = [_wanted(name, parser) for name in options.targets] or [(name, None) for name in TARGETS]
    jobs = [job for name, number in wanted for job in _jobs(TARGETS[name], options.cases, number)]
    with tempfile.TemporaryDirectory(prefix="tagger-fuzz-") as folder:
        rounds = _run(jobs, options.seed, options.workers, folder)
    for name in dict.fromkeys(name for name, _ in wanted):
        _print_target(name, [each for each in rounds if each.target == name])
    total, failed = sum(each.outcomes.total() for each in rounds), [each for each in rounds if each.failure]
    print(f"{total:,} cases, {len(failed)} of {len(rounds)} rounds failed; seed {options.seed}")
    for each in failed:
        print(
            f"\n--- again: python -m tests.fuzz --seed {options.seed} --cases {options.cases} "
            f"{each.target}:{each.number}\n{each.failure}"
        )
    return 1 if failed else 0


def _wanted(name: str, parser: argparse.ArgumentParser) -> tuple[str, int | None]:
    target, _, number = name.partition(":")
    if target not in TARGETS or (number and not number.isdecimal()):
        parser.error(f"no target {name!r}: expected TARGET or TARGET:ROUND, of {', '.join(TARGETS)}")
    return target, int(number) if number else None


def _jobs(target: Target, cases: int, number: int | None) -> list[tuple[str, int, int]]:
    """Return name, number and size of a target's rounds."""
    own = max(target.share * cases // 100_000, 1)
    sizes = [target.round_size] * (own // target.round_size)
    sizes += [own % target.round_size] if own % target.round_size else []
    return [(target.name, n, size) for n, size in enumerate(sizes) if number in (None, n)]


def _run(jobs: list[tuple[str, int, int]], seed: int, workers: int, folder: str) -> list[Round]:
    context = multiprocessing.get_context("spawn")
    rounds, clock = list[Round](), time.monotonic()
    with ProcessPoolExecutor(workers, context, initializer=prepare, initargs=(folder,)) as pool:
        running: dict[Future[Round], tuple[str, int, int]] = {
            pool.submit(run_target, name, seed, number, size): (name, number, size) for name, number, size in jobs
        }
        for done in as_completed(running):
            name, number, _ = running[done]
            error = done.exception()
            rounds.append(done.result() if error is None else Round(name, number, failure=f"the process died: {error}"))
            print(f"\r{len(rounds)} of {len(jobs)} rounds, {time.monotonic() - clock:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    return sorted(rounds, key=lambda each: (each.target, each.number))


def _print_target(name: str, rounds: list[Round]) -> None:
    outcomes = sum((each.outcomes for each in rounds), Counter[str]())
    seconds, slowest = sum(each.seconds for each in rounds), max((each.slowest for each in rounds), default=0.0)
    print(f"{name}: {outcomes.total():,} cases, {seconds:.0f} s, the slowest {slowest:.1f} s of CPU")
    for outcome, number in outcomes.most_common():
        print(f"  {number:>8,}  {outcome}")


if __name__ == "__main__":
    sys.exit(main())
