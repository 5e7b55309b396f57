"""When the next call may start: calls in flight, answers not yet written, 429s, and rates of one worker or of many."""

import json
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from typing import Protocol

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tagger.connections import Connection
from tagger.redis_connection import redis_client
from tagger.throttle import (
    BURST_SECONDS,
    GIVE_UP_SECONDS,
    RATE_KEY_SECONDS,
    RECOVERY_ROUNDS,
    BudgetSpent,
    LocalRates,
    Rates,
    RedisRates,
    Stopped,
    Throttle,
)
from tests.conftest import REPOSITORY

Redis = redis.Redis


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


class Calls:
    """Calls on threads of their own, each of which lasts until it is let go."""

    def __init__(self, throttle: Throttle) -> None:
        self._throttle = throttle
        self._let_go = threading.Semaphore(0)
        self.begun: list[float] = []
        """When each call started."""
        self.numbers: list[int] = []
        """The calls that started, in this order."""
        self.ended = self.refused = 0
        self._threads: list[threading.Thread] = []

    @property
    def in_flight(self) -> int:
        return len(self.begun) - self.ended

    def begin(self, count: int = 1) -> None:
        """Ask for calls, one after the other."""
        for _ in range(count):
            thread = threading.Thread(target=self._call, args=(len(self._threads),), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _call(self, number: int) -> None:
        try:
            with self._throttle.call(0) as started:
                self.begun.append(started)
                self.numbers.append(number)
                self._let_go.acquire()
                self.ended += 1
        except Stopped:
            self.refused += 1

    def end(self, count: int = 1) -> None:
        """Let calls in flight end."""
        ended = self.ended + count
        self._let_go.release(count)
        wait_until(lambda: self.ended == ended)

    def become(self, in_flight: int) -> bool:
        """Wait until so many calls are in flight; return whether they then stay as many."""
        wait_until(lambda: self.in_flight >= in_flight)
        time.sleep(0.1)
        return self.in_flight == in_flight

    def close(self) -> None:
        """End all of them."""
        self._throttle.stop()
        self._let_go.release(len(self._threads))
        for thread in self._threads:
            thread.join(10)


MakeCalls = Callable[[Throttle], Calls]


@pytest.fixture
def calls_of() -> Iterator[MakeCalls]:
    with ExitStack() as stack:

        def calls_of(throttle: Throttle) -> Calls:
            calls = Calls(throttle)
            stack.callback(calls.close)
            return calls

        yield calls_of


def limit_of(throttle: Throttle, at_most: int, calls_of: MakeCalls) -> int:
    """Return how many calls the throttle lets be in flight, nothing else being in flight."""
    calls = calls_of(throttle)
    calls.begin(at_most + 1)
    seen = -1
    while calls.in_flight != seen:
        seen = calls.in_flight
        time.sleep(0.1)
    calls.end(seen)
    rest = at_most + 1 - seen
    while rest:  # those that had to wait
        wait_until(lambda: calls.in_flight > 0)
        now = calls.in_flight
        calls.end(now)
        rest -= now
    return seen


# Calls in flight


def test_no_more_calls_are_in_flight_than_allowed(calls_of: MakeCalls) -> None:
    calls = calls_of(Throttle(3))

    calls.begin(10)

    assert calls.become(3)


def test_a_call_that_ends_lets_the_next_one_start(calls_of: MakeCalls) -> None:
    calls = calls_of(Throttle(3))
    calls.begin(5)
    assert calls.become(3)

    calls.end(1)

    wait_until(lambda: len(calls.begun) == 4)
    assert calls.become(3)


def test_a_call_that_raises_has_ended_too(calls_of: MakeCalls) -> None:
    throttle = Throttle(1)
    with pytest.raises(ZeroDivisionError), throttle.call(0):
        1 / 0  # noqa: B018
    calls = calls_of(throttle)

    calls.begin()

    assert calls.become(1)


def test_a_crowd_of_threads_keeps_to_the_limits() -> None:
    throttle = Throttle(4)
    mutex = threading.Lock()
    now = {"in flight": 0, "unwritten": 0}
    most = dict(now)

    def count(what: str, by: int) -> None:
        with mutex:
            now[what] += by
            most[what] = max(most[what], now[what])

    def work(_: int) -> None:
        with throttle.call(0):
            count("in flight", 1)
            time.sleep(0.001)
            count("in flight", -1)
        with throttle.writing():
            count("unwritten", 1)
            time.sleep(0.002)
            count("unwritten", -1)

    with ThreadPoolExecutor(24) as threads:
        list(threads.map(work, range(600)))

    assert most["in flight"] == 4
    assert most["unwritten"] <= 4 + 4  # those in flight come on top of those that keep the next from starting


def test_calls_start_about_in_the_order_in_which_they_were_asked_for(calls_of: MakeCalls) -> None:
    calls = calls_of(Throttle(1))
    for _ in range(20):
        calls.begin()
        time.sleep(0.01)
    for number in range(20):
        wait_until(lambda number=number: len(calls.begun) == number + 1)  # type: ignore[misc]
        calls.end()

    assert len(calls.numbers) == 20
    assert max(abs(number - place) for place, number in enumerate(calls.numbers)) <= 3


def test_a_worker_in_a_hurry_does_not_keep_others_from_their_turn(calls_of: MakeCalls) -> None:
    throttle = Throttle(1)
    waiting = calls_of(throttle)

    def hurry() -> None:
        for _ in range(2000):
            with throttle.call(0):
                time.sleep(0.001)
            if waiting.begun:
                return

    hurrying = threading.Thread(target=hurry, daemon=True)
    hurrying.start()
    waiting.begin()

    wait_until(lambda: len(waiting.begun) == 1)
    waiting.end()
    hurrying.join(10)


# Answers that wait to be written


def test_no_call_starts_while_as_many_answers_wait_to_be_written(calls_of: MakeCalls) -> None:
    throttle = Throttle(2)
    calls = calls_of(throttle)
    with throttle.writing(), throttle.writing():
        calls.begin(3)
        time.sleep(0.2)
        assert calls.begun == []

    assert calls.become(2)


def test_one_answer_less_to_write_lets_calls_start(calls_of: MakeCalls) -> None:
    throttle = Throttle(2)
    calls = calls_of(throttle)
    with throttle.writing():
        with throttle.writing():
            calls.begin(3)
        assert calls.become(2)


def test_an_answer_that_cannot_be_written_does_not_count_for_ever(calls_of: MakeCalls) -> None:
    throttle = Throttle(1)
    with pytest.raises(OSError, match="S3"), throttle.writing():
        raise OSError("S3")
    calls = calls_of(throttle)

    calls.begin()

    assert calls.become(1)


# Stopping


def no_rest(throttle: Throttle, stack: ExitStack) -> None:
    """Calls in flight."""
    for _ in range(2):
        stack.enter_context(throttle.call(0))


def unwritten(throttle: Throttle, stack: ExitStack) -> None:
    """Answers to write."""
    for _ in range(2):
        stack.enter_context(throttle.writing())


def paused(throttle: Throttle, stack: ExitStack) -> None:
    """A pause."""
    throttle.slow_down(time.monotonic(), 100.0)


def rated(throttle: Throttle, stack: ExitStack) -> None:
    """A rate that is used up."""
    with throttle.call(0):
        pass


@pytest.mark.parametrize("hold_up", [no_rest, unwritten, paused, rated], ids=lambda hold_up: str(hold_up.__doc__))
def test_stop_ends_all_that_wait_at_once(hold_up: Callable[[Throttle, ExitStack], None], calls_of: MakeCalls) -> None:
    throttle = Throttle(2, LocalRates(1, None) if hold_up is rated else None)
    calls = calls_of(throttle)
    with ExitStack() as stack:
        hold_up(throttle, stack)
        calls.begin(10)
        time.sleep(0.1)
        assert calls.begun == []

        throttle.stop()

        wait_until(lambda: calls.refused == 10, seconds=5)
    assert calls.begun == []


def test_after_stop_no_call_starts() -> None:
    throttle = Throttle(2)
    throttle.stop()

    with pytest.raises(Stopped), throttle.call(0):
        pass


def test_stop_leaves_calls_in_flight_alone(calls_of: MakeCalls) -> None:
    throttle = Throttle(2)
    calls = calls_of(throttle)
    calls.begin(2)
    assert calls.become(2)

    throttle.stop()

    assert calls.become(2)
    assert calls.refused == 0


# The budget


def test_no_call_starts_when_there_is_no_money_for_it(calls_of: MakeCalls) -> None:
    spent = threading.Event()
    throttle = Throttle(2, is_spent=spent.is_set)
    calls = calls_of(throttle)
    calls.begin(2)
    assert calls.become(2)

    spent.set()

    with pytest.raises(BudgetSpent), Throttle(2, is_spent=spent.is_set).call(0):
        pass
    calls.begin(3)
    calls.end(2)
    wait_until(lambda: calls.refused == 3)
    assert len(calls.begun) == 2


def test_a_call_that_waited_looks_at_the_budget_when_its_turn_comes(calls_of: MakeCalls) -> None:
    looked: list[float] = []

    def is_spent() -> bool:
        looked.append(time.monotonic())
        return False

    throttle = Throttle(1, is_spent=is_spent)
    calls = calls_of(throttle)
    calls.begin(2)
    assert calls.become(1)
    assert len(looked) == 1

    calls.end()

    wait_until(lambda: len(calls.begun) == 2)
    assert len(looked) == 2


def test_a_budget_that_cannot_be_asked_for_holds_up_one_call_and_no_place(calls_of: MakeCalls) -> None:
    answers = iter([True, False])

    def is_spent() -> bool:
        if next(answers):
            raise redis.ConnectionError
        return False

    throttle = Throttle(1, is_spent=is_spent)
    with pytest.raises(redis.ConnectionError), throttle.call(0):
        pass
    calls = calls_of(throttle)

    calls.begin()

    assert calls.become(1)


# HTTP 429


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tagger.throttle.time", clock)
    return clock


def test_a_429_halves_the_calls_in_flight(calls_of: MakeCalls) -> None:
    throttle = Throttle(8)

    throttle.slow_down(time.monotonic(), 0.0)

    assert limit_of(throttle, 8, calls_of) == 4


def test_all_429s_of_calls_that_were_in_flight_together_count_as_one(calls_of: MakeCalls) -> None:
    throttle = Throttle(8)
    calls = calls_of(throttle)
    calls.begin(8)
    assert calls.become(8)

    for started in calls.begun:
        throttle.slow_down(started, 0.0)
    calls.end(8)

    assert limit_of(throttle, 8, calls_of) == 4


def test_each_round_of_429s_halves_again_down_to_one_call(calls_of: MakeCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.throttle.LONGEST_PAUSE", 1.0)  # that is, no growing one
    throttle = Throttle(8)
    limits = []
    for _ in range(5):
        throttle.slow_down(time.monotonic(), 0.0)
        limits.append(limit_of(throttle, 8, calls_of))

    assert limits == [4, 2, 1, 1, 1]


def test_calls_in_flight_beyond_the_new_limit_end_before_another_starts(calls_of: MakeCalls) -> None:
    throttle = Throttle(4)
    calls = calls_of(throttle)
    calls.begin(6)
    assert calls.become(4)
    throttle.slow_down(calls.begun[0], 0.0)

    calls.end(2)
    time.sleep(0.1)
    assert (calls.in_flight, len(calls.begun)) == (2, 4)
    calls.end(1)

    wait_until(lambda: len(calls.begun) == 5)


def paused_for(throttle: Throttle) -> float:
    """Return after how many seconds the next call starts."""
    before = time.monotonic()
    with throttle.call(0) as started:
        return started - before


def test_the_whole_worker_pauses_as_long_as_the_endpoint_asks_for() -> None:
    throttle = Throttle(8)

    throttle.slow_down(time.monotonic(), 0.5)

    assert 0.4 <= paused_for(throttle) < 3


def test_the_longest_pause_asked_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    throttle = Throttle(8)
    started = time.monotonic()

    for wait in (0.1, 0.5, 0.2):
        throttle.slow_down(started, wait)

    assert 0.4 <= paused_for(throttle) < 3


def test_without_a_time_asked_for_pauses_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.throttle.SHORTEST_PAUSE", 0.1)
    throttle = Throttle(8)
    pauses = []
    for _ in range(4):
        throttle.slow_down(time.monotonic(), None)
        pauses.append(paused_for(throttle))

    assert all(pause >= 0.09 * 2**n for n, pause in enumerate(pauses))
    assert pauses[3] > 3 * pauses[0]


def test_pauses_double_up_to_the_longest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.throttle.SHORTEST_PAUSE", 0.05)
    monkeypatch.setattr("tagger.throttle.LONGEST_PAUSE", 0.1)
    throttle = Throttle(8)
    pauses = []
    for _ in range(7):
        throttle.slow_down(time.monotonic(), None)
        pauses.append(paused_for(throttle))

    assert min(pauses[1:]) >= 0.09
    assert sum(pauses) < 3  # doubled each time it were 6.4 s


def test_calls_of_one_round_do_not_lengthen_the_pause_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.throttle.SHORTEST_PAUSE", 0.1)
    throttle = Throttle(64)
    started = time.monotonic()

    for _ in range(64):
        throttle.slow_down(started, None)

    assert 0.09 <= paused_for(throttle) < 3


def test_an_endpoint_that_asks_for_no_pause_and_answers_429_on_and_on_is_not_hammered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tagger.throttle.SHORTEST_PAUSE", 0.2)
    throttle = Throttle(8)
    pauses = []
    for _ in range(3):
        throttle.slow_down(time.monotonic(), 0.0)
        pauses.append(paused_for(throttle))

    assert pauses[1] >= 0.39 and pauses[2] >= 0.79


def test_an_answer_makes_the_next_pause_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.throttle.SHORTEST_PAUSE", 0.05)
    throttle = Throttle(8)
    for _ in range(6):
        throttle.slow_down(time.monotonic(), None)
    with throttle.call(0):
        throttle.answered(0)

    throttle.slow_down(time.monotonic(), None)

    assert paused_for(throttle) < 1.0  # and not 0.05 · 2⁶ = 3.2 s


def test_calls_in_flight_are_not_touched_by_a_pause(calls_of: MakeCalls) -> None:
    throttle = Throttle(2)
    calls = calls_of(throttle)
    calls.begin(2)
    assert calls.become(2)
    throttle.slow_down(time.monotonic(), 100.0)
    calls.begin(2)

    calls.end(2)
    time.sleep(0.1)

    assert (len(calls.begun), calls.in_flight) == (2, 0)


@pytest.mark.slow
def test_the_limit_recovers_within_some_rounds_of_answers(calls_of: MakeCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.throttle.LONGEST_PAUSE", 1.0)  # that is, no growing one
    concurrency = 16
    throttle = Throttle(concurrency)
    for _ in range(5):
        throttle.slow_down(time.monotonic(), 0.0)
    limits = [limit_of(throttle, concurrency, calls_of)]
    while limits[-1] < concurrency and len(limits) < 3 * RECOVERY_ROUNDS:
        for _ in range(limits[-1]):
            throttle.answered(0)
        limits.append(limit_of(throttle, concurrency, calls_of))

    assert limits[0] == 1
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(limits))
    assert RECOVERY_ROUNDS / 2 < len(limits) < RECOVERY_ROUNDS * 1.5


def test_the_limit_never_grows_beyond_the_concurrency(calls_of: MakeCalls) -> None:
    throttle = Throttle(3)
    throttle.slow_down(time.monotonic(), 0.0)
    for _ in range(500):
        throttle.answered(0)

    assert limit_of(throttle, 3, calls_of) == 3


def test_nothing_but_429s_for_long_is_given_up(clock: Clock) -> None:
    throttle = Throttle(8)
    goes_on = []
    for _ in range(4):
        goes_on.append(throttle.slow_down(clock.now, 60.0))
        clock.now += GIVE_UP_SECONDS / 3 + 1

    assert goes_on == [True, True, True, False]


def test_it_is_not_given_up_if_something_was_answered_in_between(clock: Clock) -> None:
    throttle = Throttle(8)
    goes_on = []
    for _ in range(10):
        goes_on.append(throttle.slow_down(clock.now, 60.0))
        clock.now += GIVE_UP_SECONDS / 3 + 1
        throttle.answered(0)

    assert goes_on == [True] * 10


def test_a_429_after_hours_without_one_is_no_reason_to_give_up(clock: Clock) -> None:
    throttle = Throttle(8)
    throttle.slow_down(clock.now, None)
    throttle.answered(0)
    clock.now += 10_000

    assert throttle.slow_down(clock.now, None)


# Rates


class RedisClock(Clock):
    """The same clock, and Redis's."""

    def __init__(self, client: Redis) -> None:
        super().__init__()
        self._client = client

    def tell(self) -> None:
        micros = round(self.now * 1e6)
        self._client.hset("clock", mapping={"seconds": micros // 1_000_000, "micros": micros % 1_000_000})


class TimedRedisRates(RedisRates):
    """Rates by Redis's script, but by a clock that a test sets."""

    _RESERVE = RedisRates._RESERVE.replace("redis.call('TIME')", "redis.call('HMGET', 'clock', 'seconds', 'micros')")
    clock: RedisClock

    def reserve(self, tokens: float) -> float:
        self.clock.tell()
        return super().reserve(tokens)


class MakeRates(Protocol):
    def __call__(self, requests: float | None, tokens: float | None) -> tuple[Rates, Clock]: ...


@pytest.fixture
def client(redis_default: Connection) -> Iterator[Redis]:
    with redis_client("redis_default", lambda _: redis_default) as client:
        yield client


@pytest.fixture(params=["local", "redis"])
def new_rates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeRates:
    """Make rates of either kind, by a clock that the test sets; each has nothing taken yet."""

    def local(requests: float | None, tokens: float | None) -> tuple[Rates, Clock]:
        clock = Clock()
        monkeypatch.setattr("tagger.throttle.time", clock)
        return LocalRates(requests, tokens), clock

    def shared(requests: float | None, tokens: float | None) -> tuple[Rates, Clock]:
        client: Redis = request.getfixturevalue("client")
        client.flushall()
        rates = TimedRedisRates(client, "run", requests, tokens)
        rates.clock = RedisClock(client)
        return rates, rates.clock

    return local if request.param == "local" else shared


def test_the_clock_of_redis_is_ours_here() -> None:
    assert "'TIME'" in RedisRates._RESERVE
    assert "'TIME'" not in TimedRedisRates._RESERVE


Taken = list[tuple[float, float]]


def take(rates: Rates, clock: Clock, asked: list[tuple[float, float]]) -> Taken:
    """Take each of some (pause before, tokens) as soon as it may be; return (time, tokens)."""
    taken = []
    for pause, tokens in asked:
        clock.now += pause
        while (wait := rates.reserve(tokens)) > 0:
            clock.now += max(wait, 1e-4)
        taken.append((clock.now, tokens))
    return taken


def windows(taken: Taken) -> Iterator[list[float]]:
    """Yield the tokens of all that was taken within 60 s, for each window that begins with one."""
    for begin, _ in taken:
        yield [tokens for at, tokens in taken if begin <= at < begin + 60 - 1e-3]


pauses = st.one_of(st.just(0.0), st.floats(0, 2), st.floats(0, 90))
asked = st.lists(st.tuples(pauses, st.floats(1, 3000)), max_size=60)
many = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


@many
@given(per_minute=st.integers(1, 50), asked=asked)
def test_no_60_s_hold_more_requests_than_allowed(
    new_rates: MakeRates, per_minute: int, asked: list[tuple[float, float]]
) -> None:
    taken = take(*new_rates(per_minute, None), asked)

    assert all(len(window) <= per_minute for window in windows(taken))


@many
@given(per_minute=st.integers(1000, 20_000), asked=asked)
def test_no_60_s_hold_more_tokens_than_allowed(
    new_rates: MakeRates, per_minute: int, asked: list[tuple[float, float]]
) -> None:
    taken = take(*new_rates(None, per_minute), asked)

    # a text that is larger than what is left of the rate may be the last one of a window
    assert all(sum(window[:-1]) <= per_minute for window in windows(taken))


def test_a_large_text_waits_until_those_before_it_are_paid_off(new_rates: MakeRates) -> None:
    taken = take(*new_rates(None, 1000), [(0.0, 900.0)] * 2)

    assert taken[1][0] - taken[0][0] >= 0.9 * 60 - 1


@many
@given(requests=st.integers(1, 50), tokens=st.integers(1000, 20_000), asked=asked)
def test_both_rates_hold_at_once(
    new_rates: MakeRates, requests: int, tokens: int, asked: list[tuple[float, float]]
) -> None:
    taken = take(*new_rates(requests, tokens), asked)

    assert all(len(window) <= requests and sum(window[:-1]) <= tokens for window in windows(taken))


@many
@given(requests=st.integers(1, 50), tokens=st.integers(1000, 20_000), asked=asked)
def test_rates_of_this_process_and_of_redis_agree(
    client: Redis, requests: int, tokens: int, asked: list[tuple[float, float]]
) -> None:
    client.flushall()
    shared = TimedRedisRates(client, "run", requests, tokens)
    clock = shared.clock = RedisClock(client)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tagger.throttle.time", clock)
        local = LocalRates(requests, tokens)
        for pause, size in asked:
            clock.now = round(clock.now + pause, 6)
            waits = local.reserve(size), shared.reserve(size)
            assert waits[0] == pytest.approx(waits[1], abs=1e-3)
            if waits[0] <= 0:
                local.settle(size / 3)
                shared.settle(size / 3)


@pytest.mark.parametrize("tokens", [1.0, 50.0])
def test_a_rate_is_used_up_to_nearly_all_of_it(new_rates: MakeRates, tokens: float) -> None:
    taken = take(*new_rates(600, 100_000), [(0.0, tokens)] * 3000)

    assert len(next(windows(taken))) >= 0.97 * 600


def test_what_is_asked_first_starts_at_once_and_not_all_of_it(new_rates: MakeRates) -> None:
    taken = take(*new_rates(600, None), [(0.0, 1.0)] * 60)

    at_once = [at for at, _ in taken if at == taken[0][0]]
    assert 8 <= len(at_once) <= 600 / 60 * BURST_SECONDS + 1


def test_no_rate_is_no_wait(new_rates: MakeRates) -> None:
    rates, clock = new_rates(None, None)

    assert [at for at, _ in take(rates, clock, [(0.0, 1e9)] * 100)] == [clock.now] * 100


def test_more_tokens_than_expected_delay_what_comes_next(new_rates: MakeRates) -> None:
    rates, _ = new_rates(None, 6000)
    rates.reserve(100)

    rates.settle(900)

    wait = rates.reserve(100)
    assert wait == pytest.approx(1000 * (60 + BURST_SECONDS) / 6000 - BURST_SECONDS, abs=0.01)


def test_fewer_tokens_than_expected_are_given_back(new_rates: MakeRates) -> None:
    rates, _ = new_rates(None, 6000)
    rates.reserve(1000)
    assert rates.reserve(100) > 0

    rates.settle(-950)

    assert rates.reserve(100) == 0


def test_what_was_not_used_is_not_saved_up(new_rates: MakeRates) -> None:
    rates, clock = new_rates(600, None)
    rates.reserve(1)
    clock.now += 3600

    taken = take(rates, clock, [(0.0, 1.0)] * 700)

    assert all(len(window) <= 600 for window in windows(taken))


def test_a_text_larger_than_the_whole_rate_gets_through(new_rates: MakeRates) -> None:
    rates, clock = new_rates(None, 1000)
    start = clock.now

    taken = take(rates, clock, [(0.0, 5000.0), (0.0, 10.0)])

    assert taken[0][0] == start
    assert 5 * 60 - BURST_SECONDS <= taken[1][0] - start <= 5 * (60 + BURST_SECONDS)


def test_a_large_text_waits_for_others_no_longer_than_needed(new_rates: MakeRates) -> None:
    rates, clock = new_rates(None, 1000)
    start = clock.now

    taken = take(rates, clock, [(0.0, 500.0), (0.0, 5000.0)])

    assert taken[1][0] - start <= 500 / 1000 * (60 + BURST_SECONDS)


# Rates in Redis


def test_runs_of_other_names_do_not_share_a_rate(client: Redis) -> None:
    for name in ("notes:1", "notes:2", "others:1"):
        assert RedisRates(client, name, 1, None).reserve(1) == 0


def test_workers_of_one_run_share_its_rate(client: Redis) -> None:
    assert RedisRates(client, "notes:1", 1, None).reserve(1) == 0

    assert RedisRates(client, "notes:1", 1, None).reserve(1) == pytest.approx(60, abs=2)


def test_the_state_of_a_run_expires(client: Redis) -> None:
    rates = RedisRates(client, "notes:1", 60, 1000)
    rates.reserve(10)
    rates.settle(-3)

    [key] = client.keys("*")
    assert 0 < client.ttl(key) <= RATE_KEY_SECONDS


def test_a_settlement_that_comes_late_leaves_nothing_for_ever(client: Redis) -> None:
    rates = RedisRates(client, "notes:1", 60, 1000)
    rates.reserve(10)
    client.flushall()
    rates.settle(-3)

    assert all(client.ttl(key) > 0 for key in client.keys("*"))


def test_a_redis_that_has_forgotten_its_scripts_and_keys_learns_them_again(client: Redis) -> None:
    rates = RedisRates(client, "notes:1", 60, 1000)
    rates.reserve(10)
    client.script_flush()
    client.flushall()

    assert rates.reserve(10) == 0


# Rates in real time


def started_within(throttle: Throttle, seconds: float, threads: int) -> list[float]:
    """Return when calls started that take no time, of so many threads that make them for so long."""
    started: list[float] = []
    until = time.monotonic() + seconds

    def work(_: int) -> None:
        while time.monotonic() < until:
            try:
                with throttle.call(10) as at:
                    started.append(at)
            except Stopped:
                return
            throttle.answered(0)

    stop = threading.Timer(seconds, throttle.stop)
    stop.start()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    stop.join()
    return started


def most_in(seconds: float, per_minute: float) -> float:
    """Return how many requests may start within so long, the burst and the request at the end included."""
    return (seconds + BURST_SECONDS) * per_minute / (60 + BURST_SECONDS) + 1


@pytest.mark.slow
def test_600_requests_a_minute_are_about_10_a_second() -> None:
    throttle = Throttle(8, LocalRates(600, None))

    started = started_within(throttle, 3.0, threads=16)

    took = max(started) - min(started)
    assert 0.5 * 30 <= len(started) <= most_in(took, 600)


@pytest.mark.slow
def test_threads_that_share_a_rate_through_redis_start_about_10_a_second(client: Redis) -> None:
    throttles = [Throttle(4, RedisRates(client, "notes:1", 600, None)) for _ in range(3)]

    with ThreadPoolExecutor(3) as pool:
        each = list(pool.map(lambda throttle: started_within(throttle, 3.0, threads=4), throttles))

    started = sorted(at for part in each for at in part)
    assert 0.5 * 30 <= len(started) <= most_in(started[-1] - started[0] + 0.2, 600)
    assert all(each)


SHARING = """
    import json, sys, threading, time
    from redis import Redis
    from tagger.throttle import RedisRates, Stopped, Throttle

    host, port, db, password, seconds = sys.argv[1:]
    throttle = Throttle(8, RedisRates(Redis(host, int(port), int(db), password, protocol=2), "notes:1", 600, None))
    started = []

    def work():
        try:
            while True:
                with throttle.call(10):
                    started.append(time.time())
                throttle.answered(0)
        except Stopped:
            pass

    print("ready", flush=True)
    sys.stdin.readline()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(float(seconds))
    throttle.stop()
    for thread in threads:
        thread.join()
    print(json.dumps(started), flush=True)
"""


@pytest.mark.slow
def test_processes_that_share_a_rate_through_redis_start_about_10_a_second(redis_default: Connection) -> None:
    assert redis_default.host is not None
    where = [redis_default.host, str(redis_default.port), str(redis_default.extra["db"]), str(redis_default.password)]
    command = [sys.executable, "-c", textwrap.dedent(SHARING), *where, "4.0"]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
                )
            )
            for _ in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
        printed = [process.communicate(timeout=60)[0] for process in processes]

    each: list[list[float]] = [json.loads(out) for out in printed]
    started = sorted(at for part in each for at in part)
    assert all(each)
    assert 0.5 * 40 <= len(started) <= most_in(started[-1] - started[0] + 0.2, 600)


def test_429s_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    throttle = Throttle(8)
    for _ in range(3):
        throttle.slow_down(time.monotonic(), 3.0)
    assert [record.getMessage() for record in caplog.records] == [
        "the endpoint answers HTTP 429: no call for 3 s, then at most 4 at once until it has recovered"
    ]

    monkeypatch.setattr("tagger.throttle.LOG_SECONDS", 0.0)
    throttle.slow_down(time.monotonic(), 3.0)
    assert len(caplog.records) == 2
