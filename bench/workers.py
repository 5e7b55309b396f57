"""Several workers on one shard of one run, with the lock: how throughput grows, and what the lock costs.

All workers are given the same whole tree, each in a process of its own with its imports and connections before the
clock starts. One worker without the lock is the baseline; the others have it.
"""

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.endpoints import LLMEndpoint, Requests, S3Endpoint
from bench.measure import Contender, Failed, Measured
from bench.project import LOCK, create_source, dataset, environment, redis_connection
from bench.report import Bound, arguments, bounds_table, in_words, median, ratio, table, write_json
from tests.servers import RedisServer

LOCK_CPU_MS = 2.0
"""What the lock may cost, per text."""


@dataclass(frozen=True)
class Case:
    """So many workers, with or without the lock."""

    workers: int
    lock: bool

    @property
    def name(self) -> str:
        """How the table calls it."""
        plural = "" if self.workers == 1 else "s"
        return f"{self.workers} worker{plural}, {'lock' if self.lock else 'no lock'}"


@dataclass(frozen=True)
class Trial:
    """One run of a case; `failed` tells why there are no figures."""

    case: Case
    failed: str | None = None
    took: tuple[Measured, ...] = ()
    s3: Requests | None = None
    llm: dict[str, Any] | None = None
    endpoints_cpu: float | None = None

    @property
    def seconds(self) -> float:
        """What the last worker to end took; all started at once."""
        return max(took.seconds for took in self.took)

    @property
    def cpu(self) -> float:
        """CPU seconds of all workers."""
        return sum(took.cpu for took in self.took)


class Bench:
    """The endpoints, and one shard of new texts."""

    def __init__(
        self, folder: Path, llm: LLMEndpoint, s3: S3Endpoint, redis: RedisServer, texts: int, in_flight: int
    ) -> None:
        self._folder = folder
        self._llm = llm
        self._s3 = s3
        self._texts = texts
        self._in_flight = in_flight
        source = folder / "source.db"
        create_source(source, texts)
        self._env = environment(s3.url, llm.base_url, source, redis_default=redis_connection(redis))

    def run(self, case: Case) -> Trial:
        """Let the workers of a case do the shard."""
        self._s3.clear()
        shards = {"texts_per_shard": self._texts, "max": 1}
        more: dict[str, Any] = {"lock": LOCK} if case.lock else {}
        content = dataset("workers", in_flight=self._in_flight, shards=shards, **more)
        settings = {"content": content, "run_id": "bench"}
        try:
            with ExitStack() as stack:
                with Contender("steps", settings, self._env, self._folder / "prepare.log") as prepare:
                    prepare.wait_until_ready()
                    prepare.run("snapshot")
                    prepare.run("plan")
                workers = [
                    stack.enter_context(Contender("steps", settings, self._env, self._folder / f"worker-{number}.log"))
                    for number in range(case.workers)
                ]
                for worker in workers:
                    worker.wait_until_ready()
                self._llm.reset()
                self._s3.reset()
                cpu = self._endpoints_cpu()
                for worker in workers:
                    worker.tell("tag_first")
                took = tuple(worker.result() for worker in workers)
        except Failed as e:
            return Trial(case, str(e))
        llm = self._llm.stats()
        missed = self._texts - llm["texts"]
        failed = f"{missed} texts were not asked" if missed else None
        return Trial(case, failed, took, self._s3.requests(), llm, self._endpoints_cpu() - cpu)

    def _endpoints_cpu(self) -> float:
        return float(self._llm.stats()["cpu_seconds"]) + float(self._s3.stats()["cpu_seconds"])


def summarise(trials: list[Trial], texts: int) -> list[dict[str, Any]]:
    """Return one line per case: medians over its trials, and ratios to one worker without the lock."""
    lines: list[dict[str, Any]] = []
    for case in dict.fromkeys(trial.case for trial in trials):
        mine = [trial for trial in trials if trial.case == case]
        done = [trial for trial in mine if trial.took and trial.llm]
        seconds, cpu = median(trial.seconds for trial in done), median(trial.cpu for trial in done)
        lines.append(
            {
                **asdict(case),
                "trials": len(mine),
                "failed": [trial.failed for trial in mine if trial.failed],
                "seconds": seconds,
                "texts_per_second": seconds and texts / seconds,
                "cpu_ms_per_text": cpu and 1000 * cpu / texts,
                "most_calls_per_text": max(
                    (trial.llm["most_calls_per_text"] for trial in done if trial.llm), default=None
                ),
                "calls_per_text": median(trial.llm["calls"] / texts for trial in done if trial.llm),
                "peak_mb": median(max(took.peak_mb for took in trial.took) for trial in done),
            }
        )
    baseline = next((line for line in lines if line["workers"] == 1 and not line["lock"]), {})
    for line in lines:
        line["throughput_to_one"] = ratio(line["texts_per_second"], baseline.get("texts_per_second"))
        line["cpu_to_one"] = ratio(line["cpu_ms_per_text"], baseline.get("cpu_ms_per_text"))
    return lines


def lock_cpu_ms(lines: list[dict[str, Any]]) -> float | None:
    """Return the CPU that the lock costs, per text: one worker with it, less one without."""
    one = {line["lock"]: line["cpu_ms_per_text"] for line in lines if line["workers"] == 1}
    with_lock, without = one.get(True), one.get(False)
    return None if with_lock is None or without is None else with_lock - without


def bounds(lines: list[dict[str, Any]]) -> list[Bound]:
    """Return what must be reached."""
    found = [Bound("lock: CPU ms per text", lock_cpu_ms(lines), LOCK_CPU_MS)]
    for line in lines:
        name = Case(line["workers"], line["lock"]).name
        found.append(Bound(f"{name}: most calls for one text", line["most_calls_per_text"], 1))
    return found


def print_tables(lines: list[dict[str, Any]], trials: list[Trial], texts: int) -> None:
    """Print the comparison, and the requests by operation."""
    heads = ("seconds", "texts/s", "x one", "CPU ms/text", "x one", "calls/text", "most for one", "peak MB")
    names = ("seconds", "texts_per_second", "throughput_to_one", "cpu_ms_per_text", "cpu_to_one", "calls_per_text")
    rows = [
        (
            Case(line["workers"], line["lock"]).name,
            *(line[name] for name in names),
            line["most_calls_per_text"],
            line["peak_mb"] and round(line["peak_mb"]),
        )
        for line in lines
    ]
    print(table(f"{texts:,} texts, all workers on the same tree (medians)", ("", *heads), rows))
    print("\nRequests of the last run")
    for trial in {trial.case: trial for trial in trials}.values():
        print(f"  {trial.case.name}{f': failed: {trial.failed}' if trial.failed else ''}")
        if trial.s3 and trial.endpoints_cpu is not None:
            print(f"    S3, records, per text: {in_words(trial.s3['records'], texts)}")
            print(f"    S3, run files, in all: {in_words(trial.s3['files'])}")
            print(f"    by worker: {', '.join(f'{each.returned} in {each.seconds:.1f} s' for each in trial.took)}")
            print(f"    the endpoints' own CPU: {1000 * trial.endpoints_cpu / texts:.2f} ms/text")


def main() -> None:
    """Run the benchmark."""
    parser = arguments("workers", __doc__)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--latency", type=float, default=0.5, help="seconds of an LLM call (0.5)")
    parser.add_argument("--in-flight", type=int, default=16, help="calls at once, of each worker (16)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of workers (1 2 4)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each case (1)")
    asked = parser.parse_args()
    cases = [Case(1, False), *(Case(workers, True) for workers in asked.workers)]
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="tagger-bench-") as name:
        folder = Path(name)
        with LLMEndpoint(folder) as llm, S3Endpoint(folder) as s3, RedisServer(folder / "redis") as redis:
            llm.behave(latency=asked.latency)
            bench = Bench(folder, llm, s3, redis, asked.texts, asked.in_flight)
            for _ in range(asked.repeat):
                for case in cases:
                    trials.append(bench.run(case))
                    print(f"{case.name}: {trials[-1].failed or 'done'}", file=sys.stderr, flush=True)
    lines = summarise(trials, asked.texts)
    must = bounds(lines)
    print_tables(lines, trials, asked.texts)
    print(bounds_table(must))
    content = {
        "benchmark": "workers",
        "texts": asked.texts,
        "latency": asked.latency,
        "in_flight": asked.in_flight,
        "lock_cpu_ms_per_text": lock_cpu_ms(lines),
        "summary": lines,
        "must_reach": [asdict(bound) for bound in must],
    }
    write_json(asked.json, {**content, "trials": [asdict(trial) for trial in trials]})
    sys.exit(any(trial.failed for trial in trials))


if __name__ == "__main__":
    main()
