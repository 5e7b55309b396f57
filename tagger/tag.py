"""The tag step: one shard of new texts goes through the tree."""

import logging
import threading
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
from redis.exceptions import LockError, RedisError

from tagger.batch import collected
from tagger.cache import Cache, Chars, Record, Usage, patiently
from tagger.connections import Connections, openai_client
from tagger.dataset import Dataset
from tagger.exceptions import BUDGET_REACHED, InputError, LLMStopped, RunFailed, StorageError, TaggerError, TextFailed
from tagger.ledger import Latest, Ledger, latest_outcomes, read_attempts
from tagger.llm import Client
from tagger.lock import RunLocks
from tagger.packing import Packer, shares
from tagger.price import price_of
from tagger.progress import showing
from tagger.redis_connection import redis_client
from tagger.runs import Plan, Run, Shard, opened_parquet, shard_path, utc_now
from tagger.shard_budget import ShardBudget, shard_budget
from tagger.shards import SCHEMA as SHARD_SCHEMA
from tagger.throttle import BudgetSpent, LocalRates, Rates, RedisRates, Stopped, Throttle

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

FAILURES_LOGGED = 20
"""Lines per shard; all failures are in the shard file."""

MOST_THREADS = 1000
"""Where texts are asked together: each waits on a thread, which with a lock may want a connection to Redis. Of those
there are `MAX_REDIS_CONNECTIONS`."""


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


class NotAsked:
    """What answers where the Batch API alone is asked: texts that it gave no answer to have failed."""

    def __init__(self, outcomes: Mapping[str, Latest]) -> None:
        self._outcomes = outcomes

    def ask(self, key: str, text: str, spend: object) -> NoReturn:
        """Raise `TextFailed` as the batch had it, or for a text that was in none, since it cannot be encoded."""
        outcome = self._outcomes.get(key)
        if outcome is None or outcome.kind is None:
            raise TextFailed("rejected", "the text cannot be encoded in UTF-8")
        raise TextFailed(outcome.kind, outcome.error or "")


class ShardAsker:
    """What the tasks of one shard share: the cache, the way to ask, the books and the budget."""

    def __init__(
        self,
        cache: Cache,
        packer: Packer | NotAsked,
        throttle: Throttle,
        ledger: Ledger,
        row_ids: dict[str, str],
        *,
        budget: ShardBudget,
        locks: RunLocks | None,
        recheck: bool,
    ) -> None:
        self.cache = cache
        self.lock: Mapping[str, Any] = locks.parameters if locks else {}
        self._locks = locks
        self._packer = packer
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
        answer = self._packer.ask(key, text, self._spend)
        usage, cost = self._ledger.spent_on(key)
        return Record(
            status="refused" if answer.reason else "tagged",
            reason=answer.reason,
            tags=answer.tags,
            confidence=answer.confidence,
            model=answer.model,
            usage=usage,
            cost_usd=cost,
            finish_reason=answer.finish_reason,
            asked=answer.asked,
            chars=Chars.of(text),
            created_at=utc_now(),
        )

    def _spend(self, texts: Mapping[str, str], usage: Usage) -> None:
        """Count one HTTP request for these texts."""
        for number, (key, share) in enumerate(shares(usage, texts).items()):
            self._ledger.spend(key, self._row_ids[key], share, requests=0 if number else 1)
        with suppress(RedisError, TaggerError):  # the answer is paid for; the next call will tell
            if self._budget.is_spent(self._ledger.spent_usd):
                self._stop(self._budget_reached())

    def _budget_reached(self) -> RunFailed:
        return RunFailed(f"{BUDGET_REACHED}: {self._budget.name} is spent")

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
        elif isinstance(error, BudgetSpent):
            self._stop(self._budget_reached())
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


def tag(run: Run, number: int, connections: Connections, *, alone: bool = False) -> dict[str, int]:
    """Tag the texts of a shard, those that an earlier attempt answered aside; return the texts by status.

    Texts that fail do not fail the step. `alone` tells that the run's shards go one after the other, so that each has
    the whole rate of the run, and all that is left of its budget.

    Raises:
        InputError: there is no such run, snapshot or shard, or Redis, which `lock` asks for, does not answer.
        LLMStopped: the endpoint refuses every call.
        LockFailed: Redis went away in between.
        RunFailed: the budget is spent, or the shard's batch has not ended.
        StorageError: answers can no longer be written.
    """
    dataset, _, plan = run.dataset(), run.snapshot(), run.plan()
    shard = plan.find(number)
    if dataset.llm.mode == "online":
        return _tag(run, dataset, plan, shard, connections, alone=alone)
    with collected(run, number, connections) as pending:
        return _tag(run, dataset, plan, shard, connections, alone=alone, pending=pending)


def _tag(
    run: Run,
    dataset: Dataset,
    plan: Plan,
    shard: Shard,
    connections: Connections,
    *,
    alone: bool,
    pending: Collection[str] = (),
) -> dict[str, int]:
    number = shard.shard
    earlier = read_attempts(run, number)
    answered = latest_outcomes(attempt for attempt in earlier if attempt.plan_id == plan.plan_id)
    cache = Cache(run.storage, plan.spec_id, dataset.llm.model, dataset.tag_ids)
    done_before = [key for key, outcome in answered.items() if outcome.status in ("tagged", "refused")]
    cache.assume(done_before)
    cache.assume(pending)  # others hold them: there is nothing to ask
    with Ledger(run, plan.plan_id, number, price_of(dataset.llm)) as ledger, ExitStack() as stack:
        redis = redis_client(dataset.lock.conn_id, connections) if dataset.lock else None
        locks = RunLocks(redis, dataset.lock.conn_id) if redis and dataset.lock else None
        budget = shard_budget(plan, run, number, ledger, redis, alone=alone)
        throttle = Throttle(
            dataset.llm.concurrency,
            _rates(run, dataset, 1 if alone else len(plan.shards), redis),
            lambda: budget.is_spent(ledger.spent_usd),
        )
        client = Client(dataset, openai_client(dataset.llm.conn_id, connections), throttle)
        stack.enter_context(closing(client))
        path = shard_path(run, plan.plan_id, number)
        file = stack.enter_context(opened_parquet(run.storage, path, SHARD_SCHEMA))
        texts = ShardTexts(file, cache)
        by_batch_only = dataset.llm.mode == "batch" and dataset.llm.batch_fallback is None
        asker = ShardAsker(
            cache,
            NotAsked(answered) if by_batch_only else Packer(client, dataset.llm.texts_per_request),
            throttle,
            ledger,
            texts.row_ids,
            budget=budget,
            locks=locks,
            recheck=bool(earlier) or locks is not None or dataset.llm.mode == "batch",
        )
        done = texts.answered()
        if done < shard.texts:
            with showing(shard, ledger, done):
                _build(dataset, shard, texts, asker, throttle, locks)
        counts = Counter(ledger.counts())
    if dataset.llm.mode == "batch":  # whose books the answers are in that were just collected
        counts += Counter(answered[key].status for key in done_before)
    logger.info("%s: %s", shard.name, ", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing to do")
    return dict(counts)


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
    calls = 2 * dataset.llm.concurrency
    threads = min(max(calls, min(calls * dataset.llm.texts_per_request, MOST_THREADS)), shard.texts)
    with locks.held() if locks else nullcontext():
        complete = build(tree, threads=threads, stopped=throttle.stopped)
    if complete:  # also where the last answer took what was left of the budget
        return
    if asker.stopped_by is not None:
        raise asker.stopped_by
    if not asker.failures:
        raise TaggerError(f"{shard.name}: the tree ended before all texts were asked")
