"""The engine under `gokart.build`: tasks on threads, laid out wave by wave, picked at random in constant time.

gokart's own worker forks a process per task, which shares its parent's S3 connection; luigi's scheduler sorts all
pending tasks at every pick, and keeps all that it ever saw. `build` puts the classes below in their place for the time
of one `gokart.build`, by the one name that gokart looks up: `WorkerSchedulerFactory` in the module `gokart.build`.
What they lean on in gokart and luigi is written down, and checked, in `tests/test_engine.py`.
"""

import heapq
import json
import logging
import queue
import random
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, TypeVar

import gokart
import luigi
from gokart.build import GokartBuildError, WorkerSchedulerFactory
from gokart.conflict_prevention_lock.task_lock import TaskLockException
from gokart.worker import ContextManagedTaskProcess, Worker, gokart_worker
from luigi.scheduler import Scheduler
from luigi.task_register import Register
from luigi.task_status import DONE, FAILED, PENDING

from tagger.exceptions import Terminated

logger = logging.getLogger(__name__)

STOP_SECONDS = 15.0
"""How long calls in flight may take to end when a build is interrupted."""

LOCKED_SECONDS = 1.0
"""After how long a task is tried again that another worker had locked."""

POLL_SECONDS = 0.2
"""How often a worker looks whether it is stopped, or whether a locked task's time has come."""

T = TypeVar("T")


class Leaf(gokart.TaskOnKart[T]):
    """A task of which a tree has many: what luigi finds out anew for each instance is found out once.

    An instance takes a fifth of the time. Parameters must be given by keyword; the defaults of the others are those at
    the first instance.
    """

    @classmethod
    @cache
    def get_params(cls) -> list[tuple[str, Any]]:
        """Return name and parameter of all parameters, in order."""
        return list(super().get_params())

    @classmethod
    def get_param_values(
        cls, params: list[tuple[str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[str, Any]]:
        """Return name and value of all parameters, in order. luigi looks each default up in its configuration."""
        defaults = _defaults.get((cls, *kwargs))
        if defaults is None:
            values: list[tuple[str, Any]] = super().get_param_values(params, args, kwargs)
            _defaults[cls, *kwargs] = {name: value for name, value in values if name not in kwargs}
            return values
        return [(name, kwargs[name] if name in kwargs else defaults[name]) for name, _ in params]


_defaults: dict[tuple[Any, ...], dict[str, Any]] = {}
"""Values of the parameters that were not given, by class and names of those that were."""


class Wave(Leaf[None]):
    """A task whose requirements are laid out only when the tasks laid out before run short.

    A tree of any size is built in bounded memory if its leaves hang below waves. No leaf may hang below two of them.
    """

    def deps(self) -> Any:
        """Return the requirements; where that fails, end the build, as luigi would go on without them."""
        try:
            return super().deps()
        except Exception as e:
            raise _NotLaidOut(e) from None


class _NotLaidOut(BaseException):
    """No Exception: luigi goes on after those."""


def build(task: gokart.TaskOnKart[Any], *, threads: int, stopped: threading.Event) -> bool:
    """Run a tree with `gokart.build`, up to `threads` tasks at a time; return whether all of it is complete.

    Failed tasks do not stop the others; tasks that another worker has locked are tried again until they are not. Once
    `stopped` is set, no task starts. When the build is interrupted (SIGTERM, KeyboardInterrupt, Airflow's timeout), it
    is set, and the tasks that run get `STOP_SECONDS` to end.

    Raises:
        Terminated: the process got SIGTERM.
        Exception: that of a wave's `requires`, which ends the build.
    """
    workers: list[ThreadWorker] = []
    Register.disable_instance_cache()  # it would keep every task, and with it its text
    try:
        with _installed(workers, stopped), _quiet(), _forgetting_handlers(), _terminable():
            try:
                gokart.build(task, return_value=False, log_level=logging.INFO, workers=threads)
            except GokartBuildError:
                pass  # what is complete tells
            except BaseException:
                stopped.set()
                for worker in workers:
                    worker.wait(STOP_SECONDS)
                raise
        return task.complete()
    except _Sigterm:
        raise Terminated("stopped by SIGTERM; what was answered until then is kept") from None
    except _NotLaidOut as e:
        raise e.args[0] from None
    finally:
        Register.clear_instance_cache()


class TaskThread(ContextManagedTaskProcess):
    """A task's run on a thread, where luigi has a process."""

    ended = False

    def __init__(self, threads: "queue.SimpleQueue[TaskThread | None]", *args: Any, **kwargs: Any) -> None:
        super().__init__(None, *args, **kwargs)
        self._threads = threads

    def start(self) -> None:
        """Hand the task to the next thread that is free."""
        self._threads.put(self)

    def run(self) -> None:
        """Run the task; its result goes to the worker's queue."""
        try:
            super().run()
        except BaseException as e:  # of a task's on_failure; the thread has others to run
            logger.error("unexpected %s at the end of a task", type(e).__name__)
        finally:
            self.ended = True

    def is_alive(self) -> bool:
        """Return whether the task has not ended."""
        return not self.ended

    def terminate(self) -> None:
        """Do nothing: a thread cannot be killed; `build` waits for it."""

    @property
    def exitcode(self) -> None:
        """A thread has none; how the task ended is on the result queue."""

    def _handle_run_exception(self, ex: BaseException) -> str:
        """Tell the task of its failure. gokart keeps the exception: without its frames, which hold the text."""
        if isinstance(ex, TaskLockException):
            return _LOCKED
        try:
            return super()._handle_run_exception(ex)
        finally:
            _forget_frames(ex)


def _forget_frames(error: BaseException | None) -> None:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        error.__traceback__ = None
        seen.append(error)
        error = error.__cause__ or error.__context__


_LOCKED = "locked by another worker"


class _Results(queue.SimpleQueue[Any]):
    def close(self) -> None:
        """Do nothing, where luigi closes a pipe."""


class ThreadWorker(Worker):
    """gokart's worker with its tasks on threads, which lays waves out as they are needed and forgets what ended."""

    _scheduler: "TreeScheduler"

    def __init__(
        self, scheduler: "TreeScheduler", worker_processes: int, assistant: bool, stopped: threading.Event
    ) -> None:
        config = gokart_worker(
            no_install_shutdown_handler=True,
            send_failure_email=False,
            keep_alive=True,
            wait_interval=POLL_SECONDS,
            wait_jitter=0.0,
        )
        super().__init__(scheduler=scheduler, worker_processes=worker_processes, assistant=assistant, config=config)
        self._task_result_queue = _Results()  # type: ignore[assignment]
        self._add_task_history = self._get_work_response_history = deque(maxlen=0)  # type: ignore[assignment]
        self._threads: queue.SimpleQueue[TaskThread | None] = queue.SimpleQueue()
        self._stopped = stopped
        self._waves: list[Wave] = []
        self._laying_out = False

    def __enter__(self) -> "ThreadWorker":
        """Start the threads. They are daemons: a call that hangs holds up no exit."""
        for _ in range(self.worker_processes):
            threading.Thread(target=self._run_tasks, name="tag", daemon=True).start()
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> Literal[False]:
        """Let the threads end, each with its task."""
        for _ in range(self.worker_processes):
            self._threads.put(None)
        return super().__exit__(*error)

    def _run_tasks(self) -> None:
        while (task := self._threads.get()) is not None:
            task.run()
            del task  # and its text

    def wait(self, seconds: float) -> None:
        """Wait until the running tasks have ended, at most so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(task.is_alive() for task in self._running_tasks.values()):
            time.sleep(0.05)

    def _add(self, task: luigi.Task, is_complete: bool) -> Generator[luigi.Task, None, None]:
        if isinstance(task, Wave) and is_complete is False and not self._laying_out:
            self._waves.append(task)
        else:
            yield from super()._add(task, is_complete)

    def _add_task(self, *, task_id: str, status: str, **kwargs: Any) -> None:
        self._scheduler.add_task(task_id=task_id, status=status, **kwargs)
        if not self._scheduler.knows(task_id):
            del self._scheduled_tasks[task_id]

    def _get_work(self) -> Any:
        while self._waves and not self._stopped.is_set() and self._scheduler.runnable < self.worker_processes:
            self._laying_out = True
            self.add(_pop_any(self._waves))
            self._laying_out = False
        self._stop_requesting_work = self._stopped.is_set()
        return super()._get_work()

    def _create_task_process(self, task: luigi.Task) -> TaskThread:
        reporter = luigi.worker.TaskStatusReporter(self._scheduler, task.task_id, self._id, None)
        return TaskThread(
            self._threads,
            task,
            self._id,
            self._task_result_queue,
            reporter,
            use_multiprocessing=True,
            check_unfulfilled_deps=False,
            task_completion_check_at_run=False,
        )

    def _purge_children(self) -> None:
        """Do nothing: a thread ends with a result."""


def _pop_any(items: list[T]) -> T:
    position = random.randrange(len(items))
    items[position], items[-1] = items[-1], items[position]
    return items.pop()


class TreeScheduler(Scheduler):
    """A scheduler for one worker and one tree: a random one of the runnable tasks, in constant time.

    It knows the tasks that wait or run, and no others.
    """

    def __init__(self) -> None:
        super().__init__(prune_on_get_work=False, record_task_history=False)
        self._runnable: list[str] = []
        self._locked: list[tuple[float, str]] = []
        self._missing: dict[str, set[str]] = {}
        self._wanted_by: defaultdict[str, list[str]] = defaultdict(list)

    @property
    def runnable(self) -> int:
        """The number of tasks that may run now."""
        return len(self._runnable)

    def knows(self, task_id: str) -> bool:
        """Return whether a task waits or runs."""
        return task_id in self._missing

    def add_task(
        self, task_id: str, status: str = PENDING, deps: list[str] | None = None, expl: str | None = None, **_: Any
    ) -> None:
        """Take in a task, or the end of its run."""
        if status == DONE:
            self._missing.pop(task_id, None)
            for wanting in self._wanted_by.pop(task_id, ()):
                self._missing[wanting].discard(task_id)
                self._offer(wanting)
        elif status == FAILED and expl == json.dumps(_LOCKED):
            heapq.heappush(self._locked, (time.monotonic() + LOCKED_SECONDS, task_id))
        elif status != PENDING:
            self._missing.pop(task_id, None)
        elif task_id not in self._missing:
            self._missing[task_id] = set(deps or ())
            for dep in self._missing[task_id]:
                self._wanted_by[dep].append(task_id)
            self._offer(task_id)

    def _offer(self, task_id: str) -> None:
        if not self._missing[task_id]:
            self._runnable.append(task_id)

    def get_work(self, **_: Any) -> dict[str, Any]:
        """Return a runnable task, or none; and how many there are, those included whose lock is waited for."""
        now = time.monotonic()
        while self._locked and self._locked[0][0] <= now:
            self._runnable.append(heapq.heappop(self._locked)[1])
        waiting = len(self._runnable) + len(self._locked)
        task_id = _pop_any(self._runnable) if self._runnable else None
        return {"task_id": task_id, "running_tasks": [], "n_pending_tasks": waiting, "n_unique_pending": 0}


@contextmanager
def _installed(workers: list[ThreadWorker], stopped: threading.Event) -> Iterator[None]:
    class Factory(WorkerSchedulerFactory):
        def create_local_scheduler(self) -> TreeScheduler:
            return TreeScheduler()

        def create_worker(self, scheduler: Any, worker_processes: int, assistant: bool = False) -> ThreadWorker:
            workers.append(ThreadWorker(scheduler, worker_processes, assistant, stopped))
            return workers[-1]

    # the package attribute `gokart.build` is the function
    module: Any = sys.modules["gokart.build"]
    original = module.WorkerSchedulerFactory
    module.WorkerSchedulerFactory = Factory
    try:
        yield
    finally:
        module.WorkerSchedulerFactory = original


class _Sigterm(BaseException):
    """No Exception, as `_NotLaidOut`."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM interrupt the block. Airflow's own handler lets a task go on, and Python's ends it at once."""

    def interrupt(signum: int, frame: object) -> None:
        raise _Sigterm

    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
