"""A dataset's runs rolled up into one object, so that a page reads one and not thousands.

`history/<dataset>.json.gz` is a cache of what lies in `runs/<dataset>/`. Each report brings it up to date, reading only
the runs whose files changed; where it is lost or damaged, it is made anew. Runs whose other files were cleaned away
stay in it for good, with the same figures: their summaries, and what they spent, are never cleaned (`tagger.clean`).
"""

import gzip
import hashlib
import logging
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import AwareDatetime, BeforeValidator, Field

from tagger.dataset import Dataset
from tagger.exceptions import InputError, StorageError
from tagger.runs import Estimate, File
from tagger.spend import THREADS, Counted, RunFiles, Spend, list_runs, total_usd
from tagger.storage import Storage

logger = logging.getLogger(__name__)

FORMAT = 2
"""To be raised when a rolled run holds more, or other things, so that all are read again."""

TRIES = 3
"""How often a report begins again while others write."""

QUARTER_HOUR = 15
"""Minutes. Days and months of every time zone begin at a quarter hour of UTC."""


class Window(File):
    """The instants between which rows were taken; None where all rows were."""

    start: AwareDatetime | None
    end: AwareDatetime | None


class SummaryFigures(File):
    """A run's summary but for its errors and attempts. `texts = cached + tagged + … + pending`, as there."""

    dataset: str
    run_id: str
    day: str
    window: Window
    spec_id: str
    model: str
    mode: str
    spec_change: str | None = None
    """What was another in the spec than in that of most older rows, in words."""
    dry_run: bool = False
    state: Literal["success", "failed"]
    reason: str | None
    started_at: AwareDatetime
    finished_at: AwareDatetime
    rows: int
    blank: int
    texts: int
    cached: int
    tagged: int
    refused: int
    failed: int
    skipped: int
    pending: int
    llm_requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    estimate: Estimate | None = None
    """What the plan expected the new texts to take."""
    estimated_usd: float | None = None
    """What the plan expected them to cost."""
    estimate_error: float | None = None
    """By what part of the actual cost the estimate was above it, or if negative below; None where that is not known, or
    where not all texts that the estimate is for were asked."""
    cost_usd: float | None
    """None where the price is not known."""
    earlier_plans_usd: float | None = 0.0
    """Of the cost, what was spent on earlier plans of the run."""
    saved_usd: float | None
    """By the cache: cached texts times the mean cost of a record of the spec."""
    saved_by_duplicates_usd: float | None = 0.0
    """Rows beyond the first with a text, times that mean."""
    saved_by_batch_usd: float | None = 0.0
    """What the Batch API took less than calls at once."""
    saved_by_prompt_caching_usd: float | None = 0.0
    """What input that the endpoint had cached cost less than other input."""
    seconds: dict[str, float]
    tags: dict[str, int]
    review: int = 0
    """Rows of the target that wait for a review."""
    answered: int | None = None
    """New texts that the LLM answered, tagged or refused; None in a summary of before this was counted."""
    answered_refused: int = 0
    """Of the answered, as are the next two: those refused."""
    answered_none: int = 0
    """Tagged, with no tag."""
    answered_tags: dict[str, int] = Field(default_factory=dict)
    """By tag."""

    @property
    def total_saved_usd(self) -> float | None:
        """All that was saved, against asking for each row at once; None where a part is not known."""
        return total_usd(
            [self.saved_usd, self.saved_by_duplicates_usd, self.saved_by_batch_usd, self.saved_by_prompt_caching_usd]
        )


def _counts_alone(errors: object) -> object:
    """Leave out the row ids that a summary names its errors by."""
    if not isinstance(errors, dict):
        return errors
    return {kind: error.get("count") if isinstance(error, dict) else error for kind, error in errors.items()}


class RolledSummary(SummaryFigures):
    """A run's summary without its attempts and without row ids."""

    errors: Annotated[dict[str, int], BeforeValidator(_counts_alone)]
    """Texts by kind of error."""


class CountedSummary(RolledSummary, Counted):
    """`summary.json` as it is read here."""


class Spent(File):
    """What those attempts at a run spent that ended, or last wrote, in one quarter of an hour."""

    at: AwareDatetime
    """The beginning of the quarter hour."""
    requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    cost_usd: float | None
    """None where the price is not known."""


class RolledRun(File):
    """One run. It has a summary, or it spent something, or it has a problem."""

    run_id: str
    ended_at: AwareDatetime
    """When it was summed up; without a summary, when an attempt last wrote."""
    version: str
    """Another one as soon as the run's summary or one of its attempts changes; empty where that cannot be told."""
    summary: RolledSummary | None
    """None for a run that was killed before its report, or is at work."""
    spent: list[Spent]
    problem: str | None = None
    """What of its files is damaged, and what to do. Its money is then as its summary counts it, else not known."""


class Rollup(File):
    """A dataset as its file says, and all its runs."""

    dataset: str
    timezone: str
    model: str
    mode: str
    max_cost_usd: float | None
    max_cost_usd_per_month: float | None
    tags: list[str]
    """The tags' ids, in file order."""
    runs: list[RolledRun]
    """Oldest first."""

    @property
    def zone(self) -> ZoneInfo:
        """The zone of its days and months."""
        return ZoneInfo(self.timezone)

    @property
    def problems(self) -> list[str]:
        """What of the runs' files is damaged."""
        return [run.problem for run in self.runs if run.problem is not None]


def rollup_of(dataset: Dataset, runs: Iterable[RolledRun]) -> Rollup:
    """Return the rollup of a dataset with these runs."""
    return Rollup(
        dataset=dataset.dataset,
        timezone=dataset.timezone,
        model=dataset.llm.model,
        mode=dataset.llm.mode,
        max_cost_usd=dataset.limits.max_cost_usd,
        max_cost_usd_per_month=dataset.limits.max_cost_usd_per_month,
        tags=dataset.tag_ids,
        runs=sorted(runs, key=lambda run: (run.ended_at, run.run_id)),
    )


def read_rollup(storage: Storage, dataset_name: str) -> Rollup | None:
    """Return a dataset's rollup as the last report left it, in one request; None where there is none.

    Raises:
        StorageError: it is damaged.
    """
    path = _path(dataset_name)
    body = storage.get(path)
    return None if body is None else _parsed(body, f"{storage.url}/{path}")


def rolled_up(storage: Storage, dataset: Dataset) -> Rollup:
    """Return a dataset's rollup as its runs are now; nothing is written. Damaged runs are in it with their problem."""
    return rollup_of(dataset, rolled_runs(storage, dataset.dataset))


def rolled_runs(storage: Storage, dataset_name: str) -> list[RolledRun]:
    """Return a dataset's runs as they are now; nothing is written."""
    before = None
    with suppress(StorageError):
        before = read_rollup(storage, dataset_name)
    return _runs(storage, dataset_name, before)


def update_rollup(storage: Storage, dataset: Dataset, started_at: datetime) -> None:
    """Bring a dataset's rollup up to date, after a run that started then with that dataset.

    It is but a cache: where that fails, a warning tells, and no error comes. A report that finds that another one wrote
    meanwhile begins again; a run that is lost all the same is back after the next report.
    """
    path = _path(dataset.dataset)
    try:
        found = storage.get(path)
        for _ in range(TRIES):
            before, after = found, _updated(storage, dataset, started_at, found)
            found = storage.get(path)
            if found == before:
                break
        storage.put(path, after)
    except (InputError, StorageError) as e:
        logger.warning("%s: the pages do not show this run until the next report: %s", dataset.dataset, e)


def _updated(storage: Storage, dataset: Dataset, started_at: datetime, body: bytes | None) -> bytes:
    """Return a rollup brought up to date. What it says of the dataset is of the run that started last."""
    before = None
    with suppress(StorageError):
        before = None if body is None else _parsed(body, _path(dataset.dataset))
    rollup = rollup_of(dataset, _runs(storage, dataset.dataset, before))
    if before is not None and any(run.summary and run.summary.started_at > started_at for run in rollup.runs):
        rollup = before.model_copy(update={"runs": rollup.runs})
    return gzip.compress(rollup.model_dump_json().encode(), compresslevel=6, mtime=0)


def _parsed(body: bytes, where: str) -> Rollup:
    try:
        rollup = Rollup.model_validate_json(gzip.decompress(body))
        ZoneInfo(rollup.timezone)
    except (OSError, EOFError, zlib.error, ValueError, KeyError):
        raise StorageError(f"{where}: damaged; the dataset's next report makes it anew") from None
    return rollup


def _runs(storage: Storage, dataset_name: str, before: Rollup | None) -> list[RolledRun]:
    """Return a dataset's runs, those that changed since a rollup read again."""
    known = {run.run_id: run for run in before.runs} if before else {}
    listed = list_runs(storage, dataset_name)
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(lambda files: _rolled(files, known.get(files.run.run_id)), listed))


def _path(dataset_name: str) -> str:
    return f"history/{dataset_name}.json.gz"


def _rolled(files: RunFiles, known: RolledRun | None) -> RolledRun:
    version = _version(files)
    if known is not None and known.version == version != "":
        return known
    summary: CountedSummary | None = None
    problem = None
    try:
        summary = files.run.read("summary.json", CountedSummary) if files.summary else None
    except StorageError as e:
        problem = str(e)
    try:
        spends = files.spends(summary.attempts if summary else [])
    except StorageError as e:
        problem = str(e)
        spends = files.spends_unread(summary.attempts if summary else [])
    last_written = max(
        (spend.ended_at for spend in spends), default=max(version.written_at for version in files.versions)
    )
    return RolledRun(
        run_id=files.run.run_id,
        ended_at=summary.finished_at if summary else last_written,
        version="" if problem else version,  # S3 may only have stumbled: to be read again
        summary=RolledSummary(**summary.model_dump(exclude={"attempts"})) if summary else None,
        spent=_by_quarter_hours(spends),
        problem=problem,
    )


def _version(files: RunFiles) -> str:
    versions = files.versions
    if not all(version.etag for version in versions):
        return ""
    names = sorted(f"{version.path} {version.etag}" for version in versions)
    return hashlib.sha256("\n".join([str(FORMAT), *names]).encode()).hexdigest()[:16]


def _by_quarter_hours(spends: Iterable[Spend]) -> list[Spent]:
    found: dict[datetime, list[Spend]] = {}
    for spend in spends:
        at = spend.ended_at.astimezone(UTC)
        quarter = at.replace(minute=at.minute - at.minute % QUARTER_HOUR, second=0, microsecond=0)
        found.setdefault(quarter, []).append(spend)
    return [
        Spent(
            at=at,
            requests=sum(spend.requests for spend in together),
            input_tokens=sum(spend.input_tokens for spend in together),
            cached_input_tokens=sum(spend.cached_input_tokens for spend in together),
            output_tokens=sum(spend.output_tokens for spend in together),
            cost_usd=total_usd(spend.cost_usd for spend in together),
        )
        for at, together in sorted(found.items())
    ]
