"""The specs whose records lie in a storage: what each holds, what it cost, who uses it; and their removal.

A spec's records are paid for, and serve every dataset that has this spec, now or again. So none goes by its age, and
one that a dataset file, a run at work or a batch uses is not removed at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from tagger.batches import Batches
from tagger.cache import STAND_IN_MODEL, Cache, Extent
from tagger.clean import size
from tagger.dataset import Dataset
from tagger.exceptions import InputError
from tagger.price import usd
from tagger.rollup import SummaryFigures, rolled_runs
from tagger.runs import Run
from tagger.spec import spec_id
from tagger.storage import Storage
from tagger.stored_runs import active_runs


@dataclass(frozen=True)
class StoredSpec:
    """One spec's records."""

    spec: str
    extent: Extent
    used_at: datetime | None
    """When the last run with this spec ended, or the newest record was written, whichever is later."""
    used_by: list[str]
    """The datasets whose files have this spec now."""
    spent_usd: float | None
    """By the runs that had all records answered; None where their summaries do not tell of all."""
    repeat_usd: float | None
    """What to ask for all again would cost about, like a sample of the records; None where they do not tell."""

    def __str__(self) -> str:
        """Return all of it in a line."""
        used_at = f"{self.used_at:%Y-%m-%d}" if self.used_at else "never"
        users = f"used now by {', '.join(self.used_by)}" if self.used_by else "used by no dataset file"
        told = f"cost {usd(self.spent_usd)}, as its runs say"
        if self.spent_usd is None:
            told = "cost not known" if self.repeat_usd is None else f"cost about {usd(self.repeat_usd)}, by a sample"
        return (
            f"spec {self.spec}: {self.extent.records:,} records, {size(self.extent.bytes)}, last used {used_at}, "
            f"{users}, {told}"
        )


def stored_specs(storage: Storage, datasets: Iterable[Dataset], only: Sequence[str] = ()) -> list[StoredSpec]:
    """Return the specs that have records, or `only` some of them; that used last comes last.

    `datasets` are those of the folder. 1,000 records a request, in bounded memory.

    Raises:
        InputError: one of those named has no record; a record is of a newer version.
        StorageError: S3 failed.
    """
    files = [dataset for dataset in datasets if dataset.storage.rstrip("/") == storage.url]
    runs = [
        run.summary
        for name in storage.folders("runs/")
        for run in rolled_runs(storage, name)
        if run.summary is not None and not run.summary.dry_run
    ]
    found = [
        _stored_spec(
            Cache(storage, spec, STAND_IN_MODEL),
            [run for run in runs if run.spec_id == spec],
            [dataset.dataset for dataset in files if spec_id(dataset) == spec],
        )
        for spec in (only or storage.folders("cache/"))  # some S3 servers list folders that are empty by now
    ]
    if unknown := [spec.spec for spec in found if only and not spec.extent.bytes]:
        raise InputError(f"{storage.url}: no spec `{unknown[0]}`; `tagger clean DATASET --spec` lists those it has")
    return sorted(
        (spec for spec in found if spec.extent.bytes),
        key=lambda spec: (spec.used_at is not None and spec.used_at.timestamp(), spec.spec),
    )


def _stored_spec(cache: Cache, runs: list[SummaryFigures], used_by: list[str]) -> StoredSpec:
    extent, mean_cost = cache.extent(), cache.mean_cost()
    times = [run.finished_at for run in runs] + ([extent.newest] if extent.newest else [])
    answered, costs = sum(run.answered or 0 for run in runs), [run.cost_usd for run in runs]
    knows_all = answered >= extent.records and None not in costs
    return StoredSpec(
        spec=cache.spec,
        extent=extent,
        used_at=max(times, default=None),
        used_by=used_by,
        spent_usd=math.fsum(cost or 0.0 for cost in costs) if knows_all else None,
        repeat_usd=None if mean_cost is None else mean_cost * extent.records,
    )


def check_removable(storage: Storage, specs: Iterable[StoredSpec]) -> None:
    """Check that nothing uses the specs.

    Raises:
        InputError: a dataset file, a run that may be at work, or a batch does; or what a run at work uses is not known.
    """
    at_work = {
        spec_id(Run(storage, name, run_id).dataset()): f"run `{run_id}` of `{name}`, which may be at work"
        for name in sorted({*storage.folders("runs/"), *storage.folders("snapshots/")})
        for run_id in active_runs(storage, name)
    }
    for spec in specs:
        if spec.used_by:
            raise InputError(
                f"spec `{spec.spec}` is that of {', '.join(spec.used_by)}: its records are in use. To have all tagged "
                "again, raise `revision`"
            )
        if spec.spec in at_work:
            raise InputError(f"spec `{spec.spec}` is that of {at_work[spec.spec]}")
        if unfinished := Batches(storage, spec.spec).unfinished():
            raise InputError(f"spec `{spec.spec}`: {len(unfinished)} batches of it are not collected yet")


def remove(storage: Storage, spec: StoredSpec) -> None:
    """Delete a spec's records and what is remembered of its batches. Killed half way, it can be done again."""
    storage.delete_many([path for path, _ in storage.list(f"batches/{spec.spec}/")])
    Cache(storage, spec.spec, STAND_IN_MODEL).clear()
