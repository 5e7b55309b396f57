"""MySQL and MariaDB: how a connection reaches them, what their errors may say, and the lock of the one who writes."""

import hashlib
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError, field_validator

from tagger.connections import Connection, first_mistake
from tagger.exceptions import InputError, TaggerError

if TYPE_CHECKING:
    import sqlalchemy as sa

OLDEST = {"MySQL": (8, 0, 17), "MariaDB": (10, 6)}
"""The first version with a collation in which ids are what they are in Python, and the oldest that was maintained."""

CONNECT_SECONDS = 15

LOCK_SECONDS = 600
"""How long a load waits for another one into the same table."""

DENIED = 1044
"""Number of the error that an account has no such right in the database."""

READ_ONLY = 1290
"""Number of the error that the server has an option against the statement, such as `read_only`."""

SESSION = "SET SESSION time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'"
"""Instants go out and come in as UTC; a value that does not fit is an error, and is not cut."""

SPEAKING_ERRORS = frozenset(
    (
        *(1021, 1030, 1040, 1041, 1044, 1045, 1046, 1048, 1049, 1053, 1054, 1071, 1104, 1114, 1118, 1129, 1130, 1142),
        *(1143, 1146, 1153, 1158, 1159, 1160, 1161, 1203, 1205, 1206, 1213, 1226, 1227, 1264, 1267, 1290, 1317, 1356),
        *(1370, 1406, 1665, 1785, 1792, 1836, 1927, 1969, 2003, 2006, 2013, 3024, 3159, 3819, 4025, 4031),
    )
)
"""Numbers of errors whose messages name tables, columns, accounts and limits, never a row's values."""


class MysqlTls(BaseModel):
    """`ssl` of a `mysql` connection's extra."""

    ca: str | None = None
    capath: str | None = None
    cert: str | None = None
    key: str | None = None
    cipher: str | None = None


class MysqlExtra(BaseModel):
    """What is read of a `mysql` connection's extra, as Airflow's provider names it."""

    ssl: MysqlTls | None = None
    ssl_mode: Literal["DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY"] | None = None
    unix_socket: str | None = None

    @field_validator("ssl", mode="before")
    @classmethod
    def _as_json(cls, value: Any) -> Any:
        """The extra of a URI has it as text."""
        return json.loads(value) if isinstance(value, str) else value

    @property
    def mode(self) -> str:
        """Return the `ssl_mode`, by default that of MySQL's own clients."""
        if self.ssl_mode is not None:
            return self.ssl_mode
        if self.ssl is None:
            return "PREFERRED"
        return "VERIFY_CA" if self.ssl.ca or self.ssl.capath else "REQUIRED"


def connect_arguments(connection: Connection) -> dict[str, Any]:
    """Return PyMySQL's arguments for an Airflow `mysql` connection.

    Read of the connection: host, port, login, password, schema (the database), and of its extra `unix_socket`,
    `ssl` (`ca`, `capath`, `cert`, `key`, `cipher`) and `ssl_mode`. Without the last two the connection is encrypted
    where the server can. The character set is utf8mb4, always.

    Raises:
        InputError: a wrong value, or a certificate that cannot be read.
    """
    try:
        extra = MysqlExtra.model_validate(connection.extra)
        tls = _tls(extra)
    except ValidationError as e:
        raise InputError(f"connection `{connection.conn_id}`: {first_mistake(e)}") from None
    except (OSError, ValueError) as e:  # of the files, and of their form
        raise InputError(f"connection `{connection.conn_id}`: `ssl`: {e}") from None
    return {
        "charset": "utf8mb4",
        "connect_timeout": CONNECT_SECONDS,
        "init_command": SESSION,
        "unix_socket": extra.unix_socket,
        **tls,
    }


def _tls(extra: MysqlExtra) -> dict[str, Any]:
    """Return PyMySQL's arguments: without any it takes TLS where the server has it, with a context it insists on it."""
    if extra.mode == "DISABLED":
        return {"ssl_disabled": True}
    if extra.ssl is None and extra.mode == "PREFERRED":
        return {}
    given = extra.ssl or MysqlTls()
    tls = ssl.create_default_context(cafile=given.ca, capath=given.capath)
    tls.verify_flags &= ~ssl.VERIFY_X509_STRICT  # which the certificates that servers make for themselves do not pass
    tls.check_hostname = extra.mode == "VERIFY_IDENTITY"
    if not extra.mode.startswith("VERIFY"):
        tls.verify_mode = ssl.CERT_NONE
    if given.cert:
        tls.load_cert_chain(given.cert, given.key)
    if given.cipher:
        tls.set_ciphers(given.cipher)
    return {"ssl": tls}


def server_error(error: BaseException | None) -> tuple[int, str] | None:
    """Return number and message of an error of MySQL; None where it is none."""
    match getattr(error, "args", ()):
        case (int(number), str(message)):
            return number, message
    return None


def is_mariadb(dialect: "sa.Dialect") -> bool:
    """Return whether the server is MariaDB, which has some things under other names."""
    return bool(getattr(dialect, "is_mariadb", False))


def check_version(dialect: "sa.Dialect", conn_id: str) -> None:
    """Raise InputError where the server is too old."""
    name = "MariaDB" if is_mariadb(dialect) else "MySQL"
    found = dialect.server_version_info or ()
    if found < OLDEST[name]:
        shown, oldest = (".".join(map(str, version)) for version in (found, OLDEST[name]))
        raise InputError(f"connection `{conn_id}`: it is {name} {shown}; {name} {oldest} or later is needed")


def takes_writes(connection: "sa.Connection") -> bool:
    """Return whether the server takes writes of this account; one with `read_only` does of administrators only."""
    return _refusal(connection, "START TRANSACTION READ WRITE", READ_ONLY) is None


def check_rights(connection: "sa.Connection", conn_id: str) -> None:
    """Raise InputError where the account may not make the temporary table that a load puts its rows into."""
    message = _refusal(connection, "CREATE TEMPORARY TABLE tagger_check (n INT PRIMARY KEY)", DENIED)
    if message is not None:
        raise InputError(f"connection `{conn_id}`: CREATE TEMPORARY TABLES is not granted: {message}")


def _refusal(connection: "sa.Connection", statement: str, expected: int) -> str | None:
    """Return what the server says where it refuses a statement with the expected error; None where it runs it."""
    from sqlalchemy.exc import OperationalError

    try:
        connection.exec_driver_sql(statement)
    except OperationalError as e:
        number, message = server_error(e.orig) or (None, "")
        if number != expected:
            raise
        return message
    return None


@contextmanager
def abandoned_on_error(connection: "sa.Connection") -> Iterator[None]:
    """Let go of a MySQL connection when the block fails: to end a query, PyMySQL would first read all rows left."""
    if connection.dialect.name != "mysql":
        yield
        return
    driver: Any = connection.connection.dbapi_connection
    try:
        yield
    except BaseException:
        if driver._result is not None:
            driver._result.unbuffered_active = False
        if not connection.invalidated:
            connection.invalidate()
        raise


@contextmanager
def only_session(connection: "sa.Connection", schema: str | None, table: str) -> Iterator[None]:
    """Keep other sessions out that want the same table; the lock goes with the session where that is lost.

    Raises:
        TaggerError: another one has kept it for too long.
    """
    # names are the server's, whatever the database, and have 64 characters at most
    place = f"{schema or connection.engine.url.database}.{table}"
    name = f"tagger {hashlib.sha256(place.encode()).hexdigest()[:32]}"
    with connection.begin():
        taken = connection.exec_driver_sql("SELECT GET_LOCK(%s, %s)", (name, LOCK_SECONDS)).scalar_one()
    if taken != 1:
        raise TaggerError(f"table {place}: another load has been at work for {LOCK_SECONDS} s; try again later")
    try:
        yield
    finally:
        if not connection.invalidated:
            with connection.begin():
                connection.exec_driver_sql("SELECT RELEASE_LOCK(%s)", (name,))
