"""The demo, run as a user does."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from demo import tables
from tagger.spec import normalise
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CALLS = re.compile(r"^ *(articles|survey_answers) day (\d) +(\d+) +(\d+) +(\d+) +(\d+) ", re.MULTILINE)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return os.environ | {"TAGGER_DEMO": str(tmp_path_factory.mktemp("demo"))}


def demo(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "demo", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def counts(printed: str) -> dict[tuple[str, str], tuple[int, ...]]:
    """Return rows, distinct texts, cached and LLM calls by dataset and day, from the printed table."""
    return {(m[1], m[2]): tuple(map(int, m.groups()[2:])) for m in CALLS.finditer(printed)}


def distinct_texts(table: str, *, columns: list[str], day2: bool) -> set[str]:
    """Return what counts as one text in a sample table, after or before the changes of day 2."""
    return {text for _, body in tables.sample(table, columns, day2=day2) if (text := normalise(body))}


@pytest.fixture(scope="module")
def first(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return demo(environment)


def test_day_two_asks_for_the_new_and_changed_texts_alone(first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stdout + first.stderr
    printed = counts(first.stdout)
    for table, columns in (("articles", ["title", "body"]), ("survey_answers", ["answer"])):
        before = distinct_texts(table, columns=columns, day2=False)
        after = distinct_texts(table, columns=columns, day2=True)
        assert printed[table, "1"][3] == len(before)
        assert printed[table, "2"][3] == len(after - before) > 0


def test_second_demo_asks_nothing(first: subprocess.CompletedProcess[str], environment: dict[str, str]) -> None:
    again = demo(environment)

    assert again.returncode == 0, again.stdout + again.stderr
    assert [calls for *_, calls in counts(again.stdout).values()] == [0, 0, 0, 0]


def test_no_sample_text_is_in_a_log_or_in_airflows_database(
    first: subprocess.CompletedProcess[str], environment: dict[str, str]
) -> None:
    home = Path(environment["TAGGER_DEMO"], "offline")
    texts = {
        text[:60].encode()
        for table, columns in (("articles", ["body"]), ("survey_answers", ["answer"]))
        for _, text in tables.sample(table, columns, day2=True)
        if len(text) >= 12
    }
    files = [p for folder in ("airflow", "logs") for p in (home / folder).rglob("*") if p.is_file()]
    assert any(p.suffix == ".db" for p in files) and any(p.suffix == ".log" for p in files)
    for file in files:
        content = file.read_bytes()
        assert not [text for text in texts if text in content], file


@pytest.fixture
def ui(first: subprocess.CompletedProcess[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "demo", "--ui"],
        cwd=REPOSITORY,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_ui_is_reached_on_loopback_and_ends_whole_on_sigterm(ui: "subprocess.Popen[str]") -> None:
    assert ui.stdout is not None
    silences, printed, last = [], "", time.monotonic()
    for line in ui.stdout:
        silences.append(time.monotonic() - last)
        last = time.monotonic()
        printed += line
        if "Ctrl-C ends everything" in line:
            break
    assert re.search(r"Airflow is at http://127\.0\.0\.1:\d+   user admin   password \S+", printed), printed
    assert max(silences) < 10
    children = psutil.Process(ui.pid).children(recursive=True)
    listening = {c.laddr.ip for p in children for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}

    ui.send_signal(signal.SIGTERM)

    assert ui.wait(60) == 130
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_two_demos_do_not_run_in_one_folder(
    first: subprocess.CompletedProcess[str], ui: "subprocess.Popen[str]", environment: dict[str, str]
) -> None:
    assert ui.stdout is not None
    ui.stdout.readline()

    assert demo(environment).returncode == 2


def test_live_needs_a_key(environment: dict[str, str]) -> None:
    ended = demo(environment, "--live")

    assert ended.returncode == 2
    assert "OPENAI_API_KEY" in ended.stderr


def test_live_says_what_it_costs_and_spends_nothing_unasked(environment: dict[str, str]) -> None:
    ended = demo(environment | {"OPENAI_API_KEY": "sk-none"}, "--live")

    assert ended.returncode == 0
    assert re.search(r"The live demo costs about \$\d\.\d+ the first time", ended.stdout)
    assert "Nothing was spent" in ended.stdout


def test_reset_forgets_everything(tmp_path: Path) -> None:
    environment = os.environ | {"TAGGER_DEMO": str(tmp_path / "demo")}
    (tmp_path / "demo" / "offline").mkdir(parents=True)

    assert demo(environment, "--reset").returncode == 0
    assert not (tmp_path / "demo").exists()
    assert demo(environment, "--reset").returncode == 0
