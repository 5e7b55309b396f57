"""The report step: the run in figures, and the verdict on it."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from datetime import datetime

from pydantic import AwareDatetime, Field

from tagger.cache import Cache
from tagger.clean import Amount, clean, find_overdue
from tagger.dataset import LLM, Dataset
from tagger.drift import Drift, answers_of, find_drift
from tagger.exceptions import RunFailed, StorageError, TaggerError
from tagger.ledger import Attempt, Latest, latest_outcomes, read_attempts
from tagger.price import price_of, usd
from tagger.rollup import SummaryFigures, Window, update_rollup
from tagger.runs import File, Loaded, Plan, Run, Shard, utc_now
from tagger.spend import Counted, Spend, list_attempts, spend_of, total_usd
from tagger.stored_runs import SILENCE

logger = logging.getLogger(__name__)


class ErrorCount(File):
    """How many texts ended so, and one row that has such a text."""

    count: int
    row_id: str


class Summary(SummaryFigures):
    """`summary.json`: one run in figures. `texts = cached + tagged + refused + failed + skipped + pending`."""

    errors: dict[str, ErrorCount]
    attempts: list[Spend] = Field(default_factory=list)
    """Those that `cost_usd` is of."""
    drift: list[Drift] = Field(default_factory=list)
    """Shares of the newly answered texts that jumped, against the 28 days before."""


class Finished(Counted):
    """The part of an earlier `summary.json` that tells when the run finished."""

    finished_at: AwareDatetime


def report(run: Run) -> Summary:
    """Sum the run up, write its summary, log it, and add it to the dataset's rollup.

    Where nothing but the report is done again, the run keeps the time at which it finished.

    Raises:
        InputError: the run has no plan.
        RunFailed: the plan was beyond the budget, a shard broke, load_back did not succeed, or too many texts failed.
    """
    clock = utc_now()
    dataset, taken, planned = run.dataset(), run.snapshot(), run.plan()
    loaded = run.read("load.json", Loaded)
    files = list_attempts(run)
    attempts = read_attempts(run)
    spends = [spend_of(attempt, files) for attempt in attempts]
    present = [attempt for attempt in attempts if attempt.plan_id == planned.plan_id]
    outcomes = latest_outcomes(present).values()
    errors = _errors(planned, loaded, outcomes)
    reasons = list(_problems(dataset, planned, loaded, present, outcomes))
    damaged = loaded.damaged if loaded else 0
    cached = planned.cached - damaged
    new = _new_texts(planned, loaded, outcomes)
    seconds = {"snapshot": taken.seconds, "plan": planned.seconds, "tag": 0.0, "load": loaded.seconds if loaded else 0}
    if present:
        started = min(attempt.started_at for attempt in present)
        seconds["tag"] = (max(attempt.ended_at for attempt in present) - started).total_seconds()
    day = taken.selection.end if taken.selection.rows == "window" else taken.selection.start
    answered = cached + new["tagged"] + new["refused"]
    repeated = planned.rows - planned.texts if answered else 0
    cache = Cache(run.storage, planned.spec_id, dataset.llm.model, dataset.tag_ids)
    mean_cost = cache.mean_cost() if cached or repeated else None
    seconds["report"] = (utc_now() - clock).total_seconds()
    summary = Summary(
        dataset=dataset.dataset,
        run_id=run.run_id,
        day=f"{(day or taken.taken_at).astimezone(dataset.zone):%Y-%m-%d}",
        window=Window(start=taken.selection.start, end=taken.selection.end),
        spec_id=planned.spec_id,
        spec_change=planned.spec_change,
        model=dataset.llm.model,
        mode=dataset.llm.mode,
        dry_run=taken.options.dry_run,
        state="failed" if reasons else "success",
        reason="; ".join(reasons) or None,
        started_at=taken.started_at,
        finished_at=_finished_at(run, spends),
        rows=planned.rows,
        blank=planned.blank,
        texts=planned.texts,
        cached=cached,
        tagged=new["tagged"],
        refused=new["refused"] + planned.too_long,
        failed=new["failed"] + damaged,
        skipped=new["skipped"],
        pending=new["pending"],
        llm_requests=sum(spend.requests for spend in spends),
        input_tokens=sum(spend.input_tokens for spend in spends),
        cached_input_tokens=sum(spend.cached_input_tokens for spend in spends),
        output_tokens=sum(spend.output_tokens for spend in spends),
        estimate=planned.estimate,
        estimated_usd=planned.estimated_usd,
        estimate_error=_estimate_error(planned, new, spends),
        cost_usd=total_usd(spend.cost_usd for spend in spends),
        earlier_plans_usd=total_usd(spend.cost_usd for spend in spends if spend.plan_id != planned.plan_id),
        saved_usd=_times(max(cached - planned.settled, 0), mean_cost),
        saved_by_duplicates_usd=_times(repeated, mean_cost),
        saved_by_batch_usd=total_usd(spend.cost_usd for spend in spends if spend.asked == "batch"),
        saved_by_prompt_caching_usd=total_usd(_saved_by_prompt_caching(dataset.llm, spend) for spend in spends),
        seconds={step: round(value, 3) for step, value in seconds.items()},
        tags=loaded.tags if loaded else {},
        review=loaded.review if loaded else 0,
        **answers_of(outcomes, dataset.tag_ids)._asdict(),
        errors=errors,
        attempts=spends,
    )
    summary = summary.model_copy(update={"drift": find_drift(run.storage, dataset, summary)})
    run.write("summary.json", summary)
    for line in describe(summary):
        logger.info("%s", line)
    for shift in summary.drift:
        logger.warning("drift: %s", shift)
    update_rollup(run.storage, dataset, taken.started_at)
    if utc_now() - taken.started_at < SILENCE:  # an older run that is cleared has not the retention of today
        _clean(run, dataset)
    if reasons:
        raise RunFailed(f"{dataset.dataset}: {summary.reason}")
    return summary


def _clean(run: Run, dataset: Dataset) -> None:
    """Delete what is past its retention; where that fails, the next report goes on with it."""
    try:
        deleted, problems = clean(find_overdue(run.storage, dataset, but_run=run.run_id))
    except TaggerError as e:
        deleted, problems = Amount(), [str(e)]
    if deleted.objects:
        logger.info("retention: %s deleted", deleted)
    for problem in problems:
        logger.warning("retention: the next report tries again to delete what is past its age: %s", problem)


def _finished_at(run: Run, spends: list[Spend]) -> datetime:
    """Return the time of a summary that no later plan or load_back deleted, if no attempt was made since; else now."""
    earlier = None
    with suppress(StorageError):  # it is damaged
        earlier = run.read("summary.json", Finished)
    if earlier is None:
        return utc_now()
    # a file that `tagger forget` wrote again has another etag, and tells of no other attempt
    known, now = ([spend.model_copy(update={"etag": None}) for spend in each] for each in (earlier.attempts, spends))
    return earlier.finished_at if known == now else utc_now()


def _times(texts: int, mean_cost: float | None) -> float | None:
    return 0.0 if not texts else None if mean_cost is None else texts * mean_cost


def _saved_by_prompt_caching(llm: LLM, spend: Spend) -> float | None:
    if not spend.cached_input_tokens:
        return 0.0
    price = price_of(llm, batch=spend.asked == "batch")
    if price is None:
        return None
    cached_price = price.input if price.cached_input is None else price.cached_input
    return spend.cached_input_tokens * (price.input - cached_price) / 1_000_000


def _estimate_error(planned: Plan, new: dict[str, int], spends: list[Spend]) -> float | None:
    spent = total_usd(spend.cost_usd for spend in spends if spend.plan_id == planned.plan_id)
    answered = new["tagged"] + new["refused"] + new["failed"]
    if planned.estimated_usd is None or not spent or answered < sum(shard.texts for shard in planned.shards):
        return None
    return planned.estimated_usd / spent - 1


def _new_texts(planned: Plan, loaded: Loaded | None, outcomes: Collection[Latest]) -> dict[str, int]:
    """Return the plan's new texts by status: as loaded, or where nothing was loaded, as the shards left them."""
    statuses = ("tagged", "refused", "failed", "skipped", "pending")
    if loaded is not None:
        return {status: getattr(loaded, status) for status in statuses}
    counts = Counter(outcome.status for outcome in outcomes)
    ended = {status: counts[status] for status in ("tagged", "refused", "failed")}
    return {**ended, "skipped": planned.new - sum(ended.values()), "pending": planned.pending}


def _problems(
    dataset: Dataset, planned: Plan, loaded: Loaded | None, attempts: list[Attempt], outcomes: Collection[Latest]
) -> Iterator[str]:
    """Yield why the run is not acceptable."""
    if planned.problem:
        yield planned.problem
    latest = {attempt.shard: attempt for attempt in attempts}
    broken: dict[str, list[Shard]] = {}
    for shard in planned.shards:
        if reason := _broken(latest.get(shard.shard)):
            broken.setdefault(reason, []).append(shard)
    for reason, shards in broken.items():
        yield (shards[0].name if len(shards) == 1 else f"{len(shards)} of {shards[0].of} shards") + f": {reason}"
    if loaded is None:
        yield "load_back did not finish"
        return
    if loaded.problem:
        yield loaded.problem
    asked = loaded.tagged + loaded.refused + loaded.failed
    if loaded.failed > dataset.limits.max_failed_fraction * asked:
        failures = _by_kind(outcome for outcome in outcomes if outcome.status == "failed")
        kinds = ", ".join(f"{kind} {e.count} (row {e.row_id})" for kind, e in failures.items())
        yield (
            f"{loaded.failed} of {asked} texts failed, more than `limits.max_failed_fraction` "
            f"{dataset.limits.max_failed_fraction:g} allows: {kinds}"
        )


def _broken(attempt: Attempt | None) -> str | None:
    """Return why a shard whose last attempt this is did not get done."""
    if attempt is None:
        return "did not start"
    if attempt.state == "running":
        return "was killed" if attempt.asked == "online" else "its batch was not collected"
    return attempt.reason or "broken" if attempt.state == "broken" else None


def _errors(planned: Plan, loaded: Loaded | None, outcomes: Collection[Latest]) -> dict[str, ErrorCount]:
    errors = _by_kind(outcomes)
    if planned.too_long_row is not None:
        errors["too_long"] = ErrorCount(count=planned.too_long, row_id=planned.too_long_row)
    if loaded is not None and loaded.damaged_row is not None:
        errors["damaged_record"] = ErrorCount(count=loaded.damaged, row_id=loaded.damaged_row)
    return errors


def _by_kind(outcomes: Iterable[Latest]) -> dict[str, ErrorCount]:
    errors: dict[str, ErrorCount] = {}
    for outcome in outcomes:
        if outcome.kind is not None:
            count = errors[outcome.kind].count if outcome.kind in errors else 0
            errors[outcome.kind] = ErrorCount(count=count + 1, row_id=outcome.row_id)
    return errors


def describe(summary: Summary) -> list[str]:
    """Return a summary as lines to read."""
    s = summary
    errors = ", ".join(f"{kind} {e.count} (such as row {e.row_id})" for kind, e in s.errors.items())
    tags = ", ".join(f"{tag} {count}" for tag, count in list(s.tags.items())[:12])
    lines = [
        f"{s.dataset} {s.day} · {s.run_id} · {s.state}"
        + (" (dry run)" if s.dry_run else "")
        + (f": {s.reason}" if s.reason else ""),
        f"  rows     {s.rows:,} with a text, {s.blank:,} blank",
        f"  texts    {s.texts:,} distinct: {s.cached:,} cached, {s.tagged:,} tagged, {s.refused:,} refused, "
        f"{s.failed:,} failed, {s.skipped:,} skipped, {s.pending:,} pending",
        f"  LLM      {s.llm_requests:,} requests, {s.input_tokens:,} tokens in ({s.cached_input_tokens:,} cached), "
        f"{s.output_tokens:,} out, {s.model}",
        f"  cost     {_spent(s)}, {usd(s.total_saved_usd)} saved",
    ]
    lines += [f"  saved    {_saved(s)}"] if s.total_saved_usd else []
    lines += ["  seconds  " + ", ".join(f"{step} {value:.1f}" for step, value in s.seconds.items())]
    lines += [f"  tags     {tags}"] if tags else []
    lines += [f"  review   {s.review:,} rows wait for one: `tagger review export`"] if s.review else []
    lines += [f"  drift    {shift}" for shift in s.drift]
    lines += [f"  errors   {errors}"] if errors else []
    return lines


def _spent(s: Summary) -> str:
    """Return "$0.42 spent (estimated $0.40, 5 % less)"."""
    told = f"{usd(s.cost_usd)} spent"
    if s.earlier_plans_usd:
        told += f", {usd(s.earlier_plans_usd)} of it on earlier plans of the run"
    if s.estimated_usd is None:
        return told
    told += f" (estimated {usd(s.estimated_usd)}" + (" for the rest" if s.earlier_plans_usd else "")
    if s.estimate_error is not None:
        percent = round(100 * abs(s.estimate_error))
        told += f", {percent:,} % {'less' if s.estimate_error < 0 else 'more'}" if percent else ", less than 1 % off"
    if s.estimate is not None and s.estimate.low_usd is not None and s.estimated_usd:
        basis = {"records": "by the spec's records", "lengths": "by the texts' lengths alone"}[s.estimate.basis]
        told += f"; {usd(s.estimate.low_usd)} to {usd(s.estimate.high_usd)} {basis}"
    return told + ")"


def _saved(s: Summary) -> str:
    """Return "$37.90 by the cache, $0.20 by duplicates"."""
    parts = {
        "the cache": s.saved_usd,
        "duplicates": s.saved_by_duplicates_usd,
        "the Batch API": s.saved_by_batch_usd,
        "prompt caching": s.saved_by_prompt_caching_usd,
    }
    return ", ".join(f"{usd(amount)} by {what}" for what, amount in parts.items() if amount)
