"""Dataset files: one YAML file describes one table, its tags and how it is tagged.

`load_dataset` reads one; every mistake is answered with file, key, what was found and what is expected.
"""

import json
import os
import re
from datetime import date, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tagger.exceptions import DatasetError, InputError, Mistake

MAX_TAGS_IN_SCHEMA = 1000
"""Structured outputs take at most 1,000 enum values (OpenAI's limit)."""

MAX_ENUM_CHARS = 15_000
"""Over 250 enum values, all of them together may have at most 15,000 characters (OpenAI's limit)."""

OWN_PARAMS = frozenset({"messages", "model", "n", "stream", "tools", "tool_choice", "functions"})
"""Request parameters that are ours to set."""

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


class Model(BaseModel):
    """Base of the parts of a dataset file: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation in (int, int | None):
            raise ValueError("an integer")
        if isinstance(value, bool) and annotation in (float, float | None):
            raise ValueError("a number")
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
    concurrency: int = Field(default=64, ge=1, le=1024)
    requests_per_minute: int | None = Field(default=None, gt=0)
    tokens_per_minute: int | None = Field(default=None, gt=0)
    price: Price | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    pool: str = "default_pool"

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
        try:
            plain = json.dumps(params, allow_nan=False, ensure_ascii=False)
            plain.encode()
        except (TypeError, ValueError, RecursionError):
            raise ValueError("values that JSON has: text, numbers, true/false, null, lists and keys") from None
        as_json: dict[str, Any] = json.loads(plain)  # so that the frozen dataset of a run has the same spec
        return as_json


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


class Lock(Model):
    """The Redis that keeps several workers from asking for one text at once."""

    conn_id: str = Field(min_length=1)


class Limits(Model):
    """What makes a run stop or fail."""

    max_cost_usd: float | None = Field(default=None, gt=0)
    max_failed_fraction: float = Field(default=0.01, ge=0, le=1)
    max_deleted_fraction: float = Field(default=0.1, ge=0, le=1)


class Shards(Model):
    """How the new texts are spread over mapped tasks."""

    texts_per_shard: int = Field(default=5000, ge=1)
    max: int = Field(default=16, ge=1, le=1000)


class Alerts(Model):
    """Whom to tell."""

    to: list[str] = Field(default_factory=list)
    deadline: Duration | None = None


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
    revision: int = Field(default=1, ge=0)
    lock: Lock | None = None
    limits: Limits = Limits()
    shards: Shards = Shards()
    alerts: Alerts = Alerts()

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
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError("text without halves of surrogate pairs") from None
        return prompt

    @field_validator("tags")
    @classmethod
    def _distinct_tags(cls, tags: list[Tag]) -> list[Tag]:
        ids = [tag.id for tag in tags]
        twice = next((i for i in ids if ids.count(i) > 1), None)
        if twice is not None:
            raise ValueError(f"distinct tag ids (`{twice}` stands there twice)")
        if len(ids) > MAX_TAGS_IN_SCHEMA or (len(ids) > 250 and sum(map(len, ids)) > MAX_ENUM_CHARS):
            raise ValueError(f"at most {MAX_TAGS_IN_SCHEMA} tags; over 250, ids of {MAX_ENUM_CHARS} characters in all")
        return tags

    @model_validator(mode="after")
    def _target_is_not_source(self) -> Self:
        if (self.target_conn_id, self.target.table) == (self.source.conn_id, self.source.table):
            raise ValueError("target.table: a table other than the source's")
        return self

    @property
    def target_conn_id(self) -> str:
        """The target's connection; the source's unless the file names another."""
        return self.target.conn_id or self.source.conn_id

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


def _fires(schedule: str) -> bool:
    from croniter import CroniterError, croniter

    if "r" in schedule.lower().split() or (not schedule.startswith("@") and len(schedule.split()) != 5):
        return False
    try:
        croniter(schedule).get_prev()
    except (CroniterError, ValueError):
        return False
    return True


def datasets_folder() -> Path:
    """Return `$TAGGER_DATASETS`, or else `dags/datasets` below the working directory."""
    return Path(os.environ.get("TAGGER_DATASETS") or Path("dags", "datasets"))


def dataset_files(folder: Path) -> list[Path]:
    """Return the dataset files of a folder, in name order."""
    return sorted(p for p in folder.glob("*.y*ml") if p.suffix in {".yaml", ".yml"} and p.is_file())


def find_dataset(name_or_path: str, folder: Path | None = None) -> Path:
    """Return the file of a dataset given by its name or by a path.

    Raises:
        InputError: there is no such file.
    """
    if name_or_path.endswith((".yaml", ".yml")) or os.sep in name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"no dataset file {name_or_path}")
        return path
    folder = folder or datasets_folder()
    files = dataset_files(folder)
    for path in files:
        if name_or_path in (path.stem, _name_in(path)):
            return path
    known = ", ".join(path.stem for path in files) or "none"
    raise InputError(f"no dataset `{name_or_path}` in {folder} (there: {known}); $TAGGER_DATASETS names another folder")


def _name_in(path: Path) -> str | None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    name = content.get("dataset") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def load_dataset(path: Path) -> Dataset:
    """Read and validate a dataset file, and check it against the other files of its folder.

    Raises:
        DatasetError: the file, the key, what was found and what is expected, for each mistake.
    """
    dataset = parse_dataset(read_yaml(path), str(path))
    mistakes = []
    for other in dataset_files(path.parent):
        if other.resolve() == path.resolve():
            continue
        try:
            taken = parse_dataset(read_yaml(other), str(other))
        except DatasetError:
            continue
        if taken.dataset == dataset.dataset:
            mistakes.append(Mistake("dataset", repr(dataset.dataset), f"a name that {other.name} does not have"))
        if (taken.target_conn_id, taken.target.table) == (dataset.target_conn_id, dataset.target.table):
            mistakes.append(
                Mistake("target.table", repr(dataset.target.table), f"a table that is not the target of {other.name}")
            )
    if mistakes:
        raise DatasetError(str(path), mistakes)
    return dataset


class _Loader(yaml.SafeLoader):
    """YAML without silently overwritten keys, whose every error tells the line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as e:
            raise yaml.constructor.ConstructorError(None, None, f"no valid value ({e})", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (dict, list, set)):
                raise yaml.constructor.ConstructorError(None, None, "a key that is not a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        DatasetError: it cannot be read, or is not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as e:
        raise DatasetError(str(path), [Mistake("file", e.strerror or type(e).__name__, "a readable file")]) from None
    except UnicodeDecodeError as e:
        raise DatasetError(str(path), [Mistake("file", f"byte {e.start} is not UTF-8", "UTF-8")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
        found = getattr(e, "problem", None) or "no valid YAML"
        raise DatasetError(str(path), [Mistake(where, str(found), "valid YAML")]) from None


def parse_dataset(content: Any, file: str) -> Dataset:
    """Validate the content of a dataset file; `file` names it in errors.

    Raises:
        DatasetError: one mistake for each thing to mend.
    """
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise DatasetError(file, [Mistake("file", found, "the keys of a dataset, such as `dataset:` and `source:`")])
    try:
        return Dataset.model_validate(content)
    except ValidationError as e:
        errors = e.errors(include_url=False)
    schedule = content.get("schedule")
    other_branch = "str" if isinstance(schedule, dict) else "AssetSchedule"
    told = [error for error in errors if error["loc"][:2] != ("schedule", other_branch)]
    raise DatasetError(file, [_mistake(error) for error in told])


_UNION_BRANCHES = ("str", "AssetSchedule")
_TYPE_NAMES = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "keys"}


def _mistake(error: Any) -> Mistake:
    location = [part for part in error["loc"] if part not in _UNION_BRANCHES]
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return Mistake(key, "nothing", "a value (the key is required)")
    if kind == "extra_forbidden":
        return Mistake(key, "an unknown key", _known_keys(location))
    if kind == "value_error":
        message = str(context["error"])
        if not key:  # from a validator of the whole file, which names the key itself
            key, message = message.split(": ", 1)
            value = value["target"]["table"]
        return Mistake(key, _show(value), message)
    if kind in ("model_type", "dict_type"):
        return Mistake(key, _show(value), "keys: " + _known_keys([*location, ""]).removeprefix("one of "))
    if kind == "string_type":
        forms = ", null, or {assets: [uri]}" if key == "schedule" else ""
        return Mistake(key, _show(value), f"text (in quotes, if it reads like another type){forms}")
    message = str(error["msg"]).removeprefix("Input should be ")
    return Mistake(key, _show(value), message[0].lower() + message[1:])


def _known_keys(location: list[str | int]) -> str:
    model: type[BaseModel] | None = Dataset
    for part in location[:-1]:
        if isinstance(part, str) and model is not None:
            model = _SECTIONS.get(part)
    known = sorted(model.model_fields) if model else []
    near = get_close_matches(str(location[-1]), known, n=1)
    return f"`{near[0]}`?" if near else f"one of {', '.join(known)}"


_SECTIONS: dict[str, type[BaseModel]] = {
    "schedule": AssetSchedule,
    "source": Source,
    "target": Target,
    "llm": LLM,
    "price": Price,
    "tags": Tag,
    "lock": Lock,
    "limits": Limits,
    "shards": Shards,
    "alerts": Alerts,
}


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "keys " + ", ".join(map(str, value)) if value else "no keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**80:
        return "a number of very many digits"
    shown = repr(value) if isinstance(value, str) else str(value)
    name = _TYPE_NAMES.get(type(value))
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{shown} ({name})" if name and not isinstance(value, str) else shown
