"""The files of one run: what each step leaves in storage for the next one.

```
snapshots/<dataset>/<run_id>/   the rows taken, and the new texts by shard: the only place that holds texts
runs/<dataset>/<run_id>/        the frozen dataset, the plan, the shards' results, the summary: never a text
```
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import IO, Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from tagger.connections import Connections
from tagger.dataset import Dataset
from tagger.dataset_files import parse_dataset
from tagger.exceptions import InputError, StorageError
from tagger.storage import Storage
from tagger.window import Options, Selection

# a million rows load a quarter faster than with Arrow's own, in less memory
pa.set_memory_pool(pa.system_memory_pool())

RUN_ID = re.compile(r"[A-Za-z0-9_.~:+-]+")
"""Airflow's pattern (`allowed_run_id_pattern`)."""

TRIAL = "trial__"
"""How the ids of runs start that measure tags and load none (`tagger.trial`)."""

CLEANED = "cleaned-"
"""How the files start that say what a run had spent whose other files were cleaned away (`tagger.clean`)."""

WAVE_TEXTS = 250
WAVE_CHARS = 8_000_000
"""A row group of a shard's file is a wave, which the tag step takes at a time: it holds no more, or one longer text."""

TOO_LONG = "too_long"
"""How the error of a row starts whose text is over `source.max_chars`."""

IdType = Literal["integer", "text", "uuid"]

FileModel = TypeVar("FileModel", bound=BaseModel)


def is_trial(run_id: str) -> bool:
    """Return whether a run measured tags and loaded none."""
    return run_id.startswith(TRIAL)


class File(BaseModel):
    """Base of the JSON files of a run."""

    model_config = ConfigDict(frozen=True)


class Snapshot(File):
    """`snapshot.json`: the rows that the snapshot step took. It is written last, so that a snapshot is whole."""

    rows_file: str
    rows: int
    id_type: IdType
    selection: Selection
    options: Options = Options()
    is_trial: bool = False
    """Whether its rows are not the source's, so that nothing is to be looked up in the target."""
    taken_at: AwareDatetime
    """Database time at the snapshot's start."""
    started_at: AwareDatetime
    seconds: float


class Shard(File):
    """One mapped tag task."""

    shard: int
    of: int
    texts: int

    @property
    def name(self) -> str:
        """How the task is called in the UI and in messages."""
        return f"shard {self.shard}/{self.of} · {self.texts} texts"


class Estimate(File):
    """What the texts that a run asks will take. `low_usd` and `high_usd` bound the cost with about 95 % certainty."""

    texts: int
    input_tokens: int
    cached_input_tokens: int
    """Of the input, what the endpoint will have cached."""
    output_tokens: int
    usd: float | None
    """None where the price is not known, as are the next two."""
    low_usd: float | None
    high_usd: float | None
    basis: Literal["records", "lengths"]
    """Known from records of this spec, or guessed from the texts' lengths alone."""
    seconds: float | None
    """At the dataset's limits; None where nothing tells how long a call takes."""


class Plan(File):
    """`plan.json`: what is new."""

    plan_id: str
    """Tells the shards of this plan from those of an earlier try of the step."""
    spec_id: str
    rows: int
    """Rows with a text that is not blank."""
    blank: int
    texts: int
    """Distinct texts."""
    cached: int
    settled: int = 0
    """Of the cached texts, those whose records came from batches that this step collected: they were paid for now."""
    too_long: int
    too_long_row: str | None = None
    """A row with a text that is too long, to name it by."""
    new: int
    shards: list[Shard]
    target_rows: int
    older_spec_rows: int
    """Rows of the target whose tags come from another spec."""
    older_spec_texts: int = 0
    """Distinct texts of those rows."""
    asked_again: int = 0
    """Of the new texts, those that were refused before."""
    why: dict[str, int] = {}
    """Why the new texts are new, in words, with how many are."""
    deferred: int = 0
    """Of the new texts, those that the rollout of a new spec leaves to later runs."""
    spec_change: str | None = None
    """What is another in the spec than in that of most older rows, in words."""
    older_spec_usd: float | None = None
    """What the texts of all older rows would cost about; None where nothing tells."""
    pending: int = 0
    """Texts that are neither cached nor new: a batch of the spec that is not finished holds them."""
    estimate: Estimate | None = None
    """Of the new texts that this run asks."""
    estimated_usd: float | None = None
    """`estimate.usd`: None where the price is not known."""
    budget_usd: float | None = None
    """What the run's calls, earlier attempts at it included, may cost: the least of `limits.max_cost_usd` and what is
    left of `limits.max_cost_usd_per_month`; None for no limit."""
    problem: str | None = None
    """Why no text is asked though some are new: the budget. The report fails with it."""
    planned_at: AwareDatetime
    seconds: float

    def find(self, number: int) -> Shard:
        """Return a shard by its number.

        Raises:
            InputError: there is none.
        """
        if not 1 <= number <= len(self.shards):
            raise InputError(f"the run has {len(self.shards)} shards, no shard {number}")
        return self.shards[number - 1]


class Loaded(File):
    """`load.json`: what load_back wrote."""

    written: int
    """Rows of the target that were inserted or updated."""
    deleted: int
    problem: str | None = None
    """Why the run is not acceptable, though what it tagged is loaded."""
    tagged: int
    """Distinct new texts, as are the next four."""
    refused: int
    failed: int
    skipped: int
    pending: int
    damaged: int
    """Distinct cached texts whose record turned out to be damaged or gone; the next run tags them."""
    damaged_row: str | None = None
    """A row with such a text, to name it by."""
    tags: dict[str, int]
    """Rows of the target by tag."""
    review: int = 0
    """Rows of the target that wait for a review."""
    seconds: float


class Run:
    """The files of one run of a dataset, and the storage they lie in."""

    def __init__(self, storage: Storage, dataset_name: str, run_id: str) -> None:
        if not RUN_ID.fullmatch(run_id):
            raise InputError(f"run id {run_id!r}: only letters, digits and _.~:+- may stand in it")
        self.storage = storage
        self.dataset_name = dataset_name
        self.run_id = run_id
        self.files = f"runs/{dataset_name}/{run_id}/"
        self.texts = f"snapshots/{dataset_name}/{run_id}/"

    def freeze(self, dataset: Dataset) -> None:
        """Write the dataset for the run's later steps. It holds connection ids, never secrets."""
        self.storage.put(f"{self.files}dataset.json", dataset.model_dump_json(indent=2).encode())

    def dataset(self) -> Dataset:
        """Return the dataset as the run's snapshot step froze it."""
        path = f"{self.files}dataset.json"
        body = self._body(path, "tagger snapshot")
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            raise StorageError(f"{self.storage.url}/{path}: damaged: run its step again") from None
        return parse_dataset(content, path)

    def write(self, name: str, content: File) -> None:
        """Write one of the run's JSON files."""
        self.storage.put(self._path(name), content.model_dump_json(indent=2).encode())

    def read(self, name: str, model: type[FileModel]) -> FileModel | None:
        """Return one of the run's JSON files, or None where it is not written."""
        path = self._path(name)
        body = self.storage.get(path)
        if body is None:
            return None
        try:
            return model.model_validate_json(body)
        except ValidationError:
            raise StorageError(f"{self.storage.url}/{path}: damaged: run its step again") from None

    def snapshot(self) -> Snapshot:
        """Return the run's snapshot.

        Raises:
            InputError: the run has none.
        """
        return self._required("snapshot.json", Snapshot, "tagger snapshot")

    def plan(self) -> Plan:
        """Return the run's plan.

        Raises:
            InputError: the run has none.
        """
        return self._required("plan.json", Plan, "tagger plan")

    def forget(self, *names: str) -> None:
        """Delete JSON files that an earlier try of the run left."""
        for name in names:
            self.storage.delete(self._path(name))

    def _path(self, name: str) -> str:
        return (self.texts if name == "snapshot.json" else self.files) + name

    def _required(self, name: str, model: type[FileModel], command: str) -> FileModel:
        content = self.read(name, model)
        if content is None:
            raise InputError(self._missing(name, command))
        return content

    def _body(self, path: str, command: str) -> bytes:
        body = self.storage.get(path)
        if body is None:
            raise InputError(self._missing(path.rsplit("/", 1)[-1], command))
        return body

    def _missing(self, name: str, command: str) -> str:
        later = (f"{self.files}{later}" for later in ("plan.json", "summary.json", CLEANED))
        if name in ("dataset.json", "snapshot.json") and any(next(self.storage.list(path), None) for path in later):
            return (
                f"run `{self.run_id}` of `{self.dataset_name}`: its {name} is gone (`retention`): start the run again "
                "at its first step, `tagger snapshot` (in Airflow, clear its task `snapshot` too)"
            )
        return f"run `{self.run_id}` of `{self.dataset_name}` has no {name}: `{command}` has not succeeded"


def rows_path(run: Run, plan_id: str) -> str:
    """Return the path of a plan's rows: id, key, and whether the text is too long."""
    return f"{run.files}rows-{plan_id}.parquet"


def taken_schema(ids: IdType) -> pa.Schema:
    """Return the columns of a snapshot's rows."""
    return pa.schema([_id_field(ids), ("text", pa.string())])


def keyed_schema(ids: IdType) -> pa.Schema:
    """Return the columns of a plan's rows."""
    return pa.schema([_id_field(ids), ("key", pa.string()), ("too_long", pa.bool_())])


def _id_field(ids: IdType) -> pa.Field:
    return pa.field("id", pa.int64() if ids == "integer" else pa.string())


def new_keys_path(run: Run, plan_id: str) -> str:
    """Return the path of the keys of a plan's new texts."""
    return f"{run.files}new-{plan_id}.parquet"


def shard_path(run: Run, plan_id: str, shard: int) -> str:
    """Return the path of a shard's texts, in waves; it lies in the snapshot's folder, for it holds texts."""
    return f"{run.texts}shard-{plan_id}-{shard}.parquet"


class ParquetFile:
    """A Parquet file in storage, written batch by batch through a local temporary file."""

    def __init__(self, file: IO[bytes], schema: pa.Schema, compression: str) -> None:
        # no column has so few values that a dictionary of them would pay
        self._writer = pq.ParquetWriter(
            file, schema, compression=compression, use_dictionary=False, write_statistics=False
        )
        self._schema = schema

    def write(self, columns: dict[str, Any]) -> None:
        """Write one batch of rows, given by column as lists or Arrow arrays, as one row group."""
        self._writer.write_table(pa.table(columns, schema=self._schema))

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


@contextmanager
def writing_parquet(storage: Storage, path: str, schema: pa.Schema, compression: str = "zstd") -> Iterator[ParquetFile]:
    """Write a Parquet object in bounded memory; it appears when the block ends without an error, whole."""
    with disk_errors(), tempfile.TemporaryFile() as file:  # it has no name, and is gone however the process ends
        parquet = ParquetFile(file, schema, compression)
        try:
            yield parquet
        finally:
            parquet.close()
        storage.upload(path, file)


@contextmanager
def opened_parquet(storage: Storage, path: str, schema: pa.Schema | None = None) -> Iterator[pq.ParquetFile]:
    """Download a Parquet object and yield it opened, to be read in parts; `schema` are columns that it must have.

    Raises:
        StorageError: the object is missing or damaged, which may also show in the block.
    """
    with ExitStack() as stack:
        with disk_errors(), ExitStack() as opening:  # a file that cannot be written cannot be closed either
            file = opening.enter_context(tempfile.TemporaryFile())
            storage.download(path, file)
            stack.enter_context(opening.pop_all())
        try:
            parquet = stack.enter_context(pq.ParquetFile(file))
            if schema is not None and not has_columns(parquet.schema_arrow, schema):
                raise pa.ArrowInvalid("other columns")
            yield parquet
        except (pa.ArrowException, OSError) as e:
            if isinstance(e, OSError) and (type(e) is not OSError or e.errno is not None):
                raise  # Arrow's have no number: this is the block's own
            raise StorageError(f"{storage.url}/{path}: damaged: run its step again") from None


def has_columns(found: pa.Schema, wanted: pa.Schema) -> bool:
    """Return whether a file has the wanted columns, each of its type."""
    return all(field.name in found.names and found.field(field.name).type == field.type for field in wanted)


def read_parquet(
    storage: Storage, path: str, schema: pa.Schema | None = None, batch_size: int = 5000
) -> Iterator[pa.RecordBatch]:
    """Yield a Parquet object's rows in batches, in bounded memory; `schema` are columns that it must have."""
    with opened_parquet(storage, path, schema) as parquet:
        yield from parquet.iter_batches(batch_size=batch_size)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Make a full disk one clear error."""
    try:
        yield
    except OSError as e:
        where = f" in {tempfile.tempdir}" if tempfile.tempdir else ""  # it is known only once one could be written
        reason = e.strerror or type(e).__name__
        raise StorageError(f"temporary files{where}: {reason}; $TMPDIR names another folder") from None


def open_run(dataset: Dataset, run_id: str, connections: Connections) -> Run:
    """Return a run of a dataset, in the storage that the dataset names."""
    storage = Storage.connect(dataset.storage, dataset.storage_conn_id, connections)
    return Run(storage, dataset.dataset, run_id)


def utc_now() -> datetime:
    """Return the present time, in UTC."""
    return datetime.now(UTC)
