"""The tree: what its tasks are known by, when they are complete, and what the task of one text does."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from gokart.conflict_prevention_lock.task_lock import make_task_lock_params_for_run
from hypothesis import given
from hypothesis import strategies as st

from tagger.cache import Record, Usage
from tagger.tasks import Private, RecordTarget, TagTexts, TagWave, TagWithLLM

KEYS = [f"{number:032x}" for number in range(6)]
TEXT = "klopstockwurst"
RECORD = Record(
    status="tagged",
    tags=["fruit"],
    model="model",
    usage=Usage(),
    cost_usd=None,
    finish_reason="stop",
    created_at=datetime(2026, 1, 2, tzinfo=UTC),
)


class NotedCache:
    """A cache that notes its requests to S3."""

    def __init__(self, *keys: str) -> None:
        self.records: dict[str, Any] = dict.fromkeys(keys, RECORD)
        self.requests: list[str] = []

    def path(self, key: str) -> str:
        return f"cache/spec/{key[:2]}/tag_{key}.json"

    def complete(self, key: str) -> bool:
        return key in self.records

    def read(self, key: str) -> Record | None:
        self.requests.append("GET")
        return self.records.get(key)

    def write(self, key: str, record: Record) -> None:
        self.requests.append("PUT")
        self.records[key] = record

    def remove(self, key: str) -> None:
        self.requests.append("DELETE")
        del self.records[key]


class NotedAsker:
    """What a shard's tasks share; notes what they do with it."""

    def __init__(self, cache: NotedCache, *, there: Record | None = None, **lock: Any) -> None:
        self.cache: Any = cache
        self.lock: Mapping[str, Any] = lock
        self.told: list[Any] = []
        self._there = there

    def found(self, key: str) -> Record | None:
        self.told.append("found?")
        return self._there

    def ask(self, key: str, text: str) -> Record:
        self.told.append(("ask", text))
        return RECORD

    @contextmanager
    def writing(self) -> Iterator[None]:
        self.told.append("writing")
        yield
        self.told.append("written")

    def done(self, key: str, record: Record) -> None:
        self.told.append(("done", key, record))

    def failed(self, key: str, error: BaseException) -> None:
        self.told.append(("failed", key, error))


class TwoWaves:
    """Six texts in two waves."""

    waves = 2

    def __init__(self, cache: NotedCache) -> None:
        self.read: list[str] = []
        self._cache = cache

    def keys(self, wave: int) -> Iterable[str]:
        self.read.append(f"keys {wave}")
        return KEYS[3 * wave : 3 * wave + 3]

    def unanswered(self, wave: int) -> Mapping[str, str]:
        self.read.append(f"texts {wave}")
        return {key: TEXT for key in KEYS[3 * wave : 3 * wave + 3] if not self._cache.complete(key)}


def tree(*answered: str, **lock: Any) -> tuple[Any, NotedAsker, TwoWaves]:
    cache = NotedCache(*answered)
    asker, texts = NotedAsker(cache, **lock), TwoWaves(cache)
    return TagTexts(shard="shard-1-of-2", texts=texts, asker=asker), asker, texts


def text_task(asker: NotedAsker, key: str = KEYS[0]) -> Any:
    return TagWithLLM(key=key, text=TEXT, asker=asker, **asker.lock)


LOCK: dict[str, Any] = {"should_lock_run": True, "redis_host": "redis_default", "redis_port": 0, "redis_timeout": 50}


# A text's record


def test_a_record_is_there_without_a_request() -> None:
    cache: Any = NotedCache(KEYS[0])

    assert [RecordTarget(cache, key).exists() for key in KEYS[:2]] == [True, False]
    assert cache.requests == []


def test_a_record_is_written_with_one_put_and_read_with_one_get() -> None:
    cache: Any = NotedCache()
    target = RecordTarget(cache, KEYS[0])

    target.dump(RECORD)
    assert cache.requests == ["PUT"]
    assert target.load() == RECORD
    assert cache.requests == ["PUT", "GET"]


def test_a_record_can_be_removed_and_its_time_be_read() -> None:
    cache: Any = NotedCache(KEYS[0])
    target = RecordTarget(cache, KEYS[0])

    assert target.last_modification_time() == RECORD.created_at
    target.remove()
    assert not target.exists()
    with pytest.raises(FileNotFoundError, match=KEYS[0]):
        target.last_modification_time()


def test_a_record_lies_where_its_key_says() -> None:
    task = text_task(NotedAsker(NotedCache()))

    assert task.output().path() == f"cache/spec/00/tag_{KEYS[0]}.json"


# What tasks are known by


@given(text=st.text(st.characters(exclude_categories=())))
def test_a_private_parameter_shows_nothing(text: str) -> None:
    parameter = Private()

    assert parameter.serialize(text) == ""
    assert parameter.significant is False


@pytest.mark.parametrize("lock", [{}, LOCK], ids=["no lock", "lock"])
def test_ids_are_ours_and_no_hash_of_gokart(lock: dict[str, Any]) -> None:
    root, asker, _ = tree(**lock)
    wave = root.requires()[1]

    assert root.make_unique_id() == "shard-1-of-2"
    assert wave.make_unique_id() == "1"
    assert text_task(asker).make_unique_id() == KEYS[0]


def test_the_lock_of_a_text_is_named_by_its_key() -> None:
    """So that all runs of a spec, and all versions of gokart, mean the same lock."""
    task = text_task(NotedAsker(NotedCache(), **LOCK))

    assert make_task_lock_params_for_run(task).redis_key == f"TagWithLLM_{KEYS[0]}-run"


# Requirements and completeness


def test_the_root_needs_its_waves_and_reads_no_text_for_it() -> None:
    root, _, texts = tree()

    assert [(type(wave), wave.number) for wave in root.requires()] == [(TagWave, 0), (TagWave, 1)]
    assert texts.read == []


def test_a_wave_needs_the_texts_without_a_record() -> None:
    root, _, texts = tree(KEYS[1], KEYS[3])

    needed = [[task.key for task in wave.requires()] for wave in root.requires()]

    assert needed == [[KEYS[0], KEYS[2]], [KEYS[4], KEYS[5]]]
    assert texts.read == ["texts 0", "texts 1"]


def test_the_texts_of_a_wave_are_locked_where_there_is_a_lock() -> None:
    settings: list[dict[str, Any]] = [LOCK, {}, LOCK]
    for lock in settings:
        root, _, _ = tree(**lock)
        tasks = root.requires()[0].requires()

        assert {task.should_lock_run for task in tasks} == {bool(lock)}
        assert {task.redis_host for task in tasks} == {lock.get("redis_host")}


@pytest.mark.parametrize("answered", [[], KEYS[:2], KEYS[:3], KEYS[1:], KEYS], ids=len)
def test_waves_and_root_are_complete_when_all_texts_have_a_record(answered: list[str]) -> None:
    root, asker, texts = tree(*answered)

    waves = [wave.complete() for wave in root.requires()]

    assert waves == [set(KEYS[:3]) <= set(answered), set(KEYS[3:]) <= set(answered)]
    assert root.complete() is all(waves)
    assert not [read for read in texts.read if read.startswith("texts")]
    assert asker.cache.requests == []


# The task of a text


def test_a_text_is_asked_and_its_answer_written_and_told() -> None:
    asker = NotedAsker(NotedCache())

    text_task(asker).run()

    assert asker.told == ["found?", ("ask", TEXT), "writing", "written", ("done", KEYS[0], RECORD)]
    assert asker.cache.requests == ["PUT"]


def test_a_text_that_somebody_else_answered_is_not_asked() -> None:
    asker = NotedAsker(NotedCache(), there=RECORD)

    text_task(asker).run()

    assert asker.told == ["found?", ("done", KEYS[0], RECORD)]
    assert asker.cache.requests == []


def test_a_text_that_has_a_record_is_not_run() -> None:
    asker = NotedAsker(NotedCache(KEYS[0]))

    text_task(asker).run()

    assert asker.told == []


def test_a_failure_is_told_and_luigi_keeps_its_name_alone() -> None:
    asker = NotedAsker(NotedCache())
    error = ValueError(TEXT)

    assert text_task(asker).on_failure(error) == "ValueError"
    assert asker.told == [("failed", KEYS[0], error)]
