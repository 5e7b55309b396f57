"""How pages read storages: one that hangs or is away holds up no other, and nothing is read twice."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial

import pytest

from tagger.airflow.dataset_pages import DatasetPages
from tagger.airflow.page_storage import PAGES, Clients, Place, Readers, Reading, What
from tagger.airflow.tagged_dags import TaggedDag, Where
from tagger.connections import Connection
from tagger.exceptions import StorageError
from tagger.pages.data import Card
from tagger.storage import Storage
from tests.airflow.server import SECRET, where
from tests.project import Project

PATIENCE = 4.0


@pytest.fixture
def silent() -> Iterator[Connection]:
    """A connection to a server that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        yield Connection("silent", "aws", login="a", password="b", extra={"endpoint_url": endpoint})


def clients(project: Project, *others: Connection) -> Clients:
    known = {connection.conn_id: connection for connection in others}
    return Clients(lambda conn_id: known.get(conn_id) or project.connections(conn_id))


def known(project: Project, dataset: str = "notes", conn_id: str = "aws_default", storage: str = "") -> TaggedDag:
    told = where(project, dataset=dataset, conn_id=conn_id)
    place = Where.model_validate(told | ({"storage": storage} if storage else {}))
    return TaggedDag(f"tag_{dataset}", is_broken=False, is_stale=False, next_run_at=None, where=place, latest=None)


def there(project: Project) -> Place:
    return Place("aws_default", project.dataset.storage)


def timed(done: Callable[[], list[Card]]) -> tuple[float, list[Card]]:
    started = time.monotonic()
    cards = done()
    return time.monotonic() - started, cards


# What hangs, or is away


@pytest.mark.parametrize("storages", [1, 30])
def test_datasets_of_storages_that_hang_hold_up_no_other(project: Project, silent: Connection, storages: int) -> None:
    project.put(1, SECRET)
    project.run()
    readers = Readers(clients(project, silent), PATIENCE)
    pages = DatasetPages(readers)
    pages.cards([known(project)])
    hung = [known(project, f"lost_{number}", "silent", f"s3://lost{number % storages}") for number in range(200)]
    together = threading.Thread(target=pages.cards, args=(hung,))
    together.start()
    time.sleep(0.2)

    alone, [card] = timed(lambda: pages.cards([known(project)]))
    together.join()
    again, cards = timed(lambda: pages.cards([*hung, known(project)]))

    assert (alone < PATIENCE / 2, card.texts) == (True, 1)
    assert (again < PATIENCE / 2, cards[-1].texts) == (True, 1)
    assert {card.problem for card in cards[:-1]} == {f"storage has not answered within {PATIENCE:g} s; try again"}


def test_viewers_of_a_storage_that_hangs_are_few_at_a_time(project: Project, silent: Connection) -> None:
    readers = Readers(clients(project, silent), PATIENCE)
    readers.read({0: (there(project), len_of_history)}, readers.until())
    waits: list[float] = []

    def view() -> None:
        pages = DatasetPages(readers)
        waits.append(timed(lambda: pages.cards([known(project, "lost", "silent")]))[0])

    viewers = [threading.Thread(target=view) for _ in range(45)]
    for viewer in viewers:
        viewer.start()
    started = time.monotonic()
    found = readers.read({0: (there(project), len_of_history)}, readers.until())[0]

    assert (found.problem, time.monotonic() - started < PATIENCE / 2) == (None, True)
    for viewer in viewers:
        viewer.join()
    assert sum(wait > 0.9 * PATIENCE for wait in waits) <= PAGES


def len_of_history(storage: Storage) -> int:
    return len(list(storage.list_versions("history/")))


def test_what_nobody_waits_for_any_more_is_not_begun(project: Project) -> None:
    readers, begun, end = Readers(clients(project), 0.2), [], threading.Event()

    def wait(number: int, _: Storage) -> None:
        begun.append(number)
        end.wait(10)

    readers.read({number: (there(project), partial(wait, number)) for number in range(50)}, readers.until())
    end.set()
    time.sleep(0.1)

    assert len(begun) == 8


def test_a_storage_that_is_away_is_asked_again_after_a_while(project: Project) -> None:
    connections = {
        "moved": Connection("moved", "aws", login="a", password="b", extra={"endpoint_url": "http://127.0.0.1:9"})
    }
    readers = Readers(Clients(connections.get), rest=1.0)
    pages = DatasetPages(readers)
    project.put(1, SECRET)
    project.run()

    def problem() -> str | None:
        [card] = pages.cards([known(project, conn_id="moved")])
        return card.problem

    first = problem()
    connections["moved"] = project.connections("aws_default") or connections["moved"]

    assert first and "S3 does not answer at http://127.0.0.1:9" in first
    assert problem() == first
    time.sleep(1.1)
    assert problem() is None


@pytest.mark.parametrize(("path", "lookups"), [("damaged", 1), ("denied", 2)])
def test_only_what_a_connection_can_mend_has_it_looked_up_again(project: Project, path: str, lookups: int) -> None:
    looked_up: list[str] = []

    def connections(conn_id: str) -> Connection | None:
        looked_up.append(conn_id)
        return project.connections(conn_id)

    def read(storage: Storage) -> None:
        if path == "damaged":
            raise StorageError("damaged")
        Storage("s3://no-such-bucket", storage._client).get("any")

    readers = Readers(Clients(connections))
    for _ in range(2):
        assert readers.read({0: (there(project), read)}, readers.until())[0].problem

    assert len(looked_up) == lookups


def test_of_an_error_that_nobody_expected_the_kind_and_the_place_are_logged(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Storage) -> None:
        raise RuntimeError(SECRET)

    readers = Readers(clients(project))
    read: Reading[None] = readers.read({0: (there(project), fail)}, readers.until())[0]

    assert read.problem == "unexpected RuntimeError; the API server's log has more"
    assert "RuntimeError at " in caplog.text
    assert "test_page_storage.py:" in caplog.text
    assert "patient" not in caplog.text


@pytest.mark.parametrize("what", ["shards", "cards"])
def test_many_shards_or_histories_hold_up_no_page_of_their_storage(project: Project, what: What) -> None:
    readers = Readers(clients(project), PATIENCE)
    readers.read({0: (there(project), len_of_history)}, readers.until())

    def unpack(_: Storage) -> None:
        time.sleep(0.5)

    shards = {number: (there(project), unpack) for number in range(128)}
    together = threading.Thread(target=readers.read, args=(shards, readers.until(), what))
    together.start()
    started = time.monotonic()

    page: tuple[What, What] = ("files", "page")
    found = [readers.read({0: (there(project), len_of_history)}, readers.until(), each)[0].found for each in page]

    assert (found, time.monotonic() - started < PATIENCE / 2) == ([0, 0], True)
    together.join()


# What is kept


class Counted(Clients):
    """Clients that count the objects that are read."""

    reads = 0

    def storage(self, place: Place) -> Storage:
        """Return a storage that counts."""
        storage = super().storage(place)
        get = storage.get

        def counted(path: str) -> bytes | None:
            self.reads += 1
            return get(path)

        storage.get = counted  # type: ignore[method-assign]
        return storage


def test_a_history_that_did_not_change_is_not_read_again(project: Project) -> None:
    counted = Counted(project.connections)
    pages = DatasetPages(Readers(counted))
    reads, texts = [], []
    for number in range(2):
        project.put(number, f"{SECRET}, {number}")
        project.run()
        for _ in range(3):
            [card] = pages.cards([known(project)])
            reads.append(counted.reads)
            texts.append(card.texts)

    assert reads == [1, 1, 1, 2, 2, 2]
    assert texts == [1, 1, 1, 2, 2, 2]


def test_a_new_month_begins_without_a_report(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.put(1, SECRET)
    project.run()
    pages = DatasetPages(Readers(clients(project)))
    [before] = pages.cards([known(project)])

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Later":
            return cls(2199, 1, 1, tzinfo=UTC)

    monkeypatch.setattr("tagger.airflow.dataset_pages.datetime", Later)
    [after] = pages.cards([known(project)])

    assert before.spent_month_usd
    assert not after.spent_month_usd
