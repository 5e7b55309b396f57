"""The S3 client of an Airflow `aws` connection: whose credentials it has, and how what it writes is encrypted."""

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from tagger.connections import Connection, Connections, first_mistake
from tagger.exceptions import InputError, Unreachable

if TYPE_CHECKING:
    import boto3
    from botocore.config import Config
    from botocore.credentials import RefreshableCredentials
    from botocore.exceptions import BotoCoreError, ClientError
    from mypy_boto3_s3 import S3Client

MAX_S3_CONNECTIONS = 256
"""Kept open at most; they are opened as they are needed."""

RENEWAL_SECONDS = 15 * 60
"""How long before they expire the credentials of a role are renewed; half their life at most."""

LAST_SECONDS = 60
"""Until then before they expire, credentials serve on where they cannot be renewed; a quarter of their life at most."""


class S3ExtraArgs(BaseModel):
    """What goes with everything that is written, as boto3 and Airflow's `S3Hook` name it."""

    model_config = ConfigDict(extra="forbid")

    ServerSideEncryption: Literal["AES256", "aws:kms", "aws:kms:dsse"]
    SSEKMSKeyId: str | None = None
    BucketKeyEnabled: bool | None = None


class StsService(BaseModel):
    """What a connection says of STS."""

    endpoint_url: str | None = None


class S3Service(BaseModel):
    """What a connection says of S3."""

    endpoint_url: str | None = None
    extra_args: S3ExtraArgs | None = None


class AwsServices(BaseModel):
    """`service_config` of an `aws` connection's extra."""

    s3: S3Service = S3Service()
    sts: StsService = StsService()


class AwsExtra(BaseModel):
    """What is read of an `aws` connection's extra, as Airflow's provider names it."""

    aws_access_key_id: str | None = None
    aws_secret_access_key: str | None = None
    aws_session_token: str | None = None
    region_name: str | None = None
    profile_name: str | None = None
    endpoint_url: str | None = None
    service_config: AwsServices = AwsServices()
    role_arn: str | None = None
    assume_role_method: Literal["assume_role", "assume_role_with_web_identity"] = "assume_role"
    assume_role_kwargs: dict[str, Any] = {}
    assume_role_with_web_identity_federation: Literal["file"] | None = None
    assume_role_with_web_identity_token_file: str | None = None


def s3_client(conn_id: str, connections: Connections, *, patient: bool = True) -> "S3Client":
    """Return an S3 client for an Airflow `aws` connection, or for the AWS SDK's own chain where there is none.

    Read of the connection: login and password (the key pair; or `aws_access_key_id` and `aws_secret_access_key` of its
    extra), and of its extra `aws_session_token`, `region_name`, `profile_name`, `endpoint_url`, `service_config.s3`
    (`endpoint_url`, `extra_args`), `service_config.sts.endpoint_url`, and of a role `role_arn` and `assume_role_…`. The
    credentials of a role are asked for here, and renewed before they expire. A client that is not `patient` gives up
    within seconds: somebody waits for a page.

    Raises:
        InputError: the connection makes no client, or the role is refused.
        Unreachable: who gives the credentials does not answer.
    """
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError, ParamValidationError

    name = f"connection `{conn_id}`"
    connection = connections(conn_id)
    try:
        extra = AwsExtra.model_validate(connection.extra if connection else {})
    except ValidationError as e:
        raise InputError(f"{name}: {first_mistake(e)}") from None
    endpoint = extra.service_config.s3.endpoint_url or extra.endpoint_url
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=10 if patient else 3,
        read_timeout=30 if patient else 5,
        max_pool_connections=MAX_S3_CONNECTIONS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "total_max_attempts": 7 if patient else 1},
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    try:
        session = _session(connection, extra)
        region = session.region_name or "us-east-1"
        if extra.role_arn:
            session = _session_of(_role_credentials(conn_id, extra, session, region, config))
        elif credentials := session.get_credentials():
            credentials.get_frozen_credentials()
        client = session.client("s3", region_name=region, endpoint_url=endpoint, config=config)
    except ClientError as e:
        raise InputError(f"{name}: {no_credentials(e)}") from None
    except (ConnectionError, HTTPClientError) as e:
        raise Unreachable(f"{name}: no credentials: {silent_endpoint(e)} does not answer") from None
    except ParamValidationError:  # it quotes the values
        raise InputError(f"{name}: `assume_role_kwargs`: expected arguments of STS, such as ExternalId") from None
    except (BotoCoreError, ValueError, RuntimeError) as e:
        raise InputError(f"{name}: {e}") from None
    except OSError as e:
        raise InputError(f"{name}: the web identity token {e.filename} cannot be read: {e.strerror}") from None
    if extra.service_config.s3.extra_args is not None:
        _send_with_writes(client, extra.service_config.s3.extra_args)
    return client


def no_credentials(error: "ClientError") -> str:
    """Return what is wrong where it is not S3 that answered with an error, but who gives the credentials."""
    return f"no credentials: {error.operation_name} is answered with {error.response['Error']['Code']}"


def silent_endpoint(error: "BotoCoreError") -> str | None:
    """Return the endpoint that did not answer, which may be that of STS; None where the error does not tell."""
    url = urlsplit(error.kwargs.get("endpoint_url") or "")
    return f"{url.scheme}://{url.netloc}" if url.netloc else None


def _session(connection: Connection | None, extra: AwsExtra) -> "boto3.Session":
    import boto3

    keys = (extra.aws_access_key_id, extra.aws_secret_access_key)
    if connection is not None and connection.login and connection.password:
        keys = (connection.login, connection.password)
    return boto3.Session(
        aws_access_key_id=keys[0] if all(keys) else None,
        aws_secret_access_key=keys[1] if all(keys) else None,
        aws_session_token=extra.aws_session_token,
        region_name=extra.region_name,
        profile_name=extra.profile_name,
    )


def _role_credentials(
    conn_id: str, extra: AwsExtra, session: "boto3.Session", region: str, config: "Config"
) -> "RefreshableCredentials":
    """Return the credentials of the connection's role, assumed as Airflow's provider does."""
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.credentials import RefreshableCredentials

    token = _token_file(conn_id, extra) if extra.assume_role_method == "assume_role_with_web_identity" else None
    if token is not None:
        config = config.merge(Config(signature_version=UNSIGNED))
    sts = session.client("sts", region_name=region, endpoint_url=extra.service_config.sts.endpoint_url, config=config)
    request = {
        "RoleSessionName": re.sub(r"[^\w+=,.@-]+", "-", f"airflow_{conn_id.lower()}"),
        **extra.assume_role_kwargs,
        "RoleArn": extra.role_arn,
    }

    def assume() -> dict[str, str]:
        if token is None:
            found = sts.assume_role(**request)["Credentials"]
        else:
            found = sts.assume_role_with_web_identity(**request, WebIdentityToken=token.read_text())["Credentials"]
        return {
            "access_key": found["AccessKeyId"],
            "secret_key": found["SecretAccessKey"],
            "token": found["SessionToken"],
            "expiry_time": found["Expiration"].isoformat(),
        }

    first = assume()
    seconds = int((datetime.fromisoformat(first["expiry_time"]) - datetime.now(UTC)).total_seconds())
    return RefreshableCredentials.create_from_metadata(
        first,
        refresh_using=assume,
        method=extra.assume_role_method,
        advisory_timeout=min(RENEWAL_SECONDS, seconds // 2),
        mandatory_timeout=min(LAST_SECONDS, seconds // 4),
    )


def _token_file(conn_id: str, extra: AwsExtra) -> Path:
    if extra.assume_role_with_web_identity_federation is None:
        raise InputError(f"connection `{conn_id}`: `assume_role_with_web_identity_federation`: expected `file`")
    path = extra.assume_role_with_web_identity_token_file or os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE")
    if not path:
        raise InputError(
            f"connection `{conn_id}`: neither `assume_role_with_web_identity_token_file` nor "
            "$AWS_WEB_IDENTITY_TOKEN_FILE names a file"
        )
    return Path(path)


def _session_of(credentials: "RefreshableCredentials") -> "boto3.Session":
    import boto3
    import botocore.session

    session = botocore.session.get_session()
    # botocore has no public way to give a session credentials that are renewed
    session._credentials = credentials  # type: ignore[attr-defined]
    return boto3.Session(botocore_session=session)


def _send_with_writes(client: "S3Client", extra_args: S3ExtraArgs) -> None:
    """Let the client send these arguments with each object that it writes, in whichever way it does."""
    sent = extra_args.model_dump(exclude_none=True)
    for operation in ("PutObject", "CreateMultipartUpload", "CopyObject"):
        client.meta.events.register(f"provide-client-params.s3.{operation}", lambda params, **_: params | sent)
