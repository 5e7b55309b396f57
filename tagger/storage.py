"""S3 storage: small objects and files below one `s3://bucket/prefix`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from xml.etree import ElementTree

from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError
from botocore.parsers import ResponseParserError

from tagger.connections import Connections
from tagger.exceptions import InputError, StorageError, Unreachable
from tagger.s3_connection import no_credentials, s3_client, silent_endpoint

if TYPE_CHECKING:
    from botocore.awsrequest import AWSResponse
    from mypy_boto3_s3 import S3Client

NOT_FOUND = {"404", "NoSuchKey", "NotFound"}
CONFLICT = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
DENIED = {"403", "AccessDenied"}
WRONG_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}

RIGHTS = {
    "HeadBucket": "s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "GetObject": "s3:GetObject (or s3:ListBucket, where there is no such object)",
    "HeadObject": "s3:GetObject (or s3:ListBucket, where there is no such object)",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "DeleteObjects": "s3:DeleteObject",
}
"""What a request needs, where it is not named like the request."""

# urllib3 warns, with a traceback, of headers that are cut off, which `_check_length` and boto3 make an error
logging.getLogger("urllib3.connection").addFilter(lambda record: "Failed to parse headers" not in str(record.msg))


class Version(NamedTuple):
    """An object as it stands."""

    path: str
    written_at: datetime
    """By the clock of S3."""
    etag: str
    """Another one as soon as the object is written with another body."""
    size: int
    """In bytes."""


class Storage:
    """Objects below one URL, named by their path relative to it. Its methods may be called from many threads.

    Raises (all methods):
        Unreachable: the endpoint does not answer.
        InputError: the bucket is missing (`size` and `download` cannot tell that from a missing object), or access is
            denied.
        StorageError: anything else that S3 answers.
    """

    def __init__(self, url: str, client: S3Client) -> None:
        parts = urlsplit(url)
        self.url = url.rstrip("/")
        self.bucket = parts.netloc
        self._prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
        self._client = client
        client.meta.events.register("before-parse.s3.ListObjectsV2", _read_page, unique_id="tagger page")
        client.meta.events.register("after-call.s3.GetObject", _check_length, unique_id="tagger length")

    @classmethod
    def connect(cls, url: str, conn_id: str, connections: Connections) -> Storage:
        """Return the storage at `url`, with the client of an Airflow connection."""
        return cls(url, s3_client(conn_id, connections))

    def get(self, path: str) -> bytes | None:
        """Return an object's body, or None where there is none."""
        with self._errors(f"reading {path}"):
            try:
                return self._client.get_object(Bucket=self.bucket, Key=self._prefix + path)["Body"].read()
            except ClientError as e:
                if _code(e) in NOT_FOUND:
                    return None
                raise

    def size(self, path: str) -> int | None:
        """Return an object's size in bytes, or None where there is none."""
        with self._errors(f"looking for {path}"):
            try:
                return self._client.head_object(Bucket=self.bucket, Key=self._prefix + path)["ContentLength"]
            except ClientError as e:
                if _code(e) in NOT_FOUND:
                    return None
                raise

    def put(self, path: str, body: bytes) -> None:
        """Write an object, whole, in one request."""
        with self._errors(f"writing {path}"):
            self._client.put_object(Bucket=self.bucket, Key=self._prefix + path, Body=body)

    def create(self, path: str, body: bytes) -> bool:
        """Write an object unless it exists; return whether it was written."""
        with self._errors(f"writing {path}"):
            try:
                self._client.put_object(Bucket=self.bucket, Key=self._prefix + path, Body=body, IfNoneMatch="*")
            except ClientError as e:
                if _code(e) in CONFLICT:
                    return False
                raise
        return True

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield path and size of the objects whose path starts with `prefix`; 1,000 a request."""
        for item in self._listed(prefix):
            yield item["Key"][len(self._prefix) :], item["Size"]

    def list_versions(self, prefix: str) -> Iterator[Version]:
        """Yield the objects whose path starts with `prefix`, and how they stand; 1,000 a request."""
        for item in self._listed(prefix):
            written_at = datetime.fromisoformat(item["LastModified"])
            yield Version(item["Key"][len(self._prefix) :], written_at, item["ETag"], item["Size"])

    def folders(self, prefix: str) -> Sequence[str]:
        """Return the names of the folders right below `prefix`, which ends in a slash."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self._prefix + prefix, Delimiter="/"
        )
        skipped = len(self._prefix + prefix)
        with self._errors(f"listing {prefix}"):
            return [item["Prefix"][skipped:-1] for page in pages for item in page.get("CommonPrefixes", [])]

    def delete(self, path: str) -> None:
        """Delete an object; it need not exist."""
        with self._errors(f"deleting {path}"):
            self._client.delete_object(Bucket=self.bucket, Key=self._prefix + path)

    def delete_many(self, paths: Iterable[str]) -> None:
        """Delete objects, in no particular order, 1,000 a request; they need not exist."""
        left = iter(paths)
        while part := list(islice(left, 1000)):
            with self._errors(f"deleting {part[0]} and others"):
                keys = [{"Key": self._prefix + path} for path in part]
                answer: Any = self._client.delete_objects(
                    Bucket=self.bucket,
                    Delete={"Objects": keys, "Quiet": True},  # type: ignore[typeddict-item]
                )
                if errors := [error for error in answer.get("Errors", []) if error.get("Code") not in NOT_FOUND]:
                    raise ClientError({"Error": errors[0]}, "DeleteObjects")

    def upload(self, path: str, file: IO[bytes]) -> None:
        """Write a local file as an object, from its start; it appears whole or not at all. The file may be closed."""
        file.seek(0)
        with self._errors(f"writing {path}"):
            self._client.upload_fileobj(file, self.bucket, self._prefix + path)

    def download(self, path: str, file: IO[bytes]) -> None:
        """Write an object to an empty local file."""
        from s3transfer.exceptions import RetriesExceededError

        with self._errors(f"reading {path}"):
            try:
                self._client.download_fileobj(self.bucket, self._prefix + path, file)
            except RetriesExceededError as e:
                raise StorageError(f"{self.url}: reading {path}: {type(e.last_exception).__name__}") from None
        file.seek(0)

    def check(self, *, create: bool = False) -> bool:
        """Check that the bucket is there and may be used; return whether it was made now."""
        with self._errors("looking for the bucket"):
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as e:
                if not create or _code(e) not in NOT_FOUND | {"NoSuchBucket"}:
                    raise
                region = self._client.meta.region_name
                where: Any = {} if region == "us-east-1" else {"LocationConstraint": region}
                self._client.create_bucket(
                    Bucket=self.bucket, **({"CreateBucketConfiguration": where} if where else {})
                )
                return True
        return False

    def keeps_versions(self) -> bool | None:
        """Return whether old versions of objects are, or once were, kept; None where that may not be asked."""
        with self._errors("asking for the bucket's versioning"):
            try:
                return "Status" in self._client.get_bucket_versioning(Bucket=self.bucket)
            except ClientError as e:
                if _code(e) in DENIED | {"MethodNotAllowed", "NotImplemented"}:
                    return None
                raise

    def _listed(self, prefix: str) -> Iterator[Any]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self._prefix + prefix, PaginationConfig={"PageSize": 1000}
        )
        with self._errors(f"listing {prefix}"):
            for page in pages:
                yield from page.get("Contents", [])

    def _no_bucket(self) -> str:
        return f"{self.url}: no bucket `{self.bucket}` (`tagger check --create` makes it)"

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except ClientError as e:
            code = _code(e)
            if code == "NoSuchBucket" or (code == "404" and doing == "looking for the bucket"):
                raise InputError(self._no_bucket()) from None
            if e.operation_name not in self._client.meta.service_model.operation_names:
                raise InputError(f"{self.url}: {doing}: {no_credentials(e)}") from None
            if code in WRONG_KEYS:
                raise InputError(f"{self.url}: {doing}: access denied ({code}); check its connection's keys") from None
            if code in DENIED:
                raise InputError(f"{self.url}: {doing}: access denied ({code}): no right to {_right(e)}") from None
            if code.startswith("KMS."):
                raise InputError(f"{self.url}: {doing}: the bucket's KMS key cannot be used ({code})") from None
            raise StorageError(f"{self.url}: {doing}: S3 answered {code}") from None
        except (ConnectionError, HTTPClientError) as e:
            endpoint = silent_endpoint(e) or self._client.meta.endpoint_url
            raise Unreachable(f"{self.url}: {doing}: S3 does not answer at {endpoint}: {_kind(e)}") from None
        except BotoCoreError as e:
            raise InputError(f"{self.url}: {doing}: {e}") from None
        except (ResponseParserError, ValueError, KeyError):  # of boto3, which takes all headers to be there, and whole
            raise StorageError(f"{self.url}: {doing}: S3's answer is cut off, or damaged") from None


def _check_length(http_response: AWSResponse, parsed: dict[str, Any], **_: object) -> None:
    """Raise ResponseParserError where an object's length is missing, because the headers are cut off.

    Nobody could tell then that its body is, and boto3's download would never end.
    """
    if http_response.status_code < 300 and "ContentLength" not in parsed:
        raise ResponseParserError


def _read_page(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object) -> None:
    """Read the objects out of a page of a listing and leave boto3 the rest of it.

    boto3's own parser takes 50 to 100 ms for 1,000 objects, nearly all the time of a listing; this takes 2 ms. Signing,
    retries, errors and the decoding of the keys stay boto3's, and so does a page that is not as expected.
    """
    if response_dict["status_code"] != 200:
        return
    try:
        page = ElementTree.fromstring(response_dict["body"])
    except ElementTree.ParseError:
        return
    namespace = page.tag.removesuffix("ListBucketResult")
    key, size, time, etag = (f"{namespace}{name}" for name in ("Key", "Size", "LastModified", "ETag"))
    objects = page.findall(f"{namespace}Contents")
    if objects:
        customized_response_dict["Contents"] = [
            {
                "Key": item.findtext(key, ""),
                "Size": int(item.findtext(size, "0")),
                "LastModified": item.findtext(time, ""),
                "ETag": item.findtext(etag, ""),
            }
            for item in objects
        ]
        page[:] = [part for part in page if part.tag != objects[0].tag]
        response_dict["body"] = ElementTree.tostring(page)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _right(error: ClientError) -> str:
    """Return which right is missing: AWS names it in most of its messages, of which nothing else is shown."""
    named = re.search(r"not authorized to perform: (\w+:\w+)", error.response.get("Error", {}).get("Message", ""))
    return named[1] if named else RIGHTS.get(error.operation_name, f"s3:{error.operation_name}")


def _kind(error: BotoCoreError) -> str:
    return type(error).__name__
