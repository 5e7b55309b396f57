"""New texts over a slow LLM: tagger's tag step beside the bare openai SDK, and with `--naive` beside naive gokart.

Each contender runs in a fresh process, which has its imports and connections before the clock starts; snapshot and plan
are made before. Contenders take turns. `of ideal` is texts * latency / in flight / seconds.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.endpoints import LLMEndpoint, Requests, S3Endpoint
from bench.measure import Contender, Failed, Measured
from bench.project import LOCK, create_source, dataset, environment, redis_connection
from bench.report import Bound, arguments, bounds_table, in_words, median, ratio, table, total, write_json
from tests.servers import RedisServer

LOCKED = "tagger with lock"
OURS = ("tagger", LOCKED)

NAIVE_TRIES = 2
"""Naive gokart's forks share S3 connections: a run may fail by chance."""


@dataclass(frozen=True)
class Case:
    """What all contenders of a comparison do."""

    texts: int
    latency: float
    in_flight: int

    @property
    def name(self) -> str:
        """How the table calls it."""
        return f"{self.texts:,} texts, {self.latency:g} s, {self.in_flight} in flight"

    @property
    def ideal(self) -> float:
        """Seconds that the calls take when none ever waits."""
        return self.texts * self.latency / self.in_flight


@dataclass(frozen=True)
class Trial:
    """One contender's run of a case; `failed` tells why there are no figures."""

    case: Case
    contender: str
    failed: str | None = None
    took: Measured | None = None
    s3: Requests | None = None
    llm: dict[str, Any] | None = None
    endpoints_cpu: float | None = None


FULL = (
    Case(1000, 0.5, 64),
    Case(5000, 0.5, 64),
    Case(5000, 1.0, 64),
    Case(20000, 0.5, 64),
)
QUICK = (Case(300, 0.5, 64), Case(600, 0.5, 64))
NAIVE_TEXTS = (300, 1000, 2000)


_S3_LATENCY = "that each S3 request takes, of all contenders (0; Amazon states 0.1 to 0.2 for small objects)"


class Bench:
    """The endpoints, and the trials made so far."""

    def __init__(
        self, folder: Path, llm: LLMEndpoint, s3: S3Endpoint, redis: RedisServer | None, naive_limit: float
    ) -> None:
        self._folder = folder
        self._llm = llm
        self._s3 = s3
        self._redis: Any = {} if redis is None else {"redis_default": redis_connection(redis)}
        self._naive_limit = naive_limit
        self.trials: list[Trial] = []

    def run(self, case: Case, contenders: Iterable[str]) -> None:
        """Let the contenders do a case, one after the other."""
        for contender in contenders:
            for attempt in range(1, NAIVE_TRIES + 1):
                trial = self._try(case, contender)
                self.trials.append(trial)
                print(f"{case.name}: {contender}: {_outcome(trial)}", file=sys.stderr, flush=True)
                if trial.failed is None or contender != "gokart" or attempt == NAIVE_TRIES:
                    break

    def _try(self, case: Case, contender: str) -> Trial:
        self._s3.clear()
        self._llm.behave(latency=case.latency)
        source = self._source(case.texts)
        env = environment(self._s3.url, self._llm.base_url, source, **self._redis)
        shards = {"texts_per_shard": case.texts, "max": 1}
        lock: dict[str, Any] = {"lock": LOCK} if contender == LOCKED else {}
        settings = {
            "content": dataset(f"trial-{len(self.trials)}", in_flight=case.in_flight, shards=shards, **lock),
            "run_id": "bench",
            "texts": case.texts,
            "in_flight": case.in_flight,
        }
        try:
            if contender in OURS:
                with Contender("steps", settings, env, self._log("prepare")) as prepare:
                    prepare.wait_until_ready()
                    prepare.run("snapshot")
                    prepare.run("plan")
            name = "steps" if contender in OURS else contender
            with Contender(name, settings, env, self._log(contender)) as process:
                process.wait_until_ready()
                self._llm.reset()
                self._s3.reset()
                cpu = self._endpoints_cpu()
                took = process.run("tag", self._naive_limit if contender == "gokart" else 3600)
            llm = self._llm.stats()
            if llm["texts"] != case.texts or llm["most_calls_per_text"] > 1:
                raise Failed(f"asked {llm['texts']} of {case.texts} texts, one {llm['most_calls_per_text']} times")
        except Failed as e:
            return Trial(case, contender, failed=str(e))
        return Trial(case, contender, None, took, self._s3.requests(), llm, self._endpoints_cpu() - cpu)

    def _source(self, texts: int) -> Path:
        path = self._folder / f"source-{texts}.db"
        if not path.exists():
            create_source(path, texts)
        return path

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _endpoints_cpu(self) -> float:
        return float(self._llm.stats()["cpu_seconds"]) + float(self._s3.stats()["cpu_seconds"])


def _outcome(trial: Trial) -> str:
    return f"{trial.took.seconds:.1f} s" if trial.took else f"failed: {trial.failed}"


def summarise(trials: list[Trial]) -> list[dict[str, Any]]:
    """Return one line per case and contender: medians over its trials, and ratios to the case's baseline.

    The baseline is the floor; `faster_than_gokart` is given where naive gokart did the case.
    """
    lines: list[dict[str, Any]] = []
    for case in dict.fromkeys(trial.case for trial in trials):
        for contender in dict.fromkeys(trial.contender for trial in trials if trial.case == case):
            mine = [trial for trial in trials if (trial.case, trial.contender) == (case, contender)]
            done = [trial.took for trial in mine if trial.took]
            seconds = median(took.seconds for took in done)
            cpu = median(took.cpu for took in done)
            lines.append(
                {
                    **asdict(case),
                    "contender": contender,
                    "trials": len(mine),
                    "failed": [trial.failed for trial in mine if trial.failed],
                    "seconds": seconds,
                    "of_ideal": ratio(case.ideal, seconds),
                    "cpu_ms_per_text": cpu and 1000 * cpu / case.texts,
                    "peak_mb": median(took.peak_mb for took in done),
                    "record_requests_per_text": median(
                        sum(trial.s3["records"].values()) / case.texts for trial in mine if trial.s3
                    ),
                }
            )
    for line in lines:
        rivals = {other["contender"]: other for other in lines if _case(other) == _case(line)}
        floor, naive = rivals.get("floor", {}), rivals.get("gokart", {})
        line["throughput_to_floor"] = ratio(floor.get("seconds"), line["seconds"])
        line["cpu_to_floor"] = ratio(line["cpu_ms_per_text"], floor.get("cpu_ms_per_text"))
        line["faster_than_gokart"] = ratio(naive.get("seconds"), line["seconds"])
    return lines


def _case(line: dict[str, Any]) -> tuple[int, float, int]:
    return line["texts"], line["latency"], line["in_flight"]


def flatness(lines: list[dict[str, Any]]) -> tuple[int, int, float] | None:
    """Return the smallest and the largest case of tagger's at 64 in flight, and how CPU per text grew between them."""
    ours = [e for e in lines if e["contender"] == "tagger" and e["cpu_ms_per_text"] and e["in_flight"] == 64]
    ours.sort(key=lambda line: line["texts"])
    if len({line["texts"] for line in ours}) < 2:
        return None
    first, last = ours[0], ours[-1]
    return first["texts"], last["texts"], last["cpu_ms_per_text"] / first["cpu_ms_per_text"]


def bounds(lines: list[dict[str, Any]]) -> list[Bound]:
    """Return what must be reached, of the cases that were run."""
    found: list[Bound] = []
    for line in lines:
        name = Case(*_case(line)).name
        if line["contender"] not in OURS:
            continue
        per_text = line["record_requests_per_text"]
        if line["contender"] == LOCKED:
            found.append(Bound(f"{name}, lock: S3 requests for records, per text", per_text, 2))
            continue
        if line["texts"] == 5000 and line["in_flight"] == 64:
            found.append(Bound(f"{name}: throughput to the floor's", line["throughput_to_floor"], 0.95, at_least=True))
            found.append(Bound(f"{name}: CPU per text to the floor's", line["cpu_to_floor"], 1.5))
        if line["texts"] == 2000 and line["faster_than_gokart"]:
            found.append(Bound(f"{name}: times faster than gokart", line["faster_than_gokart"], 10, at_least=True))
        found.append(Bound(f"{name}: S3 requests for records, per text", per_text, 1))
    flat = flatness(lines)
    if flat and (flat[0], flat[1]) == (1000, 20000):
        found.append(Bound("CPU per text, 20,000 texts to 1,000", flat[2], 1.2))
    return found


def print_tables(lines: list[dict[str, Any]], trials: list[Trial]) -> None:
    """Print the comparison, and the requests by operation."""
    columns = ("seconds", "of_ideal", "throughput_to_floor", "faster_than_gokart", "cpu_ms_per_text", "cpu_to_floor")
    heads = ("seconds", "of ideal", "x floor", "x gokart", "CPU ms/text", "x floor", "peak MB")
    rows = [
        (
            f"{Case(*_case(line)).name}: {line['contender']}",
            *(line[name] for name in columns),
            line["peak_mb"] and round(line["peak_mb"]),
        )
        for line in lines
    ]
    print(table("New texts (medians)", ("", *heads), rows))
    flat = flatness(lines)
    if flat:
        print(f"\ntagger's CPU per text at {flat[1]:,} texts is {flat[2]:.2f} times that at {flat[0]:,}")
    print("\nRequests of the last run")
    for trial in {(trial.case, trial.contender): trial for trial in trials}.values():
        if trial.s3 is None or trial.llm is None or trial.endpoints_cpu is None:
            print(f"  {trial.case.name}: {trial.contender}: failed: {trial.failed}")
            continue
        texts = trial.case.texts
        print(f"  {trial.case.name}: {trial.contender}")
        if trial.contender == "gokart":
            print(f"    S3 per text: {in_words(trial.s3['files'], texts)}")
        else:
            print(f"    S3, records, per text: {in_words(trial.s3['records'], texts)}")
            print(f"    S3, run files, in all: {in_words(trial.s3['files'])}")
        print(
            f"    LLM calls per text: {trial.llm['calls'] / texts:.3f}, at most {trial.llm['most_calls_per_text']} for "
            f"one text, {trial.llm['most_at_once']} at once; the endpoints' own CPU: "
            f"{1000 * trial.endpoints_cpu / texts:.2f} ms/text"
        )


def main() -> None:
    """Run the benchmark."""
    parser = arguments("tree", __doc__)
    parser.add_argument("--texts", type=int, nargs="+", help="these numbers of texts instead of the usual cases")
    parser.add_argument(
        "--latency", type=float, nargs="+", default=[0.5], help="with --texts or --naive: seconds (0.5)"
    )
    parser.add_argument("--s3-latency", type=float, default=0.0, metavar="SECONDS", help=_S3_LATENCY)
    parser.add_argument("--in-flight", type=int, default=64, help="with --texts: calls at once (64)")
    parser.add_argument("--quick", action="store_true", help="300 and 600 texts only")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each contender (1)")
    parser.add_argument("--only", choices=["tagger", "floor"], help="leave the other one out")
    parser.add_argument("--lock", action="store_true", help="and tagger with its lock in Redis")
    parser.add_argument("--naive", type=int, nargs="*", metavar="TEXTS", help="beside naive gokart (300 1000 2000)")
    parser.add_argument("--naive-limit", type=float, default=1500, help="seconds that naive gokart may take (1500)")
    asked = parser.parse_args()
    rivals = [asked.only] if asked.only else ["floor", "tagger"]
    rivals += [LOCKED] if asked.lock else []
    with tempfile.TemporaryDirectory(prefix="tagger-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        llm, s3 = stack.enter_context(LLMEndpoint(folder)), stack.enter_context(S3Endpoint(folder))
        redis = stack.enter_context(RedisServer(folder / "redis")) if asked.lock else None
        s3.behave(latency=asked.s3_latency)
        bench = Bench(folder, llm, s3, redis, asked.naive_limit)
        for turn in range(asked.repeat):
            for case in _cases(asked):
                bench.run(case, rivals[:: -1 if turn % 2 else 1])
            for case in _naive_cases(asked):
                bench.run(case, [*rivals, "gokart"][:: -1 if turn % 2 else 1])
    lines = summarise(bench.trials)
    print_tables(lines, bench.trials)
    must = bounds(lines)
    print(bounds_table(must))
    content = {
        "benchmark": "tree",
        "s3_latency": asked.s3_latency,
        "summary": lines,
        "cpu_flatness": flatness(lines),
        "must_reach": [asdict(bound) for bound in must],
    }
    write_json(asked.json, {**content, "trials": [asdict(trial) | _totals(trial) for trial in bench.trials]})
    sys.exit(any(trial.failed for trial in bench.trials if trial.contender != "gokart"))


def _cases(asked: argparse.Namespace) -> Iterable[Case]:
    if asked.texts:
        return [Case(texts, latency, asked.in_flight) for latency in asked.latency for texts in asked.texts]
    if asked.naive is not None:
        return ()
    return QUICK if asked.quick else FULL


def _naive_cases(asked: argparse.Namespace) -> Iterable[Case]:
    if asked.naive is None:
        return []
    return [Case(texts, latency, 16) for latency in asked.latency for texts in asked.naive or NAIVE_TEXTS]


def _totals(trial: Trial) -> dict[str, int | None]:
    return {"s3_requests": total(trial.s3) if trial.s3 else None}


if __name__ == "__main__":
    main()
