"""Objects in S3: what each method does, and what it says when S3 does not play along."""

from __future__ import annotations

import io
import socket
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from demo.processes import free_port
from tagger.connections import Connection
from tagger.exceptions import InputError, StorageError, TaggerError, Unreachable
from tagger.runs import opened_parquet, read_parquet, writing_parquet
from tagger.storage import Storage
from tests.servers import S3Store


def connect(store: S3Store, url: str | None = None, secret: str | None = None, endpoint: str | None = None) -> Storage:
    connection = Connection(
        "s3",
        "aws",
        login=store.access_key,
        password=secret or store.secret_key,
        extra={"endpoint_url": endpoint or store.endpoint},
    )
    return Storage.connect(url or f"s3://{store.bucket}", "s3", lambda _: connection)


@pytest.fixture(params=["moto_server", "seaweedfs"])
def store(request: pytest.FixtureRequest) -> S3Store:
    found: S3Store = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def storage(store: S3Store, request: pytest.FixtureRequest) -> Storage:
    name = request.node.name.replace("[", "-").replace("]", "")
    return connect(store, f"s3://{store.bucket}/{name}")


def test_an_object_comes_back_as_it_was_put(storage: Storage) -> None:
    body = bytes(range(256)) * 100

    storage.put("a/日本語 +%.bin", body)

    assert storage.get("a/日本語 +%.bin") == body
    assert storage.size("a/日本語 +%.bin") == len(body)


def test_a_missing_object_is_none(storage: Storage) -> None:
    assert storage.get("nothing") is None
    assert storage.size("nothing") is None


def test_put_replaces(storage: Storage) -> None:
    storage.put("a", b"old")
    storage.put("a", b"new")

    assert storage.get("a") == b"new"


def test_create_writes_only_what_is_not_there(storage: Storage) -> None:
    assert storage.create("a", b"first")
    assert not storage.create("a", b"second")

    assert storage.get("a") == b"first"


def test_of_many_that_create_at_once_one_succeeds(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as threads:
        created = list(threads.map(lambda i: storage.create("a", str(i).encode()), range(8)))

    assert created.count(True) == 1
    assert storage.get("a") == str(created.index(True)).encode()


def test_a_deleted_object_is_gone_and_may_be_deleted_again(storage: Storage) -> None:
    storage.put("a", b"x")

    storage.delete("a")
    storage.delete("a")

    assert storage.get("a") is None


def test_list_has_path_and_size_of_all_objects_of_a_prefix(storage: Storage) -> None:
    paths = {f"many/{i:04}": i % 7 for i in range(1100)}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda path: storage.put(path, b"x" * paths[path]), paths))
    storage.put("other", b"x")

    assert dict(storage.list("many/")) == paths
    assert len(dict(storage.list(""))) == 1101


def test_list_of_nothing_is_empty(storage: Storage) -> None:
    assert list(storage.list("nothing/")) == []


def test_a_version_tells_when_an_object_was_written_and_whether_it_is_another_one(storage: Storage) -> None:
    for path in ("run/a", "run/b", "other"):
        storage.put(path, b"x")
    before = {version.path: version for version in storage.list_versions("run/")}
    storage.put("run/b", b"y")

    after = {version.path: version for version in storage.list_versions("run/")}

    assert list(before) == list(after) == ["run/a", "run/b"]
    assert abs(before["run/a"].written_at - datetime.now(UTC)) < timedelta(seconds=30)
    assert after["run/a"] == before["run/a"]
    assert after["run/b"].etag != before["run/b"].etag
    assert after["run/b"].written_at >= before["run/b"].written_at


def test_prefixes_need_not_end_at_a_slash(storage: Storage) -> None:
    for path in ("run/shard-1-1", "run/shard-1-2", "run/shard-11-1"):
        storage.put(path, b"x")

    assert [path for path, _ in storage.list("run/shard-1-")] == ["run/shard-1-1", "run/shard-1-2"]


ODD_NAMES = [
    "日本語",
    "é e\u0301",
    "🍎",
    "a b",
    " a",
    "a+b",
    "a%20b%",
    "<Key>x</Key>",
    "a&amp;b&b",
    "'\"",
    "]]>",
    "a?b#c",
    "~.-_",
    "a\tb",
]


def test_odd_names_are_listed_as_they_are(storage: Storage) -> None:
    sizes = {f"odd/{name}": number for number, name in enumerate(ODD_NAMES)}
    for path, size in sizes.items():
        storage.put(path, b"x" * size)

    assert dict(storage.list("odd/")) == sizes


def pages_of(store: S3Store) -> list[dict[str, Any]]:
    """Returns the pages of a whole bucket, as the storage's client gives them."""
    pages = (
        connect(store)
        ._client.get_paginator("list_objects_v2")
        .paginate(Bucket=store.bucket, PaginationConfig={"PageSize": 2})
    )
    return [dict(page) for page in pages]


def test_a_page_is_boto3s_own_but_for_what_is_not_needed_of_its_objects(s3_bucket: S3Store) -> None:
    for number, name in enumerate(ODD_NAMES):
        connect(s3_bucket).put(name, b"x" * number)
    of_boto3 = list(
        s3_bucket.client()
        .get_paginator("list_objects_v2")
        .paginate(Bucket=s3_bucket.bucket, PaginationConfig={"PageSize": 2})
    )

    pages = pages_of(s3_bucket)

    assert len(pages) == len(ODD_NAMES) / 2
    for page, expected in zip(pages, of_boto3, strict=True):
        rest = dict.fromkeys(("ResponseMetadata", "Contents"))
        assert page | rest == {**expected} | rest
        # had boto3's own parser been at work, there would be more
        assert [
            {**item, "LastModified": datetime.fromisoformat(item["LastModified"])} for item in page["Contents"]
        ] == [{name: item[name] for name in ("Key", "Size", "LastModified", "ETag")} for item in expected["Contents"]]


OBJECT = b"<Contents><Key>%b</Key><Size>%d</Size></Contents>"
PAGE = b'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">%b</ListBucketResult>'


@pytest.mark.parametrize(
    ("body", "objects"),
    [
        pytest.param(PAGE % b"", [], id="empty"),
        pytest.param(b"", [], id="no-body"),
        pytest.param(PAGE % (OBJECT % (b"a", 1) + OBJECT % (b"b", 2)), [("a", 1), ("b", 2)], id="plain"),
        pytest.param(
            b"<ListBucketResult>" + OBJECT % (b"a", 1) + b"</ListBucketResult>", [("a", 1)], id="no-namespace"
        ),
        pytest.param(PAGE % (OBJECT % (b"&lt;&amp;&#x65e5;&#10;", 1)), [("<&日\n", 1)], id="entities"),
        pytest.param(PAGE % (OBJECT % (b"<![CDATA[<&]]>", 1)), [("<&", 1)], id="cdata"),
        pytest.param(PAGE % (OBJECT % (b"%41+%25", 1)), [("%41+%25", 1)], id="not-encoded"),
        pytest.param(
            PAGE % (b"<EncodingType>url</EncodingType>" + OBJECT % (b"%E6%97%A5+%2B%25&amp;", 1)),
            [("日 +%&", 1)],
            id="encoded",
        ),
        pytest.param(
            PAGE
            % (
                b"\n <Contents>\n <Size>7</Size><Owner><ID>Key</ID><DisplayName>x</DisplayName></Owner>"
                b"<Key>a</Key><!-- --></Contents>\n<KeyCount>1</KeyCount>"
            ),
            [("a", 7)],
            id="other-order",
        ),
    ],
)
def test_a_page_in_any_form_is_read_as_boto3_reads_it(body: bytes, objects: list[tuple[str, int]]) -> None:
    with FixedAnswer(answer("200 OK", body)) as server:
        store = S3Store(server.endpoint, "key", "secret", "bucket")
        of_boto3 = store.client().list_objects_v2(Bucket="bucket").get("Contents", [])

        assert list(connect(store).list("")) == objects
        assert [(item["Key"], item["Size"]) for item in of_boto3] == objects


@pytest.mark.parametrize("size", [0, 10, 9_000_000], ids=["empty", "small", "multipart"])
def test_a_file_comes_back_as_it_was_uploaded(storage: Storage, size: int) -> None:
    content = b"0123456789abcde\n" * (size // 16) + b"x" * (size % 16)
    with tempfile.TemporaryFile() as up, tempfile.TemporaryFile() as down:
        up.write(content)

        storage.upload("file", up)
        storage.download("file", down)

        assert down.read() == content
    assert storage.size("file") == size


@pytest.mark.parametrize(
    ("url", "key"), [("", "a/b"), ("/", "a/b"), ("/deep/er", "deep/er/a/b"), ("/deep/er/", "deep/er/a/b")]
)
def test_the_path_of_the_url_comes_before_every_key(s3_bucket: S3Store, url: str, key: str) -> None:
    storage = connect(s3_bucket, f"s3://{s3_bucket.bucket}{url}")

    storage.put("a/b", b"x")

    listed = s3_bucket.client().list_objects_v2(Bucket=s3_bucket.bucket)["Contents"]
    assert [item["Key"] for item in listed] == [key]
    assert list(storage.list("a/")) == [("a/b", 1)]


def test_check_makes_a_bucket_only_if_asked(store: S3Store) -> None:
    storage = connect(store, "s3://made-by-check")

    with pytest.raises(InputError, match="no bucket `made-by-check`"):
        storage.check()
    assert storage.check(create=True)
    assert not storage.check(create=True)
    assert not storage.check()
    store.client().delete_bucket(Bucket="made-by-check")


def put(storage: Storage) -> None:
    storage.put("a", b"x")


def create(storage: Storage) -> object:
    return storage.create("a", b"x")


def get(storage: Storage) -> object:
    return storage.get("a")


def size(storage: Storage) -> object:
    return storage.size("a")


def list_all(storage: Storage) -> object:
    return list(storage.list(""))


def delete(storage: Storage) -> None:
    storage.delete("a")


def check(storage: Storage) -> object:
    return storage.check()


def upload(storage: Storage) -> None:
    storage.upload("a", io.BytesIO(b"x"))


def download(storage: Storage) -> None:
    storage.download("a", io.BytesIO())


Do = Callable[[Storage], object]


def error_of(do: Do, storage: Storage) -> TaggerError:
    with pytest.raises(TaggerError) as caught:
        do(storage)
    message = str(caught.value)
    assert message.startswith("s3://")
    assert len(message.splitlines()) == 1
    return caught.value


def assert_tells_the_missing_bucket(error: TaggerError) -> None:
    assert type(error) is InputError
    assert "no bucket `not-there`" in str(error)
    assert "tagger check --create" in str(error)


@pytest.mark.parametrize("do", [get, list_all, check])
def test_reading_from_a_missing_bucket_is_wrong_input(store: S3Store, do: Do) -> None:
    assert_tells_the_missing_bucket(error_of(do, connect(store, "s3://not-there")))


# SeaweedFS makes the bucket at the first write.
@pytest.mark.parametrize("do", [put, create, upload])
def test_writing_to_a_missing_bucket_is_wrong_input(moto_server: S3Store, do: Do) -> None:
    assert_tells_the_missing_bucket(error_of(do, connect(moto_server, "s3://not-there")))


@pytest.mark.parametrize("do", [put, create, get, size, list_all, delete, check, upload, download])
def test_wrong_keys_are_wrong_input_and_not_shown(seaweedfs: S3Store, do: Do) -> None:
    error = error_of(do, connect(seaweedfs, secret="wrong-secret"))

    assert type(error) is InputError
    assert "access denied" in str(error)
    assert "wrong-secret" not in str(error)
    assert seaweedfs.secret_key not in str(error)


def test_no_keys_at_all_are_wrong_input(store: S3Store) -> None:
    connection = Connection("s3", "aws", extra={"endpoint_url": store.endpoint})

    error = error_of(get, Storage.connect("s3://tagger", "s3", lambda _: connection))

    assert type(error) is InputError
    assert "credentials" in str(error)


def test_downloading_a_missing_object_is_an_error(storage: Storage, tmp_path: Path) -> None:
    error_of(download, storage)

    assert not (tmp_path / "copy").exists()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of botocore's own retries are not the subject here."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("do", [put, get, size, list_all, check, upload, download])
def test_an_endpoint_that_does_not_answer_is_unreachable(moto_server: S3Store, do: Do) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"

    error = error_of(do, connect(moto_server, secret="a-secret-key", endpoint=endpoint))

    assert type(error) is Unreachable
    assert endpoint in str(error)
    assert "a-secret-key" not in str(error)


class FixedAnswer:
    """A server that gives every request the same bytes, and hangs up."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(self._answer)

    def __enter__(self) -> FixedAnswer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def answer(status: str, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n".encode() + body


def s3_error(status: str, code: str) -> bytes:
    return answer(status, f"<Error><Code>{code}</Code><Message>told secret</Message></Error>".encode())


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        pytest.param(s3_error("403 Forbidden", "AccessDenied"), InputError, "access denied", id="denied"),
        pytest.param(s3_error("400 Bad Request", "ExpiredToken"), InputError, "access denied", id="expired"),
        pytest.param(s3_error("503 Slow Down", "SlowDown"), StorageError, "SlowDown", id="slow-down"),
        pytest.param(s3_error("500 Error", "InternalError"), StorageError, "InternalError", id="internal"),
        pytest.param(answer("200 OK", b"half", length=8), Unreachable, "does not answer", id="body-cut-off"),
        pytest.param(b"", Unreachable, "does not answer", id="hangs-up"),
    ],
)
def test_an_answer_of_s3_is_told_by_its_code_alone(
    moto_server: S3Store, tmp_path: Path, reply: bytes, kind: type[TaggerError], words: str
) -> None:
    with FixedAnswer(reply) as server:
        error = error_of(get, connect(moto_server, endpoint=server.endpoint))

    assert type(error) is kind
    assert words in str(error)
    assert "told secret" not in str(error)


@pytest.mark.parametrize("do", [get, size, download])
@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nLast-Modified: Sat, 28 Nov 2026 1"],
    ids=["status", "header", "value"],
)
def test_headers_that_are_cut_off_are_no_answer(
    moto_server: S3Store, do: Do, head: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with FixedAnswer(head) as server:
        error = error_of(do, connect(moto_server, endpoint=server.endpoint))

    assert type(error) is StorageError
    assert str(error).endswith("S3's answer is cut off, or damaged")
    assert caplog.text == ""


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        pytest.param(s3_error("403 Forbidden", "AccessDenied"), InputError, "access denied", id="denied"),
        pytest.param(s3_error("503 Slow Down", "SlowDown"), StorageError, "SlowDown", id="slow-down"),
        pytest.param(s3_error("200 OK", "SlowDown"), StorageError, "SlowDown", id="slow-down-as-200"),
        pytest.param(
            answer("200 OK", b"<ListBucketResult><Contents>told secret"), StorageError, "500", id="body-cut-off"
        ),
        pytest.param(b"", Unreachable, "does not answer", id="hangs-up"),
    ],
)
def test_an_error_of_a_listing_is_told_by_its_code_alone(
    moto_server: S3Store, tmp_path: Path, reply: bytes, kind: type[TaggerError], words: str
) -> None:
    with FixedAnswer(reply) as server:
        error = error_of(list_all, connect(moto_server, endpoint=server.endpoint))

    assert type(error) is kind
    assert words in str(error)
    assert "told secret" not in str(error)


# Parquet files

NUMBERS = pa.schema([("number", pa.int64())])


@pytest.fixture
def numbers(s3_bucket: S3Store) -> Storage:
    """A storage with a file of three row groups."""
    storage = connect(s3_bucket)
    with writing_parquet(storage, "numbers", NUMBERS) as parquet:
        for start in (0, 10_000, 20_000):
            parquet.write({"number": list(range(start, start + 10_000))})
    return storage


def test_a_parquet_file_is_read_in_parts(numbers: Storage) -> None:
    with opened_parquet(numbers, "numbers") as parquet:
        firsts = [parquet.read_row_group(i).column("number")[0].as_py() for i in range(parquet.num_row_groups)]

    assert firsts == [0, 10_000, 20_000]
    assert sum(batch.num_rows for batch in read_parquet(numbers, "numbers")) == 30_000


def read_opened(storage: Storage) -> None:
    with opened_parquet(storage, "numbers") as parquet:
        for group in range(parquet.num_row_groups):
            parquet.read_row_group(group)


def read_batches(storage: Storage) -> None:
    list(read_parquet(storage, "numbers"))


@pytest.mark.parametrize("read", [read_opened, read_batches])
@pytest.mark.parametrize("damage", ["no-file", "cut-off", "within"])
def test_a_damaged_parquet_file_is_one_clear_error(
    numbers: Storage, damage: str, read: Callable[[Storage], None]
) -> None:
    body = numbers.get("numbers") or b""
    damaged = {"no-file": b"x" * 100, "cut-off": body[:-20], "within": body[:40_000] + bytes(200) + body[40_200:]}
    numbers.put("numbers", damaged[damage])

    with pytest.raises(StorageError, match=r"^s3://.*/numbers: damaged: run its step again$"):
        read(numbers)


@pytest.mark.parametrize("raised", [TimeoutError("late"), ConnectionResetError(104, "reset"), ValueError("odd")])
def test_what_is_raised_over_an_open_file_is_no_damage_of_it(numbers: Storage, raised: Exception) -> None:
    with pytest.raises(type(raised)) as caught, opened_parquet(numbers, "numbers"):
        raise raised

    assert caught.value is raised


def test_a_full_disk_is_one_clear_error(numbers: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not-there"))

    with pytest.raises(
        StorageError, match=r"^temporary files in .*not-there: No such file or directory; \$TMPDIR names"
    ):
        read_opened(numbers)
    with pytest.raises(StorageError, match=r"^temporary files in "), writing_parquet(numbers, "new", NUMBERS):
        pass
