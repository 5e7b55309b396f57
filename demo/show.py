"""What the demo prints."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from demo import tables
from tagger.dataset import Dataset
from tagger.estimate import Lengths, guess_usage
from tagger.price import cost_usd, price_of, usd
from tagger.report import Summary

SHOWN_ARTICLES = ["16", "90", "131", "132", "135", "141"]
SHOWN_ANSWERS = ["A-0053", "A-0150", "A-0175", "A-0213", "A-0343", "A-0470"]
BAR_WIDTH = 40
HEARTBEAT_SECONDS = 4.0


@contextmanager
def heartbeat(console: Console, what: str, detail: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Say what goes on, at once and every few seconds."""
    ended = threading.Event()
    started = time.monotonic()
    console.print(f"{what} …")

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            console.print(f"[dim]  {time.monotonic() - started:.0f} s {detail()}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def stand_in_notice(console: Console) -> None:
    """Say what answers in place of an LLM."""
    console.print(
        "[yellow]The stand-in is no LLM: it speaks the OpenAI protocol and matches words of the text against the tags' "
        "descriptions. Its tags show how the machinery works, not how good an LLM is.[/]"
    )


def changes(console: Console, by_table: dict[str, Counter[str]]) -> None:
    """Say what happened to the tables since day 1."""
    for table, counts in by_table.items():
        words = {"add": "added", "edit": "edited", "duplicate": "copied under a new id", "delete": "deleted"}
        console.print(f"Next day, {table}: " + ", ".join(f"{n} rows {words[kind]}" for kind, n in counts.items()))


def runs(console: Console, summaries: list[tuple[str, Summary]]) -> None:
    """Print a line for each run."""
    table = _table("What each run took, and what it cost")
    table.add_column("run", no_wrap=True)
    for name in ("rows", "distinct\ntexts", "cached", "LLM\ncalls", "tokens", "cost", "saved", "time"):
        table.add_column(name, justify="right")
    for day, s in summaries:
        table.add_row(
            f"{s.dataset} {day}",
            f"{s.rows:,}",
            f"{s.texts:,}",
            f"{s.cached:,}",
            f"{s.llm_requests:,}",
            f"{s.input_tokens + s.output_tokens:,}",
            usd(s.cost_usd),
            usd(s.total_saved_usd),
            f"{(s.finished_at - s.started_at).total_seconds():.1f} s",
        )
    console.print()
    console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def tagged_rows(console: Console, database: Path) -> None:
    """Print some rows with their tags."""
    table = _table("Some tagged rows")
    table.add_column("text", max_width=40, overflow="ellipsis", no_wrap=True)
    table.add_column("tags", no_wrap=True)
    shown = tables.tagged_rows(database, "articles", "article_tags", "id", "title", SHOWN_ARTICLES)
    shown += tables.tagged_rows(database, "survey_answers", "survey_answer_tags", "answer_id", "answer", SHOWN_ANSWERS)
    for text, tags in shown:
        table.add_row(text, ", ".join(json.loads(tags)) or "[dim]none fits[/]" if tags else "[dim]not tagged[/]")
    console.print()
    console.print(table)


def tag_counts(console: Console, summary: Summary) -> None:
    """Print the tags of a dataset as bars."""
    console.print(f"\nTags in the target of {summary.dataset}, rows by tag")
    most = max(summary.tags.values(), default=1)
    width = max((len(tag) for tag in summary.tags), default=0)
    for tag, count in summary.tags.items():
        console.print(f"  {tag:<{width}} {'█' * max(1, round(count / most * BAR_WIDTH))} {count}")


def what_next(console: Console, *, live: bool) -> None:
    """Say what to try."""
    console.print("\nRun it again: every text is in the cache, so no LLM call is made.")
    console.print("scripts/demo --ui      the same in Airflow's web interface")
    if not live:
        console.print("scripts/demo --live    with the real OpenAI API ($OPENAI_API_KEY)")
    console.print("scripts/demo --shell   a shell in which `tagger` works on the sample tables (docs/guide.md)")
    console.print("scripts/demo --reset   forget everything")


def in_the_shell(console: Console, *, live: bool) -> None:
    """Say what is there in the demo's shell."""
    console.print(
        "A shell with the tables `articles` and `survey_answers` (connection tagger_db), storage s3://tagger, "
        + ("the real OpenAI API" if live else "the offline stand-in as LLM")
        + ", and labels: articles.labels.csv, survey_answers.labels.csv. `exit` ends it all; docs/guide.md has a tour."
    )


def live_estimate(console: Console, datasets: list[Dataset]) -> None:
    """Say what the live demo costs at most, from the number of characters."""
    total = 0.0
    for dataset in datasets:
        texts = {
            text for _, text in tables.sample(dataset.source.table, dataset.source.text_columns, day2=True) if text
        }
        lengths = Lengths(dataset.llm)
        for text in texts:
            lengths.add(text)
        usage = guess_usage(dataset, lengths)
        cost = cost_usd(usage, price_of(dataset.llm))
        console.print(
            f"{dataset.dataset}: up to {len(texts)} calls of {dataset.llm.model}, about {usage.input:,} tokens in: "
            f"about {usd(cost)}"
        )
        total += cost or 0.0
    console.print(f"[bold]The live demo costs about {usd(total)} the first time, and nothing when it is run again.[/]")
