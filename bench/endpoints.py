"""The two servers of a benchmark, as processes of their own on loopback: an LLM endpoint and a counting S3."""

import json
import sys
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from demo.processes import LOOPBACK, Process, free_port, start_on_free_ports

REPOSITORY = Path(__file__).resolve().parent.parent

Requests = dict[str, dict[str, int]]
"""Counts by operation, of `records` (keys below cache/) and of `files` (all others)."""


class Endpoint:
    """A server of this package, told and asked over its control URLs."""

    module: str

    def __init__(self, folder: Path) -> None:
        """Describes the server; `start` starts it. Its log goes into `folder`."""
        self._log = folder / f"{self.module}.log"
        self._port = 0
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """The server's base URL."""
        return f"http://{LOOPBACK}:{self._port}"

    def start(self) -> Self:
        """Start the server and return when it answers."""
        self._process = start_on_free_ports(self._build)
        return self

    def stop(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def __enter__(self) -> Self:
        """Start the server."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the server."""
        self.stop()

    def stats(self) -> dict[str, Any]:
        """Return the counters."""
        return self.control("GET", "/_stats")

    def reset(self) -> None:
        """Set the counters to zero."""
        self.control("POST", "/_reset")

    def control(self, method: str, path: str, **content: object) -> dict[str, Any]:
        """Send a request to a control URL and return its answer."""
        connection = HTTPConnection(LOOPBACK, self._port, timeout=600)
        try:
            connection.request(method, path, json.dumps(content))
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer
        finally:
            connection.close()

    def _build(self) -> Process:
        self._port = free_port()
        command = [sys.executable, "-m", self.module, "--port", str(self._port)]
        return Process(command, self._log, ready=self._answers, cwd=REPOSITORY)

    def _answers(self) -> bool:
        try:
            self.stats()
        except (OSError, HTTPException, ValueError):
            return False
        return True


class LLMEndpoint(Endpoint):
    """Answers chat completions after a set latency, and counts the calls of each text."""

    module = "bench.llm_server"

    @property
    def base_url(self) -> str:
        """The base URL for the OpenAI SDK."""
        return f"{self.url}/v1"

    def behave(self, **behaviour: float | None) -> None:
        """Set `latency`, `share_429` or `retry_after`."""
        self.control("POST", "/_behave", **behaviour)


class S3Endpoint(Endpoint):
    """S3 in memory, which counts the requests by operation."""

    module = "bench.s3_server"

    def behave(self, *, latency: float) -> None:
        """Let each request of S3's wait so many seconds for its answer."""
        self.control("POST", "/_behave", latency=latency)

    def clear(self) -> None:
        """Delete all objects."""
        self.control("POST", "/_clear")

    def seed(self, bucket: str, keys_file: Path, body: str) -> None:
        """Make the objects exist whose keys stand in a file, one a line, all with the same body."""
        self.control("POST", "/_seed", bucket=bucket, keys_file=str(keys_file.absolute()), body=body)

    def requests(self) -> Requests:
        """Return the requests since `reset`."""
        counts: Requests = self.stats()["requests"]
        return counts
