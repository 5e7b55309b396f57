"""What one attempt at a shard did and spent, kept in its shard file.

`runs/<dataset>/<run_id>/shard-<k>-<attempt>.parquet` holds a row per text that was asked: its key and row id, the
outcome, the usage of all its calls, never the text. It is written again every few seconds, so that the money of a
killed attempt is still counted. No attempt replaces another's file.
"""

import io
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, NamedTuple, Self, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tagger.cache import Record, Usage
from tagger.dataset import Price
from tagger.exceptions import StorageError, TaggerError, Terminated
from tagger.price import cost_usd
from tagger.runs import Run, has_columns, utc_now

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
"""The design asks for at most 10; a write may take some of it."""

CLOSE_SECONDS = 3.0
"""How long the last write may take of a process that is told to end; without it the attempt stays `running`."""

FILES_AT_ONCE = 8
"""Files that are read at a time."""

OutcomeStatus = Literal["asked", "tagged", "refused", "failed"]
_STATUSES = pa.array(get_args(OutcomeStatus))

_TIME = pa.timestamp("us", tz="UTC")
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("row_id", pa.string()),
        ("status", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("model", pa.string()),
        ("kind", pa.string()),
        ("error", pa.string()),
        ("requests", pa.int64()),
        ("input_tokens", pa.int64()),
        ("cached_input_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("cost_usd", pa.float64()),
        ("answered_at", _TIME),
        ("confidence", pa.list_(pa.float64())),  # not in files of before it was asked for
    ]
)


@dataclass
class Outcome:
    """One text's row. `asked` means that calls were made and no outcome is known, as when the worker was killed."""

    key: str
    row_id: str
    status: OutcomeStatus = "asked"
    tags: list[str] | None = None
    model: str | None = None
    kind: str | None = None
    error: str | None = None
    requests: int = 0
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = 0.0
    answered_at: datetime | None = None
    confidence: list[float] | None = None


@dataclass(frozen=True)
class Attempt:
    """One attempt at a shard, as its file tells. An attempt that was killed stays `running`."""

    shard: int
    attempt: int
    plan_id: str
    state: Literal["running", "done", "broken"]
    reason: str | None
    started_at: datetime
    ended_at: datetime
    file: pq.ParquetFile
    """A row per text, with the columns of `SCHEMA`; read in parts, for there may be a million."""
    asked: Literal["online", "batch"] = "online"

    @property
    def outcomes(self) -> Iterator[Outcome]:
        """Yield the rows, one after the other."""
        for batch in self.file.iter_batches(batch_size=5000):
            columns = zip(batch.schema.names, batch.columns, strict=True)
            values = (instants(of) if name == "answered_at" else of.to_pylist() for name, of in columns)
            for row in zip(*values, strict=True):
                yield Outcome(*row)

    @property
    def spent_usd(self) -> float:
        """What it cost; unknown costs count as nothing."""
        return sum(cost or 0.0 for cost in self.values("cost_usd"))

    def values(self, name: str) -> list[Any]:
        """Return one column of all rows."""
        values: list[Any] = self.file.read(columns=[name]).column(0).to_pylist()
        return values


class BatchBooks(NamedTuple):
    """The file that a batch's answers are booked in; its path is empty until it is made."""

    path: str
    started_at: datetime


class Ledger:
    """The books of one attempt. Its methods may be called from many threads.

    Used as a context manager: the file is opened under a number of its own, kept up to date, and closed as `done`, or
    as `broken` with the reason if the block raises.
    """

    def __init__(
        self, run: Run, plan_id: str, shard: int, price: Price | None, batch: BatchBooks | None = None
    ) -> None:
        """Describe the attempt; with `batch` it is the one that its answers are booked in, however often."""
        self._run = run
        self._plan_id = plan_id
        self._shard = shard
        self._price = price
        self._asked = "batch" if batch else "online"
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._open: dict[str, Outcome] = {}
        self._usage: dict[str, Usage] = {}
        self._ended: list[Outcome] = []
        self._written: list[pa.Table] = []
        self._counts: Counter[str] = Counter()
        self._started_at = batch.started_at if batch else utc_now()
        self.spent_usd = 0.0
        """Cost of the attempt so far; unknown costs count as nothing."""
        self._closing = threading.Event()
        self._flusher = threading.Thread(target=self._flush_on, name="ledger", daemon=True)
        self._path = batch.path if batch else ""

    def __enter__(self) -> Self:
        self.create()
        self._flusher.start()
        return self

    def create(self) -> str:
        """Make the file, under the next free number, unless it is made; return its path."""
        if not self._path:
            attempt = 1 + max((a for a, _ in attempt_files(self._run, self._shard)), default=0)
            while not self._run.storage.create(
                path := _path(self._run, self._shard, attempt), self._body("running", None)
            ):
                attempt += 1
            self._path = path
        return self._path

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self._closing.set()
        if error is None:
            self._flusher.join()
            self._write("done", None)
            return
        closer = threading.Thread(target=self._close_broken, args=(error,), name="ledger", daemon=True)
        closer.start()
        is_told_to_end = isinstance(error, Terminated) or not isinstance(error, Exception)
        closer.join(CLOSE_SECONDS if is_told_to_end else None)

    def _close_broken(self, error: BaseException) -> None:
        self._flusher.join()
        # an error that is not ours may quote a text; the name of a record is of no use, and would have to be forgotten
        words = str(error).splitlines()[0] if isinstance(error, TaggerError) else f"ended by {type(error).__name__}"
        reason = re.sub(r"tag_[0-9a-f]{32}\b", "tag_…", words)
        try:
            self._write("broken", reason)
        except TaggerError as e:
            logger.warning("the books of this attempt could not be closed: %s", e)

    def spend(self, key: str, row_id: str, usage: Usage, requests: int = 1) -> None:
        """Count an HTTP request for a text; or its part in one (`requests=0`) that is counted for another text."""
        with self._lock:
            outcome = self._outcome(key, row_id)
            total = self._usage.get(key, Usage()) + usage
            self._usage[key] = total
            outcome.requests += requests
            outcome.input_tokens = total.input
            outcome.cached_input_tokens = total.cached_input
            outcome.output_tokens = total.output
            outcome.cost_usd = cost_usd(total, self._price)
            self.spent_usd += cost_usd(usage, self._price) or 0.0

    def spent_on(self, key: str) -> tuple[Usage, float | None]:
        """Return what a text that has no outcome yet has used and cost so far."""
        usage = self._usage.get(key, Usage())
        return usage, cost_usd(usage, self._price)

    def record(self, key: str, row_id: str, record: Record) -> None:
        """Note a text's record. It ends the text."""
        with self._lock:
            outcome = self._outcome(key, row_id)
            outcome.status, outcome.kind, outcome.tags = record.status, record.reason, list(record.tags)
            outcome.confidence = None if record.confidence is None else list(record.confidence)
            outcome.model, outcome.answered_at = record.model, record.created_at
            self._end(outcome)

    def failed(self, key: str, row_id: str, kind: str, error: str) -> None:
        """Note that a text got no answer. It ends the text."""
        with self._lock:
            outcome = self._outcome(key, row_id)
            outcome.status, outcome.kind, outcome.error = "failed", kind, error
            self._end(outcome)

    def counts(self) -> dict[str, int]:
        """Return the number of texts by status."""
        with self._lock:
            asked = Counter({"asked": len(self._open)} if self._open else {})
            return dict(self._counts + asked)

    def _outcome(self, key: str, row_id: str) -> Outcome:
        return self._open.setdefault(key, Outcome(key, row_id))

    def _end(self, outcome: Outcome) -> None:
        del self._open[outcome.key]
        self._usage.pop(outcome.key, None)
        self._ended.append(outcome)
        self._counts[outcome.status] += 1

    def _flush_on(self) -> None:
        while not self._closing.wait(FLUSH_SECONDS):
            try:
                self._write("running", None)
            except Exception:  # S3 may be away for a while; the last write, in the main thread, tells
                continue

    def _write(self, state: str, reason: str | None) -> None:
        with self._write_lock:
            self._run.storage.put(self._path, self._body(state, reason))

    def _body(self, state: str, reason: str | None) -> bytes:
        with self._lock:
            ended, self._ended = self._ended, []
            still_open = [dict(vars(outcome)) for outcome in self._open.values()]
        if ended:
            # once and for all, so that the cost of a write stays small however many texts have ended
            self._written.append(pa.Table.from_pylist([vars(outcome) for outcome in ended], schema=SCHEMA))
        about = {
            "plan_id": self._plan_id,
            "state": state,
            "reason": reason,
            "started_at": self._started_at.isoformat(),
            "ended_at": utc_now().isoformat(),
            "asked": self._asked,
        }
        table = pa.concat_tables([*self._written, pa.Table.from_pylist(still_open, schema=SCHEMA)])
        body = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({"tagger": json.dumps(about)}), body, compression="zstd")
        return body.getvalue()


def _path(run: Run, shard: int, attempt: int) -> str:
    return f"{run.files}shard-{shard}-{attempt}.parquet"


def attempt_files(run: Run, shard: int | None = None) -> Iterator[tuple[int, str]]:
    """Yield number and path of the attempts at a shard, or at all of them."""
    for path, _ in run.storage.list(f"{run.files}shard-{'' if shard is None else f'{shard}-'}"):
        yield int(path.removesuffix(".parquet").rsplit("-", 1)[1]), path


def read_attempts(run: Run, shard: int | None = None) -> list[Attempt]:
    """Return the attempts at a shard, or at all of the run, oldest first.

    Raises:
        StorageError: a file is damaged.
    """
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        attempts = threads.map(partial(_read, run), [path for _, path in attempt_files(run, shard)])
        return sorted(attempts, key=lambda a: (a.started_at, a.attempt))


def _read(run: Run, path: str) -> Attempt:
    body = run.storage.get(path) or b""
    try:
        file = pq.ParquetFile(pa.BufferReader(body))
        columns = max(len(file.schema_arrow), len(SCHEMA) - 1)  # old ones have no `confidence`
        if columns > len(SCHEMA) or not has_columns(file.schema_arrow, pa.schema(list(SCHEMA)[:columns])):
            raise ValueError("other columns")
        for part in file.iter_batches(batch_size=50_000):  # so that damage shows here
            if not pc.all(pc.is_in(part.column("status"), _STATUSES)).as_py():
                raise ValueError("another status")
        about: dict[str, Any] = json.loads((file.schema_arrow.metadata or {})[b"tagger"])
        shard, attempt = path.removesuffix(".parquet").rsplit("-", 2)[1:]
        return Attempt(
            shard=int(shard),
            attempt=int(attempt),
            plan_id=about["plan_id"],
            state=about["state"],
            reason=about["reason"],
            started_at=_instant(about["started_at"]),
            ended_at=_instant(about["ended_at"]),
            asked=about.get("asked", "online"),
            file=file,
        )
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, OverflowError):
        raise StorageError(f"{run.storage.url}/{path}: damaged; delete it to go on without its counts") from None


def _instant(written: str) -> datetime:
    instant = datetime.fromisoformat(written)
    if instant.tzinfo is None:
        raise ValueError("no zone")
    return instant.astimezone(UTC)


def instants(column: pa.Array) -> list[datetime | None]:
    """Return times in UTC. Where they have a zone, Arrow imports pandas to convert them, and takes 4 µs for each."""
    times = column.cast(pa.timestamp("us")).to_pylist()
    return [None if time is None else time.replace(tzinfo=UTC) for time in times]


class Latest(NamedTuple):
    """What became of a text, in as little memory as that takes: a run may have a million."""

    row_id: str
    status: str
    tags: tuple[str, ...] | None
    model: str | None
    kind: str | None
    error: str | None
    answered_at: datetime | None
    confidence: tuple[float, ...] | None = None


_RANK = {"tagged": 3, "refused": 3, "failed": 2, "asked": 1}


def latest_outcomes(attempts: Iterable[Attempt]) -> dict[str, Latest]:
    """Return each text's outcome over all attempts: an answer counts more than a failure, later more than earlier."""
    latest: dict[str, Latest] = {}
    known: dict[Any, Any] = {}  # equal values are one object
    for attempt in attempts:
        for outcome in attempt.outcomes:
            earlier = latest.get(outcome.key)
            if earlier is None or _RANK[outcome.status] >= _RANK[earlier.status]:
                tags = None if outcome.tags is None else tuple(outcome.tags)
                sure = None if outcome.confidence is None else tuple(outcome.confidence)
                few = (outcome.status, tags, outcome.model, outcome.kind, outcome.error)
                shared = (known.setdefault(value, value) for value in few)
                values = (outcome.row_id, *shared, outcome.answered_at, known.setdefault(sure, sure))
                latest[outcome.key] = Latest._make(values)
    return latest
