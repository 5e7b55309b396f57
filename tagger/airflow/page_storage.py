"""How pages read storages: with clients that are kept, without retries, many at once, and never for long.

A page that waits is worse than one that says what does not answer, and whoever looks at it asks again anyway.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import boto3  # noqa: F401 - here, where the API server starts, and not at the first page

from tagger.airflow.connections import connections_from_airflow
from tagger.connections import Connections, s3_client
from tagger.exceptions import TaggerError
from tagger.storage import Storage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 8.0
"""For all that one page reads."""

KEPT_SECONDS = 300.0
"""After which a connection is looked up again; and at once when a page could not be read with it."""

THREADS = 64
"""A read that nobody waits for any more holds one until its client gives it up, which takes some seconds."""

Key = TypeVar("Key")
Read = TypeVar("Read")


class Clients:
    """S3 clients by connection id. Making one takes 50 to 200 ms, a page should not."""

    def __init__(self, connections: Connections = connections_from_airflow) -> None:
        self._connections = connections
        self._kept: dict[str, tuple[float, S3Client]] = {}
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}

    def storage(self, url: str, conn_id: str) -> Storage:
        """Return a storage.

        Raises:
            InputError: its connection cannot be used.
        """
        with self._lock:
            making = self._making.setdefault(conn_id, threading.Lock())
        with making:  # one slow connection holds up no other
            made, client = self._kept.get(conn_id, (0.0, None))
            if client is None or time.monotonic() > made + KEPT_SECONDS:
                client = s3_client(conn_id, self._connections, patient=False)
                self._kept[conn_id] = time.monotonic(), client
        return Storage(url, client)

    def forget(self, conn_id: str) -> None:
        """Look a connection up again the next time."""
        self._kept.pop(conn_id, None)


class Reading(NamedTuple, Generic[Read]):
    """What a read found, or why it found nothing."""

    found: Read | None = None
    problem: str | None = None


class Readers:
    """Threads for what pages read, and the patience that a page has for all of it."""

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        self.patience = patience
        self._threads = ThreadPoolExecutor(THREADS, "tagging-page")

    def read(self, reads: Mapping[Key, Callable[[], Read]], until: float | None = None) -> dict[Key, Reading[Read]]:
        """Do all reads at once; what failed has a problem, as has what has not ended in time.

        Args:
            reads: What to do, by any key.
            until: When patience ends, by the monotonic clock; by default `patience` from now.
        """
        started = {key: self._threads.submit(_told, read) for key, read in reads.items()}
        left = self.patience if until is None else until - time.monotonic()
        ended, _ = wait(started.values(), max(left, 0.0))
        late = Reading[Read](problem=f"storage has not answered within {self.patience:g} s; try again")
        return {key: each.result() if each in ended else late for key, each in started.items()}


def _told(read: Callable[[], Read]) -> Reading[Read]:
    try:
        return Reading(read())
    except TaggerError as e:
        return Reading(problem=str(e).splitlines()[0])
    except Exception as e:  # may quote anything
        logger.exception("a page cannot be read")
        return Reading(problem=f"unexpected {type(e).__name__}; the API server's log has more")
