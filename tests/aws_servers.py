"""AWS's servers that give out credentials, on ports of 127.0.0.1, and moto with the rights of IAM enforced."""

from __future__ import annotations

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs

import boto3
import pytest

from demo.processes import LOOPBACK
from tests.servers import S3Store

ROLE = "arn:aws:iam::123456789012:role/tagger"


class CredentialServer(ABC):
    """Gives out one set of credentials after the other: `ASIA1`, `ASIA2` and so on, whose secret is `secret-of-…`."""

    def __init__(self, life: timedelta = timedelta(hours=1)) -> None:
        """Describes the server; `start` starts it. `life` is that of the next credentials."""
        self.life = life
        self.given = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def endpoint(self) -> str:
        """The server's URL."""
        assert self._server is not None
        return f"http://{LOOPBACK}:{self._server.server_address[1]}"

    def start(self) -> Self:
        """Starts the server in a thread."""
        answer = self.answer

        class Handler(BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                status, text = answer(self.command, self.path, dict(self.headers), body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Ends the server; a stopped one stays so."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        """Starts the server."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the server."""
        self.stop()

    @abstractmethod
    def answer(self, method: str, path: str, headers: dict[str, str], body: str) -> tuple[int, str]:
        """Returns status and body of the answer to a request."""

    def _next(self) -> dict[str, str]:
        self.given += 1
        key = f"ASIA{self.given}"
        expires = datetime.now(UTC) + self.life + timedelta(seconds=1)  # to the second, as AWS tells it
        return {
            "AccessKeyId": key,
            "SecretAccessKey": f"secret-of-{key}",
            "Token": f"token-of-{key}",
            "Expiration": f"{expires:%Y-%m-%dT%H:%M:%SZ}",
        }


class InstanceMetadata(CredentialServer):
    """The metadata service of an EC2 machine that has a role; version 2 only, which asks for a token."""

    def answer(self, method: str, path: str, headers: dict[str, str], body: str) -> tuple[int, str]:
        """Returns status and body of the answer to a request."""
        if (method, path) == ("PUT", "/latest/api/token"):
            return 200, "session"
        if {name.lower(): value for name, value in headers.items()}.get("x-aws-ec2-metadata-token") != "session":
            return 401, ""
        folder = "/latest/meta-data/iam/security-credentials/"
        if path == folder:
            return 200, "tagger"
        if path == folder + "tagger":
            return 200, json.dumps({"Code": "Success", "Type": "AWS-HMAC", **self._next()})
        return 404, ""


class SecurityTokens(CredentialServer):
    """STS, which lets everybody assume every role, or refuses it with the error code `refuses`."""

    def __init__(self, life: timedelta = timedelta(hours=1)) -> None:
        """Describes the server; `start` starts it."""
        super().__init__(life)
        self.asked: list[dict[str, str]] = []
        self.refuses: str | None = None

    def answer(self, method: str, path: str, headers: dict[str, str], body: str) -> tuple[int, str]:
        """Returns status and body of the answer to a request."""
        request = {name: values[0] for name, values in parse_qs(body).items()}
        self.asked.append(request)
        if self.refuses is not None:
            message = f"told {request}"
            return (
                403,
                f"<ErrorResponse><Error><Code>{self.refuses}</Code><Message>{message}</Message></Error></ErrorResponse>",
            )
        given = self._next()
        given["SessionToken"] = given.pop("Token")
        credentials = "".join(f"<{name}>{value}</{name}>" for name, value in given.items())
        action = request["Action"]
        return (
            200,
            f"<{action}Response><{action}Result><Credentials>{credentials}</Credentials></{action}Result></{action}Response>",
        )


@dataclass
class Iam:
    """moto's IAM over a bucket, enforced: users, and what they asked for."""

    store: S3Store
    listed: set[str] = field(default_factory=set)
    """The prefixes that were asked for."""

    def user(self, *policies: dict[str, Any]) -> S3Store:
        """Return the bucket with the keys of a new user, who has these policies."""
        from moto.core.authorization import disable_iam_authentication

        with disable_iam_authentication():
            iam = self.client("iam")
            name = f"user{len(iam.list_users()['Users'])}"
            iam.create_user(UserName=name)
            for number, policy in enumerate(policies):
                iam.put_user_policy(UserName=name, PolicyName=f"p{number}", PolicyDocument=json.dumps(policy))
            keys = iam.create_access_key(UserName=name)["AccessKey"]
        return replace(self.store, access_key=keys["AccessKeyId"], secret_key=keys["SecretAccessKey"])

    def role(self, name: str, trust: dict[str, Any], policy: dict[str, Any]) -> str:
        """Return the ARN of a new role, who may assume it, and what it may do."""
        from moto.core.authorization import disable_iam_authentication

        with disable_iam_authentication():
            iam = self.client("iam")
            made = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))["Role"]
            iam.put_role_policy(RoleName=name, PolicyName="p", PolicyDocument=json.dumps(policy))
        return str(made["Arn"])

    def client(self, service: str) -> Any:
        """Return a client that does not look at who asks."""
        return boto3.client(  # type: ignore[call-overload]
            service,
            region_name="us-east-1",
            endpoint_url=self.store.endpoint,
            aws_access_key_id="AKIAADMIN",
            aws_secret_access_key="admin",
        )


@contextmanager
def iam_enforced(store: S3Store) -> Iterator[Iam]:
    """Let moto enforce the rights of IAM, as S3 does and moto does not where it has a shorter way.

    S3 has no right `HeadBucket`, which is `ListBucket`'s, says 403 of an object that is not there to who may not list
    the bucket, and looks at each key of a deletion in bulk. moto reads no conditions: `Iam.listed` has the prefixes
    that a condition must let through.
    """
    from moto.core.authorization import enable_iam_authentication
    from moto.s3.responses import ACTION_MAP, S3Response

    iam = Iam(store)
    authorize: Callable[..., None] = S3Response._authenticate_and_authorize_s3_action

    def as_s3_does(self: Any, bucket_name: str | None = None, key_name: str | None = None) -> None:
        action = self.data.get("Action")
        in_bulk = action == "DeleteObject" and key_name is None
        for key in re.findall("<Key>(.*?)</Key>", self.raw_body.decode()) if in_bulk else [key_name]:
            authorize(self, bucket_name=bucket_name, key_name=key)
        if action == "ListBucket" and "prefix" in self.querystring:
            iam.listed.add(self.querystring["prefix"][0])
        if key_name and action == "GetObject" and self.backend.get_object(bucket_name, key_name) is None:
            self.data["Action"] = "ListBucket"
            authorize(self, bucket_name=bucket_name)
            self.data["Action"] = action

    with pytest.MonkeyPatch.context() as patch, enable_iam_authentication():
        patch.setitem(ACTION_MAP["BUCKET"]["HEAD"], "DEFAULT", "ListBucket")
        patch.setattr(S3Response, "_authenticate_and_authorize_s3_action", as_s3_does)
        yield iam
