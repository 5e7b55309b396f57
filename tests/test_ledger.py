"""The books of an attempt at a shard: what it did and spent, whatever becomes of it."""

import io
import json
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as st

from tagger.cache import Record, Usage
from tagger.dataset import Price
from tagger.exceptions import RunFailed, StorageError
from tagger.ledger import (
    FLUSH_SECONDS,
    SCHEMA,
    Attempt,
    Ledger,
    Outcome,
    OutcomeStatus,
    attempt_files,
    latest_outcomes,
    read_attempts,
)
from tagger.runs import Run
from tagger.storage import Storage
from tests.conftest import REPOSITORY
from tests.servers import S3Store

PRICE = Price(input=1.0, cached_input=0.1, output=10.0)
NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)


def key(number: int) -> str:
    return f"{number:032x}"


def record(*tags: str, reason: str | None = None) -> Record:
    return Record(
        status="refused" if reason else "tagged",
        reason=reason,
        tags=list(tags),
        model="gpt-5-mini-2025-08-07",
        usage=Usage(input=100, output=5),
        cost_usd=0.00015,
        finish_reason="stop",
        created_at=NOW,
    )


@pytest.fixture
def run(s3_bucket: S3Store) -> Run:
    return Run(Storage(f"s3://{s3_bucket.bucket}", s3_bucket.client()), "notes", "manual__1")


def ledger(run: Run, shard: int = 1, price: Price | None = PRICE) -> Ledger:
    return Ledger(run, "plan", shard, price)


def only_outcome(run: Run) -> Outcome:
    [outcome] = read_attempts(run)[-1].outcomes
    return outcome


def outcomes(run: Run) -> list[Outcome]:
    """Return the outcomes of the first attempt."""
    return list(read_attempts(run)[0].outcomes)


# Numbers of attempts


def test_attempts_are_numbered_from_one(run: Run) -> None:
    for _ in range(3):
        with ledger(run):
            pass

    assert sorted(path for _, path in attempt_files(run)) == [
        f"runs/notes/manual__1/shard-1-{attempt}.parquet" for attempt in (1, 2, 3)
    ]
    assert [attempt.attempt for attempt in read_attempts(run)] == [1, 2, 3]


def test_shards_are_numbered_apart(run: Run) -> None:
    for shard in (1, 2, 12, 1):
        with ledger(run, shard):
            pass

    assert sorted((a.shard, a.attempt) for a in read_attempts(run)) == [(1, 1), (1, 2), (2, 1), (12, 1)]
    assert [(a.shard, a.attempt) for a in read_attempts(run, 1)] == [(1, 1), (1, 2)]


def test_attempts_after_the_ninth_are_numbered_on(run: Run) -> None:
    for _ in range(11):
        with ledger(run):
            pass

    assert [attempt.attempt for attempt in read_attempts(run)] == list(range(1, 12))


def test_attempts_at_the_same_time_have_files_of_their_own(run: Run) -> None:
    together = threading.Barrier(4)

    def attempt(number: int) -> None:
        together.wait(10)
        with ledger(run) as books:
            together.wait(10)
            books.spend(key(number), str(number), Usage(input=number))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(attempt, range(4)))

    attempts = read_attempts(run)
    assert sorted(each.attempt for each in attempts) == [1, 2, 3, 4]
    assert sorted(outcome.row_id for each in attempts for outcome in each.outcomes) == ["0", "1", "2", "3"]


def test_a_new_attempt_leaves_the_earlier_files_as_they_are(run: Run) -> None:
    with ledger(run) as books:
        books.record(key(1), "1", record("fruit"))
    before = run.storage.get("runs/notes/manual__1/shard-1-1.parquet")

    with ledger(run) as books:
        books.failed(key(1), "1", "timeout", "no answer in time")

    assert run.storage.get("runs/notes/manual__1/shard-1-1.parquet") == before


# States


def test_an_attempt_is_running_until_it_ends(run: Run) -> None:
    with ledger(run):
        [running] = read_attempts(run)
    [done] = read_attempts(run)

    assert (running.state, running.reason, running.plan_id) == ("running", None, "plan")
    assert (done.state, done.reason, done.plan_id) == ("done", None, "plan")
    assert running.started_at == done.started_at <= done.ended_at


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RunFailed("budget reached: all is spent"), "budget reached: all is spent"),
        (StorageError("S3 is away\nfor long"), "S3 is away"),
        (StorageError(f"writing cache/s/00/tag_{key(1)}.json: 503"), "writing cache/s/00/tag_….json: 503"),
        (KeyboardInterrupt(), "ended by KeyboardInterrupt"),
        (ValueError("the patient ate an apple"), "ended by ValueError"),
    ],
)
def test_an_attempt_that_raises_is_broken_and_says_why(run: Run, error: BaseException, reason: str) -> None:
    with pytest.raises(type(error)), ledger(run) as books:
        books.record(key(1), "1", record("fruit"))
        raise error

    [attempt] = read_attempts(run)
    assert (attempt.state, attempt.reason) == ("broken", reason)
    assert [outcome.status for outcome in attempt.outcomes] == ["tagged"]


def test_an_attempt_without_texts_is_an_attempt(run: Run) -> None:
    with ledger(run):
        pass

    [attempt] = read_attempts(run)
    assert list(attempt.outcomes) == []
    assert attempt.values("key") == []


# What is counted


def test_a_tagged_text_comes_back_as_it_was_noted(run: Run) -> None:
    with ledger(run) as books:
        books.spend(key(1), "7", Usage(input=100, cached_input=40, output=5))
        books.record(key(1), "7", record("fruit", "animal"))

    outcome = only_outcome(run)
    assert outcome.cost_usd == pytest.approx((60 * 1.0 + 40 * 0.1 + 5 * 10.0) / 1e6)
    assert replace(outcome, cost_usd=None) == Outcome(
        key=key(1),
        row_id="7",
        status="tagged",
        tags=["fruit", "animal"],
        model="gpt-5-mini-2025-08-07",
        requests=1,
        input_tokens=100,
        cached_input_tokens=40,
        output_tokens=5,
        cost_usd=None,
        answered_at=NOW,
    )


def test_a_refused_text_says_why(run: Run) -> None:
    with ledger(run) as books:
        books.record(key(1), "7", record(reason="content_filter"))

    outcome = only_outcome(run)
    assert (outcome.status, outcome.kind, outcome.tags) == ("refused", "content_filter", [])


def test_a_failed_text_says_why(run: Run) -> None:
    with ledger(run) as books:
        books.spend(key(1), "7", Usage())
        books.failed(key(1), "7", "timeout", "no answer in time")

    outcome = only_outcome(run)
    assert (outcome.status, outcome.kind, outcome.error) == ("failed", "timeout", "no answer in time")
    assert (outcome.tags, outcome.requests) == (None, 1)


def test_all_requests_for_a_text_are_counted(run: Run) -> None:
    with ledger(run) as books:
        for _ in range(3):
            books.spend(key(1), "7", Usage(input=100, output=10))
        usage, cost = books.spent_on(key(1))
        assert usage == Usage(input=300, output=30)
        assert cost == pytest.approx(0.0006)
        assert books.spent_usd == pytest.approx(0.0006)

    outcome = only_outcome(run)
    assert (outcome.status, outcome.requests, outcome.input_tokens, outcome.output_tokens) == ("asked", 3, 300, 30)
    assert outcome.cost_usd == pytest.approx(0.0006)


def test_a_text_that_was_not_asked_has_cost_nothing(run: Run) -> None:
    assert ledger(run).spent_on(key(1)) == (Usage(), 0.0)


def test_an_unknown_price_is_no_cost_of_zero(run: Run) -> None:
    with ledger(run, price=None) as books:
        books.spend(key(1), "7", Usage(input=100))
        assert books.spent_usd == 0.0

    assert only_outcome(run).cost_usd is None


def test_counts_tell_texts_by_status(run: Run) -> None:
    books = ledger(run)
    books.record(key(1), "1", record("fruit"))
    books.record(key(2), "2", record("fruit"))
    books.record(key(3), "3", record(reason="refusal"))
    books.failed(key(4), "4", "timeout", "no answer in time")
    books.spend(key(5), "5", Usage(input=1))

    assert books.counts() == {"tagged": 2, "refused": 1, "failed": 1, "asked": 1}


def test_counts_stay_when_the_file_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.ledger.FLUSH_SECONDS", 0.01)
    with ledger(run) as books:
        books.record(key(1), "1", record("fruit"))
        books.failed(key(2), "2", "timeout", "no answer in time")
        books.spend(key(3), "3", Usage(input=1))
        wait_until(lambda: len(outcomes(run)) == 3)
        books.record(key(4), "4", record("fruit"))

        assert books.counts() == {"tagged": 2, "failed": 1, "asked": 1}

    assert books.counts() == {"tagged": 2, "failed": 1, "asked": 1}


def test_a_text_that_ends_is_no_longer_one_that_was_asked(run: Run) -> None:
    books = ledger(run)
    books.spend(key(1), "1", Usage(input=1))
    before = books.counts()
    books.record(key(1), "1", record("fruit"))

    assert (before, books.counts()) == ({"asked": 1}, {"tagged": 1})


def test_a_text_whose_record_was_found_has_cost_nothing(run: Run) -> None:
    with ledger(run) as books:
        books.record(key(1), "7", record("fruit"))

    outcome = only_outcome(run)
    assert (outcome.status, outcome.requests, outcome.cost_usd, books.spent_usd) == ("tagged", 0, 0.0, 0.0)


def test_many_threads_lose_no_count(run: Run) -> None:
    with ledger(run) as books, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: books.spend(key(i % 10), str(i % 10), Usage(input=1, output=1)), range(2000)))

    [attempt] = read_attempts(run)
    assert [outcome.requests for outcome in attempt.outcomes] == [200] * 10
    assert books.spent_usd == pytest.approx(2000 * 11 / 1e6)


# Files


KILLED = """
    import sys, time
    from tagger.cache import Usage
    from tagger.dataset import Price
    from tagger.ledger import Ledger
    from tagger.runs import Run
    from tagger.storage import Storage
    from tests.servers import S3Store

    store = S3Store(*sys.argv[1:])
    run = Run(Storage(f"s3://{store.bucket}", store.client()), "notes", "manual__1")
    with Ledger(run, "plan", 1, Price(input=1.0, output=10.0)) as books:
        books.spend("k", "7", Usage(input=1000, output=100))
        print("spent", flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
def test_what_a_killed_attempt_spent_is_in_its_file(run: Run, s3_bucket: S3Store) -> None:
    where = [s3_bucket.endpoint, s3_bucket.access_key, s3_bucket.secret_key, s3_bucket.bucket]
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), *where], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "spent\n"
        time.sleep(FLUSH_SECONDS + 1)
        process.kill()

    [attempt] = read_attempts(run)
    assert FLUSH_SECONDS <= 10
    assert attempt.state == "running"
    assert attempt.ended_at - attempt.started_at >= timedelta(seconds=FLUSH_SECONDS)
    assert [(o.row_id, o.status, o.requests, o.cost_usd) for o in attempt.outcomes] == [("7", "asked", 1, 0.002)]


def test_a_write_in_between_that_fails_is_made_up_for(
    run: Run, s3_bucket: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.ledger.FLUSH_SECONDS", 0.02)
    client = s3_bucket.client()
    with ledger(run) as books:
        books.spend(key(1), "7", Usage(input=1))

        def is_deleted() -> bool:
            client.delete_object(Bucket=s3_bucket.bucket, Key="runs/notes/manual__1/shard-1-1.parquet")
            with suppress(ClientError):  # a write came in between
                client.delete_bucket(Bucket=s3_bucket.bucket)
                return True
            return False

        wait_until(is_deleted)
        time.sleep(0.3)
        client.create_bucket(Bucket=s3_bucket.bucket)

    assert only_outcome(run).requests == 1


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


class Memory(Storage):
    """Objects in memory, which `put` may fail to write."""

    def __init__(self) -> None:
        self.url = "s3://memory"
        self.objects: dict[str, bytes] = {}
        self.tries = 0
        self.is_away = False

    def create(self, path: str, body: bytes) -> bool:
        self.objects[path] = body
        return True

    def put(self, path: str, body: bytes) -> None:
        self.tries += 1
        if self.is_away:
            raise StorageError("S3 is away")
        self.objects[path] = body

    def get(self, path: str) -> bytes | None:
        return self.objects.get(path)

    def list(self, prefix: str) -> Any:
        return [(path, len(body)) for path, body in self.objects.items() if path.startswith(prefix)]


@pytest.fixture
def memory_run(monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Memory]:
    """A run in memory, whose books are written all the time."""
    monkeypatch.setattr("tagger.ledger.FLUSH_SECONDS", 0.002)
    memory = Memory()
    return Run(memory, "notes", "manual__1"), memory


def flushed(memory: Memory) -> None:
    """Wait for a write that began after now."""
    seen = memory.tries
    wait_until(lambda: memory.tries >= seen + 2)


steps = st.lists(
    st.tuples(st.sampled_from(["spend", "tag", "refuse", "fail", "flush", "flush in vain"]), st.integers(0, 5)),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_the_file_is_right_whenever_it_is_written(steps: list[tuple[str, int]]) -> None:
    memory = Memory()
    run = Run(memory, "notes", "manual__1")
    expected: dict[int, tuple[str, int]] = {}
    """Status and requests of each text."""

    def assert_right() -> None:
        [attempt] = read_attempts(run)
        found = {int(o.key, 16): (o.status, o.requests) for o in attempt.outcomes}
        assert found == expected
        assert len(list(attempt.outcomes)) == len(expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tagger.ledger.FLUSH_SECONDS", 0.002)
        with ledger(run) as books:
            for what, number in steps:
                status, requests = expected.get(number, ("asked", 0))
                if what.startswith("flush"):
                    memory.is_away = what == "flush in vain"
                    flushed(memory)
                    if not memory.is_away:
                        assert_right()
                elif status == "asked":  # a text ends once
                    if what == "spend":
                        books.spend(key(number), str(number), Usage(input=1))
                        expected[number] = ("asked", requests + 1)
                    elif what == "fail":
                        books.failed(key(number), str(number), "timeout", "no answer in time")
                        expected[number] = ("failed", requests)
                    else:
                        books.record(key(number), str(number), record(reason="refusal" if what == "refuse" else None))
                        expected[number] = ("refused" if what == "refuse" else "tagged", requests)
            memory.is_away = False

    assert_right()
    assert books.counts() == Counter(status for status, _ in expected.values())


def test_what_ended_while_s3_was_away_is_in_the_next_write(memory_run: tuple[Run, Memory]) -> None:
    run, memory = memory_run
    with ledger(run) as books:
        books.record(key(1), "1", record("fruit"))
        flushed(memory)
        memory.is_away = True
        books.record(key(2), "2", record("fruit"))
        flushed(memory)
        books.record(key(3), "3", record("fruit"))
        memory.is_away = False
        flushed(memory)

        assert sorted(o.row_id for o in outcomes(run)) == ["1", "2", "3"]


def test_books_that_cannot_be_closed_are_a_storage_error(memory_run: tuple[Run, Memory]) -> None:
    run, memory = memory_run
    with pytest.raises(StorageError, match="S3 is away"), ledger(run) as books:
        books.record(key(1), "1", record("fruit"))
        flushed(memory)
        memory.is_away = True

    [attempt] = read_attempts(run)
    assert (attempt.state, len(outcomes(run))) == ("running", 1)


def test_what_broke_the_attempt_is_told_rather_than_that_its_books_stay_open(memory_run: tuple[Run, Memory]) -> None:
    run, memory = memory_run
    with pytest.raises(RunFailed, match="budget reached"), ledger(run):
        memory.is_away = True
        raise RunFailed("budget reached")


def test_each_outcome_is_converted_once_however_often_the_file_is_written(
    memory_run: tuple[Run, Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[int] = []

    class Table:
        @staticmethod
        def from_pylist(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
            converted.append(len(rows))
            return pa.Table.from_pylist(rows, schema=schema)

    class CountingPyarrow:
        def __getattr__(self, name: str) -> Any:
            return Table if name == "Table" else getattr(pa, name)

    monkeypatch.setattr("tagger.ledger.pa", CountingPyarrow())
    run, memory = memory_run
    texts, still_open = 2000, 3
    with ledger(run) as books:
        for number in range(still_open):
            books.spend(key(texts + number), "1", Usage(input=1))
        for number in range(texts):
            books.record(key(number), "1", record("fruit"))
            if number % 100 == 0:
                flushed(memory)
        writes = memory.tries

    assert writes >= 40
    assert sum(converted) <= texts + still_open * (memory.tries + 1)
    assert len(outcomes(run)) == texts + still_open


@pytest.mark.parametrize("body", [b"", b"PAR1", b"no parquet at all", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_a_damaged_file_is_named(run: Run, body: bytes) -> None:
    run.storage.put("runs/notes/manual__1/shard-1-1.parquet", body)

    with pytest.raises(StorageError, match=r"runs/notes/manual__1/shard-1-1\.parquet: damaged"):
        read_attempts(run)


def test_a_file_cut_off_is_named(run: Run) -> None:
    with ledger(run) as books:
        books.record(key(1), "1", record("fruit"))
    path = "runs/notes/manual__1/shard-1-1.parquet"
    run.storage.put(path, (run.storage.get(path) or b"")[:-20])

    with pytest.raises(StorageError, match="damaged"):
        read_attempts(run)


@pytest.mark.parametrize("about", [None, {}, {"plan_id": "plan"}, [], "text"])
def test_a_parquet_file_that_is_not_ours_is_named(run: Run, about: object) -> None:
    path = "runs/notes/manual__1/shard-1-1.parquet"
    with ledger(run):
        pass
    table = pq.read_table(io.BytesIO(run.storage.get(path) or b""))
    body = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"tagger": json.dumps(about)} if about is not None else {}), body)
    run.storage.put(path, body.getvalue())

    with pytest.raises(StorageError, match="damaged"):
        read_attempts(run)


def test_a_confidence_of_another_type_is_named(run: Run) -> None:
    path = "runs/notes/manual__1/shard-1-1.parquet"
    with ledger(run) as books:
        books.record(key(1), "1", record("fruit"))
    table = pq.read_table(io.BytesIO(run.storage.get(path) or b""))
    place, body = table.schema.get_field_index("confidence"), io.BytesIO()
    pq.write_table(table.set_column(place, "confidence", pa.array([1])), body)
    run.storage.put(path, body.getvalue())

    with pytest.raises(StorageError, match="damaged"):
        read_attempts(run)


def test_a_file_has_no_column_for_a_text(run: Run) -> None:
    with ledger(run):
        pass

    table = pq.read_table(io.BytesIO(run.storage.get("runs/notes/manual__1/shard-1-1.parquet") or b""))
    assert table.column_names == [
        "key",
        "row_id",
        "status",
        "tags",
        "model",
        "kind",
        "error",
        "requests",
        "input_tokens",
        "cached_input_tokens",
        "output_tokens",
        "cost_usd",
        "answered_at",
        "confidence",
    ]


def test_a_run_without_attempts_has_none(run: Run) -> None:
    assert read_attempts(run) == []


# The latest outcome of each text


def attempt_of(number: int, *outcomes: Outcome) -> Attempt:
    started = NOW + timedelta(minutes=number)
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([vars(outcome) for outcome in outcomes], schema=SCHEMA), body)
    file = pq.ParquetFile(pa.BufferReader(body.getvalue()))
    return Attempt(1, number, "plan", "done", None, started, started, file)


def outcome(status: OutcomeStatus, row_id: str = "1", number: int = 1) -> Outcome:
    return Outcome(key(number), row_id, status)


@pytest.mark.parametrize(
    ("earlier", "later", "counts"),
    [
        ("asked", "failed", "later"),
        ("asked", "tagged", "later"),
        ("failed", "tagged", "later"),
        ("failed", "refused", "later"),
        ("failed", "failed", "later"),
        ("refused", "tagged", "later"),
        ("tagged", "refused", "later"),
        ("tagged", "tagged", "later"),
        ("failed", "asked", "earlier"),
        ("tagged", "asked", "earlier"),
        ("tagged", "failed", "earlier"),
        ("refused", "failed", "earlier"),
    ],
)
def test_an_answer_counts_more_than_none_and_later_more_than_earlier(
    earlier: OutcomeStatus, later: OutcomeStatus, counts: str
) -> None:
    attempts = [attempt_of(1, outcome(earlier, "earlier")), attempt_of(2, outcome(later, "later"))]

    assert latest_outcomes(attempts)[key(1)].row_id == counts


def test_each_text_has_one_outcome(run: Run) -> None:
    attempts = [
        attempt_of(1, outcome("tagged", number=1), outcome("failed", number=2)),
        attempt_of(2, outcome("tagged", number=2), outcome("asked", number=3)),
    ]

    latest = latest_outcomes(attempts)

    assert {each: latest[each].status for each in latest} == {key(1): "tagged", key(2): "tagged", key(3): "asked"}


statuses: st.SearchStrategy[OutcomeStatus] = st.sampled_from(["asked", "tagged", "refused", "failed"])
histories = st.lists(st.dictionaries(st.integers(0, 3), statuses, max_size=4), max_size=6)


@given(histories)
def test_an_answer_is_never_lost_whatever_the_order(history: list[dict[int, OutcomeStatus]]) -> None:
    attempts = [
        attempt_of(number, *(outcome(status, number=text) for text, status in texts.items()))
        for number, texts in enumerate(history)
    ]

    latest = latest_outcomes(attempts)

    assert set(latest) == {key(text) for texts in history for text in texts}
    for text in latest:
        had = [o.status for attempt in attempts for o in attempt.outcomes if o.key == text]
        answers: list[str] = [status for status in had if status in ("tagged", "refused")]
        failures: list[str] = [status for status in had if status == "failed"]
        assert latest[text].status == (answers or failures or had)[-1]


def test_the_latest_outcome_has_what_its_row_has() -> None:
    tagged = Outcome(key(1), "7", "tagged", ["fruit", "animal"], "gpt-5-mini", answered_at=NOW)
    failed = Outcome(key(2), "8", "failed", kind="timeout", error="no answer in time")

    latest = latest_outcomes([attempt_of(1, tagged, failed)])

    assert latest[key(1)]._asdict() == {
        "row_id": "7",
        "status": "tagged",
        "tags": ("fruit", "animal"),
        "model": "gpt-5-mini",
        "kind": None,
        "error": None,
        "answered_at": NOW,
        "confidence": None,
    }
    assert (latest[key(2)].kind, latest[key(2)].error, latest[key(2)].tags) == ("timeout", "no answer in time", None)


def test_what_the_llm_says_it_is_sure_of_is_kept_in_the_file_and_in_the_latest_outcome(run: Run) -> None:
    with ledger(run) as books:
        books.record(key(1), "7", record().model_copy(update={"tags": ["fruit"], "confidence": [0.75]}))
        books.record(key(2), "8", record().model_copy(update={"tags": [], "confidence": []}))
        books.record(key(3), "9", record())

    latest = latest_outcomes(read_attempts(run))

    assert [latest[key(number)].confidence for number in (1, 2, 3)] == [(0.75,), (), None]


def test_a_file_of_before_there_was_confidence_is_read(run: Run) -> None:
    with ledger(run) as books:
        books.record(key(1), "7", record().model_copy(update={"confidence": [0.75, 0.5]}))
    [(_, path)] = attempt_files(run)
    table = pq.read_table(io.BytesIO(run.storage.get(path) or b""))
    body = io.BytesIO()
    pq.write_table(table.drop_columns(["confidence"]), body)
    run.storage.put(path, body.getvalue())

    [attempt] = read_attempts(run)

    [outcome] = attempt.outcomes
    assert (outcome.row_id, outcome.status, outcome.confidence) == ("7", "tagged", None)
    assert latest_outcomes([attempt])[key(1)].confidence is None


def test_many_outcomes_are_read_in_parts_and_in_order(run: Run) -> None:
    with ledger(run) as books:
        for number in range(12_000):
            books.failed(key(number), str(number), "timeout", "no answer in time")

    [attempt] = read_attempts(run)
    assert [outcome.row_id for outcome in attempt.outcomes] == attempt.values("row_id")
    assert sorted(map(int, attempt.values("row_id"))) == list(range(12_000))
