"""The cache: which texts have an answer, at how many requests, and what a bad record does."""

from __future__ import annotations

import gc
import io
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import count
from typing import Any

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.compat import HTTPHeaders
from hypothesis import given
from hypothesis import strategies as st

from tagger.cache import RECORD_VERSION, SMALLEST_RECORD, Cache, Chars, DamagedRecord, Record, Usage, parse_record
from tagger.connections import Connection
from tagger.exceptions import InputError, StorageError
from tagger.keys import Keys
from tagger.storage import Storage
from tests.databases import watch
from tests.servers import S3Store

SPEC = "0123456789ab"
MODEL = "gpt-5-mini"
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


def key(number: int, prefix: str = "") -> str:
    """Returns one of the keys that begin with `prefix`."""
    return (prefix + f"{number:032x}"[::-1])[:32]


def record(**fields: Any) -> Record:
    defaults: dict[str, Any] = {
        "status": "tagged",
        "tags": ["cardiology"],
        "model": MODEL,
        "usage": Usage(input=100, cached_input=50, output=7),
        "cost_usd": 0.001,
        "finish_reason": "stop",
        "created_at": NOON,
    }
    return Record(**defaults | fields)


def body(**fields: object) -> bytes:
    """Returns a record's JSON with some fields changed; those set to `...` are left out."""
    changed = json.loads(record().to_bytes()) | fields
    return json.dumps({name: value for name, value in changed.items() if value is not ...}).encode()


@pytest.fixture
def storage(s3_bucket: S3Store) -> Storage:
    connection = Connection("s3", "aws", login="moto", password="moto", extra={"endpoint_url": s3_bucket.endpoint})
    return Storage.connect(f"s3://{s3_bucket.bucket}", "s3", lambda _: connection)


@pytest.fixture
def cache(storage: Storage) -> Cache:
    return Cache(storage, SPEC, MODEL, ["cardiology"])


def fill(cache: Cache, storage: Storage, keys: Iterable[str]) -> None:
    """Puts records there that the cache itself has not seen."""
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda k: storage.put(cache.path(k), record().to_bytes()), keys))


def test_a_record_lies_where_the_design_says(cache: Cache, storage: Storage) -> None:
    cache.write(key(0xAB), record())

    [(path, _)] = storage.list("")
    assert path == f"cache/{SPEC}/ba/tag_ba{30 * '0'}.json"


def test_a_written_record_is_found_and_read(cache: Cache, storage: Storage) -> None:
    cache.write(key(1), record())

    later = Cache(storage, SPEC, MODEL)
    assert later.find([key(1), key(2)]) == {key(1)}
    assert later.read(key(1)) == record()
    assert later.read(key(2)) is None
    assert later.read_many([key(1), key(2)]) == {key(1): record()}


def test_specs_share_nothing(cache: Cache, storage: Storage) -> None:
    cache.write(key(1), record())

    assert Cache(storage, "ba9876543210", MODEL).find([key(1)]) == set()


def test_finding_none_makes_no_request(cache: Cache, storage: Storage) -> None:
    requests = watch(storage)

    assert cache.find([]) == set()
    assert requests.made == []


def test_writing_is_one_request(cache: Cache, storage: Storage) -> None:
    requests = watch(storage)

    cache.write(key(1), record())

    assert requests.counts == {"PutObject": 1}


def test_completeness_is_answered_from_what_was_read_and_written(cache: Cache, storage: Storage) -> None:
    fill(cache, storage, [key(1), key(2)])
    cache.write(key(3), record())
    cache.read(key(2))
    requests = watch(storage)

    assert [cache.complete(key(n)) for n in range(5)] == [False, False, True, True, False]
    assert requests.made == []


def test_a_removed_record_is_not_complete(cache: Cache) -> None:
    cache.write(key(1), record())

    cache.remove(key(1))

    assert not cache.complete(key(1))
    assert cache.read(key(1)) is None


# One of 256 prefixes is looked into: 100 records there are taken for 25,600, so that a listing takes about 42 requests.
@pytest.mark.parametrize(
    ("in_sample", "wanted", "operation"),
    [
        pytest.param(0, 5, "HeadObject", id="few-wanted-of-none"),
        pytest.param(0, 40, "ListObjectsV2", id="many-wanted-of-none"),
        pytest.param(100, 30, "HeadObject", id="few-wanted-of-many"),
        pytest.param(100, 60, "ListObjectsV2", id="many-wanted-of-many"),
    ],
)
def test_keys_are_asked_for_in_the_way_that_needs_fewer_requests(
    cache: Cache, storage: Storage, in_sample: int, wanted: int, operation: str
) -> None:
    there = [key(n, "00") for n in range(1, in_sample + 1)]
    fill(cache, storage, there)
    missing = [key(n, "5") for n in range(wanted - wanted // 2)]
    stored = [key(n, "f") for n in range(wanted // 2)]
    fill(cache, storage, stored)
    requests = watch(storage)

    assert cache.find(stored + missing) == set(stored)

    assert set(requests.counts) <= {"ListObjectsV2", operation}
    assert len(requests.made) <= min(in_sample * 256 / 1000 + 17, wanted + 1)


@pytest.mark.parametrize("listed", [True, False], ids=["by-listing", "one-by-one"])
def test_found_and_missing_are_all_the_keys(cache: Cache, storage: Storage, listed: bool) -> None:
    keys = [key(n) for n in range(40 if listed else 10)]
    fill(cache, storage, keys[::2])
    requests = watch(storage)

    assert set(cache.missing(Keys.of(keys))) == set(keys[1::2])
    assert cache.find(iter(keys)) == set(keys[::2])
    assert ("HeadObject" in requests.counts) is not listed


def test_with_so_few_keys_that_no_listing_is_cheaper_none_is_made(cache: Cache, storage: Storage) -> None:
    requests = watch(storage)

    cache.missing(Keys.of(key(n) for n in range(16)))

    assert requests.counts == {"HeadObject": 16}


def pretend(storage: Storage, there: int) -> None:
    """Lets S3 have pages without end below each prefix, and none of the objects asked for but the first `there`."""
    items = b"".join(b"<Contents><Key>%d</Key><Size>200</Size></Contents>" % i for i in range(1000))
    more = b"<IsTruncated>true</IsTruncated><NextContinuationToken>t%d</NextContinuationToken>"
    pages = iter(b"<ListBucketResult>%b%b</ListBucketResult>" % (items, more % i) for i in count())
    left = iter(range(there))

    def answer(request: AWSPreparedRequest, **_: object) -> Any:
        if request.method == "GET":
            return AWSResponse(request.url, 200, HTTPHeaders(), RawAnswer(next(pages)))
        headers = HTTPHeaders()
        headers["Content-Length"] = "200"
        return AWSResponse(request.url, 404 if next(left, None) is None else 200, headers, RawAnswer(b""))

    storage._client.meta.events.register("before-send.s3", answer)


class RawAnswer(io.BytesIO):
    def stream(self, **_: object) -> Iterator[bytes]:
        yield self.read()


@pytest.mark.parametrize(("wanted", "pages"), [(17, 1), (250, 1), (500, 2), (1000, 4)])
def test_a_big_cache_is_sampled_no_further_than_the_answer_needs(storage: Storage, wanted: int, pages: int) -> None:
    pretend(storage, there=3)
    requests = watch(storage)

    assert len(Cache(storage, SPEC, MODEL).missing(Keys.of(key(n) for n in range(wanted)))) == wanted - 3

    assert requests.counts == {"ListObjectsV2": pages, "HeadObject": wanted}


def test_after_a_listing_garbage_is_collected_again(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.missing(Keys.of(key(n) for n in range(40)))
    assert gc.isenabled()

    def broken(part: str) -> Iterator[str]:
        assert not gc.isenabled()
        raise StorageError("broken")

    monkeypatch.setattr(cache, "_listed", broken)
    with pytest.raises(StorageError, match="broken"):
        cache.missing(Keys.of(key(n) for n in range(40)))
    assert gc.isenabled()


@pytest.mark.parametrize("wanted", [1, 40], ids=["one-by-one", "by-listing"])
def test_a_truncated_object_counts_as_missing(cache: Cache, storage: Storage, wanted: int) -> None:
    keys = [key(n) for n in range(1, wanted + 1)]
    fill(cache, storage, keys)
    storage.put(cache.path(keys[0]), record().to_bytes()[: SMALLEST_RECORD - 1])

    assert cache.find(keys) == set(keys[1:])
    assert not cache.complete(keys[0])


def test_the_smallest_record_there_can_be_does_not_count_as_truncated() -> None:
    smallest = record(
        tags=[],
        model="m",
        cost_usd=None,
        finish_reason="s",
        usage=Usage(),
        created_at=datetime.min.replace(tzinfo=UTC),
    )

    assert len(smallest.to_bytes()) >= SMALLEST_RECORD


def test_other_objects_below_the_prefix_are_no_records(cache: Cache, storage: Storage) -> None:
    storage.put(f"cache/{SPEC}/ba/notes.txt", b"x" * 200)
    storage.put(f"cache/{SPEC}/ba/tag_{key(1)}.json.tmp", b"x" * 200)

    assert cache.find([key(n) for n in range(40)]) == set()


GARBAGE = [
    pytest.param(b"", id="empty"),
    pytest.param(record().to_bytes()[:-20], id="cut-off"),
    pytest.param(b"\x00" * 300, id="zeros"),
    pytest.param(b"\xff\xfe\x00garbage" * 30, id="no-utf8"),
    pytest.param(b"<html>" + b"proxy error" * 20 + b"</html>", id="html"),
    pytest.param(b"[]", id="list"),
    pytest.param(b"null", id="null"),
    pytest.param(b'"' + b"x" * 200 + b'"', id="text"),
    pytest.param(b"[" * 100_000, id="deep"),
    pytest.param(b"{}", id="no-fields"),
    pytest.param(body(version=...), id="no-version"),
    pytest.param(body(version="new"), id="version-is-a-word"),
    pytest.param(body(status="done"), id="unknown-status"),
    pytest.param(body(status=...), id="no-status"),
    pytest.param(body(tags=None), id="no-tags"),
    pytest.param(body(tags=[1]), id="tags-are-numbers"),
    pytest.param(body(usage="much"), id="usage-is-a-word"),
    pytest.param(body(created_at="yesterday"), id="no-time"),
    pytest.param(body(created_at="2026-07-01T12:00:00"), id="no-zone"),
    pytest.param(body(created_at="9999-12-31T23:59:59-23:59"), id="time-beyond-the-calendar"),
    pytest.param(body(version=2.0), id="version-is-no-integer"),
    pytest.param(body(tags=["hacked"]), id="a-tag-of-no-spec"),
    pytest.param(body(tags=["cardiology", "cardiology"]), id="a-tag-twice"),
    pytest.param(body(confidence=[float("nan")]), id="confidence-is-no-number"),
    pytest.param(body(model="a\x00b"), id="model-that-no-database-takes"),
    pytest.param(body(finish_reason="\ud800"), id="half-a-surrogate-pair"),
    pytest.param(body(cost_usd=-1), id="cost-below-zero"),
    pytest.param(body(usage={"input": 10**30}), id="more-tokens-than-can-be"),
    pytest.param(body(model="offline-stand-in"), id="of-the-stand-in"),
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_record_is_deleted_and_warned_about(
    cache: Cache, storage: Storage, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    storage.put(cache.path(key(1)), garbage)
    cache.find([key(1)])

    assert cache.read(key(1)) is None

    assert storage.size(cache.path(key(1))) is None
    assert not cache.complete(key(1))
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, f"damaged cache record deleted: {cache.path(key(1))}")
    ]


def test_a_record_of_a_newer_version_is_an_error_and_stays(cache: Cache, storage: Storage) -> None:
    newer = body(version=RECORD_VERSION + 1, status="split", tags=...)
    storage.put(cache.path(key(1)), newer)

    with pytest.raises(InputError, match=f"version {RECORD_VERSION + 1}.* upgrade"):
        cache.read(key(1))

    assert storage.get(cache.path(key(1))) == newer


def test_a_field_that_this_version_does_not_know_is_no_damage() -> None:
    assert parse_record(body(note="from a later patch release"), MODEL) == record()


def test_records_of_version_1_stay_readable() -> None:
    golden = (
        b'{"version":1,"status":"tagged","reason":null,"tags":["cardiology"],"model":"gpt-5-mini",'
        b'"usage":{"input":100,"cached_input":50,"output":7},"cost_usd":0.001,"finish_reason":"stop",'
        b'"asked":"online","created_at":"2026-07-01T12:00:00Z"}'
    )

    assert parse_record(golden, MODEL) == record()


def test_the_stand_in_is_believed_only_where_it_is_the_model() -> None:
    by_stand_in = record(model="offline-stand-in")

    assert parse_record(by_stand_in.to_bytes(), "offline-stand-in") == by_stand_in
    with pytest.raises(DamagedRecord):
        parse_record(by_stand_in.to_bytes(), MODEL)


def test_a_model_may_answer_under_a_longer_name() -> None:
    dated = record(model="gpt-5-mini-2025-08-07")

    assert parse_record(dated.to_bytes(), MODEL) == dated


TOKENS = st.integers(min_value=0, max_value=10**9)
NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=200)
RECORDS = st.builds(
    Record,
    status=st.sampled_from(["tagged", "refused"]),
    reason=st.none() | NAMES,
    tags=st.lists(st.text(), unique=True),
    confidence=st.none() | st.lists(st.floats(0, 1)),
    model=NAMES.filter(lambda model: model != "offline-stand-in"),
    usage=st.builds(Usage, input=TOKENS, cached_input=TOKENS, output=TOKENS),
    cost_usd=st.none() | st.floats(min_value=0, max_value=1e6),
    finish_reason=NAMES,
    asked=st.sampled_from(["online", "batch", "together"]),
    chars=st.none() | st.builds(Chars.of, st.text()),
    created_at=st.datetimes(timezones=st.just(UTC)),
)


@given(RECORDS)
def test_a_record_reads_as_it_was_written(written: Record) -> None:
    assert parse_record(written.to_bytes(), MODEL) == written


def test_tag_ids_stand_readable_in_a_record() -> None:
    assert "循環器".encode() in record(tags=["循環器"]).to_bytes()


def test_the_mean_cost_is_of_the_records_whose_cost_is_known(cache: Cache) -> None:
    assert cache.mean_cost() is None

    for number, cost in enumerate([0.25, None, 0.75]):
        cache.write(key(number), record(cost_usd=cost))

    assert cache.mean_cost() == 0.5


def test_the_mean_cost_is_unknown_where_no_record_has_one(cache: Cache) -> None:
    cache.write(key(1), record(cost_usd=None))

    assert cache.mean_cost() is None


def test_the_mean_cost_takes_a_sample(cache: Cache, storage: Storage) -> None:
    fill(cache, storage, [key(n) for n in range(100)])
    requests = watch(storage)

    assert cache.mean_cost(sample=10) == pytest.approx(0.001)
    assert requests.counts == {"ListObjectsV2": 1, "GetObject": 10}


def test_a_sample_has_no_more_records_than_asked_for_and_one_listing(cache: Cache, storage: Storage) -> None:
    assert cache.sample(5) == []
    fill(cache, storage, [key(n) for n in range(30)])
    storage.put(f"cache/{SPEC}/00/tag_{key(99)}.json", b"truncated")
    requests = watch(storage)

    assert cache.sample(12) == [record()] * 12
    assert requests.counts == {"ListObjectsV2": 1, "GetObject": 12}
    assert len(cache.sample(64)) == 30


def test_a_sample_takes_other_records_for_other_specs(cache: Cache, storage: Storage) -> None:
    fill(Cache(storage, "ba9876543210", MODEL), storage, [key(1)])

    assert cache.sample(5) == []


@pytest.mark.parametrize(
    ("text", "narrow", "wide"),
    [
        ("", 0, 0),
        ("heart", 5, 0),
        ("心臓", 0, 2),
        ("心臓 heart", 6, 2),
        ("é" * 10, 5, 5),
        ("🙂" * 10, 0, 10),
        ("\ud800" * 4, 4, 0),
    ],
)
def test_a_length_is_counted_by_script(text: str, narrow: int, wide: int) -> None:
    assert Chars.of(text) == Chars(narrow=narrow, wide=wide)


@given(st.text(alphabet=st.characters()))
def test_all_characters_are_counted(text: str) -> None:
    chars = Chars.of(text)

    assert (chars.narrow + chars.wide, chars.narrow >= 0, chars.wide >= 0) == (len(text), True, True)
