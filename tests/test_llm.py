"""The LLM client against scripted answers at the wire: every way in which an endpoint may be odd."""

import contextlib
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import formatdate
from itertools import pairwise
from typing import Any

import pytest

from demo.processes import free_port
from demo.stand_in import MODEL, Json, Reply, Script, StandIn, completion, error, token_usage
from tagger.cache import Usage
from tagger.connections import Connection, openai_client
from tagger.dataset_files import parse_dataset
from tagger.exceptions import LLMStopped, LLMUnreachable, TaggerError, TextFailed
from tagger.llm import ASKS, LONGEST_WAIT, TRIES, Answer, Client
from tagger.request import request_options
from tagger.spec import spec_id
from tagger.throttle import LocalRates, Rates, Stopped, Throttle
from tests.project import MINIMAL, merged

KEY = "0123456789abcdef0123456789abcdef"
TEXT = "a zebra, told to nobody: klopstockwurst"
SECRET = "klopstockwurst"
AT_ONCE = {"Retry-After": "0"}

GOOD = completion('{"tags": ["animal"]}')
RATE_LIMITED = error(429, "Rate limit reached.", "rate_limit_exceeded", headers=AT_ONCE)


class Asker:
    """A client of the stand-in that notes what it spends."""

    def __init__(self, base_url: str, *, rates: Rates | None = None, **changes: Any) -> None:
        dataset = parse_dataset(merged(MINIMAL, changes), "notes.yaml")
        connection = Connection("openai_default", "openai", host=base_url, password="key")
        self.throttle = Throttle(dataset.llm.concurrency, rates)
        self.client = Client(dataset, openai_client("openai_default", lambda _: connection), self.throttle)
        self.spent: list[Usage] = []

    def ask(self, text: str = TEXT) -> Answer:
        return self.client.ask(KEY, text, self.spent.append)

    def fail(self, text: str = TEXT) -> Exception:
        with pytest.raises((TaggerError, Stopped)) as caught:
            self.ask(text)
        return caught.value


MakeAsker = Callable[..., Asker]


@pytest.fixture
def new_asker(llm: StandIn) -> Iterator[MakeAsker]:
    made: list[Asker] = []

    def new(base_url: str | None = None, **changes: Any) -> Asker:
        made.append(Asker(base_url or llm.base_url, **changes))
        return made[-1]

    yield new
    for asker in made:
        asker.throttle.stop()
        asker.client.close()


@pytest.fixture
def asker(new_asker: MakeAsker) -> Asker:
    return new_asker()


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run `work` on a thread; the list gets what it returns or raises."""
    ended: list[object] = []

    def run() -> None:
        try:
            ended.append(work())
        except Exception as e:
            ended.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, ended


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def gaps(llm: StandIn) -> list[float]:
    times = [call.time for call in llm.calls]
    return [later - earlier for earlier, later in pairwise(times)]


# Answers that are taken


def test_a_good_answer_takes_one_request(asker: Asker, llm: StandIn) -> None:
    assert asker.ask("a zebra in the rain") == Answer(["animal", "weather"], None, MODEL, "stop")
    assert len(llm.calls) == len(asker.spent) == 1


def test_the_model_is_kept_as_the_endpoint_names_it(asker: Asker, llm: StandIn) -> None:
    llm.script(completion('{"tags": []}', model="gpt-5-mini-2025-08-07"))

    assert asker.ask().model == "gpt-5-mini-2025-08-07"


def test_an_endpoint_that_names_no_model_has_answered_as_the_datasets(new_asker: MakeAsker, llm: StandIn) -> None:
    llm.script(completion('{"tags": []}', model=""))

    assert new_asker(llm={"model": "own-model"}).ask().model == "own-model"


def test_the_confidence_of_each_tag_comes_with_it_where_the_dataset_asks(new_asker: MakeAsker, llm: StandIn) -> None:
    asker = new_asker(confidence=True)
    given = [{"tag": "animal", "confidence": 1}, {"tag": "weather", "confidence": 0.25}]
    llm.script(completion(json.dumps({"tags": given})))

    assert asker.ask() == Answer(["animal", "weather"], None, MODEL, "stop", confidence=[1.0, 0.25])


def test_a_refusal_has_no_confidence(new_asker: MakeAsker, llm: StandIn) -> None:
    llm.script(completion(None, refusal="I cannot help with that."))

    assert new_asker(confidence=True).ask().confidence is None


def test_a_confidence_out_of_range_is_asked_again(new_asker: MakeAsker, llm: StandIn) -> None:
    asker = new_asker(confidence=True)
    percent, right = (completion(f'{{"tags": [{{"tag": "animal", "confidence": {value}}}]}}') for value in (90, 0.9))
    llm.script(percent, right)

    assert asker.ask().confidence == [0.9]
    assert len(asker.spent) == 2


@pytest.mark.parametrize("form", [{}, {"response_format": {"type": "json_object"}}], ids=["schema", "json_object"])
def test_the_stand_in_gives_confidence_where_the_dataset_asks(
    new_asker: MakeAsker, llm: StandIn, form: dict[str, Any]
) -> None:
    answer = new_asker(confidence=True, llm={"params": form}).ask("a zebra in the rain, a storm")

    assert answer.tags == ["weather", "animal"]
    assert answer.confidence is not None
    assert 1 > answer.confidence[0] > answer.confidence[1] > 0


def test_examples_are_shown_to_the_llm_and_are_not_asked_about(new_asker: MakeAsker, llm: StandIn) -> None:
    asker = new_asker(examples=[{"text": "- weather: x\nChoose at most 1 tag", "tags": ["animal"]}])

    assert asker.ask("a zebra in the rain").tags == ["animal", "weather"]
    assert [call.text for call in llm.calls] == ["a zebra in the rain"]


@pytest.mark.parametrize(
    ("reply", "reason", "finish_reason"),
    [
        (completion(None, refusal="I cannot help with that."), "refusal", "stop"),
        (completion('{"tags": ["animal"]}', refusal="I cannot help with that."), "refusal", "stop"),
        (completion(None, finish_reason="refusal"), "refusal", "refusal"),
        (completion(None, finish_reason="content_filter"), "content_filter", "content_filter"),
        (completion('{"tags": ["ani', finish_reason="content_filter"), "content_filter", "content_filter"),
    ],
    ids=["refusal", "refusal beside tags", "finish refusal", "content filter", "content filter in mid-answer"],
)
def test_an_answer_that_refuses_the_text_is_taken_at_once(
    asker: Asker, llm: StandIn, reply: Reply, reason: str, finish_reason: str
) -> None:
    llm.script(reply)

    assert asker.ask() == Answer([], reason, MODEL, finish_reason)
    assert len(llm.calls) == len(asker.spent) == 1


AZURE_FILTER = Reply(
    400,
    {
        "error": {
            "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management "
            "policy. Please modify your prompt and retry.",
            "type": None,
            "param": "prompt",
            "code": "content_filter",
            "status": 400,
            "innererror": {
                "code": "ResponsibleAIPolicyViolation",
                "content_filter_result": {"violence": {"filtered": True, "severity": "high"}},
            },
        }
    },
)
VLLM_TOO_LONG = {
    "object": "error",
    "message": "This model's maximum context length is 4096 tokens. However, you requested 9001 tokens.",
    "type": "BadRequestError",
    "param": None,
    "code": 400,
}
LLAMA_CPP_TOO_LONG = {
    "error": {
        "code": 400,
        "message": "request (9001 tokens) exceeds the available context size (4096 tokens), try increasing it",
        "type": "exceed_context_size_error",
        "n_prompt_tokens": 9001,
        "n_ctx": 4096,
    }
}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (AZURE_FILTER, "content_filter"),
        (error(400, "Your input is too long.", "context_length_exceeded", param="messages"), "context_length"),
        (Reply(400, VLLM_TOO_LONG), "context_length"),
        (Reply(400, LLAMA_CPP_TOO_LONG), "context_length"),
        (error(413, "Request entity too large"), "context_length"),
    ],
    ids=["Azure content filter", "OpenAI too long", "vLLM too long", "llama.cpp too long", "HTTP 413"],
)
def test_an_error_that_would_come_back_for_this_text_is_a_refusal(
    asker: Asker, llm: StandIn, reply: Reply, reason: str
) -> None:
    llm.script(reply)

    answer = asker.ask()

    assert (answer.tags, answer.reason) == ([], reason)
    assert len(llm.calls) == len(asker.spent) == 1
    assert asker.ask("a zebra").tags == ["animal"]


# Answers that are asked for again


def test_an_answer_cut_off_is_asked_for_again(asker: Asker, llm: StandIn) -> None:
    llm.script(completion('{"tags": ["ani', finish_reason="length"), GOOD)

    assert asker.ask().tags == ["animal"]
    assert len(llm.calls) == 2


def test_a_text_whose_answer_is_cut_off_each_time_is_refused(asker: Asker, llm: StandIn) -> None:
    llm.script(*[completion('{"tags": ["ani', finish_reason="length")] * 5)

    assert asker.ask() == Answer([], "length", MODEL, "length")
    assert len(llm.calls) == len(asker.spent) == ASKS == 3


BAD_ANSWERS = {
    "unknown tag": '{"tags": ["vegetable"]}',
    "duplicate": '{"tags": ["animal", "animal"]}',
    "too many": '{"tags": ["animal", "fruit", "weather"]}',
    "broken JSON": '{"tags": ["animal"',
    "prose": "It is about an animal.",
    "no content": None,
}


@pytest.mark.parametrize("content", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_a_bad_answer_is_asked_for_again_at_most_twice(asker: Asker, llm: StandIn, content: str | None) -> None:
    llm.script(*[completion(content)] * 5)

    failure = asker.fail()

    assert isinstance(failure, TextFailed)
    assert failure.kind == "bad_answer"
    assert len(llm.calls) == len(asker.spent) == ASKS


@pytest.mark.parametrize("content", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_a_good_second_answer_counts_the_usage_of_both(asker: Asker, llm: StandIn, content: str | None) -> None:
    llm.script(
        completion(content, usage=token_usage(100, 7, 64)),
        completion('{"tags": ["animal"]}', usage=token_usage(100, 5)),
    )

    assert asker.ask().tags == ["animal"]
    assert asker.spent == [Usage(input=100, cached_input=64, output=7), Usage(input=100, output=5)]


def test_an_empty_answer_is_bad_where_a_tag_is_required(new_asker: MakeAsker, llm: StandIn) -> None:
    llm.script(completion('{"tags": []}'), GOOD)

    assert new_asker(allow_none=False).ask().tags == ["animal"]
    assert len(llm.calls) == 2


# Calls that are made again


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_a_passing_error_is_tried_again(asker: Asker, llm: StandIn, status: int) -> None:
    llm.script(Reply(status, b"<html>busy</html>", AT_ONCE), GOOD)

    assert asker.ask().tags == ["animal"]
    assert [call.status for call in llm.calls] == [status, 200]
    assert len(asker.spent) == 2


def test_tries_are_bounded_and_all_ours(asker: Asker, llm: StandIn) -> None:
    llm.script(*[error(500, "Busy.", headers=AT_ONCE)] * 100)

    failure = asker.fail()

    assert isinstance(failure, TextFailed)
    assert failure.kind == "server_error"
    assert len(llm.calls) == len(asker.spent) == TRIES


BUSY = [429, 503]


def busy(status: int, retry_after: str) -> Reply:
    return error(status, "Busy.", headers={"Retry-After": retry_after})


@pytest.mark.parametrize("status", BUSY)
def test_retry_after_in_seconds_is_obeyed(asker: Asker, llm: StandIn, status: int) -> None:
    llm.script(busy(status, "1"), GOOD)

    asker.ask()

    assert 0.9 <= gaps(llm)[0] < 5.0


@pytest.mark.parametrize("status", BUSY)
def test_retry_after_as_a_date_is_obeyed(asker: Asker, llm: StandIn, status: int) -> None:
    until = int(time.time()) + 2
    llm.script(busy(status, formatdate(until, usegmt=True)), GOOD)

    asker.ask()

    assert until <= llm.calls[1].time < until + 5


@pytest.mark.parametrize("status", BUSY)
def test_without_retry_after_the_client_pauses(asker: Asker, llm: StandIn, status: int) -> None:
    llm.script(error(status, "Busy."), GOOD)

    assert asker.ask().tags == ["animal"]
    assert 0.9 <= gaps(llm)[0] < 5.0


@pytest.mark.parametrize("status", BUSY)
@pytest.mark.parametrize("header", ["Wed, 21 Oct 2015 07:28:00 GMT", "-5", "0.0"])
def test_a_retry_after_in_the_past_is_no_pause(asker: Asker, llm: StandIn, header: str, status: int) -> None:
    llm.script(busy(status, header), GOOD)

    assert asker.ask().tags == ["animal"]
    assert gaps(llm)[0] < 0.9


@pytest.mark.parametrize("status", BUSY)
@pytest.mark.parametrize("header", ["soon", "nan", "Mon, 01 Jan 0001 00:00:00"])
def test_a_retry_after_that_says_nothing_is_passed_over(asker: Asker, llm: StandIn, header: str, status: int) -> None:
    llm.script(busy(status, header), GOOD)

    assert asker.ask().tags == ["animal"]


TOO_LONG = [f"{LONGEST_WAIT + 1:g}", "86400", "inf"]


@pytest.mark.parametrize("header", TOO_LONG)
def test_a_pause_too_long_leaves_the_text_to_the_next_run(asker: Asker, llm: StandIn, header: str) -> None:
    llm.script(busy(503, header))

    failure = asker.fail()

    assert isinstance(failure, TextFailed)
    assert failure.kind == "server_error"
    assert len(llm.calls) == len(asker.spent) == 1
    assert asker.ask("a zebra").tags == ["animal"]


def test_a_dropped_connection_is_tried_again(asker: Asker, llm: StandIn) -> None:
    llm.script(Reply(close=True), GOOD)

    assert asker.ask().tags == ["animal"]
    assert len(llm.calls) == len(asker.spent) == 2


def test_an_answer_that_does_not_come_in_time_is_tried_again(new_asker: MakeAsker, llm: StandIn) -> None:
    llm.script(replace(GOOD, delay=2.0), GOOD)
    asker = new_asker(llm={"params": {"timeout": 0.3}})

    assert asker.ask().tags == ["animal"]
    assert len(llm.calls) == len(asker.spent) == 2


def test_a_text_that_times_out_at_every_try_fails(
    new_asker: MakeAsker, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.llm.TRIES_AFTER_TIMEOUT", 1)
    llm.script(replace(GOOD, delay=2.0))

    failure = new_asker(llm={"params": {"timeout": 0.2}}).fail()

    assert isinstance(failure, TextFailed)
    assert failure.kind == "timeout"


def test_asks_and_tries_have_one_bound_each(asker: Asker, llm: StandIn) -> None:
    bad = completion('{"tags": ["vegetable"]}')
    llm.script(RATE_LIMITED, bad, RATE_LIMITED, bad, RATE_LIMITED, GOOD)

    assert asker.ask().tags == ["animal"]
    assert len(llm.calls) == len(asker.spent) == 6


# HTTP 429: no try of a text, but a worker that goes slower


def test_a_429_is_no_try_of_its_text(asker: Asker, llm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.throttle.LONGEST_PAUSE", 0.01)
    llm.script(*[RATE_LIMITED] * (3 * TRIES), GOOD)

    assert asker.ask().tags == ["animal"]
    assert len(llm.calls) == len(asker.spent) == 3 * TRIES + 1


def test_429s_between_them_leave_a_texts_tries_bounded(
    asker: Asker, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.throttle.LONGEST_PAUSE", 0.01)
    llm.script(*[RATE_LIMITED, error(500, "Broken.", headers=AT_ONCE)] * 100)

    failure = asker.fail()

    assert isinstance(failure, TextFailed)
    assert [call.status for call in llm.calls] == [429, 500] * TRIES


@pytest.mark.parametrize("header", [f"{LONGEST_WAIT:g}", "1"])
def test_one_429_holds_up_the_other_texts_too(asker: Asker, llm: StandIn, header: str) -> None:
    llm.script(busy(429, header))
    in_thread(asker.ask)
    wait_until(lambda: len(asker.spent) == 1)
    asked_at = time.time()
    thread, ended = in_thread(lambda: asker.ask("a zebra"))

    if header == "1":
        thread.join(20)
        assert llm.calls[1].time - llm.calls[0].time >= 0.9
    else:
        time.sleep(0.5)
        assert (ended, len(llm.calls)) == ([], 1)
    assert asked_at - llm.calls[0].time < 0.9


@pytest.mark.parametrize("header", TOO_LONG)
def test_a_pause_too_long_for_all_texts_stops_the_run(asker: Asker, llm: StandIn, header: str) -> None:
    asker.ask("a zebra")
    llm.script(busy(429, header))

    failure = asker.fail()

    assert isinstance(failure, LLMStopped)
    assert failure.exit_code == 1
    assert "over its rate" in str(failure)
    assert asker.fail("a horse") is failure
    assert len(llm.calls) == len(asker.spent) == 2


def test_nothing_but_429s_for_long_stops_the_run(asker: Asker, llm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.throttle.GIVE_UP_SECONDS", 0.5)
    llm.rate_429, llm.retry_after = 1.0, 0.1

    failure = asker.fail()

    assert isinstance(failure, LLMStopped)
    assert "429" in str(failure)
    assert 3 <= len(llm.calls) == len(asker.spent)
    assert asker.fail("a horse") is failure


def test_other_answers_than_429_are_no_reason_to_stop(
    asker: Asker, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.throttle.GIVE_UP_SECONDS", 0.5)
    refused = error(400, "Your input is too long.", "context_length_exceeded", param="messages")
    llm.script(*[busy(429, "0.4"), refused] * 3)

    assert [asker.ask().reason for _ in range(3)] == ["context_length"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("retry_after", [None, 0.05], ids=["no Retry-After", "Retry-After"])
def test_every_text_is_answered_though_half_of_all_calls_are_429s_for_a_while(
    new_asker: MakeAsker, llm: StandIn, monkeypatch: pytest.MonkeyPatch, retry_after: float | None
) -> None:
    monkeypatch.setattr("tagger.throttle.SHORTEST_PAUSE", 0.05)
    monkeypatch.setattr("tagger.throttle.LONGEST_PAUSE", 0.2)
    llm.rate_429, llm.retry_after, llm.latency = 0.5, retry_after, 0.02
    asker = new_asker()
    texts = [f"apple number {number}" for number in range(400)]
    over = threading.Timer(5.0, lambda: setattr(llm, "rate_429", 0.0))
    over.start()

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(asker.ask, texts))
    over.cancel()

    by_status = llm.stats()["by_status"]
    assert [answer.tags for answer in answers] == [["fruit"]] * len(texts)
    assert by_status["200"] == len(texts)
    assert 10 <= by_status["429"] == len(llm.calls) - len(texts)
    assert len(asker.spent) == len(llm.calls)
    assert llm.max_in_flight <= 8


# Rates


class Counted:
    """Rates that let all calls start, and note what they are told."""

    def __init__(self) -> None:
        self.reserved: list[float] = []
        self.settled: list[float] = []

    def reserve(self, tokens: float) -> float:
        self.reserved.append(tokens)
        return 0.0

    def settle(self, tokens: float) -> None:
        self.settled.append(tokens)


def test_what_was_reserved_and_settled_is_what_was_used(new_asker: MakeAsker, llm: StandIn) -> None:
    rates = Counted()
    asker = new_asker(rates=rates)
    llm.script(
        completion("?", usage=token_usage(700, 7)),
        completion('{"tags": ["animal"]}', usage=token_usage(900, 3, cached=800)),
        RATE_LIMITED,
        completion('{"tags": ["animal"]}', usage=token_usage(50, 3)),
    )

    asker.ask()
    used_before_429 = sum(rates.reserved) + sum(rates.settled)
    asker.ask("a zebra")

    assert used_before_429 == pytest.approx(707 + 903)
    assert len(rates.reserved) == len(llm.calls) == 4


def test_a_first_call_is_expected_to_take_as_many_tokens_as_it_is_long(new_asker: MakeAsker) -> None:
    short, long = Counted(), Counted()
    new_asker(rates=short).ask("a zebra")
    new_asker(rates=long).ask("a zebra " * 1000)

    assert 2000 <= long.reserved[0] - short.reserved[0] <= 8000
    assert 50 <= short.reserved[0] <= 2000


def test_later_calls_are_expected_to_be_like_those_before(new_asker: MakeAsker, llm: StandIn) -> None:
    rates = Counted()
    asker = new_asker(rates=rates)
    llm.script(*[completion('{"tags": []}', usage=token_usage(tokens, 0)) for tokens in (100, 300)])
    for _ in range(3):
        asker.ask()

    assert rates.reserved[1:] == [100, 200]


def test_an_answer_without_usage_keeps_what_was_reserved_for_it(new_asker: MakeAsker, llm: StandIn) -> None:
    rates = Counted()
    asker = new_asker(rates=rates)
    llm.script(*[with_body(usage=None)] * 2)
    for _ in range(2):
        asker.ask()

    assert sum(rates.reserved) + sum(rates.settled) >= 100
    assert rates.reserved[1] >= 50


def test_each_call_counts_as_a_request_whatever_comes_of_it(new_asker: MakeAsker, llm: StandIn) -> None:
    rates = Counted()
    asker = new_asker(rates=rates)
    llm.script(RATE_LIMITED, error(500, "Broken.", headers=AT_ONCE), completion("?"), GOOD)

    asker.ask()

    assert len(rates.reserved) == len(llm.calls) == 4


@pytest.mark.slow
def test_600_requests_a_minute_reach_the_endpoint_at_about_10_a_second(new_asker: MakeAsker, llm: StandIn) -> None:
    asker = new_asker(rates=LocalRates(600, None))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(asker.ask, [f"apple {number}" for number in range(40)]))

    times = sorted(call.time for call in llm.calls)
    assert len(times) == 40
    # ten at once, then one each 0.1 s
    assert 2.5 <= times[-1] - times[0] < 10


# Answers of a wrong shape


def with_body(**changes: Any) -> Reply:
    assert isinstance(GOOD.body, dict)
    return Reply(body={**GOOD.body, **changes})


def with_choice(choice: Any) -> Reply:
    return with_body(choices=[choice])


MESSAGE = {"role": "assistant", "content": '{"tags": ["animal"]}'}

NO_COMPLETIONS = {
    "no JSON": Reply(body=b"{not json"),
    "empty": Reply(body=b""),
    "no UTF-8": Reply(body=b"\xff\xfe\x00"),
    "a page": Reply(body=b"<html>Sign in</html>", headers={"Content-Type": "text/html"}),
    "plain text": Reply(body=b"upstream is busy", headers={"Content-Type": "text/plain"}),
    "a list": Reply(body=b"[]"),
    "a string": Reply(body=b'"busy"'),
    "null": Reply(body=b"null"),
    "no fields": Reply(body=b"{}"),
    "an error under 200": Reply(body={"error": {"message": "busy", "code": 502}}),
    "no choices": with_body(choices=[]),
    "choices null": with_body(choices=None),
    "choices a string": with_body(choices="animal"),
    "a choice null": with_choice(None),
    "a choice a string": with_choice("animal"),
    "no message": with_choice({"index": 0, "finish_reason": "stop"}),
    "message null": with_choice({"index": 0, "finish_reason": "stop", "message": None}),
    "message a string": with_choice({"index": 0, "finish_reason": "stop", "message": "animal"}),
    "empty message": with_choice({"index": 0, "finish_reason": "stop", "message": {}}),
    "deeply nested": Reply(body=b'{"choices":' * 50_000),
    "content a list": with_choice({"index": 0, "finish_reason": "stop", "message": {**MESSAGE, "content": [1]}}),
    "content a number": with_choice({"index": 0, "finish_reason": "stop", "message": {**MESSAGE, "content": 1}}),
}


@pytest.mark.parametrize("reply", NO_COMPLETIONS.values(), ids=NO_COMPLETIONS.keys())
def test_an_answer_that_is_no_completion_fails_its_text_only(asker: Asker, llm: StandIn, reply: Reply) -> None:
    llm.script(*[reply] * ASKS)

    failure = asker.fail()

    assert isinstance(failure, TextFailed)
    assert failure.kind in ("bad_response", "bad_answer")
    assert len(llm.calls) == len(asker.spent) <= ASKS


@pytest.mark.parametrize(
    "choice",
    [
        {"index": 0, "finish_reason": "stop", "message": {"content": '{"tags": ["animal"]}'}},
        {"index": 0, "finish_reason": None, "message": MESSAGE},
        {"message": MESSAGE},
        {"index": 0, "finish_reason": "eos", "message": {**MESSAGE, "refusal": ""}},
    ],
    ids=["bare message", "no finish reason yet", "message alone", "own finish reason"],
)
def test_an_answer_with_less_than_openai_sends_is_taken(asker: Asker, llm: StandIn, choice: Json) -> None:
    llm.script(with_choice(choice))

    assert asker.ask().tags == ["animal"]


@pytest.mark.parametrize("word", ["a\x00b", "\ud800", "x" * 5000, ["stop"], 7])
def test_words_that_no_table_takes_are_not_recorded(asker: Asker, llm: StandIn, word: Any) -> None:
    llm.script(with_body(model=word, choices=[{"index": 0, "finish_reason": word, "message": MESSAGE}]))

    answer = asker.ask()

    assert (answer.tags, answer.model, answer.finish_reason) == (["animal"], MODEL, "unknown")


@pytest.mark.parametrize(
    ("usage", "spent"),
    [
        (None, Usage()),
        ({}, Usage()),
        ({"prompt_tokens": 7, "completion_tokens": 2}, Usage(input=7, output=2)),
        ({"prompt_tokens": 7}, Usage(input=7)),
        ({"prompt_tokens": 7, "completion_tokens": None, "total_tokens": 7}, Usage(input=7)),
        ({**token_usage(7, 2), "prompt_tokens_details": None}, Usage(input=7, output=2)),
        ({**token_usage(7, 2), "prompt_tokens_details": {}}, Usage(input=7, output=2)),
        ({**token_usage(7, 2), "prompt_tokens_details": {"cached_tokens": None}}, Usage(input=7, output=2)),
        (token_usage(7, 2, 5), Usage(input=7, cached_input=5, output=2)),
        ("unknown", Usage()),
        ({"prompt_tokens": -5, "completion_tokens": 2}, Usage()),
        ({"prompt_tokens": 10**30, "completion_tokens": 2}, Usage()),
        ({"prompt_tokens": 1e308, "completion_tokens": float("nan")}, Usage()),
        (token_usage(7, 2, 50), Usage(input=7, cached_input=7, output=2)),
    ],
)
def test_the_usage_is_taken_as_far_as_it_is_told(asker: Asker, llm: StandIn, usage: Any, spent: Usage) -> None:
    llm.script(Reply(body=json.dumps(with_body(usage=usage).body).encode()))

    assert asker.ask().tags == ["animal"]
    assert asker.spent == [spent]


def test_an_answer_without_usage_is_taken(asker: Asker, llm: StandIn) -> None:
    assert isinstance(GOOD.body, dict)
    llm.script(Reply(body={name: value for name, value in GOOD.body.items() if name != "usage"}))

    assert asker.ask().tags == ["animal"]
    assert asker.spent == [Usage()]


def test_an_error_about_one_text_fails_that_text_only(asker: Asker, llm: StandIn) -> None:
    llm.script(error(400, "Invalid character.", "invalid_value", param="messages"))

    failure = asker.fail()

    assert isinstance(failure, TextFailed)
    assert (failure.kind, len(llm.calls)) == ("rejected", 1)
    assert asker.ask("a zebra").tags == ["animal"]


# Errors that stop all calls

SCHEMA_SETTING = "llm.params: {response_format: "

STOPPING = {
    "wrong key": (error(401, "Incorrect API key provided.", "invalid_api_key"), "API key"),
    "no rights": (error(403, "Project has no access.", "permission_denied"), "API key"),
    "unknown model": (error(404, "The model does not exist.", "model_not_found"), MODEL),
    "no such path": (Reply(404, b"<html>not here</html>"), "chat completions"),
    "unknown model as 400": (error(400, "The model does not exist.", "model_not_found", param="model"), MODEL),
    "schema by its name": (error(400, "Unknown response type.", param="response_format"), SCHEMA_SETTING),
    "schema in words": (error(400, "'json_schema' is not supported with this model."), SCHEMA_SETTING),
    "schema as 422": (error(422, "response_format.type must be json_object"), SCHEMA_SETTING),
    "strict schema": (
        error(400, "Invalid schema for response_format 'tags': 'enum' is not permitted.", "invalid_json_schema"),
        SCHEMA_SETTING,
    ),
    "quota": (error(429, "You exceeded your current quota.", "insufficient_quota", headers=AT_ONCE), "quota"),
    "billing": (error(429, "Billing hard limit has been reached.", headers=AT_ONCE), "quota"),
    "parameter": (
        error(400, "'temperature' is not supported.", "unsupported_parameter", param="temperature"),
        "`temperature`",
    ),
    "value": (
        error(400, "'temperature' does not support 0.2.", "unsupported_value", param="temperature"),
        "llm.params",
    ),
    "unknown parameter": (
        error(400, "Unknown parameter: 'temperature'.", "unknown_parameter", param="temperature"),
        "llm.params",
    ),
}


@pytest.mark.parametrize(("reply", "named"), STOPPING.values(), ids=STOPPING.keys())
def test_an_error_that_all_texts_would_get_stops_at_the_start(
    asker: Asker, llm: StandIn, reply: Reply, named: str
) -> None:
    llm.script(reply)

    failure = asker.fail()

    assert isinstance(failure, LLMStopped)
    assert failure.exit_code == 2
    assert named in str(failure)
    assert "\n" not in str(failure)
    assert len(llm.calls) == len(asker.spent) == 1


@pytest.mark.parametrize("name", ["wrong key", "unknown model", "schema by its name", "quota", "parameter"])
def test_no_call_is_made_after_the_one_that_stopped(asker: Asker, llm: StandIn, name: str) -> None:
    llm.script(STOPPING[name][0])
    first = asker.fail()

    assert asker.fail("a zebra") is first
    assert asker.client.stopped_by is first
    assert len(llm.calls) == 1


@pytest.mark.parametrize("name", ["wrong key", "unknown model", "quota"])
def test_after_an_answer_it_is_no_longer_the_start(asker: Asker, llm: StandIn, name: str) -> None:
    llm.script(GOOD, STOPPING[name][0])
    asker.ask()

    failure = asker.fail()

    assert isinstance(failure, LLMStopped)
    assert failure.exit_code == 1


def test_the_message_names_the_endpoint_without_its_secrets(new_asker: MakeAsker, llm: StandIn) -> None:
    llm.script(STOPPING["wrong key"][0])
    asker = new_asker(llm.base_url.replace("http://", "http://user:pass-in-url@"))

    message = str(asker.fail())

    assert f"127.0.0.1:{llm.port}" in message
    assert "pass-in-url" not in message


@pytest.mark.parametrize("status", BUSY)
def test_a_wrong_key_stops_calls_that_wait_to_be_made_again(asker: Asker, llm: StandIn, status: int) -> None:
    # both calls are in flight before one is told to wait
    llm.script(replace(busy(status, "60"), delay=2.0), replace(STOPPING["wrong key"][0], delay=3.0))
    both = [in_thread(asker.ask), in_thread(lambda: asker.ask("a zebra"))]

    for thread, _ in both:
        thread.join(10)

    ends = [end for _, ended in both for end in ended]
    assert len(ends) == len(llm.calls) == 2
    assert asker.client.stopped_by in ends
    assert all(isinstance(end, (LLMStopped, Stopped)) for end in ends)


def test_an_endpoint_that_never_answered_stops_the_run(new_asker: MakeAsker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.llm.TRIES_AT_START", 2)
    asker = new_asker(f"http://127.0.0.1:{free_port()}/v1")

    failure = asker.fail()

    assert isinstance(failure, LLMUnreachable)
    assert failure.exit_code == 2
    assert len(asker.spent) == 2


def test_an_endpoint_that_went_away_fails_the_text_only(
    asker: Asker, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.llm.TRIES", 2)
    asker.ask()
    llm.script(*[Reply(close=True)] * 2)

    failure = asker.fail()

    assert isinstance(failure, TextFailed)
    assert failure.kind == "connection"
    assert asker.ask("a zebra").tags == ["animal"]


def test_the_stand_in_does_not_pass_for_a_real_model(new_asker: MakeAsker, llm: StandIn) -> None:
    asker = new_asker(llm={"model": "gpt-5-mini"})

    failure = asker.fail()

    assert isinstance(failure, LLMStopped)
    assert failure.exit_code == 2
    assert "gpt-5-mini" in str(failure)
    assert asker.fail("a zebra") is failure
    assert len(llm.calls) == 1


# Requests


def requests_of(llm: StandIn, *replies: Reply) -> list[Json]:
    """Script `replies`, and return the list that gets the requests they answer."""
    seen: list[Json] = []

    def answering(reply: Reply) -> Script:
        def answer(request: Json) -> Reply:
            seen.append(request)
            return reply

        return answer

    llm.script(*map(answering, replies))
    return seen


def test_a_request_holds_the_schema_and_the_params(new_asker: MakeAsker, llm: StandIn) -> None:
    seen = requests_of(llm, GOOD)

    new_asker(llm={"params": {"temperature": 0, "reasoning_effort": "low"}}).ask()

    assert seen[0]["response_format"]["json_schema"]["strict"] is True
    assert (seen[0]["model"], seen[0]["temperature"], seen[0]["reasoning_effort"]) == (MODEL, 0, "low")
    assert seen[0]["messages"][-1]["content"] == f'<text id="{KEY}">\n{TEXT}\n</text id="{KEY}">'


@pytest.mark.parametrize("params", [{"top_k": 5}, {"extra_body": {"top_k": 5}}])
def test_a_param_of_the_servers_own_is_passed_through(
    new_asker: MakeAsker, llm: StandIn, params: dict[str, Any]
) -> None:
    seen = requests_of(llm, GOOD)

    assert new_asker(llm={"params": params}).ask().tags == ["animal"]
    assert seen[0]["top_k"] == 5


def test_json_object_can_be_asked_for_instead_of_a_schema(new_asker: MakeAsker, llm: StandIn) -> None:
    seen = requests_of(llm, GOOD)
    asker = new_asker(llm={"params": {"response_format": {"type": "json_object"}}})

    assert asker.ask().tags == ["animal"]
    assert asker.ask("a zebra in the rain").tags == ["animal", "weather"]
    assert seen[0]["response_format"] == {"type": "json_object"}


OPENAI = ["https://api.openai.com/v1", "https://eu.api.openai.com/v1", None]
OTHERS = [
    "http://127.0.0.1:8000/v1",
    "https://openrouter.ai/api/v1",
    "https://example.openai.azure.com/openai/v1/",  # it refuses the parameter for models that are not OpenAI's
    "https://api.openai.com.example.com/v1",
    "https://notopenai.com/v1",
]


def options_for(base_url: str | None, **params: Any) -> Json:
    connection = Connection("openai_default", "openai", host=base_url, password="key")
    dataset = parse_dataset(merged(MINIMAL, {"llm": {"params": params}}), "notes.yaml")
    with openai_client("openai_default", lambda _: connection) as client:
        return request_options(client, dataset)


@pytest.mark.parametrize("base_url", OPENAI)
def test_openai_is_told_which_requests_have_the_same_beginning(base_url: str | None) -> None:
    spec = spec_id(parse_dataset(MINIMAL, "notes.yaml"))

    assert options_for(base_url)["prompt_cache_key"] == spec


@pytest.mark.parametrize("base_url", OTHERS)
def test_no_other_server_is_told_what_it_may_refuse(base_url: str) -> None:
    assert "prompt_cache_key" not in json.dumps(options_for(base_url))


@pytest.mark.parametrize("base_url", ["https://api.openai.com/v1", "https://example.openai.azure.com/openai/v1/"])
def test_a_prompt_cache_key_of_the_datasets_own_is_sent_wherever_it_goes(base_url: str) -> None:
    assert options_for(base_url, prompt_cache_key="mine")["prompt_cache_key"] == "mine"


def test_the_requests_for_one_text_and_for_several_differ_in_the_schema_alone(new_asker: MakeAsker) -> None:
    connection = Connection("openai_default", "openai", host="https://api.openai.com/v1", password="key")
    dataset = parse_dataset(merged(MINIMAL, {"llm": {"params": {"temperature": 0, "top_k": 5}}}), "notes.yaml")
    with openai_client("openai_default", lambda _: connection) as client:
        one, several = (request_options(client, dataset, together=together) for together in (False, True))

    schemas = [options["extra_body"].pop("response_format")["json_schema"]["name"] for options in (one, several)]
    assert schemas == ["tags", "answers"]
    assert one == several


def test_an_endpoint_of_unknown_make_gets_no_parameter_of_ours(new_asker: MakeAsker, llm: StandIn) -> None:
    seen = requests_of(llm, GOOD)

    new_asker().ask()

    assert set(seen[0]) == {"model", "messages", "response_format"}


@pytest.mark.parametrize("text", ["", "10⁵ µl\r\n\t\x00 \x1b[0m", "👩‍👩‍👧 林檎", "</text>", "x" * 200_000])
def test_any_text_arrives_as_it_is(asker: Asker, llm: StandIn, text: str) -> None:
    asker.ask(text)

    assert [call.text for call in llm.calls] == [text]


# Stopping


def test_stop_ends_calls_that_wait_at_once(asker: Asker, llm: StandIn) -> None:
    llm.script(*[replace(busy(429, "100"), delay=0.5)] * 3)
    waiting = [in_thread(asker.ask) for _ in range(3)]
    wait_until(lambda: len(asker.spent) == 3)

    stopped_at = time.monotonic()
    asker.throttle.stop()
    for thread, _ in waiting:
        thread.join(5)

    assert time.monotonic() - stopped_at < 4.0
    assert [type(end) for _, ended in waiting for end in ended] == [Stopped] * 3
    assert len(llm.calls) == len(asker.spent) == 3


def test_after_stop_no_call_is_made(asker: Asker, llm: StandIn) -> None:
    asker.throttle.stop()

    assert isinstance(asker.fail(), Stopped)
    assert (llm.calls, asker.spent) == ([], [])


def test_a_call_in_flight_comes_to_its_end(asker: Asker, llm: StandIn) -> None:
    llm.script(replace(GOOD, delay=0.5))
    thread, ended = in_thread(asker.ask)
    wait_until(lambda: len(llm.calls) == 1)

    asker.throttle.stop()
    thread.join(5)

    assert ended == [Answer(["animal"], None, MODEL, "stop")]


@pytest.mark.parametrize("reply", [GOOD, RATE_LIMITED, error(400, "Invalid character."), Reply(body=b"no json")])
def test_a_call_counts_as_in_flight_until_it_is_booked(new_asker: MakeAsker, llm: StandIn, reply: Reply) -> None:
    asker = new_asker(llm={"concurrency": 1})
    llm.script(reply)
    calls_at_booking: list[int] = []

    def spend(usage: Usage) -> None:
        time.sleep(0.2)  # time enough for the next call to start, if it may
        calls_at_booking.append(len(llm.calls))
        asker.throttle.stop()

    threads = [in_thread(lambda: asker.client.ask(KEY, TEXT, spend)) for _ in range(4)]
    for thread, _ in threads:
        thread.join(10)

    assert calls_at_booking == [1]
    assert len(llm.calls) == 1


# The text stays where it is

QUOTING = f"Cannot process: {TEXT}"

UNHAPPY: dict[str, list[Reply]] = {
    "wrong key": [error(401, QUOTING, "invalid_api_key")],
    "rejected": [error(400, QUOTING)],
    "schema": [error(400, f"{QUOTING} against response_format")],
    "rate limited": [error(429, QUOTING, headers=AT_ONCE)] * 3 + [error(400, QUOTING)],
    "over its rate": [error(429, QUOTING, headers={"Retry-After": "86400"})],
    "server error": [error(500, QUOTING, headers=AT_ONCE)] * TRIES,
    "a page": [Reply(500, QUOTING.encode(), AT_ONCE)] * TRIES,
    "no JSON": [Reply(body=QUOTING.encode())],
    "plain text": [Reply(body=QUOTING.encode(), headers={"Content-Type": "text/plain"})],
    "a string": [Reply(body=json.dumps(QUOTING).encode())],
    "bad answer": [completion(QUOTING)] * ASKS,
    "unknown tag": [completion(json.dumps({"tags": [TEXT]}))] * ASKS,
    "usage": [with_body(usage={"prompt_tokens": TEXT})],
    "dropped": [Reply(close=True)],
}


@pytest.mark.parametrize("replies", UNHAPPY.values(), ids=UNHAPPY.keys())
def test_no_error_and_no_log_line_holds_the_text(
    asker: Asker,
    llm: StandIn,
    replies: list[Reply],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tagger.llm.TRIES", len(replies))
    monkeypatch.setattr("tagger.llm.TRIES_AT_START", len(replies))
    caplog.set_level(logging.DEBUG, "tagger")
    llm.script(*replies)

    shown = ["".join(record_texts(caplog))]
    try:
        shown.append(repr(asker.ask()))
    except Exception as e:
        shown += [str(e), repr(e), repr(vars(e)), "".join(traceback.format_exception(e))]
    shown += record_texts(caplog)

    assert len(llm.calls) == len(replies)
    assert not [line for line in shown if SECRET in line]


def record_texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what tagger logged at any level, and others from WARNING on, tracebacks included."""
    formatter = logging.Formatter("%(name)s %(message)s")
    return [
        formatter.format(record)
        for record in caplog.records
        if record.name.startswith("tagger") or record.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize(
    "replies",
    [
        [GOOD],
        [RATE_LIMITED, GOOD],
        [completion("?"), RATE_LIMITED, GOOD],
        [completion("?")] * ASKS,
        [*[RATE_LIMITED] * TRIES, GOOD],
        [error(500, "Broken.", headers=AT_ONCE)] * TRIES,
        [busy(429, "86400")],
        [AZURE_FILTER],
        [error(401, "No.", "invalid_api_key")],
        [Reply(body=b"no json")],
        [Reply(body=b"no json", headers={"Content-Type": "text/plain"})],
        [completion(None, refusal="No.")],
    ],
)
def test_spend_is_called_once_for_each_request(
    asker: Asker, llm: StandIn, replies: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.throttle.LONGEST_PAUSE", 0.01)
    llm.script(*replies)

    with contextlib.suppress(TaggerError):
        asker.ask()

    assert len(asker.spent) == len(llm.calls) == len(replies)
