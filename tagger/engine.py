"""The engine under `gokart.build`: tasks on threads, and a scheduler that picks a task in constant time.

gokart's own worker forks a process per task, which shares its parent's S3 connection, and luigi's scheduler sorts all
pending tasks at every pick. `build` puts both classes below in their place for the time of one `gokart.build`, by the
one name that gokart looks up: `WorkerSchedulerFactory` in the module `gokart.build`. Nothing else is replaced.
"""

import logging
import queue
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gokart
import luigi
from gokart.build import GokartBuildError, WorkerSchedulerFactory
from gokart.worker import ContextManagedTaskProcess, Worker, gokart_worker
from luigi.scheduler import Scheduler
from luigi.task_status import DONE, PENDING, RUNNING

STOP_SECONDS = 15.0
"""How long calls in flight may take to end when a build is interrupted."""


def build(task: gokart.TaskOnKart[Any], *, threads: int, stop: Callable[[], None]) -> bool:
    """Run a tree with `gokart.build`, up to `threads` tasks at a time; return whether all of it is complete.

    Failed tasks do not stop the others. When the build is interrupted (KeyboardInterrupt, Airflow's timeout), `stop` is
    called, which must keep further tasks from starting work, and the tasks that run get `STOP_SECONDS` to end.
    """
    workers: list[ThreadWorker] = []
    try:
        with _installed(workers), _quiet(), _forgetting_handlers():
            gokart.build(task, return_value=False, log_level=logging.INFO, workers=threads)
    except GokartBuildError:
        return False
    except BaseException:
        stop()
        for worker in workers:
            worker.wait(STOP_SECONDS)
        raise
    finally:
        luigi.task_register.Register.clear_instance_cache()  # it would keep every text for the life of the process
    return True


class TaskThread(ContextManagedTaskProcess):
    """A task's run on a thread, where luigi has a process."""

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self.run, name=self.task.task_family, daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        """Return whether the task is running."""
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the task to end."""
        self._thread.join(timeout)

    def terminate(self) -> None:
        """Do nothing: a thread cannot be killed; `build` waits for it."""

    @property
    def exitcode(self) -> None:
        """A thread has none; how the task ended is on the result queue."""
        return None


class _Results(queue.SimpleQueue[Any]):
    def close(self) -> None:
        """Do nothing, where luigi closes a pipe."""


class ThreadWorker(Worker):
    """gokart's worker with its tasks on threads."""

    def __init__(self, scheduler: Scheduler, worker_processes: int, assistant: bool) -> None:
        config = gokart_worker(no_install_shutdown_handler=True, send_failure_email=False)
        super().__init__(scheduler=scheduler, worker_processes=worker_processes, assistant=assistant, config=config)
        self._task_result_queue = _Results()  # type: ignore[assignment]

    def _create_task_process(self, task: luigi.Task) -> TaskThread:
        reporter = luigi.worker.TaskStatusReporter(self._scheduler, task.task_id, self._id, None)
        return TaskThread(None, task, self._id, self._task_result_queue, reporter, use_multiprocessing=True)

    def wait(self, seconds: float) -> None:
        """Wait until the running tasks have ended, at most so long."""
        until = time.monotonic() + seconds
        for process in list(self._running_tasks.values()):
            process.join(max(until - time.monotonic(), 0))


class TreeScheduler(Scheduler):
    """luigi's scheduler for one worker and one tree: a random one of the runnable tasks, in constant time."""

    def __init__(self) -> None:
        super().__init__(prune_on_get_work=False, record_task_history=False)
        self._runnable: list[str] = []
        self._missing: dict[str, set[str]] = {}
        self._wanted_by: defaultdict[str, set[str]] = defaultdict(set)

    def add_task(self, task_id: str, status: str = PENDING, **kwargs: Any) -> None:
        """Take in a task, or the end of its run."""
        super().add_task(task_id=task_id, status=status, **kwargs)
        if status == DONE:
            for wanting in self._wanted_by.pop(task_id, ()):
                self._missing[wanting].discard(task_id)
                self._offer(wanting)
        elif status == PENDING and task_id not in self._missing:
            deps = self._state.get_task(task_id).deps
            self._missing[task_id] = {d for d in deps if self._state.get_task(d).status != DONE}
            for dep in self._missing[task_id]:
                self._wanted_by[dep].add(task_id)
            self._offer(task_id)

    def _offer(self, task_id: str) -> None:
        if not self._missing[task_id]:
            self._runnable.append(task_id)

    def get_work(self, worker: str, **_: Any) -> dict[str, Any]:
        """Return a runnable task, or none."""
        reply = {"n_pending_tasks": len(self._runnable), "running_tasks": [], "n_unique_pending": 0, "task_id": None}
        if self._runnable:
            position = random.randrange(len(self._runnable))
            self._runnable[position], self._runnable[-1] = self._runnable[-1], self._runnable[position]
            task = self._state.get_task(self._runnable.pop())
            self._state.set_status(task, RUNNING, self._config)
            task.worker_running = worker
            task.resources_running = {}
            task.time_running = time.time()
            reply.update(task_id=task.id, task_family=task.family, task_module=task.module, task_params=task.params)
        return reply


@contextmanager
def _installed(workers: list[ThreadWorker]) -> Iterator[None]:
    class Factory(WorkerSchedulerFactory):
        def create_local_scheduler(self) -> Scheduler:
            return TreeScheduler()

        def create_worker(self, scheduler: Scheduler, worker_processes: int, assistant: bool = False) -> ThreadWorker:
            workers.append(ThreadWorker(scheduler, worker_processes, assistant))
            return workers[-1]

    # the package attribute `gokart.build` is the function
    module: Any = sys.modules["gokart.build"]
    original = module.WorkerSchedulerFactory
    module.WorkerSchedulerFactory = Factory
    try:
        yield
    finally:
        module.WorkerSchedulerFactory = original


@contextmanager
def _forgetting_handlers() -> Iterator[None]:
    """Take back the handler that each `gokart.build` registers for good: it keeps failed tasks, and so their texts."""
    events = gokart.TaskOnKart._event_callbacks
    before = {cls: {event: set(handlers) for event, handlers in known.items()} for cls, known in events.items()}
    try:
        yield
    finally:
        events.clear()
        events.update(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep luigi's line per task and traceback per failure out of the log: the ledger has them in short."""
    luigi.configuration.get_config().set("core", "no_configure_logging", "true")
    loggers = [logging.getLogger(name) for name in ("luigi", "luigi-interface", "luigi.scheduler", "gokart")]
    levels = [logger.level for logger in loggers]
    disabled = logging.root.manager.disable
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)  # gokart.build leaves it at a value of its own
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
