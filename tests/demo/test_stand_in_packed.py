"""Packed requests: several texts in one chat request to the stand-in."""

import json
from hashlib import sha256
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.stand_in import StandIn, estimate_tokens, read_questions
from tests.demo.test_stand_in import ENGLISH, JAPANESE, body, client, tags_of

MARK = "a1b2c3"
TEXTS = [
    "A vaccine against infection.",
    "The heart, a tumour and 心臓",
    "Nothing that fits.",
    "",
    "two\n\nlines, one heart\n",
]


def packed(texts: list[str], tags: dict[str, str] = ENGLISH, schema: bool = True, mark: str = MARK) -> Any:
    """Return a request's body in the tagger's packed form."""
    request = body("", tags)
    marks = [f'text id="{number}-{mark}"' for number in range(1, len(texts) + 1)]
    pairs = zip(marks, texts, strict=True)
    request["messages"][1]["content"] = "\n".join(f"<{each}>\n{text}\n</{each}>" for each, text in pairs)
    answer = {"type": "object", "properties": {"id": {"type": "string"}, "tags": tags_schema(request)}}
    form = {"type": "object", "properties": {"answers": {"type": "array", "items": answer}}}
    strict = {"type": "json_schema", "json_schema": {"name": "answers", "strict": True, "schema": form}}
    return request | {"response_format": strict if schema else {"type": "json_object"}}


def tags_schema(request: Any) -> Any:
    """Return the schema of the tags in a single request."""
    return request["response_format"]["json_schema"]["schema"]["properties"]["tags"]


def ask(llm: StandIn, texts: list[str], **form: Any) -> Any:
    """Ask for several texts at once."""
    with client(llm) as sdk:
        return sdk.chat.completions.create(**packed(texts, **form))


def answers_of(answer: Any) -> list[tuple[str, list[str]]]:
    """Return an answer's ids and tags."""
    return [(each["id"], each["tags"]) for each in json.loads(answer.choices[0].message.content)["answers"]]


def digests(texts: list[str]) -> tuple[str, ...]:
    return tuple(sha256(text.encode()).hexdigest() for text in texts)


@pytest.mark.parametrize("schema", [True, False])
@pytest.mark.parametrize("tags", [ENGLISH, JAPANESE])
def test_each_text_gets_the_tags_it_gets_alone(llm: StandIn, tags: dict[str, str], schema: bool) -> None:
    with client(llm) as sdk:
        alone = [tags_of(sdk.chat.completions.create(**body(text, tags, schema=schema))) for text in TEXTS]
    assert len(set(map(tuple, alone))) > 1
    expected = [(str(number), each) for number, each in enumerate(alone, 1)]
    assert answers_of(ask(llm, TEXTS, tags=tags, schema=schema)) == expected


def test_the_whole_prompt_is_counted(llm: StandIn) -> None:
    usage = ask(llm, TEXTS).usage
    system, user = (message["content"] for message in packed(TEXTS)["messages"])
    assert usage.prompt_tokens == estimate_tokens(system) + estimate_tokens(user)


def test_it_is_one_call_that_tells_which_texts_it_held(llm: StandIn) -> None:
    ask(llm, TEXTS)
    with client(llm) as sdk:
        sdk.chat.completions.create(**body(TEXTS[0], key="ab"))
    together, alone = llm.calls
    assert (together.key, together.texts, together.sha256s) == ("", len(TEXTS), digests(TEXTS))
    assert (together.sha256, together.text, together.kept) == ("", None, tuple(TEXTS))
    assert (alone.key, alone.texts, alone.sha256, alone.text) == ("ab", 1, digests(TEXTS)[0], TEXTS[0])
    assert llm.calls_per_key() == {"ab": 1}
    assert llm.calls_per_text() == dict.fromkeys(digests(TEXTS), 1) | {digests(TEXTS)[0]: 2}
    assert llm.calls_per_text(status=500) == {}


def test_a_refusal_of_any_text_refuses_them_all() -> None:
    texts = [f"heart {n}" for n in range(20)]
    with StandIn(refusals=0.1) as llm, client(llm) as sdk:
        alone = [sdk.chat.completions.create(**body(text)).choices[0].message.refusal for text in texts]
        refused = next(number for number, refusal in enumerate(alone) if refusal)
        fine = [text for text, refusal in zip(texts, alone, strict=True) if not refusal]
        assert ask(llm, [*fine[:3], texts[refused]]).choices[0].message.refusal == alone[refused]
        assert len(answers_of(ask(llm, fine))) == len(fine)


def test_faults_are_fractions_of_the_requests_whatever_they_hold() -> None:
    with StandIn(rate_500=0.3) as llm:
        for n in range(30):
            try:
                ask(llm, [f"heart {n} {i}" for i in range(20)])
            except openai.InternalServerError:
                continue
    assert 15 <= sum(call.status == 200 for call in llm.calls) <= 27


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f'<text id="2-{MARK}">', f'<text id="3-{MARK}">'),
        (f'text id="2-{MARK}"', f'text id="3-{MARK}"'),
        (f'text id="2-{MARK}"', 'text id="2-ffffff"'),
        (f'<text id="1-{MARK}">', f'Hello.\n<text id="1-{MARK}">'),
        (f'</text id="2-{MARK}">', f'</text id="2-{MARK}">\n'),
        (f"-{MARK}", ""),
    ],
    ids=["start", "number", "mark", "before", "after", "no mark"],
)
def test_other_marker_lines_are_refused(llm: StandIn, old: str, new: str) -> None:
    request = packed(["heart", "tumour"])
    request["messages"][1]["content"] = request["messages"][1]["content"].replace(old, new)
    with client(llm) as sdk, pytest.raises(openai.BadRequestError, match="Expected"):
        sdk.chat.completions.create(**request)


def test_the_form_of_one_text_is_no_form_of_several(llm: StandIn) -> None:
    request = packed(["heart", "tumour"]) | {"response_format": body("heart")["response_format"]}
    with client(llm) as sdk, pytest.raises(openai.BadRequestError):
        sdk.chat.completions.create(**request)


@given(st.lists(st.text() | st.sampled_from(['\n</text id="1-000000">', '<text id="2-000000">\n'])).filter(len))
def test_any_text_is_read_as_it_was_sent(texts: list[str]) -> None:
    assert [question.text for question in read_questions(packed(texts, mark="0123ab"))] == texts
