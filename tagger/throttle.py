"""When the next call to the LLM may start: calls in flight, answers not yet written, rates, 429s, and the budget."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

RECOVERY_ROUNDS = 32
"""Of calls that all succeed, until the limit is back from 1 at `concurrency`."""

SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds without a new call after a 429 that names no time; doubled from one to the other while nothing succeeds."""

GIVE_UP_SECONDS = 600.0
"""Of nothing but 429s. The shard stops then: it is no peak, but a limit that the account has reached."""

BURST_SECONDS = 1.0
"""How much of a rate may be used at once. The rates are lowered so much that no 60 s hold more than their limit, but
for the tokens of one call."""

LOG_SECONDS = 60.0
"""Between two lines about 429s."""

POLL_SECONDS = 0.2
"""How often the first in line looks whether it is stopped."""

RATE_KEY_SECONDS = 3600
"""How long Redis keeps the state of a run's rates after the last call."""


class Stopped(Exception):
    """No further call is to be made; the text was not asked."""


class BudgetSpent(Stopped):
    """No further call is to be made, for there is no money left."""


class Rates(Protocol):
    """Requests and tokens per minute."""

    def reserve(self, tokens: float) -> float:
        """Take one request and so many tokens; return 0, or the seconds to wait before asking again."""
        ...

    def settle(self, tokens: float) -> None:
        """Take so many tokens more (or less) than were reserved."""
        ...


def _seconds_each(per_minute: float | None) -> float:
    return 0.0 if per_minute is None else (60 + BURST_SECONDS) / per_minute


class LocalRates:
    """The rates of this process, as a generic cell rate algorithm: the time at which all that was taken is paid off."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._per_request = _seconds_each(requests_per_minute)
        self._per_token = _seconds_each(tokens_per_minute)
        self._requests_until = self._tokens_until = 0.0
        self._lock = threading.Lock()

    def reserve(self, tokens: float) -> float:
        """Take one request and so many tokens; return 0, or the seconds to wait before asking again."""
        with self._lock:
            now = time.monotonic()
            wait = max(self._requests_until, self._tokens_until) - now - BURST_SECONDS
            if wait > 0:
                return wait
            self._requests_until = max(self._requests_until, now) + self._per_request
            self._tokens_until = max(self._tokens_until, now) + tokens * self._per_token
            return 0.0

    def settle(self, tokens: float) -> None:
        """Take so many tokens more (or less) than were reserved."""
        with self._lock:
            self._tokens_until += tokens * self._per_token


class RedisRates:
    """The rates of all that share a name, by Redis's clock; the same algorithm as `LocalRates`."""

    _RESERVE = """
    local clock = redis.call('TIME')
    local now = clock[1] + clock[2] / 1e6
    local requests = tonumber(redis.call('HGET', KEYS[1], 'requests') or 0)
    local tokens = tonumber(redis.call('HGET', KEYS[1], 'tokens') or 0)
    local wait = math.max(requests, tokens) - now - ARGV[3]
    if wait > 0 then return tostring(wait) end
    redis.call('HSET', KEYS[1], 'requests', string.format('%.6f', math.max(requests, now) + ARGV[1]),
                                'tokens', string.format('%.6f', math.max(tokens, now) + ARGV[2]))
    redis.call('EXPIRE', KEYS[1], ARGV[4])
    return '0'
    """

    def __init__(
        self, client: "Redis", name: str, requests_per_minute: float | None, tokens_per_minute: float | None
    ) -> None:
        self._client = client
        self._key = f"tagger:rates:{name}"
        self._per_request = _seconds_each(requests_per_minute)
        self._per_token = _seconds_each(tokens_per_minute)
        self._script = client.register_script(self._RESERVE)

    def reserve(self, tokens: float) -> float:
        """Take one request and so many tokens; return 0, or the seconds to wait before asking again."""
        arguments = [self._per_request, tokens * self._per_token, BURST_SECONDS, RATE_KEY_SECONDS]
        return float(self._script(keys=[self._key], args=arguments))

    def settle(self, tokens: float) -> None:
        """Take so many tokens more (or less) than were reserved."""
        from redis.exceptions import RedisError

        if self._per_token:
            with suppress(RedisError), self._client.pipeline() as commands:  # the next call will tell of an error
                commands.hincrbyfloat(self._key, "tokens", tokens * self._per_token)
                commands.expire(self._key, RATE_KEY_SECONDS)
                commands.execute()


class Throttle:
    """Lets a worker's calls to the LLM start, in the order in which they ask. Used from many threads.

    At most `concurrency` calls are in flight, and none starts while as many answers wait to be written. After a 429 the
    whole worker pauses, goes on with half as many calls at once, and recovers call by call. `is_spent` is asked last of
    all before a call starts: others may have spent the money meanwhile.
    """

    def __init__(
        self, concurrency: int, rates: Rates | None = None, is_spent: Callable[[], bool] = lambda: False
    ) -> None:
        self._concurrency = concurrency
        self._rates = rates
        self._is_spent = is_spent
        self._turnstile = threading.Lock()
        self._changed = threading.Condition()
        self._limit = float(concurrency)
        self._in_flight = self._unwritten = 0
        self._paused_until = self._slowed_at = 0.0
        self._refusing_since: float | None = None
        self._logged_at: float | None = None
        self._pause = SHORTEST_PAUSE
        self.stopped = threading.Event()

    def stop(self) -> None:
        """Let no further call start."""
        self.stopped.set()

    @contextmanager
    def call(self, tokens: float) -> Iterator[float]:
        """Hold one of the calls in flight, of so many tokens as expected; yield the time at which it started.

        Raises:
            Stopped: `stop` was called before it could start.
            BudgetSpent: there is no money left for it.
        """
        with self._turnstile:  # the others wait here, so that only the first in line looks at limits and clocks
            self._wait(tokens)
        try:
            yield time.monotonic()
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Count an answer as one that waits to be written while the block runs."""
        with self._changed:
            self._unwritten += 1
        try:
            yield
        finally:
            with self._changed:
                self._unwritten -= 1
                self._changed.notify()

    def _wait(self, tokens: float) -> None:
        while True:
            with self._changed:
                while not self.stopped.is_set():
                    pause = self._paused_until - time.monotonic()
                    if pause <= 0 and self._in_flight < int(self._limit) and self._unwritten < self._concurrency:
                        break
                    self._changed.wait(min(pause, POLL_SECONDS) if pause > 0 else POLL_SECONDS)
            wait = 0.0 if self._rates is None or self.stopped.is_set() else self._rates.reserve(tokens)
            if self.stopped.is_set():
                raise Stopped
            if wait <= 0:
                break
            self.stopped.wait(wait)
        if self._is_spent():
            raise BudgetSpent
        with self._changed:
            self._in_flight += 1

    def answered(self, tokens_more: float) -> None:
        """Note an answer that is no 429, and how many tokens more (or less) than expected the call took."""
        if self._rates is not None:
            self._rates.settle(tokens_more)
        with self._changed:
            self._refusing_since, self._pause = None, SHORTEST_PAUSE
            if self._limit < self._concurrency:
                self._limit = min(self._concurrency, self._limit + self._concurrency / RECOVERY_ROUNDS / self._limit)
                self._changed.notify()

    def slow_down(self, started: float, wait: float | None) -> bool:
        """Note that a call was answered 429; return whether to go on at all.

        Args:
            started: When the call started; one that started before the last slowing down tells nothing new.
            wait: Seconds that the endpoint asks to wait, if it does.
        """
        with self._changed:
            now = time.monotonic()
            self._refusing_since = self._refusing_since or now
            if wait is not None:
                self._paused_until = max(self._paused_until, now + wait)
            if started >= self._slowed_at:
                self._slowed_at = now
                self._limit = max(1.0, self._limit / 2)
                if wait is None or self._pause > SHORTEST_PAUSE:  # at first what it asks for is enough
                    self._paused_until = max(self._paused_until, now + self._pause * random.uniform(1.0, 1.25))
                self._pause = min(self._pause * 2, LONGEST_PAUSE)
                self._log(now)
            return now - self._refusing_since < GIVE_UP_SECONDS

    def _log(self, now: float) -> None:
        if self._logged_at is None or now - self._logged_at >= LOG_SECONDS:
            self._logged_at = now
            pause = max(self._paused_until - now, 0.0)
            logger.warning(
                "the endpoint answers HTTP 429: no call for %.0f s, then at most %d at once until it has recovered",
                pause,
                int(self._limit),
            )
