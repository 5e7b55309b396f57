"""The estimate: tokens predicted from records by script, or guessed from lengths, with a band around the cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagger.cache import Chars, Record, Usage
from tagger.dataset import Dataset
from tagger.dataset_files import parse_dataset
from tagger.estimate import (
    LEAST_SAMPLE,
    REASONING_TOKENS,
    SAMPLE,
    Lengths,
    estimate,
    example_cost,
    guess_usage,
    sample_size,
)
from tagger.packing import SHORT_CHARS
from tagger.price import estimated_tokens
from tagger.prompt import instructions
from tagger.runs import Estimate
from tests.project import MINIMAL, merged

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
TAGS = [{"id": f"tag{i}", "description": "word " * 200} for i in range(10)]
"""Descriptions that make a prompt of 1,024 tokens and more."""


def make_dataset(llm: dict[str, Any] | None = None, **changes: Any) -> Dataset:
    return parse_dataset(merged(MINIMAL, {"llm": llm or {}, **changes}), "notes.yaml")


def lengths(dataset: Dataset, *texts: str) -> Lengths:
    found = Lengths(dataset.llm)
    for text in texts:
        found.add(text)
    return found


def record(
    text: str | None, tokens: float, *, output: int = 10, cached: int = 0, asked: str = "online", **fields: Any
) -> Record:
    """Returns the record of a text whose request had so many tokens."""
    return Record(
        status="tagged",
        tags=[],
        model="offline-stand-in",
        usage=Usage(input=round(tokens), cached_input=cached, output=output),
        cost_usd=None,
        finish_reason="stop",
        chars=None if text is None else Chars.of(text),
        created_at=NOON,
        **fields | {"asked": asked},
    )


def mixed_texts(count: int, seed: int = 1) -> list[str]:
    """Returns texts of 20 to 2,000 characters, English and Japanese ones and some that are both."""
    random = Random(seed)
    sizes = [(random.randint(0, 2000), random.randint(0, 800)) for _ in range(count)]
    kinds = [random.choice(["en", "ja", "both"]) for _ in range(count)]
    return [
        "e" * (20 if kind == "ja" else narrow) + "日" * (0 if kind == "en" else wide)
        for (narrow, wide), kind in zip(sizes, kinds, strict=True)
    ]


def used_by(text: str, *, fixed: float = 300, narrow: float = 0.21, wide: float = 0.72) -> float:
    """Returns the tokens of a text under a tokenizer that is none of the heuristics."""
    chars = Chars.of(text)
    return fixed + narrow * chars.narrow + wide * chars.wide


def total(dataset: Dataset, records: Iterable[Record], *texts: str) -> Estimate:
    return estimate(dataset, lengths(dataset, *texts), list(records))


def test_tokens_are_predicted_by_script() -> None:
    dataset, texts = make_dataset(), mixed_texts(64)
    records = [record(text, used_by(text)) for text in texts]

    for new in (["e" * 1500], ["日" * 700], mixed_texts(500, seed=2)):
        assert total(dataset, records, *new).input_tokens == pytest.approx(sum(map(used_by, new)), rel=0.05)


def test_what_the_records_used_is_predicted_for_their_own_texts_with_calls_made_again() -> None:
    dataset, texts = make_dataset(), mixed_texts(64)
    records = [record(text, used_by(text) * (3 if i % 8 == 0 else 1)) for i, text in enumerate(texts)]

    expected = total(dataset, records, *texts)

    assert expected.input_tokens == pytest.approx(sum(r.usage.input for r in records), rel=1e-3)
    assert expected.output_tokens == sum(r.usage.output for r in records)
    assert expected.basis == "records"


def test_a_few_texts_far_off_do_not_bend_what_a_character_takes() -> None:
    dataset = make_dataset()
    texts = ["e" * (50 * i) for i in range(64)]
    records = [record(text, used_by(text) + (20_000 if i == 63 else 0)) for i, text in enumerate(texts)]

    long, short = (total(dataset, records, "e" * n).input_tokens for n in (3000, 0))

    assert long - short == pytest.approx(3000 * 0.21, rel=0.1)


def test_a_script_that_no_record_has_keeps_the_heuristic() -> None:
    dataset = make_dataset()
    records = [record(text, used_by(text)) for text in ("e" * (30 * i) for i in range(64))]

    with_it, without = (total(dataset, records, "日" * n).input_tokens for n in (1000, 0))

    assert with_it - without == 1000
    band = [total(dataset, records, text) for text in ("日" * 1000, "e" * 1000)]
    unknown, known = ((e.high_usd or 0) - (e.usd or 0) for e in band)
    assert unknown > 3 * known


def test_one_record_does_not_throw_the_heuristic_over() -> None:
    dataset = make_dataset()
    fixed = estimated_tokens(instructions(dataset))

    expected = total(dataset, [record("e" * 400, fixed + 130)], "e" * 4000)

    assert fixed + 700 < expected.input_tokens < fixed + 1800


def test_cached_input_and_output_are_predicted_by_their_means() -> None:
    dataset = make_dataset({"price": {"input": 1.0, "cached_input": 0.1, "output": 10.0}})
    records = [record("e" * 400, 1000, cached=500 * (i % 2), output=20 + i % 3) for i in range(60)]

    expected = total(dataset, records, *["e" * 400] * 100)

    assert (expected.input_tokens, expected.cached_input_tokens) == (100_000, 25_000)
    assert expected.output_tokens == 2100
    assert expected.usd == pytest.approx((75_000 * 1.0 + 25_000 * 0.1 + 2100 * 10.0) / 1e6)


def test_old_records_without_lengths_give_their_mean() -> None:
    dataset = make_dataset()
    records = [record(None, 900 + i) for i in range(41)]

    assert total(dataset, records, "e", "e" * 90_000).input_tokens == 2 * 920
    assert total(dataset, [*records, record("e", 5)], "e").input_tokens == pytest.approx(898, abs=1)


def test_few_old_records_among_newer_ones_are_left_out() -> None:
    dataset, texts = make_dataset(), mixed_texts(60)
    records = [record(text, used_by(text)) for text in texts] + [record(None, 10**6)] * 10

    assert total(dataset, records, "e" * 1500).input_tokens == pytest.approx(used_by("e" * 1500), rel=0.05)


def test_todays_price_counts_and_not_that_of_the_records() -> None:
    cheap, dear = (make_dataset({"price": {"input": p, "output": p}}) for p in (1.0, 5.0))
    records = [record("e" * 400, 1000) for _ in range(20)]

    expected = [total(dataset, records, "e" * 400).usd or 0 for dataset in (cheap, dear)]

    assert expected[1] == pytest.approx(5 * expected[0])


@pytest.mark.parametrize("changes", [{"mode": "batch"}, {"params": {"service_tier": "flex"}}], ids=["batch", "flex"])
@pytest.mark.parametrize("known", [True, False], ids=["records", "lengths"])
def test_what_can_wait_costs_half(changes: dict[str, Any], known: bool) -> None:
    records = [record("e" * 400, 1000) for _ in range(20 * known)]

    now, later = (total(make_dataset(llm), records, *["e" * 400] * 50).usd or 0 for llm in ({}, changes))

    assert later == pytest.approx(now / 2)


@pytest.mark.parametrize("known", [True, False], ids=["records", "lengths"])
def test_an_unknown_price_is_no_cost_of_zero(known: bool) -> None:
    expected = total(make_dataset({"price": None}), [record("e" * 400, 1000)] * 20 * known, "e" * 400)

    assert (expected.usd, expected.low_usd, expected.high_usd) == (None, None, None)
    assert expected.input_tokens > 100


def test_a_price_of_zero_costs_nothing() -> None:
    expected = total(make_dataset({"price": 0}), [], "e" * 400)

    assert (expected.usd, expected.low_usd, expected.high_usd) == (0, 0, 0)


def test_no_texts_take_nothing_even_where_the_price_is_not_known() -> None:
    expected = total(make_dataset({"price": None}), [])

    assert (expected.texts, expected.input_tokens, expected.usd, expected.high_usd, expected.seconds) == (0, 0, 0, 0, 0)


# The band


def test_the_band_holds_what_texts_like_the_sample_cost() -> None:
    dataset, random = make_dataset(), Random(5)
    inside = 0
    for trial in range(100):
        texts = mixed_texts(164, seed=trial)
        used = [used_by(text) * random.choice([1, 1, 1, 2]) + random.gauss(0, 40) for text in texts]
        records = [record(text, tokens, output=random.randint(5, 60)) for text, tokens in zip(texts, used, strict=True)]

        expected = total(dataset, records[:64], *texts[64:])

        actual = sum(r.usage.input * 1.0 + r.usage.output * 10.0 for r in records[64:]) / 1e6
        assert expected.low_usd is not None and expected.high_usd is not None
        inside += expected.low_usd <= actual <= expected.high_usd
    assert inside >= 90


def test_the_band_is_narrower_the_more_records_there_are() -> None:
    dataset = make_dataset()
    records = [record("e" * 400, tokens) for tokens in (200, 700, 1300, 1800)]

    few, many = (total(dataset, records * times, *["e" * 400] * 1000) for times in (1, 16))

    assert (few.high_usd or 0) - (few.low_usd or 0) > 4 * ((many.high_usd or 0) - (many.low_usd or 0))


def test_a_guess_has_a_wide_band_and_says_what_it_is() -> None:
    expected = total(make_dataset(), [], "e" * 400)

    assert expected.usd is not None and expected.usd > 0
    assert (expected.low_usd, expected.high_usd) == pytest.approx((expected.usd / 2, expected.usd * 2))
    assert expected.basis == "lengths"


TOKENS = st.integers(min_value=0, max_value=10**6)
RECORDS = st.lists(
    st.builds(
        record,
        st.none() | st.text(max_size=50),
        TOKENS,
        output=TOKENS,
        cached=TOKENS,
        asked=st.sampled_from(["online", "batch", "together"]),
    ),
    max_size=20,
)
TEXTS = st.lists(st.text(max_size=30) | st.sampled_from(["e" * 5000, "日" * 5000, "é" * 900, "🙂" * 900]), max_size=20)


@settings(max_examples=150, deadline=None)
@given(RECORDS, TEXTS, st.sampled_from([1, 2, 20]), st.sampled_from(["online", "batch"]), st.none() | st.just(0.5))
def test_no_estimate_is_nonsense(
    records: list[Record], texts: list[str], together: int, mode: str, rate: float | None
) -> None:
    llm = {"mode": mode, "texts_per_request": together if mode == "online" else 1, "concurrency": 2}
    dataset = make_dataset(llm)

    expected = estimate(dataset, lengths(dataset, *texts), records, requests_per_second=rate)

    assert expected.texts == len(texts)
    counts = (expected.input_tokens, expected.cached_input_tokens, expected.output_tokens)
    assert all(math.isfinite(count) and count >= 0 for count in counts)
    assert expected.low_usd is not None and expected.usd is not None and expected.high_usd is not None
    assert 0 <= expected.low_usd <= expected.usd <= expected.high_usd < math.inf
    assert expected.seconds is None or expected.seconds >= 0


# The first run


def test_a_guess_counts_prompt_text_and_answer() -> None:
    dataset = make_dataset()
    fixed = estimated_tokens(instructions(dataset))

    english, japanese = (guess_usage(dataset, lengths(dataset, text)) for text in ("e" * 4000, "日" * 4000))

    assert fixed + 1000 < english.input < fixed + 1060
    assert japanese.input == english.input + 3000
    assert 5 < english.output < 30


@pytest.mark.parametrize(
    ("model", "params", "thinks"),
    [
        ("gpt-5-mini", {}, True),
        ("openai/gpt-5", {"reasoning_effort": "low"}, True),
        ("o4-mini", {}, True),
        ("gpt-5-mini", {"reasoning_effort": "minimal"}, False),
        ("gpt-5.1", {"reasoning_effort": "none"}, False),
        ("gpt-4o-mini", {}, False),
        ("olmo-2", {}, False),
    ],
)
def test_reasoning_models_think_before_they_answer(model: str, params: dict[str, Any], thinks: bool) -> None:
    dataset = make_dataset({"model": model, "params": params})

    assert (guess_usage(dataset, lengths(dataset, "apple")).output > REASONING_TOKENS) is thinks


def test_more_and_longer_tags_make_longer_answers() -> None:
    few, many = (make_dataset(max_tags=n) for n in (1, 3))
    long = make_dataset(tags=[{"id": "a_very_long_tag_of_fifty_characters_that_goes_on_" + str(i)} for i in range(3)])

    outputs = [guess_usage(dataset, lengths(dataset, *["x"] * 100)).output for dataset in (few, many, long)]

    assert outputs[0] < outputs[1] < outputs[2]


def test_a_long_prompt_is_guessed_to_be_cached_by_the_endpoint() -> None:
    short, long = make_dataset({"concurrency": 10}), make_dataset({"concurrency": 10}, tags=TAGS)
    batch = make_dataset({"mode": "batch"}, tags=TAGS)
    texts = ["apple"] * 100

    cached = {name: guess_usage(d, lengths(d, *texts)) for name, d in (("short", short), ("long", long), ("b", batch))}

    assert cached["short"].cached_input == cached["b"].cached_input == 0
    of_each = estimated_tokens(instructions(long)) // 128 * 128
    assert cached["long"].cached_input == 90 * of_each


def test_the_upper_bound_of_a_guess_does_without_the_endpoints_cache() -> None:
    dataset = make_dataset({"price": {"input": 1.0, "cached_input": 0.1, "output": 1.0}, "concurrency": 1}, tags=TAGS)

    expected = total(dataset, [], *["apple"] * 1000)

    assert expected.usd is not None and expected.high_usd is not None
    assert expected.high_usd == pytest.approx((expected.input_tokens + expected.output_tokens) / 1e6)
    assert expected.high_usd > 3 * expected.usd


# Several texts in one request


def test_short_texts_share_the_prompt_and_long_ones_do_not() -> None:
    dataset = make_dataset({"texts_per_request": 20}, tags=TAGS)
    alone = make_dataset(tags=TAGS)
    short, long = ["apple"] * 100, ["x" * (SHORT_CHARS + 1)] * 100

    shared = guess_usage(dataset, lengths(dataset, *short)).input
    assert shared < guess_usage(alone, lengths(alone, *short)).input / 10
    assert lengths(dataset, *short, *long).requests == 5 + 100
    assert guess_usage(dataset, lengths(dataset, *long)).input == guess_usage(alone, lengths(alone, *long)).input


def test_records_of_texts_asked_alone_tell_what_they_take_together() -> None:
    dataset = make_dataset({"texts_per_request": 20})
    fixed = estimated_tokens(instructions(dataset))
    records = [record("e" * 100, used_by("e" * 100, fixed=fixed + 25)) for _ in range(64)]

    expected = total(dataset, records, *["e" * 100] * 1000)

    together = 50 * estimated_tokens(instructions(dataset, together=True)) + 1000 * (0.21 * 100 + 10)
    assert expected.input_tokens == pytest.approx(together, rel=0.15)
    assert expected.basis == "records"
    assert expected.usd is not None and expected.high_usd is not None
    assert expected.high_usd >= 1.25 * expected.usd


def test_records_of_texts_asked_together_say_nothing_of_texts_asked_alone() -> None:
    dataset = make_dataset()
    records = [record("e" * 100, 30, asked="together") for _ in range(64)]

    expected = total(dataset, records, *["e" * 100] * 10)

    assert expected.basis == "lengths"
    assert expected.input_tokens > 10 * estimated_tokens(instructions(dataset))


# Time


@pytest.mark.parametrize(
    ("llm", "rate", "seconds"),
    [
        ({"requests_per_minute": 60}, None, 600),
        ({"requests_per_minute": 60}, 0.5, 1200),
        ({"requests_per_minute": 60}, 100.0, 600),
        ({"requests_per_minute": 60, "texts_per_request": 20}, None, 30),
        ({}, 10.0, 60),
        ({}, None, None),
        ({"mode": "batch", "requests_per_minute": 60}, 10.0, None),
    ],
)
def test_the_time_is_that_at_the_limits_or_unknown(
    llm: dict[str, Any], rate: float | None, seconds: float | None
) -> None:
    dataset = make_dataset(llm)

    expected = estimate(dataset, lengths(dataset, *["apple"] * 600), [], requests_per_second=rate)

    assert expected.seconds == seconds


def test_the_time_at_a_limit_of_tokens_goes_by_all_of_them() -> None:
    expected = total(make_dataset({"tokens_per_minute": 1000}), [], *["apple"] * 600)

    assert expected.seconds == pytest.approx((expected.input_tokens + expected.output_tokens) * 60 / 1000)


@pytest.mark.parametrize(("texts", "size"), [(1, LEAST_SAMPLE), (40, 40), (10**6, SAMPLE)])
def test_as_many_records_are_read_as_there_are_new_texts_within_bounds(texts: int, size: int) -> None:
    assert sample_size(texts) == size


SHOWN = [{"text": "a" * 100, "tags": ["fruit"]}, {"text": "日" * 100, "tags": ["animal", "weather"]}]


def test_a_guess_counts_the_examples_for_each_request() -> None:
    plain, shown = make_dataset(), make_dataset(examples=SHOWN)

    before, after = (guess_usage(each, lengths(each, "apple", "zebra")) for each in (plain, shown))

    assert 2 * 125 <= after.input - before.input <= 2 * 165
    assert after.output == before.output


def test_a_guess_counts_what_confidence_adds_to_prompt_and_answer() -> None:
    plain, sure = make_dataset(max_tags=1), make_dataset(max_tags=1, confidence=True)

    before, after = (guess_usage(each, lengths(each, *["apple"] * 100)) for each in (plain, sure))

    assert after.output - before.output == 100 * estimated_tokens('{"tag": , "confidence": 0.95}')
    assert after.input > before.input


@pytest.mark.parametrize(("mode", "usd"), [("online", 1.0), ("batch", 0.5)])
def test_one_more_example_costs_its_tokens_in_each_request(mode: str, usd: float) -> None:
    dataset = make_dataset({"mode": mode, "price": {"input": 1.0, "cached_input": 0.1, "output": 8.0}}, examples=SHOWN)

    tokens, cost = example_cost(dataset)

    assert 65 <= tokens <= 80
    assert cost == pytest.approx(1000 * tokens * usd / 1e6)


def test_where_the_price_is_unknown_an_example_has_tokens_alone() -> None:
    content = merged(MINIMAL, {"examples": SHOWN, "llm": {"model": "own-model"}})
    del content["llm"]["price"]

    tokens, cost = example_cost(parse_dataset(content, "notes.yaml"))

    assert tokens > 0
    assert cost is None
