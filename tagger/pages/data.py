"""The figures that the pages show, as JSON: made of a dataset's rollup, with nothing read or written.

Money is in USD, days are dates of the dataset's time zone, and null is what is not known. A day's figures are those of
`tagger.history`: money on the day an attempt ended, texts on the day their run did, dry runs aside.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict

if TYPE_CHECKING:
    from tagger.history import Figures
    from tagger.rollup import RolledRun, RolledSummary, Rollup

State = Literal["success", "failed", "running", "queued", "none"]

RUNS_SHOWN = 50

NOT_ASKED = ("too_long", "damaged_record")
"""Kinds of errors of texts that no call was made for."""

NO_SUMMARY = "no summary: it is at work, or was killed before its report"
"""Why a run counts as failed that has none."""


class Shown(BaseModel):
    """What is shown. The docstrings of fields are their descriptions in the API."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Card(Shown):
    """A dataset at a glance. All but its names is null where nothing tells, as where storage is away."""

    dag_id: str
    dataset: str
    timezone: str = "UTC"
    """In which days and months are counted."""
    state: State = "none"
    """Of the last run; `none` where there is no run."""
    reason: str | None = None
    last_run_id: str | None = None
    last_run_at: AwareDatetime | None = None
    texts: int | None = None
    """Of the last run with a summary, as are the next two; dry runs aside."""
    cached: int | None = None
    cached_share: float | None = None
    """0 to 1; null without texts."""
    spent_month_usd: float | None = None
    """In the month of the calendar, in the dataset's time zone."""
    saved_month_usd: float | None = None
    """In all ways."""
    budget_month_usd: float | None = None
    """`limits.max_cost_usd_per_month`; null for no limit."""
    budget_left_usd: float | None = None
    next_run_at: AwareDatetime | None = None
    problem: str | None = None
    """What could not be read, and what to do."""


class Counts(Shown):
    """Texts by what became of them: `texts = cached + tagged + refused + failed + skipped + pending`."""

    rows: int
    texts: int
    cached: int
    tagged: int
    refused: int
    failed: int
    skipped: int
    pending: int


class Day(Counts):
    """What happened on one day."""

    day: date
    runs: int
    requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    spent_usd: float | None
    saved_usd: float | None
    """By the cache alone; what was saved in all is the sum of this and the next three."""
    saved_by_duplicates_usd: float | None
    saved_by_batch_usd: float | None
    saved_by_prompt_caching_usd: float | None
    estimated_usd: float | None
    """By the plans of those runs alone that asked all the texts they planned for, and whose cost is known."""
    estimated_actual_usd: float | None
    """What those runs cost, earlier plans of theirs aside: to be held against it."""
    seconds: float
    """Of the tag steps."""
    texts_per_second: float | None
    """Texts that were asked and ended, over those seconds, the Batch API's aside; null where there were none."""
    errors: dict[str, int]
    """Texts by kind of error."""
    tags: dict[str, int]
    """Rows of the target by tag, after the day's last run that loaded; empty where none did."""
    model: str | None
    """Of the day's last run, as is the next; null where no run has a summary."""
    spec_id: str | None
    changes: list[str]
    """What is another in model and spec than in the run before, in words."""


class RunLine(Shown):
    """One run in a list. Its texts are null where it has no summary."""

    run_id: str
    day: date
    """On which it ended."""
    state: State
    reason: str | None
    dry_run: bool = False
    texts: int | None = None
    cached: int | None = None
    tagged: int | None = None
    refused: int | None = None
    failed: int | None = None
    skipped: int | None = None
    pending: int | None = None
    spent_usd: float | None
    """By all its attempts, whenever they ended."""
    estimated_usd: float | None = None
    seconds: float | None = None
    """Of the tag step."""


class DatasetPage(Shown):
    """A dataset's days and runs, in a range of days."""

    card: Card
    tags: list[str] = []
    """Ids in file order. Days may have others besides, of earlier versions of the file."""
    days: list[Day] = []
    """Those on which anything happened, oldest first."""
    first_day: date | None = None
    """Of all the history, as is the last."""
    last_day: date | None = None
    runs: list[RunLine] = []
    """Newest first; at most 50."""


def card_of(rollup: "Rollup", now: datetime, *, dag_id: str | None = None) -> Card:
    """Return a dataset's card, as far as its rollup tells; dry runs aside. The DAG is by default the one of its name.

    Airflow knows more of the last run, and of the next one: `card.model_copy(update=…)`.
    """
    from tagger.history import Figures, history
    from tagger.runs import is_trial

    runs = [run for run in rollup.runs if not (run.summary and run.summary.dry_run) and not is_trial(run.run_id)]
    last = _line(runs[-1], rollup) if runs else None
    done = next((run.summary for run in reversed(runs) if run.summary), None)
    first = now.astimezone(rollup.zone).date().replace(day=1)
    next_month = (first + timedelta(days=31)).replace(day=1)
    months = history(rollup, "month", *_bounds(rollup, first, next_month - timedelta(days=1)))
    month = months[0].figures if months else Figures()
    limit = rollup.max_cost_usd_per_month
    return Card(
        dag_id=dag_id or f"tag_{rollup.dataset}",
        dataset=rollup.dataset,
        timezone=rollup.timezone,
        state=last.state if last else "none",
        reason=last.reason if last else None,
        last_run_id=last.run_id if last else None,
        last_run_at=runs[-1].ended_at if runs else None,
        texts=done.texts if done else None,
        cached=done.cached if done else None,
        cached_share=done.cached / done.texts if done and done.texts else None,
        spent_month_usd=month.spent_usd,
        saved_month_usd=month.total_saved_usd,
        budget_month_usd=limit,
        budget_left_usd=None if limit is None or month.spent_usd is None else max(limit - month.spent_usd, 0.0),
        problem=_problem(rollup),
    )


def page_of(rollup: "Rollup", start: date | None, end: date | None, card: Card) -> DatasetPage:
    """Return a dataset's page with the days from `start` to `end`, both included; None where there is no bound."""
    from tagger.history import events, history

    since, until = _bounds(rollup, start, end)
    done: dict[date, list[_Done]] = {}
    for each in _done(rollup.runs):
        done.setdefault(_day_of(each.summary.finished_at, rollup), []).append(each)
    days = ((date.fromisoformat(period), figures) for _, period, figures in history(rollup, "day", since, until))
    instants = [at for at, _ in events(rollup.runs)]
    shown = (run for run in reversed(rollup.runs) if since <= run.ended_at < until)
    return DatasetPage(
        card=card,
        tags=rollup.tags,
        days=[_day(day, figures, done.get(day, [])) for day, figures in days],
        first_day=_day_of(min(instants), rollup) if instants else None,
        last_day=_day_of(max(instants), rollup) if instants else None,
        runs=[_line(run, rollup) for run in islice(shown, RUNS_SHOWN)],
    )


class _Done(NamedTuple):
    """A run that was summed up, and what is another than in the run before."""

    summary: "RolledSummary"
    changes: list[str]


def _done(runs: Iterable["RolledRun"]) -> Iterator[_Done]:
    before = None
    for run in runs:
        if run.summary is not None and not run.summary.dry_run:
            yield _Done(run.summary, _changes(before, run.summary) if before else [])
            before = run.summary


def _changes(before: "RolledSummary", now: "RolledSummary") -> list[str]:
    model = [f"model `{before.model}` → `{now.model}`"] if now.model != before.model else []
    if now.spec_id == before.spec_id or (model and now.spec_change in (None, "the model changed")):
        return model
    return [*model, now.spec_change or f"spec {before.spec_id[:4]} → {now.spec_id[:4]}"]


def _day(day: date, figures: "Figures", done: list[_Done]) -> Day:
    from tagger.spend import total_usd

    summaries = [each.summary for each in done]
    last = summaries[-1] if summaries else None
    estimated = [s for s in summaries if s.estimate_error is not None]
    counts = {name: value for name, value in vars(figures).items() if name in Day.model_fields}
    counts["estimated_usd"] = total_usd(s.estimated_usd for s in estimated)
    return Day(
        day=day,
        **counts,
        rows=sum(s.rows for s in summaries),
        saved_usd=total_usd(s.saved_usd for s in summaries),
        saved_by_duplicates_usd=total_usd(s.saved_by_duplicates_usd for s in summaries),
        saved_by_batch_usd=total_usd(s.saved_by_batch_usd for s in summaries),
        saved_by_prompt_caching_usd=total_usd(s.saved_by_prompt_caching_usd for s in summaries),
        estimated_actual_usd=total_usd(_spent_on_plan(s) for s in estimated),
        seconds=round(_tag_seconds(summaries), 3),
        texts_per_second=_texts_per_second([s for s in summaries if s.mode == "online"]),
        errors=dict(sum((Counter(s.errors) for s in summaries), Counter())),
        tags=next((s.tags for s in reversed(summaries) if s.tags), {}),
        model=last.model if last else None,
        spec_id=last.spec_id if last else None,
        changes=[change for each in done for change in each.changes],
    )


def _tag_seconds(summaries: list["RolledSummary"]) -> float:
    return sum(s.seconds.get("tag", 0.0) for s in summaries)


def _texts_per_second(summaries: list["RolledSummary"]) -> float | None:
    seconds = _tag_seconds(summaries)
    ended = sum(s.tagged + s.refused + s.failed for s in summaries)
    asked = ended - sum(s.errors.get(kind, 0) for s in summaries for kind in NOT_ASKED)
    return asked / seconds if asked > 0 and seconds else None


def _spent_on_plan(summary: "RolledSummary") -> float | None:
    if summary.cost_usd is None or summary.earlier_plans_usd is None:
        return None
    return max(summary.cost_usd - summary.earlier_plans_usd, 0.0)


def _line(run: "RolledRun", rollup: "Rollup") -> RunLine:
    from tagger.runs import is_trial
    from tagger.spend import total_usd

    day, spent = _day_of(run.ended_at, rollup), total_usd(spent.cost_usd for spent in run.spent)
    if is_trial(run.run_id):
        return RunLine(run_id=run.run_id, day=day, state="success", reason="a trial: no tag is loaded", spent_usd=spent)
    if run.summary is None:
        return RunLine(run_id=run.run_id, day=day, state="failed", reason=run.problem or NO_SUMMARY, spent_usd=spent)
    told = {name: value for name, value in vars(run.summary).items() if name in RunLine.model_fields}
    return RunLine(**told | {"day": day, "spent_usd": spent, "seconds": run.summary.seconds.get("tag")})


def _problem(rollup: "Rollup") -> str | None:
    problems = rollup.problems
    return f"{problems[0]} (and {len(problems) - 1} more)" if len(problems) > 1 else next(iter(problems), None)


def _bounds(rollup: "Rollup", first: date | None, last: date | None) -> tuple[datetime, datetime]:
    """Return the instants between which days lie, the last one included."""
    midnight = time(tzinfo=rollup.zone)
    end = None if last is None or last == date.max else datetime.combine(last + timedelta(days=1), midnight)
    start = None if first is None else datetime.combine(first, midnight)
    return start or datetime.min.replace(tzinfo=UTC), end or datetime.max.replace(tzinfo=UTC)


def _day_of(instant: datetime, rollup: "Rollup") -> date:
    return instant.astimezone(rollup.zone).date()
