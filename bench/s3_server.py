"""S3 in memory, which counts requests: `python -m bench.s3_server --port P`.

Path style, any credentials. Objects (PUT with If-None-Match, GET with Range, HEAD, DELETE, multi-object delete), both
versions of the listing, multipart uploads, buckets (made by their first use). The rest is 501 and counted as `Other`.

Ours are `GET /_stats`, `POST /_reset` (counters), `POST /_clear` (all objects), `POST /_behave`, which takes `latency`
(seconds before S3's requests are answered), and `POST /_seed`, which takes `bucket`, `keys_file` (one object key a
line) and `body`, and makes all of them exist with that one body.
"""

import asyncio
import base64
import json
import re
import secrets
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from bench.wire import Request, Send, json_response, own_cost, response, serve

_PLAIN_KEY = re.compile(r"[A-Za-z0-9/_.~-]*")
_LIST_QUERY = {"prefix", "delimiter", "marker", "max-keys", "encoding-type"}
_LAST = "\U0010ffff"

FEW = 20
"""So many new keys are put in their places one by one, more of them by sorting all."""


class Stored(NamedTuple):
    """An object; those that were seeded share one."""

    body: bytes
    etag: str
    at: float


def stored(body: bytes, parts: str = "") -> Stored:
    """Return a body as an object written now; its ETag tells nothing, as with SSE-KMS: MD5 would take long."""
    return Stored(body, f'"{secrets.token_hex(16)}{parts}"', time.time())


class Bucket:
    """Objects by key, and the keys in order; they are put in order when they are listed, not at every write."""

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self._ordered: list[str] = []
        self._added: list[str] = []
        self._removed = False

    def put(self, key: str, content: Stored) -> None:
        """Write an object."""
        if key not in self.objects:
            self._added.append(key)
        self.objects[key] = content

    def delete(self, key: str) -> None:
        """Delete an object; it need not exist."""
        if self.objects.pop(key, None) is not None:
            self._removed = True

    def keys(self) -> list[str]:
        """Return all keys in order."""
        if self._removed:  # first of all: what was removed and added again would stand there twice
            self._ordered = sorted({*self._ordered, *self._added} & self.objects.keys())
        elif len(self._added) < FEW:
            for key in self._added:
                insort(self._ordered, key)
        else:
            self._ordered += self._added
            self._ordered.sort()
        self._added, self._removed = [], False
        return self._ordered


class S3:
    """Answers S3's requests from memory."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._latency = 0.0
        self._buckets: dict[str, Bucket] = {}
        self._uploads: dict[str, dict[int, bytes]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()

    def __call__(self, request: Request, send: Send) -> None:
        """Answer a request."""
        if request.path.startswith("/_"):
            send(self._control(request))
            return
        bucket, _, key = request.path[1:].partition("/")
        operation = _operation(request, key)
        self._counts[_area(key or request.query.get("prefix", "")), operation] += 1
        store = self._buckets.setdefault(bucket, Bucket())
        answer = getattr(self, f"_{operation}", None)
        raw = answer(request, store, key) if answer else _error("501 Not Implemented", "NotImplemented")
        if self._latency:
            self._loop.call_later(self._latency, send, raw)
        else:
            send(raw)

    def _control(self, request: Request) -> bytes:
        if request.path == "/_reset":
            self._counts.clear()
        elif request.path == "/_clear":
            self._buckets.clear()
            self._uploads.clear()
        elif request.path == "/_behave":
            self._latency = json.loads(request.body)["latency"]
        elif request.path == "/_seed":
            asked = json.loads(request.body)
            content = stored(asked["body"].encode())
            store = self._buckets.setdefault(asked["bucket"], Bucket())
            with Path(asked["keys_file"]).open() as keys:
                for line in keys:
                    store.put(line.rstrip("\n"), content)
            store.keys()
        counts: dict[str, dict[str, int]] = {"records": {}, "files": {}}
        for (area, operation), count in sorted(self._counts.items()):
            counts[area][operation] = count
        return json_response(own_cost() | {"requests": counts})

    def _PutObject(self, request: Request, store: Bucket, key: str) -> bytes:
        if request.headers.get("if-none-match") == "*" and key in store.objects:
            return _error("412 Precondition Failed", "PreconditionFailed")
        content = stored(request.body)
        store.put(key, content)
        return response(headers=f"ETag: {content.etag}\r\n")

    def _GetObject(self, request: Request, store: Bucket, key: str) -> bytes:
        found = store.objects.get(key)
        if found is None:
            return _error("404 Not Found", "NoSuchKey")
        if "range" not in request.headers:
            return response(found.body, headers=_object_headers(found))
        first, last = _range(request.headers["range"], len(found.body))
        part = f"{_object_headers(found)}Content-Range: bytes {first}-{last}/{len(found.body)}\r\n"
        return response(found.body[first : last + 1], "206 Partial Content", part)

    def _HeadObject(self, _request: Request, store: Bucket, key: str) -> bytes:
        found = store.objects.get(key)
        if found is None:
            return response(status="404 Not Found")
        return response(headers=_object_headers(found), length=len(found.body))

    def _DeleteObject(self, _request: Request, store: Bucket, key: str) -> bytes:
        store.delete(key)
        return response(status="204 No Content")

    def _DeleteObjects(self, request: Request, store: Bucket, _key: str) -> bytes:
        for name in _texts(request.body, "Key"):
            store.delete(name)
        return _xml("DeleteResult", "")

    def _ListObjectsV2(self, request: Request, store: Bucket, _key: str) -> bytes:
        token = request.query.get("continuation-token")
        after = base64.urlsafe_b64decode(token).decode() if token else request.query.get("start-after", "")
        return self._list(request, store, after, version=2)

    def _ListObjects(self, request: Request, store: Bucket, _key: str) -> bytes:
        return self._list(request, store, request.query.get("marker", ""), version=1)

    def _list(self, request: Request, store: Bucket, after: str, version: int) -> bytes:
        query = request.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most = min(int(query.get("max-keys", 1000)), 1000)
        names, prefixes, last = _page(store.keys(), prefix, delimiter, after, most)
        coded = quote if query.get("encoding-type") == "url" else escape
        parts = [
            f"<Prefix>{coded(prefix)}</Prefix><MaxKeys>{most}</MaxKeys><IsTruncated>{str(bool(last)).lower()}</IsTruncated>"
            f"<KeyCount>{len(names) + len(prefixes)}</KeyCount>"
        ]
        if "encoding-type" in query:
            parts.append("<EncodingType>url</EncodingType>")
        if last and version == 2:
            token = base64.urlsafe_b64encode(last.encode()).decode()
            parts.append(f"<NextContinuationToken>{token}</NextContinuationToken>")
        elif last:
            parts.append(f"<NextMarker>{coded(last)}</NextMarker>")
        about: dict[int, str] = {}  # what follows the key; the same for all that were seeded
        for name in names:
            found = store.objects[name]
            rest = about.get(id(found)) or about.setdefault(id(found), _listed(found))
            shown = name if _PLAIN_KEY.fullmatch(name) else coded(name)
            parts.append(f"<Contents><Key>{shown}{rest}")
        parts += [f"<CommonPrefixes><Prefix>{coded(each)}</Prefix></CommonPrefixes>" for each in prefixes]
        return _xml("ListBucketResult", "".join(parts))

    def _HeadBucket(self, _request: Request, _store: Bucket, _key: str) -> bytes:
        return response()

    def _CreateBucket(self, _request: Request, _store: Bucket, _key: str) -> bytes:
        return response()

    def _CreateMultipartUpload(self, request: Request, _store: Bucket, key: str) -> bytes:
        upload = secrets.token_hex(8)
        self._uploads[upload] = {}
        bucket = request.path[1:].partition("/")[0]
        names = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
        return _xml("InitiateMultipartUploadResult", names)

    def _UploadPart(self, request: Request, _store: Bucket, _key: str) -> bytes:
        self._uploads[request.query["uploadId"]][int(request.query["partNumber"])] = request.body
        return response(headers=f'ETag: "{secrets.token_hex(16)}"\r\n')

    def _CompleteMultipartUpload(self, request: Request, store: Bucket, key: str) -> bytes:
        parts = self._uploads.pop(request.query["uploadId"])
        bodies = [parts[int(number)] for number in _texts(request.body, "PartNumber")]
        content = stored(b"".join(bodies), f"-{len(bodies)}")
        store.put(key, content)
        return _xml("CompleteMultipartUploadResult", f"<Key>{escape(key)}</Key><ETag>{escape(content.etag)}</ETag>")

    def _AbortMultipartUpload(self, request: Request, _store: Bucket, _key: str) -> bytes:
        self._uploads.pop(request.query["uploadId"], None)
        return response(status="204 No Content")


def _operation(request: Request, key: str) -> str:
    method, query = request.method, request.query
    if "uploads" in query:
        return "CreateMultipartUpload" if method == "POST" else "Other"
    if "uploadId" in query:
        names = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
        return names.get(method, "Other")
    if key:
        known = {"PUT": "PutObject", "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}
        return "Other" if "x-amz-copy-source" in request.headers else known.get(method, "Other")
    if method == "POST" and "delete" in query:
        return "DeleteObjects"
    if method == "GET" and query.get("list-type") == "2":
        return "ListObjectsV2"
    if method == "GET" and not query.keys() - _LIST_QUERY:
        return "ListObjects"
    return {"HEAD": "HeadBucket", "PUT": "CreateBucket"}.get(method, "Other")


def _area(key: str) -> str:
    """Return whether a key or prefix is of the cache's records or of anything else."""
    return "records" if key.startswith("cache/") or "/cache/" in key else "files"


def _page(
    keys: list[str], prefix: str, delimiter: str, after: str, most: int
) -> tuple[list[str], list[str], str | None]:
    """Return a page of a listing: keys, common prefixes, and after what the next page starts (None: it is the last)."""
    start = max(bisect_left(keys, prefix), bisect_right(keys, after))
    names: list[str]
    if not delimiter:
        end = bisect_left(keys, prefix + _LAST, start)
        names = keys[start : min(end, start + most)]
        return names, [], names[-1] if start + most < end else None
    names = []
    prefixes: list[str] = []
    last = ""
    while start < len(keys) and keys[start].startswith(prefix):
        if len(names) + len(prefixes) == most:
            return names, prefixes, last
        head, found, _ = keys[start][len(prefix) :].partition(delimiter)
        if found:
            prefixes.append(prefix + head + delimiter)
            last = prefixes[-1] + _LAST
            start = bisect_left(keys, last, start)
        else:
            names.append(keys[start])
            last = keys[start]
            start += 1
    return names, prefixes, None


def _listed(found: Stored) -> str:
    at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.at))
    return (
        f"</Key><LastModified>{at}</LastModified><ETag>{escape(found.etag)}</ETag><Size>{len(found.body)}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
    )


def _object_headers(found: Stored) -> str:
    at = formatdate(found.at, usegmt=True)
    return f"ETag: {found.etag}\r\nLast-Modified: {at}\r\nAccept-Ranges: bytes\r\nContent-Type: binary/octet-stream\r\n"


def _range(header: str, size: int) -> tuple[int, int]:
    first, _, last = header.removeprefix("bytes=").partition("-")
    if not first:
        return max(size - int(last), 0), size - 1
    return int(first), min(int(last), size - 1) if last else size - 1


def _texts(body: bytes, name: str) -> list[str]:
    """Return the texts of all elements of that name."""
    return [each.text or "" for each in ElementTree.fromstring(body).iter() if each.tag.rpartition("}")[2] == name]


def _xml(name: str, content: str) -> bytes:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    return response(f"{body}{content}</{name}>".encode(), headers="Content-Type: application/xml\r\n")


def _error(status: str, code: str) -> bytes:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{code}</Message></Error>'
    return response(body.encode(), status, "Content-Type: application/xml\r\n")


if __name__ == "__main__":
    serve(S3)
