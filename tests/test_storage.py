"""Objects in S3: what each method does, and what it says when S3 does not play along."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from demo.processes import free_port
from tagger.connections import Connection
from tagger.exceptions import InputError, StorageError, TaggerError, Unreachable
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


def test_prefixes_need_not_end_at_a_slash(storage: Storage) -> None:
    for path in ("run/shard-1-1", "run/shard-1-2", "run/shard-11-1"):
        storage.put(path, b"x")

    assert [path for path, _ in storage.list("run/shard-1-")] == ["run/shard-1-1", "run/shard-1-2"]


@pytest.mark.parametrize("size", [0, 10, 9_000_000], ids=["empty", "small", "multipart"])
def test_a_file_comes_back_as_it_was_uploaded(storage: Storage, tmp_path: Path, size: int) -> None:
    up, down = tmp_path / "up", tmp_path / "down"
    up.write_bytes(b"0123456789abcde\n" * (size // 16) + b"x" * (size % 16))

    storage.upload("file", up)
    storage.download("file", down)

    assert down.read_bytes() == up.read_bytes()
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


def put(storage: Storage, _: Path) -> None:
    storage.put("a", b"x")


def create(storage: Storage, _: Path) -> object:
    return storage.create("a", b"x")


def get(storage: Storage, _: Path) -> object:
    return storage.get("a")


def size(storage: Storage, _: Path) -> object:
    return storage.size("a")


def list_all(storage: Storage, _: Path) -> object:
    return list(storage.list(""))


def delete(storage: Storage, _: Path) -> None:
    storage.delete("a")


def check(storage: Storage, _: Path) -> object:
    return storage.check()


def upload(storage: Storage, folder: Path) -> None:
    (folder / "file").write_bytes(b"x")
    storage.upload("a", folder / "file")


def download(storage: Storage, folder: Path) -> None:
    storage.download("a", folder / "copy")


Do = Callable[[Storage, Path], object]


def error_of(do: Do, storage: Storage, folder: Path) -> TaggerError:
    with pytest.raises(TaggerError) as caught:
        do(storage, folder)
    message = str(caught.value)
    assert message.startswith("s3://")
    assert len(message.splitlines()) == 1
    return caught.value


def assert_tells_the_missing_bucket(error: TaggerError) -> None:
    assert type(error) is InputError
    assert "no bucket `not-there`" in str(error)
    assert "tagger check --create" in str(error)


@pytest.mark.parametrize("do", [get, list_all, check])
def test_reading_from_a_missing_bucket_is_wrong_input(store: S3Store, tmp_path: Path, do: Do) -> None:
    assert_tells_the_missing_bucket(error_of(do, connect(store, "s3://not-there"), tmp_path))


# SeaweedFS makes the bucket at the first write.
@pytest.mark.parametrize("do", [put, create, upload])
def test_writing_to_a_missing_bucket_is_wrong_input(moto_server: S3Store, tmp_path: Path, do: Do) -> None:
    assert_tells_the_missing_bucket(error_of(do, connect(moto_server, "s3://not-there"), tmp_path))


@pytest.mark.parametrize("do", [put, create, get, size, list_all, delete, check, upload, download])
def test_wrong_keys_are_wrong_input_and_not_shown(seaweedfs: S3Store, tmp_path: Path, do: Do) -> None:
    error = error_of(do, connect(seaweedfs, secret="wrong-secret"), tmp_path)

    assert type(error) is InputError
    assert "access denied" in str(error)
    assert "wrong-secret" not in str(error)
    assert seaweedfs.secret_key not in str(error)


def test_no_keys_at_all_are_wrong_input(store: S3Store, tmp_path: Path) -> None:
    connection = Connection("s3", "aws", extra={"endpoint_url": store.endpoint})

    error = error_of(get, Storage.connect("s3://tagger", "s3", lambda _: connection), tmp_path)

    assert type(error) is InputError
    assert "credentials" in str(error)


def test_downloading_a_missing_object_is_an_error(storage: Storage, tmp_path: Path) -> None:
    error_of(download, storage, tmp_path)

    assert not (tmp_path / "copy").exists()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of botocore's own retries are not the subject here."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("do", [put, get, size, list_all, check, upload, download])
def test_an_endpoint_that_does_not_answer_is_unreachable(moto_server: S3Store, tmp_path: Path, do: Do) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"

    error = error_of(do, connect(moto_server, secret="a-secret-key", endpoint=endpoint), tmp_path)

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
        error = error_of(get, connect(moto_server, endpoint=server.endpoint), tmp_path)

    assert type(error) is kind
    assert words in str(error)
    assert "told secret" not in str(error)
