"""The offline stand-in's batches: OpenAI's Batch API over its files, for chat completions.

A thread for each batch answers its lines, spread over the batch's delay; a tenth of the delay goes to the validation
before them and a tenth to what comes after them. Batches live in memory and end with the server.
"""

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from demo.stand_in_files import Files
from demo.stand_in_http import Json, Reply, Request, Routes, error, page, read_object

ENDPOINT = "/v1/chat/completions"
MAX_REQUESTS = 50_000
WINDOW_SECONDS = 24 * 3600

Answer = Callable[[Json], Reply | None]

_ENDS = ("completed", "failed", "expired", "cancelled")
_STAGES = ("in_progress", "finalizing", "cancelling", *_ENDS)
_PARAMETERS = {"custom_id": str, "method": str, "url": str, "body": dict}
_PROBLEMS = {
    "empty_file": "The input file holds no request.",
    "too_many_tasks": "The input file holds more requests than a batch may have.",
    "invalid_json_line": "This line is not parseable as valid JSON.",
    "missing_required_parameter": "A required parameter is missing or of a wrong type.",
    "invalid_method": "The method of a request must be POST.",
    "invalid_url": "The URL provided for this request does not match the batch endpoint.",
    "duplicate_custom_id": "The custom_id for this request is a duplicate of another request.",
    "mismatched_model": "All requests of a batch must name the same model.",
    "token_limit_exceeded": "Enqueued token limit reached. Please try again once some in_progress batches have ended.",
}
_UNASKED = {
    "expired": {
        "code": "batch_expired",
        "message": "This request could not be executed before the completion window expired.",
    },
    "cancelled": {"code": "batch_cancelled", "message": "The batch was cancelled before this request was executed."},
}
_TIMEOUT = {"code": "request_timeout", "message": "The request to the model timed out."}


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a batch."""

    status: Literal["completed", "failed", "expired", "cancelled"] = "completed"
    """The last one. A batch that fails does so at its validation, unless lines are answered."""
    answered: float | None = None
    """Fraction of the lines, the first ones, that are answered; None: all of a completed batch, none of another.

    The other lines are in the error file where the batch expired or was cancelled, else in no file.
    """
    problem: str = "token_limit_exceeded"
    """Error code of a failed batch."""
    answer: Answer | None = None
    """Replies to a line's body; where it returns None the server does. `Reply(close=True)`: the model timed out."""
    output: Callable[[list[str]], list[str]] | None = None
    """Changes the lines of the output file: drops, repeats, adds or breaks some."""
    lost: bool = False
    """Whether the output file is not found."""
    delay: float | None = None
    """Seconds from creation to the end; None: the server's."""

    @property
    def share(self) -> float:
        """The fraction of the lines that are answered."""
        return float(self.status == "completed") if self.answered is None else self.answered


class Batch:
    """A batch under way. After `due`, a monotonic time, it waits for nothing but its own work."""

    def __init__(self, wanted: Json, fate: Fate, delay: float) -> None:
        self.id, self._created_at = f"batch_{uuid.uuid4().hex}", int(time.time())
        self._started, self._delay = time.monotonic(), delay
        self.due = self._started + delay
        self._wanted, self._fate = wanted, fate
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._status, self._times, self._problems = "validating", dict[str, int](), list[Json]()
        self._counts = {"total": 0, "completed": 0, "failed": 0}
        self._file_ids: dict[str, str | None] = {"output_file_id": None, "error_file_id": None}

    def to_json(self) -> Json:
        """Return OpenAI's batch object."""
        with self._lock:
            return self._to_json()

    def cancel(self) -> Json | None:
        """Ask no further line; returns the batch object, None if the batch had ended."""
        with self._lock:
            if self._status in _ENDS:
                return None
            if not self._stop.is_set():
                self._enter("cancelling")
                self.due = time.monotonic() + self._delay / 10
                self._stop.set()
            return self._to_json()

    def stop(self) -> None:
        """End at once."""
        self.due = 0.0
        self._stop.set()

    def run(self, lines: list[bytes], files: Files, ask: Callable[[Json, Answer | None], Reply]) -> None:
        """Go from the validation of the input file's lines to the end."""
        self._problems = find_problems(lines)
        fate = Fate("failed") if self._problems else self._fate
        asked, output, errors = round(fate.share * len(lines)), list[str](), list[str]()
        if self._wait(0.1) and (asked or fate.status != "failed"):
            self._counts["total"] = len(lines)
            self._go_on("in_progress")
            for number, line in enumerate(lines[:asked]):
                if not self._wait(0.1 + 0.8 * number / len(lines)):
                    break
                request = json.loads(line)
                reply = ask(request["body"], fate.answer)
                answered = reply.status == 200 and not reply.close
                (output if answered else errors).append(_answer_line(request["custom_id"], reply))
                self._counts |= {"completed": len(output), "failed": len(errors)}
            self._wait(0.9)
            self._go_on("finalizing")
            self._wait(1.0)
        if self._stop.is_set():
            time.sleep(max(self.due - time.monotonic(), 0))
        with self._lock:
            status = "cancelled" if self._stop.is_set() else fate.status
            if problem := _UNASKED.get(status):
                unasked = lines[len(output) + len(errors) :]
                errors += [_line(json.loads(line)["custom_id"], None, problem) for line in unasked]
            if status == "failed":
                self._problems = self._problems or [_problem(fate.problem)]
            self._write(files, fate, output, errors)
            self._enter(status)

    def _write(self, files: Files, fate: Fate, output: list[str], errors: list[str]) -> None:
        """Write the files that hold any line, in another order than was asked, for none is promised."""
        output = fate.output(output[::-1]) if fate.output else output[::-1]
        for name, lines in (("output", output), ("error", errors)):
            if lines:
                content = "".join(f"{line}\n" for line in lines).encode()
                file = files.add(f"{self.id}_{name}.jsonl", "batch_output", content)
                self._file_ids[f"{name}_file_id"] = file.id
                if fate.lost and name == "output":
                    file.delete()

    def _wait(self, part: float) -> bool:
        """Wait until this part of the delay is over; returns False, at once, when there is nothing more to do."""
        return not self._stop.wait(max(self._started + part * self._delay - time.monotonic(), 0))

    def _go_on(self, status: str) -> None:
        with self._lock:
            if not self._stop.is_set():
                self._enter(status)

    def _enter(self, status: str) -> None:
        self._status, self._times[status] = status, int(time.time())

    def _to_json(self) -> Json:
        failed = self._status == "failed"
        return {
            "id": self.id,
            "object": "batch",
            **{name: self._wanted[name] for name in ("endpoint", "input_file_id", "completion_window")},
            "errors": {"object": "list", "data": self._problems} if failed else None,
            "status": self._status,
            **self._file_ids,
            "created_at": self._created_at,
            "expires_at": self._created_at + WINDOW_SECONDS,
            **{f"{stage}_at": self._times.get(stage) for stage in _STAGES},
            "request_counts": dict(self._counts),
            "metadata": self._wanted.get("metadata"),
        }


class Batches:
    """The batches, oldest first. `ask` answers a line's body, by the batch's own way if it has one."""

    def __init__(self, files: Files, ask: Callable[[Json, Answer | None], Reply], delay: Callable[[], float]) -> None:
        self._files, self._ask, self._delay = files, ask, delay
        self._lock, self._fates = threading.Lock(), deque[Fate]()
        self._batches: dict[str, tuple[Batch, threading.Thread]] = {}

    @property
    def routes(self) -> Routes:
        """What answers which request."""
        return {
            "POST /v1/batches": self._create,
            "GET /v1/batches": self._list,
            "GET /v1/batches/{id}": self._retrieve,
            "POST /v1/batches/{id}/cancel": self._cancel,
        }

    def script(self, *fates: Fate) -> None:
        """Queue fates: each next batch takes one."""
        self._fates.extend(fates)

    def all(self) -> list[Json]:
        """Return the batches as they are now."""
        return [batch.to_json() for batch, _ in list(self._batches.values())]

    def close(self) -> None:
        """Ask no further line."""
        for batch, _ in list(self._batches.values()):
            batch.stop()

    def _create(self, request: Request) -> Reply:
        wanted = request.json()
        if (wanted.get("endpoint"), wanted.get("completion_window")) != (ENDPOINT, "24h"):
            return error(400, f"Expected the endpoint {ENDPOINT} and the completion window 24h.", param="endpoint")
        if not _is_metadata(wanted.get("metadata")):
            return error(400, "Expected at most 16 strings of 512 characters, names of 64.", param="metadata")
        file = self._files.find(str(wanted.get("input_file_id")))
        if not file or file.purpose != "batch":
            return error(400, f"Cannot find file {wanted.get('input_file_id')} for a batch.", param="file_id")
        with self._lock:
            fate = self._fates.popleft() if self._fates else Fate()
        batch = Batch(wanted, fate, self._delay() if fate.delay is None else fate.delay)
        accepted, work = batch.to_json(), (file.content.splitlines(), self._files, self._ask)
        thread = threading.Thread(target=batch.run, args=work, name=batch.id, daemon=True)
        self._batches[batch.id] = batch, thread
        thread.start()
        return Reply(body=accepted)

    def _list(self, request: Request) -> Reply:
        return page([_settled(*each) for each in reversed(list(self._batches.values()))], request, 20, 100)

    def _retrieve(self, request: Request) -> Reply:
        known = self._batches.get(request.id)
        return Reply(body=_settled(*known)) if known else _unknown(request)

    def _cancel(self, request: Request) -> Reply:
        known = self._batches.get(request.id)
        if not known:
            return _unknown(request)
        status = _settled(*known)["status"]
        cancelled = known[0].cancel()
        return Reply(body=cancelled) if cancelled else error(409, f"Cannot cancel a batch with status '{status}'.")


def _settled(batch: Batch, thread: threading.Thread) -> Json:
    """Return a batch; one whose time is over is given a second to end, so that it has ended when first looked at."""
    if time.monotonic() >= batch.due:
        thread.join(1)
    return batch.to_json()


def _unknown(request: Request) -> Reply:
    return error(404, f"No batch found with id '{request.id}'.", param="id")


def _is_metadata(metadata: object) -> bool:
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    short = all(isinstance(value, str) and len(name) <= 64 and len(value) <= 512 for name, value in pairs)
    return isinstance(metadata, dict | None) and len(pairs) <= 16 and short


def find_problems(lines: list[bytes]) -> list[Json]:
    """Return what keeps these lines of an input file from being a batch, in OpenAI's form."""
    if not 0 < len(lines) <= MAX_REQUESTS:
        return [_problem("too_many_tasks" if lines else "empty_file")]
    models, problems = dict[str, object](), list[Json]()
    for number, line in enumerate(lines, 1):
        request = read_object(line)
        if not request:
            problems.append(_problem("invalid_json_line", number))
        elif wrong := [name for name, kind in _PARAMETERS.items() if not isinstance(request.get(name), kind)]:
            problems.append(_problem("missing_required_parameter", number, wrong[0]))
        elif request["method"] != "POST":
            problems.append(_problem("invalid_method", number, "method"))
        elif request["url"] != ENDPOINT:
            problems.append(_problem("invalid_url", number, "url"))
        elif request["custom_id"] in models:
            problems.append(_problem("duplicate_custom_id", number, "custom_id"))
        elif (model := request["body"].get("model")) != next(iter(models.values()), model):
            problems.append(_problem("mismatched_model", number, "body.model"))
        else:
            models[request["custom_id"]] = model
    return problems


def _problem(code: str, line: int | None = None, param: str | None = None) -> Json:
    return {"code": code, "message": _PROBLEMS.get(code, code), "line": line, "param": param}


def _answer_line(custom_id: str, reply: Reply) -> str:
    """Return a line of the output or error file, as if the model had timed out where the connection was dropped."""
    if reply.close:
        return _line(custom_id, None, _TIMEOUT)
    return _line(custom_id, {"status_code": reply.status, "request_id": uuid.uuid4().hex, "body": reply.body}, None)


def _line(custom_id: str, response: Json | None, problem: Json | None) -> str:
    line = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": problem}
    return json.dumps(line)
