"""A daily run over texts that are nearly all tagged: what plan and tag take when 0, 1 or 1 % of them are new.

The cache and the target table are made directly. Snapshot, and then plan and tag, run each in a fresh process, which
has its imports and connections before the clock starts. `allowed` is the design's bound on plan's S3 requests: records
/ 1,000 + 256, or one per text where that is less, and 50.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.endpoints import LLMEndpoint, Requests, S3Endpoint
from bench.measure import Contender, Failed, Measured
from bench.project import BUCKET, create_source, dataset, environment
from bench.report import Bound, arguments, bounds_table, in_words, ratio, table, total, write_json
from bench.seed import Seed
from demo.seaweedfs import SeaweedFS

STORAGE = "warm"
IN_FLIGHT = 64
SIZES = (20_000, 100_000, 1_000_000)
SEAWEEDFS_SIZES = (20_000, 100_000)
PLAN_SECONDS = {20_000: 3, 100_000: 10, 1_000_000: 100}
"""What plan may take."""

SMALL_RUN = 500
"""Texts of a small run over a large cache."""


@dataclass(frozen=True)
class Case:
    """A run over `texts` texts, `new` of them without a record, in a cache of `records` texts' records."""

    texts: int
    new: int
    records: int

    @property
    def name(self) -> str:
        """How the table calls it."""
        cache = "" if self.records == self.texts else f", a cache of {self.records:,}"
        return f"{self.texts:,} texts, {self.new:,} new{cache}"

    @property
    def missing(self) -> set[int]:
        """The numbers of the new texts, spread over all."""
        return {i * self.texts // self.new for i in range(self.new)}

    @property
    def allowed(self) -> int:
        """S3 requests that plan may make."""
        return int(min(self.records / 1000 + 256, self.texts)) + 50


@dataclass(frozen=True)
class Step:
    """What a step took and asked of S3."""

    took: Measured
    s3: Requests


@dataclass(frozen=True)
class Trial:
    """A case's steps; `failed` tells why there are not all of them."""

    case: Case
    steps: dict[str, Step]
    failed: str | None = None


class Server(Protocol):
    """The S3 server of a benchmark: the counting endpoint, or SeaweedFS, whose requests the client counts."""

    url: str
    keys: tuple[str, str] = ("bench", "bench")

    def fill(self, seed: Seed, missing: set[int]) -> None:
        """Empty the cache, and seed it with all records but `missing`."""
        ...

    def counting(self, process: Contender) -> Callable[[], Requests]:
        """Return what counts, when it is called, the requests since now."""
        ...


class Counting(Server):
    """The counting endpoint."""

    def __init__(self, s3: S3Endpoint) -> None:
        self._s3 = s3
        self.url = s3.url

    def fill(self, seed: Seed, missing: set[int]) -> None:
        """Empty the server and seed it."""
        self._s3.clear()
        seed.fill(self._s3, missing)

    def counting(self, process: Contender) -> Callable[[], Requests]:
        """Count from zero."""
        self._s3.reset()
        return self._s3.requests


class Seaweed(Server):
    """SeaweedFS. It is filled once: what a case lacks is deleted, what an earlier one lacked is there."""

    def __init__(self, server: SeaweedFS) -> None:
        self._server = server
        self._filled: Seed | None = None
        self.url = server.endpoint
        self.keys = (server.access_key, server.secret_key)
        server.client().create_bucket(Bucket=BUCKET)
        server.client().put_object(Bucket=BUCKET, Key="first", Body=b"first")

    def fill(self, seed: Seed, missing: set[int]) -> None:
        """Seed the server."""
        if self._filled is not seed:
            seed.fill_seaweedfs(self._filer_port, set())
            self._filled = seed
        client = self._server.client()
        for path in seed.paths_of(missing):
            client.delete_object(Bucket=BUCKET, Key=path)

    def counting(self, process: Contender) -> Callable[[], Requests]:
        """Count by the client's events, which do not tell records from files."""
        before = process.run("requests").returned

        def counted() -> Requests:
            after = process.run("requests").returned
            since = {name: after[name] - before.get(name, 0) for name in after}
            return {"records and files": {name: count for name, count in since.items() if count}}

        return counted

    @property
    def _filer_port(self) -> int:
        return self._server.ports[6]


class Bench:
    """Runs cases against one S3 server."""

    def __init__(self, folder: Path, llm: LLMEndpoint, server: Server, records: int) -> None:
        self._folder = folder
        self._llm = llm
        self._server = server
        self._content = dataset(STORAGE, in_flight=IN_FLIGHT)
        self._seed = Seed(self._content, records, folder)

    def run(self, case: Case) -> Trial:
        """Run a case."""
        source = self._source(case.texts)
        self._seed.fill_target(source, case.texts, case.missing)
        self._server.fill(self._seed, case.missing)
        env = environment(self._server.url, self._llm.base_url, source, self._server.keys)
        settings = {"content": self._content, "run_id": f"run-{case.texts}-{case.new}"}
        steps: dict[str, Step] = {}
        try:
            for names in (("snapshot",), ("plan", "tag") if case.new else ("plan",)):
                with Contender("steps", settings, env, self._folder / "steps.log") as process:
                    process.wait_until_ready()
                    for name in names:
                        requests = self._server.counting(process)
                        steps[name] = Step(process.run(name), requests())
            _check(case, steps)
        except Failed as e:
            return Trial(case, steps, str(e))
        return Trial(case, steps)

    def _source(self, texts: int) -> Path:
        path = self._folder / f"source-{texts}.db"
        if not path.exists():
            create_source(path, texts)
        return path


def _check(case: Case, steps: dict[str, Step]) -> None:
    planned = steps["plan"].took.returned
    if (planned["cached"], planned["new"]) != (case.texts - case.new, case.new):
        raise Failed(f"planned {planned['cached']} cached and {planned['new']} new")
    if case.new and steps["tag"].took.returned != {"tagged": case.new}:
        raise Failed(f"tagged {steps['tag'].took.returned}")


def cases(records: int, small: int = 0) -> list[Case]:
    """Return the cases over a cache of so many records; `small`: and a run of so many texts over it."""
    found = [Case(records, 0, records), Case(records, records // 100, records)]
    if records == SIZES[0]:
        found.insert(1, Case(records, 1, records))
    return found + [Case(small, new, records) for new in (0, small // 100) if small]


def summarise(trial: Trial) -> dict[str, Any]:
    """Return a trial's figures by name."""
    line: dict[str, Any] = {**asdict(trial.case), "failed": trial.failed}
    for name, step in trial.steps.items():
        line[f"{name}_seconds"] = step.took.seconds
        line[f"{name}_peak_mb"] = step.took.peak_mb
        line[f"{name}_requests"] = total(step.s3)
    plan = trial.steps.get("plan")
    if plan:
        line["plan_cpu_us_per_text"] = 1e6 * plan.took.cpu / trial.case.texts
        line["plan_and_tag_seconds"] = line["plan_seconds"] + line.get("tag_seconds", 0)
        line["requests_to_allowed"] = ratio(line["plan_requests"], trial.case.allowed)
    return line


def bounds(trials: list[Trial]) -> list[Bound]:
    """Return what must be reached, of the cases that were run."""
    found: list[Bound] = []
    for trial in trials:
        case, line = trial.case, summarise(trial)
        name = case.name
        found.append(Bound(f"{name}: plan's S3 requests", line.get("plan_requests"), case.allowed))
        if (case.texts, case.new) == (20_000, 1):
            found.append(Bound(f"{name}: plan and tag, seconds", line.get("plan_and_tag_seconds"), 3))
        if case.texts in PLAN_SECONDS:
            found.append(Bound(f"{name}: plan, seconds", line.get("plan_seconds"), PLAN_SECONDS[case.texts]))
        if case.texts == 1_000_000:
            peak = max((step.took.peak_mb for step in trial.steps.values()), default=None)
            found.append(Bound(f"{name}: peak memory, MiB", peak, 1024))
    return found


def print_tables(trials: list[Trial]) -> None:
    """Print what each case took, and its requests by operation."""
    rows = []
    for trial in trials:
        line = summarise(trial)
        peaks = [line.get(name) for name in ("snapshot_peak_mb", "plan_peak_mb", "tag_peak_mb")]
        names = ("snapshot_seconds", "plan_seconds", "tag_seconds", "plan_and_tag_seconds", "plan_cpu_us_per_text")
        rows.append(
            (
                trial.case.name,
                *(line.get(name) for name in names),
                line.get("plan_requests"),
                trial.case.allowed,
                line.get("requests_to_allowed"),
                "/".join("-" if peak is None else f"{peak:.0f}" for peak in peaks),
            )
        )
    heads = (
        "snapshot s",
        "plan s",
        "tag s",
        "plan+tag s",
        "plan CPU us/text",
        "plan S3",
        "allowed",
        "of it",
        "peak MB",
    )
    print(table("Nearly all texts cached (peak MB: of snapshot/plan/plan and tag)", ("", *heads), rows))
    print("\nS3 requests")
    for trial in trials:
        print(f"  {trial.case.name}{f': failed: {trial.failed}' if trial.failed else ''}")
        for name, step in trial.steps.items():
            areas = [f"{area}: {in_words(counts)}" for area, counts in step.s3.items()]
            print(f"    {name}: {'; '.join(areas)}")


def main() -> None:
    """Run the benchmark."""
    parser = arguments("warm", __doc__)
    parser.add_argument("--sizes", type=int, nargs="+", help="records in the cache (20000 100000 1000000)")
    parser.add_argument("--latency", type=float, default=0.5, help="seconds of an LLM call (0.5)")
    parser.add_argument("--small", type=int, default=SMALL_RUN, help="texts of the small run over the largest cache")
    parser.add_argument("--seaweedfs", action="store_true", help="on SeaweedFS instead, which takes minutes to fill")
    asked = parser.parse_args()
    sizes = asked.sizes or (SEAWEEDFS_SIZES if asked.seaweedfs else SIZES)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="tagger-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        llm = stack.enter_context(LLMEndpoint(folder))
        llm.behave(latency=asked.latency)
        if asked.seaweedfs:
            weed = stack.enter_context(SeaweedFS(folder / "seaweedfs", folder / "seaweedfs.log"))
            server: Server = Seaweed(weed)
        else:
            server = Counting(stack.enter_context(S3Endpoint(folder)))
        for records in sorted(sizes):
            bench = Bench(folder, llm, server, records)
            for case in cases(records, asked.small if records == max(sizes) else 0):
                trials.append(bench.run(case))
                print(f"{case.name}: {trials[-1].failed or 'done'}", file=sys.stderr, flush=True)
    print_tables(trials)
    must = bounds(trials)
    print(bounds_table(must))
    content = {
        "benchmark": "warm",
        "s3": "seaweedfs" if asked.seaweedfs else "counting endpoint",
        "latency": asked.latency,
        "summary": [summarise(trial) for trial in trials],
        "must_reach": [asdict(bound) for bound in must],
    }
    write_json(asked.json, {**content, "trials": [asdict(trial) for trial in trials]})
    sys.exit(any(trial.failed for trial in trials))


if __name__ == "__main__":
    main()
