"""What a shard's files tell of its texts: counts, money, failures with their row ids. Never a text."""

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from tagger.ledger import Attempt, read_attempts
from tagger.runs import Run
from tagger.spend import list_attempts, spend_of, total_usd

ROW_IDS_SHOWN = 100
"""Of each kind of failure."""

TALLIES_KEPT = 1024
"""Each is small; those of the last runs that somebody looked at."""

ENDED = ("tagged", "refused", "failed")

_RANK = pa.array(["asked", "failed", "refused", "tagged"])
"""By what counts more in the end; the last two count alike."""


@dataclass
class Failures:
    """How many texts ended so, and some rows that have such a text."""

    count: int = 0
    row_ids: list[str] = field(default_factory=list)

    def add(self, count: int, row_ids: list[str]) -> None:
        """Count more of them."""
        self.count += count
        self.row_ids += row_ids[: ROW_IDS_SHOWN - len(self.row_ids)]


@dataclass(frozen=True)
class Tally:
    """What the attempts at a shard did: of a text that several asked for, the outcome that counts in the end."""

    counts: Counter[str]
    """Texts by outcome."""
    failures: dict[str, Failures]
    """By kind, refusals too."""
    spent_usd: float | None
    """None where the price is not known."""
    attempt: int | None = None
    """Number of the last one, of which the next four tell too; None without attempts."""
    state: Literal["running", "done", "broken"] | None = None
    """One that was killed stays `running`."""
    started_at: datetime | None = None
    updated_at: datetime | None = None
    texts_per_second: float | None = None
    """Of the texts that ended; None where the Batch API answered them."""

    @property
    def done(self) -> int:
        """Texts that have an outcome."""
        return sum(self.counts[status] for status in ENDED)


NOTHING = Tally(Counter(), {}, 0.0)


class Tallies:
    """Tallies of shards, kept as long as the files behind them stay as they are: a page asks every few seconds."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, ...], Tally] = OrderedDict()
        self._lock = threading.Lock()

    def versions(self, run: Run) -> dict[int, list[str]]:
        """Return names and versions of the files of each shard, in one listing."""
        found: dict[int, list[str]] = {}
        for name, version in sorted(list_attempts(run).items()):
            found.setdefault(int(name.split("-")[1]), []).append(f"{name} {version.etag}")
        return found

    def of(self, run: Run, plan_id: str, shard: int, versions: list[str]) -> Tally:
        """Return a shard's tally.

        Raises:
            StorageError: a file is damaged.
        """
        key = (run.storage.url, run.files, plan_id, *versions)
        if (known := self._known(key)) is not None:
            return known
        known = tally(read_attempts(run, shard), plan_id)
        with self._lock:
            self._kept[key] = known
            while len(self._kept) > TALLIES_KEPT:
                self._kept.popitem(last=False)
        return known

    def _known(self, key: tuple[str, ...]) -> Tally | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)


def tally(attempts: list[Attempt], plan_id: str) -> Tally:
    """Return what these attempts at one shard, oldest first, did for a plan."""
    present = [attempt for attempt in attempts if attempt.plan_id == plan_id]
    if not present:
        return NOTHING
    texts = _texts(present)
    last = present[-1]
    seconds = (last.ended_at - last.started_at).total_seconds()
    ended = _counts(last.file.read(columns=["status"]).column("status"))
    done = sum(ended[status] for status in ENDED)
    return Tally(
        counts=_counts(texts.column("status")),
        failures=_failures(texts),
        spent_usd=total_usd(spend_of(attempt, {}).cost_usd for attempt in present),
        attempt=last.attempt,
        state=last.state,
        started_at=last.started_at,
        updated_at=last.ended_at,
        texts_per_second=done / seconds if done and seconds > 0 and last.asked == "online" else None,
    )


def _texts(attempts: list[Attempt]) -> pa.Table:
    """Return status, kind and row id of each text, as it stands after all attempts.

    This is `tagger.ledger.latest_outcomes` on columns: that takes half a second for the texts of a large shard.
    """
    columns = ["status", "kind", "row_id"]
    if len(attempts) == 1:
        return attempts[0].file.read(columns=columns)
    rows = pa.concat_tables([attempt.file.read(columns=["key", *columns]) for attempt in attempts])
    number = max(rows.num_rows, 1)
    rank = pc.min_element_wise(pc.index_in(rows.column("status"), _RANK), 2)
    weight = pc.add(pc.multiply(pc.cast(rank, pa.int64()), number), pa.array(range(rows.num_rows)))
    heaviest = rows.append_column("weight", weight).group_by("key").aggregate([("weight", "max")]).column("weight_max")
    return rows.select(columns).take(pc.subtract(heaviest, pc.multiply(pc.divide(heaviest, number), number)))


def _counts(statuses: pa.ChunkedArray) -> Counter[str]:
    return Counter({each["values"]: each["counts"] for each in pc.value_counts(statuses).to_pylist()})


def _failures(texts: pa.Table) -> dict[str, Failures]:
    failed = texts.filter(pc.is_valid(texts.column("kind")))
    found: dict[str, Failures] = {}
    for kind, count in sorted(_counts(failed.column("kind")).items()):
        rows = failed.filter(pc.equal(failed.column("kind"), kind)).column("row_id")
        found[kind] = Failures(count, rows.slice(0, ROW_IDS_SHOWN).to_pylist())
    return found
