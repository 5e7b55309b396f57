"""What the answer of an LLM endpoint says, be it to a call or a line of a batch's output."""

import re
from dataclasses import dataclass

from openai.types.chat import ChatCompletion

from tagger.cache import STAND_IN_MODEL, Usage
from tagger.dataset import Dataset, is_name
from tagger.prompt import BadAnswer

MOST_TOKENS = 10**9
"""Of one call: no model reads or writes so many."""


@dataclass(frozen=True)
class Message:
    """What the endpoint answered. `reason` tells why it refuses."""

    model: str
    finish_reason: str
    reason: str | None
    content: object


def refusal_of(status: int, words: str) -> str | None:
    """Return why a request was refused that would be refused again; None of any other error.

    `words` are the server's code and message, in lower case.
    """
    if status == 413 or any(w in words for w in ("context_length", "maximum context", "context size")):
        return "context_length"
    if "content_filter" in words or "content management policy" in words:
        return "content_filter"
    return None


def no_llm(dataset: Dataset, model: str) -> str | None:
    """Return what is wrong where the offline stand-in answered for a real model; None where it did not."""
    if model != STAND_IN_MODEL or dataset.llm.model == STAND_IN_MODEL:
        return None
    return (
        f"the endpoint is the offline stand-in, which is no LLM, but `llm.model` is {dataset.llm.model!r}: nothing was "
        f"recorded; set `llm.model: {STAND_IN_MODEL}` to play with it"
    )


def message_of(dataset: Dataset, completion: ChatCompletion) -> Message:
    """Return what a completion says.

    Raises:
        BadAnswer: it has no message.
    """
    try:
        choice = completion.choices[0]
        finish: str = choice.finish_reason if is_plain(choice.finish_reason) else "unknown"
        refusal, content = choice.message.refusal, choice.message.content
        model = completion.model if is_name(completion.model) else dataset.llm.model
    except (AttributeError, LookupError, TypeError):  # the SDK does not check the shape of what it parses
        raise BadAnswer("no message") from None
    reason = None
    if refusal or finish == "refusal":
        reason = "refusal"
    elif finish in ("length", "content_filter"):
        reason = finish
    return Message(model, finish, reason, content)


def usage_of(completion: ChatCompletion) -> Usage:
    """Return what a completion used; nothing where the server does not tell, or tells what cannot be."""
    try:
        usage = completion.usage
        if usage is None:
            return Usage()
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        told = Usage(input=usage.prompt_tokens or 0, cached_input=cached or 0, output=usage.completion_tokens or 0)
    except (AttributeError, ValueError):  # the SDK does not check the shape of what it parses
        return Usage()
    if max(told.input, told.output) > MOST_TOKENS:
        return Usage()
    return told.model_copy(update={"cached_input": min(told.cached_input, told.input)})


def is_plain(word: object) -> bool:
    """Whether a word of the server's is a name and nothing else: it may quote the text."""
    return isinstance(word, str) and re.fullmatch(r"[A-Za-z0-9_.]{1,40}", word) is not None


def paren(code: str) -> str:
    """Return an error's code as it goes behind a status, where it is one."""
    return f", {code}" if is_plain(code) else ""
