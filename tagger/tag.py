"""The tag step: one shard of new texts goes through the tree."""

import logging
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from redis.exceptions import LockError, RedisError

from tagger.cache import Cache, Record, Usage, patiently
from tagger.connections import Connections, openai_client
from tagger.dataset import Dataset
from tagger.exceptions import BUDGET_REACHED, InputError, LLMStopped, RunFailed, StorageError, TaggerError, TextFailed
from tagger.ledger import Ledger, latest_outcomes, read_attempts
from tagger.llm import Client
from tagger.lock import RunLocks
from tagger.price import price_of
from tagger.progress import showing
from tagger.redis_connection import redis_client
from tagger.runs import Run, Shard, opened_parquet, shard_path, utc_now
from tagger.throttle import LocalRates, Rates, RedisRates, Stopped, Throttle

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

FAILURES_LOGGED = 20
"""Lines per shard; all failures are in the shard file."""


class ShardTexts:
    """The new texts of a shard, read wave by wave; and the ids of rows that have them, while they are worked on."""

    def __init__(self, file: pq.ParquetFile, cache: Cache) -> None:
        self._file = file
        self._reading = threading.Lock()  # two threads in one ParquetFile crash the process, or hang
        self._cache = cache
        self.waves: int = file.num_row_groups
        self.row_ids: dict[str, str] = {}

    def keys(self, wave: int) -> list[str]:
        """Return the keys of a wave's texts."""
        keys: list[str] = self._read(wave, "key").column("key").to_pylist()
        return keys

    def answered(self) -> int:
        """Return the number of texts that are known to have a record."""
        return sum(self._cache.complete(key) for wave in range(self.waves) for key in self.keys(wave))

    def unanswered(self, wave: int) -> Mapping[str, str]:
        """Return those texts of a wave, by key, that have no record yet."""
        table = self._read(wave, "key", "row_id", "text")
        texts = {}
        columns = (table.column(name).to_pylist() for name in ("key", "row_id", "text"))
        for key, row_id, text in zip(*columns, strict=True):
            if not self._cache.complete(key):
                texts[key] = text
                self.row_ids[key] = row_id
        return texts

    def _read(self, wave: int, *columns: str) -> pa.Table:
        try:
            with self._reading:
                return self._file.read_row_group(wave, columns=list(columns))
        except (pa.ArrowException, OSError) as e:
            error = StorageError(f"the shard's texts cannot be read ({type(e).__name__}): run `tagger plan` again")
        raise error


class ShardAsker:
    """What the tasks of one shard share: the cache, the client, the books and the budget (USD, None for no limit)."""

    def __init__(
        self,
        cache: Cache,
        client: Client,
        throttle: Throttle,
        ledger: Ledger,
        row_ids: dict[str, str],
        *,
        budget: float | None,
        locks: RunLocks | None,
        recheck: bool,
    ) -> None:
        self.cache = cache
        self.lock: Mapping[str, Any] = locks.parameters if locks else {}
        self._locks = locks
        self._client = client
        self._throttle = throttle
        self._ledger = ledger
        self._row_ids = row_ids
        self._budget = budget
        self._recheck = recheck
        self._mutex = threading.Lock()
        self.failures = 0
        self.stopped_by: TaggerError | None = None

    def found(self, key: str) -> Record | None:
        """Return the record that another worker, or an attempt that was killed, wrote since the plan."""
        if not self._recheck:
            return None
        return patiently(lambda: self.cache.read(key) if self.cache.exists(key) else None)

    def ask(self, key: str, text: str) -> Record:
        """Ask the LLM for a text's tags and return the record to write.

        Raises:
            TextFailed: there is no usable answer.
            LLMStopped, Stopped: no more texts are asked.
        """
        row_id = self._row_ids[key]

        def spend(usage: Usage) -> None:
            self._ledger.spend(key, row_id, usage)
            if self._budget is not None and self._ledger.spent_usd >= self._budget:
                self._stop(budget_reached())

        answer = self._client.ask(key, text, spend)
        usage, cost = self._ledger.spent_on(key)
        return Record(
            status="refused" if answer.reason else "tagged",
            reason=answer.reason,
            tags=answer.tags,
            model=answer.model,
            usage=usage,
            cost_usd=cost,
            finish_reason=answer.finish_reason,
            created_at=utc_now(),
        )

    def writing(self) -> AbstractContextManager[None]:
        """Count an answer as not yet written while the block runs."""
        return self._throttle.writing()

    def done(self, key: str, record: Record) -> None:
        """Note that a text's record is written."""
        self._ledger.record(key, self._row_ids.pop(key), record)

    def failed(self, key: str, error: BaseException) -> None:
        """Note that a text's task failed. What would fail for the other texts too stops the shard."""
        if self.cache.complete(key):  # only its lock could not be freed
            return
        if isinstance(error, LockError) and error.__context__ is not None:  # that came on top
            error = error.__context__
        row_id = self._row_ids.pop(key)
        if isinstance(error, TextFailed):
            self._ledger.failed(key, row_id, error.kind, str(error))
            with self._mutex:
                self.failures += 1
                failures = self.failures
            if failures <= FAILURES_LOGGED:
                logger.warning("row %s failed: %s: %s", row_id, error.kind, error)
            if failures == FAILURES_LOGGED:
                logger.warning("further failures are not logged; the shard file has them all")
        elif isinstance(error, LLMStopped):
            self._stop(error)
        elif isinstance(error, RedisError) and self._locks is not None:
            self._stop(self._locks.failure(error))
        elif not isinstance(error, Stopped):
            # The answer may be paid for and not written. Its tags are in nobody's hands: ask no further.
            self._ledger.failed(key, row_id, "storage", "its record could not be read or written")
            known = isinstance(error, (StorageError, InputError))
            self._stop(StorageError(str(error)) if known else TaggerError(f"unexpected {type(error).__name__}"))

    def _stop(self, error: TaggerError) -> None:
        self.stopped_by = self.stopped_by or error
        self._throttle.stop()


def budget_reached() -> RunFailed:
    """Return the error of a shard that has spent its part of the budget."""
    return RunFailed(f"{BUDGET_REACHED}: this shard's share of `limits.max_cost_usd` is spent")


def tag(run: Run, number: int, connections: Connections, *, alone: bool = False) -> dict[str, int]:
    """Tag the texts of a shard, those that an earlier attempt answered aside; return the texts by status.

    Texts that fail do not fail the step. `alone` tells that the run's shards go one after the other, so that each has
    the whole rate of the run.

    Raises:
        InputError: there is no such run or shard, or Redis, which `lock` asks for, does not answer.
        LLMStopped: the endpoint refuses every call.
        LockFailed: Redis went away in between.
        RunFailed: the shard's share of the budget is spent.
        StorageError: answers can no longer be written.
    """
    dataset, plan = run.dataset(), run.plan()
    if not 1 <= number <= len(plan.shards):
        raise InputError(f"run `{run.run_id}` has {len(plan.shards)} shards, no shard {number}")
    shard = plan.shards[number - 1]
    earlier = read_attempts(run, number)
    answered = latest_outcomes(attempt for attempt in earlier if attempt.plan_id == plan.plan_id)
    cache = Cache(run.storage, plan.spec_id, dataset.llm.model)
    cache.assume(key for key, outcome in answered.items() if outcome.status in ("tagged", "refused"))
    budget = None
    if dataset.limits.max_cost_usd is not None:
        spent = sum(cost or 0.0 for attempt in earlier for cost in attempt.values("cost_usd"))
        budget = dataset.limits.max_cost_usd / len(plan.shards) - spent
    with Ledger(run, plan.plan_id, number, price_of(dataset.llm)) as ledger, ExitStack() as stack:
        redis = redis_client(dataset.lock.conn_id, connections) if dataset.lock else None
        locks = RunLocks(redis, dataset.lock.conn_id) if redis and dataset.lock else None
        throttle = Throttle(dataset.llm.concurrency, _rates(run, dataset, 1 if alone else len(plan.shards), redis))
        client = Client(dataset, openai_client(dataset.llm.conn_id, connections), throttle)
        stack.enter_context(closing(client))
        file = stack.enter_context(opened_parquet(run.storage, shard_path(run, plan.plan_id, number)))
        texts = ShardTexts(file, cache)
        asker = ShardAsker(
            cache,
            client,
            throttle,
            ledger,
            texts.row_ids,
            budget=budget,
            locks=locks,
            recheck=bool(earlier) or locks is not None,
        )
        done = texts.answered()
        if done < shard.texts:
            if budget is not None and budget <= 0:
                raise budget_reached()
            with showing(shard, ledger, done):
                _build(dataset, shard, texts, asker, throttle, locks)
        counts = ledger.counts()
    logger.info("%s: %s", shard.name, ", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing to do")
    return counts


def _rates(run: Run, dataset: Dataset, shards: int, redis: "Redis | None") -> Rates | None:
    """Return the run's rates: shared through Redis, or this shard's part of them."""
    requests, tokens = dataset.llm.requests_per_minute, dataset.llm.tokens_per_minute
    if requests is None and tokens is None:
        return None
    if redis is not None:
        return RedisRates(redis, f"{dataset.dataset}:{run.run_id}", requests, tokens)
    return LocalRates(requests and requests / shards, tokens and tokens / shards)


def _build(
    dataset: Dataset, shard: Shard, texts: ShardTexts, asker: ShardAsker, throttle: Throttle, locks: RunLocks | None
) -> None:
    # gokart and pandas take seconds to import: not where a command only prints an error
    from tagger.engine import build
    from tagger.tasks import TagTexts

    tree = TagTexts(shard=f"shard-{shard.shard}-of-{shard.of}", texts=texts, asker=asker)
    # as many again as calls may be in flight: they write answers, or wait for their turn
    threads = min(2 * dataset.llm.concurrency, shard.texts)
    with locks.held() if locks else nullcontext():
        complete = build(tree, threads=threads, stopped=throttle.stopped)
    if complete:  # also where the last answer took what was left of the budget
        return
    if asker.stopped_by is not None:
        raise asker.stopped_by
    if not asker.failures:
        raise TaggerError(f"{shard.name}: the tree ended before all texts were asked")
