"""The stand-in's files and batches as the real OpenAI client sees them."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import openai
import pytest
from openai.types import Batch

from demo import stand_in_batches, stand_in_files
from demo.stand_in import MODEL, Fate, Reply, StandIn, completion, error
from tests.demo.test_stand_in import ROOT, body, fetch
from tests.demo.test_stand_in import client as new_client

ENDPOINT: Final = "/v1/chat/completions"
ENDS = ("completed", "failed", "expired", "cancelled")
TEXTS = [f"heart {n}, vaccine" if n % 2 else f"tumour {n}" for n in range(20)]

Line = dict[str, Any]


@pytest.fixture
def sdk(llm: StandIn) -> Iterator[openai.OpenAI]:
    """Return a client of the stand-in `llm` that never retries."""
    with new_client(llm) as client:
        yield client


def line(text: str, key: str, **changes: Any) -> Line:
    """Return one request of a batch."""
    return {"custom_id": key, "method": "POST", "url": ENDPOINT, "body": body(text, key=key)} | changes


def lines(texts: list[str] = TEXTS) -> list[Line]:
    """Return a request for each text; their keys count up in hex digits."""
    return [line(text, f"{number:02x}") for number, text in enumerate(texts)]


def upload(sdk: openai.OpenAI, requests: list[Line] | bytes, name: str = "requests.jsonl") -> str:
    """Upload the requests of a batch; return the file's id."""
    raw = requests if isinstance(requests, bytes) else b"".join(json.dumps(each).encode() + b"\n" for each in requests)
    return sdk.files.create(file=(name, raw), purpose="batch").id


def create(sdk: openai.OpenAI, file_id: str, **metadata: str) -> Batch:
    return sdk.batches.create(
        input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h", metadata=metadata or openai.omit
    )


def submit(sdk: openai.OpenAI, requests: list[Line] | bytes | None = None) -> Batch:
    """Upload requests and create a batch of them."""
    return create(sdk, upload(sdk, lines() if requests is None else requests))


def wait(
    sdk: openai.OpenAI, batch: Batch, reached: Callable[[Batch], bool] = lambda batch: batch.status in ENDS
) -> Batch:
    """Look at a batch until it has ended or got somewhere else."""
    deadline = time.monotonic() + 20
    while not reached(batch):
        assert time.monotonic() < deadline, batch
        time.sleep(0.005)
        batch = sdk.batches.retrieve(batch.id)
    return batch


def read(sdk: openai.OpenAI, file_id: str | None) -> dict[str, Line]:
    """Return a file's lines by their requests' ids, none for no file."""
    content = sdk.files.content(file_id).text if file_id else ""
    found = [json.loads(each) for each in content.splitlines()]
    assert len({each["id"] for each in found}) == len({each["custom_id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


def run(sdk: openai.OpenAI, requests: list[Line] | None = None) -> tuple[Batch, dict[str, Line], dict[str, Line]]:
    """Take a batch to its end; return it and the lines of its output and error files."""
    batch = wait(sdk, submit(sdk, requests))
    return batch, read(sdk, batch.output_file_id), read(sdk, batch.error_file_id)


def counts(batch: Batch) -> tuple[int, int, int]:
    """Return how many requests a batch has, and how many are completed and failed."""
    assert batch.request_counts
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def keys(first: int, end: int) -> set[str]:
    return {f"{number:02x}" for number in range(first, end)}


# Answers


def test_a_batch_is_answered_as_the_same_requests_online(llm: StandIn, sdk: openai.OpenAI) -> None:
    batch, output, errors = run(sdk)
    assert (batch.status, counts(batch), batch.error_file_id, errors) == ("completed", (20, 20, 0), None, {})
    for number, text in enumerate(TEXTS):
        answer = output[f"{number:02x}"]["response"]
        online = sdk.chat.completions.create(**body(text)).to_dict()
        assert (answer["status_code"], output[f"{number:02x}"]["error"]) == (200, None)
        assert answer["body"] | {"created": 0} == online | {"created": 0}
    assert {answer["response"]["body"]["model"] for answer in output.values()} == {MODEL}


def test_answers_come_in_another_order_than_the_requests(sdk: openai.OpenAI) -> None:
    _, output, _ = run(sdk)
    assert list(output) != [each["custom_id"] for each in lines()]


def test_refusals_are_those_of_online_requests() -> None:
    with StandIn(refusals=0.3) as llm, new_client(llm) as sdk:
        _, output, errors = run(sdk)
        for number, text in enumerate(TEXTS):
            online = sdk.chat.completions.create(**body(text)).choices[0].message.refusal
            assert output[f"{number:02x}"]["response"]["body"]["choices"][0]["message"]["refusal"] == online
    assert (len(output), errors) == (20, {})


def test_batches_have_errors_of_their_own_rate_and_draw_again() -> None:
    with StandIn(rate_429=1, batch_errors=0.3) as llm, new_client(llm) as sdk:
        batch, output, errors = run(sdk)
        again = [each for each in lines() if each["custom_id"] in errors]
        _, output_again, errors_again = run(sdk, again)
    assert 1 < len(errors) < 12
    assert counts(batch) == (20, len(output), len(errors))
    assert {(each["response"]["status_code"], each["error"]) for each in errors.values()} == {(500, None)}
    assert errors[min(errors)]["response"]["body"]["error"]["type"] == "server_error"
    assert set(output) | set(errors) == keys(0, 20)
    assert output_again
    assert set(output_again) | set(errors_again) == set(errors)


def test_a_body_that_is_no_chat_request_is_a_400_in_the_error_file(sdk: openai.OpenAI) -> None:
    batch, output, errors = run(sdk, [*lines(TEXTS[:2]), line("heart", "ff", body={"model": "gpt-5-mini"})])
    assert (batch.status, counts(batch), set(output)) == ("completed", (3, 2, 1), {"00", "01"})
    assert errors["ff"]["response"]["status_code"] == 400
    assert errors["ff"]["response"]["body"]["error"]["message"].startswith("Expected")


def test_a_batch_without_a_good_answer_has_no_output_file() -> None:
    with StandIn(batch_errors=1) as llm, new_client(llm) as sdk:
        batch, _, errors = run(sdk)
    assert (batch.status, batch.output_file_id, len(errors)) == ("completed", None, 20)


# The way of a batch


def test_statuses_and_their_times_follow_each_other(llm: StandIn, sdk: openai.OpenAI) -> None:
    llm.batch_delay = 2.5
    file_id, completed = upload(sdk, lines()), []
    before, started = int(time.time()), time.monotonic()
    batch = create(sdk, file_id, tagger="a1")
    statuses = [batch.status]
    assert (counts(batch), batch.input_file_id) == ((0, 0, 0), file_id)
    while batch.status not in ENDS:
        batch = sdk.batches.retrieve(batch.id)
        statuses.append(batch.status)
        completed.append(counts(batch)[1])
        assert not batch.output_file_id or batch.status == "completed"
    assert time.monotonic() - started >= 2.5
    assert list(dict.fromkeys(statuses)) == ["validating", "in_progress", "finalizing", "completed"]
    assert completed == sorted(completed)
    assert len(set(completed)) > 10
    assert batch.in_progress_at and batch.finalizing_at and batch.completed_at and batch.expires_at
    assert before <= batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.expires_at == batch.created_at + 24 * 3600
    assert (batch.endpoint, batch.completion_window, batch.object) == (ENDPOINT, "24h", "batch")
    assert (batch.metadata, batch.errors, batch.failed_at, batch.cancelled_at) == ({"tagger": "a1"}, None, None, None)


def test_a_batch_without_delay_has_ended_when_it_is_first_looked_at(sdk: openai.OpenAI) -> None:
    batch = submit(sdk)
    assert batch.status == "validating"
    assert sdk.batches.retrieve(batch.id).status == "completed"
    batch = submit(sdk)
    assert [each.status for each in sdk.batches.list()] == ["completed"] * 2


def test_a_cancelled_batch_keeps_what_was_answered(llm: StandIn, sdk: openai.OpenAI) -> None:
    llm.batch_delay = 6
    batch = wait(sdk, submit(sdk), lambda batch: counts(batch)[1] > 2)
    cancelling = sdk.batches.cancel(batch.id)
    assert (cancelling.status, sdk.batches.cancel(batch.id).status) == ("cancelling", "cancelling")
    batch = wait(sdk, batch)
    output, errors = read(sdk, batch.output_file_id), read(sdk, batch.error_file_id)
    assert (batch.status, counts(batch)) == ("cancelled", (20, len(output), 0))
    assert batch.cancelling_at and batch.cancelled_at and batch.cancelled_at >= batch.cancelling_at
    assert (set(output), set(errors)) == (keys(0, len(output)), keys(len(output), 20))
    assert {(each["response"], each["error"]["code"]) for each in errors.values()} == {(None, "batch_cancelled")}
    assert len(llm.calls) == len(output) < 20
    with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'cancelled'"):
        sdk.batches.cancel(batch.id)


def test_a_batch_that_has_ended_is_not_cancelled(sdk: openai.OpenAI) -> None:
    batch = submit(sdk)
    with pytest.raises(openai.ConflictError, match="'completed'"):
        sdk.batches.cancel(batch.id)
    assert sdk.batches.retrieve(batch.id).output_file_id


def test_the_input_file_is_not_needed_once_the_batch_is_created(llm: StandIn, sdk: openai.OpenAI) -> None:
    llm.batch_delay = 0.5
    batch = submit(sdk)
    sdk.files.delete(batch.input_file_id)
    assert len(read(sdk, wait(sdk, batch).output_file_id)) == 20


def test_newest_batches_are_listed_first_page_by_page(sdk: openai.OpenAI) -> None:
    file_id = upload(sdk, lines(TEXTS[:1]))
    ids = [create(sdk, file_id, number=str(number)).id for number in range(5)][::-1]
    first = sdk.batches.list(limit=2)
    assert ([batch.id for batch in first.data], first.has_more) == (ids[:2], True)
    last = sdk.batches.list(limit=2, after=ids[2])
    assert ([batch.id for batch in last.data], last.has_more) == (ids[3:], False)
    assert [batch.id for batch in sdk.batches.list(limit=2)] == ids
    assert [batch.metadata for batch in sdk.batches.list(limit=1).data] == [{"number": "4"}]
    assert sdk.batches.list(after=ids[-1]).data == []


def test_with_nothing_there_lists_are_empty(sdk: openai.OpenAI) -> None:
    assert (list(sdk.batches.list()), list(sdk.files.list())) == ([], [])


# What is refused


@pytest.mark.parametrize(
    ("raw", "problems"),
    [
        (b"", [("empty_file", None, None)]),
        (b'{"custom_id": "a"', [("invalid_json_line", 1, None)]),
        (b"[]\n\n\xff", [("invalid_json_line", number, None) for number in (1, 2, 3)]),
        ([line("heart", "00"), line("heart", "00")], [("duplicate_custom_id", 2, "custom_id")]),
        ([line("heart", "00"), line("heart", "01", method="GET")], [("invalid_method", 2, "method")]),
        ([line("heart", "00", url="/v1/embeddings")], [("invalid_url", 1, "url")]),
        ([{"custom_id": "00", "method": "POST", "url": ENDPOINT}], [("missing_required_parameter", 1, "body")]),
        ([line("heart", "00", custom_id=7)], [("missing_required_parameter", 1, "custom_id")]),
        (
            [line("heart", "00"), line("heart", "01", body=body("heart") | {"model": "gpt-5"})],
            [("mismatched_model", 2, "body.model")],
        ),
    ],
    ids=["empty", "cut off", "no objects", "same id", "method", "url", "no body", "id", "model"],
)
def test_a_wrong_input_file_fails_the_batch_and_asks_nothing(
    llm: StandIn, sdk: openai.OpenAI, raw: list[Line] | bytes, problems: list[Any]
) -> None:
    batch = submit(sdk, raw)
    assert batch.status == "validating"
    batch = wait(sdk, batch)
    assert batch.status == "failed"
    assert batch.failed_at and batch.errors and batch.errors.data
    assert [(each.code, each.line, each.param) for each in batch.errors.data] == problems
    assert all(each.message for each in batch.errors.data)
    assert (batch.output_file_id, batch.error_file_id, counts(batch), llm.calls) == (None, None, (0, 0, 0), [])


def test_a_batch_holds_a_limited_number_of_requests(sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stand_in_batches.MAX_REQUESTS == 50_000
    monkeypatch.setattr(stand_in_batches, "MAX_REQUESTS", 20)
    assert wait(sdk, submit(sdk, lines())).status == "completed"
    batch = wait(sdk, submit(sdk, lines([*TEXTS, "heart"])))
    assert batch.errors and batch.errors.data
    assert [each.code for each in batch.errors.data] == ["too_many_tasks"]


def test_a_file_holds_a_limited_number_of_bytes(sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stand_in_files.MAX_BYTES == 200_000_000
    monkeypatch.setattr(stand_in_files, "MAX_BYTES", 100)
    upload(sdk, b"x" * 100)
    with pytest.raises(openai.BadRequestError, match="too large"):
        upload(sdk, b"x" * 101)


@pytest.mark.parametrize(
    "changes",
    [
        {"input_file_id": "file-unknown"},
        {"input_file_id": None},
        {"endpoint": "/v1/embeddings"},
        {"completion_window": "1h"},
        {"metadata": {"name": "x" * 513}},
        {"metadata": {"x" * 65: ""}},
        {"metadata": {"name": 1}},
        {"metadata": {str(number): "" for number in range(17)}},
        {"metadata": ["name"]},
    ],
)
def test_a_wrong_batch_is_not_accepted(llm: StandIn, sdk: openai.OpenAI, changes: Any) -> None:
    request: Any = {"input_file_id": upload(sdk, lines()), "endpoint": ENDPOINT, "completion_window": "24h"} | changes
    with pytest.raises(openai.BadRequestError):
        sdk.batches.create(**request)
    assert (llm.submitted, llm.routes["POST /v1/batches"]) == ([], 1)


def test_answers_and_deleted_files_are_no_input(sdk: openai.OpenAI) -> None:
    batch = wait(sdk, submit(sdk))
    sdk.files.delete(batch.input_file_id)
    for file_id in (batch.input_file_id, batch.output_file_id):
        with pytest.raises(openai.BadRequestError, match="Cannot find file"):
            create(sdk, str(file_id))


def test_unknown_ids_are_not_found(sdk: openai.OpenAI) -> None:
    ways: list[Callable[[str], Any]] = [
        sdk.batches.retrieve,
        sdk.batches.cancel,
        sdk.files.retrieve,
        sdk.files.content,
        sdk.files.delete,
    ]
    for way in ways:
        with pytest.raises(openai.NotFoundError, match=r"No .* 'unknown'|No such File object: unknown"):
            way("unknown")


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 101}, {"limit": "x"}, {"after": "batch_unknown"}])
def test_a_wrong_page_is_refused(sdk: openai.OpenAI, query: Any) -> None:
    with pytest.raises(openai.BadRequestError):
        sdk.batches.list(**query)


def test_a_wrong_key_is_refused_on_all_routes() -> None:
    with StandIn(api_key="right") as llm, new_client(llm, "right") as right, new_client(llm, "wrong") as wrong:
        batch = wait(right, submit(right))
        ways: list[Callable[[], Any]] = [
            lambda: upload(wrong, lines()),
            lambda: wrong.files.list(),
            lambda: wrong.files.retrieve(batch.input_file_id),
            lambda: wrong.files.content(batch.input_file_id),
            lambda: wrong.files.delete(batch.input_file_id),
            lambda: create(wrong, batch.input_file_id),
            lambda: wrong.batches.list(),
            lambda: wrong.batches.retrieve(batch.id),
            lambda: wrong.batches.cancel(batch.id),
        ]
        for way in ways:
            with pytest.raises(openai.AuthenticationError):
                way()
        assert (len(llm.submitted), len(llm.files), llm.files[0].deleted) == (1, 2, False)


def test_a_server_may_have_no_batches() -> None:
    with StandIn(batches=False) as llm, new_client(llm) as sdk:
        for way in (lambda: upload(sdk, lines()), sdk.files.list, sdk.batches.list, lambda: create(sdk, "file-x")):
            with pytest.raises(openai.NotFoundError):
                way()
        assert sdk.chat.completions.create(**body("heart")).model == MODEL


# Files


@pytest.mark.parametrize(
    "content", [b"", b"\r\n", b"--\r\n--x--\r\n", "心臓\n".encode(), bytes(range(256)), b"x" * 300_000]
)
def test_a_file_comes_back_as_it_was_sent(sdk: openai.OpenAI, content: bytes) -> None:
    file = sdk.files.create(file=("tagger-1.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose, file.object) == ("tagger-1.jsonl", len(content), "batch", "file")
    assert sdk.files.retrieve(file.id) == file
    assert sdk.files.content(file.id).content == content


def test_a_file_can_be_uploaded_from_the_disk(sdk: openai.OpenAI, tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text("{}\n")
    with (tmp_path / "requests.jsonl").open("rb") as opened:
        file = sdk.files.create(file=opened, purpose="batch")
    assert (file.filename, sdk.files.content(file.id).content) == ("requests.jsonl", b"{}\n")


def test_only_jsonl_files_for_batches_are_taken(llm: StandIn, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"Must be \.jsonl"):
        upload(sdk, lines(), "requests.json")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        sdk.files.create(file=("requests.jsonl", b"{}"), purpose="assistants")
    with pytest.raises(openai.BadRequestError):
        sdk.post("/files", body={"purpose": "batch"}, cast_to=object)
    assert llm.files == []


def test_files_are_listed_newest_first_by_purpose_and_page_by_page(sdk: openai.OpenAI) -> None:
    batch = wait(sdk, submit(sdk))
    ids = [batch.input_file_id, *(upload(sdk, lines(TEXTS[:1])) for _ in range(3))]
    assert [file.id for file in sdk.files.list(purpose="batch")] == ids[::-1]
    assert [file.id for file in sdk.files.list(purpose="batch", order="asc", limit=2)] == ids
    [output] = sdk.files.list(purpose="batch_output")
    assert (output.id, output.filename) == (batch.output_file_id, f"{batch.id}_output.jsonl")
    assert {file.id for file in sdk.files.list()} == {*ids, output.id}
    page = sdk.files.list(purpose="batch", limit=2, after=ids[3])
    assert ([file.id for file in page.data], page.has_more) == ([ids[2], ids[1]], True)


def test_a_deleted_file_is_gone(llm: StandIn, sdk: openai.OpenAI) -> None:
    kept, gone = upload(sdk, lines()), upload(sdk, lines(), "gone.jsonl")
    deleted = sdk.files.delete(gone)
    assert (deleted.id, deleted.deleted, deleted.object) == (gone, True, "file")
    for way in (sdk.files.retrieve, sdk.files.content, sdk.files.delete):
        with pytest.raises(openai.NotFoundError):
            way(gone)
    assert [file.id for file in sdk.files.list()] == [kept]
    assert [(file.filename, file.deleted) for file in llm.files] == [("requests.jsonl", False), ("gone.jsonl", True)]
    assert [bool(file.content) for file in llm.files] == [True, False]


# Scripted batches


def test_a_batch_may_expire_with_half_of_its_lines_answered(llm: StandIn, sdk: openai.OpenAI) -> None:
    llm.script_batches(Fate("expired", answered=0.5))
    batch, output, errors = run(sdk)
    assert (batch.status, counts(batch)) == ("expired", (20, 10, 0))
    assert batch.expired_at
    assert (set(output), set(errors)) == (keys(0, 10), keys(10, 20))
    assert {(each["response"], each["error"]["code"]) for each in errors.values()} == {(None, "batch_expired")}
    assert len(llm.calls) == 10
    assert run(sdk)[0].status == "completed"


def test_a_batch_may_be_cancelled_by_somebody_else(llm: StandIn, sdk: openai.OpenAI) -> None:
    llm.script_batches(Fate("cancelled"), Fate("cancelled", answered=0.25))
    batch, output, errors = run(sdk)
    assert (batch.status, batch.output_file_id, len(errors)) == ("cancelled", None, 20)
    batch, output, errors = run(sdk)
    assert (batch.status, set(output), len(errors)) == ("cancelled", keys(0, 5), 15)


def test_a_batch_may_fail_its_validation(llm: StandIn, sdk: openai.OpenAI) -> None:
    llm.script_batches(Fate("failed"), Fate("failed", problem="billing_hard_limit_reached"))
    for code in ("token_limit_exceeded", "billing_hard_limit_reached"):
        batch, output, errors = run(sdk)
        assert batch.errors and batch.errors.data
        assert (batch.status, [each.code for each in batch.errors.data]) == ("failed", [code])
        assert (output, errors, counts(batch), batch.in_progress_at) == ({}, {}, (0, 0, 0), None)
    assert llm.calls == []


def test_a_batch_may_fail_with_lines_answered_and_others_nowhere(llm: StandIn, sdk: openai.OpenAI) -> None:
    llm.script_batches(Fate("failed", answered=0.5), Fate(answered=0.5))
    for status in ("failed", "completed"):
        batch, output, errors = run(sdk)
        assert (batch.status, set(output), errors, counts(batch)) == (status, keys(0, 10), {}, (20, 10, 0))


def test_a_batch_may_answer_in_its_own_way(llm: StandIn, sdk: openai.OpenAI) -> None:
    def answer(request: dict[str, Any]) -> Reply | None:
        ways = {
            "00": completion("{}"),
            "01": error(400, "Too long.", "context_length_exceeded"),
            "02": Reply(close=True),
        }
        return next((way for key, way in ways.items() if f'id="{key}"' in request["messages"][-1]["content"]), None)

    llm.script_batches(Fate(answer=answer))
    batch, output, errors = run(sdk)
    assert (set(output), set(errors), counts(batch)) == (keys(0, 20) - {"01", "02"}, {"01", "02"}, (20, 18, 2))
    assert output["00"]["response"]["body"]["choices"][0]["message"]["content"] == "{}"
    assert errors["01"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert (errors["02"]["response"], errors["02"]["error"]["code"]) == (None, "request_timeout")
    assert llm.calls_per_key(status=200) == dict.fromkeys(keys(0, 20) - {"01", "02"}, 1)


def test_the_lines_of_an_output_file_may_be_changed(llm: StandIn, sdk: openai.OpenAI) -> None:
    llm.script_batches(
        Fate(output=lambda lines: [lines[0], *lines]),
        Fate(output=lambda lines: [lines[0].replace('"custom_id": "13"', '"custom_id": "unknown"'), *lines[1:]]),
        Fate(output=lambda lines: [lines[0][:40], *lines[1:]]),
        Fate(output=lambda lines: []),
    )
    files = [wait(sdk, submit(sdk)).output_file_id for _ in range(4)]
    assert files.pop() is None
    repeated, unknown, broken = (sdk.files.content(str(file_id)).text.splitlines() for file_id in files)
    assert (len(repeated), repeated[0]) == (21, repeated[1])
    assert json.loads(unknown[0])["custom_id"] == "unknown"
    with pytest.raises(json.JSONDecodeError):
        json.loads(broken[0])
    assert len(llm.calls) == 80


def test_an_output_file_may_be_lost(llm: StandIn, sdk: openai.OpenAI) -> None:
    llm.script_batches(Fate(lost=True))
    batch = wait(sdk, submit(sdk))
    assert (batch.status, counts(batch)) == ("completed", (20, 20, 0))
    with pytest.raises(openai.NotFoundError):
        sdk.files.content(str(batch.output_file_id))


def test_a_batch_may_take_its_own_time(llm: StandIn, sdk: openai.OpenAI) -> None:
    llm.script_batches(Fate(delay=30))
    slow, quick = submit(sdk), submit(sdk)
    assert wait(sdk, quick).status == "completed"
    assert sdk.batches.retrieve(slow.id).status == "validating"


def test_each_of_many_batches_at_once_takes_one_fate(llm: StandIn) -> None:
    llm.script_batches(*[Fate("expired", answered=0.5)] * 8)
    with new_client(llm) as sdk, ThreadPoolExecutor(16) as pool:
        ended = list(pool.map(lambda _: run(sdk)[0], range(16)))
    assert sorted(batch.status for batch in ended) == ["completed"] * 8 + ["expired"] * 8
    assert len(llm.calls) == 8 * 20 + 8 * 10
    assert len(llm.submitted) == 16


# Scripted routes


@pytest.mark.parametrize("reply", [Reply(close=True), error(500, "Broken.")], ids=["dropped", "500"])
@pytest.mark.parametrize("after", [False, True])
def test_a_client_may_not_be_told_of_the_batch_it_created(
    llm: StandIn, sdk: openai.OpenAI, reply: Reply, after: bool
) -> None:
    file_id = upload(sdk, lines())
    llm.script_route("POST /v1/batches", reply, after=after)
    with pytest.raises(openai.APIConnectionError if reply.close else openai.InternalServerError):
        create(sdk, file_id, tagger="a1")
    assert [(batch.metadata, wait(sdk, batch).status) for batch in sdk.batches.list()] == (
        [({"tagger": "a1"}, "completed")] if after else []
    )
    assert create(sdk, file_id).status == "validating"
    assert (len(llm.submitted), llm.routes["POST /v1/batches"]) == (1 + after, 2)


def test_each_route_has_its_own_replies(llm: StandIn, sdk: openai.OpenAI) -> None:
    llm.script_route("GET /v1/batches/{id}", error(503, "Busy."), error(429, "Slow down."))
    llm.script_route("DELETE /v1/files/{id}", Reply(close=True), after=True)
    batch = submit(sdk)
    for problem in (openai.InternalServerError, openai.RateLimitError):
        with pytest.raises(problem):
            sdk.batches.retrieve(batch.id)
    assert sdk.batches.retrieve(batch.id).status == "completed"
    with pytest.raises(openai.APIConnectionError):
        sdk.files.delete(batch.input_file_id)
    with pytest.raises(openai.NotFoundError):
        sdk.files.delete(batch.input_file_id)


def test_replies_to_an_unknown_route_are_an_error(llm: StandIn) -> None:
    with pytest.raises(ValueError, match="found GET /v1/batches/1"):
        llm.script_route("GET /v1/batches/1", Reply())


def test_a_route_may_be_slow(sdk: openai.OpenAI, llm: StandIn) -> None:
    file_id = upload(sdk, lines())
    llm.latencies["POST /v1/batches"] = 30
    with pytest.raises(openai.APITimeoutError):
        create(sdk.with_options(timeout=0.2), file_id)
    assert len(list(sdk.batches.list())) == 1


# Counts


def test_answers_of_a_batch_are_counted_among_the_calls(llm: StandIn, sdk: openai.OpenAI) -> None:
    sdk.chat.completions.create(**body(TEXTS[0], key="00"))
    batch, output, _ = run(sdk)
    assert [call.asked for call in llm.calls] == ["online"] + ["batch"] * 20
    assert llm.calls_per_key() == dict.fromkeys(keys(0, 20), 1) | {"00": 2}
    assert [call.text for call in llm.calls[1:]] == TEXTS
    usages = [each["response"]["body"]["usage"] for each in output.values()]
    stats = fetch(llm.base_url.removesuffix("v1") + "stats")
    assert stats["completion_tokens"] > sum(usage["completion_tokens"] for usage in usages)
    assert (stats["calls"], stats["asked"], stats["max_in_flight"]) == (21, {"online": 1, "batch": 20}, 1)
    assert (stats["batches"], stats["files"], llm.submitted) == (1, 2, [batch.to_dict()])
    assert "heart" not in json.dumps(stats)


def test_each_request_is_counted_by_its_route(llm: StandIn, sdk: openai.OpenAI) -> None:
    batch = submit(sdk)
    sdk.batches.retrieve(batch.id)
    sdk.batches.list(limit=3)
    sdk.files.content(batch.input_file_id)
    with pytest.raises(openai.NotFoundError):
        sdk.batches.retrieve("unknown")
    assert llm.routes == {
        "POST /v1/files": 1,
        "POST /v1/batches": 1,
        "GET /v1/batches/{id}": 2,
        "GET /v1/batches": 1,
        "GET /v1/files/{id}/content": 1,
    }


# The server


def test_a_batch_of_many_lines_costs_little_more_than_its_answers(llm: StandIn, sdk: openai.OpenAI) -> None:
    texts = [f"heart {number}, 心臓, and a vaccine" for number in range(5000)]
    requests = [line(text, f"{number:x}") for number, text in enumerate(texts)]
    started = time.process_time()
    for request in requests:
        llm._answer_line(request["body"], None)
    answering = time.process_time() - started
    started = time.process_time()
    file_id = upload(sdk, requests)
    batch = wait(sdk, create(sdk, file_id))
    assert counts(batch) == (5000, 5000, 0)
    assert time.process_time() - started < answering + 1.5


def test_closing_ends_the_batches() -> None:
    with StandIn(batch_delay=30) as llm, new_client(llm) as sdk:
        batch = submit(sdk)
        [thread] = [thread for thread in threading.enumerate() if thread.name == batch.id]
    thread.join(5)
    assert not thread.is_alive()
    assert llm.calls == []


@pytest.mark.parametrize("options", [["--batch-errors", "1", "--batch-delay", "0.2"], ["--no-batches"]])
def test_the_command_line_has_batches_too(options: list[str]) -> None:
    command = [sys.executable, "-m", "demo.stand_in", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            sdk = openai.OpenAI(base_url=process.stdout.readline().split()[-1], api_key="any")
            if options == ["--no-batches"]:
                with pytest.raises(openai.NotFoundError):
                    sdk.batches.list()
            else:
                started = time.monotonic()
                assert counts(wait(sdk, submit(sdk))) == (20, 0, 20)
                assert time.monotonic() - started >= 0.2
            sdk.close()
        finally:
            process.terminate()
    assert process.returncode == 0


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_batch_errors_are_a_fraction(rate: float) -> None:
    with pytest.raises(ValueError, match="fractions"):
        StandIn(batch_errors=rate)
