"""What a chat completion, or the endpoint's refusal to give one, says. However it was asked for."""

import re
from dataclasses import dataclass

from openai.types.chat import ChatCompletion

from tagger.cache import Usage
from tagger.dataset import Dataset
from tagger.prompt import BadAnswer


@dataclass(frozen=True)
class Message:
    """What the endpoint answered. `reason` tells why it refuses."""

    model: str
    finish_reason: str
    reason: str | None
    content: object


def message_of(dataset: Dataset, completion: ChatCompletion) -> Message:
    """Return the message of a completion.

    Raises:
        BadAnswer: there is none; the SDK does not check the shape of what it parses.
    """
    try:
        choice = completion.choices[0]
        finish: str = choice.finish_reason or "unknown"
        refusal, content = choice.message.refusal, choice.message.content
    except (AttributeError, LookupError, TypeError):
        raise BadAnswer("no message") from None
    reason = None
    if refusal or finish == "refusal":
        reason = "refusal"
    elif finish in ("length", "content_filter"):
        reason = finish
    return Message(completion.model or dataset.llm.model, finish, reason, content)


def usage_of(completion: ChatCompletion) -> Usage:
    """Return the tokens of a completion, as far as the endpoint tells."""
    try:
        usage = completion.usage
        if usage is None:
            return Usage()
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        return Usage(input=usage.prompt_tokens or 0, cached_input=cached or 0, output=usage.completion_tokens or 0)
    except (AttributeError, ValueError):
        return Usage()


def refusal_of(status: int, words: str) -> str | None:
    """Return why an HTTP error means that this text will never be answered; None where it does not.

    Args:
        status: The HTTP status.
        words: Code and message of the error in lower case, which may quote the text.
    """
    if status == 413 or (status in (400, 422) and any(each in words for each in _TOO_LONG)):
        return "context_length"
    if status in (400, 422) and any(each in words for each in _FILTERED):
        return "content_filter"
    return None


_TOO_LONG = ("context_length", "maximum context", "context size")
_FILTERED = ("content_filter", "content management policy")


def is_plain(word: str) -> bool:
    """Whether a word of the server's is a name and nothing else: it may quote the text."""
    return re.fullmatch(r"[A-Za-z0-9_.]{1,40}", word) is not None


def paren(code: str) -> str:
    """Return an error's code as the rest of a sentence in parentheses; nothing where it is no plain name."""
    return f", {code}" if is_plain(code) else ""
