"""The LLM client: texts in, answers out, over the chat completions API that most servers speak.

It owns the retries of a call: the SDK's are off, and luigi and gokart do not repeat a task. A failure writes nothing,
so that the next run asks again; an answer that would come back the same is recorded as refused.
"""

import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import openai
from openai.types.chat import ChatCompletion
from tenacity import RetryCallState, Retrying, retry_if_exception_type

from tagger.cache import Usage
from tagger.completion import Message, is_plain, message_of, no_llm, paren, refusal_of, usage_of
from tagger.dataset import Dataset
from tagger.exceptions import LLMStopped, LLMUnreachable, TextFailed
from tagger.prompt import BadAnswer, Choice, Prompt, read_answer, read_answers
from tagger.request import request_options
from tagger.throttle import GIVE_UP_SECONDS, Throttle

TRIES = 6
"""HTTP tries of one call, with waits of 1, 2, 4, 8 and 16 s on average unless the server says otherwise. A 429 is not
counted: it says nothing of the text, and slows the whole worker down instead."""

TRIES_AT_START = 3
"""HTTP tries while nobody has ever answered: it is more likely a wrong address than a passing fault."""

TRIES_AFTER_TIMEOUT = 3
"""HTTP tries of a call that times out: the provider may charge for each."""

LONGEST_WAIT = 120.0
"""Seconds. A server that wants a longer pause than this gets the text again in the next run; with a 429, all texts."""

ASKS = 3
"""How often a text is asked until its answer has the right form."""

RATE_HINT = "set `llm.requests_per_minute` and `llm.tokens_per_minute` to what the account allows"

SCHEMA_HINT = (
    "set `llm.params: {response_format: {type: json_object}}` in the dataset file if the server knows no json_schema"
)


@dataclass(frozen=True)
class Answer:
    """What the LLM made of a text. `reason` tells why it was refused; then `tags` is empty."""

    tags: list[str]
    reason: str | None
    model: str
    finish_reason: str
    asked: Literal["online", "together"] = "online"
    confidence: list[float] | None = None


@dataclass(frozen=True)
class _Question:
    """What one request asks, and whom to tell what it used."""

    messages: list[dict[str, str]]
    options: dict[str, Any]
    texts: int
    spend: Callable[[Usage], None]


class _Again(Exception):
    """The call may succeed later. Carries a TextFailed for the case that it does not."""

    def __init__(self, failed: TextFailed, wait: float | None = None) -> None:
        self.failed = failed
        self.wait = wait


class _SlowDown(Exception):
    """The endpoint answered 429. `wait` is what it asks for, in seconds."""

    def __init__(self, wait: float | None) -> None:
        self.wait = wait


class _Refusal(Exception):
    """The endpoint will not answer this text, now or later. `args[0]` is the reason."""


class Client:
    """Asks the LLM of a dataset. Its methods may be called from many threads.

    `spend` is called once for every HTTP request, with its usage (zero where the server told none), before the answer
    is looked at: money is counted even where the answer is of no use. The call counts as in flight until then.
    """

    def __init__(self, dataset: Dataset, client: openai.OpenAI, throttle: Throttle) -> None:
        self._dataset = dataset
        self._prompt = Prompt(dataset)
        self._client = client
        self._throttle = throttle
        self._options = request_options(client, dataset)
        self._options_together = request_options(client, dataset, together=True)
        # one for all: to make and drop its thread-local state for each call costs a tenth of the CPU
        self._retrying = Retrying(
            retry=retry_if_exception_type(_Again),
            stop=self._is_enough,
            wait=_wait,
            sleep=self._sleep,
            reraise=True,
        )
        self._answered = threading.Event()
        self._used: dict[int, tuple[int, int]] = {}
        self.stopped_by: LLMStopped | None = None

    def close(self) -> None:
        """Close the connections to the endpoint."""
        self._client.close()

    def ask(self, key: str, text: str, spend: Callable[[Usage], None]) -> Answer:
        """Ask for the tags of a text.

        Raises:
            TextFailed: no usable answer came, after all tries.
            LLMStopped: the endpoint refuses every call.
            Stopped: `stop` was called before an answer came.
        """
        question = _Question(self._prompt.messages(key, text), self._options, 1, spend)
        for ask in range(1, ASKS + 1):
            try:
                message = self._message(self._complete(question))
                choice = Choice([]) if message.reason else read_answer(self._dataset, message.content)
            except _Refusal as e:
                return Answer([], e.args[0], self._dataset.llm.model, "error")
            except BadAnswer as e:
                if ask == ASKS:
                    raise TextFailed("bad_answer", f"{e.args[0]} (asked {ASKS} times)") from None
                continue
            if message.reason != "length" or ask == ASKS:
                model, finish = message.model, message.finish_reason
                return Answer(choice.tags, message.reason, model, finish, confidence=choice.confidence)
        raise AssertionError

    def ask_together(self, texts: Mapping[str, str], spend: Callable[[Usage], None]) -> dict[str, Answer]:
        """Ask for the tags of several texts, given by key, in one request; return the answers by key.

        Texts left out are to be asked alone: their answer is missing or of no use, or one of them may be why the
        endpoint refuses the whole request.

        Raises:
            TextFailed: no answer came, after all tries; each of the texts has failed.
            LLMStopped: the endpoint refuses every call.
            Stopped: `stop` was called before an answer came.
        """
        question = _Question(self._prompt.messages_together(texts), self._options_together, len(texts), spend)
        try:
            message = self._message(self._complete(question))
            choices = {} if message.reason else read_answers(self._dataset, message.content, texts)
        except (_Refusal, BadAnswer):
            return {}
        except TextFailed as e:
            if e.kind in ("rejected", "bad_response"):
                return {}
            raise
        return {
            key: Answer(choice.tags, None, message.model, message.finish_reason, "together", choice.confidence)
            for key, choice in choices.items()
        }

    def _message(self, completion: ChatCompletion) -> Message:
        if problem := no_llm(self._dataset, completion.model):
            raise self._refused(problem)
        self._answered.set()
        return message_of(self._dataset, completion)

    def _complete(self, question: _Question) -> ChatCompletion:
        """Make one call, repeated while that is of use."""
        try:
            return self._retrying(self._try, question)
        except _Again as e:
            kind, message = e.failed.kind, str(e.failed)
        if kind == "connection" and not self._answered.is_set():
            raise self._refused(f"{self._endpoint()} does not answer: {message}", LLMUnreachable)
        raise TextFailed(kind, message)

    def _try(self, question: _Question) -> ChatCompletion:
        while True:
            tokens = self._expected_tokens(question)
            if self.stopped_by is not None:
                raise self.stopped_by
            with self._throttle.call(tokens) as started:
                result = self._request(question)
                usage = usage_of(result) if isinstance(result, ChatCompletion) else Usage()
                question.spend(usage)  # while it still holds up the next call, which there may be no money for
            if isinstance(result, ChatCompletion):
                self._throttle.answered(self._more_than(tokens, usage.input + usage.output, question.texts))
                return result
            if not isinstance(result, _SlowDown):
                if not isinstance(result, _Again):
                    self._throttle.answered(0)
                raise result
            if result.wait is not None and result.wait > LONGEST_WAIT:
                raise self._refused(
                    f"{self._endpoint()} is over its rate and asks for a pause of {result.wait:.0f} s: {RATE_HINT}"
                )
            if not self._throttle.slow_down(started, result.wait):
                minutes = GIVE_UP_SECONDS / 60
                raise self._refused(
                    f"{self._endpoint()} has answered HTTP 429 to every call for {minutes:.0f} minutes: {RATE_HINT}"
                )

    def _request(self, question: _Question) -> ChatCompletion | Exception:
        """Make one HTTP request; return the error that it ends with.

        No error of the SDK leaves it, not even as the context of one of ours: it may quote the text.
        """
        try:
            completion = self._client.chat.completions.create(
                model=self._dataset.llm.model,
                messages=question.messages,  # type: ignore[arg-type]
                **question.options,
            )
        except openai.APIStatusError as e:
            return self._error_of(e)
        except openai.APITimeoutError:
            return _Again(TextFailed("timeout", "no answer in time"))
        except openai.APIConnectionError as e:
            return _Again(TextFailed("connection", f"the connection failed ({type(e.__cause__ or e).__name__})"))
        except (openai.APIResponseValidationError, ValueError, RecursionError):  # no JSON; a text that has no UTF-8
            return TextFailed("bad_response", "the server's answer is no chat completion")
        if isinstance(completion, ChatCompletion):
            return completion
        return TextFailed("bad_response", "the server's answer is no chat completion")

    def _more_than(self, expected: float, tokens: int, texts: int) -> float:
        """Return how many tokens more than expected a call took; nothing where the endpoint does not tell."""
        if not tokens:
            return 0.0
        before, calls = self._used.get(texts, (0, 0))
        self._used[texts] = before + tokens, calls + 1
        return tokens - expected

    def _expected_tokens(self, question: _Question) -> float:
        """Return what a call will take: the mean of those before of so many texts, or a guess by its length."""
        if question.texts in self._used:
            tokens, calls = self._used[question.texts]
            return tokens / calls
        return 50 + sum(len(message["content"].encode(errors="replace")) for message in question.messages) / 3

    def _error_of(self, error: openai.APIStatusError) -> Exception:
        """Return what an HTTP error means for this text, or for all of them. The server's words are not kept."""
        status, code, param = error.status_code, str(error.code or ""), str(error.param or "")
        words = f"{code} {error.message}".lower()
        if status in (401, 403):
            return self._refused(f"{self._endpoint()} refuses the API key (HTTP {status}{paren(code)})")
        if status == 404:
            return self._refused(
                f"{self._endpoint()} does not know the model {self._dataset.llm.model!r} or has no chat completions "
                f"(HTTP 404{paren(code)})"
            )
        if status == 429 and ("insufficient_quota" in words or "billing" in words):
            return self._refused(
                f"{self._endpoint()}: the account's quota is exhausted (HTTP 429{paren(code)}): "
                "top it up; the next run asks the rest"
            )
        if status == 429:
            return _SlowDown(_retry_after(error))
        if status in (408, 409) or status >= 500:
            return _Again(TextFailed("server_error", f"HTTP {status} after {TRIES} tries"), _retry_after(error))
        if status in (400, 413, 422):
            if reason := refusal_of(status, words):
                return _Refusal(reason)
            if "response_format" in param or "json_schema" in words or "response_format" in words:
                return self._refused(
                    f"{self._endpoint()} does not take the answer's schema (HTTP {status}{paren(code)}): {SCHEMA_HINT}"
                )
            if param == "model" or code == "model_not_found":
                return self._refused(
                    f"{self._endpoint()} does not know the model {self._dataset.llm.model!r} (HTTP {status})"
                )
            if code in ("unsupported_parameter", "unsupported_value", "unknown_parameter") or param in self._options:
                named = f" `{param}`" if is_plain(param) else ""
                return self._refused(
                    f"{self._endpoint()} does not take a request parameter{named} (HTTP {status}{paren(code)}): "
                    "see `llm.params` in the dataset file"
                )
        return TextFailed("rejected", f"HTTP {status}{paren(code)}")

    def _refused(self, message: str, error: type[LLMStopped] = LLMStopped) -> LLMStopped:
        if self.stopped_by is None:
            self.stopped_by = error(message, at_start=not self._answered.is_set())
        self._throttle.stop()
        return self.stopped_by

    def _endpoint(self) -> str:
        return f"LLM endpoint {self._client.base_url.copy_with(userinfo=b'', query=None)}"

    def _is_enough(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        kind = error.failed.kind if isinstance(error, _Again) else None
        if kind == "connection" and not self._answered.is_set():
            return state.attempt_number >= TRIES_AT_START
        return state.attempt_number >= (TRIES_AFTER_TIMEOUT if kind == "timeout" else TRIES)

    def _sleep(self, seconds: float) -> None:
        self._throttle.stopped.wait(seconds)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    wanted = error.wait if isinstance(error, _Again) else None
    if wanted is not None and wanted > LONGEST_WAIT and isinstance(error, _Again):
        raise TextFailed(error.failed.kind, f"the server asks for a pause of {wanted:.0f} s")
    backoff = 2.0 ** (state.attempt_number - 1)
    return max(wanted or 0.0, backoff if wanted is None else 0.0) * random.uniform(1.0, 1.25) + random.uniform(0, 0.1)


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Return the seconds of a `Retry-After` header, given as seconds or as a date."""
    from email.utils import parsedate_to_datetime

    value = error.response.headers.get("retry-after")
    if value is None:
        return None
    with suppress(ValueError):
        seconds = float(value)
        return None if math.isnan(seconds) else max(seconds, 0.0)
    with suppress(ValueError, TypeError, OverflowError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None
