"""Retention: what is past its age in `snapshots/` and `runs/` is deleted. The cache is not: its age means nothing.

A run is as old as the newest thing that it wrote. Past `retention.snapshots` its texts go; past `retention.runs` all of
it goes but `summary.json` and what its attempts spent (`tagger.spend`), so that history, the month's budget and drift
know it for good. A deletion may end half way. What is left goes the next time: until then the run has no snapshot, its
money counts once, and it looks no younger than it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tagger.dataset import Dataset, Retention, in_days
from tagger.exceptions import StorageError
from tagger.runs import utc_now
from tagger.spend import RunFiles
from tagger.storage import Storage, Version
from tagger.stored_runs import REWRITTEN, Held, StoredRun, as_written, stored_runs


@dataclass
class Overdue:
    """What of a dataset is past its retention."""

    snapshots: list[StoredRun] = field(default_factory=list)
    """Runs whose texts are to go."""
    runs: list[StoredRun] = field(default_factory=list)
    """Runs of which all is to go that is not kept for good."""
    active: list[str] = field(default_factory=list)
    """Ids of runs that are left alone, for they may be at work: a batch of theirs is not collected."""


@dataclass
class Amount:
    """Objects of some runs."""

    runs: int = 0
    objects: int = 0
    bytes: int = 0

    def add(self, *held: Held) -> None:
        """Count a run's objects, if there are any."""
        objects = sum(each.objects for each in held)
        self.runs += objects > 0
        self.objects += objects
        self.bytes += sum(each.bytes for each in held)

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.runs + other.runs, self.objects + other.objects, self.bytes + other.bytes)

    def __str__(self) -> str:
        """Return "12 objects of 3 runs, 1.2 MB"."""
        return f"{_number(self.objects, 'object')} of {_number(self.runs, 'run')}, {size(self.bytes)}"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """Return a number of bytes to read."""
    if count < 1e5:
        return f"{count:,} bytes"
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def describe(retention: Retention) -> str:
    """Return how long things are kept, in words."""
    texts, files = retention.snapshots or retention.runs, retention.runs
    kept_texts, kept_files = (f"for {in_days(age)}" if age else "for ever" for age in (texts, files))
    return f"snapshots, which hold texts, are kept {kept_texts}, runs {kept_files}"


def find_overdue(storage: Storage, dataset: Dataset, *, but_run: str | None = None) -> Overdue:
    """Return what of a dataset is past its retention; `but_run` is the id of a run to leave alone.

    Raises:
        StorageError: the file of a batch is damaged.
    """
    found, kept, now = Overdue(), dataset.retention, utc_now()
    if kept.snapshots is None and kept.runs is None:
        return found
    for stored in stored_runs(storage, dataset.dataset):
        if stored.written_at is None or stored.run.run_id == but_run:
            continue
        age = now - stored.written_at
        is_old = kept.runs is not None and age > kept.runs and stored.texts.objects + stored.files.objects > 0
        has_old_texts = kept.snapshots is not None and age > kept.snapshots and stored.texts.objects > 0
        if not is_old and not has_old_texts:
            continue
        if stored.is_active:
            found.active.append(stored.run.run_id)
        else:
            (found.runs if is_old else found.snapshots).append(stored)
    return found


def amounts(overdue: Overdue) -> tuple[Amount, Amount]:
    """Return how much is to go: of the `snapshots`, and of the `runs`."""
    snapshots, runs = Amount(), Amount()
    for stored in overdue.snapshots:
        snapshots.add(stored.texts)
    for stored in overdue.runs:
        runs.add(stored.texts, stored.files)
    return snapshots, runs


def clean(overdue: Overdue) -> tuple[Amount, list[str]]:
    """Delete what is overdue; return what was deleted, and why something was not.

    Runs that were taken up again since they were listed are left alone.

    Raises:
        InputError: S3 does not answer, or denies access.
    """
    deleted, problems = Amount(), list[str]()
    for stored, wholly in [(each, False) for each in overdue.snapshots] + [(each, True) for each in overdue.runs]:
        gone = Held()
        try:
            _clean(stored, wholly, gone)
        except StorageError as e:
            problems.append(str(e))
        deleted.add(gone)
    return deleted, problems


def _clean(stored: StoredRun, wholly: bool, gone: Held) -> None:
    run = stored.run
    versions = as_written(run, [v for prefix in (run.texts, run.files) for v in run.storage.list_versions(prefix)])
    texts, files = ([v for v in versions if v.path.startswith(prefix)] for prefix in (run.texts, run.files))
    books = RunFiles(run)
    for version in files:
        books.add(version)
    written = (version.written_at for version in (*texts, *files) if version not in books.cleaned.values())
    if max(written, default=None) != stored.written_at:
        return
    run.forget("snapshot.json")  # first: without it the others are no snapshot
    _delete(run.storage, texts, gone)
    if wholly and books.keep():
        for_good = (books.summary, *books.cleaned.values())
        old = [version for version in files if version not in for_good]
        last = [version for version in old if version.path.endswith(f"/{REWRITTEN}")]  # it tells how old the others are
        _delete(run.storage, [version for version in old if version not in last], gone)
        _delete(run.storage, last, gone)


def _delete(storage: Storage, versions: list[Version], gone: Held) -> None:
    storage.delete_many(version.path for version in versions)
    for version in versions:
        gone.add(version)
