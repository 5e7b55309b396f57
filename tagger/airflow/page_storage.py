"""How pages read storages: with clients that are kept, without retries, and never for long.

A page that waits is worse than one that says what does not answer, and whoever looks at it asks again anyway. Each
storage has threads of its own, so that one that hangs holds up no page of another.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar

import boto3  # noqa: F401 - here, where the API server starts, and not at the first page

from tagger.airflow.connections import connections_from_airflow
from tagger.connections import Connections
from tagger.exceptions import InputError, TaggerError, Unreachable
from tagger.s3_connection import s3_client
from tagger.storage import Storage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 8.0
"""For all that one page reads."""

REST_SECONDS = 10.0
"""How long a storage that did not answer is not asked again: the pages say at once what it said, or did not."""

KEPT_SECONDS = 300.0
"""After which a connection is looked up again; and at once when storage could not be reached with it."""

PAGES, TURN_SECONDS = 8, 0.5
"""How many pages wait for one storage at once, and how long another one waits for its turn. Each page that waits holds
one of the API server's own threads, of which there are 40."""

What = Literal["files", "shards", "cards", "page"]

THREADS: Mapping[What, int] = {"files": 8, "shards": 4, "cards": 1, "page": 1}
"""Of each storage. Reading files is waiting; unpacking shards and histories takes memory and the API server's time, and
is not sooner done by more threads: 16 shards of 62,500 texts each take half a second, 1,100 runs 0.1 s. A page does not
wait behind the cards of all datasets."""

Key = TypeVar("Key")
Read = TypeVar("Read")


class Place(NamedTuple):
    """A storage, and the connection that it is read with."""

    conn_id: str
    url: str


class Clients:
    """S3 clients by connection id. Making one takes 50 to 200 ms, a page should not."""

    def __init__(self, connections: Connections = connections_from_airflow) -> None:
        self._connections = connections
        self._kept: dict[str, tuple[float, S3Client]] = {}
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}

    def storage(self, place: Place) -> Storage:
        """Return a storage.

        Raises:
            InputError: its connection cannot be used.
        """
        with self._lock:
            making = self._making.setdefault(place.conn_id, threading.Lock())
        with making:  # one slow connection holds up no other
            made, client = self._kept.get(place.conn_id, (0.0, None))
            if client is None or time.monotonic() > made + KEPT_SECONDS:
                client = s3_client(place.conn_id, self._connections, patient=False)
                self._kept[place.conn_id] = time.monotonic(), client
        return Storage(place.url, client)

    def forget(self, conn_id: str) -> None:
        """Look a connection up again the next time."""
        self._kept.pop(conn_id, None)


class Reading(NamedTuple, Generic[Read]):
    """What a read found, or why it found nothing."""

    found: Read | None = None
    problem: str | None = None


class Lane:
    """Threads for one kind of reads of one storage, and turns for the pages that wait for them."""

    def __init__(self, threads: int) -> None:
        self.threads = ThreadPoolExecutor(threads, "tagging-page")
        self.turns = threading.Semaphore(PAGES)


class Readers:
    """Reads for pages: at once, in threads of each storage, and with patience for all of it."""

    def __init__(
        self, clients: Clients | None = None, patience: float = PATIENCE_SECONDS, rest: float = REST_SECONDS
    ) -> None:
        self._clients = clients or Clients()
        self._patience = patience
        self._rest = rest
        self._lanes: dict[tuple[Place, What], Lane] = {}
        self._lock = threading.Lock()
        self._away: dict[Place, tuple[float, str]] = {}
        self._late = f"storage has not answered within {patience:g} s; try again"

    def until(self) -> float:
        """Return when the patience of a page ends that is asked for now, by the monotonic clock."""
        return time.monotonic() + self._patience

    def read(
        self, reads: Mapping[Key, tuple[Place, Callable[[Storage], Read | None]]], until: float, what: What = "files"
    ) -> dict[Key, Reading[Read]]:
        """Do all reads; what failed has a problem, as has what has not ended in time.

        A storage that cannot be reached, or is late with files, is then let rest for some seconds.

        Args:
            reads: Where to read, and what to do there, by any key.
            until: When patience ends.
            what: What is read, and so by how many threads of a storage.
        """
        lanes = self._enter({place for place, _ in reads.values()}, what)
        try:
            started: dict[Key, Future[Reading[Read]]] = {
                key: lanes[place].threads.submit(self._told, place, read)
                for key, (place, read) in reads.items()
                if place in lanes and self._problem(place) is None
            }
            wait(started.values(), max(until - time.monotonic(), 0.0))
            return {key: self._ended(started.get(key), place, what) for key, (place, _) in reads.items()}
        finally:
            for lane in lanes.values():
                lane.turns.release()

    def _enter(self, places: Collection[Place], what: What) -> dict[Place, Lane]:
        """Return the lanes of storages that do not rest, and whose turn it is soon."""
        until = time.monotonic() + TURN_SECONDS
        with self._lock:
            lanes = {place: self._lane(place, what) for place in places if self._problem(place) is None}
        return {
            place: lane
            for place, lane in lanes.items()
            if lane.turns.acquire(timeout=max(until - time.monotonic(), 0.0))
        }

    def _lane(self, place: Place, what: What) -> Lane:
        if (place, what) not in self._lanes:
            self._lanes[place, what] = Lane(THREADS[what])
        return self._lanes[place, what]

    def _ended(self, started: Future[Reading[Read]] | None, place: Place, what: What) -> Reading[Read]:
        if started is None:
            return Reading(problem=self._problem(place) or "storage has not answered other pages yet; try again")
        if started.done():
            return started.result()
        started.cancel()
        if what == "files":
            self._let_rest(place, self._late)
            return Reading(problem=self._late)
        return Reading(problem=f"not read within {self._patience:g} s: there is much to read; try again")

    def _told(self, place: Place, read: Callable[[Storage], Read | None]) -> Reading[Read]:
        if problem := self._problem(place):
            return Reading(problem=problem)
        try:
            return Reading(read(self._clients.storage(place)))
        except TaggerError as e:
            problem = str(e).splitlines()[0]
            if isinstance(e, InputError):
                self._clients.forget(place.conn_id)
            if isinstance(e, Unreachable):
                self._let_rest(place, problem)
            return Reading(problem=problem)
        except Exception as e:  # may quote anything
            frames = traceback.extract_tb(e.__traceback__)
            where = ", ".join(f"{frame.filename}:{frame.lineno}" for frame in frames)
            logger.error("a page cannot be read: %s at %s", type(e).__name__, where)
            return Reading(problem=f"unexpected {type(e).__name__}; the API server's log has more")

    def _let_rest(self, place: Place, problem: str) -> None:
        self._away[place] = time.monotonic() + self._rest, problem

    def _problem(self, place: Place) -> str | None:
        """Return what was wrong with a storage that rests."""
        until, problem = self._away.get(place, (0.0, None))
        return problem if time.monotonic() < until else None
