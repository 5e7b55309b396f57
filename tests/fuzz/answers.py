"""Answers: whatever an endpoint sends, a text gets tags of its dataset, or a status with a kind."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
from hypothesis import strategies as st
from tenacity import wait_none

from demo.stand_in import completion
from tagger.cache import Cache, Record, parse_record
from tagger.dataset import Dataset
from tagger.dataset_files import parse_dataset
from tagger.exceptions import LLMStopped, TextFailed
from tagger.ledger import Ledger, latest_outcomes, read_attempts
from tagger.llm import Client
from tagger.packing import Packer
from tagger.price import price_of
from tagger.runs import Run
from tagger.tag import ShardAsker
from tagger.throttle import Throttle
from tests.fuzz.held import Held
from tests.fuzz.hostile import MARKER, changed, damaged, long, nested, rarely, texts, values, words
from tests.fuzz.promises import assert_allowed, assert_clear
from tests.fuzz.rounds import Target
from tests.project import MINIMAL, merged

DATASETS = tuple(
    parse_dataset(
        merged(MINIMAL, {"storage": "s3://bucket", "allow_none": allow_none, "confidence": confidence}), "notes.yaml"
    )
    for allow_none in (True, False)
    for confidence in (False, True)
)

CONTENTS: list[Any] = [
    {"tags": ["fruit"]},
    {"tags": []},
    {"tags": ["animal", "fruit"]},
    {"tags": [{"tag": "fruit", "confidence": 0.9}, {"tag": "animal", "confidence": 1}]},
    {"answers": [{"id": "1", "tags": ["fruit"]}, {"id": "2", "tags": []}, {"id": "3", "tags": ["animal"]}]},
    {"answers": [{"id": "1", "tags": [{"tag": "fruit", "confidence": 0.5}]}]},
]

TOKENS = tuple(
    token.encode()
    for token in (
        '"',
        "{",
        "}",
        "[",
        "]",
        ",",
        "NaN",
        "1e999",
        "-1",
        "null",
        "\\ud800",
        "hacked",
        "9" * 5000,
        "\\u0000",
    )
)


def _body(content: Any) -> dict[str, Any]:
    reply = completion(content, model="served-model").body
    assert isinstance(reply, dict)
    return {**reply, "created": 1_750_000_000}


contents = st.one_of(
    st.sampled_from(CONTENTS).map(json.dumps),
    changed(CONTENTS).map(json.dumps),
    damaged(st.sampled_from(CONTENTS).map(lambda content: json.dumps(content).encode()), TOKENS).map(
        lambda raw: raw.decode("utf-8", "replace")
    ),
    words,
    rarely(long(words, 10_000_000), st.just(f'{{"tags": ["{MARKER}"]}}'), 300),
    st.sampled_from((10, 300, 2000, 100_000)).map(lambda depth: nested('{"tags": [', "]}", depth)),
)

completions = st.one_of(
    contents.map(_body),
    contents.map(_body),
    st.builds(lambda content, finish: _with_finish(_body(content), finish), contents, words),
    changed([_body(json.dumps(CONTENTS[0])), _body(json.dumps(CONTENTS[4]))]),
)
"""Bodies of a 200 as JSON has them."""


def _with_finish(body: dict[str, Any], finish: str) -> dict[str, Any]:
    body["choices"][0]["finish_reason"] = finish
    return body


errors = st.one_of(
    st.builds(
        lambda *fields: {"error": dict(zip(("message", "code", "param", "type"), fields, strict=True))},
        *[st.one_of(words, values, st.sampled_from(("context_length_exceeded", "content_filter", "model", MARKER)))]
        * 4,
    ),
    values,
)


def _raw(content: Any) -> bytes:
    return json.dumps(content).encode()


bodies = st.one_of(
    completions.map(_raw),
    completions.map(_raw),
    completions.map(_raw),
    damaged(completions.map(_raw), TOKENS),
    values.map(_raw),
    st.binary(max_size=40),
    st.sampled_from((300, 2000, 100_000)).map(lambda depth: nested('{"choices":[', "]}", depth).encode()),
)

HEADERS = (
    {"content-type": "application/json"},
    {"content-type": "application/json"},
    {"content-type": "text/html"},
    {"content-type": "application/json; charset=none-such"},
    {"content-type": "application/json; charset=utf-16"},
    {"content-type": "application/json", "content-encoding": "gzip"},
    {"content-type": "application/json", "retry-after": "nan"},
    {"content-type": "application/json", "retry-after": "1e999"},
    {"content-type": "application/json", "retry-after": "-7"},
    {"content-type": "application/json", "retry-after": "Mon, 01 Jan 0001 00:00:00 GMT"},
    {"content-type": "application/json", "retry-after": "Fri, 31 Dec 9999 23:59:59 -2359"},
)


@dataclass(frozen=True)
class Reply:
    """What the endpoint answers to every request."""

    status: int
    headers: dict[str, str]
    body: bytes

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(self.status, headers=self.headers, content=self.body)


replies = st.one_of(
    st.builds(Reply, st.just(200), st.sampled_from(HEADERS[:2]), bodies),
    st.builds(Reply, st.just(200), st.sampled_from(HEADERS), bodies),
    st.builds(
        Reply,
        st.sampled_from((400, 400, 413, 422, 404, 409, 401, 500, 503, 302, 204, 299, 418)),
        st.sampled_from(HEADERS),
        st.one_of(errors.map(_raw), bodies),
    ),
)

KEYS = [f"{n:032x}" for n in range(1, 4)]


def check(case: tuple[int, Reply, str, bool]) -> str:
    """Ask an endpoint that answers so, for one text or for several."""
    number, reply, text, together = case
    dataset = DATASETS[number]
    throttle = Throttle(8)
    http = httpx2.Client(transport=httpx2.MockTransport(reply))
    sdk = openai.OpenAI(api_key="key", base_url="http://127.0.0.1:9/v1", max_retries=0, http_client=http)
    client = Client(dataset, sdk, throttle)
    client._retrying.wait = wait_none()
    run = Run(Held({}), "notes", "run")
    ledger = Ledger(run, "plan", 1, price_of(dataset.llm))
    budget: Any = SimpleNamespace(name="none", is_spent=lambda spent: False)
    cache = Cache(run.storage, "0123456789ab", dataset.llm.model)
    row_ids = dict.fromkeys(KEYS, "row")
    packer = Packer(client, 1)
    asker = ShardAsker(cache, packer, throttle, ledger, row_ids, budget=budget, locks=None, recheck=False)
    with ledger, sdk:
        outcome = _together(dataset, client, asker, text) if together else _alone(dataset, asker, text)
    _assert_booked(run, dataset)
    return outcome


def _alone(dataset: Dataset, asker: ShardAsker, text: str) -> str:
    key = KEYS[0]
    try:
        record = asker.ask(key, text)
    except (TextFailed, LLMStopped) as e:
        assert_clear(e)
        asker.failed(key, e)
        return f"failed: {e.kind}" if isinstance(e, TextFailed) else "the run is stopped"
    asker.cache.write(key, record)
    asker.done(key, record)
    _assert_answer(dataset, record)
    return record.status if record.reason is None else f"refused: {record.reason}"


def _together(dataset: Dataset, client: Client, asker: ShardAsker, text: str) -> str:
    asked = {key: f"{text}{n}" for n, key in enumerate(KEYS)}
    try:
        answers = client.ask_together(asked, lambda usage: asker._spend(asked, usage))
    except (TextFailed, LLMStopped) as e:
        assert_clear(e)
        return f"together failed: {e.kind}" if isinstance(e, TextFailed) else "the run is stopped"
    for answer in answers.values():
        assert_allowed(dataset, answer.tags)
    return f"together: {len(answers)} answered"


def _assert_answer(dataset: Dataset, record: Record) -> None:
    if record.status == "tagged":
        assert_allowed(dataset, record.tags)
    else:
        assert record.tags == [] and record.reason
    assert_no_answer(record)
    assert parse_record(record.to_bytes(), dataset.llm.model) == record, "the record is read as another"
    assert record.cost_usd is not None and 0 <= record.cost_usd < math.inf, "a cost that is none"


def assert_no_answer(record: Record) -> None:
    """Assert that a record shows nothing of an answer but its tags and the model's name."""
    assert MARKER not in str(record.model_copy(update={"model": ""})), "the record shows the answer"


def _assert_booked(run: Run, dataset: Dataset) -> None:
    for attempt in read_attempts(run):
        assert 0 <= attempt.spent_usd < math.inf, "money that is none"
        for outcome in latest_outcomes([attempt]).values():
            assert set(outcome.tags or ()) <= set(dataset.tag_ids), "a tag outside the enum"
            assert MARKER not in str(outcome._replace(model=None)), "the books show the answer"


TARGET = Target(
    "answers",
    st.tuples(st.sampled_from(range(len(DATASETS))), replies, texts, st.sampled_from((False, False, True))),
    check,
    share=15_000,
)
