"""The run-locks: gokart's own, over the Redis of an Airflow connection, and what they lean on in gokart."""

import ast
import dataclasses
import inspect
import multiprocessing
import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gokart
import luigi
import pytest
from gokart.conflict_prevention_lock import task_lock, task_lock_wrappers
from gokart.target import TargetOnKart
from gokart.utils import FlattenableItems
from redis import Redis
from redis.exceptions import ConnectionError as RedisAway
from redis.exceptions import LockError, LockNotOwnedError
from redis.lock import Lock

import tagger.engine
import tagger.lock
from tagger.connections import Connection
from tagger.engine import Leaf, build
from tagger.exceptions import InputError, LockFailed, Unreachable
from tagger.lock import LOCK_SECONDS, RENEW_SECONDS, RunLocks
from tagger.redis_connection import redis_client
from tagger.tasks import Private
from tests.databases import redis_connection
from tests.servers import Authority, RedisServer

TEXT = "klopstockwurst"
TASK_LOCK: Any = task_lock
WRAPPERS: Any = task_lock_wrappers
SPAWN: Any = multiprocessing.get_context("spawn")


class Desk:
    """What the tasks of one worker share: how a text is asked, and what came of it."""

    def __init__(
        self, locks: RunLocks | None, names: list[str], ask: Callable[[str], object] = lambda name: None
    ) -> None:
        self.lock = locks.parameters if locks else {}
        self.names = names
        self.ask = ask
        self.asked: list[str] = []
        self.done: set[str] = set()
        self.failures: dict[str, BaseException] = {}
        self.others: Desk = self

    def root(self) -> "Questions":
        return Questions(desk=self)


class Question(Leaf[None]):
    """Ask a text, unless another worker has meanwhile: looked at under the lock."""

    name: luigi.Parameter[str] = luigi.Parameter()
    text: luigi.Parameter[Any] = Private()
    desk: luigi.Parameter[Any] = Private()

    should_dump_supplementary_log_files: luigi.BoolParameter = luigi.BoolParameter(default=False, significant=False)

    def make_unique_id(self) -> str:
        return self.name

    def output(self) -> FlattenableItems[TargetOnKart]:
        return []

    def complete(self) -> bool:
        desk: Desk = self.desk
        return self.name in desk.done

    def run(self) -> None:
        if self.name not in self.desk.others.done:
            self.desk.asked.append(self.name)
            self.desk.ask(self.name)
        self.desk.done.add(self.name)

    def on_failure(self, exception: BaseException) -> str:
        self.desk.failures[self.name] = exception
        return type(exception).__name__


class Questions(gokart.TaskOnKart[None]):
    desk: luigi.Parameter[Any] = Private()

    should_dump_supplementary_log_files: luigi.BoolParameter = luigi.BoolParameter(default=False, significant=False)

    def make_unique_id(self) -> str:
        return "questions"

    def requires(self) -> FlattenableItems[gokart.TaskOnKart[Any]]:
        return [Question(name=name, text=TEXT, desk=self.desk, **self.desk.lock) for name in self.desk.names]

    def complete(self) -> bool:
        desk: Desk = self.desk
        return desk.done.issuperset(desk.names)

    def run(self) -> None:
        pass


def names(count: int) -> list[str]:
    return [f"{number:032x}" for number in range(count)]


def key_of(name: str) -> str:
    """Return the key in Redis of a text's lock."""
    return f"Question_{name}-run"


def client_of(connection: Connection) -> Redis:
    return redis_client(connection.conn_id, lambda _: connection)


def locks_of(connection: Connection) -> RunLocks:
    return RunLocks(client_of(connection), connection.conn_id)


def run(desk: Desk, threads: int = 4) -> bool:
    return build(desk.root(), threads=threads, stopped=threading.Event())


def question(desk: Desk, name: str = "0" * 32) -> Question:
    return Question(name=name, text=TEXT, desk=desk, **desk.lock)


def comes_true(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


@pytest.fixture
def direct(redis_server: RedisServer, redis_default: Connection) -> Iterator[Redis]:
    """The database of `redis_default`, past all of ours."""
    with redis_server.client(redis_default.extra["db"]) as client:
        yield client


@pytest.fixture
def locks(redis_default: Connection) -> RunLocks:
    return locks_of(redis_default)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that last 1.2 s and are renewed every 0.2 s; a worker that comes back to a locked text soon."""
    monkeypatch.setattr("tagger.lock.LOCK_SECONDS", 1.2)
    monkeypatch.setattr("tagger.lock.RENEW_SECONDS", 0.2)
    monkeypatch.setattr("tagger.engine.LOCKED_SECONDS", 0.1)
    monkeypatch.setattr("tagger.engine.POLL_SECONDS", 0.02)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for Redis for long."""
    monkeypatch.setattr("tagger.redis_connection.REDIS_SECONDS", 0.3)
    monkeypatch.setattr("tagger.redis_connection.REDIS_RETRIES", 0)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may kill."""
    with RedisServer(tmp_path / "redis", password="p@ss wo:rd/%") as server:
        yield server


# Taken and freed


def test_a_text_is_asked_under_a_lock_of_its_own(locks: RunLocks, direct: Redis) -> None:
    seen: list[Any] = []
    desk = Desk(locks, names(3), lambda name: seen.append((name, direct.keys("*"))))

    with locks.held():
        assert run(desk, threads=1) is True

    assert sorted(seen) == [(name, [key_of(name).encode()]) for name in names(3)]


def test_locks_are_free_after_success(locks: RunLocks, direct: Redis) -> None:
    with locks.held():
        assert run(Desk(locks, names(8))) is True

    assert direct.keys("*") == []


def test_locks_are_free_after_failure(locks: RunLocks, direct: Redis) -> None:
    def fail(name: str) -> None:
        raise ValueError

    desk = Desk(locks, names(8), fail)
    with locks.held():
        assert run(desk) is False

    assert direct.keys("*") == []
    assert {type(error) for error in desk.failures.values()} == {ValueError}


def test_without_a_lock_redis_is_not_asked(locks: RunLocks, direct: Redis) -> None:
    desk = Desk(None, names(3), lambda name: seen.extend(direct.keys("*")))
    seen: list[Any] = []

    with locks.held():
        assert run(desk) is True

    assert (desk.asked != [], seen) == (True, [])


@pytest.mark.usefixtures("quick")
def test_a_text_that_another_worker_has_locked_waits_for_it(locks: RunLocks, direct: Redis) -> None:
    other = direct.lock(key_of(names(1)[0]), timeout=20, thread_local=False)
    assert other.acquire()
    threading.Timer(0.5, other.release).start()
    started = time.monotonic()

    with locks.held():
        assert run(Desk(locks, names(1))) is True

    assert time.monotonic() - started >= 0.4


@pytest.mark.usefixtures("quick")
def test_a_worker_goes_on_with_other_texts_meanwhile(locks: RunLocks, direct: Redis) -> None:
    """One thread: were the lock waited for, it would never be freed."""
    other = direct.lock(key_of(names(1)[0]), timeout=60, thread_local=False)
    assert other.acquire()
    desk = Desk(locks, names(12), lambda name: other.release() if len(desk.asked) == 11 else None)

    with locks.held():
        assert run(desk, threads=1) is True

    assert desk.asked[-1] == names(1)[0]


# Two workers


def be_quick() -> None:
    """Do as the fixture `quick`, in a process of its own."""
    tagger.lock.LOCK_SECONDS, tagger.lock.RENEW_SECONDS = 1.2, 0.2  # type: ignore[assignment]
    tagger.engine.LOCKED_SECONDS, tagger.engine.POLL_SECONDS = 0.1, 0.02


def ask_all(connection: Connection, count: int, results: Any, ready: Any) -> None:
    """Be a worker in a process of its own: ask the whole tree, with marks in Redis for what is asked and answered."""
    be_quick()
    marks = client_of(dataclasses.replace(connection, extra={**connection.extra, "db": 5}))
    locks = locks_of(connection)

    def ask(name: str) -> None:
        if not marks.exists(f"answered {name}"):
            marks.incr(f"asked {name}")
            time.sleep(0.01)
            marks.set(f"answered {name}", 1)

    desk = Desk(locks, names(count), ask)
    ready.wait()
    with locks.held():
        results.put((run(desk, threads=8), len(desk.failures)))


@pytest.mark.slow
def test_no_text_is_asked_twice_by_workers_on_the_same_tree(
    redis_server: RedisServer, redis_default: Connection
) -> None:
    results, ready = SPAWN.Queue(), SPAWN.Barrier(3)
    processes = [SPAWN.Process(target=ask_all, args=(redis_default, 150, results, ready)) for _ in range(3)]
    for process in processes:
        process.start()

    assert [results.get(timeout=100) for _ in processes] == [(True, 0)] * 3

    for process in processes:
        process.join()
    with redis_server.client(5) as marks:
        asked = [int(marks.get(key) or 0) for key in marks.keys("asked *")]
    assert (len(asked), set(asked)) == (150, {1})


@pytest.mark.usefixtures("quick")
def test_one_text_in_two_workers_at_once_is_asked_once(redis_default: Connection, direct: Redis) -> None:
    """The second one finds what the first one wrote: it looks under the lock."""
    ours, theirs = locks_of(redis_default), locks_of(redis_default)
    first, second = Desk(ours, names(1)), Desk(theirs, names(1))
    second.others = first
    began, go_on = threading.Event(), threading.Event()

    def ask(name: str) -> None:
        began.set()
        assert go_on.wait(10)

    first.ask = ask
    with ours.held():
        thread = threading.Thread(target=question(first).run)
        thread.start()
        assert began.wait(10)
        with pytest.raises(task_lock.TaskLockException):
            question(second).run()
        go_on.set()
        thread.join()
        question(second).run()

    assert (first.asked, second.asked) == (names(1), [])
    assert first.done == second.done == set(names(1))


# Renewed


@contextmanager
def asking(desk: Desk) -> Iterator[None]:
    """Ask the texts of a desk, each on a thread of its own, until the block ends."""
    go_on = threading.Event()
    desk.ask = lambda name: go_on.wait(30)
    threads = [threading.Thread(target=question(desk, name).run) for name in desk.names]
    for thread in threads:
        thread.start()
    try:
        assert comes_true(lambda: len(desk.asked) == len(desk.names))
        yield
    finally:
        go_on.set()
        for thread in threads:
            thread.join()


@pytest.mark.usefixtures("quick")
def test_locks_are_renewed_beyond_their_time(locks: RunLocks, direct: Redis) -> None:
    with locks.held(), asking(Desk(locks, names(20))):
        until = time.monotonic() + 2.5
        left = []
        while time.monotonic() < until:
            assert len(direct.keys("*")) == 20
            left.append(min(int(direct.pttl(key_of(name))) for name in names(20)))
            time.sleep(0.05)

    assert 0 < min(left) <= max(left) <= 1200
    assert direct.keys("*") == []


@pytest.mark.usefixtures("quick")
def test_a_lock_is_renewed_no_more_once_it_is_free(locks: RunLocks, direct: Redis) -> None:
    with locks.held():
        question(Desk(locks, names(1))).run()
        other = direct.lock(key_of(names(1)[0]), timeout=1)
        assert other.acquire(blocking=False)

        assert comes_true(lambda: direct.keys("*") == [], seconds=4)


@pytest.mark.usefixtures("quick")
def test_nothing_is_renewed_after_the_block(locks: RunLocks, direct: Redis) -> None:
    """A task that hangs must not keep its text for ever."""
    go_on = threading.Event()
    desk = Desk(locks, names(1), lambda name: go_on.wait(20))

    def run_until_the_lock_is_lost() -> None:
        with pytest.raises(LockError):
            question(desk).run()

    with locks.held():
        thread = threading.Thread(target=run_until_the_lock_is_lost)
        thread.start()
        assert comes_true(lambda: desk.asked == names(1))

    free = comes_true(lambda: direct.keys("*") == [], seconds=4)
    go_on.set()
    thread.join()
    assert free


def test_a_lock_lasts_less_than_a_minute_and_some_renewals() -> None:
    assert 3 * RENEW_SECONDS < LOCK_SECONDS <= 60


def test_a_lock_is_taken_for_so_long(locks: RunLocks, direct: Redis) -> None:
    with locks.held(), asking(Desk(locks, names(2))):
        left = [int(direct.pttl(key_of(name))) for name in names(2)]

    assert all(1000 * LOCK_SECONDS - 10_000 < each <= 1000 * LOCK_SECONDS for each in left)


def hold_for_ever(connection: Connection, began: Any) -> None:
    """Be a worker in a process of its own that ends with no text."""
    be_quick()
    locks = locks_of(connection)

    def ask(name: str) -> None:
        began.release()
        time.sleep(100)

    with locks.held():
        run(Desk(locks, names(3), ask), threads=3)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_dead_workers_locks_are_free_after_their_time(
    locks: RunLocks, redis_default: Connection, direct: Redis
) -> None:
    began = SPAWN.Semaphore(0)
    process = SPAWN.Process(target=hold_for_ever, args=(redis_default, began))
    process.start()
    assert all(began.acquire(timeout=100) for _ in range(3))
    time.sleep(1.5)
    assert len(direct.keys("*")) == 3  # it lives
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    killed = time.monotonic()

    desk = Desk(locks, names(3))
    with locks.held():
        assert run(desk) is True

    assert sorted(desk.asked) == names(3)
    assert time.monotonic() - killed < 1.2 + 3


def test_the_number_of_threads_does_not_grow_with_locks(locks: RunLocks) -> None:
    """Gokart starts one, with a scheduler of its own, for each."""
    before = set(threading.enumerate())
    with locks.held():
        desk = Desk(locks, names(30))
        with asking(desk):
            more = set(threading.enumerate()) - before
            assert len(more) == 30 + 1
            assert not [thread for thread in more if "APScheduler" in f"{thread.name} {type(thread)}"]
            assert [thread.name for thread in more if thread.daemon] == ["locks"]
    assert comes_true(lambda: set(threading.enumerate()) <= before)


@pytest.mark.usefixtures("quick")
def test_a_failing_renewal_is_tried_again_and_warned_about(
    locks: RunLocks, direct: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[float] = []
    original = Lock.extend

    def extend(self: Lock, *args: Any, **kwargs: Any) -> bool:
        calls.append(time.monotonic())
        if len(calls) <= 2:
            raise RedisAway("Connection reset")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Lock, "extend", extend)
    with locks.held(), asking(Desk(locks, names(1))):
        assert comes_true(lambda: len(calls) >= 8)
        assert len(direct.keys("*")) == 1

    warnings = [record.getMessage() for record in caplog.records if record.name == "tagger.lock"]
    assert warnings == ["lock `redis_default` cannot be renewed now: ConnectionError"] * 2


# Lost


@pytest.mark.usefixtures("quick")
def test_a_lost_lock_does_not_undo_an_answer(locks: RunLocks, direct: Redis) -> None:
    """Gokart's release fails then, twice; what the task has written stays, and so do the others."""
    desk = Desk(locks, names(5), lambda name: direct.delete(key_of(name)) if name == names(1)[0] else None)

    with locks.held():
        complete = run(desk)

    assert complete is True
    assert sorted(desk.asked) == names(5)
    assert [type(error) for error in desk.failures.values()] == [LockError]
    assert isinstance(desk.failures[names(1)[0]].__context__, LockNotOwnedError)


@pytest.mark.usefixtures("quick")
def test_a_lost_lock_is_not_taken_from_who_has_it_now(locks: RunLocks, direct: Redis) -> None:
    key = key_of(names(1)[0])
    with locks.held(), asking(desk := Desk(locks, [])):
        desk.ask = lambda name: direct.set(key, b"another's token", px=20_000)
        with pytest.raises(LockError):
            question(desk).run()
        time.sleep(0.5)  # of renewals

    assert direct.get(key) == b"another's token"
    assert 0 < int(direct.pttl(key)) < 20_000


@pytest.mark.usefixtures("quick")
def test_an_error_of_a_task_that_lost_its_lock_can_be_told(locks: RunLocks, direct: Redis) -> None:
    def ask(name: str) -> None:
        direct.delete(key_of(name))
        raise ValueError("no answer")

    desk = Desk(locks, names(1), ask)
    with locks.held():
        assert run(desk) is False

    [error] = desk.failures.values()
    assert isinstance(error, LockError)
    assert str(error.__context__) == "no answer"


@pytest.mark.parametrize("error", [None, ValueError("no answer")], ids=["success", "failure"])
def test_locks_that_are_free_are_forgotten(locks: RunLocks, error: Exception | None) -> None:
    held: list[int] = []

    def ask(name: str) -> None:
        held.append(len(locks._held))
        if error is not None:
            raise error

    with locks.held():
        run(Desk(locks, names(5), ask), threads=1)

    assert held == [1] * 5
    assert locks._held == set()


@pytest.mark.usefixtures("quick")
def test_lost_locks_are_forgotten(locks: RunLocks, direct: Redis) -> None:
    with locks.held():
        run(Desk(locks, names(5), lambda name: direct.delete(key_of(name))))

        assert comes_true(lambda: locks._held == set(), seconds=3)


# What gokart is given


def test_gokart_gets_a_client_with_password_and_number(
    locks: RunLocks, redis_server: RedisServer, redis_default: Connection
) -> None:
    with locks.held():
        client = TASK_LOCK.RedisClient(host="redis_default", port=0).get_redis_client()

    options = client.connection_pool.connection_kwargs
    assert (options["host"], options["port"], options["db"]) == (redis_server.host, redis_server.port, 3)
    assert options["password"] == redis_server.password


def test_locks_are_taken_in_the_database_of_the_connection(
    redis_server: RedisServer, redis_default: Connection
) -> None:
    locks = locks_of(dataclasses.replace(redis_default, extra={"db": 7}))
    with locks.held(), asking(Desk(locks, names(2))):
        found = {}
        for number in range(16):
            with redis_server.client(number) as client:
                found[number] = len(client.keys("*"))

    assert {number: count for number, count in found.items() if count} == {7: 2}


def test_locks_are_taken_with_tls_and_a_password(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with RedisServer(tmp_path / "redis", password="p@ss wo:rd/%", tls=authority.server()) as server:
        locks = locks_of(redis_connection(server, ssl=True, ssl_ca_certs=str(authority.file)))
        desk = Desk(locks, names(6), lambda name: time.sleep(0.05))
        seen: list[int] = []
        with locks.held(), server.client(3) as client:
            desk.ask = lambda name: seen.append(len(client.keys("*")))
            assert run(desk, threads=1) is True
            assert client.keys("*") == []

    assert seen == [1] * 6


def gokarts_own() -> tuple[Any, Any]:
    return TASK_LOCK.RedisClient, WRAPPERS.set_lock_scheduler


GOKARTS_OWN = gokarts_own()


def test_gokarts_own_functions_are_back_afterwards(locks: RunLocks) -> None:
    with locks.held():
        assert all(ours is not theirs for ours, theirs in zip(gokarts_own(), GOKARTS_OWN, strict=True))
        run(Desk(locks, names(2)))

    assert gokarts_own() == GOKARTS_OWN
    assert GOKARTS_OWN[0].__module__ == GOKARTS_OWN[1].__module__ == "gokart.conflict_prevention_lock.task_lock"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_gokarts_own_functions_are_back_after_an_error(locks: RunLocks, error: type[BaseException]) -> None:
    with pytest.raises(error), locks.held():
        raise error

    assert gokarts_own() == GOKARTS_OWN
    assert "locks" not in [thread.name for thread in threading.enumerate()]


def test_no_text_and_no_secret_is_in_redis(locks: RunLocks, direct: Redis) -> None:
    seen: list[Any] = []

    def ask(name: str) -> None:
        for key in direct.keys("*"):
            seen.extend((key, direct.get(key) or b""))

    with locks.held():
        run(Desk(locks, names(5), ask), threads=1)

    assert len(seen) == 10
    assert TEXT.encode() not in b" ".join(seen)
    assert all(any(key == key_of(name).encode() for name in names(5)) for key in seen[::2])
    assert all(len(value) == 32 for value in seen[1::2])  # a token


def test_the_parameters_hold_no_secret(locks: RunLocks, redis_server: RedisServer) -> None:
    assert locks.parameters["redis_host"] == "redis_default"
    assert redis_server.password is not None
    assert redis_server.password not in str(locks.parameters)


# Redis away


@pytest.mark.usefixtures("impatient")
def test_redis_away_at_the_start_is_one_clear_line(own_server: RedisServer) -> None:
    connection = redis_connection(own_server)
    own_server.kill()

    with pytest.raises(Unreachable) as caught:
        locks_of(connection)

    assert str(caught.value) == (
        f"connection `redis_default`: Redis at 127.0.0.1:{connection.port} does not answer: Connection refused"
    )
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("impatient")
def test_redis_that_hangs_at_the_start_is_one_clear_line(own_server: RedisServer) -> None:
    own_server.pause()

    with pytest.raises(Unreachable, match=r"^connection `redis_default`: .* does not answer: Timeout"):
        locks_of(redis_connection(own_server))


def test_a_refused_password_is_wrong_input(redis_default: Connection) -> None:
    with pytest.raises(InputError, match="refuses the login or the password"):
        locks_of(dataclasses.replace(redis_default, password="wrong"))


@pytest.mark.usefixtures("impatient", "quick")
def test_redis_away_in_the_middle_fails_what_is_asked_then(own_server: RedisServer) -> None:
    locks = locks_of(redis_connection(own_server))
    desk = Desk(locks, names(10), lambda name: own_server.kill() if len(desk.asked) == 4 else None)

    with locks.held():
        assert run(desk, threads=1) is False

    assert len(desk.asked) == 4
    assert len(desk.failures) == 7  # one was answered, and could not be freed
    assert desk.done == set(desk.asked)
    after = [error for name, error in desk.failures.items() if name not in desk.asked]
    told = {str(locks.failure(error)) for error in after if isinstance(error, RedisAway)}
    assert told == {
        f"connection `redis_default`: Redis at 127.0.0.1:{own_server.port} does not answer: Connection refused"
    }


@pytest.mark.usefixtures("impatient")
def test_a_failure_in_the_middle_is_no_wrong_input(locks: RunLocks) -> None:
    failure = locks.failure(RedisAway("Connection closed by server."))

    assert isinstance(failure, LockFailed)
    assert failure.exit_code == 1
    assert str(failure).endswith("does not answer: Connection closed by server")


@pytest.mark.usefixtures("quick")
def test_redis_that_comes_back_empty_is_used_again(own_server: RedisServer) -> None:
    """Its locks are gone with it, and so are the scripts that it knew."""
    locks = locks_of(redis_connection(own_server))
    with locks.held():
        assert run(Desk(locks, names(3))) is True
        own_server.kill()
        own_server.start()
        assert run(Desk(locks, names(3))) is True

        with own_server.client(3) as client:
            assert client.keys("*") == []


@pytest.mark.usefixtures("quick")
def test_renewal_goes_on_when_redis_was_away(
    own_server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tagger.redis_connection.REDIS_SECONDS", 0.3)
    monkeypatch.setattr("tagger.redis_connection.REDIS_RETRIES", 0)
    monkeypatch.setattr("tagger.lock.LOCK_SECONDS", 3)
    locks = locks_of(redis_connection(own_server))
    with locks.held(), asking(Desk(locks, names(3))), own_server.client(3) as client:
        own_server.pause()
        time.sleep(1)
        own_server.resume()
        time.sleep(3)
        assert len(client.keys("*")) == 3

    assert "cannot be renewed now: TimeoutError" in caplog.text


@pytest.mark.slow
def test_the_block_ends_soon_though_redis_hangs(own_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is told to end has 20 s, of which the calls in flight get 15."""
    monkeypatch.setattr("tagger.lock.RENEW_SECONDS", 0.1)
    locks = locks_of(redis_connection(own_server))
    with locks.held():
        TASK_LOCK.set_task_lock(lock_params())
        locks._renewed(_lock(locks), None)
        own_server.pause()
        time.sleep(0.5)
        started = time.monotonic()
    own_server.resume()

    assert time.monotonic() - started < 5


def _lock(locks: RunLocks) -> Lock:
    lock = Lock(locks.get_redis_client(), "another", timeout=LOCK_SECONDS, thread_local=False)
    assert lock.acquire()
    return lock


def lock_params(**changes: Any) -> Any:
    known = task_lock.TaskLockParams("redis_default", 0, LOCK_SECONDS, "the key", True, True, 10)
    return known._replace(**changes)


# What the locks lean on in gokart: where one of these fails after an upgrade, read `tagger.lock` again


def called_as(function: Any, name: str) -> list[ast.Call]:
    """Return the calls of a global of its module in a function."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == name]


def keywords(call: ast.Call) -> list[str | None]:
    return [keyword.arg for keyword in call.keywords]


def test_gokart_makes_its_client_by_a_global_of_task_lock() -> None:
    [call] = called_as(task_lock.set_task_lock, "RedisClient")

    assert (call.args, keywords(call)) == ([], ["host", "port"])
    assert task_lock.set_task_lock.__globals__ is vars(task_lock)
    assert inspect.getsource(task_lock).count("RedisClient(") == 1


def test_gokart_makes_its_scheduler_by_a_global_of_the_wrappers() -> None:
    [call] = called_as(task_lock_wrappers.wrap_run_with_lock, "set_lock_scheduler")

    assert (call.args, keywords(call)) == ([], ["task_lock", "task_lock_params"])
    assert task_lock_wrappers.wrap_run_with_lock.__globals__ is vars(task_lock_wrappers)


def test_gokart_takes_a_lock_that_another_thread_can_renew_and_waits_for_none(locks: RunLocks, direct: Redis) -> None:
    with locks.held():
        lock = task_lock.set_task_lock(lock_params())
        assert (lock.thread_local, lock.timeout) == (False, LOCK_SECONDS)
        started = time.monotonic()
        with pytest.raises(task_lock.TaskLockException):
            task_lock.set_task_lock(lock_params())
        lock.release()

    assert time.monotonic() - started < 5


@pytest.mark.parametrize("fails", [False, True], ids=["success", "failure"])
def test_gokart_locks_runs_releases_and_ends_the_renewal_in_this_order(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Taken:
        def release(self) -> None:
            told.append("release")

    class Renewal:
        def shutdown(self) -> None:
            told.append("shutdown")

    def take(task_lock_params: Any) -> Taken:
        told.append("lock")
        return Taken()

    def renew(task_lock: Taken, task_lock_params: Any) -> Renewal:
        told.append("renew")
        return Renewal()

    def work() -> str:
        told.append("run")
        if fails:
            raise ValueError("the task's own")
        return "result"

    monkeypatch.setattr(WRAPPERS, "set_task_lock", take)
    monkeypatch.setattr(WRAPPERS, "set_lock_scheduler", renew)
    wrapped = task_lock_wrappers.wrap_run_with_lock(work, lock_params())

    if fails:
        with pytest.raises(ValueError, match="the task's own"):
            wrapped()
    else:
        assert wrapped() == "result"
    assert told == ["lock", "renew", "run", "release", "shutdown"]


def test_gokart_names_a_lock_by_class_and_unique_id(locks: RunLocks) -> None:
    task = question(Desk(locks, names(1)), "0" * 32)

    params = task_lock.make_task_lock_params_for_run(task_self=task)

    assert params.redis_key == f"Question_{'0' * 32}-run"
    assert (params.redis_host, params.redis_port, params.redis_timeout) == ("redis_default", 0, LOCK_SECONDS)
    assert params.raise_task_lock_exception_on_collision is True


def test_gokart_wraps_run_when_a_task_should_lock_it_and_looks_for_completeness_within(locks: RunLocks) -> None:
    desk = Desk(locks, names(1))
    wrapped: Any = question(desk).run
    plain: Any = question(Desk(None, names(1))).run

    assert wrapped.__wrapped__.__wrapped__.__func__ is Question.run
    assert wrapped.__module__ != "gokart.task"
    assert plain.__wrapped__.__func__ is Question.run
    desk.done.add("0" * 32)
    with locks.held():
        wrapped()
    assert desk.asked == []


def test_gokart_wants_host_and_port_but_reads_no_more_into_them() -> None:
    with pytest.raises(AssertionError, match="redis_host"):
        Question(name="n", text=TEXT, desk=None, should_lock_run=True)


def test_a_target_of_ours_is_not_locked_again_by_a_dump(locks: RunLocks) -> None:
    assert question(Desk(locks, names(1)))._lock_at_dump is False
