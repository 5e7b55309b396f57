"""Texts: each has one key, and reaches the LLM whole, between marks that no text can forge."""

import json
import re

from hypothesis import strategies as st

from demo.stand_in import read_questions
from tagger.cache import Chars, Usage
from tagger.dataset_files import parse_dataset
from tagger.packing import shares
from tagger.prompt import Prompt, response_format
from tagger.spec import normalise, spec_id, text_key
from tests.fuzz.hostile import long, rarely, texts, words
from tests.fuzz.rounds import Target
from tests.project import MINIMAL, merged

DATASET = parse_dataset(merged(MINIMAL, {"storage": "s3://bucket"}), "notes.yaml")
SPEC, PROMPT = spec_id(DATASET), Prompt(DATASET)
ALONE, TOGETHER = response_format(DATASET), response_format(DATASET, together=True)

HALVES = re.compile("[\ud800-\udfff]")


def check(case: list[str]) -> str:
    """Ask for some texts together, and for each alone."""
    by_key: dict[str, str] = {}
    for text in case:
        normalised = normalise(text)
        assert normalise(normalised) == normalised, "its normal form has another"
        assert normalise(f"\r\n {text}\t") == normalised, "margins make it another"
        key = text_key(SPEC, normalised)
        assert re.fullmatch("[0-9a-f]{32}", key)
        by_key[key] = text
        _assert_asked(PROMPT.messages(key, text), ALONE, [text])
    _assert_asked(PROMPT.messages_together(by_key), TOGETHER, list(by_key.values()))
    used = Usage(input=1000, cached_input=128, output=len(case))
    assert sum(shares(used, by_key).values(), Usage()) == used, "shares that do not add up"
    for text in by_key.values():
        chars = Chars.of(text)
        assert chars.narrow + chars.wide == len(text)
    try:
        json.dumps(PROMPT.messages_together(by_key), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        assert any(map(HALVES.search, by_key.values()))
        return "asked; cannot be encoded (half a surrogate pair)"
    return "asked"


def _assert_asked(messages: list[dict[str, str]], form: object, expected: list[str]) -> None:
    questions = read_questions({"model": "m", "messages": messages, "response_format": form})
    assert [question.text for question in questions] == expected, "the LLM reads other texts"


some = st.lists(texts, min_size=1, max_size=4)
TARGET = Target(
    "texts", rarely(st.lists(long(words, 10_000_000), min_size=1, max_size=1), some, 400), check, share=25_000
)
