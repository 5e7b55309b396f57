"""Access without keys, encryption, and the least rights: against what AWS answers, on loopback."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.providers.amazon.aws.hooks.base_aws import AwsBaseHook
from botocore.awsrequest import AWSResponse
from botocore.compat import HTTPHeaders

from demo.stand_in import error
from tagger.airflow.dataset_pages import DatasetPages
from tagger.airflow.page_storage import Clients, Readers
from tagger.airflow.run_page import RunPages
from tagger.airflow.tagged_dags import AirflowRun, TaggedDag, Where
from tagger.batch import wait_for_shards
from tagger.check import check
from tagger.clean import clean, find_overdue
from tagger.connections import Connection, Connections, connections_from_env, database
from tagger.exceptions import InputError, LLMStopped, TaggerError, Unreachable
from tagger.forget import Erasure
from tagger.load import load_back
from tagger.plan import plan
from tagger.redis_connection import RedisExtra
from tagger.report import report
from tagger.runs import Run
from tagger.s3_connection import AwsExtra, s3_client
from tagger.storage import Storage
from tagger.tag import tag
from tests.aws_servers import ROLE, Iam, InstanceMetadata, SecurityTokens, iam_enforced
from tests.databases import make_project, teach
from tests.project import Project
from tests.servers import S3Store, written_at

PAGE = Path(__file__).parents[1] / "docs" / "access.md"

SECRET = "s3cret-external-id"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without AWS's keys, on a machine that is none of EC2's; nobody waits between two tries."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    return monkeypatch


@pytest.fixture
def sts() -> Iterator[SecurityTokens]:
    with SecurityTokens() as server:
        yield server


def known(*connections: Connection) -> Connections:
    return {connection.conn_id: connection for connection in connections}.get


def of_role(store: S3Store, sts: SecurityTokens, **extra: Any) -> Connection:
    """Return a connection with keys that may do nothing but assume a role."""
    services = {"sts": {"endpoint_url": sts.endpoint}}
    extra = {"endpoint_url": store.endpoint, "service_config": services, "role_arn": ROLE} | extra
    return Connection("aws_default", "aws", login="AKIABASE", password="base-secret", extra=extra)


def opened(connection: Connection | None, store: S3Store) -> Storage:
    return Storage.connect(f"s3://{store.bucket}", "aws_default", known(*[connection] if connection else []))


def reconnect(project: Project, connection: Connection) -> None:
    """Give a project another connection of this id."""
    before = project.connections
    project.connections = (  # type: ignore[method-assign]
        lambda conn_id: connection if conn_id == connection.conn_id else before(conn_id)
    )


def asked_as(storage: Storage) -> list[str]:
    """Return a list to which the access key of each request is added from now on."""
    keys: list[str] = []

    def note(request: Any, **_: object) -> None:
        keys.append(re.findall(r"Credential=(\w+)/", request.headers["Authorization"].decode())[0])

    storage._client.meta.events.register("before-send.s3", note)
    return keys


# roles by the SDK's own chain


@pytest.fixture(params=["no connection", "connection without keys"])
def without_keys(
    request: pytest.FixtureRequest, s3_bucket: S3Store, environment: pytest.MonkeyPatch
) -> Connection | None:
    environment.setenv("AWS_ENDPOINT_URL_S3", s3_bucket.endpoint)
    return (
        None
        if request.param == "no connection"
        else Connection("aws_default", "aws", extra={"region_name": "eu-west-1"})
    )


def test_the_role_of_the_machine_is_taken_and_renewed(
    without_keys: Connection | None, s3_bucket: S3Store, environment: pytest.MonkeyPatch
) -> None:
    with InstanceMetadata() as metadata:
        environment.setenv("AWS_EC2_METADATA_DISABLED", "false")
        environment.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.endpoint)
        storage = opened(without_keys, s3_bucket)
        keys = asked_as(storage)
        storage.put("a", b"1")
        metadata.life = timedelta(hours=24)
        wait(storage, timedelta(hours=2))
        assert storage.get("a") == b"1"

    assert keys == ["ASIA1", "ASIA2"]


def test_the_role_of_a_web_identity_is_taken(
    without_keys: Connection | None,
    s3_bucket: S3Store,
    sts: SecurityTokens,
    tmp_path: Path,
    environment: pytest.MonkeyPatch,
) -> None:
    token = tmp_path / "token"
    token.write_text("of-the-pod")
    environment.setenv("AWS_ROLE_ARN", ROLE)
    environment.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    environment.setenv("AWS_ENDPOINT_URL_STS", sts.endpoint)

    storage = opened(without_keys, s3_bucket)
    keys = asked_as(storage)
    storage.put("a", b"1")

    [asked] = sts.asked
    assert asked["Action"] == "AssumeRoleWithWebIdentity"
    assert (asked["RoleArn"], asked["WebIdentityToken"]) == (ROLE, "of-the-pod")
    assert keys == ["ASIA1"]


def test_no_credentials_are_one_line(s3_bucket: S3Store, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AWS_ENDPOINT_URL_S3", s3_bucket.endpoint)

    with pytest.raises(InputError, match=r"^s3://\S+: reading a: Unable to locate credentials$"):
        opened(None, s3_bucket).get("a")


# roles that a connection names


def test_a_role_is_assumed_with_what_the_connection_says(s3_bucket: S3Store, sts: SecurityTokens) -> None:
    more = {"ExternalId": SECRET, "DurationSeconds": 900, "RoleSessionName": "nightly"}

    storage = opened(of_role(s3_bucket, sts, assume_role_kwargs=more), s3_bucket)
    keys = asked_as(storage)
    storage.put("a", b"1")

    [asked] = sts.asked
    expected = {"Action": "AssumeRole", "RoleArn": ROLE, "ExternalId": SECRET, "DurationSeconds": "900"}
    assert asked == expected | {"RoleSessionName": "nightly", "Version": "2011-06-15"}
    assert keys == ["ASIA1"]


@pytest.mark.parametrize("file_in", ["extra", "environment"])
def test_a_role_is_assumed_with_a_token_in_a_file(
    s3_bucket: S3Store, sts: SecurityTokens, tmp_path: Path, environment: pytest.MonkeyPatch, file_in: str
) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    sts.life = timedelta(seconds=2)
    extra = {
        "role_arn": ROLE,
        "assume_role_method": "assume_role_with_web_identity",
        "assume_role_with_web_identity_federation": "file",
        "endpoint_url": s3_bucket.endpoint,
        "service_config": {"sts": {"endpoint_url": sts.endpoint}},
    }
    if file_in == "extra":
        extra["assume_role_with_web_identity_token_file"] = str(token)
    else:
        environment.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))

    storage = opened(Connection("aws_default", "aws", extra=extra), s3_bucket)
    token.write_text("second")
    time.sleep(2.1)
    storage.put("a", b"1")

    assert [asked["Action"] for asked in sts.asked] == ["AssumeRoleWithWebIdentity"] * 2
    assert [asked["WebIdentityToken"] for asked in sts.asked] == ["first", "second"]


@pytest.mark.parametrize(
    "extra",
    [
        {"role_arn": ROLE},
        {"role_arn": ROLE, "assume_role_kwargs": {"ExternalId": SECRET, "DurationSeconds": 1800}},
        {"role_arn": ROLE, "assume_role_kwargs": {"RoleSessionName": "nightly"}},
        {
            "role_arn": ROLE,
            "assume_role_method": "assume_role_with_web_identity",
            "assume_role_with_web_identity_federation": "file",
            "assume_role_with_web_identity_token_file": "TOKEN",
            "assume_role_kwargs": {"RoleSessionName": "nightly"},
        },
    ],
    ids=["role", "external id", "session name", "web identity"],
)
@pytest.mark.parametrize("conn_id", ["aws_default", "Team A.prod"])
def test_sts_is_asked_as_the_provider_asks(
    s3_bucket: S3Store,
    sts: SecurityTokens,
    tmp_path: Path,
    environment: pytest.MonkeyPatch,
    extra: dict[str, Any],
    conn_id: str,
) -> None:
    token = tmp_path / "token"
    token.write_text("of-the-pod")
    text = json.dumps(extra | {"service_config": {"sts": {"endpoint_url": sts.endpoint}}})
    fields = {"conn_type": "aws", "login": "AKIABASE", "password": "base-secret"}
    fields["extra"] = text.replace("TOKEN", str(token))
    environment.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(fields))

    s3_client(conn_id, connections_from_env)
    of_provider = AwsBaseHook(conn_id, client_type="s3").get_session().get_credentials()
    assert of_provider is not None
    of_provider.get_frozen_credentials()

    ours, providers = sts.asked
    assert ours == providers


def test_credentials_of_a_role_are_renewed_before_they_expire(s3_bucket: S3Store, sts: SecurityTokens) -> None:
    """Hours in seconds: they live two or three, and new ones are asked for a second before they expire."""
    sts.life = timedelta(seconds=2)
    storage = opened(of_role(s3_bucket, sts), s3_bucket)
    keys = asked_as(storage)

    started = time.monotonic()
    while time.monotonic() < started + 5:
        storage.put("a", b"1")

    assert keys == sorted(keys, key=lambda key: int(key[4:]))
    assert 3 <= len(set(keys)) <= sts.given
    assert sts.given <= time.monotonic() - started + 2  # not with each request


def test_a_step_outlives_its_credentials(project: Project, sts: SecurityTokens) -> None:
    sts.life = timedelta(seconds=2)
    project.llm.latency = 0.4
    project.change(llm={"concurrency": 1})
    reconnect(project, of_role(project.store, sts))
    for number in range(10):
        project.put(number, f"apple {number}")
    run = project.take()
    plan(run, project.connections)
    given = sts.given

    assert tag(run, 1, project.connections) == {"tagged": 10}
    assert sts.given >= given + 2


def test_while_sts_does_not_answer_the_credentials_at_hand_serve_until_their_last_minute(
    s3_bucket: S3Store, sts: SecurityTokens, environment: pytest.MonkeyPatch
) -> None:
    storage = opened(of_role(s3_bucket, sts), s3_bucket)
    endpoint = sts.endpoint
    sts.stop()
    wait(storage, timedelta(minutes=58))
    storage.put("a", b"1")
    wait(storage, timedelta(minutes=59, seconds=30))

    with pytest.raises(Unreachable, match=f"S3 does not answer at {endpoint}: EndpointConnectionError"):
        storage.put("a", b"2")


def wait(storage: Storage, time: timedelta) -> None:
    """Let the storage's credentials believe that so much time has passed."""
    credentials: Any = storage._client._request_signer._credentials  # type: ignore[attr-defined]
    credentials._time_fetcher = lambda: datetime.now(UTC) + time


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "saml": ({"assume_role_method": "assume_role_with_saml"}, "`assume_role_method`: Input should be 'assume_role' or"),
    "no federation": (
        {"assume_role_method": "assume_role_with_web_identity"},
        "`assume_role_with_web_identity_federation`: expected `file`",
    ),
    "google": (
        {"assume_role_with_web_identity_federation": "google"},
        "`assume_role_with_web_identity_federation`: Input should be 'file'",
    ),
    "no token file": (
        {
            "assume_role_method": "assume_role_with_web_identity",
            "assume_role_with_web_identity_federation": "file",
        },
        "neither `assume_role_with_web_identity_token_file` nor $AWS_WEB_IDENTITY_TOKEN_FILE names a file",
    ),
    "missing token file": (
        {
            "assume_role_method": "assume_role_with_web_identity",
            "assume_role_with_web_identity_federation": "file",
            "assume_role_with_web_identity_token_file": "/no/token",
        },
        "the web identity token /no/token cannot be read: No such file or directory",
    ),
    "unknown argument": ({"assume_role_kwargs": {"ExternalID": SECRET}}, "`assume_role_kwargs`: expected arguments of"),
    "argument of another type": ({"assume_role_kwargs": {"ExternalId": [SECRET]}}, "`assume_role_kwargs`: expected"),
    "arguments that are none": ({"assume_role_kwargs": SECRET}, "`assume_role_kwargs`: Input should be a valid dict"),
}


@pytest.mark.parametrize(("extra", "found"), REFUSED.values(), ids=REFUSED.keys())
def test_a_role_that_cannot_be_assumed_is_one_line(
    s3_bucket: S3Store, sts: SecurityTokens, environment: pytest.MonkeyPatch, extra: dict[str, Any], found: str
) -> None:
    assert found in refusal(of_role(s3_bucket, sts, **extra))


def refusal(connection: Connection) -> str:
    with pytest.raises(InputError) as caught:
        s3_client("aws_default", known(connection))
    line = str(caught.value)
    assert line.startswith("connection `aws_default`: ")
    assert "\n" not in line
    assert SECRET not in line and "base-secret" not in line
    return line


def test_what_sts_refuses_is_one_line(s3_bucket: S3Store, sts: SecurityTokens, environment: pytest.MonkeyPatch) -> None:
    sts.refuses = "AccessDenied"
    ours = of_role(s3_bucket, sts, assume_role_kwargs={"ExternalId": SECRET})

    assert refusal(ours).endswith("no credentials: AssumeRole is answered with AccessDenied")


def test_a_role_that_is_taken_away_is_one_line(
    s3_bucket: S3Store, sts: SecurityTokens, environment: pytest.MonkeyPatch
) -> None:
    sts.life = timedelta(seconds=2)
    storage = opened(of_role(s3_bucket, sts, assume_role_kwargs={"ExternalId": SECRET}), s3_bucket)
    sts.refuses = "AccessDenied"
    wait(storage, timedelta(seconds=4))

    with pytest.raises(InputError, match=r"writing a: no credentials: AssumeRole is answered with AccessDenied$"):
        storage.put("a", b"1")


def test_sts_that_does_not_answer_is_one_line(
    s3_bucket: S3Store, sts: SecurityTokens, environment: pytest.MonkeyPatch
) -> None:
    ours, endpoint = of_role(s3_bucket, sts), sts.endpoint
    sts.stop()

    with pytest.raises(Unreachable, match=f"^connection `aws_default`: no credentials: {endpoint} does not answer$"):
        s3_client("aws_default", known(ours))


# encryption


def encrypting(project: Project, **extra_args: Any) -> None:
    """Let the project's connection encrypt what it writes."""
    found = project.connections("aws_default")
    assert found is not None
    reconnect(project, replace(found, extra=found.extra | {"service_config": {"s3": {"extra_args": extra_args}}}))


def test_all_that_a_run_writes_is_encrypted_as_the_connection_says(project: Project) -> None:
    encrypting(project, ServerSideEncryption="aws:kms", SSEKMSKeyId="alias/tagger", BucketKeyEnabled=True)
    project.put(1, "apple")
    project.put(2, "zebra")

    assert project.run("one").tagged == 2

    client = project.store.client()
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=project.store.bucket)["Contents"]]
    assert {key.split("/")[0] for key in keys} == {"cache", "history", "runs", "snapshots"}
    for key in keys:
        head = client.head_object(Bucket=project.store.bucket, Key=key)
        found = (head["ServerSideEncryption"], head["SSEKMSKeyId"], head["BucketKeyEnabled"])
        assert found == ("aws:kms", "alias/tagger", True), key


def test_each_way_to_write_is_encrypted(project: Project) -> None:
    encrypting(project, ServerSideEncryption="aws:kms", SSEKMSKeyId="alias/tagger")
    storage = project.open("any").storage

    storage.put("put", b"1")
    storage.create("create", b"1")
    storage.upload("small", io.BytesIO(b"1"))
    storage.upload("large", io.BytesIO(b"1" * 9_000_000))

    client = project.store.client()
    for key in ("put", "create", "small", "large"):
        head = client.head_object(Bucket=project.store.bucket, Key=key)
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "alias/tagger"), key


def test_nothing_is_asked_for_where_the_bucket_encrypts_by_itself(project: Project) -> None:
    project.put(1, "apple")
    project.run("one")

    client = project.store.client()
    [key, *_] = [item["Key"] for item in client.list_objects_v2(Bucket=project.store.bucket)["Contents"]]
    assert "SSEKMSKeyId" not in client.head_object(Bucket=project.store.bucket, Key=key)


@pytest.mark.parametrize(
    ("extra_args", "found"),
    [
        ({"SSEKMSKeyId": "k"}, "`service_config.s3.extra_args.ServerSideEncryption`: Field required"),
        ({"ServerSideEncryption": "kms"}, "`service_config.s3.extra_args.ServerSideEncryption`: Input should be"),
        (
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyID": "k"},
            "`service_config.s3.extra_args.SSEKMSKeyID`: Extra inputs are not permitted",
        ),
    ],
    ids=["key alone", "unknown kind", "mistyped"],
)
def test_encryption_that_is_not_understood_is_one_line(
    project: Project, extra_args: dict[str, Any], found: str
) -> None:
    encrypting(project, **extra_args)

    with pytest.raises(InputError, match=f"^connection `aws_default`: {re.escape(found)}"):
        project.open("any")


# rights

Policy = dict[str, Any]

RUNS, TAG, BATCHES = "The runs", "The tag step on spot machines", "The tag step with batches, besides"
PAGES, UPKEEP = "The pages", "Upkeep, besides"


def documented() -> dict[str, Policy]:
    """Return the policies of docs/access.md by the title above each."""
    titles = re.split(r"^#+ (.+)$", PAGE.read_text(), flags=re.M)[1:]
    parts = zip(titles[::2], titles[1::2], strict=True)
    return {title: blocks(text)[0] for title, text in parts if blocks(text)}


def blocks(text: str) -> list[Any]:
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.S)]


def rights(title: str) -> list[tuple[str, str]]:
    """Return each action of a policy with each resource."""
    statements = documented()[title]["Statement"]
    return [
        (action, resource)
        for statement in statements
        for action in listed(statement["Action"])
        for resource in listed(statement["Resource"])
    ]


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def allowing(pairs: list[tuple[str, str]], bucket: str) -> Policy:
    """Return a policy of these actions and resources, for a bucket of the tests."""
    statements = [
        {"Effect": "Allow", "Action": action, "Resource": resource.replace("my-bucket", bucket)}
        for action, resource in pairs
    ]
    return {"Version": "2012-10-17", "Statement": statements}


@pytest.fixture
def iam(s3_bucket: S3Store) -> Iterator[Iam]:
    with iam_enforced(s3_bucket) as iam:
        yield iam


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


@pytest.fixture
def shared(quick: Project, iam: Iam) -> Project:
    """A project in a bucket with others, with rows of two texts, whose user has no right yet."""
    return placed(quick, iam)


def placed(project: Project, iam: Iam) -> Project:
    """Put a project with two rows into a part of the bucket."""
    project.store = iam.user()
    project.content["storage"] = f"s3://{project.store.bucket}/tagger"
    project.put(1, "apple pie")
    project.put(2, "a zebra in the rain")
    return project


def as_user(project: Project, iam: Iam, *titles: str, but: tuple[str, str] | None = None) -> None:
    """Let the project go on with the rights of these policies, one action on one resource aside."""
    pairs = [pair for title in titles for pair in rights(title) if pair != but]
    project.store = iam.user(allowing(pairs, project.store.bucket))


def prefixes(*titles: str) -> list[str]:
    """Return the patterns of the policies' conditions."""
    conditions = (s.get("Condition") for title in titles for s in documented()[title]["Statement"])
    return [p for c in conditions if c for p in listed(c["StringLikeIfExists"]["s3:prefix"])]


def assert_listed_within(iam: Iam, *titles: str) -> None:
    assert iam.listed
    assert {prefix for prefix in iam.listed if not any(fnmatchcase(prefix, p) for p in prefixes(*titles))} == set()


def test_the_policies_are_well_formed() -> None:
    assert set(documented()) == {RUNS, TAG, BATCHES, PAGES, UPKEEP, "KMS"}
    for title, policy in documented().items():
        assert policy["Version"] == "2012-10-17", title
        for statement in policy["Statement"]:
            assert statement["Effect"] == "Allow"
            lists = statement["Action"] == "s3:ListBucket"
            assert lists == ("Condition" in statement)
            assert not lists or statement["Resource"] == "arn:aws:s3:::my-bucket"


def test_the_lifecycle_rule_is_well_formed(s3_bucket: S3Store) -> None:
    [rule] = [block for block in blocks(PAGE.read_text()) if "Rules" in block]

    client = s3_bucket.client()
    client.put_bucket_lifecycle_configuration(Bucket=s3_bucket.bucket, LifecycleConfiguration=rule)
    assert client.get_bucket_lifecycle_configuration(Bucket=s3_bucket.bucket)["Rules"] == rule["Rules"]


def test_without_rights_nothing_is_reached(shared: Project) -> None:
    with pytest.raises(InputError, match=r"looking for the bucket: access denied \(403\): no right to s3:ListBucket$"):
        shared.run()


def test_the_runs_work_with_the_documented_rights(shared: Project, iam: Iam) -> None:
    as_user(shared, iam, RUNS)

    list(check(shared.dataset, shared.connections))
    assert shared.run("first").tagged == 2
    shared.put(3, "sunshine")
    assert shared.run("second", all_rows=True).tagged == 1
    shared.change(prompt="Another prompt.", rollout={"texts_per_run": 2})
    assert shared.run("third").tagged == 2
    assert_listed_within(iam, RUNS)


@pytest.mark.parametrize("missing", rights(RUNS), ids=lambda pair: pair[0])
def test_each_right_of_the_runs_is_needed(shared: Project, iam: Iam, missing: tuple[str, str]) -> None:
    as_user(shared, iam, RUNS, but=missing)

    with pytest.raises(InputError, match=rf": access denied \(\w+\): no right to {missing[0]}\b"):
        shared.run()


def planned(project: Project, iam: Iam) -> Run:
    """Take and plan a run with the rights of the runs."""
    as_user(project, iam, RUNS)
    run = project.take("planned")
    plan(run, project.connections)
    return run


def failing_then_tagged(project: Project) -> dict[str, int]:
    """Tag a planned run twice, the first time in vain: the second asks the cache too."""
    project.llm.script(error(401, "Not now."), error(401, "Not now."))
    with pytest.raises(LLMStopped):
        tag(project.open("planned"), 1, project.connections)
    teach(project.llm)
    return tag(project.open("planned"), 1, project.connections)


def test_the_tag_step_works_with_the_documented_rights(shared: Project, iam: Iam) -> None:
    planned(shared, iam)
    as_user(shared, iam, TAG)
    iam.listed.clear()

    assert failing_then_tagged(shared) == {"tagged": 2}
    assert_listed_within(iam, TAG)


@pytest.mark.parametrize("missing", rights(TAG), ids=" ".join)
def test_each_right_of_the_tag_step_is_needed(shared: Project, iam: Iam, missing: tuple[str, str]) -> None:
    planned(shared, iam)
    as_user(shared, iam, TAG, but=missing)

    with pytest.raises(TaggerError, match=rf": access denied \(\w+\): no right to .*{missing[0]}\b"):
        failing_then_tagged(shared)


def test_the_tag_step_sees_no_other_rows_and_deletes_nothing(shared: Project, iam: Iam) -> None:
    run = planned(shared, iam)
    rows = run.snapshot().rows_file
    as_user(shared, iam, TAG)
    storage = shared.open("planned").storage

    with pytest.raises(InputError, match="no right to s3:GetObject"):
        storage.get(rows)
    for path in ("cache/x/tag_0.json", f"{run.files}plan.json", rows):
        with pytest.raises(InputError, match="no right to s3:DeleteObject"):
            storage.delete(path)
    for path in ("history/notes.json.gz", f"{run.files}plan.json", rows):
        with pytest.raises(InputError, match="no right to s3:PutObject"):
            storage.put(path, b"x")


def tagged_by_batch(project: Project) -> dict[str, int]:
    run = project.open("planned")
    wait_for_shards(run, [1], project.connections)
    return tag(run, 1, project.connections)


def test_the_tag_step_with_batches_works_with_the_documented_rights(
    shared: Project, iam: Iam, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.batch.FIRST_POLL_SECONDS", 0.05)
    shared.change(llm={"mode": "batch"})
    planned(shared, iam)
    as_user(shared, iam, TAG, BATCHES)
    iam.listed.clear()

    assert tagged_by_batch(shared) == {"tagged": 2}
    assert_listed_within(iam, TAG, BATCHES)


@pytest.mark.parametrize("missing", rights(BATCHES)[1:], ids=" ".join)
def test_each_right_of_the_batches_is_needed(
    shared: Project, iam: Iam, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, str]
) -> None:
    """That to list aside: the step has it by its other policy, for moto reads no condition."""
    monkeypatch.setattr("tagger.batch.FIRST_POLL_SECONDS", 0.05)
    shared.change(llm={"mode": "batch"})
    planned(shared, iam)
    as_user(shared, iam, TAG, BATCHES, but=missing)

    with pytest.raises(TaggerError, match=rf": access denied \(\w+\): no right to .*{missing[0]}\b"):
        tagged_by_batch(shared)


def shown(project: Project) -> list[str | None]:
    """Return the problems of all pages of a dataset and its run, None where they show all."""
    readers = Readers(Clients(project.connections), patience=60)
    where = Where(dataset="notes", storage=project.dataset.storage, conn_id="aws_default")
    dag = TaggedDag("tag_notes", is_broken=False, is_stale=False, next_run_at=None, where=where, latest=None)
    now = datetime.now(UTC)
    known = AirflowRun("planned", "success", now, now, None)
    pages = DatasetPages(readers)
    page = pages.page(dag, None, None, lambda *_: [known])
    run = RunPages(readers).page("tag_notes", known, [], where)
    assert page.card.problem or page.card.texts == 2
    assert run.problem or (run.summary and run.summary.texts == 2 and run.shards[0].tagged == 2)
    return [pages.cards([dag])[0].problem, page.card.problem, run.problem]


def reported(project: Project, iam: Iam) -> None:
    planned(project, iam)
    tag(project.open("planned"), 1, project.connections)
    load_back(project.open("planned"), project.connections)
    report(project.open("planned"))


def test_the_pages_work_with_the_documented_rights(shared: Project, iam: Iam) -> None:
    reported(shared, iam)
    as_user(shared, iam, PAGES)
    iam.listed.clear()

    assert shown(shared) == [None] * 3
    assert_listed_within(iam, PAGES)


def test_each_right_of_the_pages_is_needed(shared: Project, iam: Iam) -> None:
    reported(shared, iam)

    for missing in rights(PAGES):
        as_user(shared, iam, PAGES, but=missing)
        problems = "\n".join(filter(None, shown(shared)))
        assert re.search(rf"access denied \(\w+\): no right to .*{missing[0]}\b", problems), missing


def test_the_pages_read_no_texts_and_write_nothing(shared: Project, iam: Iam) -> None:
    reported(shared, iam)
    run = shared.open("planned")
    texts = [path for path, _ in run.storage.list(run.texts) if not path.endswith("/snapshot.json")]
    assert texts
    as_user(shared, iam, PAGES)
    storage = shared.open("planned").storage

    for path in texts:
        with pytest.raises(InputError, match="no right to s3:GetObject"):
            storage.get(path)
    with pytest.raises(InputError, match="no right to s3:PutObject"):
        storage.put("history/notes.json.gz", b"x")
    with pytest.raises(InputError, match="no right to s3:DeleteObject"):
        storage.delete("history/notes.json.gz")


@pytest.mark.parametrize("titles", [(RUNS, UPKEEP), (RUNS,)], ids=["both", "runs alone"])
def test_upkeep_works_with_the_documented_rights(shared: Project, iam: Iam, titles: tuple[str, ...]) -> None:
    shared.change(retention={"snapshots": "14d", "runs": "400d"})
    reported(shared, iam)
    as_user(shared, iam, *titles)
    shared.execute("DELETE FROM notes WHERE id = 2")
    iam.listed.clear()

    storage = shared.open("planned").storage
    written_at(shared.store, "tagger/", datetime.now(UTC) - timedelta(days=500))
    erasure = Erasure(shared.dataset, ["2"], shared.connections)
    found = erasure.find()
    told = "\n".join(erasure.describe(found))
    erasure.remove(found)
    deleted, problems = clean(find_overdue(storage, shared.dataset))

    assert deleted.runs == 1 and not problems
    assert set(shared.target()) == {1}
    assert ("s3:GetBucketVersioning is needed" in told) is (UPKEEP not in titles)
    assert_listed_within(iam, RUNS)


def test_a_role_of_iam_is_assumed_by_who_knows_its_external_id(project: Project, iam: Iam) -> None:
    bucket = placed(project, iam).store.bucket
    trust = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"AWS": "*"},
                "Action": "sts:AssumeRole",
                "Condition": {"StringEquals": {"sts:ExternalId": SECRET}},
            }
        ],
    }
    role = iam.role(f"role-{bucket}", trust, allowing(rights(RUNS), bucket))
    may_assume = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole", "Resource": role}],
    }
    user = iam.user(may_assume)

    def connect(external_id: str) -> None:
        extra = {
            "role_arn": role,
            "assume_role_kwargs": {"ExternalId": external_id},
            "endpoint_url": user.endpoint,
            "service_config": {"sts": {"endpoint_url": user.endpoint}},
        }
        reconnect(
            project, Connection("aws_default", "aws", login=user.access_key, password=user.secret_key, extra=extra)
        )

    connect("another")
    with pytest.raises(InputError, match=r"no credentials: AssumeRole is answered with AccessDenied$"):
        project.run()
    connect(SECRET)
    assert project.run().tagged == 2


# what S3 denies

DENIALS: dict[str, tuple[str, str]] = {
    "the key": (
        "User: arn:aws:sts::1:assumed-role/tagger/s is not authorized to perform: kms:GenerateDataKey on resource: "
        "arn:aws:kms:eu-central-1:1:key/k because no identity-based policy allows the kms:GenerateDataKey action",
        "access denied (AccessDenied): no right to kms:GenerateDataKey",
    ),
    "by name": (
        'User: arn:aws:iam::1:user/u is not authorized to perform: s3:PutObject on resource: "arn:aws:s3:::b/k" '
        "with an explicit deny in a resource-based policy",
        "access denied (AccessDenied): no right to s3:PutObject",
    ),
    "without a name": ("Access Denied", "access denied (AccessDenied): no right to s3:PutObject"),
}


@pytest.mark.parametrize(("message", "found"), DENIALS.values(), ids=DENIALS.keys())
def test_the_right_that_is_missing_is_named(s3_bucket: S3Store, message: str, found: str) -> None:
    with answering(s3_bucket, "AccessDenied", message) as storage, pytest.raises(InputError) as caught:
        storage.put("a", b"1")

    assert str(caught.value) == f"s3://{s3_bucket.bucket}: writing a: {found}"


def test_a_key_that_is_disabled_is_one_line(s3_bucket: S3Store) -> None:
    with (
        answering(s3_bucket, "KMS.DisabledException", "arn:… is disabled") as storage,
        pytest.raises(InputError) as caught,
    ):
        storage.put("a", b"1")

    found = "writing a: the bucket's KMS key cannot be used (KMS.DisabledException)"
    assert str(caught.value) == f"s3://{s3_bucket.bucket}: {found}"


@contextmanager
def answering(store: S3Store, code: str, message: str) -> Iterator[Storage]:
    """Yield a storage whose every request is answered with an error."""
    storage = opened(Connection("aws_default", "aws", login="a", password="b"), store)
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()

    def answer(request: Any, **_: object) -> Any:
        return AWSResponse(request.url, 403, HTTPHeaders(), SimpleNamespace(stream=lambda: [body]))

    storage._client.meta.events.register("before-send.s3", answer)
    yield storage


# the page

VARIABLES = re.findall(r"^AIRFLOW_CONN_(\w+)='(.*)'$", PAGE.read_text(), re.M)


@pytest.mark.parametrize(("name", "value"), VARIABLES, ids=[f"{name} {i}" for i, (name, _) in enumerate(VARIABLES)])
def test_each_connection_of_the_page_is_read_in_full(name: str, value: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv(f"AIRFLOW_CONN_{name}", value)
    connection = connections_from_env(name.lower())
    assert connection is not None

    if connection.conn_type == "aws":
        assert AwsExtra.model_validate(connection.extra).model_dump(exclude_unset=True) == connection.extra
    elif connection.conn_type == "redis":
        assert RedisExtra.model_validate(connection.extra).model_dump(exclude_unset=True) == connection.extra
    else:
        query = database(name.lower(), connections_from_env).url.query
        assert {key: query.get(key) for key in connection.extra} == connection.extra
