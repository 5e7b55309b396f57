"""`tagger evaluate`: labelled texts are tagged through the cache, and their tags measured, without showing a text."""

from __future__ import annotations

import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest

from demo.stand_in import Reply, completion, error
from tagger.evaluate import STAND_IN, Evaluation, describe, evaluate
from tagger.evaluate_page import page, write_page
from tagger.labels import read_labels
from tests.browser import Tab, chromium, needs_browser
from tests.databases import REFUSAL, put_rows, teach
from tests.project import Project
from tests.test_cli import Shell, assert_complains, shell  # noqa: F401 - a fixture

LABELS = """text,tags
s3cret apple,fruit
s3cret zebra in the rain,animal;weather
s3cret cherry and a tiger,animal
s3cret storm,weather
s3cret nothing,
"""
"""All but the third are what the stand-in answers: it gives that one `fruit` too."""


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    file = tmp_path / "labels.csv"
    file.write_text(LABELS)
    return file


def figures_of(project: Project, labels: Path, **options: Any) -> Evaluation:
    read = read_labels(labels, project.dataset, project.connections)
    return evaluate(project.dataset, read, project.connections, name=labels.name, **options)


def figures(shell: Shell) -> dict[str, Any]:  # noqa: F811
    found: dict[str, Any] = json.loads(shell.out.splitlines()[-1])
    return found


# figures


def test_tags_of_several_labels_are_measured(project: Project, labels: Path) -> None:
    found = figures_of(project, labels)

    fruit, animal, weather = found.quality.tags
    assert (fruit.precision.value, fruit.recall.value, fruit.support, fruit.predicted) == (0.5, 1, 1, 2)
    assert (animal.f1.value, weather.f1.value) == (1, 1)
    assert found.quality.exact_match.value == pytest.approx(4 / 5)
    assert (found.quality.gold_untagged, found.quality.predicted_untagged) == (1, 1)


def test_single_labels_are_measured(project: Project, labels: Path) -> None:
    project.change(max_tags=1)
    labels.write_text("text,tags\nan apple,fruit\na banana,animal\na zebra,animal\n")

    found = figures_of(project, labels)

    assert found.quality.exact_match.value == found.quality.micro.f1.value == pytest.approx(2 / 3)
    assert [(pair.gold, pair.given, pair.texts) for pair in found.quality.confusions] == [("animal", "fruit", 1)]


def test_a_refused_text_counts_as_one_without_a_tag(project: Project, labels: Path) -> None:
    teach(project.llm, zebra=REFUSAL)

    found = figures_of(project, labels)

    assert (found.quality.texts, found.unanswered, sum(found.refused.values())) == (5, 0, 1)
    assert found.quality.predicted_untagged == 2
    assert any("1 of them refused" in line and "counts as no tag" in line for line in describe(found))


def test_a_text_that_is_too_long_is_refused(project: Project, labels: Path) -> None:
    project.change(source={"max_chars": 20})

    assert figures_of(project, labels).refused == {"too_long": 2}


def test_a_text_without_an_answer_is_left_out(project: Project, labels: Path) -> None:
    teach(project.llm, zebra=error(400, "no"))

    found = figures_of(project, labels)

    assert (found.asked, found.quality.texts, found.unanswered, found.refused) == (5, 4, 1, {})
    assert found.quality.tags[2].support == 1
    assert any("1 more got no answer and are left out" in line for line in describe(found))


def test_cost_of_1000_texts_is_the_mean_records_and_stays_when_cached(project: Project, labels: Path) -> None:
    first, second = figures_of(project, labels), figures_of(project, labels)

    assert first.spent_usd and first.cost_per_1000_usd == pytest.approx(first.spent_usd / 5 * 1000)
    assert (second.spent_usd, second.cost_per_1000_usd) == (0, first.cost_per_1000_usd)


def test_without_a_price_the_cost_is_unknown(project: Project, labels: Path) -> None:
    project.change(llm={"price": None})

    found = figures_of(project, labels)

    assert (found.spent_usd, found.cost_per_1000_usd) == (None, None)
    assert any("unknown for 1,000 texts" in line for line in describe(found))


def test_the_worst_cases_come_by_row(project: Project, labels: Path) -> None:
    [case] = figures_of(project, labels).worst

    assert (case.row, case.gold, sorted(case.predicted)) == ("4", ["animal"], ["animal", "fruit"])


def confident(values: dict[str, float]) -> Reply:
    return completion(json.dumps({"tags": [{"tag": tag, "confidence": sure} for tag, sure in values.items()]}))


def test_confidence_is_held_against_what_is_right(project: Project, labels: Path) -> None:
    project.change(confidence=True)
    sure, half, none = confident({"fruit": 0.95}), confident({"animal": 0.55, "weather": 0.95}), confident({})
    teach(project.llm, apple=sure, zebra=half, cherry=sure, storm=none, nothing=none)

    table = figures_of(project, labels).reliability

    assert table is not None
    assert [(each.low, each.tags, each.right) for each in table.bins] == [
        (0.5, 1, 1),
        (0.9, 3, pytest.approx(2 / 3)),
    ]
    assert table.ece == pytest.approx((1 * 0.45 + 3 * (0.95 - 2 / 3)) / 4)


def test_what_review_below_marks_is_held_against_the_rest(project: Project, labels: Path) -> None:
    project.change(confidence=True, review_below=0.6)
    sure, half, none = confident({"fruit": 0.95}), confident({"animal": 0.55, "weather": 0.95}), confident({})
    teach(project.llm, apple=sure, zebra=half, cherry=sure, storm=none, nothing=none)

    found = figures_of(project, labels)

    assert found.review is not None
    assert (found.review.texts, found.review.right, found.review.others, found.review.others_right) == (1, 1, 4, 2)
    told = "`review_below: 0.6` marks 1 texts, 100 % of them tagged exactly right; of the 4 others 50 % are"
    assert told in "\n".join(describe(found))
    assert told in Elements(page(found)).text


def test_without_confidence_there_is_no_reliability_table(project: Project, labels: Path) -> None:
    found = figures_of(project, labels)

    assert found.reliability is None
    assert "calibration" not in "\n".join(describe(found)) + page(found)


# the command


def test_a_table_comes_on_one_screen_the_worst_tag_first(shell: Shell, labels: Path) -> None:  # noqa: F811
    assert shell.run("evaluate", "notes", str(labels)) == 0

    lines = shell.out.splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("notes · 5 of 5 labels of labels.csv · offline-stand-in · spec ")
    names = [line.split()[0] for line in lines if re.search(r"\[0\.|\[1\.", line)]
    assert names == ["micro", "macro", "exact", "fruit", "animal", "weather"]
    assert "s3cret" not in shell.out + shell.err


def test_many_tags_are_the_worst_and_the_totals(shell: Shell, labels: Path) -> None:  # noqa: F811
    tags = [{"id": f"tag{n}", "description": "nothing"} for n in range(30)]
    shell.write(tags=tags)
    labels.write_text("text,tags\na,tag1\nb,tag2\n")

    assert shell.run("evaluate", "notes", str(labels)) == 0

    assert "the 15 worst of 30 tags" in shell.out
    assert len(shell.out.splitlines()) <= 40


def test_a_second_evaluation_asks_nothing(shell: Shell, labels: Path) -> None:  # noqa: F811
    assert shell.run("evaluate", "notes", str(labels), "--json") == 0
    first, asked = figures(shell), len(shell.project.llm.calls)

    assert shell.run("evaluate", "notes", str(labels), "--json") == 0

    second = figures(shell)
    assert asked == first["requests"] == 5
    assert (second["requests"], second["cached"], second["spent_usd"]) == (0, 5, 0)
    assert len(shell.project.llm.calls) == asked
    assert second["quality"] == first["quality"]


def test_beyond_the_budget_nothing_is_asked(shell: Shell, labels: Path) -> None:  # noqa: F811
    assert shell.run("evaluate", "notes", str(labels), "--max-cost-usd", "0.0000001") == 1

    assert_complains(shell, r"budget reached: 5 new texts would cost about \$.* none was asked")
    assert not shell.project.llm.calls


def test_the_cost_is_said_before(
    shell: Shell,  # noqa: F811
    labels: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "tagger")

    assert shell.run("evaluate", "notes", str(labels)) == 0

    assert re.search(r"estimated cost: \$0\.0.*shard 1/1", caplog.text, re.DOTALL)


def test_row_ids_read_the_sources_texts(shell: Shell, labels: Path) -> None:  # noqa: F811
    labels.write_text("row_id,tags\n1,fruit\n2,animal;weather\n")

    assert shell.run("evaluate", "notes", str(labels), "--json") == 0

    assert figures(shell)["quality"]["exact_match"]["value"] == 1


def test_a_sample_is_measured(shell: Shell, labels: Path) -> None:  # noqa: F811
    rows = []
    for seed in ("1", "1", "2", "3"):
        assert shell.run("evaluate", "notes", str(labels), "--sample", "2", "--seed", seed, "--json") == 0
        rows.append(figures(shell)["quality"]["tags"])
        assert figures(shell)["quality"]["texts"] == 2

    assert rows[0] == rows[1]
    assert not rows[1] == rows[2] == rows[3]


def test_reviewed_rows_are_the_labels_and_cost_nothing(shell: Shell) -> None:  # noqa: F811
    shell.project.put(3, "a tiger")
    shell.project.run()
    for row_id, tags in ((1, ["fruit"]), (2, ["animal"])):
        review = "UPDATE note_tags SET reviewed_tags = :tags, reviewed_by = 'me', reviewed_at = snapshot_at"
        shell.project.execute(f"{review} WHERE row_id = :id", id=row_id, tags=json.dumps(tags))

    assert shell.run("evaluate", "notes", "--reviewed", "--json") == 0

    found = figures(shell)
    assert (found["labels"]["name"], found["quality"]["texts"], found["requests"]) == ("reviewed rows", 2, 0)
    assert found["quality"]["exact_match"]["value"] == 0.5
    assert [(case["row"], case["gold"]) for case in found["worst"]] == [("2", ["animal"])]


def test_without_reviewed_rows_there_is_nothing_to_measure(shell: Shell) -> None:  # noqa: F811
    shell.project.run()

    assert shell.run("evaluate", "notes", "--reviewed") == 2

    assert_complains(shell, "reviewed rows: no label that can be used: there are none")


@pytest.mark.parametrize("arguments", [[], ["labels.csv", "--reviewed"]])
def test_labels_are_a_file_or_reviewed_rows(shell: Shell, arguments: list[str]) -> None:  # noqa: F811
    assert shell.run("evaluate", "notes", *arguments) == 2

    assert_complains(shell, "expected either LABELS, a CSV or Parquet file, or `--reviewed`")


@pytest.mark.parametrize("option", [["--sample", "0"], ["--sample", "x"], ["--seed", "-1"]])
def test_a_wrong_number_is_named(shell: Shell, labels: Path, option: list[str]) -> None:  # noqa: F811
    assert shell.run("evaluate", "notes", str(labels), *option) == 2

    assert repr(option[1]) in shell.err


def test_unknown_tags_stop_before_anything_is_asked(shell: Shell, labels: Path) -> None:  # noqa: F811
    labels.write_text("text,tags\ns3cret,vegetable\nan apple,fruit\n")

    assert shell.run("evaluate", "notes", str(labels)) == 2
    assert_complains(shell, "`vegetable` 1x")
    assert not shell.project.llm.calls
    assert shell.run("evaluate", "notes", str(labels), "--ignore-unknown") == 0
    assert "1 row left out: tags that the dataset has not" in shell.out


def test_where_no_text_got_an_answer_there_is_nothing_to_measure(shell: Shell, labels: Path) -> None:  # noqa: F811
    teach(shell.project.llm, s3cret=error(400, "no"))

    assert shell.run("evaluate", "notes", str(labels)) == 1

    assert_complains(shell, "none of 5 labelled texts got an answer: nothing to measure")


def test_every_output_says_that_the_stand_in_is_no_llm(shell: Shell, labels: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "page.html"

    assert shell.run("evaluate", "notes", str(labels), "--html", str(file)) == 0
    assert STAND_IN in shell.out
    assert "no LLM" in file.read_text()
    assert shell.run("evaluate", "notes", str(labels), "--json") == 0
    assert figures(shell)["stand_in"] is True


def test_another_model_is_not_called_a_stand_in(shell: Shell, labels: Path) -> None:  # noqa: F811
    shell.write(llm={"model": "some-llm"})
    shell.project.llm.script(*[completion('{"tags": []}', model="some-llm")] * 5)

    assert shell.run("evaluate", "notes", str(labels)) == 0

    assert STAND_IN not in shell.out


# the page


class Elements(HTMLParser):
    """Collects a page's elements and text; a page is whole where all that is open is closed again."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_no_other_file(project: Project, labels: Path) -> None:
    found = Elements(page(figures_of(project, labels)))

    assert not found.open
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in found.seen}
    assert not any({"src", "href", "style", "onload"} & attributes.keys() for _, attributes in found.seen)
    policy = next(a["content"] for _, a in found.seen if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; style-src 'sha256-")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_without_a_complaint(
    project: Project, labels: Path, tmp_path: Path, scheme: Literal["light", "dark"]
) -> None:
    file = tmp_path / "page.html"
    write_page(file, figures_of(project, labels))

    with chromium() as browser:
        tab = Tab(browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 800}))
        tab.page.goto(file.as_uri())
        background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        overflow = tab.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    assert not tab.errors
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 31)"}[scheme]
    assert overflow <= 0


def test_the_page_has_the_figures_and_the_worst_cases_and_no_text(project: Project, labels: Path) -> None:
    content = page(figures_of(project, labels))

    assert "s3cret" not in content
    text = Elements(content).text
    assert "0.500 [" in text
    assert "expected calibration" not in text
    assert re.search(r"Worst cases\s.*row.*4", text, re.DOTALL)


def test_everything_on_the_page_is_escaped(project: Project, tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>"
    project.change(tags=[{"id": bad, "description": "apple"}, {"id": '"&', "description": "zebra"}])
    put_rows(project, {1: "an apple", 2: "a zebra"})
    file = tmp_path / "<b>.csv"
    file.write_text(f'row_id,tags\n1,"[""\\""&""]"\n2,{bad}\n')

    content = page(figures_of(project, file))

    assert "<img" not in content and "<b>" not in content
    assert bad in Elements(content).text


def test_the_page_shows_confidence_where_there_is_one(project: Project, labels: Path) -> None:
    project.change(confidence=True)
    teach(project.llm, s3cret=confident({"fruit": 0.85}))

    text = Elements(page(figures_of(project, labels))).text

    assert "expected calibration error" in text
    assert "fruit 0.85" in text


def test_a_page_that_cannot_be_written_is_one_line(shell: Shell, labels: Path, tmp_path: Path) -> None:  # noqa: F811
    assert shell.run("evaluate", "notes", str(labels), "--html", str(tmp_path / "nowhere" / "page.html")) == 2

    assert_complains(shell, "`--html .*page.html`: No such file or directory")


@pytest.fixture(autouse=True)
def _no_text_in_the_log(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    assert "s3cret" not in caplog.text
