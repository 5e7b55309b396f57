"""What the runs of a dataset spent. The attempts' files are the only books, whatever became of the runs.

A run's summary counts its attempts, each with the version of the file that it read. Where those are still the files'
versions, it saves to read them: a thousand runs of sixteen shards are a thousand requests.

Before attempts' files are deleted by age (`tagger.clean`), what they spent is kept in `cleaned-<n>.json`, which is
written once and never deleted: each attempt counts once, by its file or by what is kept of it.
"""

import math
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AwareDatetime, Field

from tagger.exceptions import StorageError
from tagger.ledger import Attempt, read_attempts
from tagger.runs import CLEANED, RUN_ID, File, Run
from tagger.storage import Storage, Version

THREADS = 16
"""Runs that are read at once."""

CLOCKS = timedelta(days=1)
"""By how much the clock of a worker may be ahead of that of S3."""

_SUMMED = ("requests", "input_tokens", "cached_input_tokens", "output_tokens", "cost_usd")

_ATTEMPT = re.compile(r"shard-[0-9]+-[0-9]+\.parquet")


class Spend(File):
    """What one attempt used and cost; its failed and repeated calls count too."""

    file: str
    """Name of the attempt's file in the folder of its run."""
    etag: str | None
    """That of the file, listed before it was read; None where it came later."""
    plan_id: str
    asked: Literal["online", "batch"]
    ended_at: AwareDatetime
    """When the attempt ended, or if it was killed, last wrote its file."""
    requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    cost_usd: float | None
    """None where the price is not known."""


class Counted(File):
    """`cleaned-<n>.json`, and the part of `summary.json` that tells what attempts it counts."""

    attempts: list[Spend] = Field(default_factory=list)


def total_usd(amounts: Iterable[float | None]) -> float | None:
    """Return the sum of amounts of money; None where one is not known."""
    known = list(amounts)
    return None if None in known else math.fsum(amount or 0.0 for amount in known)


def spend_of(attempt: Attempt, files: dict[str, Version]) -> Spend:
    """Return what an attempt's file says was used. `files` are the run's attempts as listed before that was read."""
    columns = attempt.file.read(columns=list(_SUMMED))
    totals = {name: pc.sum(columns.column(name), min_count=0).as_py() for name in _SUMMED}
    if columns.column("cost_usd").null_count:
        totals["cost_usd"] = None
    name = f"shard-{attempt.shard}-{attempt.attempt}.parquet"
    return Spend(
        file=name,
        etag=files[name].etag or None if name in files else None,
        plan_id=attempt.plan_id,
        asked=attempt.asked,
        ended_at=attempt.ended_at,
        **totals,
    )


@dataclass
class RunFiles:
    """A run that has a summary or an attempt, as a listing shows it."""

    run: Run
    attempts: dict[str, Version] = field(default_factory=dict)
    """The attempts' files by name."""
    summary: Version | None = None
    """`summary.json`."""
    cleaned: dict[str, Version] = field(default_factory=dict)
    """`cleaned-<n>.json` by name."""

    @property
    def versions(self) -> list[Version]:
        """Return all of them."""
        return [*self.attempts.values(), *([self.summary] if self.summary else []), *self.cleaned.values()]

    def add(self, version: Version) -> bool:
        """Add a file of the run; return whether it is one of these."""
        name = version.path.removeprefix(self.run.files)
        if _ATTEMPT.fullmatch(name):
            self.attempts[name] = version
        elif name == "summary.json":
            self.summary = version
        elif name.startswith(CLEANED):
            self.cleaned[name] = version
        else:
            return False
        return True

    def spends(self, counted: list[Spend]) -> list[Spend]:
        """Return what each attempt spent: as the run's summary counts them if none changed since, else by their files.

        Raises:
            StorageError: a file is damaged.
        """
        kept = self._kept()
        return [*kept, *_others(self._read(kept, counted), kept)]

    def counted(self) -> list[Spend]:
        """Return what the run's summary counts.

        Raises:
            StorageError: it is damaged.
        """
        summary = self.run.read("summary.json", Counted) if self.summary else None
        return summary.attempts if summary else []

    def keep(self) -> bool:
        """Write down what the attempts spent, so that their files may be deleted; return whether that is done.

        It is not where a file changes meanwhile, or another process does the same.

        Raises:
            StorageError: a file is damaged.
        """
        kept = self._kept()
        found = self._read(kept, self.counted())
        if {spend.file: spend.etag for spend in found} != _etags(self._but(kept)):
            return False
        spent = Counted(attempts=_others(found, kept))
        path = f"{self.run.files}{CLEANED}{len(self.cleaned) + 1}.json"
        return not spent.attempts or self.run.storage.create(path, spent.model_dump_json(indent=2).encode())

    def _kept(self) -> list[Spend]:
        found = (self.run.read(name, Counted) for name in self.cleaned)
        return [spend for counted in found if counted is not None for spend in counted.attempts]

    def _but(self, kept: list[Spend]) -> dict[str, Version]:
        """Return the attempts' files but those that are kept as they stand."""
        known = {(spend.file, spend.etag) for spend in kept}
        return {name: version for name, version in self.attempts.items() if (name, version.etag or None) not in known}

    def _read(self, kept: list[Spend], counted: list[Spend]) -> list[Spend]:
        """Return what the other attempts spent."""
        left, known = self._but(kept), {(spend.file, spend.etag) for spend in kept}
        counted = [spend for spend in counted if (spend.file, spend.etag) not in known]
        if {spend.file: spend.etag for spend in counted} == _etags(left):
            return counted
        try:
            found = [spend_of(attempt, self.attempts) for attempt in read_attempts(self.run)]
            return [spend for spend in found if spend.file in left or spend.file not in self.attempts]
        except (pa.ArrowException, TypeError, ValueError):
            where = f"{self.run.storage.url}/{self.run.files}"
            raise StorageError(
                f"{where}: a shard's file has times or figures that cannot be; delete it to go on without its counts"
            ) from None

    def spends_unread(self, counted: list[Spend]) -> list[Spend]:
        """Return what each attempt spent as far as the run's summary counts it; what others did is not known."""
        by_file = {spend.file: spend for spend in counted}
        files = self.attempts | self.cleaned
        return [by_file.get(name) or _unknown(name, version) for name, version in files.items()]


def _etags(files: dict[str, Version]) -> dict[str, str]:
    return {name: version.etag for name, version in files.items()}


def _others(spends: list[Spend], kept: list[Spend]) -> list[Spend]:
    """Return the spends of attempts that are not kept, also where a file was written again with the same attempt."""
    known = {(spend.file, spend.ended_at) for spend in kept}
    return [spend for spend in spends if (spend.file, spend.ended_at) not in known]


def _spends(files: RunFiles) -> list[Spend]:
    return files.spends(files.counted())


def _unknown(file: str, version: Version) -> Spend:
    return Spend(
        file=file,
        etag=None,
        plan_id="",
        asked="online",
        ended_at=version.written_at,
        requests=0,
        input_tokens=0,
        cached_input_tokens=0,
        output_tokens=0,
        cost_usd=None,
    )


def list_attempts(run: Run) -> dict[str, Version]:
    """Return the files of a run's attempts by name."""
    return {
        version.path.removeprefix(run.files): version for version in run.storage.list_versions(f"{run.files}shard-")
    }


def list_runs(storage: Storage, dataset_name: str) -> list[RunFiles]:
    """Return a dataset's runs; 1,000 files a request."""
    prefix = f"runs/{dataset_name}/"
    runs: dict[str, RunFiles] = {}
    for version in storage.list_versions(prefix):
        run_id = version.path.removeprefix(prefix).partition("/")[0]
        if RUN_ID.fullmatch(run_id):
            files = runs.get(run_id) or RunFiles(Run(storage, dataset_name, run_id))
            if files.add(version):
                runs[run_id] = files
    return list(runs.values())


def spent_usd(
    storage: Storage, dataset_name: str, start: datetime, end: datetime, *, but_run: str | None = None
) -> float:
    """Return what the attempts of all runs of a dataset spent that ended, or last wrote, in [`start`, `end`).

    Attempts whose price was not known count as nothing. `but_run` is a run id to leave out. Runs that were last written
    before `start` are not read.

    Raises:
        StorageError: an attempt's file is damaged.
    """

    def may_matter(files: RunFiles) -> bool:
        books = [*files.attempts.values(), *files.cleaned.values()]
        latest = max((version.written_at for version in books), default=None)
        return files.run.run_id != but_run and latest is not None and latest >= start - CLOCKS

    with ThreadPoolExecutor(THREADS) as threads:
        found = chain.from_iterable(threads.map(_spends, filter(may_matter, list_runs(storage, dataset_name))))
        return math.fsum(spend.cost_usd or 0.0 for spend in found if start <= spend.ended_at < end)
