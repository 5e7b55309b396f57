"""What a batch's output says of each of its requests."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal, NamedTuple

from openai.types.chat import ChatCompletion

from tagger.batch_api import State
from tagger.batches import HandedOver
from tagger.cache import Cache, Chars, Record, Usage, patiently
from tagger.completion import message_of, no_llm, paren, refusal_of, usage_of
from tagger.dataset import Dataset
from tagger.exceptions import InputError
from tagger.ledger import Ledger
from tagger.prompt import BadAnswer, Choice, read_answer
from tagger.runs import utc_now

Fate = Literal["succeeded", "refused", "invalid", "errored", "expired"]
"""Of one request. Those that succeeded or were refused have a record; the others are asked again some time."""

FATES: tuple[Fate, ...] = ("succeeded", "refused", "invalid", "errored", "expired")

_THREADS = 16
_LINES_AT_ONCE = 1000


class Line(NamedTuple):
    """One line of an output file: a chat completion, or the status and code of an error."""

    key: str
    completion: ChatCompletion | None
    status: int | None
    code: str
    words: str
    """What the provider says of the error: to be looked at, never to be shown, for it may quote the text."""


class Answers:
    """The answers of one batch, on their way into the cache and the books.

    Lines that are none, of texts that are not of the batch, or of a text that had one before, are counted and left out.
    """

    def __init__(self, dataset: Dataset, texts: Mapping[str, HandedOver], cache: Cache, ledger: Ledger) -> None:
        self._dataset = dataset
        self._texts = texts
        self._left = dict.fromkeys(texts)
        self._cache = cache
        self._ledger = ledger
        self.fates: Counter[str] = Counter()
        """Number of requests by fate."""
        self.stray: Counter[str] = Counter()
        """Number of lines left out: `broken`, `unknown`, `repeated`."""

    def read(self, file: Iterable[bytes]) -> None:
        """Read the lines of a file of answers or errors."""
        with ThreadPoolExecutor(_THREADS) as threads:
            lines = self._lines(file)
            while some := list(islice(lines, _LINES_AT_ONCE)):
                self.fates.update(threads.map(self._end, some))

    def end(self, state: State) -> None:
        """Note what became of the requests that no line tells of."""
        fate, kind, message = _of_rest(state)
        for key in self._left:
            self._ledger.failed(key, self._texts[key].row_id, kind, message)
        self.fates[fate] += len(self._left)
        self._left = {}

    def describe(self) -> str:
        """Return the numbers in words."""
        words = ", ".join(f"{self.fates[fate]} {fate}" for fate in FATES)
        stray = ", ".join(f"{count} {kind}" for kind, count in self.stray.items())
        return words + (f"; lines left out: {stray}" if stray else "")

    def _lines(self, body: Iterable[bytes]) -> Iterator[Line]:
        for raw in body:
            if not raw.strip():
                continue
            line = _parsed(raw)
            if line is None:
                self.stray["broken"] += 1
            elif line.key not in self._texts:
                self.stray["unknown"] += 1
            elif line.key not in self._left:
                self.stray["repeated"] += 1
            else:
                del self._left[line.key]
                yield line

    def _end(self, line: Line) -> Fate:
        if line.completion is not None:
            return self._answered(line.key, line.completion)
        row_id = self._texts[line.key].row_id
        if line.code in _NOT_ASKED:
            fate, kind, message = _NOT_ASKED[line.code]
            self._ledger.failed(line.key, row_id, kind, message)
            return fate
        self._ledger.spend(line.key, row_id, Usage())
        if line.status is not None and (reason := refusal_of(line.status, line.words)) is not None:
            self._write(line.key, Choice([]), reason, self._dataset.llm.model, "error")
            return "refused"
        what = f"HTTP {line.status}" if line.status else "an error"
        self._ledger.failed(line.key, row_id, "batch_error", f"{what}{paren(line.code)} in the batch")
        return "errored"

    def _answered(self, key: str, completion: ChatCompletion) -> Fate:
        if problem := no_llm(self._dataset, completion.model):
            raise InputError(problem)
        self._ledger.spend(key, self._texts[key].row_id, usage_of(completion))
        try:
            message = message_of(self._dataset, completion)
            choice = Choice([]) if message.reason else read_answer(self._dataset, message.content)
        except BadAnswer as e:
            self._ledger.failed(key, self._texts[key].row_id, "bad_answer", e.args[0])
            return "invalid"
        if message.reason == "length" and self._dataset.llm.batch_fallback:  # which has tries left
            self._ledger.failed(key, self._texts[key].row_id, "length", "the answer was cut off")
            return "invalid"
        self._write(key, choice, message.reason, message.model, message.finish_reason)
        return "refused" if message.reason else "succeeded"

    def _write(self, key: str, choice: Choice, reason: str | None, model: str, finish_reason: str) -> None:
        text, (usage, cost) = self._texts[key], self._ledger.spent_on(key)
        record = Record(
            status="refused" if reason else "tagged",
            reason=reason,
            tags=choice.tags,
            confidence=choice.confidence,
            model=model,
            usage=usage,
            cost_usd=cost,
            finish_reason=finish_reason,
            asked="batch",
            chars=Chars(narrow=text.narrow, wide=text.wide),
            created_at=utc_now(),
        )
        patiently(lambda: self._cache.write(key, record))
        self._ledger.record(key, text.row_id, record)


_NOT_ASKED: dict[str, tuple[Fate, str, str]] = {
    "batch_expired": ("expired", "expired", "the batch ended before its turn came"),
    "batch_cancelled": ("errored", "cancelled", "the batch was cancelled"),
}


def _of_rest(state: State) -> tuple[Fate, str, str]:
    """Return fate, kind and message of requests without a line."""
    if state.status == "failed":
        reason = f" ({state.reason})" if state.reason else ""
        return "errored", "batch_failed", f"the provider refused the whole batch{reason}"
    none: tuple[Fate, str, str] = "errored", "no_answer", "the batch's output has no line for it that can be read"
    return _NOT_ASKED.get(f"batch_{state.status}", none)


def _parsed(raw: bytes) -> Line | None:
    """Return what a line says; None where it is broken."""
    try:
        line = json.loads(raw)
        key, response, error = line["custom_id"], line.get("response") or {}, line.get("error") or {}
        status, body = response.get("status_code"), response.get("body") or {}
        if not isinstance(key, str) or not (response or error):
            return None
        if status == 200:
            completion = ChatCompletion.construct(**{k: v for k, v in body.items() if k != "_fields_set"})
            return Line(key, completion, status, "", "")
        error = body.get("error") or error
        code = str(error.get("code") or "")
        words = f"{code} {error.get('message', '')}".lower()
        return Line(key, None, status if isinstance(status, int) else None, code, words)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
