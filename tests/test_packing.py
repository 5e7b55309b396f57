"""Several texts in one request: who asks, who gets which answer, what is asked again, and what it is booked as."""

import json
import logging
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.stand_in import MODEL, Json, Reply, Script, StandIn, completion, error, read_questions, token_usage
from tagger.cache import Usage
from tagger.connections import Connection, openai_client
from tagger.dataset_files import parse_dataset
from tagger.exceptions import LLMStopped, TaggerError, TextFailed
from tagger.llm import TRIES, Answer, Client
from tagger.packing import SHORT_CHARS, USELESS, Packer, shares
from tagger.price import estimated_tokens
from tagger.throttle import LocalRates, Rates, Stopped, Throttle
from tests.conftest import REPOSITORY
from tests.project import MINIMAL, merged
from tests.test_llm import Counted

LINGER_SECONDS = 0.5
"""Longer than it takes to start some threads, whatever else the machine does."""

SECRET = "klopstockwurst"
AT_ONCE = {"Retry-After": "0"}
TAGS = {"apple": ["fruit"], "zebra": ["animal"], "rain": ["weather"], "chair": []}
WORDS = list(TAGS)


def key_of(number: int) -> str:
    return f"{number:032x}"


def text_of(number: int) -> str:
    return f"a note on {WORDS[number % 4]}, number {number}"


def tags_of(number: int) -> list[str]:
    return TAGS[WORDS[number % 4]]


class Crowd:
    """Texts that are asked at once, each on a thread of its own."""

    def __init__(self, base_url: str, texts_per_request: int = 4, rates: Rates | None = None, **changes: Any) -> None:
        dataset = parse_dataset(merged(MINIMAL, changes), "notes.yaml")
        connection = Connection("openai_default", "openai", host=base_url, password="key")
        self.throttle = Throttle(dataset.llm.concurrency, rates)
        self.client = Client(dataset, openai_client("openai_default", lambda _: connection), self.throttle)
        self.packer = Packer(self.client, texts_per_request)
        self.spent: list[tuple[list[str], Usage]] = []
        self.ended: dict[int, Answer | Exception] = {}
        self._threads: list[threading.Thread] = []

    def start(self, *numbers: int, text: Callable[[int], str] = text_of) -> None:
        """Begin to ask."""
        for number in numbers:
            thread = threading.Thread(target=self._ask, args=(number, text(number)), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _ask(self, number: int, text: str) -> None:
        try:
            self.ended[number] = self.packer.ask(key_of(number), text, self.spend)
        except Exception as e:
            self.ended[number] = e

    def spend(self, texts: Mapping[str, str], usage: Usage) -> None:
        self.spent.append((list(texts), usage))

    def join(self, seconds: float = 20.0) -> dict[int, Answer | Exception]:
        """Return what came of all of them."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
        assert not any(thread.is_alive() for thread in self._threads), "a text waits for ever"
        return self.ended

    def ask(self, *numbers: int, text: Callable[[int], str] = text_of) -> dict[int, Answer | Exception]:
        """Ask, and return what came of it."""
        self.start(*numbers, text=text)
        return self.join()

    def tags(self, *numbers: int) -> dict[int, list[str]]:
        """Ask, and return the tags of those that were answered."""
        return {number: end.tags for number, end in self.ask(*numbers).items() if isinstance(end, Answer)}


MakeCrowd = Callable[..., Crowd]


@pytest.fixture(autouse=True)
def lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.packing.LINGER_SECONDS", LINGER_SECONDS)


@pytest.fixture
def no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that comes alone stays alone."""
    monkeypatch.setattr("tagger.packing.LINGER_SECONDS", 0.01)


@pytest.fixture
def new_crowd(llm: StandIn) -> Iterator[MakeCrowd]:
    made: list[Crowd] = []

    def new(*args: Any, **changes: Any) -> Crowd:
        made.append(Crowd(llm.base_url, *args, **changes))
        return made[-1]

    yield new
    for crowd in made:
        crowd.throttle.stop()
        crowd.client.close()


@pytest.fixture
def crowd(new_crowd: MakeCrowd) -> Crowd:
    """Four texts go into one request."""
    return new_crowd()


def sizes(llm: StandIn) -> list[int]:
    """Return how many texts each request held, in the order in which they came."""
    return [call.texts for call in llm.calls]


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


FOUR = {number: tags_of(number) for number in range(4)}


# Which texts go together


def test_as_many_texts_as_the_file_says_are_one_request(crowd: Crowd, llm: StandIn) -> None:
    assert crowd.tags(*range(4)) == FOUR
    assert sizes(llm) == [4]


def test_a_request_that_is_full_goes_out_at_once(crowd: Crowd, llm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.packing.LINGER_SECONDS", 60.0)

    assert crowd.tags(*range(8)) == {number: tags_of(number) for number in range(8)}
    assert sizes(llm) == [4, 4]


def test_what_is_there_goes_out_when_no_more_texts_come(crowd: Crowd, llm: StandIn) -> None:
    asked_at = time.time()
    assert crowd.tags(*range(3)) == {number: tags_of(number) for number in range(3)}

    [call] = llm.calls
    assert call.texts == 3
    assert LINGER_SECONDS <= call.time - asked_at < 2 * LINGER_SECONDS + 1.0


def test_while_texts_come_a_request_waits_for_them(new_crowd: MakeCrowd, llm: StandIn) -> None:
    crowd = new_crowd(100)
    for number in range(6):
        crowd.start(number)
        time.sleep(LINGER_SECONDS / 4)

    assert len(crowd.join()) == 6
    assert sizes(llm) == [6]


def test_texts_that_come_too_late_for_one_request_make_the_next(crowd: Crowd, llm: StandIn) -> None:
    llm.latency = 3 * LINGER_SECONDS
    crowd.start(*range(2))
    wait_until(lambda: len(llm.calls) == 1)

    crowd.start(2, 3)

    assert len(crowd.join()) == 4
    assert sizes(llm) == [2, 2]


@pytest.mark.usefixtures("no_lingering")
def test_a_text_that_nobody_joins_is_asked_in_the_form_for_one(crowd: Crowd, llm: StandIn) -> None:
    assert crowd.ask(1) == {1: Answer(["animal"], None, MODEL, "stop", "online")}
    assert [call.key for call in llm.calls] == [key_of(1)]


def test_an_answer_says_that_its_text_was_asked_together_with_others(crowd: Crowd) -> None:
    assert crowd.ask(*range(4))[1] == Answer(["animal"], None, MODEL, "stop", "together")


def test_each_text_gets_the_confidence_of_its_own_tags(new_crowd: MakeCrowd, llm: StandIn) -> None:
    crowd = new_crowd(confidence=True)

    together = {number: end for number, end in crowd.ask(*range(4)).items() if isinstance(end, Answer)}

    alone = {number: crowd.client.ask(key_of(number), text_of(number), lambda _: None) for number in range(4)}
    assert sizes(llm) == [4, 1, 1, 1, 1]
    assert {number: end.tags for number, end in together.items()} == FOUR
    assert {n: (end.tags, end.confidence) for n, end in together.items()} == {
        n: (end.tags, end.confidence) for n, end in alone.items()
    }
    assert all(end.confidence is not None and len(end.confidence) == len(end.tags) for end in together.values())


def test_one_text_a_request_waits_for_nobody(
    new_crowd: MakeCrowd, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.packing.LINGER_SECONDS", 60.0)

    assert new_crowd(1).tags(*range(4)) == FOUR
    assert sizes(llm) == [1] * 4


def test_a_long_text_is_asked_alone_at_once(crowd: Crowd, llm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.packing.LINGER_SECONDS", 60.0)
    lengths = {0: SHORT_CHARS + 1, 1: SHORT_CHARS, 2: SHORT_CHARS, 3: SHORT_CHARS, 4: SHORT_CHARS}

    crowd.ask(*lengths, text=lambda number: text_of(number).ljust(lengths[number], "."))

    assert {call.texts: [len(text) for text in call.kept] for call in llm.calls} == {
        1: [SHORT_CHARS + 1],
        4: [SHORT_CHARS] * 4,
    }


@pytest.mark.parametrize("texts_per_request", [2, 7, 100])
def test_a_stream_of_texts_fills_the_requests(new_crowd: MakeCrowd, llm: StandIn, texts_per_request: int) -> None:
    texts = range(140)

    assert new_crowd(texts_per_request).tags(*texts) == {number: tags_of(number) for number in texts}
    assert sum(sizes(llm)) == len(texts)
    assert len(llm.calls) <= -(-len(texts) // texts_per_request) + 2


# Whose answer is whose


Entries = list[Any]


def answering(change: Callable[[Entries], Any]) -> Callable[[Json], Reply]:
    """Answer a packed request rightly, but for `change` of the list of answers."""

    def answer(request: Json) -> Reply:
        entries: Entries = [
            {"id": str(number), "tags": next(tags for word, tags in TAGS.items() if word in question.text)}
            for number, question in enumerate(read_questions(request), 1)
        ]
        return completion(json.dumps({"answers": change(entries)}))

    return answer


def with_second(**changes: Any) -> Callable[[Entries], Entries]:
    """Change the entry of the second text; a value of None takes it out."""

    def change(entries: Entries) -> Entries:
        second = {k: v for k, v in {**entries[1], **changes}.items() if v is not None}
        return [entries[0], second, *entries[2:]]

    return change


OF_NO_USE: dict[str, Callable[[Entries], Any]] = {
    "missing": lambda entries: [entries[0], *entries[2:]],
    "twice": lambda entries: [*entries, entries[1]],
    "twice, and not alike": lambda entries: [*entries, {"id": "2", "tags": []}],
    "the id of another form": with_second(id="02"),
    "the id as its line has it": with_second(id="2-abcdef"),
    "an unknown id": with_second(id="5"),
    "an id that is no text": with_second(id=["2"]),
    "no id": with_second(id=None),
    "no tags": with_second(tags=None),
    "tags that are no list": with_second(tags="animal"),
    "a tag that is no text": with_second(tags=[1]),
    "an unknown tag": with_second(tags=["vegetable"]),
    "a tag twice": with_second(tags=["animal", "animal"]),
    "too many tags": with_second(tags=["animal", "fruit", "weather"]),
    "no object": lambda entries: [entries[0], "animal", *entries[2:]],
}


@pytest.mark.parametrize("change", OF_NO_USE.values(), ids=OF_NO_USE.keys())
def test_a_text_whose_answer_is_of_no_use_is_asked_again_alone(
    crowd: Crowd, llm: StandIn, change: Callable[[Entries], Any]
) -> None:
    llm.script(answering(change))

    assert crowd.tags(*range(4)) == FOUR
    assert sizes(llm) == [4, 1]
    second = llm.calls[0].kept[1]
    assert llm.calls[1].kept == (second,)
    asked = {number: end.asked for number, end in crowd.ended.items() if isinstance(end, Answer)}
    assert [text_of(number) for number, how in asked.items() if how == "online"] == [second]


GOOD_ENOUGH: dict[str, Callable[[Entries], Any]] = {
    "in another order": lambda entries: entries[::-1],
    "with one of no text": lambda entries: [{"id": "5", "tags": []}, *entries, {"id": "", "tags": ["fruit"]}],
    "with something that is none": lambda entries: [None, "?", [], 3, *entries],
    "with numbers as ids": lambda entries: [{**entry, "id": int(entry["id"])} for entry in entries],
    "with more than was asked for": lambda entries: [{**entry, "why": "it says so"} for entry in entries],
}


@pytest.mark.parametrize("change", GOOD_ENOUGH.values(), ids=GOOD_ENOUGH.keys())
def test_answers_are_taken_by_their_ids(crowd: Crowd, llm: StandIn, change: Callable[[Entries], Any]) -> None:
    llm.script(answering(change))

    assert crowd.tags(*range(4)) == FOUR
    assert sizes(llm) == [4]


def test_an_answer_without_tags_is_of_no_use_where_one_is_required(new_crowd: MakeCrowd, llm: StandIn) -> None:
    crowd = new_crowd(allow_none=False)
    llm.script(answering(lambda entries: entries), completion('{"tags": ["weather"]}'))

    assert crowd.tags(*range(4)) == {**FOUR, 3: ["weather"]}
    assert sizes(llm) == [4, 1]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_back_each_text_has_its_own_answer_and_is_asked_twice_at_most(
    new_crowd: MakeCrowd, llm: StandIn, seed: int
) -> None:
    chance = random.Random(seed)

    def spoil(entries: Entries) -> Entries:
        kept = [entry for entry in entries if chance.random() > 0.2]
        kept += [{"id": entry["id"], "tags": ["fruit"]} for entry in entries if chance.random() < 0.1]
        kept += [{"id": str(chance.randrange(50, 99)), "tags": ["weather"]} for _ in range(chance.randrange(3))]
        unknown = [{**entry, "tags": ["vegetable"]} if chance.random() < 0.1 else entry for entry in kept]
        return chance.sample(unknown, len(unknown))

    def answer(request: Json) -> Reply:
        questions = read_questions(request)
        if len(questions) > 1:
            return answering(spoil)(request)
        [tags] = [tags for word, tags in TAGS.items() if word in questions[0].text]
        return completion(json.dumps({"tags": tags}))

    llm.script(*[answer] * 200)
    crowd = new_crowd(10)

    given = crowd.tags(*range(60))

    assert len(given) == 60
    twice_fruit = [number for number, tags in given.items() if tags != tags_of(number)]
    # an entry that took the place of one that was left out cannot be told from it
    assert all(given[number] == ["fruit"] for number in twice_fruit)
    assert max(llm.calls_per_text().values()) <= 2


# Requests that fail as a whole

WHOLE = {
    "a refusal": completion(None, refusal="I cannot help with that."),
    "a refusal beside answers": completion('{"answers": [{"id": "1", "tags": ["fruit"]}]}', refusal="No."),
    "a content filter": completion(None, finish_reason="content_filter"),
    "an answer cut off": completion('{"answers": [{"id": "1", "tags": ["fr', finish_reason="length"),
    "broken JSON": completion('{"answers": ['),
    "prose": completion("They are about fruit."),
    "no content": completion(None),
    "no answers": completion("{}"),
    "answers that are no list": completion('{"answers": {"1": ["fruit"]}}'),
    "a list alone": completion("[]"),
    "the form for one text": completion('{"tags": ["fruit"]}'),
    "a message that is none": Reply(body={"choices": []}),
    "no completion": Reply(body=b"<html>Sign in</html>", headers={"Content-Type": "text/html"}),
    "too long": error(400, "Your input is too long.", "context_length_exceeded", param="messages"),
    "too large": error(413, "Request entity too large"),
    "Azure's filter": error(400, "The prompt triggers our content management policy.", "content_filter"),
    "a text that is refused": error(400, "Invalid character.", "invalid_value", param="messages"),
}


@pytest.mark.parametrize("reply", WHOLE.values(), ids=WHOLE.keys())
def test_the_texts_of_a_request_that_came_to_nothing_are_asked_alone(crowd: Crowd, llm: StandIn, reply: Reply) -> None:
    llm.script(reply)

    assert crowd.tags(*range(4)) == FOUR
    assert sizes(llm) == [4, 1, 1, 1, 1]
    assert [len(keys) for keys, _ in crowd.spent] == [4, 1, 1, 1, 1]


def test_only_the_text_that_is_to_blame_is_refused(crowd: Crowd, llm: StandIn) -> None:
    def refuse_rain(request: Json) -> Reply:
        if any("rain" in question.text for question in read_questions(request)):
            return completion(None, finish_reason="content_filter")
        return completion('{"tags": ["fruit"]}')

    llm.script(*[refuse_rain] * 9)

    ended = crowd.ask(*range(4))

    assert [end.reason for _, end in sorted(ended.items()) if isinstance(end, Answer)] == [
        None,
        None,
        "content_filter",
        None,
    ]
    assert sizes(llm) == [4, 1, 1, 1, 1]


def test_a_text_that_cannot_be_encoded_fails_alone(crowd: Crowd, llm: StandIn) -> None:
    ended = crowd.ask(*range(4), text=lambda number: "half a \ud800" if number == 2 else text_of(number))

    assert {number: end.tags for number, end in ended.items() if isinstance(end, Answer)} == {
        number: tags for number, tags in FOUR.items() if number != 2
    }
    assert isinstance(ended[2], TextFailed)
    assert ended[2].kind == "bad_response"
    assert sizes(llm) == [1, 1, 1]


PASSING = {
    "429": error(429, "Rate limit reached.", "rate_limit_exceeded", headers=AT_ONCE),
    "500": error(500, "Busy.", headers=AT_ONCE),
    "408": error(408, "Slow.", headers=AT_ONCE),
    "dropped": Reply(close=True),
    "too late": replace(completion("{}"), delay=3.0),
}


@pytest.mark.parametrize("reply", PASSING.values(), ids=PASSING.keys())
def test_after_a_passing_error_the_same_request_is_made_again(new_crowd: MakeCrowd, llm: StandIn, reply: Reply) -> None:
    crowd = new_crowd(llm={"params": {"timeout": 1.0}})
    seen: list[Json] = []

    def noting(reply: Callable[[Json], Reply]) -> Script:
        def answer(request: Json) -> Reply:
            seen.append(request)
            return reply(request)

        return answer

    llm.script(noting(lambda request: reply), noting(answering(lambda entries: entries)))

    assert crowd.tags(*range(4)) == FOUR
    assert sizes(llm) == [4, 4]
    assert seen[0] == seen[1]
    assert [len(keys) for keys, _ in crowd.spent] == [4, 4]


def test_an_error_that_does_not_pass_fails_each_text(crowd: Crowd, llm: StandIn) -> None:
    llm.script(*[error(500, "Busy.", headers=AT_ONCE)] * 20)

    ended = crowd.ask(*range(4))

    kinds = [end.kind for end in ended.values() if isinstance(end, TextFailed)]
    assert kinds == ["server_error"] * 4
    assert sizes(llm) == [4] * TRIES


def test_a_wrong_key_stops_all_texts(crowd: Crowd, llm: StandIn) -> None:
    llm.api_key = "another"

    ended = crowd.ask(*range(8))

    assert len(ended) == 8
    assert len(llm.calls) <= 2
    assert {type(end) for end in ended.values()} <= {LLMStopped, Stopped}


def test_the_stand_in_does_not_pass_for_a_real_model(new_crowd: MakeCrowd, llm: StandIn) -> None:
    ended = new_crowd(llm={"model": "gpt-5-mini"}).ask(*range(4))

    assert [type(end) for end in ended.values()] == [LLMStopped] * 4
    assert len(llm.calls) == 1


def test_an_endpoint_that_answers_no_packed_request_is_asked_for_one_text_at_a_time(
    crowd: Crowd, llm: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(0, 4 * USELESS, 4):
        llm.script(completion("I would rather not."))
        assert len(crowd.tags(*range(number, number + 4))) == number + 4
    before = len(llm.calls)

    assert len(crowd.tags(*range(100, 108))) == 4 * USELESS + 8
    assert sizes(llm)[before:] == [1] * 8
    assert [record.levelno for record in caplog.records if record.name == "tagger.packing"] == [logging.WARNING]
    assert "llm.texts_per_request" in caplog.text


def test_one_good_answer_keeps_texts_together(crowd: Crowd, llm: StandIn) -> None:
    for number in range(0, 16 * USELESS, 4):
        if number % 16:
            llm.script(completion("I would rather not."))
        crowd.ask(*range(number, number + 4))

    crowd.ask(*range(1000, 1004))
    assert sizes(llm)[-1] == 4


# Stopping


def test_stop_ends_texts_that_wait_for_others(new_crowd: MakeCrowd, llm: StandIn) -> None:
    crowd = new_crowd(100)
    crowd.start(*range(5))

    crowd.throttle.stop()

    assert [type(end) for end in crowd.join(5).values()] == [Stopped] * 5
    assert llm.calls == []


def used_up(crowd: Crowd, llm: StandIn) -> None:
    """A rate that is used up."""
    with crowd.throttle.call(0):
        pass


def paused(crowd: Crowd, llm: StandIn) -> None:
    """A pause of the endpoint's."""
    crowd.throttle.slow_down(time.monotonic(), 100.0)


def told_to_wait(crowd: Crowd, llm: StandIn) -> None:
    """A request to be made again later."""
    llm.script(error(503, "Busy.", headers={"Retry-After": "100"}))


@pytest.mark.parametrize("hold_up", [used_up, paused, told_to_wait], ids=lambda hold_up: str(hold_up.__doc__))
def test_stop_ends_texts_whose_request_waits(
    new_crowd: MakeCrowd, llm: StandIn, hold_up: Callable[[Crowd, StandIn], None]
) -> None:
    crowd = new_crowd(rates=LocalRates(1, None) if hold_up is used_up else None)
    hold_up(crowd, llm)
    crowd.start(*range(4))
    wait_until(lambda: hold_up is not told_to_wait or len(crowd.spent) == 1)
    time.sleep(0.3)
    assert crowd.ended == {}

    crowd.throttle.stop()

    assert [type(end) for end in crowd.join(5).values()] == [Stopped] * 4


def test_a_request_in_flight_gives_each_text_its_answer_after_stop(crowd: Crowd, llm: StandIn) -> None:
    llm.latency = 0.5
    crowd.start(*range(4))
    wait_until(lambda: len(llm.calls) == 1)

    crowd.throttle.stop()

    assert {number: end.tags for number, end in crowd.join().items() if isinstance(end, Answer)} == FOUR


def test_after_stop_nothing_is_asked_alone(crowd: Crowd, llm: StandIn) -> None:
    llm.script(replace(completion("?"), delay=0.5))
    crowd.start(*range(4))
    wait_until(lambda: len(llm.calls) == 1)

    crowd.throttle.stop()

    assert [type(end) for end in crowd.join().values()] == [Stopped] * 4
    assert len(llm.calls) == 1


def test_no_text_waits_for_ever_when_the_books_fail(crowd: Crowd) -> None:
    def fail(texts: Mapping[str, str], usage: Usage) -> None:
        raise MemoryError

    crowd.spend = fail  # type: ignore[method-assign]

    assert [type(end) for end in crowd.ask(*range(4)).values()] == [MemoryError] * 4


def test_nothing_that_fails_shows_a_text(crowd: Crowd, llm: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tagger")
    llm.script(*[error(500, f"Cannot process {SECRET}.", headers=AT_ONCE)] * TRIES)

    ended = crowd.ask(*range(4), text=lambda number: f"{SECRET} {number}")

    assert all(isinstance(end, TaggerError) for end in ended.values())
    shown = [repr(end) + repr(end.__context__) + repr(end.__cause__) for end in ended.values()]  # type: ignore
    assert SECRET not in "".join(shown) + caplog.text


# Usage and rates


def test_a_request_is_booked_once_with_all_its_texts(crowd: Crowd, llm: StandIn) -> None:
    def answer(request: Json) -> Reply:
        reply = answering(lambda entries: entries)(request)
        assert isinstance(reply.body, dict)
        return Reply(body={**reply.body, "usage": token_usage(1000, 40, cached=900)})

    llm.script(answer)
    crowd.ask(*range(4))

    [(keys, usage)] = crowd.spent
    assert sorted(keys) == [key_of(number) for number in range(4)]
    assert usage == Usage(input=1000, cached_input=900, output=40)


def test_the_rates_know_a_request_for_several_texts_from_one_for_one(new_crowd: MakeCrowd, llm: StandIn) -> None:
    rates = Counted()
    crowd = new_crowd(rates=rates)
    for number in range(0, 20, 4):
        crowd.ask(*range(number, number + 4))
        crowd.ask(100 + number, text=lambda number: text_of(number).ljust(SHORT_CHARS + 1))

    together, alone = rates.reserved[::2], rates.reserved[1::2]
    used = llm.stats()["prompt_tokens"] + llm.stats()["completion_tokens"]
    assert len(rates.reserved) == len(llm.calls) == 10
    assert abs(together[-1] - alone[-1]) > 50
    assert [abs(tokens) < 10 for tokens in rates.settled[2:]] == [True] * 8
    assert sum(rates.reserved) + sum(rates.settled) == pytest.approx(used)


texts = st.dictionaries(st.text("abc", min_size=1, max_size=4), st.text(max_size=40), min_size=1, max_size=100)


@given(texts, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**5))
def test_the_shares_add_up_to_what_was_used(by_key: dict[str, str], fresh: int, cached: int, output: int) -> None:
    usage = Usage(input=fresh + cached, cached_input=cached, output=output)

    parts = shares(usage, by_key)

    assert list(parts) == list(by_key)
    assert sum(parts.values(), Usage()) == usage
    assert all(0 <= part.cached_input <= part.input and part.output >= 0 for part in parts.values())


@given(texts, st.integers(0, 10**6))
def test_a_share_goes_by_the_texts_estimated_length(by_key: dict[str, str], tokens: int) -> None:
    weights = {key: max(estimated_tokens(text), 1) for key, text in by_key.items()}

    parts = shares(Usage(input=tokens), by_key)

    assert all(abs(part.input - tokens * weights[key] / sum(weights.values())) <= 1 for key, part in parts.items())


def test_one_text_has_the_whole() -> None:
    assert shares(Usage(input=7, cached_input=3, output=2), {"key": ""}) == {
        "key": Usage(input=7, cached_input=3, output=2)
    }


@pytest.mark.slow
def test_the_benchmark_shows_what_is_saved_and_that_the_tags_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "packing.json"
    command = [sys.executable, "-m", "bench.packing", "--texts", "60", "--latency", "0.05", "--json", str(file)]

    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=170)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 short answers, 8 tags" in done.stdout
    assert [trial["requests"] for trial in json.loads(file.read_text())["trials"]] == [60, 3]
