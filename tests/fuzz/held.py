"""A storage in memory, whose objects a case may put there as it likes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO

from tagger.exceptions import StorageError
from tagger.storage import Storage, Version

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


class Held(Storage):
    """Answers as S3 does, from a dict of bodies by path."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.url = "s3://held"
        self.objects = objects

    def get(self, path: str) -> bytes | None:
        return self.objects.get(path)

    def size(self, path: str) -> int | None:
        return len(self.objects[path]) if path in self.objects else None

    def put(self, path: str, body: bytes) -> None:
        self.objects[path] = body

    def create(self, path: str, body: bytes) -> bool:
        return self.objects.setdefault(path, body) is body

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        yield from ((path, len(self.objects[path])) for path in _below(self.objects, prefix))

    def list_versions(self, prefix: str) -> Iterator[Version]:
        for path in _below(self.objects, prefix):
            body = self.objects[path]
            yield Version(path, NOON, str(zlib.crc32(body)), len(body))

    def delete(self, path: str) -> None:
        self.objects.pop(path, None)

    def upload(self, path: str, file: IO[bytes]) -> None:
        file.seek(0)
        self.objects[path] = file.read()

    def download(self, path: str, file: IO[bytes]) -> None:
        if path not in self.objects:
            raise StorageError(f"{self.url}: reading {path}: S3 answered 404")
        file.write(self.objects[path])
        file.seek(0)


def _below(objects: dict[str, bytes], prefix: str) -> list[str]:
    return sorted(path for path in objects if path.startswith(prefix))
