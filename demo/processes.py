"""Child processes that never outlive us: started, watched until they are ready, and ended.

They listen on loopback only, on ports that were free.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

LOOPBACK = "127.0.0.1"
STOP_SECONDS = 10.0
POLL_SECONDS = 0.05
LOG_LINES = 20

# Becomes the server itself (exec), so that its process id is the one we know. As a script of its own instead of a
# `preexec_fn`, which may deadlock when other threads run. The death signal is set after the user, for a change of user
# clears it; a parent that ended before it was set is noticed by its id.
_LAUNCHER = """
import ctypes, os, sys
parent, death_signal, uid, gid = map(int, sys.argv[1:5])
if uid >= 0:
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal):
        sys.exit("prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the parent has ended")
os.execv(sys.argv[5], sys.argv[5:])
"""


class ServerError(RuntimeError):
    """A server did not become ready.

    Attributes:
        exit_code: How it ended; None where it still ran when its time was up.
    """

    def __init__(self, message: str, exit_code: int | None) -> None:
        """Keeps the exit code beside the message."""
        super().__init__(message)
        self.exit_code = exit_code


def free_port() -> int:
    """Returns a TCP port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


class Process:
    """A child process with a session and process group of its own, its output appended to a log file.

    It ends with `stop()`, at the end of the `with` block, and when this process exits. On Linux it ends even when this
    process is killed (SIGKILL); then only the child itself is signalled, not its group.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        ready: Callable[[], bool],
        timeout: float = 30.0,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: tuple[int, int] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        death_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        """Describes the process; `start` starts it.

        Args:
            command: The program, as a path or a name on PATH, and its arguments.
            log: Where stdout and stderr go.
            ready: Whether the server answers; asked every 50 ms until it does.
            timeout: Seconds it may take until then.
            env: The whole environment; None: ours.
            cwd: Its working directory; None: ours.
            user: User and group id to run as; needs root.
            stop_signal: What `stop` sends to the group first.
            death_signal: What Linux sends to the child when this process ends.
        """
        self.command = [str(part) for part in command]
        self.log = log
        self.ready = ready
        self.timeout = timeout
        self.env = env
        self.cwd = cwd
        self.user = user
        self.stop_signal = stop_signal
        self.death_signal = death_signal
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of the server, which is its process group's too."""
        if self._child is None:
            raise ServerError(f"`{self.command[0]}` is not running", None)
        return self._child.pid

    def start(self) -> Self:
        """Starts the process and returns when it is ready.

        Raises:
            ServerError: It ended before it was ready, or took longer than `timeout`; with the end of its log.
        """
        self._child = _from_lasting_thread(self._launch)
        atexit.register(self._stop_at_exit, os.getpid())
        try:
            self._wait_until_ready(self._child)
        except BaseException:
            self.stop()
            raise
        return self

    def check(self) -> None:
        """Raises a ServerError with the end of the log if the process has ended by itself."""
        if self._child is not None and self._child.poll() is not None:
            raise self._error(f"ended with code {self._child.returncode}", self._child.returncode)

    def stop(self) -> None:
        """Ends the process and its group: `stop_signal`, up to 10 s for the process to end, then SIGKILL."""
        child, self._child = self._child, None
        if child is None:
            return
        atexit.unregister(self._stop_at_exit)
        _signal_group(child.pid, self.stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
        _signal_group(child.pid, signal.SIGKILL)
        child.wait()

    def __enter__(self) -> Self:
        """Starts the process."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the process."""
        self.stop()

    def _launch(self) -> subprocess.Popen[bytes]:
        program = shutil.which(self.command[0])
        if program is None:
            raise ServerError(f"`{self.command[0]}` is not a program that can be run", None)
        uid, gid = self.user or (-1, -1)
        settings = [str(number) for number in (os.getpid(), int(self.death_signal), uid, gid)]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, *settings, program, *self.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.cwd,
                start_new_session=True,
            )

    def _wait_until_ready(self, child: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            ready = self.ready()
            # Asked after `ready`, which another server on the same port could have answered.
            if child.poll() is not None:
                raise self._error(f"ended with code {child.returncode} before it was ready", child.returncode)
            if ready:
                return
            if time.monotonic() > deadline:
                raise self._error(f"was not ready after {self.timeout:g} s", None)
            time.sleep(POLL_SECONDS)

    def _error(self, what: str, exit_code: int | None) -> ServerError:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return ServerError("\n".join([f"`{self.command[0]}` {what}; the end of `{self.log}`:", *lines]), exit_code)

    def _stop_at_exit(self, owner: int) -> None:
        if os.getpid() == owner:  # not in a fork of us
            self.stop()


def start_on_free_ports(build: Callable[[], Process], attempts: int = 3) -> Process:
    """Starts what `build` returns, each time with fresh ports, until it was not another program that got a port first.

    Raises:
        ServerError: It ended at every attempt, or was not ready in time.
    """
    for attempt in range(1, attempts + 1):
        try:
            return build().start()
        except ServerError as error:
            if error.exit_code is None or attempt == attempts:
                raise
    raise ValueError(f"`attempts` is {attempts}, at least 1 is needed")


def _from_lasting_thread(launch: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Calls `launch` in a thread that lasts as long as the child.

    Linux sends the death signal when the thread that forked the child ends, even though the process goes on.
    """
    if threading.current_thread() is threading.main_thread():
        return launch()
    launched: Future[subprocess.Popen[bytes]] = Future()

    def run() -> None:
        try:
            child = launch()
        except BaseException as error:
            launched.set_exception(error)
            return
        launched.set_result(child)
        child.wait()

    threading.Thread(target=run, daemon=True).start()
    return launched.result()


def _signal_group(group: int, number: signal.Signals) -> None:
    # macOS answers EPERM where the group holds only a process that has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
