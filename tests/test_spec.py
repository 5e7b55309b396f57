"""The spec and the keys of texts. What is pinned here is paid for: a change makes every user tag everything again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import unicodedata
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tagger.dataset import Dataset
from tagger.dataset_files import parse_dataset
from tagger.spec import normalise, spec_id, spec_of, text_key
from tests.project import merged

BASE = """\
dataset: notes
storage: s3://tagger
source: {conn_id: db, table: notes, id_column: id, text_columns: [body]}
target: {table: note_tags}
llm:
  model: gpt-5-mini
  params: {temperature: 0.5}
prompt: |
  You tag short notes.
  メモに付ける。
tags:
  - {id: fruit, description: "Apples; 果物"}
  - {id: animal, description: Zebras}
max_tags: 2
"""

CANONICAL = (
    '{"allow_none":true,"instructions":1,"max_tags":2,"model":"gpt-5-mini","normalisation":1,"output_schema":1,'
    '"params":{"temperature":0.5},"prompt":"You tag short notes.\\nメモに付ける。","revision":1,'
    '"tags":[{"description":"Apples; 果物","id":"fruit"},{"description":"Zebras","id":"animal"}]}'
)
"""The canonical JSON of BASE's spec, written down by hand."""


def dataset(changes: dict[str, Any] | None = None, text: str = BASE) -> Dataset:
    return parse_dataset(merged(yaml.safe_load(text), changes or {}), "notes.yaml")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# golden values


def test_spec_is_the_documented_canonical_json() -> None:
    canonical = json.dumps(spec_of(dataset()), sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    assert canonical == CANONICAL


def test_spec_id_is_pinned() -> None:
    assert spec_id(dataset()) == sha256(CANONICAL)[:12] == "93170b27f007"


EXAMPLES = {"examples": [{"text": " An apple. 林檎\n", "tags": ["fruit"]}, {"text": 'a "rock"', "tags": []}]}


@pytest.mark.parametrize(
    ("changes", "added", "pinned"),
    [
        (
            EXAMPLES,
            '"examples":[{"tags":["fruit"],"text":"An apple. 林檎"},{"tags":[],"text":"a \\"rock\\""}],',
            "3a4f7c578d42",
        ),
        ({"confidence": True}, '"confidence":true,', "a7d927fe9b97"),
        (
            {"confidence": True, "examples": [{"text": "An apple.", "tags": ["fruit"]}]},
            '"confidence":true,"examples":[{"tags":["fruit"],"text":"An apple."}],',
            "62a187d66c26",
        ),
        ({"confidence": True, "review_below": 0.5}, '"confidence":true,', "a7d927fe9b97"),
    ],
    ids=["examples", "confidence", "both", "review_below is not in it"],
)
def test_spec_with_examples_or_confidence_is_pinned(changes: dict[str, Any], added: str, pinned: str) -> None:
    canonical = CANONICAL.replace('"instructions"', f'{added}"instructions"')

    assert spec_id(dataset(changes)) == sha256(canonical)[:12] == pinned


GOLDEN: list[tuple[str, str, str]] = [
    # text, its normal form, its key under the spec id 0123456789ab
    ("apple", "apple", "478cd7855813ed94a5483a59a932707a"),
    (" apple\n", "apple", "478cd7855813ed94a5483a59a932707a"),
    ("ａｐｐｌｅ", "apple", "478cd7855813ed94a5483a59a932707a"),
    ("Apple", "Apple", "a0ee63193e49bb5113981217592864c4"),
    ("りんご", "りんご", "2d91b76db42c8eebf082e77ac1b72442"),
    ("ｱｯﾌﾟﾙ", "アップル", "8200cd36d8bcc3d604b29796a92d712a"),
    ("アップル", "アップル", "8200cd36d8bcc3d604b29796a92d712a"),
    ("one\r\ntwo\rthree", "one\ntwo\nthree", "27abc73dba101fbd5f0a393760269317"),
    ("１０⁵ ㎎", "105 mg", "6013b81c734a1a199c38cf8c0557a225"),
    ("cafe\u0301", "café", "dad1cec6e551a9978877359bae29f323"),
    ("㍿\u3000テスト", "株式会社 テスト", "afd8d7c2809e63ef7d4a254f33aca227"),
    ("\ud800x", "\ud800x", "83c07842ad388def6e27c4c1be9e3fea"),
    ("🍎", "🍎", "5779679d94f8eeee0a2b7ce4c7309585"),
    ("", "", "2e160f03dd803a6c8e95b16c61352e59"),
]


@pytest.mark.parametrize(("text", "normal", "key"), GOLDEN, ids=[ascii(text) for text, _, _ in GOLDEN])
def test_key_is_pinned(text: str, normal: str, key: str) -> None:
    assert normalise(text) == normal
    assert text_key("0123456789ab", normalise(text)) == sha256(f"0123456789ab\n{normal}")[:32] == key


def test_key_of_a_text_under_the_spec_above_is_pinned() -> None:
    assert text_key(spec_id(dataset()), normalise("Ａ zebra\r\n")) == "1397e363cd9906610db7f362650bac5a"


# what is in the spec

NEW_SPEC: dict[str, dict[str, Any]] = {
    "model": {"llm": {"model": "gpt-5"}},
    "prompt": {"prompt": "You tag long notes."},
    "line break in the prompt": {"prompt": "You tag short notes. メモに付ける。"},
    "tag order": {"tags": [{"id": "animal", "description": "Zebras"}, {"id": "fruit", "description": "Apples; 果物"}]},
    "tag added": {"tags": [*yaml.safe_load(BASE)["tags"], {"id": "weather"}]},
    "tag removed": {"tags": [{"id": "fruit", "description": "Apples; 果物"}]},
    "tag renamed": {
        "tags": [{"id": "fruits", "description": "Apples; 果物"}, {"id": "animal", "description": "Zebras"}]
    },
    "description": {"tags": [{"id": "fruit", "description": "Apples"}, {"id": "animal", "description": "Zebras"}]},
    "max_tags": {"max_tags": 1},
    "allow_none": {"allow_none": False},
    "revision": {"revision": 2},
    "temperature": {"llm": {"params": {"temperature": 0.6}}},
    "seed": {"llm": {"params": {"seed": 1}}},
    "reasoning_effort": {"llm": {"params": {"reasoning_effort": "low"}}},
    "max_completion_tokens": {"llm": {"params": {"max_completion_tokens": 100}}},
    "response_format": {"llm": {"params": {"response_format": {"type": "json_object"}}}},
    "extra_body": {"llm": {"params": {"extra_body": {"top_k": 1}}}},
    "an example": {"examples": [{"text": "An apple.", "tags": ["fruit"]}]},
    "an example's text": {"examples": [{"text": "Two apples.", "tags": ["fruit"]}]},
    "an example's tags": {"examples": [{"text": "An apple.", "tags": ["fruit", "animal"]}]},
    "the order of an example's tags": {"examples": [{"text": "An apple.", "tags": ["animal", "fruit"]}]},
    "an example without a tag": {"examples": [{"text": "An apple.", "tags": []}]},
    "two examples": {"examples": [{"text": "Apple", "tags": ["fruit"]}, {"text": "Zebra", "tags": ["animal"]}]},
    "two in another order": {"examples": [{"text": "Zebra", "tags": ["animal"]}, {"text": "Apple", "tags": ["fruit"]}]},
    "an example in other characters": {"examples": [{"text": "Ａｐｐｌｅ", "tags": ["fruit"]}]},
    "confidence": {"confidence": True},
}

SAME_SPEC: dict[str, dict[str, Any]] = {
    "dataset": {"dataset": "other"},
    "schedule": {"schedule": "0 1 * * *", "timezone": "Asia/Tokyo", "start_date": "2026-11-01"},
    "storage": {"storage": "s3://elsewhere/below", "storage_conn_id": "minio"},
    "source": {"source": {"conn_id": "other", "table": "x", "id_column": "y", "text_columns": ["z"]}},
    "source's times": {"source": {"updated_at": "at", "timezone": "Asia/Tokyo", "lookback": "2d", "max_chars": 9}},
    "target": {"target": {"conn_id": "other", "table": "x"}},
    "endpoint": {"llm": {"conn_id": "other", "pool": "llm"}},
    "mode": {"llm": {"mode": "batch"}},
    "speed": {"llm": {"concurrency": 1, "requests_per_minute": 1, "tokens_per_minute": 1}},
    "price": {"llm": {"price": {"input": 1, "output": 2}}},
    "service_tier": {"llm": {"params": {"service_tier": "flex"}}},
    "user": {"llm": {"params": {"user": "team"}}},
    "timeout": {"llm": {"params": {"timeout": 10}}},
    "prompt_cache_key": {"llm": {"params": {"prompt_cache_key": "notes"}}},
    "limits": {"limits": {"max_cost_usd": 1, "max_failed_fraction": 1, "max_deleted_fraction": 1}},
    "shards": {"shards": {"texts_per_shard": 1, "max": 1}},
    "lock": {"lock": {"conn_id": "redis"}},
    "alerts": {"alerts": {"to": ["a@example.com"], "deadline": "2h"}},
    "defaults written out": {"allow_none": True, "revision": 1, "examples": [], "confidence": False},
    "blanks around the prompt": {"prompt": "\n You tag short notes.\nメモに付ける。 \n\n"},
    "blanks around a description": {
        "tags": [{"id": "fruit", "description": " Apples; 果物\n"}, {"id": "animal", "description": "Zebras "}]
    },
}


@pytest.mark.parametrize("changes", NEW_SPEC.values(), ids=NEW_SPEC.keys())
def test_what_decides_an_answer_makes_a_new_spec(changes: dict[str, Any]) -> None:
    assert spec_id(dataset(changes)) != spec_id(dataset())


def test_each_such_change_makes_a_spec_of_its_own() -> None:
    assert len({spec_id(dataset(changes)) for changes in NEW_SPEC.values()}) == len(NEW_SPEC)


@pytest.mark.parametrize("changes", SAME_SPEC.values(), ids=SAME_SPEC.keys())
def test_what_decides_no_answer_keeps_the_spec(changes: dict[str, Any]) -> None:
    assert spec_id(dataset(changes)) == spec_id(dataset())


# how the file is written

REWRITTEN: dict[str, str] = {
    "block chomped": BASE.replace("prompt: |\n", "prompt: |-\n"),
    "block kept": BASE.replace("prompt: |\n", "prompt: |+\n").replace("付ける。\n", "付ける。\n\n"),
    "prompt indented": BASE.replace("  You tag", "      You tag").replace("  メモ", "      メモ"),
    "prompt quoted": BASE.replace(
        "prompt: |\n  You tag short notes.\n  メモに付ける。\n", 'prompt: "You tag short notes.\\nメモに付ける。"\n'
    ),
    "comments": BASE.replace("max_tags: 2", "# how many\nmax_tags: 2   # at most"),
    "Windows line ends": BASE.replace("\n", "\r\n"),
    "keys in another order": yaml.safe_dump(dict(reversed(yaml.safe_load(BASE).items())), sort_keys=False),
    "keys sorted, in block style": yaml.safe_dump(yaml.safe_load(BASE), default_flow_style=False),
    "flow style": json.dumps(yaml.safe_load(BASE)),
}


@pytest.mark.parametrize("text", REWRITTEN.values(), ids=REWRITTEN.keys())
def test_how_the_file_is_written_keeps_the_spec(text: str) -> None:
    assert text != BASE
    assert spec_id(dataset(text=text)) == spec_id(dataset())


def test_parameters_in_another_order_keep_the_spec() -> None:
    first = dataset({"llm": {"params": {"seed": 1, "extra_body": {"a": 1, "b": 2}}}})
    second = dataset({"llm": {"params": {"extra_body": {"b": 2, "a": 1}, "seed": 1}}})

    assert spec_id(first) == spec_id(second)


PARAMS: dict[str, dict[str, Any]] = {
    "numbers": {"temperature": 1.0, "top_p": 1e-7, "seed": 2**53},
    "text": {"stop": ["。", "\n", "é"]},
    "token ids as numbers": {"logit_bias": {2: 1, 10: -1}},
    "nested": {"extra_body": {"guided": {"b": [1, None, True], "a": {}}}},
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_a_frozen_dataset_has_the_spec_of_its_file(params: dict[str, Any]) -> None:
    before = dataset({"llm": {"params": params}})
    frozen = parse_dataset(json.loads(before.model_dump_json()), "dataset.json")

    assert spec_id(frozen) == spec_id(before)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


examples = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.text(min_size=1).filter(str.strip),
            "tags": st.lists(st.sampled_from(["fruit", "animal"]), max_size=2, unique=True),
        }
    ),
    max_size=3,
)


@given(examples, st.booleans())
@settings(deadline=None)
def test_a_frozen_dataset_has_the_spec_of_its_examples(shown: list[dict[str, Any]], confidence: bool) -> None:
    before = dataset({"examples": shown, "confidence": confidence})
    frozen = parse_dataset(json.loads(before.model_dump_json()), "dataset.json")

    assert spec_id(frozen) == spec_id(before)


@given(st.integers(0, 9), st.booleans(), st.integers(1, 5))
@settings(deadline=None)
def test_a_spec_without_examples_and_confidence_is_as_it_was_before_there_were_any(
    revision: int, allow_none: bool, max_tags: int
) -> None:
    spec = spec_of(dataset({"revision": revision, "allow_none": allow_none, "max_tags": max_tags}))

    before = json.loads(CANONICAL) | {"revision": revision, "allow_none": allow_none, "max_tags": max_tags}
    assert spec == before


@given(st.text(min_size=1), st.dictionaries(st.text("abc", min_size=1), plain, max_size=3))
@settings(deadline=None)
def test_freezing_keeps_the_spec_of_any_dataset(description: str, params: dict[str, Any]) -> None:
    before = dataset({"tags": [{"id": "a", "description": description}], "llm": {"params": params}})
    frozen = parse_dataset(json.loads(before.model_dump_json()), "dataset.json")

    assert spec_id(frozen) == spec_id(before)


# texts that count as the same

texts = st.text(st.characters(), max_size=40)  # all of Unicode, surrogates included
blanks = st.text(" \t\r\n\u3000\u00a0\u2003\u2028\x0b\x0c", max_size=3)


MARKS = [chr(c) for c in range(0x20000) if unicodedata.combining(unicodedata.normalize("NFKD", chr(c))[0])]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a", "é", "か", "ﾊ", "\uac00", "x" * 300]), st.lists(st.sampled_from(MARKS))),
        max_size=3,
    ),
    st.integers(1, 400),
)
def test_many_marks_in_a_row_have_the_same_normal_form(parts: list[tuple[str, list[str]]], times: int) -> None:
    text = "".join(start + "".join(marks) * times for start, marks in parts)

    assert normalise(text) == unicodedata.normalize("NFKC", text).strip()


def test_a_megabyte_of_marks_is_normalised_in_seconds() -> None:
    clock = time.process_time()

    assert len(normalise("a" + "\u0301\u0316" * 500_000)) == 1_000_000
    assert time.process_time() - clock < 20


@given(texts)
@example("\u00a8")
@example("\ufdfa")
@example("\r\n\r")
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(texts)
@example("\ud800")
@example("\udfff\ud800")
@example("\x00")
def test_any_text_has_a_key(text: str) -> None:
    key = text_key("0123456789ab", normalise(text))

    assert len(key) == 32
    assert set(key) <= set("0123456789abcdef")


@given(texts, blanks, blanks)
def test_surrounding_white_space_does_not_count(text: str, before: str, after: str) -> None:
    assert normalise(before + text + after) == normalise(text)


@given(st.lists(st.text(st.characters(exclude_characters="\r\n"), max_size=9), max_size=4))
def test_kinds_of_line_ends_do_not_count(lines: list[str]) -> None:
    assert normalise("\r\n".join(lines)) == normalise("\r".join(lines)) == normalise("\n".join(lines))


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20))
def test_width_of_latin_characters_does_not_count(text: str) -> None:
    wide = "".join(chr(ord(character) + 0xFEE0) for character in text)

    assert normalise(wide) == normalise(text) == text


@given(st.text(st.characters(min_codepoint=0xFF66, max_codepoint=0xFF9F), max_size=20))
def test_width_of_katakana_does_not_count(text: str) -> None:
    assert normalise(text) == normalise(unicodedata.normalize("NFKC", text))


@given(texts)
def test_composed_and_decomposed_characters_count_as_the_same(text: str) -> None:
    assert normalise(unicodedata.normalize("NFD", text)) == normalise(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("apple", "Apple"),
        ("a b", "ab"),
        ("a b", "a  b"),
        ("a\nb", "a b"),
        ("a\n\nb", "a\nb"),
        ("は", "ば"),
        ("apple.", "apple"),
    ],
)
def test_other_differences_count(one: str, other: str) -> None:
    assert text_key("0123456789ab", normalise(one)) != text_key("0123456789ab", normalise(other))


variants = st.sampled_from(
    [
        str,
        lambda t: f" {t}\r\n",
        lambda t: t.replace("\n", "\r\n"),
        lambda t: unicodedata.normalize("NFD", t),
        str.upper,
    ]
)


@given(texts, texts, variants)
def test_keys_are_equal_where_the_normal_forms_are_and_nowhere_else(text: str, other: str, vary: Any) -> None:
    for second in (vary(text), other):
        same = text_key("0123456789ab", normalise(text)) == text_key("0123456789ab", normalise(second))
        assert same == (normalise(text) == normalise(second))


def test_the_same_text_has_another_key_under_another_spec() -> None:
    assert text_key("0123456789ab", "apple") != text_key("0123456789ac", "apple")


@pytest.mark.parametrize("seed", ["0", "1"])
def test_spec_and_keys_are_the_same_in_every_process(seed: str) -> None:
    program = (
        "import json, sys\n"
        "from tagger.dataset_files import parse_dataset\n"
        "from tagger.spec import normalise, spec_id, text_key\n"
        "content, text = json.load(sys.stdin)\n"
        "spec = spec_id(parse_dataset(content, 'notes.yaml'))\n"
        "print(spec, text_key(spec, normalise(text)))\n"
    )
    params = dict.fromkeys(("seed", "top_p", "presence_penalty", "user", "timeout", "store", "frequency_penalty"), 1)
    content = merged(yaml.safe_load(BASE), {"llm": {"params": params}})
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([content, "ｱｯﾌﾟﾙ\r\n"]),
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )

    here = spec_id(parse_dataset(content, "notes.yaml"))
    assert done.stdout.split() == [here, text_key(here, "アップル")]
