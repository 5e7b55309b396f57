"""The tree: one text is one gokart task, and its output in S3 is the record that the text is done.

TagTexts                   one shard of new texts
└── TagWithLLM ...         one text each; output: <storage>/cache/<spec_id>/<key[:2]>/tag_<key>.json
"""

from datetime import datetime
from typing import Any, Protocol

import gokart
import luigi
from gokart.conflict_prevention_lock.task_lock import TaskLockParams, make_task_lock_params
from gokart.target import TargetOnKart
from gokart.utils import FlattenableItems
from luigi.parameter import ParameterVisibility

from tagger.cache import Cache, Record


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
        self._cache.write(self._key, obj)

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


class Asker(Protocol):
    """What the tasks of a shard share: the cache, and the way to ask."""

    cache: Cache

    def ask(self, key: str, text: str) -> Record:
        """Ask the LLM for a text's tags."""
        ...

    def done(self, key: str, record: Record) -> None:
        """Note that a text's record is written."""
        ...

    def failed(self, key: str, error: BaseException) -> None:
        """Note that a text's task failed."""
        ...


class TagWithLLM(gokart.TaskOnKart[Record]):
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

    def run(self) -> None:
        """Ask and write the answer."""
        record = self.asker.ask(self.key, self.text)
        self.dump(record)
        self.asker.done(self.key, record)

    def on_failure(self, exception: BaseException) -> str:
        """Note the failure; return what luigi keeps of it, which is not the traceback."""
        self.asker.failed(self.key, exception)
        return type(exception).__name__


class TagTexts(gokart.TaskOnKart[None]):
    """Tag the new texts of one shard; complete when all of them are."""

    shard: luigi.Parameter[str] = luigi.Parameter()
    texts: luigi.Parameter[Any] = Private()
    """Keys and texts, as a dict."""
    asker: luigi.Parameter[Any] = Private()

    should_dump_supplementary_log_files: luigi.BoolParameter = luigi.BoolParameter(default=False, significant=False)

    def make_unique_id(self) -> str:
        """Return the shard's name."""
        return self.shard

    def requires(self) -> FlattenableItems[gokart.TaskOnKart[Any]]:
        """Return one task per text."""
        return [TagWithLLM(key=key, text=text, asker=self.asker) for key, text in self.texts.items()]

    def output(self) -> FlattenableItems[TargetOnKart]:
        """Return the records of all texts."""
        return [RecordTarget(self.asker.cache, key) for key in self.texts]

    def run(self) -> None:
        """Do nothing: the work is in the texts' tasks."""
