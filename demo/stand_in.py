"""An offline stand-in for an LLM, speaking the OpenAI wire protocol on 127.0.0.1. It is NO LLM.

It picks tags by looking for the words of their descriptions in the text: its answers show that the pipeline
works and say nothing about how well a model tags. It always answers as model `offline-stand-in`.

    with StandIn(latency=0.01) as llm:
        client = openai.OpenAI(base_url=llm.base_url, api_key="any")

    python -m demo.stand_in --port 8080

`POST /v1/chat/completions`, `GET /v1/models`, files and batches are OpenAI's; `GET /stats` gives totals, never a text.
"""

import argparse
import signal
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

from demo.stand_in_answers import (
    MODEL,
    Question,
    answer,
    choose_tags,
    completion,
    estimate_tokens,
    prompt_tokens,
    read_question,
    read_questions,
    token_usage,
)
from demo.stand_in_batches import ENDPOINT, Answer, Batches, Fate
from demo.stand_in_files import File, Files
from demo.stand_in_http import Json, Reply, Request, Routes, Server, error

__all__ = [
    "MODEL",
    "Call",
    "Fate",
    "File",
    "Json",
    "Question",
    "Reply",
    "Script",
    "StandIn",
    "choose_tags",
    "completion",
    "error",
    "estimate_tokens",
    "read_question",
    "read_questions",
    "token_usage",
]

_EXPECTED = "Expected the tagger's messages, its marker lines around the text, a model, a response_format, no stream."

Script = Reply | Answer
Asked = Literal["online", "batch"]


@dataclass(frozen=True, slots=True)
class Call:
    """One chat request, online or as a line of a batch; status is 0 if it was dropped.

    `key` is the text's id, empty for a packed request. `kept` are the texts where the server keeps them. Both and the
    texts' hashes are empty if the request was not well-formed.
    """

    key: str
    sha256s: tuple[str, ...]
    kept: tuple[str, ...]
    model: str
    time: float
    status: int
    asked: Asked = "online"

    @property
    def texts(self) -> int:
        """How many texts it held."""
        return len(self.sha256s)

    @property
    def sha256(self) -> str:
        """The hash of its only text."""
        return self.sha256s[0] if self.texts == 1 else ""

    @property
    def text(self) -> str | None:
        """Its only text."""
        return self.kept[0] if len(self.kept) == 1 else None


@dataclass(eq=False, repr=False, kw_only=True)
class StandIn(Server):
    """The server: it answers in threads inside its `with` block, and counts what it was asked.

    Rates are fractions of the requests. A 429 or 500 is drawn from the text and how often this server was asked
    it, so that a retry is another draw; whether a text is refused depends on the text and `seed` alone. A packed
    request draws once, for all its texts together, and is refused with any of them.
    `latency` delays answers, not errors; `latencies` delays whatever a route answers, by names like
    `GET /v1/batches/{id}`. Without `api_key` any key will do.

    A batch takes `batch_delay` seconds and no 429 or 500 of those rates: `batch_errors` of its lines end with a 500.
    Without `batches` the server has neither files nor batches.
    """

    port: int = 0
    latency: float = 0.0
    rate_429: float = 0.0
    rate_500: float = 0.0
    refusals: float = 0.0
    retry_after: float | None = None
    api_key: str | None = None
    seed: int = 0
    keep_texts: bool = False
    batches: bool = True
    batch_delay: float = 0.0
    batch_errors: float = 0.0
    latencies: dict[str, float] = field(default_factory=dict)
    max_in_flight: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Bind the port; raises ValueError on a wrong rate and OSError on a port in use."""
        faults, rates = self.rate_429 + self.rate_500, (self.rate_429, self.rate_500, self.refusals, self.batch_errors)
        if min(rates) < 0 or max(*rates, faults) > 1:
            raise ValueError("rates must be fractions from 0 to 1, those of 429 and 500 together too")
        self._lock, self._in_flight = threading.Lock(), 0
        self._calls: list[Call] = []
        self._asked, self._tokens = Counter[str](), Counter[str]()
        self._systems, self._script = set[str](), deque[Script]()
        self._files = Files()
        self._batches = Batches(self._files, self._answer_line, lambda: self.batch_delay)
        optional = self._files.routes | self._batches.routes if self.batches else {}
        self._routes: Routes = {f"POST {ENDPOINT}": self._chat, "GET /v1/models": _models} | optional
        self._routed, self._route_scripts = Counter[str](), defaultdict[str, deque[tuple[Reply, bool]]](deque)
        super().__init__(self.port)
        self.port = self.socket.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"

    def __exit__(self, *_: object) -> None:
        """Stop listening and all batches, and drop each connection at its next request."""
        self._batches.close()
        super().__exit__()

    def script(self, *replies: Script) -> None:
        """Queue replies: each next chat request with a right key pops one, before any other rule."""
        self._script.extend(replies)

    def script_batches(self, *fates: Fate) -> None:
        """Queue fates: each next batch that is accepted takes one."""
        self._batches.script(*fates)

    def script_route(self, route: str, *replies: Reply, after: bool = False) -> None:
        """Queue replies to a route like `POST /v1/batches` or `GET /v1/files/{id}/content`, one a request.

        The server does nothing else for that request. With `after` it first does all that was asked of it, so that
        the client is told of an error, or of nothing at all, and yet the batch is there.
        """
        if route not in self._routes:
            raise ValueError(f"expected one of {', '.join(self._routes)}, found {route}")
        self._route_scripts[route].extend((reply, after) for reply in replies)

    @property
    def routes(self) -> Counter[str]:
        """How many requests each route got, whatever the answer: `{"POST /v1/batches": 1}`."""
        with self._lock:
            return Counter(self._routed)

    @property
    def files(self) -> list[File]:
        """All files ever, oldest first, those of the batches' answers and those deleted too."""
        return self._files.all()

    @property
    def submitted(self) -> list[Json]:
        """The batches that were accepted, oldest first, as `GET /v1/batches/{id}` shows them."""
        return self._batches.all()

    @property
    def calls(self) -> list[Call]:
        """The chat requests and lines of batches so far; each is in it before its delay begins."""
        with self._lock:
            return list(self._calls)

    def calls_per_key(self, status: int | None = None) -> dict[str, int]:
        """Count the calls of each text id, of all or of one status."""
        return Counter(call.key for call in self.calls if call.key and status in (None, call.status))

    def calls_per_text(self, status: int | None = None) -> dict[str, int]:
        """Count how often each text was asked, packed or alone, by the text's SHA-256 in hex digits."""
        return Counter(text for call in self.calls if status in (None, call.status) for text in call.sha256s)

    def stats(self) -> Json:
        """Return the totals that `GET /stats` shows."""
        totals: Json = {name: self._tokens[name] for name in ("prompt_tokens", "completion_tokens")}
        calls = self.calls
        by_status, asked = Counter(str(call.status) for call in calls), Counter(call.asked for call in calls)
        counts = {"calls": len(calls), "by_status": by_status, "asked": asked, "max_in_flight": self.max_in_flight}
        files = sum(not file.deleted for file in self.files)
        return counts | totals | {"files": files, "batches": len(self.submitted), "routes": self.routes}

    def respond(self, request: Request) -> Reply:
        """Answer one HTTP request; returns when the reply's delay is over."""
        if request.route == "GET /stats":
            return Reply(body=self.stats())
        chat = request.route == f"POST {ENDPOINT}"
        with self._lock:
            self._in_flight += chat
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            reply = self._respond(request)
            self.closed.wait(reply.delay + self.latencies.get(request.route, 0.0))
        finally:
            with self._lock:
                self._in_flight -= chat
        return reply

    def _respond(self, request: Request) -> Reply:
        with self._lock:
            self._routed[request.route] += 1
            scripts = self._route_scripts[request.route]
            scripted, after = scripts.popleft() if scripts else (None, False)
        if scripted and not after:
            return scripted
        if not (answering := self._routes.get(request.route)):
            return error(404, "Unknown request URL.")
        # A chat request with a wrong key is counted among the calls.
        wrong_key = None if answering == self._chat else self._check_key(request)
        reply = wrong_key or answering(request)
        return scripted or reply

    def _check_key(self, request: Request) -> Reply | None:
        right = self.api_key in (None, request.key)
        return None if right else error(401, "Incorrect API key provided.", "invalid_api_key")

    def _chat(self, request: Request) -> Reply:
        asked = request.json()
        questions, wrong_key, script = _read(asked), self._check_key(request), None
        with self._lock:
            if self._script and not wrong_key:
                script = self._script.popleft()
        reply = wrong_key or self._reply(asked, questions, script, self.rate_429, self.rate_500)
        return self._count(asked, questions, reply, "online")

    def _answer_line(self, asked: Json, script: Script | None) -> Reply:
        questions = _read(asked)
        return self._count(asked, questions, self._reply(asked, questions, script, 0, self.batch_errors), "batch")

    def _reply(
        self, asked: Json, questions: list[Question], script: Script | None, rate_429: float, rate_500: float
    ) -> Reply:
        if scripted := script(asked) if callable(script) else script:
            return scripted
        if not questions:
            return error(400, _EXPECTED)
        fault = self._fault("\n".join(each.text for each in questions), rate_429, rate_500)
        return fault or self._answer(asked, questions)

    def _fault(self, text: str, rate_429: float, rate_500: float) -> Reply | None:
        with self._lock:
            self._asked[_sha256(text)] += 1
            draw = self._draw(f"fault {self._asked[_sha256(text)]}", text)
        if draw < rate_429:
            headers = {} if self.retry_after is None else {"Retry-After": f"{self.retry_after:g}"}
            return error(429, "Rate limit reached, as asked for.", "rate_limit_exceeded", "requests", headers=headers)
        broken = draw < rate_429 + rate_500
        return error(500, "The server had an error, as asked for.", type="server_error") if broken else None

    def _draw(self, kind: str, text: str) -> float:
        return int(_sha256(f"{self.seed} {kind} {text}")[:13], 16) / 16**13

    def _answer(self, asked: Json, questions: list[Question]) -> Reply:
        refused = any(self._draw("refusal", each.text) < self.refusals for each in questions)
        refusal = "The offline stand-in refuses this text, as asked for." if refused else None
        content = None if refused else answer(questions)
        system = questions[0].system
        tokens = estimate_tokens(system)
        with self._lock:
            cached = tokens // 128 * 128 if tokens >= 1024 and system in self._systems else 0
            self._systems.add(system)
        usage = token_usage(prompt_tokens(asked, questions), estimate_tokens(content or refusal or ""), cached)
        return replace(completion(content, refusal=refusal, usage=usage), delay=self.latency)

    def _count(self, request: Json, questions: list[Question], reply: Reply, asked: Asked) -> Reply:
        key, texts = questions[0].key if questions else "", tuple(each.text for each in questions)
        kept, model = texts if self.keep_texts else (), str(request.get("model", ""))
        status = 0 if reply.close else reply.status
        call = Call(key, tuple(map(_sha256, texts)), kept, model, time.time(), status, asked)
        usage = reply.body.get("usage") or {} if isinstance(reply.body, dict) else {}
        with self._lock:
            self._calls.append(call)
            self._tokens.update({name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")})
        return reply


def _models(_: Request) -> Reply:
    return Reply(body={"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": MODEL}]})


def _read(request: Json) -> list[Question]:
    """Return a request's questions, none if it is not of the tagger's form."""
    try:
        return read_questions(request)
    except (AttributeError, LookupError, TypeError, ValueError):
        return []


def _sha256(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    port_file: Path | None = options.pop("port_file")
    # Blocked before the first thread starts, so that all threads leave the signals to sigwait.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        server = StandIn(**options)
    except (OSError, OverflowError, ValueError) as problem:
        print(f"{MODEL}: cannot start on port {options['port']}: {problem}", file=sys.stderr)
        return 2
    with server:
        print(f"{MODEL} (NO LLM, it only matches words): {server.base_url}", flush=True)
        if port_file:
            port_file.write_text(f"{server.port}\n")
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo.stand_in", description="An offline stand-in; it is NO LLM.")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--port-file", type=Path, metavar="FILE", help="gets the port once the server listens")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="before each answer")
    for rate in ("--rate-429", "--rate-500", "--refusals", "--batch-errors"):
        parser.add_argument(rate, type=float, default=0.0, metavar="F", help="a fraction from 0 to 1")
    parser.add_argument("--retry-after", type=float, metavar="SECONDS", help="sent with each 429")
    parser.add_argument("--batch-delay", type=float, default=0.0, metavar="SECONDS", help="that a batch takes")
    parser.add_argument("--no-batches", action="store_false", dest="batches", help="know no files and no batches")
    parser.add_argument("--api-key", metavar="KEY", help="the only one accepted; default: any")
    parser.add_argument("--seed", type=int, default=0, help="of the draws behind the fractions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
