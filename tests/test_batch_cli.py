"""`tagger run` where `llm.mode` is batch."""

import signal
import time

import pytest

from demo.stand_in import Fate, StandIn
from tests.test_cli import Shell, only_complaint, script_at_work, shell  # noqa: F401 - a fixture


@pytest.fixture
def batches(shell: Shell) -> Shell:  # noqa: F811
    shell.write(llm={"mode": "batch"})
    return shell


def test_run_waits_for_its_batch(batches: Shell) -> None:
    llm = batches.project.llm
    llm.batch_delay = 0.5

    assert batches.run("run", "notes", "--all", "--json") == 0

    assert (batches.summary().tagged, batches.summary().mode) == (2, "batch")
    assert len(llm.submitted) == 1


def test_the_shards_wait_side_by_side(batches: Shell) -> None:
    llm = batches.project.llm
    batches.write(llm={"mode": "batch"}, shards={"texts_per_shard": 1})
    llm.batch_delay = 1.0

    assert batches.run("run", "notes", "--all") == 0

    first, second = llm.submitted
    assert abs(first["created_at"] - second["created_at"]) <= 1
    assert second["created_at"] <= first["completed_at"]


def test_a_run_waits_for_the_batches_of_another(batches: Shell) -> None:
    llm = batches.project.llm
    llm.script_batches(Fate(delay=8.0))
    with script_at_work(batches, "run", "notes", "--all") as process:
        until = time.monotonic() + 60
        while not llm.submitted:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.2)
        code, lines = process.end(signal.SIGINT)
    assert code == 130
    assert only_complaint(lines) == "tagger: interrupted"
    assert any("goes on at the provider" in line for line in lines)

    assert batches.run("run", "notes", "--all", "--json") == 0

    assert (batches.summary().cached, batches.summary().pending) == (2, 0)
    assert len(llm.submitted) == 1
    assert {row.status for row in batches.project.target().values()} == {"tagged"}


def test_check_looks_for_the_batch_api(batches: Shell) -> None:
    assert batches.run("check", "notes") == 0
    assert "notes: Batch API: there" in batches.out
    assert "by the Batch API" in batches.out

    with StandIn(batches=False) as without:
        batches.connect("openai_default", conn_type="openai", host=without.base_url, password="key")
        assert batches.run("check", "notes") == 2
    assert "has no Batch API (HTTP 404): set `llm.mode: online`" in batches.complaints[0]


def test_an_endpoint_without_batches_is_wrong_input(batches: Shell) -> None:
    with StandIn(batches=False) as without:
        batches.connect("openai_default", conn_type="openai", host=without.base_url, password="key")

        assert batches.run("run", "notes", "--all") == 2

        assert without.calls == []
    assert "has no Batch API (HTTP 404): set `llm.mode: online`" in batches.complaints[0]
