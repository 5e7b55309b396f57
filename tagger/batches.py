"""Batches that were handed to the Batch API: what a later try, and every other run, must know of them.

```
batches/<spec_id>/<batch>.parquet   its texts by key, each with a row that has it and its length; never a text
batches/<spec_id>/<batch>.json      where it is; written before the paid call, gone when its shard is done
```
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import pyarrow as pa
from pydantic import AwareDatetime, ValidationError

from tagger.dataset import Price
from tagger.exceptions import StorageError
from tagger.ledger import BatchBooks
from tagger.runs import File, Run, read_parquet, writing_parquet
from tagger.storage import Storage

TEXTS_SCHEMA = pa.schema([("key", pa.string()), ("row_id", pa.string()), ("narrow", pa.int32()), ("wide", pa.int32())])


FILE_NAME = re.compile(r"tagger-([0-9a-f]{16})\.jsonl")
"""What the provider is told as the name of a batch's requests, with ours of the batch in it."""


class HandedOver(NamedTuple):
    """What is kept of a text that is in a batch: a row that has it, and its length by script."""

    row_id: str
    narrow: int
    wide: int


class Batch(File):
    """`<batch>.json`: one batch, of one shard."""

    batch: str
    """Our name of it, which the provider keeps with it."""
    dataset: str
    run_id: str
    plan_id: str
    shard: int
    conn_id: str
    requests: int
    price: Price | None
    """Of its tokens; None where it is not known."""
    books: str
    """Path of the shard file that its answers are booked in."""
    intended_at: AwareDatetime
    input_file: str | None = None
    """The provider's name of the uploaded requests."""
    remote: str | None = None
    """The provider's name of the batch."""
    collected: bool = False

    @property
    def ledger(self) -> BatchBooks:
        """The books of its answers."""
        return BatchBooks(self.books, self.intended_at)

    @property
    def file_name(self) -> str:
        """What the provider is told as the name of the uploaded requests."""
        return f"tagger-{self.batch}.jsonl"

    def is_of(self, run: Run, plan_id: str, shard: int) -> bool:
        """Return whether it holds texts of this shard."""
        mine = (run.dataset_name, run.run_id, plan_id, shard)
        return (self.dataset, self.run_id, self.plan_id, self.shard) == mine


class Batches:
    """The batches of one spec that are not done."""

    def __init__(self, storage: Storage, spec: str) -> None:
        self.storage = storage
        self.spec = spec
        self._prefix = f"batches/{spec}/"

    def all(self) -> list[Batch]:
        """Return them, oldest first.

        Raises:
            StorageError: a file is damaged.
        """
        paths = [path for path, _ in self.storage.list(self._prefix) if path.endswith(".json")]
        found = (self._read(path) for path in paths)
        return sorted((batch for batch in found if batch is not None), key=lambda batch: batch.intended_at)

    def read(self, batch: Batch) -> Batch | None:
        """Return a batch as it is by now; None where it is done."""
        return self._read(self._path(batch))

    def unfinished(self) -> list[Batch]:
        """Return those whose answers are not all collected."""
        return [batch for batch in self.all() if not batch.collected]

    def add(self, batch: Batch, texts: Mapping[str, HandedOver]) -> None:
        """Write a new batch, of texts by key."""
        with writing_parquet(self.storage, self._texts_path(batch), TEXTS_SCHEMA) as parquet:
            columns = zip(*((key, *text) for key, text in texts.items()), strict=True)
            parquet.write(dict(zip(TEXTS_SCHEMA.names, map(list, columns), strict=True)))
        self.write(batch)

    def write(self, batch: Batch) -> None:
        """Write where a batch is."""
        self.storage.put(self._path(batch), batch.model_dump_json(indent=2).encode())

    def update(self, batch: Batch, **changes: object) -> Batch:
        """Write what changed, beside what others wrote meanwhile; return the batch. One that is done stays so."""
        latest = self.read(batch)
        changed = (latest or batch).model_copy(update=changes)
        if latest is not None:
            self.write(changed)
        return changed

    def texts(self, batch: Batch) -> dict[str, HandedOver]:
        """Return a batch's texts by key; none where it is done by now."""
        texts: dict[str, HandedOver] = {}
        try:
            for part in read_parquet(self.storage, self._texts_path(batch), TEXTS_SCHEMA):
                for key, *text in zip(*(column.to_pylist() for column in part.columns), strict=True):
                    texts[key] = HandedOver(*text)
        except StorageError:
            if self.read(batch) is not None:
                raise
            return {}
        return texts

    def keys(self, batches: list[Batch]) -> set[str]:
        """Return the keys of all texts of some batches."""
        return {key for batch in batches for key in self.texts(batch)}

    def remove(self, batch: Batch) -> None:
        """Forget a batch."""
        self.storage.delete(self._path(batch))
        self.storage.delete(self._texts_path(batch))

    def _read(self, path: str) -> Batch | None:
        body = self.storage.get(path)
        if body is None:
            return None
        with suppress(ValidationError):
            return Batch.model_validate_json(body)
        raise StorageError(f"{self.storage.url}/{path}: damaged; delete it if no batch of that name is at the provider")

    def _path(self, batch: Batch) -> str:
        return f"{self._prefix}{batch.batch}.json"

    def _texts_path(self, batch: Batch) -> str:
        return f"{self._prefix}{batch.batch}.parquet"
