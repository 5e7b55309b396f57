"""An environment without the user's accounts, and the servers the tests share.

Each server starts when a test first asks for it; under pytest-xdist each worker has its own.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import botocore.loaders
import botocore.session
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FOREIGN = ("AIRFLOW_", "AWS_", "OPENAI_", "TAGGER_")


def _isolate(home: Path) -> None:
    """Points Airflow and AWS to nothing but `home`; Airflow reads these variables when it is first imported."""
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    os.environ.update(
        AIRFLOW_HOME=str(home),
        AIRFLOW__CORE__DAGS_FOLDER=str(REPOSITORY / "dags"),
        AIRFLOW__CORE__LOAD_EXAMPLES="False",
        AIRFLOW__CORE__PLUGINS_FOLDER=str(REPOSITORY / "plugins"),
        AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{home / 'airflow.db'}",
        AWS_CONFIG_FILE=str(home / "no-aws-config"),
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        AWS_SHARED_CREDENTIALS_FILE=str(home / "no-aws-credentials"),
        NO_PROXY="127.0.0.1,localhost",
        no_proxy="127.0.0.1,localhost",
    )


AIRFLOW_HOME = Path(tempfile.mkdtemp(prefix="tagger-tests-"))
_isolate(AIRFLOW_HOME)
sys.path.insert(0, str(REPOSITORY))

# each client reads AWS's descriptions of its services again, for 0.1 s; tests make thousands of clients
botocore.session.create_loader = functools.cache(botocore.loaders.create_loader)

from demo.postgresql import PostgreSQL  # noqa: E402
from demo.seaweedfs import SeaweedFS  # noqa: E402 - after the environment is ours
from demo.stand_in import StandIn  # noqa: E402
from tagger.connections import Connection  # noqa: E402
from tests.databases import DATABASES, make_project, redis_connection  # noqa: E402
from tests.mariadb import WITHOUT, MariaDB, is_installed  # noqa: E402
from tests.project import Project, sqlite_project  # noqa: E402
from tests.servers import Moto, RedisServer, S3Store  # noqa: E402


def pytest_unconfigure() -> None:
    """Removes what Airflow left in its home."""
    shutil.rmtree(AIRFLOW_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Store]:
    """An S3 server on disk, with a bucket."""
    home = tmp_path_factory.mktemp("seaweedfs")
    with SeaweedFS(home / "data", home / "seaweedfs.log") as server:
        store = S3Store(server.endpoint, server.access_key, server.secret_key, "tagger")
        yield _with_bucket(store)


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    """A PostgreSQL server; a test that writes creates a database of its own."""
    with PostgreSQL(tmp_path_factory.mktemp("postgresql")) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    """A MariaDB server; a test that writes creates a database of its own."""
    if not is_installed():
        pytest.skip(WITHOUT)
    with MariaDB(tmp_path_factory.mktemp("mariadb")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis server with a password; a test that pauses or kills one starts its own."""
    with RedisServer(tmp_path_factory.mktemp("redis"), password=secrets.token_hex(16)) as server:
        yield server


@pytest.fixture
def redis_default(redis_server: RedisServer) -> Connection:
    """The connection of an empty Redis database, not the first one: for `project.redis`."""
    with redis_server.client() as client:
        client.flushall()
    return redis_connection(redis_server)


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Store]:
    """An S3 server in memory, with a bucket."""
    with Moto() as server:
        yield _with_bucket(S3Store(server.endpoint, "moto", "moto", "tagger"))


@pytest.fixture
def s3_bucket(moto_server: S3Store) -> S3Store:
    """A bucket of its own for each test, in the S3 server in memory."""
    bucket = f"test-{secrets.token_hex(8)}"
    return _with_bucket(S3Store(moto_server.endpoint, moto_server.access_key, moto_server.secret_key, bucket))


def _with_bucket(store: S3Store) -> S3Store:
    client = store.client()
    client.create_bucket(Bucket=store.bucket)
    # SeaweedFS makes a bucket's volumes at its first object: not while many threads wait for them
    client.put_object(Bucket=store.bucket, Key="first", Body=b"first")
    client.delete_object(Bucket=store.bucket, Key="first")
    return store


@pytest.fixture
def llm() -> Iterator[StandIn]:
    """An offline stand-in that nobody has asked yet."""
    with StandIn(keep_texts=True) as stand_in:
        yield stand_in


@pytest.fixture(params=DATABASES)
def either(request: pytest.FixtureRequest) -> Project:
    """A dataset over each of the databases in turn, moto and the stand-in."""
    return make_project(request.param, request)


@pytest.fixture
def project(tmp_path: Path, s3_bucket: S3Store, llm: StandIn) -> Project:
    """A dataset over SQLite, moto and the stand-in."""
    return sqlite_project(tmp_path, s3_bucket, llm)
