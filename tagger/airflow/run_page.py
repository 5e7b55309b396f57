"""What the tab of a run shows: its summary, how far its shards are, and which rows failed."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal
from urllib.parse import quote
from zoneinfo import ZoneInfo

from pydantic import AwareDatetime, BaseModel, field_validator

from tagger.airflow.page_storage import Place, Read, Readers, Reading
from tagger.airflow.shard_tally import NOTHING, Failures, Tallies, Tally
from tagger.airflow.tagged_dags import NO_XCOM, AirflowRun, RunState, TagTask, Where, dataset_of
from tagger.pages.data import Counts, Shown
from tagger.report import Summary
from tagger.runs import Loaded, Plan, Run, Shard, Snapshot
from tagger.storage import Storage

ShardState = Literal["waiting", "running", "deferred", "retrying", "done", "broken", "skipped"]

SHARD_STATES: dict[str | None, ShardState] = {
    "running": "running",
    "restarting": "running",
    "deferred": "deferred",
    "up_for_retry": "retrying",
    "success": "done",
    "failed": "broken",
    "upstream_failed": "skipped",
    "skipped": "skipped",
    "removed": "skipped",
}
"""Of a task's states. The others are those of a task that waits."""


class RunSummary(Counts):
    """The run in figures, once it is reported."""

    spent_usd: float | None
    """Null where the price of the model is not known."""
    estimated_usd: float | None
    """What the plan expected the new texts to cost."""
    saved_usd: float | None
    """In all ways, against asking for each row at once."""
    requests: int
    """HTTP requests to the LLM, retries included."""
    input_tokens: int
    cached_input_tokens: int
    """Of the input, what the endpoint had cached."""
    output_tokens: int
    seconds: dict[str, float]
    """By step."""


class RunPlan(Shown):
    """What the plan step found new."""

    rows: int
    texts: int
    cached: int
    new: int
    shards: int
    estimated_usd: float | None
    budget_usd: float | None
    """What the run may cost; null for no limit."""


class ShardLine(Shown):
    """How far a shard is. A text that several attempts asked for counts once."""

    shard: int
    of: int
    name: str
    texts: int
    tagged: int
    refused: int
    failed: int
    done: int
    """Texts that have an outcome: the three before."""
    spent_usd: float | None
    state: ShardState
    attempt: int | None
    """Number of the last attempt whose files there are, of which the next four tell."""
    started_at: AwareDatetime | None
    updated_at: AwareDatetime | None
    """When it ended, or while it runs, when its file was written."""
    texts_per_second: float | None
    """Null where the Batch API answered."""
    log_url: str | None
    """Relative to the root of Airflow's UI; null where there is no log."""


class FailureLine(Shown):
    """Texts that failed or were refused for one reason."""

    kind: str
    count: int
    row_ids: list[str]
    """Of rows that have such a text; at most 100."""
    more: int
    """How many texts there are besides."""


class RunPage(Shown):
    """One run of a dataset."""

    dag_id: str
    run_id: str
    dataset: str
    day: str
    """The day that the run is of, in the time zone of the dataset."""
    state: RunState
    """As Airflow has it."""
    reason: str | None
    """Why the run failed."""
    dry_run: bool
    running: bool
    """Whether it has not ended, so that it is worth to ask again."""
    summary: RunSummary | None
    """Null until the run is reported."""
    plan: RunPlan | None
    """Null until the plan is made."""
    shards: list[ShardLine]
    failures: list[FailureLine]
    """The most frequent kind first."""
    problem: str | None
    """What could not be read, and what to do."""


class Zoned(BaseModel):
    """The part of `dataset.json` that tells the time zone."""

    timezone: str = "UTC"

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (KeyError, OSError):
            raise ValueError("a time zone such as UTC or Asia/Tokyo") from None
        return timezone


class RunPages:
    """Makes the pages of runs; keeps what it read of shards that did not change."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._tallies = Tallies()

    def page(self, dag_id: str, known: AirflowRun, tasks: list[TagTask], where: Where | None) -> RunPage:
        """Return the page of a run.

        Args:
            dag_id: Its DAG.
            known: The run as Airflow knows it.
            tasks: The instances of its step `tag`.
            where: Where its files are; None where nothing tells.
        """
        until = self._readers.until()
        files = self._files(where, known.run_id, until) if where else {}
        found = {name: reading.found for name, reading in files.items()}
        plan, summary, loaded = found.get("plan"), found.get("summary"), found.get("loaded")
        tallies: Mapping[int, Reading[Tally]] = {}
        if where and plan:
            tallies = self._read_shards(where, known.run_id, plan, found.get("versions") or {}, until)
        by_shard = {shard: reading.found or NOTHING for shard, reading in tallies.items()}
        problems = [each.problem for each in (*files.values(), *tallies.values()) if each.problem]
        if where is None and known.state == "success":
            problems.append(NO_XCOM)
        return RunPage(
            dag_id=dag_id,
            run_id=known.run_id,
            dataset=dataset_of(dag_id),
            day=_day(summary, known, found.get("zoned")),
            state=known.state,
            reason=(summary.reason if summary and not known.is_at_work else None) or known.reason,
            dry_run=_is_dry(summary, found.get("snapshot")),
            running=known.is_at_work,
            summary=_summary(summary) if summary else None,
            plan=_plan(plan) if plan else None,
            shards=_shards(plan, by_shard, tasks, f"dags/{quote(dag_id, safe='')}/runs/{quote(known.run_id, safe='')}"),
            failures=_failures(plan, loaded, by_shard.values()),
            problem="; ".join(dict.fromkeys(problems)) or None,
        )

    def _files(self, where: Where, run_id: str, until: float) -> dict[str, Reading[Any]]:
        reads: dict[str, Callable[[Run], Any]] = {
            "plan": lambda run: run.read("plan.json", Plan),
            "summary": lambda run: run.read("summary.json", Summary),
            "loaded": lambda run: run.read("load.json", Loaded),
            "snapshot": lambda run: run.read("snapshot.json", Snapshot),
            "zoned": lambda run: run.read("dataset.json", Zoned),
            "versions": self._tallies.versions,
        }
        return self._readers.read({name: _of_run(where, run_id, read) for name, read in reads.items()}, until)

    def _read_shards(
        self, where: Where, run_id: str, plan: Plan, versions: Mapping[int, list[str]], until: float
    ) -> dict[int, Reading[Tally]]:
        def tally(shard: int) -> Callable[[Run], Tally]:
            return lambda run: self._tallies.of(run, plan.plan_id, shard, versions[shard])

        shards = [shard.shard for shard in plan.shards if shard.shard in versions]
        reads = {shard: _of_run(where, run_id, tally(shard)) for shard in shards}
        return self._readers.read(reads, until, "shards")


def _of_run(where: Where, run_id: str, read: Callable[[Run], Read]) -> tuple[Place, Callable[[Storage], Read]]:
    return where.place, lambda storage: read(Run(storage, where.dataset, run_id))


def _day(summary: Summary | None, known: AirflowRun, zoned: Zoned | None) -> str:
    if summary is not None:
        return summary.day
    target_date = (known.conf or {}).get("target_date")
    zone = ZoneInfo((zoned or Zoned()).timezone)
    return str(target_date or f"{known.date.astimezone(zone):%Y-%m-%d}")


def _is_dry(summary: Summary | None, snapshot: Snapshot | None) -> bool:
    return summary.dry_run if summary else snapshot.options.dry_run if snapshot else False


def _summary(summary: Summary) -> RunSummary:
    figures = summary.model_dump(include=set(RunSummary.model_fields) - {"saved_usd"})
    return RunSummary(
        **figures,
        spent_usd=summary.cost_usd,
        saved_usd=summary.total_saved_usd,
        requests=summary.llm_requests,
    )


def _plan(plan: Plan) -> RunPlan:
    return RunPlan(**plan.model_dump(include=set(RunPlan.model_fields) - {"shards"}), shards=len(plan.shards))


def _shards(plan: Plan | None, tallies: Mapping[int, Tally], tasks: list[TagTask], run_url: str) -> list[ShardLine]:
    by_shard = {task.map_index + 1: task for task in tasks}
    shards = plan.shards if plan else []
    return [_shard(s, tallies.get(s.shard, NOTHING), by_shard.get(s.shard), run_url) for s in shards]


def _shard(shard: Shard, tally: Tally, task: TagTask | None, run_url: str) -> ShardLine:
    return ShardLine(
        shard=shard.shard,
        of=shard.of,
        name=shard.name,
        texts=shard.texts,
        tagged=tally.counts["tagged"],
        refused=tally.counts["refused"],
        failed=tally.counts["failed"],
        done=tally.done,
        spent_usd=tally.spent_usd,
        state=SHARD_STATES.get(task.state, "waiting") if task else _state(tally),
        attempt=tally.attempt,
        started_at=tally.started_at,
        updated_at=tally.updated_at,
        texts_per_second=tally.texts_per_second,
        log_url=f"{run_url}/tasks/tag/mapped/{task.map_index}" if task and task.try_number else None,
    )


def _state(tally: Tally) -> ShardState:
    """Return the state of a shard that Airflow has no task for: not mapped yet, or no more."""
    return "waiting" if tally.state is None else "done" if tally.state == "done" else "broken"


def _failures(plan: Plan | None, loaded: Loaded | None, tallies: Iterable[Tally]) -> list[FailureLine]:
    found: dict[str, Failures] = {}
    for tally in tallies:
        for kind, failures in tally.failures.items():
            found.setdefault(kind, Failures()).add(failures.count, failures.row_ids)
    if plan is not None and plan.too_long_row is not None:
        found.setdefault("too_long", Failures()).add(plan.too_long, [plan.too_long_row])
    if loaded is not None and loaded.damaged_row is not None:
        found.setdefault("damaged_record", Failures()).add(loaded.damaged, [loaded.damaged_row])
    by_count = sorted(found.items(), key=lambda each: (-each[1].count, each[0]))
    return [
        FailureLine(kind=kind, count=each.count, row_ids=each.row_ids, more=each.count - len(each.row_ids))
        for kind, each in by_count
    ]
