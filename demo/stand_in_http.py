"""The HTTP of the offline stand-in: requests in, replies out, on 127.0.0.1."""

import json
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.client import responses
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

Json = dict[str, Any]

_ITEM = re.compile(r"(/v1/(?:files|batches))/([^/]+)(/content|/cancel)?")
_FIELD = re.compile(r'\b(name|filename)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP answer, sent after `delay` seconds; `close` drops the connection instead."""

    status: int = 200
    body: Json | bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    close: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. `route` is like `GET /v1/files/{id}`, with the file's or batch's id in `id`."""

    route: str
    id: str
    query: dict[str, str]
    key: str
    headers: Message
    body: bytes

    def json(self) -> Json:
        """Return the body's JSON object, empty if it is none."""
        return read_object(self.body)

    def form(self) -> dict[str, tuple[str, bytes]]:
        """Return a `multipart/form-data` body: each field's file name, empty if it is no file, and content."""
        fields = {}
        border = b"\r\n--" + self.headers.get_boundary("").encode()
        for part in (b"\r\n" + self.body).split(border)[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            names = dict(_FIELD.findall(head.decode("utf-8", "replace")))
            fields[names.get("name", "")] = names.get("filename", ""), content
        return fields


Routes = dict[str, Callable[[Request], Reply]]


def read_object(raw: bytes) -> Json:
    """Return a JSON object, empty if it is none."""
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def error(
    status: int,
    message: str,
    code: str | None = None,
    type: str = "invalid_request_error",
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Return an error in OpenAI's JSON shape."""
    body = {"error": {"message": message, "type": type, "param": param, "code": code}}
    return Reply(status, body, headers or {})


def page(items: Sequence[Json], request: Request, default: int, most: int) -> Reply:
    """Return the page of a list that the query's `limit` and `after` want."""
    limit, after = request.query.get("limit", str(default)), request.query.get("after")
    if not limit.isdecimal() or not 1 <= int(limit) <= most:
        return error(400, f"Expected a limit from 1 to {most}.", param="limit")
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        return error(400, "Expected the id of an object in the list.", param="after")
    start = 0 if after is None else ids.index(after) + 1
    data = items[start : start + int(limit)]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return Reply(body={"object": "list", "data": data, "has_more": start + len(data) < len(items)} | ends)


class Server(ThreadingTCPServer, ABC):
    """A server that answers in threads inside its `with` block; raises OSError on a port in use."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int) -> None:
        self.closed = threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)

    @abstractmethod
    def respond(self, request: Request) -> Reply:
        """Answer a request; returns when the reply's delay is over."""

    def __enter__(self) -> Self:
        """Start answering."""
        threading.Thread(target=self.serve_forever, args=(0.05,), name=type(self).__name__, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening, and drop each connection at its next request."""
        self.closed.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what went wrong, but not that a client hung up."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        self._respond("0")

    def do_DELETE(self) -> None:
        self._respond("0")

    def do_POST(self) -> None:
        self._respond("")

    def log_message(self, *_: object) -> None:
        pass

    def _respond(self, default_length: str) -> None:
        length = self.headers.get("Content-Length", default_length)
        # Without a length nobody knows where the next request begins.
        self.close_connection = self.close_connection or not length.isdecimal()
        body = self.rfile.read(int(length)) if length.isdecimal() else b""
        url = urlsplit(self.path)
        item = _ITEM.fullmatch(url.path)
        path, item_id = (f"{item[1]}/{{id}}{item[3] or ''}", item[2]) if item else (url.path, "")
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        query = dict(parse_qsl(url.query))
        self._send(self.server.respond(Request(f"{self.command} {path}", item_id, query, key, self.headers, body)))

    def _send(self, reply: Reply) -> None:
        if reply.close or self.server.closed.is_set():
            self.close_connection = True
            return
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body or {}).encode()
        headers = {"Content-Type": "application/json", **reply.headers, "Content-Length": str(len(body))}
        headers |= {"Connection": "close"} if self.close_connection else {}
        lines = [f"HTTP/1.1 {reply.status} {responses.get(reply.status, '')}", *map(": ".join, headers.items()), "", ""]
        self.wfile.write("\r\n".join(lines).encode("latin-1") + body)
