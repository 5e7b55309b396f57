"""`mode: batch` against the stand-in's Batch API."""

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import pytest
import sqlalchemy as sa

from demo.stand_in import Fate, Reply, StandIn, completion, error, token_usage
from tagger import batch as module
from tagger.batch import settle, shard_batches, wait_for_shards
from tagger.batch_api import BatchAPI
from tagger.batches import Batch, Batches
from tagger.cache import Cache
from tagger.connections import openai_client
from tagger.exceptions import InputError, LLMStopped, LLMUnreachable, RunFailed, TaggerError
from tagger.ledger import latest_outcomes, read_attempts
from tagger.llm import Client
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import Summary, report
from tagger.runs import Run
from tagger.tag import tag
from tagger.throttle import Throttle
from tests.project import Project


@pytest.fixture
def project(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    project.change(llm={"mode": "batch"})
    monkeypatch.setattr(module, "FIRST_POLL_SECONDS", 0.05)
    monkeypatch.setattr("tagger.batch_api.LOOK_UP_AFTER", (0.05, 0.05, 0.05))
    monkeypatch.setattr("tagger.batch_api.TRIES", 1)
    return project


def put_texts(project: Project, count: int, what: str = "apple") -> None:
    with project.engine.begin() as connection:
        rows = [{"id": number, "body": f"{what} number {number}"} for number in range(count)]
        connection.execute(sa.text("INSERT OR REPLACE INTO notes (id, body) VALUES (:id, :body)"), rows)


def planned(project: Project) -> Run:
    run = project.take(all_rows=True)
    plan(run, project.connections)
    return run


def hand_over(project: Project, run: Run, shard: int = 1) -> list[str]:
    """Hand a shard over; return the provider's names of the batches that have not ended."""
    with shard_batches(run, shard, project.connections) as batches:
        batches.hand_over()
        return [batch.remote or "" for batch, _ in batches.waiting()]


def tagged(project: Project, run: Run, shard: int = 1) -> dict[str, int]:
    """Go through the tag step of a shard as `tagger tag` does."""
    wait_for_shards(run, [shard], project.connections)
    return tag(run, shard, project.connections)


def ended(project: Project, run: Run) -> Summary:
    """Go through the steps after tag."""
    load_back(run, project.connections)
    return report(run)


def finished(project: Project, run: Run) -> Summary:
    """Go through the steps after plan."""
    for shard in run.plan().shards:
        tagged(project, run, shard.shard)
    return ended(project, run)


def left(run: Run) -> list[Batch]:
    return Batches(run.storage, run.plan().spec_id).all()


def at_provider(llm: StandIn) -> list[str]:
    return [file.filename for file in llm.files if not file.deleted]


# Records, money, files


def test_a_batch_ends_in_the_records_that_calls_would_have_written(project: Project, llm: StandIn) -> None:
    put_texts(project, 7)
    run = planned(project)

    summary = finished(project, run)

    assert (summary.state, summary.texts, summary.tagged, summary.llm_requests) == ("success", 7, 7, 7)
    assert {(row.status, *row.tags) for row in project.target().values()} == {("tagged", "fruit")}
    assert Counter(call.asked for call in llm.calls) == {"batch": 7}
    cache = Cache(run.storage, run.plan().spec_id, project.dataset.llm.model)
    [key, *_] = llm.calls_per_key()
    record = cache.read(key)
    assert record is not None
    assert (record.status, record.tags, record.asked) == ("tagged", ["fruit"], "batch")
    assert record.chars is not None
    assert record.chars.narrow == len("apple number 0")


def test_a_batch_asks_for_confidence_and_shows_examples_as_calls_do(project: Project, llm: StandIn) -> None:
    project.change(confidence=True, examples=[{"text": "a pear", "tags": ["fruit"]}])
    put_texts(project, 3)
    run = planned(project)

    tagged(project, run)

    cache = Cache(run.storage, run.plan().spec_id, project.dataset.llm.model)
    found = cache.read_many(llm.calls_per_key())
    assert len(found) == 3
    for key, outcome in latest_outcomes(read_attempts(run)).items():
        assert outcome.confidence is not None
        assert 0 < outcome.confidence[0] < 1
        assert (found[key].asked, found[key].confidence) == ("batch", list(outcome.confidence))
    online = Client(project.dataset, openai_client("openai_default", project.connections), Throttle(1))
    with closing(online):
        again = online.ask("0" * 32, "apple number 0", lambda _: None)
    assert again.confidence == next(iter(found.values())).confidence


def test_the_requests_are_those_of_online_calls(project: Project, llm: StandIn) -> None:
    project.change(llm={"params": {"temperature": 0.5, "timeout": 3, "extra_body": {"own": 1}}})
    project.put(1, "りんごを食べる")
    bodies: list[dict[str, Any]] = []
    online = dict(project.content, llm=project.content["llm"] | {"mode": "online"})

    def answer(body: dict[str, Any]) -> Reply | None:
        bodies.append(body)
        return None

    def scripted(body: dict[str, Any]) -> Reply:
        bodies.append(body)
        return error(400, "No.")

    llm.script_batches(Fate(answer=answer))
    run = planned(project)
    finished(project, run)
    for path, _ in run.storage.list("cache/"):
        run.storage.delete(path)
    project.content = online
    llm.script(scripted)
    with pytest.raises(RunFailed):
        project.run(all_rows=True)

    assert bodies[0] == bodies[1]


def test_it_costs_half(project: Project, llm: StandIn) -> None:
    put_texts(project, 3)
    online = dict(project.content, llm=project.content["llm"] | {"mode": "online"}, revision=2)

    half = finished(project, planned(project))
    project.content = online
    full = project.run(all_rows=True)

    assert half.cost_usd is not None
    assert full.cost_usd is not None
    assert half.cost_usd == pytest.approx(full.cost_usd / 2)
    assert half.input_tokens == full.input_tokens


def test_nothing_is_left_behind(project: Project, llm: StandIn) -> None:
    put_texts(project, 3)
    run = planned(project)

    finished(project, run)

    assert left(run) == []
    assert at_provider(llm) == []
    assert list(run.storage.list("batches/")) == []


def test_no_text_is_kept_outside_of_the_snapshot(project: Project) -> None:
    project.put(1, "apple klopstockwurst")
    run = planned(project)
    hand_over(project, run)
    during = project.everything_stored()

    tagged(project, run)

    assert b"klopstockwurst" not in during + project.everything_stored()


def test_a_text_that_cannot_be_encoded_keeps_no_other_back(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    put_texts(project, 2)
    run = planned(project)
    whole = module.ShardBatches._texts
    broken: Callable[[Any], Any] = lambda self: (  # noqa: E731
        text._replace(text="apple \ud800") if "number 0" in text.text else text for text in whole(self)
    )
    monkeypatch.setattr(module.ShardBatches, "_texts", broken)

    assert tagged(project, run) == {"tagged": 1, "failed": 1}


# Waiting


def test_a_shard_waits_until_its_batch_has_ended(project: Project, llm: StandIn) -> None:
    llm.batch_delay = 60
    put_texts(project, 3)
    run = planned(project)

    waiting = hand_over(project, run)

    assert len(waiting) == 1
    assert hand_over(project, run) == waiting
    with pytest.raises(RunFailed, match="has not ended"):
        tag(run, 1, project.connections)
    assert len(llm.submitted) == 1


def test_what_has_not_ended_is_pending_and_the_next_run_takes_it(project: Project, llm: StandIn) -> None:
    llm.script_batches(Fate(delay=1.5))
    put_texts(project, 3)
    first = planned(project)
    hand_over(project, first)

    second = planned(project)
    load_back(second, project.connections)
    of_second = report(second)

    assert (of_second.texts, of_second.pending, of_second.tagged, of_second.state) == (3, 3, 0, "success")
    assert {row.status for row in project.target().values()} == {"pending"}
    assert second.plan().shards == []
    time.sleep(1.5)
    third = finished(project, planned(project))
    assert (third.texts, third.cached) == (3, 3)
    assert {row.status for row in project.target().values()} == {"tagged"}
    assert len(llm.submitted) == 1
    assert max(llm.calls_per_key().values()) == 1
    assert third.cost_usd == 0.0
    [attempt] = read_attempts(first)
    assert (attempt.state, attempt.asked) == ("done", "batch")
    assert sum(attempt.values("cost_usd")) > 0
    assert at_provider(llm) == []


def test_a_run_whose_batch_was_collected_by_another_goes_on(project: Project, llm: StandIn) -> None:
    put_texts(project, 3)
    run = planned(project)
    hand_over(project, run)
    assert settle(run, project.connections) == []

    summary = finished(project, run)

    assert (summary.tagged, summary.llm_requests, len(llm.submitted)) == (3, 3, 1)


def test_a_batch_of_a_run_that_broke_is_pending_in_it(project: Project, llm: StandIn) -> None:
    llm.batch_delay = 60
    put_texts(project, 3)
    run = planned(project)
    hand_over(project, run)

    load_back(run, project.connections)
    with pytest.raises(RunFailed, match="its batch was not collected"):
        report(run)

    assert project.summary(run).pending == 3


def test_ctrl_c_leaves_the_batch_running(
    project: Project, llm: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm.batch_delay = 60
    caplog.set_level("INFO")
    put_texts(project, 3)
    run = planned(project)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tagger.batch.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tagged(project, run)

    assert "goes on at the provider" in caplog.text
    assert [batch["status"] for batch in llm.submitted] == ["in_progress"] or llm.submitted[0]["status"] == "validating"


# What becomes of each request


def test_every_request_has_a_fate_and_failed_ones_go_to_the_next_run(project: Project, llm: StandIn) -> None:
    llm.batch_errors = 0.03
    project.change(shards={"texts_per_shard": 400, "max": 3}, limits={"max_failed_fraction": 1})
    llm.script_batches(Fate(), Fate("expired", answered=0.5), Fate())
    put_texts(project, 1200)

    run = planned(project)
    first = finished(project, run)

    assert len(llm.submitted) == 3
    assert first.tagged + first.failed == first.texts == 1200
    expired, errored = first.errors["expired"].count, first.errors["batch_error"].count
    assert (expired, expired + errored) == (200, first.failed)
    assert 10 <= errored <= 60
    assert Counter(llm.calls_per_key(200).values()) == {1: first.tagged}
    llm.batch_errors = 0.0
    second = finished(project, planned(project))
    assert (second.cached, second.tagged) == (first.tagged, first.failed)
    assert {row.status for row in project.target().values()} == {"tagged"}
    assert Counter(llm.calls_per_key(200).values()) == {1: 1200}


def test_with_a_fallback_failed_ones_are_asked_at_once(project: Project, llm: StandIn) -> None:
    project.change(llm={"batch_fallback": "online"})
    llm.script_batches(Fate("expired", answered=0.5))
    put_texts(project, 10)

    summary = finished(project, planned(project))

    assert (summary.tagged, summary.failed) == (10, 0)
    assert Counter(call.asked for call in llm.calls) == {"batch": 5, "online": 5}


@pytest.mark.parametrize(
    ("fate", "kind"),
    [
        (Fate("failed"), "batch_failed"),
        (Fate("cancelled"), "cancelled"),
        (Fate("expired"), "expired"),
        (Fate(lost=True), "no_answer"),
        (Fate(output=lambda lines: []), "no_answer"),
        (Fate(answer=lambda body: error(500, "Broken.")), "batch_error"),
        (Fate(answer=lambda body: Reply(close=True)), "batch_error"),
        (Fate(answer=lambda body: Reply(body={"choices": []})), "bad_answer"),
        (Fate(answer=lambda body: Reply(body={"choices": "?"})), "bad_answer"),
    ],
)
def test_a_batch_that_gives_nothing(project: Project, llm: StandIn, fate: Fate, kind: str) -> None:
    llm.script_batches(fate)
    put_texts(project, 3)
    run = planned(project)

    assert tagged(project, run) == {"failed": 3}
    with pytest.raises(RunFailed, match=kind):
        ended(project, run)
    assert left(run) == []
    assert len(llm.submitted) == 1
    assert {row.status for row in project.target().values()} == {"failed"}


def test_refusals_are_recorded(project: Project, llm: StandIn) -> None:
    llm.refusals = 1.0
    put_texts(project, 2)
    run = planned(project)

    assert tagged(project, run) == {"refused": 2}
    assert ended(project, run).refused == 2


def test_a_text_over_the_context_is_refused(project: Project, llm: StandIn) -> None:
    llm.script_batches(Fate(answer=lambda body: error(400, "Too long.", "context_length_exceeded")))
    put_texts(project, 1)
    run = planned(project)
    tagged(project, run)

    summary = ended(project, run)

    assert summary.refused == 1
    assert summary.errors["context_length"].count == 1


def test_strange_lines_are_left_out(project: Project, llm: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    def output(lines: list[str]) -> list[str]:
        unknown = lines[0].replace(json.loads(lines[0])["custom_id"], "f" * 32)
        odd = lines[-1].replace('"body": {', '"body": {"_BaseModel__cls": "x", ')
        return [*lines[:-1], lines[0], unknown, lines[-1][:-20], "[]", "null", "", '{"custom_id": 1}', odd]

    llm.script_batches(Fate(output=output))
    put_texts(project, 4)
    run = planned(project)

    assert tagged(project, run) == {"tagged": 3, "failed": 1}
    assert "3 succeeded, 0 refused, 0 invalid, 1 errored, 0 expired" in caplog.text
    assert "1 unknown" in caplog.text
    assert "1 repeated" in caplog.text
    assert "5 broken" in caplog.text


# Limits of the API


def test_a_shard_over_the_limits_is_several_batches(
    project: Project, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_REQUESTS", 4)
    put_texts(project, 10)

    summary = finished(project, planned(project))

    assert sorted(batch["request_counts"]["total"] for batch in llm.submitted) == [2, 4, 4]
    assert summary.tagged == 10


def test_so_is_one_over_the_bytes(project: Project, llm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 5000)
    put_texts(project, 10)

    summary = finished(project, planned(project))

    assert len(llm.submitted) > 1
    assert summary.tagged == 10


# The endpoint


@pytest.mark.parametrize("route", ["POST /v1/files", "POST /v1/batches"])
@pytest.mark.parametrize(("status", "error_type"), [(401, LLMStopped), (429, LLMUnreachable), (500, LLMUnreachable)])
def test_an_endpoint_that_refuses(
    project: Project, llm: StandIn, route: str, status: int, error_type: type[TaggerError]
) -> None:
    llm.script_route(route, *[error(status, "No.", headers={"Retry-After": "0"})] * 9)
    put_texts(project, 2)
    run = planned(project)

    with pytest.raises(error_type) as caught:
        hand_over(project, run)

    assert "apple" not in f"{caught.value} {caught.value.__context__} {caught.value.__cause__}"
    assert llm.submitted == []


def test_an_endpoint_without_batches(project: Project, llm: StandIn) -> None:
    with StandIn(batches=False) as without:
        project.llm = without
        put_texts(project, 2)
        run = planned(project)

        with pytest.raises(LLMStopped, match=r"no Batch API.*llm\.mode: online") as caught:
            hand_over(project, run)

        assert caught.value.exit_code == 2
        assert without.calls == []


NOT_YET = error(400, "Cannot find file file-1 for a batch.", param="file_id")


@pytest.mark.parametrize("reply", [error(500, "Broken."), Reply(close=True), error(504, "Late."), NOT_YET])
@pytest.mark.parametrize("after", [True, False])
def test_a_creation_without_an_answer_is_looked_for(project: Project, llm: StandIn, reply: Reply, after: bool) -> None:
    llm.script_route("POST /v1/batches", reply, after=after)
    put_texts(project, 2)

    summary = finished(project, planned(project))

    assert len(llm.submitted) == 1
    assert summary.tagged == 2


def test_other_batches_of_the_account_are_left_alone(project: Project, llm: StandIn) -> None:
    put_texts(project, 2)
    finished(project, planned(project))
    put_texts(project, 2, "pear")
    llm.script_route("POST /v1/batches", error(500, "Broken."))

    summary = finished(project, planned(project))

    assert summary.tagged == 2
    assert len(llm.submitted) == 2


# Other runs


def test_the_stand_in_answers_for_no_real_model(project: Project) -> None:
    project.change(llm={"model": "gpt-5-mini"})
    put_texts(project, 1)
    run = planned(project)

    with pytest.raises(InputError, match="offline stand-in"):
        tagged(project, run)

    assert list(run.storage.list("cache/")) == []


def test_a_batch_that_was_never_created_is_given_up_after_a_day(
    project: Project, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_texts(project, 2)
    run = planned(project)
    llm.script_route("POST /v1/batches", *[error(500, "Broken.")] * 9)
    with pytest.raises(LLMUnreachable):
        hand_over(project, run)
    assert at_provider(llm) != []

    [(unfinished, state)] = settle(run, project.connections)
    assert (unfinished.remote, state) == (None, None)
    monkeypatch.setattr(module, "LOST_AFTER", timedelta(0))
    assert settle(run, project.connections) == []

    assert at_provider(llm) == []
    llm._route_scripts.clear()
    assert finished(project, planned(project)).tagged == 2


def test_an_endpoint_that_is_away_keeps_no_run_from_its_cached_texts(project: Project, llm: StandIn) -> None:
    put_texts(project, 2)
    run = planned(project)
    hand_over(project, run)
    llm.script_route("GET /v1/batches/{id}", *[error(500, "Broken.")] * 9)

    other = planned(project)

    assert other.plan().pending == 2


def test_a_clear_after_success_asks_for_what_failed(project: Project, llm: StandIn) -> None:
    llm.script_batches(Fate("expired", answered=0.5))
    project.change(limits={"max_failed_fraction": 1})
    put_texts(project, 4)
    run = planned(project)
    assert finished(project, run).failed == 2

    summary = finished(project, run)

    assert (summary.tagged, summary.failed, len(llm.submitted)) == (4, 0, 2)
    assert Counter(llm.calls_per_key(200).values()) == {1: 4}


def test_a_damaged_file_of_a_batch_says_so(project: Project, tmp_path: Path) -> None:
    put_texts(project, 2)
    run = planned(project)
    hand_over(project, run)
    [path] = [path for path, _ in run.storage.list("batches/") if path.endswith(".json")]
    run.storage.put(path, b"{")

    with pytest.raises(TaggerError, match=f"{path}: damaged"):
        tagged(project, run)


# What a review found


@pytest.mark.parametrize("route", ["POST /v1/files", "POST /v1/batches"])
def test_a_refusal_leaves_nothing_pending_and_says_why(project: Project, llm: StandIn, route: str) -> None:
    llm.script_route(route, error(401, "No."))
    put_texts(project, 2)
    run = planned(project)

    with pytest.raises(LLMStopped):
        hand_over(project, run)

    assert (left(run), at_provider(llm)) == ([], [])
    load_back(run, project.connections)
    with pytest.raises(RunFailed, match="refuses the API key"):
        report(run)
    assert planned(project).plan().pending == 0


def test_two_processes_at_one_shard_hand_it_over_once(
    project: Project, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_texts(project, 3)
    run = planned(project)
    upload = BatchAPI.upload

    def slow(api: BatchAPI, file: IO[bytes], batch: Batch) -> str:
        made = upload(api, file, batch)
        monkeypatch.setattr(BatchAPI, "upload", upload)
        hand_over(project, run)  # the other process, while this one uploads
        return made

    monkeypatch.setattr(BatchAPI, "upload", slow)
    summary = finished(project, run)

    assert len(llm.submitted) == 1
    assert (summary.tagged, summary.llm_requests) == (3, 3)


def test_the_price_is_that_of_the_run_that_handed_over(project: Project, llm: StandIn) -> None:
    put_texts(project, 3)
    run = planned(project)
    hand_over(project, run)
    project.change(llm={"price": {"input": 0.0, "output": 0.0}})

    planned(project)  # collects it

    [attempt] = read_attempts(run)
    assert sum(attempt.values("cost_usd")) > 0


def test_nothing_more_is_handed_over_once_the_budget_is_spent(project: Project, llm: StandIn) -> None:
    project.change(limits={"max_failed_fraction": 1, "max_cost_usd": 0.002})
    wasted = completion("?", usage=token_usage(10_000, 5))
    llm.script_batches(*[Fate(answer=lambda body: wasted)] * 2)
    put_texts(project, 1)
    run = planned(project)
    finished(project, run)

    with pytest.raises(RunFailed, match="budget reached"):
        hand_over(project, run)

    assert len(llm.submitted) == 1


def test_what_the_plan_collects_is_paid_for_and_not_saved(project: Project, llm: StandIn) -> None:
    llm.script_batches(Fate(delay=0.5))
    put_texts(project, 3)
    hand_over(project, planned(project))
    time.sleep(0.6)

    summary = finished(project, planned(project))

    assert (summary.cached, summary.saved_usd) == (3, 0)
    assert finished(project, planned(project)).saved_usd


@pytest.mark.parametrize("fallback", [None, "online"])
def test_what_another_run_answered_since_the_plan_is_not_asked(
    project: Project, llm: StandIn, fallback: str | None
) -> None:
    project.change(llm={"batch_fallback": fallback})
    put_texts(project, 3)
    first, second = planned(project), planned(project)
    assert finished(project, second).tagged == 3

    summary = finished(project, first)

    assert summary.tagged + summary.cached == 3
    assert Counter(llm.calls_per_key().values()) == {1: 3}


@pytest.mark.parametrize(
    "wrong", [{"model": 5}, {"model": ["x"]}, {"_fields_set": 3}, {"choices": [{"finish_reason": {}}]}]
)
def test_an_odd_completion_fails_its_text_alone(project: Project, llm: StandIn, wrong: dict[str, Any]) -> None:
    def output(lines: list[str]) -> list[str]:
        line = json.loads(lines[0])
        line["response"]["body"] |= wrong
        return [json.dumps(line), *lines[1:]]

    llm.script_batches(Fate(output=output))
    put_texts(project, 3)
    run = planned(project)

    counts = tagged(project, run)

    assert counts["tagged"] in (2, 3)
    assert sum(counts.values()) == 3


def test_a_batch_that_the_provider_lost_fails_its_texts_in_the_end(
    project: Project, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_texts(project, 2)
    run = planned(project)
    hand_over(project, run)
    llm.script_route("GET /v1/batches/{id}", *[error(404, "No batch.")] * 9)
    with pytest.raises(LLMStopped, match="does not know the batch"):
        tag(run, 1, project.connections)

    monkeypatch.setattr("tagger.batch_api.LOST_AFTER", timedelta(0))

    assert tagged(project, run) == {"failed": 2}


def test_a_key_that_may_not_delete_files_keeps_no_answer_back(project: Project, llm: StandIn) -> None:
    llm.script_route("DELETE /v1/files/{id}", *[error(403, "No.")] * 9)
    put_texts(project, 2)

    assert finished(project, planned(project)).tagged == 2


def test_a_blip_does_not_end_the_wait(project: Project, llm: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    llm.script_route("GET /v1/batches/{id}", *[error(500, "Broken.")] * 2)
    put_texts(project, 2)

    assert finished(project, planned(project)).tagged == 2
    assert "0 of 2 requests done; the LLM endpoint does not answer, the batches go on there" in caplog.text


def test_an_input_file_that_is_gone_is_uploaded_again(project: Project, llm: StandIn) -> None:
    llm.script_route("POST /v1/batches", *[error(500, "Broken.")] * 4)
    put_texts(project, 2)
    run = planned(project)
    with pytest.raises(LLMUnreachable):
        hand_over(project, run)
    for file in llm.files:
        file.delete()

    assert finished(project, run).tagged == 2


def test_an_answer_that_was_cut_off_is_asked_again_by_the_fallback(project: Project, llm: StandIn) -> None:
    project.change(llm={"batch_fallback": "online"})
    llm.script_batches(Fate(answer=lambda body: completion('{"tags": [', "length")))
    put_texts(project, 1)

    assert finished(project, planned(project)).tagged == 1


def test_a_shard_that_is_not_there(project: Project) -> None:
    put_texts(project, 1)
    run = planned(project)

    with pytest.raises(InputError, match="the run has 1 shards, no shard 99"):
        tagged(project, run, 99)
