"""HTTP/1.1 with as little CPU as Python allows, so that the servers of a benchmark are never what it measures.

Only what the SDKs send: keep-alive, `Content-Length` or chunked bodies, `Expect: 100-continue`; no pipelining, no TLS.
"""

import argparse
import asyncio
import contextlib
import json
import resource
import signal
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Request(NamedTuple):
    """One request. Header names are in lower case; the body is decoded where it was chunked."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


Send = Callable[[bytes], None]
Handler = Callable[[Request, Send], None]
"""Answers a request by calling `send` once, now or later, with what `response` returns."""


def response(body: bytes = b"", status: str = "200 OK", headers: str = "", length: int | None = None) -> bytes:
    """Return an HTTP response. `headers` is whole lines; `length` is what a HEAD tells of a body it leaves out."""
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {size}\r\n\r\n".encode() + body


def json_response(content: object, status: str = "200 OK", headers: str = "") -> bytes:
    """Return an HTTP response with a JSON body."""
    return response(json.dumps(content).encode(), status, f"Content-Type: application/json\r\n{headers}")


def own_cost() -> dict[str, float]:
    """Return the CPU seconds that this process has used so far."""
    return {"cpu_seconds": time.process_time()}


class Connection(asyncio.Protocol):
    """One client's connection, its requests answered one after the other."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._buffer = bytearray()
        self._head: tuple[str, str, dict[str, str]] | None = None
        self._decoded = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Answer what is complete."""
        self._buffer += data
        while self._answer_next():
            pass

    def _answer_next(self) -> bool:
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return False
            self._head = _parse_head(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
            if "expect" in self._head[2]:
                self._transport.write(_CONTINUE)
        method, target, headers = self._head
        body = self._body(headers)
        if body is None:
            return False
        self._head = None
        path, _, query = target.partition("?")
        fields = dict(parse_qsl(query, keep_blank_values=True)) if query else {}
        self._handler(Request(method, unquote(path), fields, headers, body), self._send)
        return True

    def _body(self, headers: dict[str, str]) -> bytes | None:
        """Return the body, or None while it is not all there."""
        if headers.get("transfer-encoding") == "chunked":
            return self._decoded_chunks() if _take_chunks(self._buffer, self._decoded) else None
        length = int(headers.get("content-length", 0))
        if len(self._buffer) < length:
            return None
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        if "aws-chunked" in headers.get("content-encoding", ""):
            _take_chunks(bytearray(body), self._decoded)
            return self._decoded_chunks()
        return body

    def _decoded_chunks(self) -> bytes:
        body = bytes(self._decoded)
        self._decoded.clear()
        return body

    def _send(self, raw: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(raw)


def _parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return method, target, headers


def _take_chunks(buffer: bytearray, decoded: bytearray) -> bool:
    """Move whole chunks from `buffer` to `decoded`; return whether the last one came, its trailers included."""
    while True:
        line_end = buffer.find(b"\r\n")
        if line_end < 0:
            return False
        size = int(bytes(buffer[:line_end]).split(b";")[0], 16)
        if size == 0:
            end = buffer.find(b"\r\n\r\n", line_end)
            if end < 0:
                return False
            del buffer[: end + 4]
            return True
        end = line_end + 2 + size + 2
        if len(buffer) < end:
            return False
        decoded += buffer[line_end + 2 : end - 2]
        del buffer[:end]


def serve(make_handler: Callable[[asyncio.AbstractEventLoop], Handler]) -> None:
    """Serve on 127.0.0.1 at the port of `--port` until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    port: int = parser.parse_args().port
    _allow_many_connections()
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(make_handler, port))


async def _serve(make_handler: Callable[[asyncio.AbstractEventLoop], Handler], port: int) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    handler = make_handler(loop)
    await loop.create_server(lambda: Connection(handler), "127.0.0.1", port, backlog=1024)
    await ended.wait()


def _loop_factory() -> Callable[[], Any] | None:
    """Return uvloop's where it is installed: half the CPU a request."""
    if find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


def _allow_many_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
