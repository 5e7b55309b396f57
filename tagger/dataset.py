"""What a dataset file holds: one table, its tags, and how it is tagged. `tagger.dataset_files` reads it."""

import json
import re
from datetime import date, timedelta
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote
from zoneinfo import ZoneInfo

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)

MAX_TAGS_IN_SCHEMA = 1000
"""Structured outputs take at most 1,000 enum values (OpenAI's limit)."""

MAX_ENUM_CHARS = 15_000
"""Over 250 enum values, all of them together may have at most 15,000 characters (OpenAI's limit)."""

OWN_PARAMS = frozenset({"messages", "model", "n", "stream", "tools", "tool_choice", "functions"})
"""Request parameters that are ours to set."""

MAX_TEXT = 1_000_000
"""Characters."""

MAX_NAME = 200
"""Characters of the name of a model."""

MAX_NUMBER = 10**15
"""What is computed of such numbers still fits into a float, and into a column of a file."""

LONGEST_DURATION = timedelta(days=36_500)
"""A hundred years: arithmetic on dates stays within the calendar."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _parse_duration(value: object) -> timedelta:
    if isinstance(value, timedelta):
        return value
    match = re.fullmatch(r"([0-9]{1,12})([smhd])", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a duration such as 30m, 2h or 1d")
    seconds = int(match[1]) * _UNITS[match[2]]
    if seconds > LONGEST_DURATION.total_seconds():
        raise ValueError(f"a duration such as 30m, 2h or 1d, of at most {LONGEST_DURATION.days}d")
    return timedelta(seconds=seconds)


Duration = Annotated[
    timedelta,
    BeforeValidator(_parse_duration),
    PlainSerializer(lambda d: f"{int(d.total_seconds())}s", return_type=str),
]
TimeZone = Annotated[str, Field(min_length=1)]


def _check_time_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError("a time zone such as UTC or Asia/Tokyo") from None
    return name


def is_name(value: object) -> bool:
    """Return whether a value is a name that a line, a page and any database can show."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= MAX_NAME


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON has them, so that the frozen dataset of a run has the same spec."""
    try:
        plain = json.dumps(values, allow_nan=False, ensure_ascii=False)
        plain.encode()
    except (TypeError, ValueError, RecursionError):
        raise ValueError("values that JSON has: text, numbers, true/false, null, lists and keys") from None
    as_json: dict[str, Any] = json.loads(plain)
    return as_json


class Model(BaseModel):
    """Base of the parts of a dataset file: unknown keys are errors, values do not change."""

    # only a text with a limit is looked into for halves of surrogate pairs, which no file or request can hold
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=MAX_TEXT)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation in (int, int | None):
            raise ValueError("an integer")
        if isinstance(value, bool) and annotation in (float, float | None):
            raise ValueError("a number")
        return value

    @field_validator("*")
    @classmethod
    def _within_bounds(cls, value: object) -> object:
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise ValueError("a number of at most 15 digits")
        return value


class AssetSchedule(Model):
    """Run when these assets change."""

    assets: list[str] = Field(min_length=1)


class Source(Model):
    """Where the texts come from."""

    conn_id: str = Field(min_length=1)
    table: str = Field(min_length=1)
    id_column: str = Field(min_length=1)
    text_columns: list[str] = Field(min_length=1)
    updated_at: str | None = None
    timezone: TimeZone | None = None
    lookback: Duration = timedelta(days=1)
    max_chars: int = Field(default=100_000, gt=0)

    @field_validator("timezone")
    @classmethod
    def _time_zone(cls, name: str | None) -> str | None:
        return name if name is None else _check_time_zone(name)

    @field_validator("text_columns")
    @classmethod
    def _distinct(cls, columns: list[str]) -> list[str]:
        if len(set(columns)) < len(columns):
            raise ValueError("each column once")
        return columns


class Target(Model):
    """Where the tags go."""

    conn_id: str | None = None
    table: str = Field(min_length=1)


class Price(Model):
    """USD per million tokens."""

    input: float = Field(ge=0)
    cached_input: float | None = Field(default=None, ge=0)
    output: float = Field(ge=0)


class LLM(Model):
    """The endpoint, the model and how hard it may be driven."""

    conn_id: str = "openai_default"
    model: str = Field(min_length=1)
    mode: Literal["online", "batch"] = "online"
    batch_fallback: Literal["online"] | None = None
    texts_per_request: int = Field(default=1, ge=1, le=100)
    concurrency: int = Field(default=64, ge=1, le=1024)
    requests_per_minute: int | None = Field(default=None, gt=0)
    tokens_per_minute: int | None = Field(default=None, gt=0)
    price: Price | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    pool: str = "default_pool"

    @field_validator("model")
    @classmethod
    def _one_line(cls, model: str) -> str:
        if not is_name(model):
            raise ValueError(f"a name of at most {MAX_NAME} characters")
        return model

    @field_validator("price", mode="before")
    @classmethod
    def _free(cls, price: object) -> object:
        return {"input": 0, "output": 0} if price == 0 and not isinstance(price, bool) else price

    @field_validator("params")
    @classmethod
    def _not_ours(cls, params: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(OWN_PARAMS & params.keys())
        if taken:
            raise ValueError(f"request parameters other than {', '.join(taken)}, which tagger sets itself")
        return _as_json(params)

    @model_validator(mode="after")
    def _one_text_in_a_batch(self) -> Self:
        if self.mode == "batch" and self.texts_per_request > 1:
            raise ValueError("texts_per_request: 1, where `mode: batch` asks for each text on a line of its own")
        return self


class Tag(Model):
    """One topic; the description is what the LLM goes by."""

    id: str = Field(min_length=1, max_length=64)
    description: str = ""

    @field_validator("id")
    @classmethod
    def _one_line(cls, tag_id: str) -> str:
        if tag_id != tag_id.strip() or not tag_id.isprintable():
            raise ValueError("one line without surrounding blanks")
        return tag_id


class Example(Model):
    """A text and the tags that it should get, shown to the LLM.

    It stands in each run's `dataset.json`: better one that is made up than a row of the table.
    """

    text: str = Field(repr=False)
    tags: list[str]

    @field_validator("text")
    @classmethod
    def _some_text(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("a text")
        return text


class Lock(Model):
    """The Redis that keeps several workers from asking for one text at once."""

    conn_id: str = Field(min_length=1)


class Limits(Model):
    """What makes a run stop or fail."""

    max_cost_usd: float | None = Field(default=None, gt=0)
    max_cost_usd_per_month: float | None = Field(default=None, gt=0)
    max_failed_fraction: float = Field(default=0.01, ge=0, le=1)
    max_deleted_fraction: float = Field(default=0.1, ge=0, le=1)


class Rollout(Model):
    """How a new spec reaches the rows that hold an older one."""

    texts_per_run: int = Field(ge=1)


LEAST_RETENTION = timedelta(days=2)
"""A run that waits for a batch writes nothing for up to a day, and is not to lose what it goes on with."""


class Retention(Model):
    """How long files of a run are kept after it last wrote one. None: for ever."""

    snapshots: Duration | None = None
    """Its rows: all that holds texts."""
    runs: Duration | None = None
    """All of it but its summary and what it spent."""

    @field_validator("snapshots", "runs")
    @classmethod
    def _long_enough(cls, kept: timedelta | None, info: ValidationInfo) -> timedelta | None:
        least = max(LEAST_RETENTION, info.data.get("snapshots") or LEAST_RETENTION)
        if kept is not None and kept < least:
            of_snapshots = ", as `snapshots` is: a run's files go last" if least > LEAST_RETENTION else ""
            raise ValueError(f"{in_days(least)} or more{of_snapshots}")
        return kept


def in_days(duration: timedelta) -> str:
    """Return a duration as "14d"."""
    return f"{duration / timedelta(days=1):g}d"


class Shards(Model):
    """How the new texts are spread over mapped tasks."""

    texts_per_shard: int = Field(default=5000, ge=1)
    max: int = Field(default=16, ge=1, le=1000)


class Alerts(Model):
    """Whom to tell by e-mail, and after how long a run is late."""

    to: list[str] = Field(default_factory=list)
    deadline: Duration | None = None

    @field_validator("to")
    @classmethod
    def _addresses(cls, to: list[str]) -> list[str]:
        if not all(re.fullmatch(r"[^@\s<>,;]+@[^@\s<>,;]+", address) for address in to):
            raise ValueError("addresses such as team@example.com")
        return to


class Task(Model):
    """How Airflow runs one step."""

    queue: str | None = Field(default=None, min_length=1)
    timeout: Duration | None = None
    retries: int = Field(default=3, ge=0, le=100)
    executor_config: dict[str, Any] = Field(default_factory=dict)

    @field_validator("timeout")
    @classmethod
    def _some_time(cls, timeout: timedelta | None) -> timedelta | None:
        if timeout is not None and not timeout:
            raise ValueError("more than 0s")
        return timeout

    @field_validator("executor_config")
    @classmethod
    def _plain(cls, config: dict[str, Any]) -> dict[str, Any]:
        return _as_json(config)


class Tasks(Model):
    """How Airflow runs the steps; what a step does not name is as in `default`."""

    default: Task = Task()
    snapshot: Task = Task()
    plan: Task = Task()
    tag: Task = Task()
    load_back: Task = Task()
    report: Task = Task()

    def of(self, step: str) -> Task:
        """Return a step's settings, those of `default` filled in."""
        own: Task = getattr(self, step)
        return self.default.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})


class Dataset(Model):
    """A dataset file, validated, with all defaults filled in."""

    dataset: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=200)
    schedule: str | AssetSchedule | None = None
    timezone: TimeZone = "UTC"
    start_date: date = date(2026, 1, 1)
    storage: str = Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]+(/[^/]+)*/?$")
    storage_conn_id: str = "aws_default"
    source: Source
    target: Target
    llm: LLM
    prompt: str
    tags: list[Tag] = Field(min_length=1)
    max_tags: int = Field(default=3, ge=1)
    allow_none: bool = True
    examples: list[Example] = Field(default_factory=list)
    confidence: bool = False
    review_below: float | None = Field(default=None, gt=0, le=1)
    revision: int = Field(default=1, ge=0)
    lock: Lock | None = None
    limits: Limits = Limits()
    rollout: Rollout | None = None
    retention: Retention = Retention()
    shards: Shards = Shards()
    alerts: Alerts = Alerts()
    max_active_runs: int = Field(default=1, ge=1, le=1000)
    tasks: Tasks = Tasks()

    @field_validator("schedule")
    @classmethod
    def _cron(cls, schedule: str | AssetSchedule | None) -> str | AssetSchedule | None:
        if isinstance(schedule, str) and not _fires(schedule):
            raise ValueError("a cron expression of five fields that fires at some time, null, or {assets: [uri]}")
        return schedule

    @field_validator("timezone")
    @classmethod
    def _time_zone(cls, name: str) -> str:
        return _check_time_zone(name)

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("what the texts are and how to tag them")
        return prompt

    @field_validator("tags")
    @classmethod
    def _distinct_tags(cls, tags: list[Tag]) -> list[Tag]:
        ids = [tag.id for tag in tags]
        if len(ids) > MAX_TAGS_IN_SCHEMA or (len(ids) > 250 and sum(map(len, ids)) > MAX_ENUM_CHARS):
            raise ValueError(f"at most {MAX_TAGS_IN_SCHEMA} tags; over 250, ids of {MAX_ENUM_CHARS} characters in all")
        twice = next((i for i in ids if ids.count(i) > 1), None)
        if twice is not None:
            raise ValueError(f"distinct tag ids (`{twice}` stands there twice)")
        return tags

    @model_validator(mode="after")
    def _target_is_not_source(self) -> Self:
        if (self.target_conn_id, self.target.table) == (self.source.conn_id, self.source.table):
            raise ValueError("target.table: a table other than the source's")
        return self

    @model_validator(mode="after")
    def _examples_are_answers(self) -> Self:
        known = set(self.tag_ids)
        for number, example in enumerate(self.examples):
            key, tags = f"examples[{number}].tags", example.tags
            if unknown := [place for place, tag in enumerate(tags, 1) if tag not in known]:
                raise ValueError(f"{key}: ids of `tags` (number {unknown[0]} is none)")
            if len(set(tags)) < len(tags) or len(tags) > self.max_tags or (not tags and not self.allow_none):
                least = "none" if self.allow_none else "one"
                raise ValueError(f"{key}: from {least} to {self.max_tags} tags (`max_tags`, `allow_none`), each once")
        return self

    @model_validator(mode="after")
    def _review_needs_confidence(self) -> Self:
        if self.review_below is not None and not self.confidence:
            raise ValueError("review_below: no value without `confidence: true`, whose values it is compared with")
        return self

    @property
    def target_conn_id(self) -> str:
        """The target's connection; the source's unless the file names another."""
        return self.target.conn_id or self.source.conn_id

    @property
    def source_asset(self) -> str:
        """URI of the source table, as an Airflow asset."""
        return _asset(self.source.conn_id, self.source.table)

    @property
    def target_asset(self) -> str:
        """URI of the target table, as an Airflow asset."""
        return _asset(self.target_conn_id, self.target.table)

    @property
    def tag_ids(self) -> list[str]:
        """The tags' ids, in file order."""
        return [tag.id for tag in self.tags]

    @property
    def zone(self) -> ZoneInfo:
        """The zone of the schedule and of `--day`."""
        return ZoneInfo(self.timezone)

    @property
    def source_zone(self) -> ZoneInfo:
        """The zone of naive timestamps in the source."""
        return ZoneInfo(self.source.timezone or self.timezone)


def _asset(conn_id: str, table: str) -> str:
    # Airflow takes ASCII only, and leaves schemes alone that begin with `x-`: for others it imports all providers
    return f"x-tagger://{quote(conn_id)}/{quote(table)}"


def _fires(schedule: str) -> bool:
    from croniter import CroniterError, croniter

    if "r" in schedule.lower().split() or (not schedule.startswith("@") and len(schedule.split()) != 5):
        return False
    try:
        croniter(schedule).get_prev()
    except (CroniterError, ValueError):
        return False
    return True
