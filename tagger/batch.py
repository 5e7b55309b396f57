"""`mode: batch`: a shard's texts are handed to the Batch API, and its answers collected into their records.

Each step can be done again after a kill at any moment: what is intended is written before the paid call, a batch whose
creation got no answer is found by the name that the provider keeps with it, and its answers are booked in one and the
same shard file however often they are collected.
"""

import json
import logging
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from typing import IO, NamedTuple

from tagger.batch_answers import Answers
from tagger.batch_api import ENDPOINT, LOST_AFTER, UNREACHABLE, BatchAPI, State
from tagger.batches import Batch, Batches, HandedOver
from tagger.cache import Cache, Chars
from tagger.connections import Connections, openai_client
from tagger.dataset import Dataset
from tagger.exceptions import BUDGET_REACHED, InputError, LLMStopped, LLMUnreachable, RunFailed
from tagger.ledger import BatchBooks, Ledger, read_attempts
from tagger.price import price_of, usd
from tagger.prompt import Prompt
from tagger.runs import Run, disk_errors, opened_parquet, shard_path, utc_now
from tagger.shards import SCHEMA as SHARD_SCHEMA
from tagger.spec import spec_id

logger = logging.getLogger(__name__)

MAX_REQUESTS = 50_000
MAX_BYTES = 199_000_000
"""Of one batch: the API's limits are 50,000 requests and 200 MB."""

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 2.0, 60.0

KEPT = timedelta(days=7)
"""How long a batch is remembered whose answers another run collected, for the run that handed it over."""


class Text(NamedTuple):
    """A new text of a shard."""

    key: str
    row_id: str
    text: str


class Requests(NamedTuple):
    """A file of requests, and what is kept of their texts, by key."""

    file: IO[bytes]
    texts: dict[str, HandedOver]


class ShardBatches:
    """The batches of one shard of a run."""

    def __init__(self, run: Run, number: int, api: BatchAPI) -> None:
        self._run = run
        self._number = number
        self._api = api
        self._dataset, _, self._plan = run.dataset(), run.snapshot(), run.plan()
        self._plan.find(number)
        self._batches = Batches(run.storage, self._plan.spec_id)

    def own(self) -> list[Batch]:
        """Return them, oldest first; those of other plans of the run are not among them."""
        return [batch for batch in self._batches.all() if batch.is_of(self._run, self._plan.plan_id, self._number)]

    def hand_over(self) -> set[str]:
        """Hand the shard's texts over, those aside that were handed over, by whatever run, or have a record.

        Returns the keys of texts that are left to batches of other runs.

        Raises:
            RunFailed: the run has spent its budget.
        """
        for batch in self.own():
            if batch.remote is None:
                self._find_or_create(batch)
        pending, known = self._pending(), self._handed_over()
        known |= pending
        cache = Cache(self._run.storage, self._plan.spec_id, self._dataset.llm.model, self._dataset.tag_ids)
        known |= cache.find({text.key for text in self._texts()} - known, listing=False)
        with closing(self._requests(lambda key: key not in known)) as files:
            for requests in files:
                self._check_budget()
                self._hand_over(requests)
        return pending

    def waiting(self) -> list[tuple[Batch, State]]:
        """Return those that have not ended, or cannot be looked at now."""
        states = ((batch, _state(batch, self._api)) for batch in self.own() if batch.remote and not batch.collected)
        return [(batch, state) for batch, state in states if not state.ended]

    def collect(self) -> None:
        """Collect the answers of all of them."""
        for batch in self.own():
            collect(batch, self._batches, self._api, self._dataset)

    def forget(self) -> None:
        """Forget them: what they left is in the cache and the books."""
        for batch in self.own():
            self._batches.remove(batch)

    def _pending(self) -> set[str]:
        others = (b for b in self._batches.unfinished() if not b.is_of(self._run, self._plan.plan_id, self._number))
        return self._batches.keys(list(others))

    def _handed_over(self) -> set[str]:
        """Return the keys of the texts in the shard's batches, those of a try that was killed while it ended too."""
        own = self.own()
        keys = self._batches.keys(own)
        if own:
            attempts = read_attempts(self._run, self._number)
            of_batches = (a for a in attempts if a.asked == "batch" and a.plan_id == self._plan.plan_id)
            keys.update(key for attempt in of_batches for key in attempt.values("key"))
        return keys

    def _check_budget(self) -> None:
        if self._plan.budget_usd is None:
            return
        if sum(attempt.spent_usd for attempt in read_attempts(self._run)) >= self._plan.budget_usd:
            raise RunFailed(f"{BUDGET_REACHED}: the run's budget of {usd(self._plan.budget_usd)} is spent")

    def _hand_over(self, requests: Requests) -> None:
        """Hand one batch over; where the endpoint will not have it, forget the intent."""
        batch = self._intend(requests.texts)
        try:
            self._create(self._uploaded(batch, requests.file))
        except LLMUnreachable:
            raise
        except LLMStopped as e:
            refused = e
        else:
            return
        if (file_id := (self._batches.read(batch) or batch).input_file) is not None:
            _delete(file_id, self._api)
        with Ledger(self._run, batch.plan_id, batch.shard, None, batch.ledger):
            self._batches.remove(batch)
            raise refused

    def _intend(self, texts: dict[str, HandedOver]) -> Batch:
        now = utc_now()
        batch = Batch(
            batch=uuid.uuid4().hex[:16],
            dataset=self._run.dataset_name,
            run_id=self._run.run_id,
            plan_id=self._plan.plan_id,
            shard=self._number,
            conn_id=self._dataset.llm.conn_id,
            requests=len(texts),
            price=price_of(self._dataset.llm, batch=True),
            books=Ledger(self._run, self._plan.plan_id, self._number, None, BatchBooks("", now)).create(),
            intended_at=now,
        )
        self._batches.add(batch, texts)
        return batch

    def _find_or_create(self, batch: Batch) -> None:
        if batch.input_file is not None and not self._api.has_file(batch.input_file):
            batch = self._batches.update(batch, input_file=None)
        if batch.input_file is None and (found := self._api.find_file(batch)) is not None:
            batch = self._batches.update(batch, input_file=found)
        if batch.input_file is None:
            keys = self._batches.texts(batch)
            with closing(self._requests(keys.__contains__)) as files:
                batch = self._uploaded(batch, next(files).file)
        self._create(batch)

    def _uploaded(self, batch: Batch, file: IO[bytes]) -> Batch:
        return self._batches.update(batch, input_file=self._api.upload(file, batch))

    def _create(self, batch: Batch) -> None:
        """Create a batch, unless another try of the shard did so meanwhile."""
        latest = self._batches.read(batch)
        if latest is None or latest.remote is not None:
            return
        assert batch.input_file is not None
        remote = self._api.find(batch) or self._api.create(batch, batch.input_file)
        self._batches.update(batch, remote=remote)
        logger.info("%d texts are handed to the Batch API as %s: half the price, within 24 h", batch.requests, remote)

    def _texts(self) -> Iterator[Text]:
        path = shard_path(self._run, self._plan.plan_id, self._number)
        with opened_parquet(self._run.storage, path, SHARD_SCHEMA) as file:
            for part in file.iter_batches(batch_size=500):
                for columns in zip(*(part.column(name).to_pylist() for name in Text._fields), strict=True):
                    yield Text(*columns)

    def _requests(self, wanted: Callable[[str], bool]) -> Generator[Requests]:
        """Yield the requests of the texts with a wanted key, in files within the API's limits.

        A file is gone when the next is asked for. A text that cannot be encoded is left out.
        """
        lines = self._lines(wanted)
        next_line = next(lines, None)
        while next_line is not None:
            texts: dict[str, HandedOver] = {}
            with disk_errors(), tempfile.TemporaryFile() as file:
                while next_line is not None and len(texts) < MAX_REQUESTS:
                    text, line = next_line
                    if texts and file.tell() + len(line) > MAX_BYTES:
                        break
                    file.write(line)
                    chars = Chars.of(text.text)
                    texts[text.key] = HandedOver(text.row_id, chars.narrow, chars.wide)
                    next_line = next(lines, None)
                yield Requests(file, texts)

    def _lines(self, wanted: Callable[[str], bool]) -> Iterator[tuple[Text, bytes]]:
        options, prompt = self._api.request_options(self._dataset), Prompt(self._dataset)
        for text in self._texts():
            if wanted(text.key):
                messages = prompt.messages(text.key, text.text)
                body = {"model": self._dataset.llm.model, "messages": messages, **options}
                request = {"custom_id": text.key, "method": "POST", "url": ENDPOINT, "body": body}
                try:
                    line = json.dumps(request, ensure_ascii=False).encode() + b"\n"
                except UnicodeEncodeError:
                    continue
                yield text, line


@contextmanager
def shard_batches(run: Run, number: int, connections: Connections) -> Iterator[ShardBatches]:
    """Yield the batches of a shard, over the dataset's connection."""
    with closing(openai_client(run.dataset().llm.conn_id, connections)) as client:
        yield ShardBatches(run, number, BatchAPI(client))


@contextmanager
def collected(run: Run, number: int, connections: Connections) -> Iterator[set[str]]:
    """Collect a shard's batches, and forget them when the block ends without an error.

    Yields the keys of texts that are pending in batches of others.

    Raises:
        RunFailed: one of them has not ended.
    """
    with shard_batches(run, number, connections) as batches:
        pending = batches.hand_over()
        batches.collect()
        yield pending
        batches.forget()


def collect(batch: Batch, batches: Batches, api: BatchAPI, dataset: Dataset) -> None:
    """Write a batch's answers into their records and book them, then have the provider delete its files.

    `dataset` is any of the batch's spec.

    Raises:
        RunFailed: the batch has not ended.
    """
    assert batch.remote is not None
    state = api.state(batch.remote, batch.intended_at)
    if not state.ended:
        raise RunFailed(
            f"the batch {batch.remote} has not ended ({state.status}, {state.done} of {batch.requests} requests): its "
            "texts are pending, and a later run collects their answers"
        )
    if not batch.collected:
        with disk_errors(), ExitStack() as stack:
            files = {file_id: stack.enter_context(tempfile.TemporaryFile()) for file_id in state.files}
            missing = [file_id for file_id, file in files.items() if not api.download(file_id, file)]
            latest = batches.read(batch)
            if latest is None or latest.collected:  # by another run, which has the files deleted
                return
            if missing:
                logger.warning("batch %s: %s is not at the provider any more", batch.remote, ", ".join(missing))
            _book(batch, batches, dataset, state, [file for file_id, file in files.items() if file_id not in missing])
        batches.update(batch, collected=True)
    for file_id in (batch.input_file, *state.files):
        if file_id is not None:
            _delete(file_id, api)


def _delete(file_id: str, api: BatchAPI) -> None:
    """Have the provider delete a file; where it will not, that keeps nothing else back."""
    try:
        api.delete(file_id)
    except LLMStopped as e:
        logger.warning("the provider's file %s could not be deleted: %s", file_id, e)


def _state(batch: Batch, api: BatchAPI) -> State:
    assert batch.remote is not None
    try:
        return api.state(batch.remote, batch.intended_at)
    except LLMUnreachable:
        return State(UNREACHABLE, 0, [], None)


def _book(batch: Batch, batches: Batches, dataset: Dataset, state: State, files: list[IO[bytes]]) -> None:
    run = Run(batches.storage, batch.dataset, batch.run_id)
    cache = Cache(run.storage, batches.spec, dataset.llm.model, dataset.tag_ids)
    with Ledger(run, batch.plan_id, batch.shard, batch.price, batch.ledger) as ledger:
        answers = Answers(dataset, batches.texts(batch), cache, ledger)
        for file in files:
            answers.read(file)
        answers.end(state)
    logger.info("batch %s %s: %s", batch.remote, state.status, answers.describe())


def settle(run: Run, connections: Connections) -> list[tuple[Batch, State | None]]:
    """Collect what has ended of the batches of a run's spec, of whatever run; return the others.

    Each comes with its state; None where it cannot be looked at now, and counts as one that has not ended.
    """
    dataset = run.dataset()
    batches, unfinished = Batches(run.storage, spec_id(dataset)), []
    for batch in batches.all():
        if batch.collected:
            if utc_now() - batch.intended_at > KEPT:
                batches.remove(batch)
            continue
        state = None
        try:
            with closing(openai_client(batch.conn_id, connections)) as client:
                is_settled, state = _settle(batch, batches, BatchAPI(client), dataset)
            if is_settled:
                continue
        except (LLMStopped, InputError) as e:
            logger.warning("batch %s: %s; its texts stay pending", batch.remote or batch.batch, e)
        unfinished.append((batch, state))
    return unfinished


def _settle(batch: Batch, batches: Batches, api: BatchAPI, dataset: Dataset) -> tuple[bool, State | None]:
    """Return whether a batch is collected or given up, and where it is."""
    if batch.remote is None:
        remote = api.find(batch)
        if remote is None:
            is_lost = utc_now() - batch.intended_at > LOST_AFTER
            if is_lost:
                if (file := batch.input_file or api.find_file(batch)) is not None:
                    _delete(file, api)
                batches.remove(batch)
            return is_lost, None
        batch = batches.update(batch, remote=remote)
    state = _state(batch, api)
    if state.ended:
        collect(batch, batches, api, dataset)
    return state.ended, state


def wait_for_shards(run: Run, numbers: Iterable[int], connections: Connections) -> None:
    """Hand shards over, and wait until all their batches have ended."""
    with closing(openai_client(run.dataset().llm.conn_id, connections)) as client:
        shards = [ShardBatches(run, number, BatchAPI(client)) for number in numbers]
        for shard in shards:
            shard.hand_over()
        _wait(lambda: [waiting for shard in shards for waiting in shard.waiting()])


def wait_for_others(run: Run, connections: Connections) -> None:
    """Wait until all batches of the run's spec that can be looked at have ended, and collect them."""

    def look() -> list[tuple[Batch, State]]:
        return [(batch, state) for batch, state in settle(run, connections) if state is not None]

    _wait(look)


def _wait(look: Callable[[], list[tuple[Batch, State]]]) -> None:
    """Wait until `look` finds no batch that has not ended, and show how far they are."""
    from tqdm import tqdm

    pause, total, logged = FIRST_POLL_SECONDS, 0, 0.0
    form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} requests, {elapsed}"
    try:
        with tqdm(disable=not sys.stderr.isatty(), desc="batch", bar_format=form, dynamic_ncols=True) as bar:
            while waiting := look():
                total = max(total, sum(batch.requests for batch, _ in waiting))
                done = total - sum(batch.requests - state.done for batch, state in waiting)
                bar.total, bar.n = total, done
                bar.set_description_str(f"batch {waiting[0][1].status}")
                if bar.disable and time.monotonic() - logged >= LONGEST_POLL_SECONDS:
                    logged = time.monotonic()
                    away = any(state.status == UNREACHABLE for _, state in waiting)
                    told = "; the LLM endpoint does not answer, the batches go on there" if away else ""
                    logger.info("waiting for batches (%d): %d of %d requests done%s", len(waiting), done, total, told)
                time.sleep(pause)
                pause = min(pause * 1.5, LONGEST_POLL_SECONDS)
    except KeyboardInterrupt:
        logger.info("the batch goes on at the provider; the next call waits for it and collects its answers")
        raise
