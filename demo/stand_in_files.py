"""The offline stand-in's files: OpenAI's Files API, in memory. Only files for batches can be uploaded."""

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from demo.stand_in_http import Json, Reply, Request, Routes, error, page

MAX_BYTES = 200_000_000
"""Of an uploaded file."""


@dataclass(slots=True)
class File:
    """A file, whose content goes when it is deleted."""

    filename: str
    purpose: str
    content: bytes
    id: str
    created_at: int
    deleted: bool = False

    def to_json(self) -> Json:
        """Return OpenAI's file object."""
        known = {"id": self.id, "object": "file", "bytes": len(self.content), "created_at": self.created_at}
        return known | {"filename": self.filename, "purpose": self.purpose, "status": "processed"}

    def delete(self) -> None:
        """Let it not be found any more."""
        self.deleted, self.content = True, b""


class Files:
    """The files, oldest first. Deleted ones stay among `all`, so that they can be counted."""

    def __init__(self) -> None:
        self._files: dict[str, File] = {}
        self._lock = threading.Lock()

    @property
    def routes(self) -> Routes:
        """What answers which request."""
        return {
            "POST /v1/files": self._upload,
            "GET /v1/files": self._list,
            "GET /v1/files/{id}": self._with_file(lambda file: Reply(body=file.to_json())),
            "GET /v1/files/{id}/content": self._with_file(_content),
            "DELETE /v1/files/{id}": self._with_file(_delete),
        }

    def all(self) -> list[File]:
        """Return the files there are and were."""
        with self._lock:
            return list(self._files.values())

    def find(self, file_id: str) -> File | None:
        """Return a file that is not deleted."""
        with self._lock:
            file = self._files.get(file_id)
        return None if file is None or file.deleted else file

    def add(self, filename: str, purpose: str, content: bytes) -> File:
        """Keep a file."""
        file = File(filename, purpose, content, f"file-{uuid.uuid4().hex[:24]}", int(time.time()))
        with self._lock:
            self._files[file.id] = file
        return file

    def _upload(self, request: Request) -> Reply:
        form = request.form()
        filename, content = form.get("file", ("", b""))
        if form.get("purpose") != ("", b"batch"):
            return error(400, "Expected a form with the purpose `batch` and a file.", param="purpose")
        if not filename.endswith(".jsonl"):
            return error(400, "Invalid file format for Batch API. Must be .jsonl", param="file")
        if len(content) > MAX_BYTES:
            return error(400, "File is too large.")
        return Reply(body=self.add(filename, "batch", content).to_json())

    def _list(self, request: Request) -> Reply:
        wanted = request.query.get("purpose")
        files = [file.to_json() for file in self.all() if not file.deleted and wanted in (None, file.purpose)]
        return page(files if request.query.get("order") == "asc" else files[::-1], request, 10_000, 10_000)

    def _with_file(self, answer: Callable[[File], Reply]) -> Callable[[Request], Reply]:
        def respond(request: Request) -> Reply:
            file = self.find(request.id)
            return answer(file) if file else error(404, f"No such File object: {request.id}", param="id")

        return respond


def _content(file: File) -> Reply:
    return Reply(body=file.content, headers={"Content-Type": "application/octet-stream"})


def _delete(file: File) -> Reply:
    file.delete()
    return Reply(body={"id": file.id, "object": "file", "deleted": True})
