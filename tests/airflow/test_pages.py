"""The pages as Airflow's API server serves them: who may see what, and what they say where something is away."""

import gzip
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable
from datetime import date, datetime, timedelta
from typing import Any

import pytest
from airflow import settings as airflow_settings
from airflow.models import Connection as AirflowConnection
from airflow.utils.session import create_session
from sqlalchemy import event

from tagger.airflow.dataset_pages import days
from tagger.airflow.page_storage import PATIENCE_SECONDS
from tagger.exceptions import InputError
from tagger.plan import plan
from tagger.tag import tag
from tagger.window import Options
from tests.airflow.server import GUEST, GUESTS_DAG, NOON, RUN, SECRET, Server, connect, tagged, where
from tests.conftest import REPOSITORY
from tests.project import Project

DATA = "/api/v1/datasets"
ROUTES = ["/", f"/run/tag_notes/{RUN}", "/static/page.css", DATA, f"{DATA}/tag_notes", f"{DATA}/tag_notes/runs/{RUN}"]
ROUTES += ["/openapi.json"]


# Who may see what


def statuses(server: Server, routes: Iterable[str], user: str | None = "team", **more: str) -> dict[str, int]:
    return {route: server.get(route, user, **more).status_code for route in routes}


def test_nobody_sees_anything_without_a_login(server: Server, project: Project) -> None:
    tagged(server, project)
    routes = [*ROUTES, f"{DATA}/tag_none", "/static/none.js"]

    assert statuses(server, routes, None) == dict.fromkeys(routes, 401)
    assert statuses(server, routes, None, Authorization="Bearer nonsense") == dict.fromkeys(routes, 403)


def test_a_user_who_may_not_read_the_runs_of_a_dag_sees_nothing_of_it(server: Server, project: Project) -> None:
    tagged(server, project)
    server.dag(GUESTS_DAG)
    routes = [*(route for route in ROUTES if "tag_notes" in route), f"{DATA}/tag_none", f"{DATA}/~"]

    assert statuses(server, routes, GUEST) == dict.fromkeys(routes, 403)
    cards = server.get(DATA, GUEST).json()["datasets"]
    assert [card["dag_id"] for card in cards] == [GUESTS_DAG]
    assert server.get(f"{DATA}/{GUESTS_DAG}", GUEST).status_code == 200


def test_who_may_read_sees_all_of_it(server: Server, project: Project) -> None:
    tagged(server, project)

    assert statuses(server, ROUTES) == dict.fromkeys(ROUTES, 200)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_nothing_can_be_written(server: Server, method: str) -> None:
    assert statuses(server, ROUTES, method=method) == dict.fromkeys(ROUTES, 405)


def test_looking_writes_nothing(server: Server, project: Project) -> None:
    tagged(server, project)
    before = project.everything_stored(but="none")

    for route in ROUTES:
        server.get(route)

    assert project.everything_stored(but="none") == before


def test_no_text_is_in_any_answer(server: Server, project: Project) -> None:
    tagged(server, project)

    answers = [server.get(route).text for route in ROUTES]

    assert "tag_notes" in "".join(answers)
    assert "patient" not in "".join(answers)


# Every answer


ANSWERS: list[tuple[str, str | None, str, int]] = [
    *((route, "team", "GET", 200) for route in ROUTES),
    ("/", None, "GET", 401),
    (f"{DATA}/tag_none", GUEST, "GET", 403),
    ("/none", "team", "GET", 404),
    ("/static/none.js", "team", "GET", 404),
    ("/static/..%2F__init__.py", "team", "GET", 404),
    ("/", "team", "POST", 405),
    (f"{DATA}/tag_notes?start=1", "team", "GET", 422),
]


def test_every_answer_has_the_security_headers(server: Server, project: Project) -> None:
    tagged(server, project)

    for route, user, method, status in ANSWERS:
        answer = server.get(route, user, method=method)

        assert answer.status_code == status
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        is_file = route == "/static/page.css"
        assert answer.headers["Cache-Control"] == ("private, no-cache" if is_file else "no-store")


def test_an_error_of_ours_has_them_too_and_tells_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.airflow.pages.tagged_dag_ids", lambda session: 1 / 0)

    answer = server.get(DATA)

    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    assert "Content-Security-Policy" in answer.headers


def test_a_file_that_did_not_change_is_not_sent_again(server: Server) -> None:
    first = server.get("/static/page.css")

    again = server.get("/static/page.css", **{"If-None-Match": first.headers["ETag"]})

    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["Cache-Control"] == "private, no-cache"


def test_the_shell_finds_its_files_from_both_addresses(server: Server) -> None:
    assert 'data-root=""' in server.get("/").text
    tab = server.get(f"/run/tag_notes/{RUN}").text
    assert 'data-root="../../"' in tab
    assert "{{root}}" not in tab
    files = re.findall(r'(?:src|href)="\.\./\.\./(static/[^"]+)"', tab)
    assert statuses(server, [f"/{file}" for file in files]) == {f"/{file}": 200 for file in files} != {}


def test_the_api_is_described(server: Server) -> None:
    described = server.get("/openapi.json").json()

    documented = (REPOSITORY / "docs" / "api-and-metrics.md").read_text(encoding="utf-8")
    assert all(f"`GET /tagger{path}" in documented for path in described["paths"])
    assert set(described["paths"]) == {
        "/api/v1/datasets",
        "/api/v1/datasets/{dag_id}",
        "/api/v1/datasets/{dag_id}/runs/{run_id}",
    }
    for path in described["paths"].values():
        assert set(path) == {"get"}
        assert path["get"]["summary"] and path["get"]["description"] and path["get"]["security"]
        assert {"200", "401"} <= set(path["get"]["responses"])
    assert {"Card", "DatasetPage", "Day", "RunPage", "ShardLine"} <= set(described["components"]["schemas"])


@pytest.mark.parametrize(
    ("route", "told"),
    [
        (f"{DATA}/tag_notes?start=yesterday", "`start`: expected a day from 2000-01-01 to 2199-12-31, such as"),
        (f"{DATA}/tag_notes?start=2026-02-30", "`start`: "),
        (f"{DATA}/tag_notes?end=1700000000", "`end`: expected a day"),
        (f"{DATA}/tag_notes?end=9999-12-31", "`end`: expected a day"),
        (f"{DATA}/tag_notes?start=2026-02-02&end=2026-02-01", "`start` 2026-02-02 is after `end` 2026-02-01"),
        (f"{DATA}/tag_notes?start=2020-01-01&end=2026-02-01", "more than 1,200 days"),
        (f"{DATA}/tag%00", "`dag_id`: "),
        (f"{DATA}/{'a' * 251}", "`dag_id`: "),
        (f"{DATA}/tag_notes/runs/a%01b", "`run_id`: "),
    ],
)
def test_a_parameter_that_is_none_is_refused_with_the_reason(server: Server, route: str, told: str) -> None:
    server.dag()

    answer = server.get(route)

    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(told) or told in answer.json()["detail"]


TODAY = date(2026, 11, 20)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, (TODAY - timedelta(days=89), TODAY)),
        (date(2026, 11, 1), None, (date(2026, 11, 1), TODAY)),
        (None, date(2026, 3, 31), (date(2026, 1, 1), date(2026, 3, 31))),
        (TODAY, TODAY, (TODAY, TODAY)),
        (TODAY - timedelta(days=1199), TODAY, (TODAY - timedelta(days=1199), TODAY)),
    ],
)
def test_ninety_days_are_shown_unless_told(start: date | None, end: date | None, expected: tuple[date, date]) -> None:
    assert days(start, end, TODAY) == expected


def test_twelve_hundred_days_are_the_most() -> None:
    with pytest.raises(InputError, match="more than 1,200 days"):
        days(TODAY - timedelta(days=1200), TODAY, TODAY)


@pytest.mark.parametrize(
    "path", ["tag_none", "~", "タグ", f"tag_none/runs/{RUN}", "tag_notes/runs/a b", "tag_notes/runs/~"]
)
def test_what_does_not_exist_is_not_found(server: Server, path: str) -> None:
    server.dag()

    assert server.get(f"{DATA}/{path}").status_code == 404


def test_a_dag_that_is_none_of_ours_is_not_found(server: Server) -> None:
    server.dag("other", tags=["other"])
    server.run(RUN, "other")

    assert server.get(DATA).json() == {"datasets": []}
    answer = server.get(f"{DATA}/other/runs/{RUN}")
    assert (answer.status_code, answer.json()["detail"]) == (404, "no DAG `other` with the tag `tagger`")
    assert server.get(f"/run/other/{RUN}").status_code == 200  # where the tab says so


# Cards and pages of datasets


def test_a_card_and_a_page_show_what_the_run_did(server: Server, project: Project) -> None:
    tagged(server, project)

    card, page = server.card(), server.get(f"{DATA}/tag_notes").json()

    assert page["card"] == card
    shown = {name: card[name] for name in ("dataset", "state", "last_run_id", "texts", "cached", "problem")}
    assert shown == {
        "dataset": "notes",
        "state": "success",
        "last_run_id": RUN,
        "texts": 2,
        "cached": 0,
        "problem": None,
    }
    [day] = page["days"]
    assert (day["texts"], day["tagged"], day["tags"]) == (2, 2, {"fruit": 2, "weather": 2})
    assert [run["run_id"] for run in page["runs"]] == [RUN]


def test_a_range_leaves_the_other_days_out(server: Server, project: Project) -> None:
    tagged(server, project)

    page = server.get(f"{DATA}/tag_notes?start=2026-01-01&end=2026-01-31").json()

    assert (page["days"], page["runs"]) == ([], [])
    assert page["first_day"] is not None


def test_a_dataset_without_a_run_has_a_card_that_says_so(server: Server) -> None:
    server.dag(next_dagrun_create_after=NOON)

    card = server.card()

    assert (card["state"], card["problem"], card["texts"]) == ("none", None, None)
    assert card["next_run_at"] == "2026-11-20T12:00:00Z"


@pytest.mark.parametrize("state", ["running", "queued"])
def test_a_run_at_work_is_the_last_run(server: Server, project: Project, state: str) -> None:
    tagged(server, project)
    server.run("manual__2", state=state)

    card = server.card()

    assert (card["state"], card["last_run_id"]) == (state, "manual__2")
    assert card["texts"] == 2  # of the run before


def test_a_run_that_failed_before_its_report_is_the_last_run(server: Server, project: Project) -> None:
    tagged(server, project)
    later = last_run_at(server) + timedelta(hours=1)
    server.run("manual__2", state="failed", steps={"snapshot": "failed"}, at=later)

    card = server.card()

    assert (card["state"], card["last_run_id"]) == ("failed", "manual__2")
    assert card["reason"] == "failed at `snapshot`: the log says why"


def last_run_at(server: Server) -> datetime:
    return datetime.fromisoformat(server.card()["last_run_at"])


def test_a_dry_run_is_no_last_run(server: Server, project: Project) -> None:
    tagged(server, project)
    server.run("manual__2", at=last_run_at(server) + timedelta(hours=1), where=where(project))
    project.finish(project.take("manual__2", options=Options(dry_run=True)))

    assert server.card()["last_run_id"] == RUN


def test_a_run_that_was_marked_failed_after_its_report_is_failed(server: Server, project: Project) -> None:
    project.put(1, SECRET)
    project.run(RUN)
    server.dag()
    server.run(RUN, where=where(project), state="failed")

    card = server.card()

    assert (card["state"], card["reason"]) == ("failed", "failed, though none of its steps did: see Airflow")


def lines(server: Server, query: str = "") -> list[tuple[str, str, str | None]]:
    page = server.get(f"{DATA}/tag_notes{query}").json()
    return [(run["run_id"], run["state"], run["reason"]) for run in page["runs"]]


def test_runs_that_were_not_reported_are_listed_as_airflow_has_them(server: Server, project: Project) -> None:
    tagged(server, project)
    at = last_run_at(server) + timedelta(minutes=1)
    server.run("manual__2", state="failed", steps={"plan": "failed"}, at=at)
    server.run("manual__3", state="failed", steps={"snapshot": "failed"}, at=at + timedelta(seconds=1))
    server.run("manual__4", state="running", at=at + timedelta(seconds=2))

    assert lines(server) == [
        ("manual__4", "running", None),
        ("manual__3", "failed", "failed at `snapshot`: the log says why"),
        ("manual__2", "failed", "failed at `plan`: the log says why"),
        (RUN, "success", None),
    ]
    assert lines(server, "?start=2026-01-01&end=2026-01-31") == []


@pytest.mark.parametrize(
    ("state", "reason"), [("running", None), ("failed", "failed at `tag`: the log says why"), ("success", None)]
)
def test_a_run_without_a_summary_is_in_the_state_that_airflow_has_it_in(
    server: Server, project: Project, state: str, reason: str | None
) -> None:
    project.put(1, SECRET)
    run = project.take("manual__0")
    plan(run, project.connections)
    tag(run, 1, project.connections)
    tagged(server, project)
    steps = {"tag": "failed"} if state == "failed" else {}
    server.run("manual__0", state=state, steps=steps, at=last_run_at(server))

    found = {run_id: told for run_id, *told in lines(server)}

    assert found == {"manual__0": [state, reason], RUN: ["success", None]}


def test_at_most_fifty_runs_are_listed(server: Server, project: Project) -> None:
    tagged(server, project)
    last = last_run_at(server)
    for number in range(60):
        server.run(f"failed__{number}", state="failed", at=last + timedelta(seconds=number + 1))

    found = lines(server)

    assert (len(found), found[0][0], found[-1][0]) == (50, "failed__59", "failed__10")


def test_a_page_needs_one_connection_to_airflows_database_at_a_time(server: Server, project: Project) -> None:
    tagged(server, project)
    assert airflow_settings.engine is not None
    pool, open_now, most = airflow_settings.engine.pool, 0, 0

    def taken(*_: object) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)

    def given_back(*_: object) -> None:
        nonlocal open_now
        open_now -= 1

    event.listen(pool, "checkout", taken)
    event.listen(pool, "checkin", given_back)
    try:
        statuses(server, ROUTES)
    finally:
        event.remove(pool, "checkout", taken)
        event.remove(pool, "checkin", given_back)

    assert (most, open_now) == (1, 0)


def test_a_paused_dataset_has_no_next_run(server: Server) -> None:
    server.dag(is_paused=True, next_dagrun_create_after=NOON)

    assert server.card()["next_run_at"] is None


def test_a_dataset_whose_file_was_removed_keeps_its_history(server: Server, project: Project) -> None:
    project.put(1, SECRET)
    project.run(RUN)
    server.dag(is_stale=True, next_dagrun_create_after=NOON)
    server.run(RUN, where=where(project))

    page = server.get(f"{DATA}/tag_notes").json()

    assert page["card"]["problem"].startswith("its dataset file is gone")
    assert page["card"]["next_run_at"] is None
    assert [day["texts"] for day in page["days"]] == [1]


def test_a_dataset_whose_file_is_broken_says_so(server: Server) -> None:
    server.dag(tags=["tagger", "broken"])
    server.run(RUN, state="failed", steps={"dataset_file": "failed"})

    card = server.card()

    assert card["problem"].startswith("its dataset file cannot be used")
    assert (card["state"], card["reason"]) == ("failed", "failed at `dataset_file`: the log says why")


# What is away


def test_a_storage_that_is_away_is_told_soon_and_takes_no_other_down(
    server: Server, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagged(server, project)
    connect(monkeypatch, "away", "http://127.0.0.1:9")
    server.dag("tag_lost")
    server.run(RUN, "tag_lost", where=where(project, dataset="lost", conn_id="away"))

    answer = server.get(DATA)

    assert answer.elapsed < timedelta(seconds=PATIENCE_SECONDS)
    assert server.card()["texts"] == 2
    lost = server.card("tag_lost")
    assert lost["problem"].endswith("S3 does not answer at http://127.0.0.1:9: EndpointConnectionError")
    assert (lost["state"], lost["last_run_id"]) == ("success", RUN)  # as Airflow knows
    page = server.get(f"{DATA}/tag_lost").json()
    assert (page["days"], page["card"]) == ([], lost)
    assert server.get(f"{DATA}/tag_lost/runs/{RUN}").json()["problem"].startswith(project.dataset.storage)


def test_a_damaged_history_is_told(server: Server, project: Project) -> None:
    tagged(server, project)
    project.open(RUN).storage.put("history/notes.json.gz", gzip.compress(b"{"))

    page = server.get(f"{DATA}/tag_notes").json()

    assert page["card"]["problem"].endswith("damaged; the dataset's next report makes it anew")
    assert page["card"]["state"] == "success"


def test_a_history_with_a_time_zone_that_there_is_not_is_told(server: Server, project: Project) -> None:
    tagged(server, project)
    storage = project.open(RUN).storage
    rollup = json.loads(gzip.decompress(storage.get("history/notes.json.gz") or b""))
    storage.put("history/notes.json.gz", gzip.compress(json.dumps(rollup | {"timezone": "Mars/Base"}).encode()))

    page = server.get(f"{DATA}/tag_notes").json()

    assert page["card"] == server.card()
    assert page["card"]["problem"].endswith("damaged; the dataset's next report makes it anew")


def test_a_history_that_is_not_there_yet_is_told(server: Server, project: Project) -> None:
    tagged(server, project)
    project.open(RUN).storage.delete("history/notes.json.gz")

    assert "has no history of it yet: the next report writes it" in server.card()["problem"]


def test_xcoms_that_are_gone_are_told(server: Server) -> None:
    server.dag()
    server.run(RUN)

    assert "the next run tells" in server.card()["problem"]
    assert "the next run tells" in server.get(f"{DATA}/tag_notes/runs/{RUN}").json()["problem"]


@pytest.mark.parametrize(
    "edited", [{"dataset": "other"}, {"dataset": "../notes"}, {"dataset": "notes"}, "s3://other/file", None, 7]
)
def test_an_xcom_that_is_not_of_this_dags_snapshot_leads_nowhere(server: Server, project: Project, edited: Any) -> None:
    server.dag()
    server.run(RUN, where=where(project) | edited if isinstance(edited, dict) and len(edited) > 1 else edited)

    assert "the next run tells" in server.card()["problem"]


def test_a_connection_in_airflows_database_serves(
    server: Server, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagged(server, project)
    server.dag("tag_lost")
    server.run(RUN, "tag_lost", where=where(project, dataset="lost", conn_id="kept"))
    extra = json.dumps({"endpoint_url": project.store.endpoint})
    with create_session() as session:
        session.add(AirflowConnection(conn_id="kept", conn_type="aws", login="moto", password="moto", extra=extra))
    try:
        assert "has no history of it yet" in server.card("tag_lost")["problem"]
    finally:
        with create_session() as session:
            session.query(AirflowConnection).filter_by(conn_id="kept").delete()


# The plugin


PLUGIN = REPOSITORY / "plugins" / "tagging_plugin.py"


def test_airflow_has_a_page_in_its_navigation_and_a_tab_at_its_runs() -> None:
    nav, tab = runpy.run_path(str(PLUGIN))["TaggingPlugin"].external_views

    assert (nav["destination"], nav["href"], nav["nav_top_level"]) == ("nav", "tagger/", True)
    assert (tab["destination"], tab["href"]) == ("dag_run", "tagger/run/{DAG_ID}/{RUN_ID}")
    assert nav["url_route"] != tab["url_route"]
    assert nav["icon"] != nav["icon_dark_mode"]


def test_the_plugin_is_light_for_the_processes_that_serve_no_pages() -> None:
    code = (
        "import sys, airflow.plugins_manager\n"
        "known = set(sys.modules)\n"
        f"import runpy; runpy.run_path({str(PLUGIN)!r})['TaggingPlugin']()\n"
        "assert not {name for name in set(sys.modules) - known if '.' in name or name == 'fastapi'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_airflow_starts_without_pages_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tagger.airflow.pages", None)

    assert runpy.run_path(str(PLUGIN))["TaggingPlugin"]().fastapi_apps == []
    assert "the tagging pages are not served" in caplog.text
