"""The cache: one small JSON record per text, which is the only record that the text is done.

A record lies at `cache/<spec_id>/<key[:2]>/tag_<key>.json` and never holds the text.
"""

import gc
import json
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from tagger.dataset import is_name
from tagger.exceptions import InputError, StorageError, Unreachable
from tagger.keys import Keys
from tagger.storage import Storage

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECORD_VERSION = 1

SMALLEST_RECORD = 100
"""Bytes. No valid record is smaller: a listed size below it is a truncated object and counts as missing."""

STAND_IN_MODEL = "offline-stand-in"
"""The model that the offline stand-in of the demo answers as. It is no LLM: no other spec accepts its records."""

PATIENCE_SECONDS = 60.0
"""How long S3 may be away in the middle of the tag step, beyond the tries of a single request."""

_THREADS = 16

_DELETIONS = 4
"""Requests to delete at once: each deletes up to 1,000 objects, which takes S3 servers on one machine seconds."""

_PARTS = "0123456789abcdef"
"""First digits of the keys: a listing is made in these parts, at once."""


def _checked_name(value: str) -> str:
    if not is_name(value):
        raise ValueError("a printable name")
    return value


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("a time between the years 1 and 9999") from None


Name = Annotated[str, AfterValidator(_checked_name)]
Time = Annotated[AwareDatetime, AfterValidator(_in_utc)]


class Usage(BaseModel):
    """Tokens of one or more calls. `cached_input` is the part of `input` that the endpoint had cached."""

    model_config = ConfigDict(frozen=True)

    input: int = Field(default=0, ge=0, lt=2**63)
    cached_input: int = Field(default=0, ge=0, lt=2**63)
    output: int = Field(default=0, ge=0, lt=2**63)

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            input=self.input + other.input,
            cached_input=self.cached_input + other.cached_input,
            output=self.output + other.output,
        )


class Chars(BaseModel):
    """A text's length by script: Japanese has about one token a character, English one in four."""

    model_config = ConfigDict(frozen=True)

    narrow: int = Field(default=0, ge=0)
    wide: int = Field(default=0, ge=0)
    """Characters that take three bytes in UTF-8; those that take two are half of each kind."""

    @classmethod
    def of(cls, text: str) -> "Chars":
        """Return the length of a text."""
        wide = min((len(text.encode(errors="replace")) - len(text)) // 2, len(text))
        return cls(narrow=len(text) - wide, wide=wide)

    @property
    def tokens(self) -> int:
        """About how many tokens they are."""
        return self.wide + self.narrow // 4


class Record(BaseModel):
    """One text's answer. `usage` and `cost_usd` cover all calls that led to it; a cost of None is unknown."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    version: int = RECORD_VERSION
    status: Literal["tagged", "refused"]
    reason: Name | None = None
    tags: list[str]
    confidence: list[Annotated[float, Field(ge=0, le=1)]] | None = None
    """How sure the LLM says it is of each tag, from 0 to 1; None where it was not asked (`confidence` of the spec)."""
    model: Name
    usage: Usage
    cost_usd: float | None = Field(ge=0)
    finish_reason: Name
    asked: Literal["online", "batch", "together"] = "online"
    chars: Chars | None = None
    """Length of the text; None in records of before it was kept."""
    created_at: Time

    def to_bytes(self) -> bytes:
        """Return the object's body."""
        return self.model_dump_json().encode()


class Extent(NamedTuple):
    """How much a spec's part of the cache holds."""

    records: int = 0
    bytes: int = 0
    newest: datetime | None = None
    """When the newest record was written, by the clock of S3."""


class DamagedRecord(Exception):
    """An object in the cache is no record."""


def parse_record(body: bytes, model: str, tags: Collection[str] | None = None) -> Record:
    """Return the record in an object's body, for a spec that names `model` and, where they are known, these tags.

    Raises:
        DamagedRecord: it is truncated or something else, was answered by the offline stand-in for a real model, or
            holds a tag twice, or one that its spec has not.
        InputError: it was written by a newer version of tagger.
    """
    try:
        fields = json.loads(body)
        version = fields["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedRecord from None
    if not isinstance(version, int):
        raise DamagedRecord
    if version > RECORD_VERSION:
        raise InputError(
            f"the cache holds records of version {version}, this tagger reads up to {RECORD_VERSION}: upgrade it"
        )
    try:
        record = Record.model_validate(fields)
    except ValidationError:
        raise DamagedRecord from None
    if record.model == STAND_IN_MODEL != model:
        raise DamagedRecord
    if len(set(record.tags)) < len(record.tags) or (tags is not None and not set(record.tags) <= set(tags)):
        raise DamagedRecord
    return record


def patiently(request: Callable[[], T]) -> T:
    """Make a request of S3 again while it fails, for `PATIENCE_SECONDS`: an answer that waits is paid for."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return request()
        except (Unreachable, StorageError):
            if time.monotonic() > until:
                raise
            time.sleep(random.uniform(0.5, 1.5))


class Cache:
    """The records of one spec. Its methods may be called from many threads.

    `complete` answers from memory; the others ask S3.
    """

    def __init__(self, storage: Storage, spec: str, model: str, tags: Collection[str] | None = None) -> None:
        """Describe them; `model` and `tags` are the spec's, and no record may say otherwise."""
        self.spec = spec
        self._storage = storage
        self._model = model
        self.tags = None if tags is None else frozenset(tags)
        """Ids of the spec's tags; None where they are not known."""
        self._prefix = f"cache/{spec}/"
        self._complete: set[str] = set()

    def path(self, key: str) -> str:
        """Return the path of a key's object below the storage."""
        return f"{self._prefix}{key[:2]}/tag_{key}.json"

    def complete(self, key: str) -> bool:
        """Return whether `read` or `write` saw a record for the key; no request is made."""
        return key in self._complete

    def assume(self, keys: Iterable[str]) -> None:
        """Take it that these keys have a record."""
        self._complete.update(keys)

    def find(self, keys: Iterable[str], *, listing: bool = True) -> set[str]:
        """Return which of the keys have a record; without `listing`, by one request for each."""
        wanted = Keys.of(keys)
        return set(wanted - self.missing(wanted, listing=listing))

    def missing(self, keys: Keys, *, listing: bool = True) -> Keys:
        """Return which of the keys have no record, with as few requests as that takes."""
        with ThreadPoolExecutor(_THREADS) as threads:
            if listing and self._is_listing_cheaper(len(keys)):
                gc.disable()  # the parsers' objects set it off, and it goes through all others: 3/4 of the time
                try:
                    there = Keys(*threads.map(lambda part: (Keys.of(self._listed(part)) & keys).digests, _PARTS))
                finally:
                    gc.enable()
            else:
                ordered = list(keys)
                found = zip(ordered, threads.map(self.exists, ordered), strict=True)
                there = Keys.of(key for key, is_there in found if is_there)
        return keys - there

    def _is_listing_cheaper(self, keys: int) -> bool:
        """Return whether listing the spec's prefix takes fewer requests than asking for each of so many keys.

        A listing takes one for each part and each 1,000 records. How many records there are is estimated from one of
        the 256 second-level prefixes, for keys are hashes; it is read no further than the answer needs.
        """
        too_many = (keys - len(_PARTS)) * 1000 // 256
        if too_many <= 0:
            return False
        return sum(1 for _ in islice(self._storage.list(f"{self._prefix}00/"), too_many)) < too_many

    def _listed(self, part: str) -> Iterator[str]:
        for path, size in self._storage.list(f"{self._prefix}{part}"):
            if size >= SMALLEST_RECORD and path.endswith(".json"):
                yield path[-37:-5]

    def exists(self, key: str) -> bool:
        """Ask S3 whether a key has a record."""
        size = self._storage.size(self.path(key))
        return size is not None and size >= SMALLEST_RECORD

    def read(self, key: str) -> Record | None:
        """Return a key's record, or None where there is none.

        A damaged one is deleted and warned about, so that the next run tags its text again.

        Raises:
            InputError: the record is of a newer version.
        """
        body = self._storage.get(self.path(key))
        if body is None:
            return None
        try:
            record = parse_record(body, self._model, self.tags)
        except DamagedRecord:
            logger.warning("damaged cache record deleted: %s", self.path(key))
            self.remove(key)
            return None
        self._complete.add(key)
        return record

    def read_many(self, keys: Iterable[str]) -> dict[str, Record]:
        """Return the records of those keys that have one."""
        ordered = list(keys)
        with ThreadPoolExecutor(_THREADS) as threads:
            records = threads.map(self.read, ordered)
            return {key: record for key, record in zip(ordered, records, strict=True) if record is not None}

    def write(self, key: str, record: Record) -> None:
        """Write a key's record, once and whole."""
        self._storage.put(self.path(key), record.to_bytes())
        self._complete.add(key)

    def remove(self, key: str) -> None:
        """Delete a key's record: its text is paid for again."""
        self._storage.delete(self.path(key))
        self._complete.discard(key)

    def extent(self) -> Extent:
        """Return how much there is, in bounded memory; 1,000 records a request."""
        with ThreadPoolExecutor(_THREADS) as threads:
            parts = list(threads.map(self._extent, _PARTS))
        return Extent(
            records=sum(part.records for part in parts),
            bytes=sum(part.bytes for part in parts),
            newest=max((part.newest for part in parts if part.newest is not None), default=None),
        )

    def _extent(self, part: str) -> Extent:
        records, size, newest = Extent()
        for version in self._storage.list_versions(f"{self._prefix}{part}"):
            if version.size >= SMALLEST_RECORD:
                records += 1
            size += version.size
            newest = max(version.written_at, newest or version.written_at)
        return Extent(records, size, newest)

    def clear(self) -> None:
        """Delete all records: their texts are paid for again. Killed half way, it can be done again."""
        with ThreadPoolExecutor(_DELETIONS) as threads:
            list(threads.map(lambda part: self._delete(f"{self._prefix}{part}"), _PARTS))
        self._delete(self._prefix)  # what else lies there
        self._complete.clear()

    def _delete(self, prefix: str) -> None:
        self._storage.delete_many(path for path, _ in self._storage.list(prefix))

    def sample(self, most: int) -> list[Record]:
        """Return up to `most` records of this spec, drawn at random: a listing goes by hashes."""
        paths = (path for path, size in self._storage.list(self._prefix) if size >= SMALLEST_RECORD)
        return list(self.read_many(path[-37:-5] for path in islice(paths, most)).values())

    def mean_cost(self, sample: int = 20) -> float | None:
        """Return the mean cost of a record of this spec in USD, from `sample` records; None where it is unknown."""
        costs = [record.cost_usd for record in self.sample(sample) if record.cost_usd is not None]
        return sum(costs) / len(costs) if costs else None
