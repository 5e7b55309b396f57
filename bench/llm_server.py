"""An LLM endpoint that answers after a set time and counts: `python -m bench.llm_server --port P`.

`POST /v1/chat/completions` is OpenAI's. `GET /_stats`, `POST /_reset` and `POST /_behave` are ours; `_behave` takes
`latency` (seconds), `share_429` (of the calls) and `retry_after` (seconds; null: no header).
"""

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from bench.wire import Request, Send, json_response, own_cost, response, serve


@dataclass
class Behaviour:
    """How calls are answered."""

    latency: float = 0.5
    share_429: float = 0.0
    retry_after: float | None = 1.0


class LLM:
    """Answers each text with a tag of its request's schema, chosen by the text's hash."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._behaviour = Behaviour()
        self._calls = self._refused = self._in_flight = self._most_at_once = 0
        self._calls_by_text: Counter[int] = Counter()

    def __call__(self, request: Request, send: Send) -> None:
        """Answer a request."""
        if request.path.endswith("/chat/completions"):
            self._chat(json.loads(request.body), send)
        elif request.path == "/_stats":
            send(json_response(self._stats()))
        elif request.path == "/_reset":
            self._reset()
            send(json_response({}))
        elif request.path == "/_behave":
            self._behaviour = Behaviour(**{**vars(self._behaviour), **json.loads(request.body)})
            send(json_response({}))
        else:
            send(response(status="404 Not Found"))

    def _chat(self, question: dict[str, Any], send: Send) -> None:
        self._in_flight += 1
        self._most_at_once = max(self._most_at_once, self._in_flight)
        self._calls += 1
        if self._behaviour.share_429 and random.random() < self._behaviour.share_429:
            self._refused += 1
            self._loop.call_later(0.01, self._answer, send, self._too_many())
            return
        text = hash(question["messages"][-1]["content"])
        self._calls_by_text[text] += 1
        self._loop.call_later(self._behaviour.latency, self._answer, send, _completion(question, text))

    def _answer(self, send: Send, raw: bytes) -> None:
        self._in_flight -= 1
        send(raw)

    def _too_many(self) -> bytes:
        wait = self._behaviour.retry_after
        error = {"message": "Rate limit reached", "type": "requests", "param": None, "code": "rate_limit_exceeded"}
        headers = "" if wait is None else f"Retry-After: {wait:g}\r\n"
        return json_response({"error": error}, "429 Too Many Requests", headers)

    def _stats(self) -> dict[str, Any]:
        return own_cost() | {
            "calls": self._calls,
            "answered_429": self._refused,
            "texts": len(self._calls_by_text),
            "most_calls_per_text": max(self._calls_by_text.values(), default=0),
            "most_at_once": self._most_at_once,
        }

    def _reset(self) -> None:
        self._calls = self._refused = 0
        self._most_at_once = self._in_flight
        self._calls_by_text.clear()


def _completion(question: dict[str, Any], text: int) -> bytes:
    tags = question["response_format"]["json_schema"]["schema"]["properties"]["tags"]["items"]["enum"]
    content = json.dumps({"tags": [tags[text % len(tags)]]})
    message = {"role": "assistant", "content": content, "refusal": None}
    usage = {"prompt_tokens": 400, "completion_tokens": 10, "total_tokens": 410}
    return json_response(
        {
            "id": "chatcmpl-bench",
            "object": "chat.completion",
            "created": 1_790_000_000,
            "model": question["model"],
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            "usage": usage | {"prompt_tokens_details": {"cached_tokens": 0}},
            "system_fingerprint": "bench",
        }
    )


if __name__ == "__main__":
    serve(LLM)
