"""The runs of a dataset as a listing of storage shows them: what they hold, how old they are, which may be at work."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from pydantic import AwareDatetime

from tagger.batches import Batch, Batches
from tagger.ledger import read_attempts
from tagger.runs import CLEANED, RUN_ID, File, Run, is_trial, utc_now
from tagger.storage import Storage, Version

SILENCE = timedelta(hours=26)
"""How long a run that is at work may write nothing: a batch takes up to 24 hours."""


REWRITTEN = "rewritten.json"


class Rewritten(File):
    """`rewritten.json`: which objects of a run `tagger forget` wrote again. That makes the run no younger."""

    written_at: AwareDatetime
    """When the run itself last wrote anything."""
    paths: frozenset[str]


@dataclass
class Held:
    """Objects of a run."""

    objects: int = 0
    bytes: int = 0
    newest: datetime | None = None

    def add(self, version: Version) -> None:
        """Count one more."""
        self.objects += 1
        self.bytes += version.size
        self.newest = max(version.written_at, self.newest or version.written_at)


@dataclass
class StoredRun:
    """A run that has files, or a batch that is not collected."""

    run: Run
    texts: Held = field(default_factory=Held)
    """Its snapshot: all that holds texts."""
    files: Held = field(default_factory=Held)
    """Its other files, those aside that are left when it is cleaned: `summary.json` and `cleaned-<n>.json`."""
    summed_up_at: datetime | None = None
    attempted_at: datetime | None = None
    """When an attempt at a shard last wrote."""
    has_batch: bool = False
    """Whether a batch of it is not collected."""

    @property
    def written_at(self) -> datetime | None:
        """When it last wrote anything itself; None where it left nothing."""
        times = (self.texts.newest, self.files.newest, self.summed_up_at)
        return max((time for time in times if time is not None), default=None)

    @property
    def is_active(self) -> bool:
        """Whether it may be at work. Where that takes a look at its attempts, requests are made.

        Raises:
            StorageError: an attempt's file is damaged.
        """
        if self.has_batch:
            return True
        if self.written_at is None or utc_now() - self.written_at > SILENCE:
            return False
        if is_trial(self.run.run_id):  # it is never summed up, and deletes its texts when it ends
            return self.texts.objects > 0
        if self.summed_up_at is None:
            return True
        is_tagged_again = self.attempted_at is not None and self.attempted_at > self.summed_up_at
        return is_tagged_again and any(attempt.state == "running" for attempt in read_attempts(self.run))


def active_runs(storage: Storage, dataset_name: str) -> list[str]:
    """Return the ids of a dataset's runs that may be at work, or have a batch that is not collected.

    Raises:
        StorageError: the file of a batch or of an attempt is damaged.
    """
    return sorted(stored.run.run_id for stored in stored_runs(storage, dataset_name) if stored.is_active)


def stored_runs(storage: Storage, dataset_name: str) -> list[StoredRun]:
    """Return a dataset's runs; 1,000 objects a request, and one request for each batch and each rewritten run.

    Raises:
        StorageError: the file of a batch is damaged.
    """
    found: dict[str, StoredRun] = {}
    objects: dict[str, list[Version]] = {}

    def of(run_id: str) -> StoredRun:
        return found.get(run_id) or found.setdefault(run_id, StoredRun(Run(storage, dataset_name, run_id)))

    for folder in ("runs", "snapshots"):
        prefix = f"{folder}/{dataset_name}/"
        for version in storage.list_versions(prefix):
            run_id, _, name = version.path.removeprefix(prefix).partition("/")
            if name and RUN_ID.fullmatch(run_id):
                objects.setdefault(run_id, []).append(version)
    for run_id, versions in objects.items():
        stored = of(run_id)
        for version in as_written(stored.run, versions):
            name = version.path.rpartition("/")[2]
            if version.path.startswith("snapshots/"):
                stored.texts.add(version)
            elif name == "summary.json":
                stored.summed_up_at = version.written_at
            elif not name.startswith(CLEANED):
                stored.files.add(version)
                if name.startswith("shard-"):
                    stored.attempted_at = max(version.written_at, stored.attempted_at or version.written_at)
    for batch in _unfinished_batches(storage):
        if batch.dataset == dataset_name:
            of(batch.run_id).has_batch = True
    return list(found.values())


def keep_age(stored: StoredRun, paths: Set[str]) -> None:
    """Note which objects of a run are to be written again, so that it looks as old and as quiet as it is."""
    if stored.written_at is not None:
        before = stored.run.read(REWRITTEN, Rewritten)
        paths = frozenset(paths | before.paths if before else paths)
        stored.run.write(REWRITTEN, Rewritten(written_at=stored.written_at, paths=paths))


def as_written(run: Run, versions: list[Version]) -> list[Version]:
    """Return a run's objects with the times at which the run itself wrote them."""
    marker = f"{run.files}{REWRITTEN}"
    if not any(version.path == marker for version in versions):
        return versions
    rewritten = run.read(REWRITTEN, Rewritten)
    if rewritten is None:
        return versions
    paths, latest = {marker, *rewritten.paths}, rewritten.written_at
    return [v._replace(written_at=min(v.written_at, latest)) if v.path in paths else v for v in versions]


def _unfinished_batches(storage: Storage) -> Iterator[Batch]:
    for spec in storage.folders("batches/"):
        yield from Batches(storage, spec).unfinished()
