"""A proxy before one server, on loopback, that does to a request what networks, servers and disks do to it.

`HttpProxy` reads whole requests and keeps what was asked and answered. `StreamProxy` takes what a client sends until
the server answers for a request, which is so in the protocols of PostgreSQL, Redis and SMTP.
"""

import http.client
import itertools
import re
import select
import signal
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Self

from demo.processes import LOOPBACK

Kind = Literal["refused", "reset", "lost", "timeout", "error", "slow", "half", "full", "kill_before", "kill_after"]

OF_WRITES: frozenset[Kind] = frozenset(["full", "kill_before", "kill_after"])
"""Faults that only requests which write something can meet."""

SLOW_SECONDS = 0.4
RESTART_SECONDS = 0.3
"""How long a server is away that refuses connections once."""

STEP_SECONDS = 4.0
"""After which a client is told to end that waits for an answer, as a scheduler's time-out does."""

Kill = Callable[[signal.Signals], None]

_order = itertools.count(1)
"""Numbers what happens at all proxies of this process."""


def _nobody(with_signal: signal.Signals) -> None:
    """Kill nobody."""


@dataclass(frozen=True)
class Fault:
    """What happens to the request number `at` (from 1), or to it and all that follow.

    Only the requests that write are counted where it is a fault of writes.

    - `refused`: the server is gone, with all its connections; for a moment, if it is not lasting
    - `reset`: the connection is reset, and the server never hears of the request
    - `lost`: the server does what it is asked, and the connection is reset before the answer
    - `timeout`: the same, but the connection stays open and silent
    - `error`: the server answers with an error of its own, and closes the connection
    - `slow`: the answer takes a while
    - `half`: the connection is closed after half of the answer
    - `full`: the server answers that its disk or memory is full
    - `kill_before`, `kill_after`: the client is killed when its request is there, or when the server has done it
    """

    kind: Kind
    at: int
    lasting: bool = False


@dataclass(eq=False)
class Exchange:
    """One HTTP request and its answer."""

    method: str
    path: str
    body: bytes
    started: int
    """When it was passed on, counted over all proxies."""
    ended: int
    """When the server had answered."""
    status: int
    answer: bytes
    delivered: bool = False
    """Whether all of the answer went to the client."""


class Proxy(ABC):
    """A proxy before a port of loopback, on a port of its own, which stays the same over a time of refusals."""

    def __init__(self, server_port: int, answers: Mapping[Kind, bytes]) -> None:
        """`answers` are what the server says on `error` and on `full`, as bytes of its protocol."""
        self._server_port = server_port
        self._answers = answers
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._kill: Kill = _nobody
        self._clients: dict[socket.socket, int] = {}
        self._armed = 0
        self._listener: socket.socket | None = None
        self.port = 0
        self.requests = self.writes = self.struck = 0

    def __enter__(self) -> Self:
        """Start to listen."""
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening, and end all connections."""
        self._leave()

    def arm(self, fault: Fault | None, kill: Kill = _nobody) -> None:
        """Count the requests anew, and let a fault happen, or none from now on; `kill` signals the client's process."""
        with self._lock:
            self._fault, self._kill = fault, kill
            self._armed += 1
            self.requests = self.writes = self.struck = 0
            if self._listener is None:
                self._listen()

    def _listen(self) -> None:
        listener = socket.create_server((LOOPBACK, self.port), backlog=512)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="proxy", daemon=True).start()

    def _leave(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which a close alone does not
            listener.close()
        for client in list(self._clients):
            with suppress(OSError):
                _linger(client)
                client.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), name="proxy", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._clients[client] = self._armed
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(OSError, http.client.HTTPException):  # either side has gone
                self.handle(client)
        finally:
            del self._clients[client]
            client.close()

    @abstractmethod
    def handle(self, client: socket.socket) -> None:
        """Pass on what a client sends, and what it is answered; the connection is closed then."""

    def _next(self, client: socket.socket, is_write: bool) -> Kind | None:
        """Count a request, and return what happens to it; the goodbyes of earlier clients are none."""
        with self._lock:
            if self._clients[client] != self._armed:
                return None
            self.requests += 1
            self.writes += is_write
            fault = self._fault
            if fault is None or (fault.kind in OF_WRITES and not is_write):
                return None
            number = self.writes if fault.kind in OF_WRITES else self.requests
            if number < fault.at or (number > fault.at and not fault.lasting):
                return None
            self.struck += 1
            return fault.kind

    def _before(self, kind: Kind | None, client: socket.socket) -> bool:
        """Let what happens instead of the server's work happen; return whether that was all."""
        if kind == "refused":
            self._leave()
            if self._fault is not None and not self._fault.lasting:
                threading.Timer(RESTART_SECONDS, self._come_back).start()
        elif kind == "reset":
            _linger(client)
        elif kind == "error" or kind == "full":
            client.sendall(self._answers[kind])
        elif kind == "kill_before":
            self._kill(signal.SIGKILL)
        else:
            return False
        return True

    def _come_back(self) -> None:
        with self._lock:
            if self._listener is None:
                self._listen()

    def _after(self, kind: Kind | None, client: socket.socket, answer: bytes, half: int) -> bool:
        """Send an answer, of which the first half has so many bytes; return whether all of it went to the client."""
        if kind == "lost":
            _linger(client)
        elif kind == "timeout":
            client.settimeout(STEP_SECONDS)
            try:
                while client.recv(1 << 16):
                    pass
            except TimeoutError:
                self._kill(signal.SIGTERM)
        elif kind == "half":
            client.sendall(answer[:half])
        elif kind == "kill_after":
            self._kill(signal.SIGKILL)
        else:
            if kind == "slow":
                time.sleep(SLOW_SECONDS)
            client.sendall(answer)
            return True
        return False


class StreamProxy(Proxy):
    """A proxy before a server whose protocol is one of turns."""

    def __init__(self, server_port: int, answers: Mapping[Kind, bytes], writes: str) -> None:
        """`writes` is the regular expression of requests that write."""
        super().__init__(server_port, answers)
        self._writes = re.compile(writes.encode())
        self.sent = bytearray()
        """All that clients sent."""

    def handle(self, client: socket.socket) -> None:
        """Pass on what a client sends, and what it is answered."""
        with socket.create_connection((LOOPBACK, self._server_port)) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            kind: Kind | None = None
            is_asked = False
            while True:
                ready, _, _ = select.select([client, server], [], [])
                if client in ready:
                    request = client.recv(1 << 16)
                    if not request:
                        return
                    self.sent += request
                    if not is_asked:
                        is_asked, kind = True, self._next(client, bool(self._writes.search(request)))
                        if self._before(kind, client):
                            return
                    server.sendall(request)
                if server in ready:
                    answer = server.recv(1 << 16)
                    if not answer:
                        return
                    is_answer, is_asked = is_asked, False
                    if not self._after(kind if is_answer else None, client, answer, len(answer) // 2):
                        return


class HttpProxy(Proxy):
    """A proxy before an HTTP server. Requests must tell their length."""

    def __init__(self, server_port: int, answers: Mapping[Kind, bytes]) -> None:
        super().__init__(server_port, answers)
        self.exchanges: list[Exchange] = []
        """The requests that reached the server and were answered, in the order of their answers."""

    def handle(self, client: socket.socket) -> None:
        """Pass on the requests of a client, and what they are answered."""
        server = http.client.HTTPConnection(LOOPBACK, self._server_port)
        with client.makefile("rb") as reader:
            while line := reader.readline():
                method, path, _ = line.decode("latin-1").split()
                headers = http.client.parse_headers(reader)
                if headers.get("Expect"):
                    client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = reader.read(int(headers.get("Content-Length") or 0))
                kind = self._next(client, method in ("PUT", "POST", "DELETE"))
                if self._before(kind, client):
                    break
                exchange = Exchange(method, path, body, next(_order), 0, 0, b"")
                head = _ask(server, exchange, headers)
                self.exchanges.append(exchange)
                shown = b"" if method == "HEAD" else exchange.answer
                half = len(head) + len(shown) // 2 if len(shown) > 1 else len(head) // 2
                if not self._after(kind, client, head + shown, half):
                    break
                exchange.delivered = True
        server.close()


def _ask(server: http.client.HTTPConnection, exchange: Exchange, headers: http.client.HTTPMessage) -> bytes:
    """Pass a request on, and put the answer into it; return the answer's head."""
    server.putrequest(exchange.method, exchange.path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        if name.lower() != "expect":
            server.putheader(name, value)
    server.endheaders(exchange.body)
    response = server.getresponse()
    exchange.answer = response.read()
    exchange.status, exchange.ended = response.status, next(_order)
    kept = [
        (name, value)
        for name, value in response.getheaders()
        if name.lower() not in ("connection", "transfer-encoding", "content-length")
    ]
    length = response.getheader("Content-Length") if exchange.method == "HEAD" else str(len(exchange.answer))
    lines = [f"HTTP/1.1 {response.status} {response.reason}", *(f"{n}: {v}" for n, v in kept)]
    lines += [f"Content-Length: {length}"] if length is not None else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _linger(client: socket.socket) -> None:
    """Let the close of a socket be a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def http_answer(status: int, reason: str, kind: str, body: str) -> bytes:
    """Return an HTTP answer after which the server closes the connection."""
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return f"{head}\r\n{body}".encode()


def s3_answer(status: int, reason: str, code: str) -> bytes:
    """Return an error of S3."""
    return http_answer(status, reason, "application/xml", f"<Error><Code>{code}</Code><Message>No.</Message></Error>")


def postgresql_answer(state: str, message: str) -> bytes:
    """Return an error with which PostgreSQL ends a connection."""
    fields = "".join(f"{key}{value}\0" for key, value in (("S", "FATAL"), ("V", "FATAL"), ("C", state), ("M", message)))
    return b"E" + struct.pack("!i", len(fields) + 5) + fields.encode() + b"\0"


S3_ANSWERS: Mapping[Kind, bytes] = {
    "error": s3_answer(503, "Slow Down", "SlowDown"),
    "full": s3_answer(507, "Insufficient Storage", "XMinioStorageFull"),
}
LLM_ANSWERS: Mapping[Kind, bytes] = {
    "error": http_answer(503, "Service Unavailable", "application/json", '{"error": {"message": "Overloaded."}}'),
}
POSTGRESQL_ANSWERS: Mapping[Kind, bytes] = {
    "error": postgresql_answer("57P01", "terminating connection due to administrator command"),
    "full": postgresql_answer("53100", 'could not write to file "base/pgsql_tmp/1.0": No space left on device'),
}
REDIS_ANSWERS: Mapping[Kind, bytes] = {
    "error": b"-LOADING Redis is loading the dataset in memory\r\n",
    "full": b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
}
SMTP_ANSWERS: Mapping[Kind, bytes] = {
    "error": b"554 5.3.0 Transaction failed\r\n",
    "full": b"452 4.3.1 Insufficient system storage\r\n",
}
"""What servers say that cannot do what they are asked."""
