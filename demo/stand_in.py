"""An offline stand-in for an LLM, speaking the OpenAI wire protocol on 127.0.0.1. It is NO LLM.

It picks tags by looking for the words of their descriptions in the text: its answers show that the pipeline
works and say nothing about how well a model tags. It always answers as model `offline-stand-in`.

    with StandIn(latency=0.01) as llm:
        client = openai.OpenAI(base_url=llm.base_url, api_key="any")

    python -m demo.stand_in --port 8080

`POST /v1/chat/completions` and `GET /v1/models` are OpenAI's; `GET /stats` gives totals, never a text.
"""

import argparse
import json
import math
import re
import signal
import sys
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from http.client import responses
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, Self

MODEL = "offline-stand-in"

Json = dict[str, Any]
Tags = tuple[tuple[str, str], ...]  # ids and descriptions

_TEXT = re.compile(r'\A<text id="([0-9a-fA-F]+)">\n(.*)\n</text id="\1">\n?\Z', re.DOTALL)
_TAG_LINE = re.compile(r"^- ([^\n]+?): (.*)$", re.MULTILINE)
_AT_MOST = re.compile(r"\bat most (\d+) tag", re.IGNORECASE)
_EXPECTED = "Expected the tagger's messages, its marker lines around the text, a model, a response_format, no stream."

# Latin words of four letters, runs of kanji, runs of katakana.
_WORD = re.compile(
    r"[a-z\u00df-\u00f6\u00f8-\u024f]{4,}|[\u3005\u3400-\u4dbf\u4e00-\u9fff]{2,}|[\u30a1-\u30fa\u30fc]{2,}"
)
_SUFFIX = re.compile(r"(?<=.{4})(ations?|ical|ious|ions?|ies|ing|ous|ed|es|ic|al|e|(?<!s)s|y)$")
_COMMON = """about after also among before being between both each either else every from general have having into like
    many more most much only other over related same some such than that their them then there these they this those
    through topic topics very what when where which while with within without 一般 全般 場合 内容 関係 関連"""
_STOP_WORDS = frozenset(_COMMON.split())


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP answer, sent after `delay` seconds; `close` drops the connection instead."""

    status: int = 200
    body: Json | bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    close: bool = False


Script = Reply | Callable[[Json], Reply]


@dataclass(frozen=True, slots=True)
class Call:
    """One chat request: key and sha256 are empty if it was not well-formed, status is 0 if it was dropped."""

    key: str
    sha256: str
    text: str | None
    model: str
    time: float
    status: int


@dataclass(frozen=True, slots=True)
class Question:
    """What a well-formed request asks: a text, the tags to choose from, how many."""

    key: str
    text: str
    system: str
    tags: Tags
    at_least: int
    at_most: int


def token_usage(prompt: int, answer: int, cached: int = 0) -> Json:
    """Return OpenAI's `usage` for these token counts."""
    usage: Json = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return usage | {"prompt_tokens_details": {"cached_tokens": cached}}


def completion(
    content: str | None,
    finish_reason: str = "stop",
    refusal: str | None = None,
    model: str = MODEL,
    usage: Json | None = None,
) -> Reply:
    """Return a chat completion; without `usage` it claims 100 prompt tokens and the content's estimate."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    body: Json = {"id": f"chatcmpl-{MODEL}", "object": "chat.completion", "created": int(time.time()), "model": model}
    body["choices"] = [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}]
    body["usage"] = token_usage(100, estimate_tokens(content or refusal or "")) if usage is None else usage
    return Reply(body=body | {"system_fingerprint": MODEL})


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


def estimate_tokens(text: str) -> int:
    """Estimate tokens: four ASCII characters make one, any other character is one."""
    ascii_only = len(text.encode("ascii", "ignore"))
    return math.ceil(ascii_only / 4) + len(text) - ascii_only


def read_question(request: Json) -> Question:
    """Read a request's body; raises LookupError, TypeError or ValueError if it is not of the tagger's form."""
    first, last, wanted = request["messages"][0], request["messages"][-1], request["response_format"]
    if (first["role"], last["role"]) != ("system", "user") or not request["model"] or request.get("stream"):
        raise ValueError("roles, model or stream")
    [(key, text)] = _TEXT.findall(last["content"])
    tags = {"items": {}} if wanted["type"] == "json_object" else wanted["json_schema"]["schema"]["properties"]["tags"]
    described: dict[str, str] = dict(_TAG_LINE.findall(first["content"]))
    chosen = tuple((each, described[each]) for each in tags["items"].get("enum", described))
    if not chosen:
        raise ValueError("no tags")
    at_most = min(map(int, _AT_MOST.findall(first["content"])))
    return Question(key, text, first["content"], chosen, int(tags.get("minItems", 0)), at_most)


def choose_tags(question: Question) -> list[str]:
    """Return the tags whose descriptions share words with the text, best first; ties in tag order."""
    text = _plain(question.text)
    words = Counter(map(_stem, _WORD.findall(text)))
    scores: dict[str, float] = {}
    for tag, weights in _weigh_words(question.tags):
        counts = {word: words[word] if word.isascii() else text.count(word) for word in weights}
        # A word counts three times at most, so that one frequent word does not beat several that fit.
        scores[tag] = sum(weight * min(counts[word], 3) for word, weight in weights.items())
    matching = sum(score > 0 for score in scores.values())
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    return ranked[: min(max(matching, question.at_least), question.at_most)]


@lru_cache(maxsize=64)
def _weigh_words(tags: Tags) -> list[tuple[str, dict[str, float]]]:
    """Return each tag's words, each with one over the number of tags that share it."""
    found = [(tag, set(_WORD.findall(_plain(description))) - _STOP_WORDS) for tag, description in tags]
    words = [(tag, sorted(set(map(_stem, each)))) for tag, each in found]
    shared = Counter(word for _, each in words for word in each)
    return [(tag, {word: 1 / shared[word] for word in each}) for tag, each in words]


@lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    return _SUFFIX.sub("", word)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _sha256(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(eq=False, repr=False, kw_only=True)
class StandIn(ThreadingTCPServer):
    """The server: it answers in threads inside its `with` block, and counts what it was asked.

    Rates are fractions of the requests. A 429 or 500 is drawn from the text and how often this server was asked
    it, so that a retry is another draw; whether a text is refused depends on the text and `seed` alone.
    `latency` delays answers, not errors. Without `api_key` any key will do.
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
    max_in_flight: int = field(default=0, init=False)

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __post_init__(self) -> None:
        """Bind the port; raises ValueError on a wrong rate and OSError on a port in use."""
        faults = self.rate_429 + self.rate_500
        if min(self.rate_429, self.rate_500, self.refusals) < 0 or max(faults, self.refusals) > 1:
            raise ValueError("rates must be fractions from 0 to 1, those of 429 and 500 together too")
        self._lock, self.closed, self._in_flight = threading.Lock(), threading.Event(), 0
        self._calls: list[Call] = []
        self._asked, self._tokens = Counter[str](), Counter[str]()
        self._systems, self._script = set[str](), deque[Script]()
        super().__init__(("127.0.0.1", self.port), _Handler)
        self.port = self.socket.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        """Start answering."""
        threading.Thread(target=self.serve_forever, args=(0.05,), name=MODEL, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening, and drop each connection at its next request."""
        self.closed.set()
        self.shutdown()
        self.server_close()

    def script(self, *replies: Script) -> None:
        """Queue replies: each next chat request with a right key pops one, before any other rule."""
        self._script.extend(replies)

    @property
    def calls(self) -> list[Call]:
        """The chat requests so far; each is in it before its delay begins."""
        with self._lock:
            return list(self._calls)

    def calls_per_key(self, status: int | None = None) -> dict[str, int]:
        """Count the calls of each text id, of all or of one status."""
        return Counter(call.key for call in self.calls if call.key and status in (None, call.status))

    def stats(self) -> Json:
        """Return the totals that `GET /stats` shows."""
        totals: Json = {name: self._tokens[name] for name in ("prompt_tokens", "completion_tokens")}
        by_status = Counter(str(call.status) for call in self.calls)
        return {"calls": by_status.total(), "by_status": by_status, "max_in_flight": self.max_in_flight} | totals

    def chat(self, raw: bytes, key: str) -> Reply:
        """Answer and count one chat request; returns when the reply's delay is over."""
        with self._lock:
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            request, question = _read(raw)
            reply = self.check_key(key) or self._next_reply(request, question)
            self._count(request, question, reply)
            self.closed.wait(reply.delay)
        finally:
            with self._lock:
                self._in_flight -= 1
        return reply

    def check_key(self, key: str) -> Reply | None:
        """Return the refusal of a wrong key, None for a right one."""
        right = self.api_key in (None, key)
        return None if right else error(401, "Incorrect API key provided.", "invalid_api_key")

    def _next_reply(self, request: Json, question: Question | None) -> Reply:
        with self._lock:
            scripted = self._script.popleft() if self._script else None
        if scripted:
            return scripted(request) if callable(scripted) else scripted
        if not question:
            return error(400, _EXPECTED)
        return self._fault(question.text) or self._answer(question)

    def _fault(self, text: str) -> Reply | None:
        with self._lock:
            self._asked[_sha256(text)] += 1
            draw = self._draw(f"fault {self._asked[_sha256(text)]}", text)
        if draw < self.rate_429:
            headers = {} if self.retry_after is None else {"Retry-After": f"{self.retry_after:g}"}
            return error(429, "Rate limit reached, as asked for.", "rate_limit_exceeded", "requests", headers=headers)
        broken = draw < self.rate_429 + self.rate_500
        return error(500, "The server had an error, as asked for.", type="server_error") if broken else None

    def _draw(self, kind: str, text: str) -> float:
        return int(_sha256(f"{self.seed} {kind} {text}")[:13], 16) / 16**13

    def _answer(self, question: Question) -> Reply:
        refused = self._draw("refusal", question.text) < self.refusals
        refusal = "The offline stand-in refuses this text, as asked for." if refused else None
        content = None if refused else json.dumps({"tags": choose_tags(question)}, ensure_ascii=False)
        system = estimate_tokens(question.system)
        with self._lock:
            cached = system // 128 * 128 if system >= 1024 and question.system in self._systems else 0
            self._systems.add(question.system)
        usage = token_usage(system + estimate_tokens(question.text), estimate_tokens(content or refusal or ""), cached)
        return replace(completion(content, refusal=refusal, usage=usage), delay=self.latency)

    def _count(self, request: Json, question: Question | None, reply: Reply) -> None:
        key, text = (question.key, question.text) if question else ("", None)
        digest, status = "" if text is None else _sha256(text), 0 if reply.close else reply.status
        call = Call(key, digest, text if self.keep_texts else None, str(request.get("model", "")), time.time(), status)
        usage = reply.body.get("usage") or {} if isinstance(reply.body, dict) else {}
        with self._lock:
            self._calls.append(call)
            self._tokens.update({name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")})

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what went wrong, but not that a client hung up."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _read(raw: bytes) -> tuple[Json, Question | None]:
    request = None
    try:
        request = json.loads(raw)
        return request, read_question(request)
    except (AttributeError, LookupError, TypeError, ValueError):
        return request if isinstance(request, dict) else {}, None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: StandIn

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            models = [{"id": MODEL, "object": "model", "created": 0, "owned_by": MODEL}]
            self._send(self.server.check_key(self._key()) or Reply(body={"object": "list", "data": models}))
        else:
            self._send(Reply(body=self.server.stats()) if self.path == "/stats" else error(404, "Unknown request URL."))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        # Without a length nobody knows where the next request begins.
        self.close_connection = self.close_connection or not length.isdecimal()
        body = self.rfile.read(int(length)) if length.isdecimal() else b""
        known = self.path == "/v1/chat/completions"
        self._send(self.server.chat(body, self._key()) if known else error(404, "Unknown request URL."))

    def log_message(self, *_: object) -> None:
        pass

    def _key(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _send(self, reply: Reply) -> None:
        if reply.close or self.server.closed.is_set():
            self.close_connection = True
            return
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body or {}).encode()
        headers = {"Content-Type": "application/json", **reply.headers, "Content-Length": str(len(body))}
        headers |= {"Connection": "close"} if self.close_connection else {}
        lines = [f"HTTP/1.1 {reply.status} {responses.get(reply.status, '')}", *map(": ".join, headers.items()), "", ""]
        self.wfile.write("\r\n".join(lines).encode("latin-1") + body)


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
    for rate in ("--rate-429", "--rate-500", "--refusals"):
        parser.add_argument(rate, type=float, default=0.0, metavar="F", help="a fraction from 0 to 1")
    parser.add_argument("--retry-after", type=float, metavar="SECONDS", help="sent with each 429")
    parser.add_argument("--api-key", metavar="KEY", help="the only one accepted; default: any")
    parser.add_argument("--seed", type=int, default=0, help="of the draws behind the fractions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
