"""The tag step: one shard of new texts goes through the tree."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from tagger.cache import Cache, Record
from tagger.connections import Connections, openai_client
from tagger.dataset import Dataset
from tagger.exceptions import InputError, LLMStopped, RunFailed, StorageError, TaggerError, TextFailed
from tagger.ledger import Ledger, latest_outcomes, read_attempts
from tagger.llm import Client, Stopped
from tagger.price import price_of
from tagger.runs import Plan, Run, Shard, read_parquet, shard_path, utc_now

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0

FAILURES_LOGGED = 20
"""Lines per shard; all failures are in the shard file."""

BUDGET_REACHED = "budget reached"
"""How the reason of a shard starts that stopped at `limits.max_cost_usd`."""


@dataclass
class ShardTexts:
    """The new texts of a shard by key, and the id of a row that has it."""

    texts: dict[str, str] = field(default_factory=dict, repr=False)
    row_ids: dict[str, str] = field(default_factory=dict)


class ShardAsker:
    """What the tasks of one shard share: the cache, the client, the books and the budget (USD, None for no limit)."""

    def __init__(
        self, cache: Cache, client: Client, ledger: Ledger, row_ids: dict[str, str], budget: float | None
    ) -> None:
        self.cache = cache
        self._client = client
        self._ledger = ledger
        self._row_ids = row_ids
        self._budget = budget
        self.failures = 0
        self._lock = threading.Lock()
        self.stopped_by: TaggerError | None = None

    def ask(self, key: str, text: str) -> Record:
        """Ask the LLM for a text's tags and return the record to write.

        Raises:
            TextFailed: there is no usable answer.
            LLMStopped, Stopped: no more texts are asked.
        """
        if self._budget is not None and self._ledger.spent_usd >= self._budget:
            self._stop(RunFailed(f"{BUDGET_REACHED}: this shard's share of `limits.max_cost_usd` is spent"))
        row_id = self._row_ids[key]
        answer = self._client.ask(key, text, lambda usage: self._ledger.spend(key, row_id, usage))
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

    def done(self, key: str, record: Record) -> None:
        """Note that a text's record is written."""
        self._ledger.record(key, self._row_ids[key], record)

    def failed(self, key: str, error: BaseException) -> None:
        """Note that a text's task failed. What would fail for the other texts too stops the shard."""
        row_id = self._row_ids[key]
        if isinstance(error, TextFailed):
            self._ledger.failed(key, row_id, error.kind, str(error))
            with self._lock:
                self.failures += 1
                failures = self.failures
            if failures <= FAILURES_LOGGED:
                logger.warning("row %s failed: %s: %s", row_id, error.kind, error)
            if failures == FAILURES_LOGGED:
                logger.warning("further failures are not logged; the shard file has them all")
        elif isinstance(error, LLMStopped):
            self._stop(error)
        elif not isinstance(error, Stopped):
            # The answer may be paid for and not written. Its tags are in nobody's hands: ask no further.
            self._ledger.failed(key, row_id, "storage", "the answer could not be written")
            known = isinstance(error, (StorageError, InputError))
            self._stop(StorageError(str(error)) if known else TaggerError(f"unexpected {type(error).__name__}"))

    def _stop(self, error: TaggerError) -> None:
        self.stopped_by = self.stopped_by or error
        self._client.stop()


def tag(run: Run, number: int, connections: Connections) -> dict[str, int]:
    """Tag the texts of a shard, those that an earlier attempt answered aside; return the texts by status.

    Texts that fail do not fail the step.

    Raises:
        InputError: there is no such run or shard.
        LLMStopped: the endpoint refuses every call.
        RunFailed: the shard's share of the budget is spent.
        StorageError: answers can no longer be written.
    """
    dataset, plan = run.dataset(), run.plan()
    if not 1 <= number <= len(plan.shards):
        raise InputError(f"run `{run.run_id}` has {len(plan.shards)} shards, no shard {number}")
    shard = plan.shards[number - 1]
    client = Client(dataset, openai_client(dataset.llm.conn_id, connections))
    earlier = read_attempts(run, number)
    answered = {key for key, o in latest_outcomes(earlier).items() if o.status in ("tagged", "refused")}
    spent = sum(o.cost_usd or 0.0 for attempt in earlier for o in attempt.outcomes)
    shard_texts = _read_texts(run, plan, number, answered)
    cache = Cache(run.storage, plan.spec_id, dataset.llm.model)
    with Ledger(run, plan.plan_id, number, price_of(dataset.llm)) as ledger:
        if earlier:
            _skip_answered(cache, ledger, shard_texts)
        budget = None
        if dataset.limits.max_cost_usd is not None:
            budget = dataset.limits.max_cost_usd / len(plan.shards) - spent
        asker = ShardAsker(cache, client, ledger, shard_texts.row_ids, budget)
        with closing(client), _progress(shard, ledger, len(answered)):
            _build(dataset, shard, shard_texts, asker, client)
        counts = ledger.counts()
    logger.info("%s: %s", shard.name, ", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing to do")
    return counts


def _read_texts(run: Run, plan: Plan, number: int, answered: set[str]) -> ShardTexts:
    shard_texts = ShardTexts()
    for batch in read_parquet(run.storage, shard_path(run, plan.plan_id, number)):
        columns = (batch.column(name).to_pylist() for name in ("key", "row_id", "text"))
        for key, row_id, text in zip(*columns, strict=True):
            if key not in answered:
                shard_texts.texts[key] = text
                shard_texts.row_ids[key] = row_id
    return shard_texts


def _skip_answered(cache: Cache, ledger: Ledger, shard_texts: ShardTexts) -> None:
    """Take out what a killed attempt wrote to the cache after it last wrote its books."""
    for key, record in cache.read_many(shard_texts.texts).items():
        ledger.record(key, shard_texts.row_ids[key], record)
        del shard_texts.texts[key]


def _build(dataset: Dataset, shard: Shard, shard_texts: ShardTexts, asker: ShardAsker, client: Client) -> None:
    if not shard_texts.texts:
        return
    # gokart and pandas take seconds to import: not where a command only prints an error
    from tagger.engine import build
    from tagger.tasks import TagTexts

    tree = TagTexts(shard=f"shard-{shard.shard}-of-{shard.of}", texts=shard_texts.texts, asker=asker)
    complete = build(tree, threads=min(dataset.llm.concurrency, len(shard_texts.texts)), stop=client.stop)
    if asker.stopped_by is not None:
        raise asker.stopped_by
    if not complete and not asker.failures:
        raise TaggerError(f"{shard.name}: the tree ended before all texts were asked")


@contextmanager
def _progress(shard: Shard, ledger: Ledger, before: int) -> Iterator[None]:
    """Log a line every few seconds while the block runs."""
    ended = threading.Event()
    started = time.monotonic()

    def report() -> None:
        while not ended.wait(PROGRESS_SECONDS):
            counts = ledger.counts()
            done = sum(counts.get(status, 0) for status in ("tagged", "refused", "failed"))
            logger.info(
                "shard %d/%d: %d of %d texts, %d failed, %.1f texts/s, $%.4f",
                shard.shard,
                shard.of,
                before + done,
                shard.texts,
                counts.get("failed", 0),
                done / (time.monotonic() - started),
                ledger.spent_usd,
            )

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
