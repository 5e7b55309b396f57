"""Several short texts in one request, which saves the fixed part of the prompt for all of them but one.

Each text stays a task of its own. Its thread waits here until there are enough texts, or no more come, and one of the
threads asks for all of them; each takes its own answer away. What the request gives no usable answer for is asked
alone.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise

from tagger.cache import Usage
from tagger.llm import Answer, Client
from tagger.price import estimated_tokens

logger = logging.getLogger(__name__)

SHORT_CHARS = 1000
"""Longer texts are asked alone: beside them the fixed part of the prompt is small."""

LINGER_SECONDS = 0.1
"""A request waits for more texts until none came for so long, at most twice that."""

USELESS = 5
"""Requests in a row without one usable answer: then this endpoint does not answer several texts, and each is asked
alone."""

Spend = Callable[[Mapping[str, str], Usage], None]
"""Is told the texts of each HTTP request, by key, and what it used."""


class _Pack:
    """The texts of one request, by key, and what came of it."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.is_full = threading.Event()
        self.is_answered = threading.Event()
        self.answers: Mapping[str, Answer] = {}
        self.error: BaseException | None = None


class Packer:
    """Asks up to `texts_per_request` texts in one request. Its methods may be called from many threads."""

    def __init__(self, client: Client, texts_per_request: int) -> None:
        self._client = client
        self._size = texts_per_request
        self._lock = threading.Lock()
        self._open: _Pack | None = None
        self._useless = 0

    def ask(self, key: str, text: str, spend: Spend) -> Answer:
        """Ask for the tags of a text, together with others if it is short.

        Raises:
            TextFailed: no usable answer came, after all tries.
            LLMStopped: the endpoint refuses every call.
            Stopped: no more calls are made.
        """
        if self._size > 1 and len(text) <= SHORT_CHARS:
            answer = self._ask_together(key, text, spend)
            if answer is not None:
                return answer
        return self._client.ask(key, text, lambda usage: spend({key: text}, usage))

    def _ask_together(self, key: str, text: str, spend: Spend) -> Answer | None:
        """Return a text's answer out of a request for several; None where it is to be asked alone."""
        with self._lock:
            pack = self._open = self._open or _Pack()
            pack.texts[key] = text
            is_first = len(pack.texts) == 1
            if len(pack.texts) >= self._size:
                self._open = None
                pack.is_full.set()
        if is_first:
            self._wait_for_more(pack)
            self._ask_pack(pack, spend)
        pack.is_answered.wait()
        if pack.error is not None:
            raise pack.error
        return pack.answers.get(key)

    def _wait_for_more(self, pack: _Pack) -> None:
        before = 1
        while not pack.is_full.wait(LINGER_SECONDS):
            with self._lock:
                if len(pack.texts) == before:
                    self._open = None
                    return
                before = len(pack.texts)

    def _ask_pack(self, pack: _Pack, spend: Spend) -> None:
        try:
            if len(pack.texts) > 1:
                pack.answers = self._client.ask_together(pack.texts, lambda usage: spend(pack.texts, usage))
                self._note(bool(pack.answers))
        except BaseException as e:
            pack.error = e
        finally:
            pack.is_answered.set()

    def _note(self, was_useful: bool) -> None:
        with self._lock:
            self._useless = 0 if was_useful else self._useless + 1
            if self._useless == USELESS:
                self._size = 1
                logger.warning(
                    "%d requests in a row for several texts got no usable answer: from now on each text is asked alone "
                    "(`llm.texts_per_request`)",
                    USELESS,
                )


def shares(usage: Usage, texts: Mapping[str, str]) -> dict[str, Usage]:
    """Return each text's part of what their request used, in proportion to its estimated length; they add up to it."""
    ends = list(accumulate(max(estimated_tokens(text), 1) for text in texts.values()))

    def split(total: int) -> list[int]:
        return [end - start for start, end in pairwise([0, *(total * end // ends[-1] for end in ends)])]

    fresh, cached, output = (split(n) for n in (usage.input - usage.cached_input, usage.cached_input, usage.output))
    return {
        key: Usage(input=f + c, cached_input=c, output=o)
        for key, f, c, o in zip(texts, fresh, cached, output, strict=True)
    }
