"""Figures of quality: they are scikit-learn's, and their intervals are those of resampled texts."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (  # type: ignore[import-untyped]
    accuracy_score,
    confusion_matrix,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)

from tagger.quality import Quality, Value, measure, per_text, reliability, resampled, weighted, weights

TAGS = ["a", "b", "c", "d"]

some_tags = st.sets(st.sampled_from(TAGS), max_size=3)
answers = st.lists(st.tuples(some_tags, some_tags), min_size=1, max_size=40)
single = st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=40)


def matrix(tags: list[set[str]]) -> np.ndarray:
    return np.array([[tag in each for tag in TAGS] for each in tags], dtype=int)


def quality(pairs: list[tuple[set[str], set[str]]], seed: int = 0) -> Quality:
    return measure([gold for gold, _ in pairs], [got for _, got in pairs], TAGS, seed)


def same(value: Value, expected: float) -> bool:
    return value.value is None if math.isnan(expected) else value.value == pytest.approx(expected)


@settings(deadline=None, max_examples=150)
@given(answers)
def test_figures_agree_with_scikit_learn_on_dense_labels(pairs: list[tuple[set[str], set[str]]]) -> None:
    gold, got = matrix([g for g, _ in pairs]), matrix([p for _, p in pairs])
    found = quality(pairs)

    each = precision_recall_fscore_support(gold, got, average=None, zero_division=np.nan)
    for i, tag in enumerate(found.tags):
        assert (tag.tag, tag.support) == (TAGS[i], each[3][i])
        assert all(same(value, each[k][i]) for k, value in enumerate((tag.precision, tag.recall, tag.f1)))
        (_, false_positive), (_, right) = multilabel_confusion_matrix(gold, got)[i]
        assert (tag.right, tag.predicted) == (right, right + false_positive)
    for average, scores in (("micro", found.micro), ("macro", found.macro)):
        expected = precision_recall_fscore_support(gold, got, average=average, zero_division=np.nan)
        assert all(same(v, expected[k]) for k, v in enumerate((scores.precision, scores.recall, scores.f1)))
    assert same(found.exact_match, accuracy_score(gold, got))


@settings(deadline=None, max_examples=50)
@given(answers, st.integers(0, 5))
def test_a_resample_has_the_figures_of_scikit_learn_with_its_weights(
    pairs: list[tuple[set[str], set[str]]], seed: int
) -> None:
    gold, got = matrix([g for g, _ in pairs]), matrix([p for _, p in pairs])
    rows = next(weights(len(pairs), seed, 2))
    figures = weighted(per_text([g for g, _ in pairs], [p for _, p in pairs], TAGS), rows)

    for k, row in enumerate(rows):
        picked = np.repeat(np.arange(len(pairs)), row.astype(int))
        for average, names in (("micro", "micro"), ("macro", "macro")):
            expected = precision_recall_fscore_support(gold[picked], got[picked], average=average, zero_division=np.nan)
            found = [getattr(figures, f"{names}_{figure}")[k] for figure in ("precision", "recall", "f1")]
            assert found == pytest.approx(list(expected[:3]), nan_ok=True)
        each = precision_recall_fscore_support(gold[picked], got[picked], average=None, zero_division=np.nan)
        for figure, values in zip(("precision", "recall", "f1"), each, strict=False):
            assert getattr(figures, figure)[k, : len(TAGS)] == pytest.approx(values, nan_ok=True)
        assert figures.exact_match[k] == pytest.approx(accuracy_score(gold[picked], got[picked]))


@settings(deadline=None, max_examples=50)
@given(single)
def test_with_one_tag_each_confusions_are_the_confusion_matrix(pairs: list[tuple[str, str]]) -> None:
    expected = confusion_matrix([g for g, _ in pairs], [p for _, p in pairs], labels=TAGS)
    found = quality([({g}, {p}) for g, p in pairs])

    counts = {(each.gold, each.given): each.texts for each in found.confusions}
    off_diagonal = {
        (gold, given): expected[i, j]
        for i, gold in enumerate(TAGS)
        for j, given in enumerate(TAGS)
        if i != j and expected[i, j]
    }
    assert counts == off_diagonal
    assert [each.texts for each in found.confusions] == sorted(counts.values(), reverse=True)


def test_a_missing_tag_is_confused_with_each_wrong_one() -> None:
    found = quality([({"a", "b"}, {"a", "c", "d"})])

    assert [(each.gold, each.given) for each in found.confusions] == [("b", "c"), ("b", "d")]


def test_no_tag_is_confused_too() -> None:
    found = quality([(set(), {"a"}), ({"b"}, set()), ({"b"}, set()), (set(), set())])

    pairs = [(each.gold, each.given, each.texts, each.support) for each in found.confusions]
    assert pairs == [("b", "(none)", 2, 2), ("(none)", "a", 1, 2)]
    assert (found.gold_untagged, found.predicted_untagged, found.both_untagged) == (2, 3, 1)


def test_a_tag_that_no_text_has_or_got_has_no_figure_and_no_part_in_macro() -> None:
    found = quality([({"a"}, {"a"}), ({"b"}, {"b"}), ({"b"}, {"c"})])

    d = found.tags[3]
    nothing = Value(value=None, low=None, high=None)
    assert (d.precision, d.recall, d.f1, found.unseen) == (nothing, nothing, nothing, ["d"])
    assert found.macro.f1.value == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found.macro.recall.value == pytest.approx((1 + 1 / 2) / 2)


def test_a_set_of_one_tag_is_measured() -> None:
    found = measure([{"a"}, set(), {"a"}], [{"a"}, {"a"}, set()], ["a"], 0)

    assert found.tags[0].f1.value == found.macro.f1.value == 0.5


def test_one_text_is_measured() -> None:
    assert quality([({"a"}, {"a"})]).exact_match == Value(value=1, low=1, high=1)


def test_intervals_are_the_same_for_a_seed() -> None:
    pairs: list[tuple[set[str], set[str]]] = [({"a"}, {"a"}), ({"b"}, {"a"}), ({"c"}, {"c"})] * 10

    assert quality(pairs, 1) == quality(pairs, 1) != quality(pairs, 2)


def test_an_interval_of_a_share_is_about_that_of_its_standard_error() -> None:
    found = quality([({"a"}, {"a"})] * 300 + [({"a"}, {"b"})] * 100)

    assert found.exact_match.low is not None and found.exact_match.high is not None
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert found.exact_match.low == pytest.approx(0.75 - half, abs=0.008)
    assert found.exact_match.high == pytest.approx(0.75 + half, abs=0.008)


def test_two_sets_of_one_size_are_resampled_alike() -> None:
    gold = [{"a"}, {"b"}, {"c"}, {"d"}] * 5
    one, other = per_text(gold, gold, TAGS), per_text(gold, [{"a"}] * 20, TAGS)

    drawn = resampled(other, 3, 50).exact_match
    assert np.all(drawn <= resampled(one, 3, 50).exact_match)
    picked = np.concatenate(list(weights(20, 3, 50)))
    assert drawn == pytest.approx(picked[:, ::4].sum(axis=1) / 20)


def test_5500_texts_of_150_tags_take_less_than_ten_seconds() -> None:
    chance = np.random.default_rng(0)
    ids = [f"tag {n}" for n in range(150)]
    gold = [{ids[n]} for n in chance.integers(150, size=5500)]
    got = [{ids[n]} for n in chance.integers(150, size=5500)]

    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(gold, got, ids, 0)

    assert time.monotonic() - started < 10


def test_confidence_that_is_what_it_says_has_no_calibration_error() -> None:
    table = reliability([0.75] * 4 + [0.25] * 4, [True, True, True, False, True, False, False, False])

    assert table is not None
    assert [(each.low, each.high, each.tags, each.right) for each in table.bins] == [
        (0.2, 0.3, 4, 0.25),
        (0.7, 0.8, 4, 0.75),
    ]
    assert table.ece == pytest.approx(0)
    assert (table.tags, table.mean_confidence, table.right) == (8, 0.5, 0.5)


def test_calibration_error_is_the_distance_weighted_by_the_bins_sizes() -> None:
    table = reliability([0.95, 0.95, 0.95, 0.55], [True, False, False, True])

    assert table is not None
    assert table.ece == pytest.approx((3 * (0.95 - 1 / 3) + 1 * (1 - 0.55)) / 4)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1))
def test_every_tag_lies_in_one_bin(tags: list[tuple[float, bool]]) -> None:
    table = reliability([sure for sure, _ in tags], [right for _, right in tags])

    assert table is not None
    assert sum(each.tags for each in table.bins) == len(tags)
    assert all(each.low - 1e-9 <= each.mean_confidence <= each.high + 1e-9 for each in table.bins)


def test_without_confidence_there_is_no_table() -> None:
    assert reliability([], []) is None
