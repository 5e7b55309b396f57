"""The engine: trees run on threads under `gokart.build`, and what it leans on in gokart and luigi."""

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
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import gokart
import luigi
import psutil
import pytest
from gokart.build import WorkerSchedulerFactory
from gokart.utils import FlattenableItems
from gokart.worker import ContextManagedTaskProcess, TaskProcess, Worker, gokart_worker
from luigi import scheduler as luigi_scheduler
from luigi.task_register import Register

from tagger.engine import TaskThread, ThreadWorker, TreeScheduler, build
from tagger.tasks import Private
from tests.conftest import REPOSITORY

GOKART_BUILD: Any = sys.modules["gokart.build"]
Scheduler: Any = luigi_scheduler.Scheduler  # untyped


class Board:
    """A tree of named tasks: what each needs and does, and what has happened so far."""

    def __init__(self, needs: dict[str, list[str]], work: Callable[[str], object] = lambda name: None) -> None:
        self.needs = needs
        self.work = work
        self.done: set[str] = set()
        self.log: list[str] = []
        self.failures: dict[str, BaseException] = {}
        self.most_running = 0
        self._running = 0
        self._lock = threading.Lock()

    def root(self) -> "Node":
        return Node(name="root", board=self)

    def run(self, name: str) -> None:
        with self._lock:
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


def run(board: Board, threads: int = 4) -> bool:
    return build(board.root(), threads=threads, stop=lambda: None)


def comes_true(holds: Callable[[], bool], seconds: float = 2.0) -> bool:
    """Wait for what ends just after a build: a task's thread tells its result before it is gone."""
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


def fail(name: str) -> None:
    raise ValueError(f"{name} fails")


class Interruption(BaseException):
    """As Airflow's timeout: raised in the main thread by a signal handler."""


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interruption

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


def test_a_failed_leaf_does_not_stop_the_others() -> None:
    board = leaves(10, lambda name: fail(name) if name == "leaf-3" else None)

    assert run(board, threads=2) is False
    assert sorted(board.log) == sorted(set(board.needs["root"]) - {"leaf-3"})


def test_a_failed_task_is_tried_once_and_told_of_its_failure() -> None:
    tries: dict[str, int] = defaultdict(int)

    def work(name: str) -> None:
        tries[name] += 1
        fail(name)

    board = leaves(5, work)

    assert run(board) is False
    assert tries == dict.fromkeys(board.needs["root"], 1)
    assert {name: str(error) for name, error in board.failures.items()} == {n: f"{n} fails" for n in tries}


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


def test_a_tree_that_cannot_be_laid_out_is_not_complete() -> None:
    class Broken(Node):
        def requires(self) -> FlattenableItems[gokart.TaskOnKart[Any]]:
            raise RuntimeError("no requirements")

    assert build(Broken(name="root", board=Board({})), threads=2, stop=lambda: None) is False


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


def test_no_thread_is_left() -> None:
    before = set(threading.enumerate())

    run(leaves(20, lambda name: fail(name) if name == "leaf-1" else None))

    assert comes_true(lambda: set(threading.enumerate()) <= before)


@pytest.mark.slow
def test_cpu_per_task_does_not_grow_with_their_number() -> None:
    def cpu_per_task(count: int) -> float:
        board = leaves(count)
        started = time.process_time()
        assert run(board, threads=16) is True
        return (time.process_time() - started) / count

    cpu_per_task(50)  # what is only done once
    few, many = cpu_per_task(500), cpu_per_task(2000)

    assert many < 2 * few


# Interruption


def test_an_interrupted_build_calls_stop_and_waits_for_running_tasks() -> None:
    stopped = threading.Event()

    def work(name: str) -> None:
        stopped.wait(10)
        time.sleep(0.2)

    board = leaves(50, work)

    with pytest.raises(Interruption), interrupted_after(0.5):
        build(board.root(), threads=3, stop=stopped.set)

    assert stopped.is_set()
    assert len(board.log) == 3


def test_an_interrupted_build_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.engine.STOP_SECONDS", 0.3)
    release = threading.Event()
    board = leaves(3, lambda name: release.wait(20))
    started = time.monotonic()

    with pytest.raises(Interruption), interrupted_after(0.3):
        build(board.root(), threads=3, stop=lambda: None)
    took = time.monotonic() - started
    release.set()

    assert took < 3


INTERRUPTED = """
    import sys, threading, time
    from tagger.engine import build
    from tests.test_engine import leaves

    stopped = threading.Event()

    def work(name):
        print("started", flush=True)
        stopped.wait(20)
        time.sleep(0.3)
        print("ended", flush=True)

    def stop():
        print("stop", flush=True)
        stopped.set()

    try:
        build(leaves(10, work).root(), threads=2, stop=stop)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_calls_stop_and_lets_running_tasks_end() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline().strip() for _ in range(2)]
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=20)
        finally:
            process.kill()

    assert lines + rest.split() == ["started", "started", "stop", "ended", "ended", "interrupted"]
    assert process.returncode == 0


# What is left behind


def test_gokarts_own_classes_are_back_after_a_build() -> None:
    run(leaves(1))

    assert GOKART_BUILD.WorkerSchedulerFactory is WorkerSchedulerFactory


def test_gokarts_own_classes_are_back_after_a_failed_build() -> None:
    run(leaves(1, fail))

    assert GOKART_BUILD.WorkerSchedulerFactory is WorkerSchedulerFactory


def test_gokarts_own_classes_are_back_after_an_interrupted_build() -> None:
    stopped = threading.Event()

    with pytest.raises(Interruption), interrupted_after(0.2):
        build(leaves(1, lambda name: stopped.wait(10)).root(), threads=1, stop=stopped.set)

    assert GOKART_BUILD.WorkerSchedulerFactory is WorkerSchedulerFactory


class Text(str):
    """A text whose life can be watched."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize("work", [lambda name: None, fail], ids=["after success", "after failure"])
def test_no_text_outlives_the_build(work: Callable[[str], object]) -> None:
    class Holder(Node):
        text: luigi.Parameter[Any] = Private()

        def run(self) -> None:
            text = self.text
            super().run()
            assert text

    text = Text("only here")
    watched = weakref.ref(text)
    build(Holder(name="root", board=Board({}, work), text=text), threads=1, stop=lambda: None)

    del text

    assert comes_true(lambda: gc.collect() >= 0 and watched() is None)


def test_luigi_keeps_no_task() -> None:
    run(leaves(5))

    assert Register.__dict__["_Register__instance_cache"] == {}


LOGGERS = ["", "luigi", "luigi-interface", "luigi.scheduler", "gokart", "gokart.build", "gokart.worker", "tagger"]


def logging_state() -> dict[str, tuple[int, list[logging.Handler], bool, bool]]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    return {each.name: (each.level, list(each.handlers), each.propagate, each.disabled) for each in loggers}


@pytest.mark.parametrize("work", [lambda name: None, fail], ids=["success", "failure"])
def test_logging_is_afterwards_as_it_was(work: Callable[[str], object]) -> None:
    before = logging_state()

    run(leaves(2, work))

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


# What the engine leans on in gokart and luigi: where one of these fails after an upgrade, read `tagger.engine` again


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def names_in(code: CodeType) -> set[str]:
    inner = [names_in(const) for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*inner)


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


def test_gokarts_worker_has_the_parts_that_are_replaced() -> None:
    assert parameters(Worker._create_task_process) == ["self", "task"]
    assert {"scheduler", "worker_processes", "assistant", "config"} <= set(parameters(Worker))
    worker = Worker(scheduler=Scheduler(), worker_processes=2)
    assert worker._running_tasks == {}
    assert {"put", "get", "close"} <= set(dir(worker._task_result_queue))
    assert {"_scheduler", "_id"} <= set(vars(worker))
    assert "_create_task_process" in names_in(Worker._run_task.__code__)
    assert "_task_result_queue" in names_in(Worker._handle_next_task.__code__)


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
    assert "result_queue" in names_in(TaskProcess.run.__code__)
    assert parameters(luigi.worker.TaskStatusReporter) == ["scheduler", "task_id", "worker_id", "scheduler_messages"]


def test_the_workers_settings_are_known() -> None:
    config = gokart_worker(no_install_shutdown_handler=True, send_failure_email=False)

    assert (config.no_install_shutdown_handler, config.send_failure_email) == (True, False)
    assert config.keep_alive is False


def test_luigis_scheduler_has_the_parts_that_are_used() -> None:
    assert {"task_id", "status", "deps", "worker", "family", "module", "params"} <= set(parameters(Scheduler.add_task))
    assert {"host", "assistant", "current_tasks", "worker"} <= set(parameters(Scheduler.get_work))
    scheduler = Scheduler(prune_on_get_work=False, record_task_history=False)
    scheduler.add_task(worker="w", task_id="b", family="B", module="m", params={"x": "1"})
    scheduler.add_task(worker="w", task_id="a", deps=["b"])

    task = scheduler._state.get_task("a")
    assert set(task.deps) == {"b"}
    assert task.status == "PENDING"
    assert {"worker_running", "time_running", "family", "module", "params"} <= set(vars(task))
    assert parameters(scheduler._state.set_status)[:3] == ["task", "new_status", "config"]
    assert hasattr(scheduler, "_config")


def test_our_scheduler_replies_to_a_worker_as_luigis_does() -> None:
    replies = []
    schedulers: list[Any] = [Scheduler(), TreeScheduler()]
    for scheduler in schedulers:
        scheduler.add_task(worker="w", task_id="a", family="A", module="m", params={"x": "1"})
        reply = scheduler.get_work(worker="w", host="h", assistant=False, current_tasks=[])
        replies.append({name: reply[name] for name in ("task_id", "task_family", "task_module", "task_params")})
        assert {"n_pending_tasks", "running_tasks", "n_unique_pending"} <= set(reply)
        assert scheduler._state.get_task("a").status == "RUNNING"

    assert replies[0] == replies[1]
    assert TreeScheduler().get_work(worker="w")["task_id"] is None


def test_a_worker_reads_no_key_that_our_replies_lack() -> None:
    class Noting(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            missing.append(name)

    class NotingScheduler(TreeScheduler):
        def get_work(self, worker: str, **asked: Any) -> dict[str, Any]:
            return Noting(super().get_work(worker, **asked))

    missing: list[str] = []
    worker = ThreadWorker(NotingScheduler(), 2, False)

    assert worker._get_work().task_id is None
    assert missing == []
