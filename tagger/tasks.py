"""The tree: one text is one gokart task, and its output in S3 is the record that the text is done.

TagTexts                   one shard of new texts
└── TagWave ...            a few hundred of them, laid out when their turn comes
    └── TagWithLLM ...     one text each; output: <storage>/cache/<spec_id>/<key[:2]>/tag_<key>.json
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Protocol

import gokart
import luigi
from gokart.conflict_prevention_lock.task_lock import TaskLockParams, make_task_lock_params
from gokart.target import TargetOnKart
from gokart.utils import FlattenableItems
from luigi.parameter import ParameterVisibility

from tagger.cache import Cache, Record, patiently
from tagger.engine import Leaf, Wave


class Private(luigi.Parameter[Any]):
    """A parameter of any type that shows in no task id, repr, log line or summary."""

    def __init__(self) -> None:
        super().__init__(significant=False, visibility=ParameterVisibility.PRIVATE)

    def serialize(self, x: Any) -> str:
        """Return nothing: the value stays in the process."""
        return ""


class RecordTarget(TargetOnKart):
    """A text's record in the cache: written with one PUT, read with one GET, and asked for without a request."""

    def __init__(self, cache: Cache, key: str) -> None:
        self._cache = cache
        self._key = key

    def _exists(self) -> bool:
        return self._cache.complete(self._key)

    def _load(self) -> Record | None:
        return self._cache.read(self._key)

    def _dump(
        self,
        obj: Record,
        task_params: object = None,
        custom_labels: object = None,
        required_task_outputs: object = None,
    ) -> None:
        patiently(lambda: self._cache.write(self._key, obj))

    def _remove(self) -> None:
        self._cache.remove(self._key)

    def _last_modification_time(self) -> datetime:
        record = self._cache.read(self._key)
        if record is None:
            raise FileNotFoundError(self._path())
        return record.created_at

    def _path(self) -> str:
        return self._cache.path(self._key)

    def _get_task_lock_params(self) -> TaskLockParams:
        return make_task_lock_params(file_path=self._path(), unique_id=None)


class Texts(Protocol):
    """The new texts of a shard, in waves."""

    waves: int

    def keys(self, wave: int) -> Iterable[str]:
        """Return the keys of a wave's texts."""
        ...

    def unanswered(self, wave: int) -> Mapping[str, str]:
        """Return those texts of a wave, by key, that have no record yet."""
        ...


class Asker(Protocol):
    """What the tasks of a shard share: the cache, and the way to ask."""

    cache: Cache
    lock: Mapping[str, Any]
    """gokart's parameters of a run-lock; empty where there is none."""

    def found(self, key: str) -> Record | None:
        """Return the record that somebody else wrote since the plan, if that can be."""
        ...

    def ask(self, key: str, text: str) -> Record:
        """Ask the LLM for a text's tags."""
        ...

    def writing(self) -> AbstractContextManager[None]:
        """Count an answer as not yet written while the block runs."""
        ...

    def done(self, key: str, record: Record) -> None:
        """Note that a text's record is written."""
        ...

    def failed(self, key: str, error: BaseException) -> None:
        """Note that a text's task failed."""
        ...


class TagWithLLM(Leaf[Record]):
    """Tag one text. The key alone identifies the task; the text is nowhere shown."""

    key: luigi.Parameter[str] = luigi.Parameter()
    text: luigi.Parameter[Any] = Private()
    asker: luigi.Parameter[Any] = Private()

    should_dump_supplementary_log_files: luigi.BoolParameter = luigi.BoolParameter(default=False, significant=False)

    def make_unique_id(self) -> str:
        """Return the text's key: ours, and not gokart's hash, so that no upgrade changes it."""
        return self.key

    def output(self) -> RecordTarget:
        """Return the text's record."""
        return RecordTarget(self.asker.cache, self.key)

    def complete(self) -> bool:
        """Return whether the text has a record, without gokart's look at requirements and times."""
        return self.output().exists()

    def run(self) -> None:
        """Ask and write the answer, unless another worker has; gokart's run-lock is held meanwhile, if there is one."""
        record = self.asker.found(self.key)
        if record is None:
            record = self.asker.ask(self.key, self.text)
            with self.asker.writing():
                self.output().dump(record)
        self.asker.done(self.key, record)

    def on_failure(self, exception: BaseException) -> str:
        """Note the failure; return what luigi keeps of it, which is not the traceback."""
        self.asker.failed(self.key, exception)
        return type(exception).__name__


class TagWave(Wave):
    """Tag some of a shard's texts; complete when all of them have a record."""

    number: luigi.IntParameter = luigi.IntParameter()
    texts: luigi.Parameter[Any] = Private()
    asker: luigi.Parameter[Any] = Private()

    should_dump_supplementary_log_files: luigi.BoolParameter = luigi.BoolParameter(default=False, significant=False)

    def make_unique_id(self) -> str:
        """Return the wave's number."""
        return str(self.number)

    def requires(self) -> FlattenableItems[gokart.TaskOnKart[Any]]:
        """Return one task per text that has no record."""
        texts = self.texts.unanswered(self.number)
        return [TagWithLLM(key=key, text=text, asker=self.asker, **self.asker.lock) for key, text in texts.items()]

    def complete(self) -> bool:
        """Return whether all texts have a record."""
        return all(self.asker.cache.complete(key) for key in self.texts.keys(self.number))

    def run(self) -> None:
        """Do nothing: the work is in the texts' tasks."""


class TagTexts(gokart.TaskOnKart[None]):
    """Tag the new texts of one shard; complete when all of its waves are."""

    shard: luigi.Parameter[str] = luigi.Parameter()
    texts: luigi.Parameter[Any] = Private()
    asker: luigi.Parameter[Any] = Private()

    should_dump_supplementary_log_files: luigi.BoolParameter = luigi.BoolParameter(default=False, significant=False)

    def make_unique_id(self) -> str:
        """Return the shard's name."""
        return self.shard

    def _waves(self) -> Iterator["TagWave"]:
        return (TagWave(number=i, texts=self.texts, asker=self.asker) for i in range(self.texts.waves))

    def requires(self) -> FlattenableItems[gokart.TaskOnKart[Any]]:
        """Return one task per wave."""
        return list(self._waves())

    def complete(self) -> bool:
        """Return whether all waves are complete, as luigi's WrapperTask does."""
        return all(wave.complete() for wave in self._waves())

    def run(self) -> None:
        """Do nothing: the work is in the texts' tasks."""
