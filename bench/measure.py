"""Work in a fresh process, started, warmed up and then measured step by step.

A contender (`bench.contenders`) first does its imports and makes its connections, then waits. For each step it is told
to do it sends back one line: what the step took, and what it returned.
"""

import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.endpoints import REPOSITORY

READY_SECONDS = 300.0
LOG_LINES = 15


class Failed(Exception):
    """A contender did not do its step. `args[0]` says why."""


@dataclass(frozen=True)
class Measured:
    """What one step took. Memory is the peak of the process since its start, its imports included."""

    seconds: float
    cpu: float
    """CPU seconds, of the process and of the children it waited for."""
    peak_mb: float
    children_peak_mb: float
    """Of the largest child."""
    returned: Any = field(default=None)


def measured(step: Callable[[], Any]) -> Measured:
    """Do a step and measure it."""
    started, cpu = time.perf_counter(), _cpu()
    returned = step()
    seconds, cpu = time.perf_counter() - started, _cpu() - cpu
    return Measured(seconds, cpu, _peak_mb(), _rss_mb(resource.RUSAGE_CHILDREN), returned)


def _cpu() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_mb() -> float:
    """Return this process's peak; `ru_maxrss` counts on Linux also what the process was before its exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return _rss_mb(resource.RUSAGE_SELF)


def _rss_mb(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


class Contender:
    """A contender's process, ended with its children at the end of the `with` block."""

    def __init__(self, name: str, settings: dict[str, Any], env: dict[str, str], log: Path) -> None:
        """Starts the process; `wait_until_ready` returns when it has its imports and connections."""
        self._log = log
        with log.open("ab") as errors:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "bench.contenders", name, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                cwd=REPOSITORY,
                start_new_session=True,
            )
        self._lines = b""

    def __enter__(self) -> Self:
        """Return the contender."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process and its children."""
        assert self._child.stdin is not None and self._child.stdout is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        if error is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(10)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._child.stdout.close()

    def wait_until_ready(self) -> Self:
        """Return when the contender waits for its first step."""
        self._answer(READY_SECONDS)
        return self

    def tell(self, step: str) -> None:
        """Tell the contender to do a step; `result` returns when it has."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{step}\n".encode())
        self._child.stdin.flush()

    def result(self, timeout: float = 3600.0) -> Measured:
        """Return what the step took.

        Raises:
            Failed: it raised, took longer than `timeout` seconds, or ended the process.
        """
        return Measured(**self._answer(timeout))

    def run(self, step: str, timeout: float = 3600.0) -> Measured:
        """Have a step done and return what it took."""
        self.tell(step)
        return self.result(timeout)

    def _answer(self, timeout: float) -> dict[str, Any]:
        assert self._child.stdout is not None
        until = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._lines:
                if not selector.select(max(until - time.monotonic(), 0)):
                    raise Failed(f"not done after {timeout:.0f} s")
                data = os.read(self._child.stdout.fileno(), 65536)
                if not data:
                    raise Failed(self._end_of_log())
                self._lines += data
        line, _, self._lines = self._lines.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def _end_of_log(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join(["the process ended; the end of its log:", *lines])


def serve_steps(prepare: Callable[[], dict[str, Callable[[], Any]]]) -> None:
    """Be the contender's process: prepare the steps, then do those that stdin names, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    steps = prepare()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = asdict(measured(steps[line.strip()]))
        except Exception as e:
            answer = {"failed": f"{type(e).__name__}: {e}"[:2000]}
        print(json.dumps(answer), file=answers, flush=True)
