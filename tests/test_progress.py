"""How far a shard is, in words: a line every few seconds, or a bar on a terminal."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagger.cache import Record, Usage
from tagger.dataset import Price
from tagger.ledger import Ledger
from tagger.progress import LINE_SECONDS, RATE_SECONDS, Progress, showing
from tagger.runs import Run, Shard
from tagger.storage import Storage
from tests.conftest import REPOSITORY


class Books(Ledger):
    """Books that are in no file."""

    def __init__(self) -> None:
        nowhere = Storage.__new__(Storage)
        super().__init__(Run(nowhere, "notes", "run"), "plan", 1, Price(input=1.0, output=10.0))
        self._number = 0

    def tag(self, count: int, tokens: int = 0, reason: str | None = None) -> None:
        """End so many texts with an answer."""
        for key in self._keys(count):
            self.spend(key, "1", Usage(input=tokens))
            record = Record(
                status="refused" if reason else "tagged",
                reason=reason,
                tags=[],
                model="model",
                usage=Usage(input=tokens),
                cost_usd=None,
                finish_reason="stop",
                created_at=datetime.now(UTC),
            )
            self.record(key, "1", record)

    def fail(self, count: int) -> None:
        """End so many texts without one."""
        for key in self._keys(count):
            self.failed(key, "1", "timeout", "no answer in time")

    def ask(self, count: int) -> None:
        """Begin with so many texts."""
        for key in self._keys(count):
            self.spend(key, "1", Usage())

    def _keys(self, count: int) -> list[str]:
        self._number += count
        return [f"{self._number - i:032x}" for i in range(count)]


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tagger.progress.time", clock)
    return clock


def shard(texts: int) -> Shard:
    return Shard(shard=2, of=3, texts=texts)


# What is said


def test_rate_failures_spend_and_time_left_are_told(clock: Clock) -> None:
    books = Books()
    progress = Progress(shard(1000), books, 0)
    books.tag(90, tokens=1000)
    books.fail(10)
    clock.now += 10

    assert progress.done() == 100
    assert progress.rest() == "10.0 texts/s, 10 failed, $0.0900, 0:01:30 left"


def test_refused_and_failed_texts_are_done_and_asked_ones_are_not() -> None:
    books = Books()
    books.tag(3)
    books.tag(2, reason="refusal")
    books.fail(4)
    books.ask(5)

    assert Progress(shard(100), books, 0).done() == 9


def test_before_anything_is_done_the_time_left_is_unknown(clock: Clock) -> None:
    progress = Progress(shard(1000), Books(), 0)

    assert progress.rest() == "0.0 texts/s, 0 failed, $0.0000, time left unknown"
    clock.now += 10
    assert progress.rest().endswith("time left unknown")


def test_texts_of_earlier_attempts_are_done_and_make_nothing_faster(clock: Clock) -> None:
    books = Books()
    progress = Progress(shard(1000), books, 900)
    books.tag(10)
    clock.now += 10

    assert progress.done() == 910
    assert progress.rest().startswith("1.0 texts/s")
    assert progress.rest().endswith("0:01:30 left")


def test_the_rate_is_that_of_the_last_minute(clock: Clock) -> None:
    books = Books()
    progress = Progress(shard(10_000), books, 0)
    for _ in range(12):
        books.tag(100)
        clock.now += 10
        progress.rest()
    for _ in range(int(RATE_SECONDS) // 10):
        books.tag(10)
        clock.now += 10
        rest = progress.rest()

    assert rest.startswith("1.0 texts/s")


def test_a_shard_that_stands_still_says_so(clock: Clock) -> None:
    books = Books()
    progress = Progress(shard(1000), books, 0)
    books.tag(100)
    for _ in range(10):
        clock.now += 10
        rest = progress.rest()

    assert rest.startswith("0.0 texts/s")
    assert rest.endswith("time left unknown")


def test_long_times_are_told_in_hours(clock: Clock) -> None:
    books = Books()
    progress = Progress(shard(1_000_000), books, 0)
    books.tag(100)
    clock.now += 10

    assert progress.rest().endswith("27:46:30 left")


@given(
    st.integers(1, 100_000),
    st.lists(st.tuples(st.floats(0.001, 100), st.integers(0, 3), st.integers(0, 3)), max_size=20),
    st.floats(0, 1),
)
def test_whatever_happens_a_line_has_its_form(
    texts: int, steps: list[tuple[float, int, int]], before_part: float
) -> None:
    clock, books = Clock(), Books()
    before = int(texts * before_part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tagger.progress.time", clock)
        progress = Progress(shard(texts), books, before)
        for seconds, tagged, failed in steps:
            clock.now += seconds
            room = texts - progress.done()
            books.tag(min(tagged, room))
            books.fail(min(failed, texts - progress.done()))
            form = r"\d+\.\d texts/s, \d+ failed, \$\d+\.\d{4}, (\d+:\d\d:\d\d left|time left unknown)"
            assert re.fullmatch(form, progress.rest())
            assert before <= progress.done() <= texts


# Lines


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tagger.progress"]


def test_lines_come_with_done_and_total(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.progress.LINE_SECONDS", 0.1)
    caplog.set_level(logging.INFO, "tagger")
    books = Books()
    books.tag(7, tokens=1000)

    with showing(shard(100), books, 20):
        until = time.monotonic() + 20
        while len(lines_of(caplog)) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)

    assert lines_of(caplog)[0].startswith("shard 2/3: 27 of 100 texts, ")
    assert re.search(r", 0 failed, \$0\.0070, ", lines_of(caplog)[0])


def test_lines_come_no_more_often_than_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.progress.LINE_SECONDS", 0.2)
    caplog.set_level(logging.INFO, "tagger")
    started = time.monotonic()
    with showing(shard(100), Books(), 0):
        time.sleep(1.0)
    took = time.monotonic() - started

    assert 1 <= len(lines_of(caplog)) <= took / 0.2


def test_a_line_comes_every_10_s_at_most() -> None:
    assert LINE_SECONDS >= 10


def test_a_short_shard_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tagger")
    with showing(shard(100), Books(), 0):
        pass

    assert lines_of(caplog) == []


def test_it_ends_with_its_block_whatever_happens_there() -> None:
    before = set(threading.enumerate())
    started = time.monotonic()

    with pytest.raises(ZeroDivisionError), showing(shard(100), Books(), 0):
        1 / 0  # noqa: B018

    assert time.monotonic() - started < 5
    assert set(threading.enumerate()) <= before


def test_without_a_terminal_there_is_no_bar(capfd: pytest.CaptureFixture[str]) -> None:
    with showing(shard(100), Books(), 0):
        time.sleep(0.1)

    assert capfd.readouterr() == ("", "")


# The bar

SHOWING = """
    import logging, sys, time
    import tagger.progress
    from tagger.runs import Shard

    class Books:
        spent_usd, known = 0.0, {"tagged": 0, "failed": 0}

        def counts(self):
            return dict(self.known)

    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    tagger.progress.BAR_SECONDS = 0.01
    books = Books()
    with tagger.progress.showing(Shard(shard=2, of=3, texts=400), books, 100):
        time.sleep(0.3)
        for number in range(300):
            books.known["tagged" if number % 100 else "failed"] += 1
            books.spent_usd += 0.001
            logging.info("line %d is whole", number)
            time.sleep(0.002)
    print("the end", file=sys.stderr)
"""


def in_terminal(command: list[str], columns: int = 120) -> str:
    """Run a command whose stderr is a terminal; return what it shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = b""
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=theirs, stdout=subprocess.DEVNULL) as process:
        os.close(theirs)
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # the other end is closed
            pass
        finally:
            os.close(ours)
            process.wait(60)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


@pytest.fixture(scope="module")
def shown() -> str:
    return in_terminal([sys.executable, "-c", textwrap.dedent(SHOWING)])


def parts(shown: str) -> list[str]:
    """Return what is shown from each line's begin to its end, or to where it is begun again."""
    return [part.strip(" ") for part in re.split(r"[\r\n]+|\x1b\[A", shown)]


def bars(shown: str) -> list[str]:
    return [part for part in parts(shown) if part.startswith("shard 2/3")]


@pytest.mark.slow
def test_a_terminal_has_a_bar(shown: str) -> None:
    form = r"shard 2/3 +\d+%\|.*\| \d+/400 texts, [\d.]+ texts/s, \d failed, \$0\.\d{4}, .*"

    assert len(bars(shown)) > 5
    assert [bar for bar in bars(shown)[1:] if not re.fullmatch(form, bar)] == []


@pytest.mark.slow
def test_the_bar_has_no_comma_too_many(shown: str) -> None:
    assert ", ," not in shown


@pytest.mark.slow
def test_the_bar_begins_where_earlier_attempts_ended_and_ends_with_the_last_text(shown: str) -> None:
    done = [int(number) for bar in bars(shown) for number in re.findall(r" (\d+)/400 texts", bar)]

    assert 100 in done[:3]
    assert done == sorted(done)
    assert done[-1] == 400
    assert "100%" in bars(shown)[-1]
    assert " 3 failed, $0.3000, " in bars(shown)[-1]


@pytest.mark.slow
def test_log_lines_beside_the_bar_are_whole(shown: str) -> None:
    lines = [part for part in parts(shown) if "line" in part]

    assert lines == [f"INFO line {number} is whole" for number in range(300)]


@pytest.mark.slow
def test_what_comes_after_the_bar_has_a_line_of_its_own(shown: str) -> None:
    assert shown.endswith("\r\nthe end\r\n")


@pytest.mark.slow
def test_a_narrow_terminal_is_no_harm() -> None:
    narrow = in_terminal([sys.executable, "-c", textwrap.dedent(SHOWING)], columns=30)

    assert max(len(bar) for bar in bars(narrow)) <= 30
