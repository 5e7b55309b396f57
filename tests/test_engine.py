"""The engine: trees run on threads under `gokart.build`, and what it leans on in gokart and luigi."""

import ast
import gc
import inspect
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any

import gokart
import luigi
import psutil
import pytest
from gokart.build import WorkerSchedulerFactory
from gokart.conflict_prevention_lock.task_lock import TaskLockException
from gokart.utils import FlattenableItems
from gokart.worker import ContextManagedTaskProcess, TaskProcess, Worker, gokart_worker
from hypothesis import given
from hypothesis import strategies as st
from luigi import scheduler as luigi_scheduler
from luigi.execution_summary import LuigiRunResult, LuigiStatusCode
from luigi.task_register import Register

from tagger.engine import Leaf, TaskThread, ThreadWorker, TreeScheduler, Wave, build
from tagger.exceptions import TaggerError, Terminated
from tagger.tasks import Private
from tests.conftest import REPOSITORY

GOKART_BUILD: Any = sys.modules["gokart.build"]
Scheduler: Any = luigi_scheduler.Scheduler  # untyped
RunResult: Any = LuigiRunResult  # untyped


class Board:
    """A tree of named tasks: what each needs and does, and what has happened so far."""

    def __init__(self, needs: dict[str, list[str]], work: Callable[[str], object] = lambda name: None) -> None:
        self.needs = needs
        self.work = work
        self.done: set[str] = set()
        self.started: list[str] = []
        self.log: list[str] = []
        self.failures: dict[str, BaseException] = {}
        self.most_running = 0
        self._running = 0
        self._lock = threading.Lock()

    def root(self) -> "Node":
        return Node(name="root", board=self)

    def run(self, name: str) -> None:
        with self._lock:
            self.started.append(name)
            self._running += 1
            self.most_running = max(self.most_running, self._running)
        try:
            self.work(name)
            with self._lock:
                self.log.append(name)
                self.done.add(name)
        finally:
            with self._lock:
                self._running -= 1


class Node(gokart.TaskOnKart[None]):
    name: luigi.Parameter[str] = luigi.Parameter()
    board: luigi.Parameter[Any] = Private()

    should_dump_supplementary_log_files: luigi.BoolParameter = luigi.BoolParameter(default=False, significant=False)

    def make_unique_id(self) -> str:
        return self.name

    def requires(self) -> FlattenableItems[gokart.TaskOnKart[Any]]:
        return [Node(name=name, board=self.board) for name in self.board.needs.get(self.name, [])]

    def complete(self) -> bool:
        return self.name in self.board.done

    def run(self) -> None:
        self.board.run(self.name)

    def on_failure(self, exception: BaseException) -> str:
        self.board.failures[self.name] = exception
        return "failed"


def leaves(count: int, work: Callable[[str], object] = lambda name: None) -> Board:
    return Board({"root": [f"leaf-{i}" for i in range(count)]}, work)


class Forest(Board):
    """A root over waves of leaves: `leaf-<wave>-<number>`. A wave is complete when all of its leaves are."""

    def __init__(self, waves: int, size: int, work: Callable[[str], object] = lambda name: None) -> None:
        self.waves = {f"wave-{i}": [f"leaf-{i}-{j}" for j in range(size)] for i in range(waves)}
        super().__init__({"root": list(self.waves)} | self.waves, work)
        self.lay_out: Callable[[str], object] = lambda wave: None
        self.laid_out: list[str] = []
        self.born: list[weakref.ref[Fruit]] = []

    @property
    def all_leaves(self) -> list[str]:
        return [leaf for leaves in self.waves.values() for leaf in leaves]

    def root(self) -> "Trunk":
        return Trunk(name="root", board=self)

    def alive(self) -> int:
        """Count the leaves that anybody still holds. luigi's tasks are in cycles: only the collector frees them."""
        gc.collect()
        return sum(ref() is not None for ref in self.born)


class Fruit(Leaf[None]):
    name: luigi.Parameter[str] = luigi.Parameter()
    board: luigi.Parameter[Any] = Private()

    should_dump_supplementary_log_files: luigi.BoolParameter = luigi.BoolParameter(default=False, significant=False)

    def make_unique_id(self) -> str:
        return self.name

    def complete(self) -> bool:
        return self.name in self.board.done

    def run(self) -> None:
        self.board.run(self.name)

    def on_failure(self, exception: BaseException) -> str:
        self.board.failures[self.name] = exception
        return "failed"


class Branch(Wave):
    name: luigi.Parameter[str] = luigi.Parameter()
    board: luigi.Parameter[Any] = Private()

    complete_check_at_run: luigi.BoolParameter = luigi.BoolParameter(default=False, significant=False)
    should_dump_supplementary_log_files: luigi.BoolParameter = luigi.BoolParameter(default=False, significant=False)

    def make_unique_id(self) -> str:
        return self.name

    def requires(self) -> FlattenableItems[gokart.TaskOnKart[Any]]:
        forest: Forest = self.board
        forest.laid_out.append(self.name)
        forest.lay_out(self.name)
        fruits = [Fruit(name=name, board=forest) for name in forest.waves[self.name] if name not in forest.done]
        forest.born += map(weakref.ref, fruits)
        return [*fruits]

    def complete(self) -> bool:
        forest: Forest = self.board
        return forest.done.issuperset(forest.waves[self.name])

    def run(self) -> None:
        self.board.log.append(self.name)


class Trunk(Node):
    complete_check_at_run: luigi.BoolParameter = luigi.BoolParameter(default=False, significant=False)

    def requires(self) -> FlattenableItems[gokart.TaskOnKart[Any]]:
        return [Branch(name=name, board=self.board) for name in self.board.waves]

    def complete(self) -> bool:
        return all(self.board.done.issuperset(leaves) for leaves in self.board.waves.values())


def run(board: Board, threads: int = 4, stopped: threading.Event | None = None) -> bool:
    return build(board.root(), threads=threads, stopped=stopped or threading.Event())


def comes_true(holds: Callable[[], bool], seconds: float = 2.0) -> bool:
    """Wait for what ends just after a build: a task's thread tells its result before it is gone."""
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


def fail(name: str) -> None:
    raise ValueError(f"{name} fails")


@pytest.fixture
def quick_collector() -> Iterator[None]:
    """Let `gc.collect` look only at what the test makes."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# Which tasks run


@pytest.mark.parametrize("threads", [1, 4, 64])
def test_all_of_a_tree_runs_each_task_once(threads: int) -> None:
    board = leaves(20)

    assert run(board, threads) is True
    assert sorted(board.log) == sorted(["root", *board.needs["root"]])


def test_a_complete_tree_runs_nothing() -> None:
    board = leaves(3)
    board.done = {"root"}

    assert run(board) is True
    assert board.log == []


def test_complete_leaves_are_not_run_again() -> None:
    board = leaves(3)
    board.done = {"leaf-1"}

    assert run(board) is True
    assert sorted(board.log) == ["leaf-0", "leaf-2", "root"]


def test_a_task_without_dependencies_runs() -> None:
    board = Board({})

    assert run(board) is True
    assert board.log == ["root"]


def test_tasks_run_after_what_they_need() -> None:
    needs = {
        "root": ["a", "b", "c"],
        "a": ["a1", "a2", "shared"],
        "b": ["b1", "shared"],
        "c": [],
    }
    for _ in range(20):  # the order is random where it is free
        board = Board(needs)

        assert run(board, threads=3) is True
        assert sorted(board.log) == ["a", "a1", "a2", "b", "b1", "c", "root", "shared"]
        for name, needed in needs.items():
            assert all(board.log.index(dep) < board.log.index(name) for dep in needed)


def test_the_order_is_random_where_it_is_free() -> None:
    """Workers that are given the same whole tree would else get in each other's way at every text."""
    orders = set()
    for _ in range(4):
        board = leaves(30)
        run(board, threads=1)
        orders.add(tuple(board.log))

    assert len(orders) == 4


def test_a_failed_leaf_does_not_stop_the_others() -> None:
    board = leaves(10, lambda name: fail(name) if name == "leaf-3" else None)

    assert run(board, threads=2) is False
    assert sorted(board.log) == sorted(set(board.needs["root"]) - {"leaf-3"})


def test_a_failed_task_is_tried_once_and_told_of_its_failure() -> None:
    board = leaves(5, fail)

    assert run(board) is False
    assert sorted(board.started) == board.needs["root"]
    assert {name: str(error) for name, error in board.failures.items()} == {n: f"{n} fails" for n in board.started}


def test_only_what_needs_the_failed_task_is_left_out() -> None:
    needs = {"root": ["a", "b"], "a": ["a1", "a2"], "b": ["b1"]}
    board = Board(needs, lambda name: fail(name) if name == "a1" else None)

    assert run(board) is False
    assert sorted(board.log) == ["a2", "b", "b1"]


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), SystemExit(3), GeneratorExit()])
def test_whatever_a_task_raises_is_its_failure_alone(error: BaseException) -> None:
    def work(name: str) -> None:
        if name == "leaf-0":
            raise error

    board = leaves(3, work)

    assert run(board) is False
    assert board.failures == {"leaf-0": error}
    assert sorted(board.log) == ["leaf-1", "leaf-2"]


DEAF = """
    import threading
    from tagger.engine import build
    from tests.test_engine import Board, Node, fail

    class Deaf(Node):
        def requires(self):
            return [Deaf(name=name, board=self.board) for name in self.board.needs.get(self.name, [])]

        def on_failure(self, exception):
            raise RuntimeError("the books cannot be written")

    board = Board({"root": ["a", "b", "c", "d"]}, fail)
    threading.excepthook = lambda arguments: None
    complete = build(Deaf(name="root", board=board), threads=2, stopped=threading.Event())
    print(complete, sorted(board.started))
"""


@pytest.mark.slow
def test_a_task_that_cannot_even_be_told_of_its_failure_holds_nobody_up() -> None:
    """Such as when the books cannot be written. The thread that it ran on must go on with the others."""
    command = [sys.executable, "-c", textwrap.dedent(DEAF)]

    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)

    assert done.stdout == "False ['a', 'b', 'c', 'd']\n"


def test_a_tree_that_cannot_be_laid_out_is_not_complete() -> None:
    class Broken(Node):
        def requires(self) -> FlattenableItems[gokart.TaskOnKart[Any]]:
            raise RuntimeError("no requirements")

    assert build(Broken(name="root", board=Board({})), threads=2, stopped=threading.Event()) is False


def test_a_build_after_a_failed_one_runs_what_is_left() -> None:
    board = leaves(4, lambda name: fail(name) if name == "leaf-2" else None)
    run(board)
    board.work = lambda name: None

    assert run(board) is True
    assert board.log[-2:] == ["leaf-2", "root"]


# Threads


def test_as_many_tasks_run_at_a_time_as_there_are_threads() -> None:
    board = leaves(24, lambda name: time.sleep(0.05))

    run(board, threads=6)

    assert board.most_running == 6


def test_tasks_run_in_parallel() -> None:
    barrier = threading.Barrier(8, timeout=5)
    board = leaves(8, lambda name: barrier.wait() if name != "root" else None)

    assert run(board, threads=8) is True


def test_a_long_task_does_not_hold_the_others_up() -> None:
    others = threading.Semaphore(0)

    def work(name: str) -> None:
        if name == "leaf-0":
            assert all(others.acquire(timeout=5) for _ in range(29))
        else:
            others.release()

    assert run(leaves(30, work), threads=2) is True


def test_no_process_is_started() -> None:
    seen: set[tuple[int, int]] = set()
    before = len(psutil.Process().children(recursive=True))
    board = leaves(5, lambda name: seen.add((os.getpid(), len(psutil.Process().children(recursive=True)))))

    run(board)

    assert seen == {(os.getpid(), before)}


def test_the_threads_are_started_once_and_hold_up_no_exit() -> None:
    seen: set[threading.Thread] = set()

    run(leaves(40, lambda name: seen.add(threading.current_thread())), threads=3)

    assert 1 <= len(seen) <= 3
    assert all(thread.daemon for thread in seen)


def test_no_thread_is_left() -> None:
    before = set(threading.enumerate())

    run(leaves(20, lambda name: fail(name) if name == "leaf-1" else None))

    assert comes_true(lambda: set(threading.enumerate()) <= before)


def test_a_build_runs_on_another_thread_than_the_main_one() -> None:
    """Only on the main one can a signal be handled."""
    board, results = Forest(2, 3), list[bool]()
    handler = signal.getsignal(signal.SIGTERM)

    thread = threading.Thread(target=lambda: results.append(run(board)))
    thread.start()
    thread.join(10)

    assert results == [True]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_work_per_task_does_not_grow_with_their_number() -> None:
    """Counted in function calls of the main thread, which picks and books all tasks."""

    def calls_per_task(waves: int) -> float:
        calls = 0

        def count(frame: FrameType, event: str, argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        forest = Forest(waves, 100)
        sys.setprofile(count)
        try:
            assert run(forest, threads=16) is True
        finally:
            sys.setprofile(None)
        return calls / len(forest.all_leaves)

    calls_per_task(1)  # what is only done once

    assert calls_per_task(30) < 1.3 * calls_per_task(5)


# Waves


def test_all_waves_are_built() -> None:
    forest = Forest(30, 7)

    assert run(forest) is True
    assert Counter(forest.started) == Counter([*forest.all_leaves, "root"])
    assert Counter(forest.log) == Counter([*forest.all_leaves, *forest.waves, "root"])
    assert sorted(forest.laid_out) == sorted(forest.waves)


def test_a_wave_runs_after_its_leaves_and_the_root_after_all() -> None:
    forest = Forest(5, 4)

    run(forest)

    for wave, of_wave in forest.waves.items():
        assert all(forest.log.index(leaf) < forest.log.index(wave) for leaf in of_wave)
    assert forest.log[-1] == "root"


def test_a_wave_may_be_the_root() -> None:
    forest = Forest(1, 4)

    assert build(Branch(name="wave-0", board=forest), threads=2, stopped=threading.Event()) is True
    assert sorted(forest.log) == [*forest.waves["wave-0"], "wave-0"]


def test_waves_are_laid_out_in_random_order() -> None:
    forest = Forest(20, 1)

    run(forest)

    assert forest.laid_out != list(forest.waves)


def test_a_wave_is_laid_out_only_when_tasks_run_short() -> None:
    """Before it, all leaves laid out are done, or run, or are fewer than the threads."""
    forest = Forest(8, 20)
    left: list[int] = []
    forest.lay_out = lambda wave: left.append(20 * (len(forest.laid_out) - 1) - len(forest.done))

    assert run(forest, threads=4) is True
    assert max(left) <= 4 + 3


@pytest.mark.usefixtures("quick_collector")
def test_few_tasks_are_known_at_a_time() -> None:
    forest = Forest(40, 50)
    alive: list[int] = []
    forest.lay_out = lambda wave: alive.append(forest.alive())

    assert run(forest, threads=4) is True
    assert len(alive) == 40
    assert max(alive) <= 4 * 3  # each thread's last one, those that run, and those that wait


def test_all_threads_are_busy_until_the_last_leaves() -> None:
    """There is no slow end of a wave: leaves go on only eight at a time, and no wave has more than five."""
    barrier = threading.Barrier(8, timeout=20)
    forest = Forest(16, 5, lambda name: barrier.wait() if name.startswith("leaf") else None)

    assert run(forest, threads=8) is True


def test_a_slow_leaf_holds_no_other_wave_up() -> None:
    others = threading.Semaphore(0)

    def work(name: str) -> None:
        if name == "leaf-3-0":
            assert all(others.acquire(timeout=10) for _ in range(39))
        elif name.startswith("leaf"):
            others.release()

    assert run(Forest(10, 4, work), threads=2) is True


def test_a_failed_leaf_leaves_other_waves_alone() -> None:
    forest = Forest(6, 5, lambda name: fail(name) if name == "leaf-2-3" else None)

    assert run(forest) is False
    assert set(forest.all_leaves) - forest.done == {"leaf-2-3"}
    assert set(forest.waves) - set(forest.log) == {"wave-2"}
    assert "root" not in forest.started
    assert list(forest.failures) == ["leaf-2-3"]


def test_when_all_leaves_fail_all_waves_are_tried() -> None:
    forest = Forest(6, 5, fail)

    assert run(forest) is False
    assert sorted(forest.started) == sorted(forest.all_leaves)


def test_complete_waves_are_not_laid_out() -> None:
    forest = Forest(6, 5)
    forest.done.update(*(forest.waves[wave] for wave in ("wave-1", "wave-4")))

    assert run(forest) is True
    assert set(forest.waves) - set(forest.laid_out) == {"wave-1", "wave-4"}


def test_complete_leaves_of_a_wave_are_not_run() -> None:
    forest = Forest(4, 5)
    forest.done.update(forest.all_leaves[::2])

    assert run(forest) is True
    assert sorted(forest.started) == sorted([*forest.all_leaves[1::2], "root"])


def test_a_wave_that_cannot_be_laid_out_ends_the_build_with_its_error() -> None:
    """It may be S3 that went away: a step that left texts out must not end well because another text failed too."""
    forest = Forest(6, 5)
    forest.lay_out = lambda wave: fail(wave) if wave == "wave-2" else None

    with pytest.raises(Exception, match="wave-2 fails"):
        run(forest)


# What is held while a build goes on


class Text(str):
    """A text whose life can be watched."""

    __slots__ = ("__weakref__",)


class Holder(Node):
    """A task with a text, which is needed by nothing but its run."""

    text: luigi.Parameter[Any] = Private()

    def run(self) -> None:
        text = self.text
        super().run()
        assert text


class Holders(Node):
    """A task over tasks with texts. Its board notes the texts."""

    def requires(self) -> FlattenableItems[gokart.TaskOnKart[Any]]:
        found = []
        for name in self.board.needs["root"]:
            text = Text(f"the text of {name}")
            self.board.texts[name] = weakref.ref(text)
            found.append(Holder(name=name, board=self.board, text=text))
        return [*found]


def texts_held_by_the_end(work: Callable[[str], object], threads: int) -> list[str]:
    """Run ten tasks with `work`, one after the other, and return whose texts are held while the last one runs."""
    held: list[str] = []
    turn = threading.Lock()

    def note(name: str) -> None:
        if name == "root":
            return
        with turn:
            others = [each for each in board.needs["root"] if each != name]
            if len(board.started) == 10 and comes_true(lambda: len(board.ended) == 9):
                time.sleep(0.1)  # the worker hears of it
                gc.collect()
                held.extend(each for each in others if board.texts[each]() is not None)
            else:
                board.ended.append(name)
                work(name)

    board: Any = leaves(10, note)
    board.texts, board.ended = {}, []
    build(Holders(name="root", board=board), threads=threads, stopped=threading.Event())
    assert len(board.ended) == 9
    return held


def fail_in_a_chain(name: str) -> None:
    try:
        fail(name)
    except ValueError:
        raise RuntimeError(name) from None


@pytest.mark.usefixtures("quick_collector")
@pytest.mark.parametrize(
    "work",
    [
        lambda name: None,
        fail,
        fail_in_a_chain,
    ],
    ids=["success", "failure", "failure upon failure"],
)
def test_a_task_that_ended_is_held_by_nobody(work: Callable[[str], object]) -> None:
    assert texts_held_by_the_end(work, threads=1) == []


@pytest.mark.usefixtures("quick_collector")
def test_a_thread_does_not_hold_the_task_that_it_ran_last() -> None:
    assert texts_held_by_the_end(lambda name: None, threads=4) == []


def test_tasks_are_not_shared_while_a_build_goes_on() -> None:
    """Luigi's cache of instances would keep each of them, and so its text."""
    same: list[bool] = []
    board = leaves(1, lambda name: same.append(Node(name="a", board=board) is Node(name="a", board=board)))

    run(board)

    assert same == [False, False]


def test_the_scheduler_knows_only_what_waits_or_runs() -> None:
    scheduler = TreeScheduler()
    scheduler.add_task("wave", deps=["a", "b", "c"])
    for name in "abc":
        scheduler.add_task(name)
    assert [scheduler.knows(name) for name in ("wave", "a", "b", "c")] == [True] * 4

    first, second, third = (scheduler.get_work()["task_id"] for _ in range(3))
    assert {first, second, third} == {"a", "b", "c"}
    assert scheduler.knows(first)
    scheduler.add_task(first, status="DONE")
    scheduler.add_task(second, status="DONE")
    assert [scheduler.knows(name) for name in (first, second, third)] == [False, False, True]
    assert scheduler.get_work()["task_id"] is None
    scheduler.add_task(third, status="DONE")
    assert scheduler.get_work()["task_id"] == "wave"
    scheduler.add_task("wave", status="DONE")

    assert not any(vars(scheduler)[name] for name in ("_runnable", "_locked", "_missing", "_wanted_by"))


@pytest.mark.parametrize("status", ["FAILED", "UNKNOWN", "DISABLED"])
def test_the_scheduler_never_offers_what_needs_a_task_that_failed(status: str) -> None:
    scheduler = TreeScheduler()
    scheduler.add_task("wave", deps=["a", "b"])
    scheduler.add_task("a")
    scheduler.add_task("b")
    scheduler.add_task("a", status=status, expl="why")
    scheduler.add_task("b", status="DONE")
    assert not scheduler.knows("a")

    offered = [scheduler.get_work()["task_id"] for _ in range(3)]

    assert "wave" not in offered


# Locked by another worker


@pytest.fixture
def locked_seconds(monkeypatch: pytest.MonkeyPatch) -> float:
    """How long a task waits that another worker has locked: short."""
    monkeypatch.setattr("tagger.engine.LOCKED_SECONDS", 0.1)
    monkeypatch.setattr("tagger.engine.POLL_SECONDS", 0.02)
    return 0.1


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Luigi's builds: gokart begins another one, after a pause, when a task was locked."""
    made: list[str] = []
    original: Any = luigi.build

    def counting(*args: Any, **kwargs: Any) -> Any:
        made.append("build")
        return original(*args, **kwargs)

    monkeypatch.setattr(luigi, "build", counting)
    return made


class Locks:
    """Other workers' locks: each leaf is refused so many times; notes when it was tried."""

    def __init__(self, refusals: dict[str, int], work: Callable[[str], object] = lambda name: None) -> None:
        self.refusals = dict(refusals)
        self.tries: dict[str, list[float]] = {}
        self._work = work

    def __call__(self, name: str) -> None:
        self.tries.setdefault(name, []).append(time.monotonic())
        if self.refusals.get(name, 0) > 0:
            self.refusals[name] -= 1
            raise TaskLockException("Lock already taken by other task.")
        self._work(name)


@pytest.mark.usefixtures("locked_seconds")
def test_a_locked_task_is_tried_again_until_it_runs(builds: list[str]) -> None:
    board = leaves(4, Locks({"leaf-1": 3}))

    assert run(board) is True
    assert sorted(board.log) == [*board.needs["root"], "root"]
    assert board.started.count("leaf-1") == 4
    assert builds == ["build"]


@pytest.mark.usefixtures("locked_seconds")
def test_a_tree_whose_tasks_are_all_locked_is_waited_for(builds: list[str]) -> None:
    forest = Forest(2, 3, Locks(dict.fromkeys(Forest(2, 3).all_leaves, 2)))

    assert run(forest, threads=2) is True
    assert builds == ["build"]


@pytest.mark.usefixtures("locked_seconds")
def test_to_be_locked_is_no_failure() -> None:
    heard: list[BaseException] = []

    tasks: Any = Node

    @tasks.event_handler(luigi.Event.FAILURE)  # type: ignore[untyped-decorator]
    def hear(task: Node, exception: BaseException) -> None:
        heard.append(exception)

    board = leaves(3, Locks({"leaf-0": 2}))
    try:
        assert run(board) is True
    finally:
        tasks.remove_event_handler(luigi.Event.FAILURE, hear)

    assert (board.failures, heard) == ({}, [])


def test_a_locked_task_is_not_tried_more_often_than_that(locked_seconds: float) -> None:
    locks = Locks({"leaf-0": 4, "leaf-1": 4})

    run(leaves(3, locks))

    for name in ("leaf-0", "leaf-1"):
        tries = locks.tries[name]
        assert len(tries) == 5
        assert min(later - earlier for earlier, later in pairwise(tries)) >= locked_seconds


def test_a_worker_that_waits_for_a_lock_uses_no_cpu() -> None:
    """`LOCKED_SECONDS` is a second."""
    board = leaves(1, Locks({"leaf-0": 1}))
    started, cpu = time.monotonic(), time.process_time()

    assert run(board) is True

    assert time.monotonic() - started >= 1
    assert time.process_time() - cpu < 0.5


@pytest.mark.usefixtures("locked_seconds")
def test_other_tasks_go_on_while_one_is_locked() -> None:
    """One thread: a lock that was waited for would never be freed."""

    def locked_until_the_others_are_done(name: str) -> None:
        if name == "leaf-0" and len(board.done) < 19:
            raise TaskLockException
        time.sleep(0.01)

    board = leaves(20, locked_until_the_others_are_done)

    assert run(board, threads=1) is True
    assert board.log[-2:] == ["leaf-0", "root"]


@pytest.mark.usefixtures("locked_seconds")
def test_no_thread_is_idle_for_a_lock_while_there_are_other_tasks() -> None:
    locks = Locks({f"leaf-{i}-0": 3 for i in range(10)}, lambda name: time.sleep(0.01))
    forest = Forest(10, 20, locks)

    assert run(forest, threads=1) is True

    tries = sorted(at for name, found in locks.tries.items() if name.startswith("leaf") for at in found)
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    until_last_wave = pauses[: len(pauses) - 40]
    assert sum(pause > 0.08 for pause in until_last_wave) <= 2  # the machine's, not ours: a lock's is longer


@pytest.mark.usefixtures("locked_seconds")
def test_further_waves_are_laid_out_when_all_tasks_are_locked() -> None:
    """The other worker may be busy with just this wave."""
    forest = Forest(8, 4)
    forest.work = lambda name: others_first(name)
    first: list[str] = []

    def others_first(name: str) -> None:
        if not name.startswith("leaf"):
            return
        wave = name.rsplit("-", 1)[0]
        first.append(wave)
        if wave == first[0] and len(forest.done) < 28:
            raise TaskLockException

    assert run(forest, threads=1) is True


def test_a_build_that_only_waits_for_locks_can_be_stopped() -> None:
    stopped = threading.Event()
    board = leaves(2, Locks({"leaf-0": 1000, "leaf-1": 1000}))
    threading.Timer(0.3, stopped.set).start()
    started = time.monotonic()

    assert run(board, stopped=stopped) is False
    assert time.monotonic() - started < 1.3 + 0.5


@pytest.mark.usefixtures("locked_seconds")
def test_a_build_after_a_stopped_one_waits_for_locks_again() -> None:
    """Luigi lets a worker no longer wait by a change of its settings, which must not be those of the next."""
    stopped = threading.Event()
    stopped.set()
    run(leaves(2), stopped=stopped)

    assert run(leaves(2, Locks({"leaf-0": 2, "leaf-1": 2}))) is True


# Stopped from outside


def test_once_stopped_no_task_starts() -> None:
    stopped = threading.Event()
    board = leaves(50, lambda name: stopped.set() if len(board.started) == 10 else None)

    assert run(board, threads=1, stopped=stopped) is False
    assert len(board.started) == 10


def test_a_build_that_is_stopped_before_it_starts_runs_nothing() -> None:
    stopped = threading.Event()
    stopped.set()
    forest = Forest(3, 3)

    assert run(forest, stopped=stopped) is False
    assert (forest.started, forest.laid_out) == ([], [])


def test_a_complete_tree_is_complete_though_stopped() -> None:
    stopped = threading.Event()
    stopped.set()
    forest = Forest(2, 2)
    forest.done.update(forest.all_leaves)

    assert run(forest, stopped=stopped) is True


def test_once_stopped_running_tasks_end_and_the_build_soon_after() -> None:
    stopped = threading.Event()
    ended: list[float] = []

    def work(name: str) -> None:
        if len(board.started) == 3:
            threading.Timer(0.1, stopped.set).start()
        stopped.wait(10)
        time.sleep(0.3)
        ended.append(time.monotonic())

    board = leaves(30, work)

    assert run(board, threads=3, stopped=stopped) is False
    assert len(board.log) == 3
    assert time.monotonic() - max(ended) < 1


def test_once_stopped_no_wave_is_laid_out() -> None:
    stopped = threading.Event()
    forest = Forest(20, 2, lambda name: stopped.set() if len(forest.started) == 6 else None)

    assert run(forest, threads=1, stopped=stopped) is False
    assert len(forest.started) == 6
    assert len(forest.laid_out) <= 4


def test_stopped_while_a_wave_is_laid_out_no_other_is_and_no_task_starts() -> None:
    stopped = threading.Event()
    forest = Forest(20, 1)
    forest.lay_out = lambda wave: stopped.set() if len(forest.laid_out) == 2 else None

    assert run(forest, threads=8, stopped=stopped) is False
    assert len(forest.laid_out) == 2
    assert forest.started == []


# Interruption


class Interruption(BaseException):
    """As Airflow's timeout: raised in the main thread by a signal handler."""


def raise_interruption(signum: int, frame: FrameType | None) -> None:
    raise Interruption


def raise_too_late(signum: int, frame: FrameType | None) -> None:
    raise AssertionError("SIGTERM came to the handler of before")


INTERRUPTIONS: dict[str, tuple[signal.Signals, type[BaseException]]] = {
    "Airflow's timeout": (signal.SIGUSR1, Interruption),
    "SIGTERM": (signal.SIGTERM, Terminated),
    "Ctrl-C": (signal.SIGINT, KeyboardInterrupt),
}


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers of a worker's process, and for SIGTERM one that would be noticed."""
    ours = {
        signal.SIGUSR1: raise_interruption,
        signal.SIGTERM: raise_too_late,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt(number: signal.Signals) -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, number)


each_interruption = pytest.mark.parametrize(("number", "error"), INTERRUPTIONS.values(), ids=INTERRUPTIONS.keys())


@pytest.mark.usefixtures("handlers")
@each_interruption
def test_an_interrupted_build_is_stopped_and_waits_for_running_tasks(
    number: signal.Signals, error: type[BaseException]
) -> None:
    stopped = threading.Event()

    def work(name: str) -> None:
        if len(board.started) == 3 and not stopped.is_set():
            interrupt(number)
        assert stopped.wait(10)
        time.sleep(0.2)

    board = leaves(50, work)

    with pytest.raises(error):
        run(board, threads=3, stopped=stopped)

    assert stopped.is_set()
    assert len(board.started) == len(board.log) == 3


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("waves", [1, 3])
@each_interruption
def test_a_build_is_interrupted_while_a_wave_is_laid_out(
    number: signal.Signals, error: type[BaseException], waves: int
) -> None:
    stopped = threading.Event()
    forest = Forest(3, 2)

    def lay_out(wave: str) -> None:
        if len(forest.laid_out) == waves:
            threading.Timer(0.1, interrupt, [number]).start()
            time.sleep(5)

    forest.lay_out = lay_out
    started = time.monotonic()

    with pytest.raises(error):
        run(forest, threads=1, stopped=stopped)

    assert time.monotonic() - started < 4
    assert stopped.is_set()
    assert len(forest.laid_out) == waves


@pytest.mark.usefixtures("handlers")
@each_interruption
def test_a_build_is_interrupted_while_the_tree_is_looked_at(number: signal.Signals, error: type[BaseException]) -> None:
    class Slow(Node):
        def complete(self) -> bool:
            threading.Timer(0.1, interrupt, [number]).start()
            time.sleep(5)
            return False

    started = time.monotonic()

    with pytest.raises(error):
        build(Slow(name="root", board=Board({})), threads=1, stopped=threading.Event())

    assert time.monotonic() - started < 4


@pytest.mark.usefixtures("handlers")
@each_interruption
def test_an_interrupted_build_does_not_wait_for_ever(
    number: signal.Signals, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.engine.STOP_SECONDS", 0.3)
    release = threading.Event()

    def hang(name: str) -> None:
        if len(board.started) == 3:
            interrupt(number)
        release.wait(20)

    board = leaves(3, hang)
    started = time.monotonic()

    with pytest.raises(error):
        run(board, threads=3)
    took = time.monotonic() - started
    release.set()

    assert 0.3 <= took < 3


@pytest.mark.usefixtures("handlers")
def test_an_interrupted_build_does_not_wait_longer_than_it_must() -> None:
    stopped = threading.Event()
    board = leaves(8, lambda name: interrupt(signal.SIGTERM) if len(board.started) == 4 else stopped.wait(10))
    started = time.monotonic()

    with pytest.raises(Terminated):
        run(board, threads=4, stopped=stopped)

    assert time.monotonic() - started < 3


@pytest.mark.usefixtures("handlers")
def test_tasks_that_fail_after_an_interruption_are_as_quiet_as_before(caplog: pytest.LogCaptureFixture) -> None:
    """Gokart logs each with its traceback, and in that is what an endpoint may have quoted of the text."""
    stopped = threading.Event()

    def work(name: str) -> None:
        if len(board.started) == 3:
            interrupt(signal.SIGTERM)
        stopped.wait(10)
        time.sleep(0.2)
        raise ValueError("a text is quoted here")

    board = leaves(3, work)

    with pytest.raises(Terminated):
        run(board, threads=3, stopped=stopped)

    assert len(board.failures) == 3
    assert caplog.text == ""


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("work", [lambda name: None, fail, lambda name: interrupt(signal.SIGTERM)])
def test_the_handler_of_sigterm_is_afterwards_as_it_was(work: Callable[[str], object]) -> None:
    board = leaves(1, work)
    try:
        run(board)
    except Terminated:
        assert board.started == ["leaf-0"]

    assert signal.getsignal(signal.SIGTERM) is raise_too_late


@pytest.mark.usefixtures("handlers")
def test_sigterm_ends_a_build_with_an_error_of_ours() -> None:
    with pytest.raises(TaggerError) as caught:
        run(leaves(1, lambda name: interrupt(signal.SIGTERM)))

    assert caught.value.exit_code == 128 + signal.SIGTERM


@pytest.mark.usefixtures("handlers")
@each_interruption
def test_a_build_after_an_interrupted_one_runs_what_is_left(number: signal.Signals, error: type[BaseException]) -> None:
    stopped = threading.Event()

    def work(name: str) -> None:
        if not stopped.is_set():
            interrupt(number)
            stopped.wait(10)

    forest = Forest(4, 3, work)
    with pytest.raises(error):
        run(forest, threads=1, stopped=stopped)

    assert run(forest) is True
    assert Counter(forest.started) == Counter([*forest.all_leaves, "root"])


INTERRUPTED = """
    import sys, threading, time
    from tagger.engine import build
    from tests.test_engine import leaves

    stopped = threading.Event()

    def work(name):
        sys.stdout.write("started\\n")
        sys.stdout.flush()
        assert stopped.wait(20)
        time.sleep(0.3)
        sys.stdout.write("ended\\n")
        sys.stdout.flush()

    try:
        build(leaves(10, work).root(), threads=2, stopped=stopped)
    except BaseException as e:
        print(type(e).__name__, flush=True)
        raise SystemExit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated")], ids=["INT", "TERM"]
)
def test_a_process_that_is_interrupted_lets_running_tasks_end(number: signal.Signals, error: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline().strip() for _ in range(2)]
            process.send_signal(number)
            rest, errors = process.communicate(timeout=20)
        finally:
            process.kill()

    assert lines + rest.split() == ["started", "started", "ended", "ended", error]
    assert (process.returncode, errors) == (7, "")


# What is left behind


def interrupted(board: Board) -> None:
    stopped = threading.Event()

    def work(name: str) -> None:
        if not stopped.is_set():
            interrupt(signal.SIGTERM)
        stopped.wait(10)

    board.work = work
    with pytest.raises(Terminated):
        run(board, stopped=stopped)


def failed(board: Board) -> None:
    board.work = fail
    assert run(board) is False


def succeeded(board: Board) -> None:
    assert run(board) is True


each_end = pytest.mark.parametrize("end", [succeeded, failed, interrupted], ids=["success", "failure", "interruption"])


@pytest.mark.usefixtures("handlers")
@each_end
def test_gokarts_own_classes_are_back_after_a_build(end: Callable[[Board], None]) -> None:
    end(leaves(1))

    assert GOKART_BUILD.WorkerSchedulerFactory is WorkerSchedulerFactory


@pytest.mark.usefixtures("handlers")
@each_end
def test_luigi_shares_tasks_again_after_a_build_and_keeps_none_of_its_own(end: Callable[[Board], None]) -> None:
    end(leaves(5))

    assert Register.__dict__["_Register__instance_cache"] == {}


@pytest.mark.usefixtures("handlers")
@each_end
def test_gokarts_handlers_of_events_are_afterwards_as_they_were(end: Callable[[Board], None]) -> None:
    """Each `gokart.build` adds one for good, which keeps its failures."""
    known: Any = gokart.TaskOnKart._event_callbacks
    before = {cls: {event: set(found) for event, found in events.items()} for cls, events in known.items()}

    end(leaves(2))

    assert known == before


@pytest.mark.parametrize("work", [lambda name: None, fail, fail_in_a_chain], ids=["success", "failure", "chain"])
def test_no_text_outlives_the_build(work: Callable[[str], object]) -> None:
    text = Text("only here")
    watched = weakref.ref(text)
    build(Holder(name="root", board=Board({}, work), text=text), threads=1, stopped=threading.Event())

    del text

    assert comes_true(lambda: gc.collect() >= 0 and watched() is None)


LOGGERS = ["", "luigi", "luigi-interface", "luigi.scheduler", "gokart", "gokart.build", "gokart.worker", "tagger"]


def logging_state() -> dict[str, tuple[int, list[logging.Handler], bool, bool]]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    return {each.name: (each.level, list(each.handlers), each.propagate, each.disabled) for each in loggers}


@pytest.mark.usefixtures("handlers")
@each_end
def test_logging_is_afterwards_as_it_was(end: Callable[[Board], None]) -> None:
    before = logging_state()

    end(leaves(2))

    assert logging_state() == before


@pytest.mark.parametrize("level", [logging.NOTSET, logging.DEBUG, logging.WARNING])
def test_what_was_disabled_stays_disabled(level: int) -> None:
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        run(leaves(2))

        assert logging.root.manager.disable == level
    finally:
        logging.disable(before)


def test_our_own_lines_come_through_and_luigis_do_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logger = logging.getLogger("tagger.tests")

    run(leaves(3, lambda name: fail(name) if name == "leaf-0" else logger.info("%s runs", name)))

    ours = [record.getMessage() for record in caplog.records if record.name == "tagger.tests"]
    others = [record.name for record in caplog.records if record.name.startswith(("luigi", "gokart"))]
    assert sorted(ours) == ["leaf-1 runs", "leaf-2 runs"]
    assert others == []


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    run(leaves(3, lambda name: fail(name) if name == "leaf-0" else None))

    assert capfd.readouterr() == ("", "")


# Tasks of which a tree has many


def pair_of_classes(base: Any, **members: Any) -> tuple[Any, Any]:
    """Return a leaf and a plain task with the same name and parameters."""

    def of(parent: Any) -> Any:
        annotations = {"key": Any, "text": Any, "lot": Any}
        parameters = {"key": luigi.Parameter(), "text": Private(), "lot": luigi.IntParameter(default=7)}
        return type(parent)("Tag", (parent,), {"__annotations__": annotations, **parameters, **members})

    return of(base), of(gokart.TaskOnKart)


LEAF, PLAIN = pair_of_classes(Leaf)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
LOCK = {"should_lock_run": True, "redis_host": "redis_default", "redis_port": 0, "redis_timeout": 50}


def shown(task: Any) -> dict[str, Any]:
    """Return all by which luigi and gokart know a task."""
    both = (True, False)
    return {
        "task_id": task.task_id,
        "hash": hash(task),
        "unique id": task.make_unique_id(),
        "repr": repr(task),
        "values": task.param_kwargs,
        "attributes": {name: getattr(task, name) for name, _ in type(task).get_params()},
        "strings": [task.to_str_params(only_significant=s, only_public=p) for s in both for p in both],
        "family": task.task_family,
        "output": task.output().path(),
        "clone": task.clone().task_id,
    }


@given(key=ANY_TEXT, text=ANY_TEXT)
def test_a_leaf_is_known_by_the_same_as_a_plain_task(key: str, text: str) -> None:
    assert shown(LEAF(key=key, text=text)) == shown(PLAIN(key=key, text=text))


@given(keys=st.lists(ANY_TEXT, unique=True, min_size=2, max_size=8))
def test_leaves_are_told_apart_as_plain_tasks_are(keys: list[str]) -> None:
    ours = [LEAF(key=key, text="the same") for key in keys]
    plain = [PLAIN(key=key, text="the same") for key in keys]

    assert [a == b for a in ours for b in ours] == [a == b for a in plain for b in plain]
    assert len(set(ours)) == len(set(plain)) == len(keys)


@given(key=ANY_TEXT, text=ANY_TEXT)
def test_a_locked_leaf_is_known_by_the_same_as_a_plain_task(key: str, text: str) -> None:
    leaf, plain = LOCKED_LEAF(key=key, text=text, **LOCK), LOCKED_PLAIN(key=key, text=text, **LOCK)

    assert shown(leaf) == shown(plain)
    assert leaf.should_lock_run is True
    assert leaf.run.__wrapped__ is not None  # gokart's lock


LOCKED_LEAF, LOCKED_PLAIN = pair_of_classes(Leaf)


def test_leaves_have_the_parameters_of_a_plain_task_in_its_order() -> None:
    """The order is the one in which they were made."""
    names = [name for name, _ in PLAIN.get_params()]

    assert [name for name, _ in LEAF.get_params()] == names
    assert list(LEAF(key="k", text="t").param_kwargs) == names


def test_a_leaf_takes_defaults_from_luigis_configuration() -> None:
    leaf, plain = pair_of_classes(Leaf)
    config: Any = luigi.configuration.get_config()  # type: ignore[no-untyped-call]
    config.set("Tag", "lot", "11")
    try:
        assert leaf(key="k", text="t").lot == plain(key="k", text="t").lot == 11
    finally:
        config.remove_section("Tag")


def test_each_class_of_leaves_has_its_own_defaults() -> None:
    few, _ = pair_of_classes(Leaf, lot=luigi.IntParameter(default=1))
    many, _ = pair_of_classes(few, lot=luigi.IntParameter(default=99))

    assert [few(key="k", text="t").lot, many(key="k", text="t").lot, few(key="l", text="t").lot] == [1, 99, 1]


def test_a_leaf_may_differ_from_the_first_in_what_is_given() -> None:
    leaf, _ = pair_of_classes(Leaf)
    leaf(key="k", text="t")

    assert leaf(key="l", text="t", lot=8).lot == 8
    assert leaf(key="m", text="t").lot == 7


def test_a_leaf_without_a_lock_can_follow_one_with() -> None:
    """One process may tag two datasets, of which one has `lock`."""
    leaf, plain = pair_of_classes(Leaf)
    leaf(key="k", text="t", **LOCK)

    assert shown(leaf(key="l", text="t")) == shown(plain(key="l", text="t"))


def test_a_leaf_can_be_made_outside_of_a_build_where_gokart_is_configured() -> None:
    leaf, _ = pair_of_classes(Leaf)
    config: Any = luigi.configuration.get_config()  # type: ignore[no-untyped-call]
    config.set("TaskOnKart", "workspace_directory", "/elsewhere")
    Register.disable_instance_cache()  # type: ignore[no-untyped-call]
    try:
        assert leaf(key="k", text="t").workspace_directory == "/elsewhere"
        Register.clear_instance_cache()  # type: ignore[no-untyped-call]
        assert leaf(key="l", text="t").workspace_directory == "/elsewhere"
    finally:
        Register.clear_instance_cache()  # type: ignore[no-untyped-call]
        config.remove_section("TaskOnKart")


def test_no_text_is_in_what_is_kept_of_a_class() -> None:
    leaf, _ = pair_of_classes(Leaf)
    Register.disable_instance_cache()  # type: ignore[no-untyped-call]
    try:
        text = Text("only here")
        watched = weakref.ref(text)
        leaf(key="k", text=text)
        leaf(key="l", text=text)
        del text
        gc.collect()
    finally:
        Register.clear_instance_cache()  # type: ignore[no-untyped-call]

    assert watched() is None


@pytest.mark.slow
def test_a_leaf_takes_less_than_half_the_time_of_a_plain_task() -> None:
    def seconds(cls: Any) -> float:
        started = time.process_time()
        for number in range(300):
            cls(key=f"{number:032x}", text="t")
        return time.process_time() - started

    Register.disable_instance_cache()  # type: ignore[no-untyped-call]
    try:
        assert min(seconds(LEAF) for _ in range(3)) < min(seconds(PLAIN) for _ in range(3)) / 2
    finally:
        Register.clear_instance_cache()  # type: ignore[no-untyped-call]


# What the engine leans on in gokart and luigi: where one of these fails after an upgrade, read `tagger.engine` again


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def names_in(code: CodeType) -> set[str]:
    inner = [names_in(const) for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*inner)


def users_of(cls: type, name: str) -> set[str]:
    """Return the functions of a class that name an attribute."""
    functions = {key: inspect.unwrap(value) for key, value in vars(cls).items() if inspect.isroutine(value)}
    return {key for key, function in functions.items() if name in names_in(function.__code__)}


def calls_of(cls: type, name: str) -> list[ast.Call]:
    """Return the calls of a method of their own in the code of a class."""
    found = [node for node in ast.walk(ast.parse(inspect.getsource(cls))) if isinstance(node, ast.Call)]
    return [call for call in found if isinstance(call.func, ast.Attribute) and call.func.attr == name]


# gokart.build


def test_gokart_build_looks_its_factory_up_as_a_global_of_its_module() -> None:
    assert GOKART_BUILD.build is gokart.build
    assert "WorkerSchedulerFactory" in names_in(gokart.build.__code__)
    assert parameters(WorkerSchedulerFactory) == []


def test_the_factory_makes_scheduler_and_worker() -> None:
    assert parameters(WorkerSchedulerFactory.create_local_scheduler) == ["self"]
    assert parameters(WorkerSchedulerFactory.create_worker) == ["self", "scheduler", "worker_processes", "assistant"]
    assert isinstance(WorkerSchedulerFactory().create_local_scheduler(), Scheduler)


def test_gokart_build_raises_gokart_build_error_and_takes_what_we_pass() -> None:
    assert issubclass(GOKART_BUILD.GokartBuildError, Exception)
    assert {"task", "return_value", "log_level", "env_params"} <= set(parameters(gokart.build))


def test_gokart_build_hears_of_failures_by_an_event_of_all_tasks() -> None:
    """We take this handler back, for it keeps the exceptions; a lock's it never hears of, so it does not begin anew."""
    assert {"event_handler", "FAILURE", "TaskLockException"} <= names_in(gokart.build.__code__)
    assert gokart.TaskOnKart._event_callbacks is luigi.Task._event_callbacks
    assert "trigger_event" in names_in(TaskProcess._handle_run_exception.__code__)


# The worker


def test_gokarts_worker_has_the_parts_that_are_replaced() -> None:
    worker = Worker(scheduler=Scheduler(), worker_processes=2)

    assert {"scheduler", "worker_processes", "assistant", "config"} <= set(parameters(Worker))
    assert (worker._running_tasks, worker._scheduled_tasks, worker._stop_requesting_work) == ({}, {}, False)
    assert {"put", "get", "close"} <= set(dir(worker._task_result_queue))
    assert {"_scheduler", "_id", "worker_processes"} <= set(vars(worker))
    assert parameters(Worker._create_task_process) == ["self", "task"]
    assert parameters(Worker._add) == ["self", "task", "is_complete"]
    assert parameters(Worker._get_work) == parameters(Worker._purge_children) == ["self"]
    assert inspect.isgeneratorfunction(Worker._add)


def test_gokarts_worker_calls_what_is_replaced_where_we_think() -> None:
    callers = {
        "_add": {"add"},
        "_add_task": {"_add", "_handle_next_task", "_handle_task_load_error"},
        "_get_work": {"run"},
        "_handle_next_task": {"run"},
        "_create_task_process": {"_run_task"},
        "_purge_children": {"_handle_next_task"},
        "_task_result_queue": {"__init__", "__exit__", "_create_task_process", "_handle_next_task", "_purge_children"},
        "_stop_requesting_work": {"__init__", "_get_work", "_start_phasing_out", "run"},
    }

    assert {name: users_of(Worker, name) for name in callers} == callers


def test_gokarts_worker_says_all_of_a_task_by_keyword() -> None:
    calls = calls_of(Worker, "_add_task")

    assert len(calls) == 3
    for call in calls:
        assert call.args == []
        assert {"task_id", "status"} <= {keyword.arg for keyword in call.keywords}


def test_gokarts_worker_looks_for_a_task_only_until_its_end_is_told() -> None:
    """Then `_add_task` forgets it."""
    users = {"__init__", "_add_task", "_add", "_get_work", "_run_task", "_handle_next_task"}
    assert users_of(Worker, "_scheduled_tasks") == users
    source = inspect.getsource(Worker._handle_next_task)
    assert "_scheduled_tasks" not in source.split("self._add_task(")[1]


def test_gokarts_worker_adds_a_task_before_what_it_needs_is_looked_at() -> None:
    """Else the end of what is complete already would not be heard by what needs it."""
    board = Board({"root": ["a"]})
    board.done = {"a"}
    told: list[tuple[str, str]] = []

    class Telling(TreeScheduler):
        def add_task(self, task_id: str, status: str = "PENDING", *args: Any, **kwargs: Any) -> None:
            told.append((task_id.split("_")[1], status))
            super().add_task(task_id, status, *args, **kwargs)

    Worker(scheduler=Telling()).add(board.root())

    assert told == [("root", "PENDING"), ("a", "DONE")]


def test_histories_are_kept_only_for_luigis_summary_which_is_content_with_none() -> None:
    for history, user in (("_add_task_history", "_add_task"), ("_get_work_response_history", "_get_work")):
        assert users_of(Worker, history) == {"__init__", user}
    worker: Any = Worker(scheduler=Scheduler())
    worker._add_task_history = worker._get_work_response_history = deque(maxlen=0)

    assert RunResult(worker).status == LuigiStatusCode.SUCCESS


def test_gokarts_worker_asks_of_a_running_task_only_what_a_thread_has() -> None:
    users = (Worker._run_task, Worker._purge_children, Worker.__exit__)
    asked = {
        name
        for user in users
        for name in re.findall(r"\b(?:p|task|task_process)\.(\w+)\(", inspect.getsource(user))
        if hasattr(ContextManagedTaskProcess, name)
    }

    assert asked == {"start", "run", "is_alive", "terminate"}
    assert asked | {"exitcode"} <= {name for cls in (TaskThread, TaskProcess) for name in vars(cls)}


def test_a_task_process_takes_what_we_pass_and_does_its_work_in_run() -> None:
    assert parameters(ContextManagedTaskProcess)[0] == "context"
    assert parameters(TaskProcess)[:5] == [
        "task",
        "worker_id",
        "result_queue",
        "status_reporter",
        "use_multiprocessing",
    ]
    assert {"check_unfulfilled_deps", "task_completion_check_at_run"} <= set(parameters(TaskProcess))
    assert {"result_queue", "_handle_run_exception"} <= names_in(TaskProcess.run.__code__)
    assert parameters(TaskProcess._handle_run_exception) == ["self", "ex"]
    assert parameters(luigi.worker.TaskStatusReporter) == ["scheduler", "task_id", "worker_id", "scheduler_messages"]


def test_a_worker_lays_out_and_runs_a_task_with_use_multiprocessing_only_by_start() -> None:
    """So a single worker process is no other case."""
    started: list[str] = []

    class Noting(ThreadWorker):
        def _create_task_process(self, task: luigi.Task) -> Any:
            process = super()._create_task_process(task)
            process.start = lambda: started.append(task.task_family)  # type: ignore[method-assign]
            return process

    worker = Noting(TreeScheduler(), 1, False, threading.Event())
    worker.add(Board({}).root())
    work = worker._get_work()
    worker._run_task(work.task_id)

    assert started == ["Node"]


def test_the_workers_settings_are_known() -> None:
    settings: dict[str, Any] = {
        "no_install_shutdown_handler": True,
        "send_failure_email": False,
        "keep_alive": True,
        "wait_interval": 0.3,
        "wait_jitter": 0.0,
    }
    config: Any = gokart_worker(**settings)

    assert {name: getattr(config, name) for name in settings} == settings
    assert (gokart_worker().task_limit, gokart_worker().timeout) == (None, 0)
    assert gokart_worker().cache_task_completion is False


def test_a_worker_stays_alive_as_long_as_tasks_are_pending() -> None:
    worker = ThreadWorker(TreeScheduler(), 1, False, threading.Event())
    work: Any = worker._get_work()

    assert worker._keep_alive(work) is False
    assert worker._keep_alive(work._replace(n_pending_tasks=1)) is True


def test_a_worker_that_stops_requesting_work_ends() -> None:
    worker = Worker(scheduler=Scheduler())
    worker._stop_requesting_work = True

    work = worker._get_work()

    assert (work.task_id, work.worker_state) == (None, luigi_scheduler.WORKER_STATE_DISABLED)


# The scheduler


def test_luigis_scheduler_has_the_parts_that_are_replaced() -> None:
    assert {"prune_on_get_work", "record_task_history"} <= set(vars(luigi_scheduler.scheduler)) | {"prune_on_get_work"}
    assert {"task_id", "status", "deps", "expl"} <= set(parameters(Scheduler.add_task))
    assert {"host", "assistant", "current_tasks", "worker"} <= set(parameters(Scheduler.get_work))
    assert {"ping", "add_worker", "announce_scheduling_failure"} <= set(dir(Scheduler))
    for name in ("add_task", "get_work"):
        ours = inspect.signature(getattr(TreeScheduler, name))
        assert any(each.kind is inspect.Parameter.VAR_KEYWORD for each in ours.parameters.values())


def test_gokarts_worker_asks_of_the_scheduler_what_ours_has() -> None:
    asked = set(re.findall(r"self\._scheduler\.(\w+)\(", inspect.getsource(Worker)))
    batches_and_messages = {"add_task_batcher", "count_pending"}

    assert asked - batches_and_messages == {"add_task", "add_worker", "announce_scheduling_failure", "get_work"}


def test_our_scheduler_replies_to_a_worker_as_luigis_does() -> None:
    replies = []
    schedulers: list[Any] = [Scheduler(), TreeScheduler()]
    for scheduler in schedulers:
        scheduler.add_task(worker="w", task_id="a", family="A", module="m", params={"x": "1"})
        reply = scheduler.get_work(worker="w", host="h", assistant=False, current_tasks=[])
        assert {"n_pending_tasks", "running_tasks", "n_unique_pending"} <= set(reply)
        replies.append(reply["task_id"])
        again = scheduler.get_work(worker="w", host="h", assistant=False, current_tasks=["a"])
        assert again["task_id"] is None

    assert replies == ["a", "a"]


def test_a_worker_reads_no_key_that_our_replies_lack() -> None:
    class Noting(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            missing.append(name)

    class NotingScheduler(TreeScheduler):
        def get_work(self, **asked: Any) -> dict[str, Any]:
            return Noting(super().get_work(**asked))

    missing: list[str] = []
    worker = ThreadWorker(NotingScheduler(), 2, False, threading.Event())

    assert worker._get_work().task_id is None
    assert missing == []


def test_statuses_have_the_names_that_we_know() -> None:
    from luigi import task_status

    names = ("DISABLED", "DONE", "FAILED", "PENDING", "UNKNOWN")
    assert [getattr(task_status, name) for name in names] == list(names)


# Tasks


def test_luigis_cache_of_instances_can_be_switched_off_and_on() -> None:
    board = Board({})
    try:
        Register.disable_instance_cache()  # type: ignore[no-untyped-call]
        assert Node(name="a", board=board) is not Node(name="a", board=board)
        Register.clear_instance_cache()  # type: ignore[no-untyped-call]
        assert Node(name="a", board=board) is Node(name="a", board=board)
    finally:
        Register.clear_instance_cache()  # type: ignore[no-untyped-call]


def test_luigi_finds_the_parameters_of_a_task_by_what_a_leaf_replaces() -> None:
    task: Any = luigi.Task
    register: Any = Register

    assert parameters(task.get_params) == []
    assert parameters(task.get_param_values) == ["params", "args", "kwargs"]
    for function in (task.__init__, register.__call__):
        assert {"get_params", "get_param_values"} <= names_in(function.__code__)
    assert task.get_params() == []
    assert [name for name, _ in PLAIN.get_params()].count("key") == 1
    values = PLAIN.get_param_values(PLAIN.get_params(), [], {"key": "k", "text": "t"})
    assert [name for name, _ in values] == [name for name, _ in PLAIN.get_params()]
    assert dict(values)["lot"] == 7


def test_gokart_makes_a_task_through_luigis_init_and_no_other_way() -> None:
    assert {"get_params", "get_param_values"}.isdisjoint(names_in(gokart.TaskOnKart.__init__.__code__))
    assert "_add_configuration" in names_in(gokart.TaskOnKart.__init__.__code__)
