"""Short texts, one and several a request: what `texts_per_request` saves, and whether the tags are the same.

The LLM is the demo's offline stand-in, as a process of its own; it counts tokens by length, and takes as long for
several texts as for one. Snapshot and plan are made before the clock starts.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from bench.endpoints import REPOSITORY, Endpoint, S3Endpoint
from bench.measure import Contender, Measured
from bench.project import TAGS, dataset, environment
from bench.report import Bound, arguments, bounds_table, ratio, table, write_json
from demo.processes import Process, free_port
from demo.stand_in import MODEL
from tagger.connections import Connection
from tagger.dataset_files import parse_dataset
from tagger.ledger import read_attempts
from tagger.runs import open_run

IN_FLIGHT = 64

_OPINIONS = """
I was glad that|I would have liked it if|nobody told me why|it took far too long until|next time I hope that
"""
_TOPICS = """
my heart and blood pressure were checked|the nerves and muscles of my leg were looked at|the tumour was found early
they asked about bacteria and fever|the operation went well|my son under eighteen was seen first
somebody explained diet and weight to me|we talked about sleep and mood|the food was warm|parking was free
"""
_JAPANESE = """
説明が丁寧でよかった|待ち時間が長かった|夜よく眠れなかった|食事の量が少なかった|手術の前に不安だった|子供も診てもらえた
"""


def answer(number: int) -> str:
    """Return the survey answer of a number: a sentence, English if it is even, Japanese if it is odd."""
    random = Random(number)
    if number % 2:
        return f"{number}番: " + "。".join(random.sample(_parts(_JAPANESE), 2)) + "。"
    return f"No. {number}: {random.choice(_parts(_OPINIONS))} {random.choice(_parts(_TOPICS))}."


def _parts(words: str) -> list[str]:
    return [part for line in words.split("\n") for part in line.split("|") if part]


class StandInEndpoint(Endpoint):
    """The demo's offline stand-in."""

    module = "demo.stand_in"

    def __init__(self, folder: Path, latency: float) -> None:
        """Describes the server, each of whose answers takes `latency` seconds."""
        super().__init__(folder)
        self._latency = latency

    @property
    def base_url(self) -> str:
        """The base URL for the OpenAI SDK."""
        return f"{self.url}/v1"

    def stats(self) -> dict[str, Any]:
        """Return the counters."""
        return self.control("GET", "/stats")

    def _build(self) -> Process:
        self._port = free_port()
        command = [sys.executable, "-m", self.module, "--port", str(self._port), "--latency", str(self._latency)]
        return Process(command, self._log, ready=self._answers, cwd=REPOSITORY)


@dataclass(frozen=True)
class Trial:
    """One tag step over all answers."""

    texts_per_request: int
    took: Measured
    requests: int
    """As the stand-in counts them."""
    booked_requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    cost_usd: float
    tags: dict[str, list[str] | None]
    """By key."""


def run(folder: Path, s3: S3Endpoint, llm: StandInEndpoint, source: Path, texts_per_request: int) -> Trial:
    """Tag all answers with so many in one request."""
    name = f"packing-{texts_per_request}"
    content = dataset(name, in_flight=IN_FLIGHT, shards={"max": 1})
    content["llm"] |= {"model": MODEL, "texts_per_request": texts_per_request}
    content["prompt"] = "You tag answers of patients to a survey by topic."
    env = environment(s3.url, llm.base_url, source)
    with Contender("steps", {"content": content, "run_id": "bench"}, env, folder / f"{name}.log") as process:
        process.wait_until_ready()
        process.run("snapshot")
        process.run("plan")
        before = llm.stats()["calls"]
        took = process.run("tag")
        requests = llm.stats()["calls"] - before

    def connections(conn_id: str) -> Connection | None:
        value = env.get(f"AIRFLOW_CONN_{conn_id.upper()}")
        return Connection(conn_id, **json.loads(value)) if value else None

    [attempt] = read_attempts(open_run(parse_dataset(content, "bench.yaml"), "bench", connections))
    outcomes = list(attempt.outcomes)
    return Trial(
        texts_per_request,
        took,
        requests,
        sum(outcome.requests for outcome in outcomes),
        sum(outcome.input_tokens for outcome in outcomes),
        sum(outcome.cached_input_tokens for outcome in outcomes),
        sum(outcome.output_tokens for outcome in outcomes),
        sum(outcome.cost_usd or 0.0 for outcome in outcomes),
        {outcome.key: outcome.tags for outcome in outcomes if outcome.status == "tagged"},
    )


def create_source(path: Path, texts: int) -> None:
    """Write the answers into a table of an SQLite file."""
    import sqlite3

    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE texts (id INTEGER PRIMARY KEY, body TEXT NOT NULL)")
        connection.executemany("INSERT INTO texts VALUES (?, ?)", ((n, answer(n)) for n in range(texts)))
    connection.close()


def print_table(trials: Sequence[Trial]) -> None:
    """Print the trials, and how many times more one text a request takes than several."""
    heads = ("requests", "input tokens", "output tokens", "USD", "seconds", "CPU s")
    figures = [(t.requests, t.input_tokens, t.output_tokens, t.cost_usd, t.took.seconds, t.took.cpu) for t in trials]
    rows: list[tuple[object, ...]] = []
    for trial, values in zip(trials, figures, strict=True):
        name = f"{trial.texts_per_request} a request"
        rows.append((name, *values[:3], f"{trial.cost_usd:.4f}", *values[4:]))
        if trial is not trials[0]:
            rows.append(
                ("  times less", *(ratio(first, value) for first, value in zip(figures[0], values, strict=True)))
            )
    title = f"{len(trials[0].tags):,} short answers, {len(TAGS)} tags, {IN_FLIGHT} calls in flight"
    print(table(title, ("", *heads), rows))


def bounds(texts: int, trials: Sequence[Trial]) -> list[Bound]:
    """Return what must be reached."""
    alone, found = trials[0], []
    for trial in trials[1:]:
        size = trial.texts_per_request
        equal = sum(trial.tags.get(key) == tags for key, tags in alone.tags.items())
        found.append(Bound(f"{size} a request: requests", trial.requests, -(-texts // size)))
        found.append(Bound(f"{size} a request: texts tagged as one a request tags them", equal, texts, at_least=True))
        found.append(Bound(f"{size} a request: requests booked", trial.booked_requests, trial.requests, at_least=True))
        found.append(Bound(f"{size} a request: cost", trial.cost_usd, alone.cost_usd))
    return found


def main() -> None:
    """Run the benchmark."""
    parser = arguments("packing", __doc__)
    parser.add_argument("--texts", type=int, default=2000, help="short answers (2000)")
    parser.add_argument("--texts-per-request", type=int, nargs="+", default=[20], help="beside 1 (20)")
    parser.add_argument("--latency", type=float, default=0.5, help="seconds an answer takes (0.5)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tagger-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        s3 = stack.enter_context(S3Endpoint(folder))
        llm = stack.enter_context(StandInEndpoint(folder, asked.latency))
        source = folder / "source.db"
        create_source(source, asked.texts)
        trials = [run(folder, s3, llm, source, size) for size in (1, *asked.texts_per_request)]
    print_table(trials)
    must = bounds(asked.texts, trials)
    print(bounds_table(must))
    shown = [{k: v for k, v in asdict(trial).items() if k != "tags"} for trial in trials]
    write_json(
        asked.json, {"benchmark": "packing", "tags": len(TAGS), "trials": shown, "must_reach": list(map(asdict, must))}
    )
    sys.exit(not all(bound.reached for bound in must))


if __name__ == "__main__":
    main()
