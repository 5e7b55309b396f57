"""`tagger compare`: two dataset files on the same texts: what changes, whether it is better, and what it costs."""

from __future__ import annotations

import csv
import json
import logging
import secrets
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest  # type: ignore[import-untyped]
from sklearn.metrics import (  # type: ignore[import-untyped]
    accuracy_score,
    cohen_kappa_score,
    f1_score,
    jaccard_score,
)

from demo.stand_in import StandIn, completion, error, token_usage
from tagger.agreement import agreement, mcnemar
from tagger.compare import Candidate, compare
from tagger.compare_screen import describe, verdict
from tagger.comparison import Comparison
from tagger.dataset import Dataset
from tagger.dataset_files import parse_dataset
from tagger.exceptions import InputError, RunFailed
from tests.databases import REFUSAL, put_all, teach
from tests.project import Project, merged, sqlite_project
from tests.servers import S3Store
from tests.test_cli import Shell, shell  # noqa: F401 - a fixture

APPLES = {"tags": [{"id": "fruit", "description": "apple"}, {"id": "animal", "description": "zebra"}]}
BOTH = {"tags": [{"id": "fruit", "description": "apple, banana"}, {"id": "animal", "description": "zebra"}]}
"""Two versions of the tags: the stand-in sees bananas under the second alone."""

TEXTS = ["an apple", "a banana", "a zebra", "a banana for the zebra", "nothing of the kind"]


def candidate(project: Project, file: str, **changes: Any) -> Candidate:
    content = merged(project.content, changes)
    return Candidate(file, parse_dataset(content, file))


def compared(project: Project, a: dict[str, Any], b: dict[str, Any], **options: Any) -> Comparison:
    first, second = candidate(project, "a.yaml", **a), candidate(project, "b.yaml", **b)
    return compare(first, second, project.connections, **options)


def write_labels(path: Path, *labels: tuple[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "tags"), *labels])
    return path


def bananas(count: int) -> list[str]:
    return [f"banana number {number}" for number in range(count)]


# what changes


def test_each_tag_says_how_many_texts_gained_and_lost_it(project: Project) -> None:
    put_all(project, *TEXTS)

    found = compared(project, APPLES, BOTH)

    fruit, animal = found.agreement.tags
    assert (fruit.tag, fruit.a, fruit.b, fruit.both, fruit.gained, fruit.lost) == ("fruit", 1, 3, 1, 2, 0)
    assert (animal.tag, animal.a, animal.b, animal.both, animal.kappa) == ("animal", 2, 2, 2, 1.0)
    assert (found.agreement.texts, found.agreement.changed) == (5, 2)
    assert found.agreement.same == pytest.approx(0.6)


def test_the_biggest_movers_and_where_they_go_come_first(project: Project) -> None:
    put_all(project, "a zebra", *bananas(3))
    swapped = [{"id": "animal", "description": "banana"}, {"id": "fruit", "description": "zebra"}]

    found = compared(project, BOTH, {"tags": [*swapped, {"id": "weather", "description": "rain"}]})

    assert [(move.a, move.b, move.texts) for move in found.agreement.moves] == [
        ("fruit", "animal", 3),
        ("animal", "fruit", 1),
    ]
    assert found.agreement.tags[-1].tag == "weather"


def test_rows_that_differ_are_named_by_their_ids_and_no_text_is_told(project: Project) -> None:
    put_all(project, *TEXTS)

    found = compared(project, APPLES, BOTH)

    assert [(each.row, each.a, each.b) for each in found.examples] == [
        ("1", [], ["fruit"]),
        ("3", ["animal"], ["fruit", "animal"]),
    ]
    everything = "\n".join(describe(found)) + found.model_dump_json()
    assert not any(text in everything for text in TEXTS)


def test_what_differs_in_the_spec_is_named(project: Project) -> None:
    put_all(project, *TEXTS)
    third = {"id": "weather", "description": "rain"}

    found = compared(project, APPLES, {"tags": [*BOTH["tags"], third], "max_tags": 3, "prompt": "Tag."})

    assert found.changed == [
        "the prompt",
        "the tags: only in B `weather`; another description `fruit`",
        "`max_tags`: 2 → 3",
    ]
    assert (found.tags_only_in_a, found.tags_only_in_b) == ([], ["weather"])


def test_a_sample_is_the_same_for_the_same_seed(project: Project) -> None:
    put_all(project, *bananas(60))

    rows = [[each.row for each in compared(project, APPLES, BOTH, sample=8, seed=seed).examples] for seed in (1, 1, 2)]

    assert len(rows[0]) == 8 and rows[0] == rows[1] != rows[2]


def test_refused_texts_and_texts_without_an_answer_are_counted_apart(project: Project) -> None:
    put_all(project, *TEXTS)
    teach(project.llm, apple=REFUSAL, nothing=error(400, "bad"))

    found = compared(project, APPLES, BOTH)

    for side in (found.a, found.b):
        assert (side.refused, side.unanswered) == (1, 1)
    assert found.a.untagged == pytest.approx(1 / 4)
    assert found.agreement.texts == 4


def test_a_text_that_is_too_long_is_refused_by_both(project: Project) -> None:
    put_all(project, "banana " * 20, "an apple")

    found = compared(project, merged(APPLES, {"source": {"max_chars": 50}}), BOTH)

    assert (found.a.refused, found.b.refused) == (1, 0)
    assert [(each.a, each.b) for each in found.examples] == [([], ["fruit"])]


# money


def test_nothing_is_asked_twice(tmp_path: Path, seaweedfs: S3Store, llm: StandIn) -> None:
    store = replace(seaweedfs, bucket=f"compare-{secrets.token_hex(4)}")
    store.client().create_bucket(Bucket=store.bucket)
    project = sqlite_project(tmp_path, store, llm)
    put_all(project, *TEXTS)

    first, second = compared(project, APPLES, BOTH), compared(project, APPLES, BOTH)

    assert (first.a.requests, first.b.requests) == (len(TEXTS), len(TEXTS)) and len(llm.calls) == 2 * len(TEXTS)
    assert not any((second.a.requests, second.b.requests, second.a.spent_usd, second.b.spent_usd))
    assert second.agreement == first.agreement
    assert (second.a.cost_a_text_usd, second.a.seconds_a_text) == (first.a.cost_a_text_usd, None)
    assert first.a.seconds_a_text


def test_what_the_daily_run_has_asked_is_not_asked_again(project: Project) -> None:
    put_all(project, *TEXTS)
    project.change(**APPLES)
    project.run(all_rows=True)

    assert compared(project, {}, BOTH).a.requests == 0


def test_the_cost_of_both_is_said_before_the_first_call(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    put_all(project, *TEXTS)
    with caplog.at_level(logging.INFO, "tagger"):
        compared(project, APPLES, BOTH)

    lines = [record.getMessage() for record in caplog.records]
    said = next(i for i, line in enumerate(lines) if line.startswith("compare: A would ask 5 texts for about $"))
    assert said < next(i for i, line in enumerate(lines) if line.startswith("shard 1/1"))


def cost_of_one(project: Project) -> float:
    """Return what A alone is expected to cost, as the plan has it."""
    from tagger.trial import run_trial

    dataset = candidate(project, "a.yaml", **APPLES).dataset
    expected = run_trial(dataset, TEXTS, project.connections, name="test", dry_run=True).plan.estimate
    assert expected is not None and expected.usd is not None
    return expected.usd


def test_the_cap_is_for_both_together(project: Project) -> None:
    put_all(project, *TEXTS)
    enough_for_one = 1.5 * cost_of_one(project)

    with pytest.raises(
        RunFailed, match=r"budget reached: .*both together may cost .*nothing was asked.*--max-cost-usd"
    ):
        compared(project, APPLES, BOTH, max_cost_usd=enough_for_one)

    assert not project.llm.calls


def test_what_is_cached_does_not_count_toward_the_cap(project: Project) -> None:
    put_all(project, *TEXTS)
    enough_for_one = 1.5 * cost_of_one(project)
    project.change(**APPLES)
    project.run(all_rows=True)

    assert compared(project, {}, BOTH, max_cost_usd=enough_for_one).b.requests == len(TEXTS)


def test_what_a_spends_beyond_its_estimate_is_not_left_for_b(project: Project) -> None:
    put_all(project, *TEXTS)
    expected = cost_of_one(project)
    dear = completion('{"tags": []}', usage=token_usage(round(1.8 * expected / len(TEXTS) * 1_000_000), 0))
    teach(project.llm, **dict.fromkeys(("apple", "banana", "zebra", "nothing"), dear))

    with pytest.raises(RunFailed, match="budget reached"):
        compared(project, APPLES, BOTH, max_cost_usd=2.4 * expected)

    assert len(project.llm.calls) == len(TEXTS)


def test_without_a_cap_the_lower_limit_of_the_files_is_for_both(project: Project) -> None:
    put_all(project, *TEXTS)

    with pytest.raises(RunFailed, match="budget reached"):
        compared(project, APPLES, merged(BOTH, {"limits": {"max_cost_usd": 1.5 * cost_of_one(project)}}))

    assert not project.llm.calls


def test_a_cap_needs_a_price(project: Project) -> None:
    put_all(project, *TEXTS)

    with pytest.raises(InputError, match="the price of `offline-stand-in` is not known"):
        compared(project, APPLES, merged(BOTH, {"llm": {"price": None}}), max_cost_usd=1)

    assert not project.llm.calls


def test_moving_costs_what_the_texts_of_the_target_do_that_b_has_not_answered(either: Project) -> None:
    project = either
    put_all(project, *bananas(30))
    project.change(**APPLES)
    project.run(all_rows=True)

    found = compared(project, {}, BOTH, sample=10)

    assert (found.moving.texts, found.moving.of) == (20, "target")
    assert found.b.cost_a_text_usd is not None
    assert found.moving.usd == pytest.approx(20 * found.b.cost_a_text_usd)


def test_moving_costs_half_through_the_batch_api(project: Project) -> None:
    put_all(project, *bananas(30))

    found = compared(project, APPLES, merged(BOTH, {"llm": {"mode": "batch"}}), sample=10)

    assert (found.moving.texts, found.moving.of) == (20, "source")
    assert found.b.cost_a_text_usd is not None
    assert found.moving.usd == pytest.approx(20 * found.b.cost_a_text_usd / 2)


def test_the_seconds_of_a_text_are_those_of_its_call(project: Project) -> None:
    project.llm.latency = 0.5
    project.change(llm={"concurrency": 2})
    put_all(project, *TEXTS, *bananas(5))

    seconds = compared(project, APPLES, BOTH).b.seconds_a_text

    assert seconds is not None and 0.5 <= seconds < 1.5


# quality


def test_with_more_right_b_is_better(project: Project, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.csv", *((text, "fruit") for text in bananas(12)), ("a zebra", "animal"))

    found = compared(project, APPLES, BOTH, labels=labels)

    assert found.difference is not None
    assert (found.difference.only_a_right, found.difference.only_b_right) == (0, 12)
    assert found.difference.p_value == pytest.approx(2 * 0.5**12)
    assert verdict(found).startswith("B is better: +92.3 points exact match (95 % interval +")
    assert "p < 0.001) on 13 texts; it costs 1." in verdict(found)


def test_with_fewer_right_b_is_worse(project: Project, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.csv", *((text, "fruit") for text in bananas(12)))

    assert verdict(compared(project, BOTH, APPLES, labels=labels)).startswith("B is worse: -100.0 points exact match")


def test_one_text_more_right_tells_nothing(project: Project, tmp_path: Path) -> None:
    apples = [(f"apple number {number}", "fruit") for number in range(11)]
    labels = write_labels(tmp_path / "labels.csv", *apples, ("a banana", "fruit"))

    said = verdict(compared(project, APPLES, BOTH, labels=labels))

    assert said.startswith("No difference can be told with 12 texts: B has +8.3 points exact match")
    assert "p = 1.00); about " in said and "labels would tell a difference of this size" in said


def test_without_labels_the_verdict_asks_for_some(project: Project) -> None:
    put_all(project, *TEXTS)

    said = verdict(compared(project, APPLES, BOTH))

    assert said.startswith("B changes 40.0 % of the 5 texts (95 % interval ")
    assert "label some to know whether that is better" in said


def test_where_b_changes_nothing_the_verdict_says_so(project: Project) -> None:
    put_all(project, *TEXTS)

    assert verdict(compared(project, APPLES, {**APPLES, "prompt": "Tag."})).startswith(
        "B changes none of the 5 texts (95 % interval 0.0 % to "
    )


def test_the_quality_of_each_is_that_of_evaluate(project: Project, tmp_path: Path) -> None:
    from tagger.evaluate import evaluate
    from tagger.labels import read_labels

    labels = write_labels(
        tmp_path / "labels.csv", ("a banana", "fruit"), ("an apple", "animal"), ("a zebra", "animal"), ("none", "")
    )
    dataset: Dataset = candidate(project, "b.yaml", **BOTH).dataset

    found = compared(project, APPLES, BOTH, labels=labels, seed=3)
    alone = evaluate(dataset, read_labels(labels, dataset, project.connections), project.connections, name="l", seed=3)

    assert (found.b.exact_match, found.b.micro_f1, found.b.macro_f1) == (
        alone.quality.exact_match,
        alone.quality.micro.f1,
        alone.quality.macro.f1,
    )


def test_labels_by_row_take_the_texts_of_the_source(project: Project, tmp_path: Path) -> None:
    put_all(project, *TEXTS)
    path = tmp_path / "labels.csv"
    path.write_text("row_id,tags\n1,fruit\n2,animal\n")

    found = compared(project, APPLES, BOTH, labels=path)

    assert [(each.row, each.b) for each in found.examples] == [("1", ["fruit"])]


TAGS = ["a", "b", "c"]

some_tags = st.sets(st.sampled_from(TAGS), max_size=3)


def matrix(tags: list[set[str]]) -> np.ndarray:
    return np.array([[tag in each for tag in TAGS] for each in tags], dtype=int)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(some_tags, some_tags), min_size=1, max_size=30))
def test_agreement_is_that_of_scikit_learn_and_pandas(pairs: list[tuple[set[str], set[str]]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    in_a, in_b = matrix(a), matrix(b)

    found = agreement(a, b, TAGS)

    assert found.same == pytest.approx(accuracy_score(in_a, in_b))
    assert found.jaccard == pytest.approx(jaccard_score(in_a, in_b, average="samples", zero_division=1.0))
    wilson = binomtest(found.changed, len(pairs)).proportion_ci(method="wilson")
    assert (found.changed_low, found.changed_high) == (wilson.low, wilson.high)
    for tag in found.tags:
        x, y = in_a[:, TAGS.index(tag.tag)], in_b[:, TAGS.index(tag.tag)]
        table = pd.crosstab(x, y).reindex(index=[0, 1], columns=[0, 1], fill_value=0).to_numpy()
        assert (tag.both, tag.gained, tag.lost) == (table[1, 1], table[0, 1], table[1, 0])
        assert (tag.a, tag.b) == (table[1].sum(), table[:, 1].sum())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kappa = cohen_kappa_score(x, y, labels=[0, 1])
        assert tag.kappa is None if np.isnan(kappa) else tag.kappa == pytest.approx(kappa)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(some_tags, some_tags, some_tags), min_size=1, max_size=30))
def test_differences_are_those_of_scikit_learn_and_scipy(triples: list[tuple[set[str], set[str], set[str]]]) -> None:
    from tagger.compare import _qualities

    gold, a, b = ([each[i] for each in triples] for i in range(3))
    truth, in_a, in_b = matrix(gold), matrix(a), matrix(b)

    of_a, of_b, found = _qualities([frozenset(each) for each in gold], [*map(list, a)], [*map(list, b)], TAGS, 0)

    right_a, right_b = (truth == in_a).all(axis=1), (truth == in_b).all(axis=1)
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    assert (found.only_a_right, found.only_b_right) == (only_a, only_b)
    test = binomtest(only_b, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert found.p_value == mcnemar(only_a, only_b) == pytest.approx(test)
    assert found.exact_match.value == pytest.approx(accuracy_score(truth, in_b) - accuracy_score(truth, in_a))
    for average in ("micro", "macro"):
        x, y = (f1_score(truth, each, average=average, zero_division=np.nan) for each in (in_a, in_b))
        value = getattr(found, f"{average}_f1").value
        assert value is None if np.isnan(x) or np.isnan(y) else value == pytest.approx(y - x)
    if a == b:
        assert of_a == of_b and (found.exact_match.low, found.exact_match.high) == (0, 0)


def test_the_interval_of_a_difference_is_paired() -> None:
    """Where B has all that A has and a little more, it is far narrower than those of A and B."""
    from tagger.compare import _qualities

    gold = [frozenset("a")] * 400
    a = [["a"] if number % 2 else ["b"] for number in range(400)]
    b = [["a"] if number % 2 or number < 40 else ["b"] for number in range(400)]

    of_a, _, found = _qualities(gold, a, b, TAGS, 0)

    assert found.exact_match.value == pytest.approx(0.05)
    assert found.exact_match.low is not None and found.exact_match.high is not None
    assert 0.02 < found.exact_match.low < 0.04 and 0.06 < found.exact_match.high < 0.08
    assert of_a["exact_match"].low == pytest.approx(0.45, abs=0.01)


def test_where_no_text_changes_neither_is_better(project: Project, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.csv", ("an apple", "fruit"))

    said = verdict(compared(project, APPLES, {**APPLES, "prompt": "Tag."}, labels=labels))

    assert said.startswith("B changes none of the 1 texts") and "neither is better" in said


# bad input


def test_files_with_one_spec_have_nothing_to_compare(project: Project) -> None:
    with pytest.raises(
        InputError, match=r"a\.yaml and b\.yaml have the same spec \([0-9a-f]{12}\).*nothing to compare"
    ):
        compared(project, APPLES, {**APPLES, "limits": {"max_cost_usd": 3}})


def test_sources_must_be_one(project: Project) -> None:
    with pytest.raises(InputError, match=r"`source\.table`: found 'notes' in a\.yaml and 'letters' in b\.yaml"):
        compared(project, APPLES, merged(BOTH, {"source": {"table": "letters"}}))


@pytest.mark.parametrize("texts", [(), ("", "  ", None)])
def test_an_empty_sample_is_an_error(project: Project, texts: tuple[str | None, ...]) -> None:
    for row_id, text in enumerate(texts):
        project.put(row_id, text)

    with pytest.raises(InputError, match="notes has no row with a text"):
        compared(project, APPLES, BOTH)


def test_labels_must_have_tags_of_both(project: Project, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.csv", ("rain", "weather"), ("an apple", "fruit"))
    more = {"tags": [*BOTH["tags"], {"id": "weather", "description": "rain"}]}

    with pytest.raises(InputError, match=r"`weather`.*--ignore-unknown.*only tags that both a\.yaml and b\.yaml have"):
        compared(project, APPLES, more, labels=labels)
    found = compared(project, APPLES, more, labels=labels, ignore_unknown=True)

    assert found.agreement.texts == 1
    assert any("left out" in line and "tags that" in line for line in describe(found))


def test_where_no_text_is_answered_there_is_nothing_to_compare(project: Project) -> None:
    put_all(project, "an apple", "apple pie")
    teach(project.llm, apple=error(400, "bad"))

    with pytest.raises(RunFailed, match="not one of the 2 texts was answered by both"):
        compared(project, APPLES, BOTH)


# the command


@pytest.fixture
def files(shell: Shell) -> Shell:  # noqa: F811
    """A folder with a dataset `notes`, and a copy `notes_b` of it with one description changed."""
    shell.write("notes", **APPLES)
    shell.write("notes_b", **BOTH)
    shell.project.put(3, "a banana")
    return shell


def test_a_copy_may_stand_beside_its_original(files: Shell) -> None:
    assert files.run("compare", "notes", str(files.folder / "notes_b.yaml")) == 0

    assert files.out.splitlines()[0].startswith("The offline stand-in answered, which is no LLM")
    assert "the same tags on 66.7 % of the texts (2 of 3)" in files.out
    assert files.out.splitlines()[-1].startswith("B changes 33.3 % of the 3 texts")


def test_the_screen_is_one_screen(files: Shell) -> None:
    labels = write_labels(files.folder / "labels.csv", *((text, "fruit") for text in bananas(30)))

    assert files.run("compare", "notes", "notes_b", str(labels)) == 0

    lines = files.out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines[:-1])) <= 120
    for figure in ("exact match", "micro F1", "macro F1", "cost of 1,000 texts", "tokens a text", "seconds a text"):
        assert any(line.startswith(figure) for line in lines), figure
    assert lines[-1].startswith("B is better: +100.0 points exact match")


def test_json_is_one_line_with_all_figures_and_the_verdict(files: Shell) -> None:
    assert files.run("compare", "notes", "notes_b", "--json") == 0

    [line] = files.out.splitlines()
    found = json.loads(line)
    assert found["agreement"]["changed"] == 1
    assert found["verdict"].startswith("B changes 33.3 %")
    assert found["is_stand_in"] is True
    assert Comparison.model_validate({k: v for k, v in found.items() if k != "verdict"}).a.requests == 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("notes", "notes"), "have the same spec"),
        (("notes", "notes_b", "no.csv"), r"no\.csv: No such file"),
        (("notes", "other"), "no dataset `other`"),
        (("notes", "notes_b", "--max-cost-usd", "0"), "`max_cost_usd`: found 0.0, expected greater than 0"),
    ],
)
def test_bad_input_is_one_clear_line(files: Shell, arguments: tuple[str, ...], complaint: str) -> None:
    assert files.run("compare", *arguments) == 2

    assert len(files.complaints) == 1, files.err
    assert complaint.replace("\\", "") in files.complaints[0]
    assert not files.project.llm.calls


def test_a_sample_of_none_is_refused(files: Shell) -> None:
    assert files.run("compare", "notes", "notes_b", "--sample", "0") == 2
