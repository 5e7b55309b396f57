"""The tagging pages in a real browser, inside the web interface of a running Airflow with 90 days of runs."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, FrameLocator, Locator, Page, expect

from demo.stand_in import completion
from tests.airflow.cluster import Cluster
from tests.browser import Tab, chromium, needs_browser
from tests.databases import put_rows
from tests.test_history import put_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), needs_browser]

DAYS = 90
GUEST = "guest"
USERS = {
    "AIRFLOW__CORE__AUTH_MANAGER": "tests.airflow.server.Guarded",  # the guest may not read the runs of tag_notes
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"admin:admin,{GUEST}:viewer",
}
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
MARKUP = "<img src=x onerror=alert(1)>"


@dataclass
class Site:
    """The deployment, its history, and a browser."""

    cluster: Cluster
    browser: Browser
    first_run: str
    """A run of the dataset through Airflow, after the 90 days."""

    @property
    def url(self) -> str:
        """Where Airflow is."""
        return self.cluster.airflow.url

    def password(self, user: str) -> str:
        """Return the password that Airflow made for a user."""
        return str(json.loads((self.cluster.airflow.home / "passwords.json").read_text())[user])

    def status(self, path: str, user: str | None) -> int:
        """Return how the server answers a user, or nobody."""
        headers = {}
        if user:
            login = json.dumps({"username": user, "password": self.password(user)}).encode()
            asked = urllib.request.Request(f"{self.url}/auth/token", login, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=30) as response:
                headers["Authorization"] = f"Bearer {json.load(response)['access_token']}"
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.url}/tagger{path}", headers=headers)) as found:
                return int(found.status)
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Cluster(tmp_path_factory.mktemp("browser"), environment=USERS) as cluster, chromium() as browser:
        project = cluster.project
        tomorrow = (datetime.now(UTC) + timedelta(days=1)).date()  # nothing to catch up
        project.change(start_date=tomorrow, limits={"max_cost_usd_per_month": 500})
        put_rows(project, {n: f"note {n}: an apple in the storm" for n in range(4)})
        for ago in range(DAYS, 0, -1):
            put_day(project, ago)
        cluster.write(project.content)
        cluster.start()
        cluster.api.wait_for_dag("tag_notes")
        cluster.api.unpause("tag_notes")
        run_id = cluster.api.trigger("tag_notes", rows="all")
        assert cluster.api.wait_for_run("tag_notes", run_id) == "success"
        yield Site(cluster, browser, run_id)


def put_day(project: Any, ago: int) -> None:
    """Leave a run that ended at the noon of a day before today; it costs `ago` hundredths of a dollar."""
    changes: dict[str, Any] = {"texts": 100 + ago, "cached": 90, "tagged": 8 + ago, "refused": 1, "failed": 1}
    changes |= {
        "rows": 200,
        "seconds": {"tag": 10.0},
        "tags": {"fruit": 100 + ago, "weather": 50, MARKUP: 7, "天気": 9},
    }
    changes |= {"model": "gpt-5-mini" if ago > 30 else "gpt-5", "spec_id": "a" * 12 if ago > 30 else "b" * 12}
    put_run(project, f"day-{ago}", TODAY - timedelta(days=ago) + timedelta(hours=12), ago / 100, **changes)


@pytest.fixture
def tab(site: Site) -> Iterator[Tab]:
    """A page of somebody who is logged in."""
    context = site.browser.new_context(viewport={"width": 1400, "height": 1000}, locale="en-US", timezone_id="UTC")
    page = context.new_page()
    page.goto(site.url)
    page.fill("input[name=username]", "admin")
    page.fill("input[name=password]", site.password("admin"))
    page.locator("button[type=submit]").first.click()
    page.wait_for_url(lambda url: "/auth/" not in url)
    yield Tab(page)
    context.close()


def opened(tab: Tab, path: str) -> FrameLocator:
    """Open a page of Airflow that holds ours, and return its frame."""
    tab.page.goto(path)
    return tab.page.frame_locator("iframe")


def dataset_page(tab: Tab, site: Site, query: str = "") -> FrameLocator:
    return opened(tab, f"{site.url}/plugin/tagging/tagger/#/d/tag_notes{query}")


def days_ago(number: int) -> str:
    return f"{TODAY - timedelta(days=number):%Y-%m-%d}"


def chart(frame: FrameLocator, name: str) -> Locator:
    return frame.locator(f"[data-chart={name}]")


def table_of(frame: FrameLocator, name: str) -> dict[str, dict[str, str]]:
    """Open the table behind a chart, and return its values by row and column."""
    panel = chart(frame, name)
    panel.locator("details.behind > summary").click()
    panel.locator("tbody").wait_for()
    columns = panel.locator("thead th").all_text_contents()
    rows: list[list[str]] = panel.locator("tbody").evaluate(
        "body => [...body.rows].map(({cells: [head, ...values]}) => "
        "[head.textContent, ...values.map(cell => cell.dataset.value ?? '')])"
    )
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}


def drawn(page: Page, name: str) -> dict[str, list[Any]]:
    """Return what a chart has drawn: values by series, as its library has them."""
    [frame] = page.main_frame.child_frames
    found: dict[str, list[Any]] = frame.evaluate(
        "name => Object.fromEntries(tagging.chart(name).data.datasets.map(each => [each.label, [...each.data]]))", name
    )
    return found


def test_the_overview_is_in_the_navigation_and_leads_to_the_dataset(site: Site, tab: Tab) -> None:
    tab.page.goto(site.url)
    tab.page.get_by_role("link", name="Tagging").first.click()
    frame = tab.page.frame_locator("iframe")

    card = frame.locator("article, li, section").filter(has=frame.get_by_role("link", name="notes")).first
    expect(card).to_contain_text("success")
    expect(card).to_contain_text("of $500")
    frame.get_by_role("link", name="notes").first.click()

    expect(frame.get_by_role("heading", name="notes", level=1)).to_be_visible()
    expect(chart(frame, "cost").locator("canvas")).to_be_visible()
    assert tab.errors == []


def test_charts_and_the_tables_behind_them_show_what_the_runs_did(site: Site, tab: Tab) -> None:
    frame = dataset_page(tab, site, f"?from={days_ago(28)}&to={days_ago(1)}")
    expect(chart(frame, "estimate").locator("canvas")).to_be_visible()

    cost, outcomes, tags = (table_of(frame, name) for name in ("cost", "outcomes", "tags"))

    assert [float(row["Spent"]) for row in cost.values()] == pytest.approx([n / 100 for n in range(28, 0, -1)])
    assert {float(row["Saved by the cache"]) for row in cost.values()} == {2.0}
    assert [float(row["Tagged"]) for row in outcomes.values()] == [8 + n for n in range(28, 0, -1)]
    assert {row["Cached"] for row in outcomes.values()} == {"90"}
    assert [float(row["fruit"]) for row in tags.values()] == [100 + n for n in range(28, 0, -1)]
    assert drawn(tab.page, "cost")["Spent"] == pytest.approx([n / 100 for n in range(28, 0, -1)])
    assert drawn(tab.page, "tags")["天気"] == [9] * 28
    expect(frame.locator("[data-figure=spent] .value")).to_have_text("$4.06")
    assert tab.errors == []


def test_a_change_of_the_model_is_marked_and_told(site: Site, tab: Tab) -> None:
    frame = dataset_page(tab, site)

    changes = frame.locator("ol.changes li")
    expect(changes.filter(has_text="gpt-5-mini").filter(has_text="gpt-5")).to_have_count(1)
    expect(changes.filter(has_text=days_ago(30))).to_have_count(1)


def test_ranges_are_chosen_by_presets_and_by_dates_and_wrong_ones_are_told(site: Site, tab: Tab) -> None:
    frame = dataset_page(tab, site)
    frame.get_by_role("link", name="7 days").click()
    expect(frame.locator("p.said")).to_contain_text(f"{days_ago(6)} to {days_ago(0)}")
    assert f"from={days_ago(6)}" in tab.page.url  # it can be kept and sent

    frame.get_by_label("From").fill(days_ago(60))
    frame.get_by_label("to", exact=True).fill(days_ago(51))
    frame.get_by_role("button", name="Show", exact=True).click()
    expect(frame.locator("[data-figure=texts] .about")).to_have_text("10 runs")

    frame.get_by_label("to", exact=True).fill(days_ago(70))
    frame.get_by_role("button", name="Show", exact=True).click()
    expect(frame.get_by_role("alert").first).to_contain_text("is after the last")
    assert tab.errors == []


def test_markup_in_a_tag_is_text(site: Site, tab: Tab) -> None:
    frame = dataset_page(tab, site)

    expect(chart(frame, "tags").get_by_text(MARKUP).first).to_be_attached()
    expect(frame.locator("img")).to_have_count(0)
    assert tab.errors == []


def test_the_tab_of_a_run_moves_while_it_runs_and_leads_to_the_logs(site: Site, tab: Tab) -> None:
    cluster, go_on = site.cluster, threading.Event()
    project = cluster.project
    asked = threading.Semaphore(0)

    def slowly(_: object) -> Any:
        asked.release()
        go_on.wait(120)
        return completion('{"tags": ["fruit"]}')

    put_rows(project, {n: f"another note {n}: a zebra" for n in range(100, 106)})
    cluster.llm.script(completion('{"tags": ["fruit"]}'), *[slowly] * 5)
    run_id = cluster.api.trigger("tag_notes", rows="all")
    try:
        assert asked.acquire(timeout=120)
        frame = opened(tab, f"{site.url}/dags/tag_notes/runs/{quote(run_id)}/plugin/tagging_run")
        line = frame.get_by_role("progressbar", name="shard 1/1")
        expect(line).to_have_attribute("aria-valuenow", "1", timeout=30_000)
    finally:
        go_on.set()
    expect(frame.locator(".live[data-state=running]")).to_have_count(0, timeout=90_000)  # by itself
    expect(line).to_have_attribute("aria-valuenow", "6")
    expect(frame.locator("[data-figure=tagged] .value")).to_have_text("6")
    assert cluster.api.wait_for_run("tag_notes", run_id) == "success"
    frame.get_by_role("link", name=re.compile("log", re.I)).first.click()
    tab.page.wait_for_url(re.compile(r"/tasks/tag/mapped/0"))
    assert tab.errors == []


def test_nobody_sees_a_dataset_without_the_right_to(site: Site) -> None:
    paths = ["/", "/static/page.js", "/openapi.json", "/api/v1/datasets", "/api/v1/datasets/tag_notes"]
    of_runs = [f"/run/tag_notes/{quote(site.first_run)}", f"/api/v1/datasets/tag_notes/runs/{quote(site.first_run)}"]

    assert {site.status(path, None) for path in [*paths, *of_runs]} == {401}
    assert {site.status(path, GUEST) for path in [paths[-1], *of_runs]} == {403}
    assert {site.status(path, "admin") for path in [*paths, *of_runs]} == {200}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_airflows_theme_is_followed_and_texts_are_readable_in_it(site: Site, tab: Tab, theme: str) -> None:
    tab.page.evaluate("theme => localStorage.setItem('theme', theme)", theme)
    frame = dataset_page(tab, site)
    expect(chart(frame, "estimate").locator("canvas")).to_be_visible()

    [document] = tab.page.main_frame.child_frames
    worst, dark = document.evaluate(Path(__file__).with_name("contrast.js").read_text())

    assert dark == (theme == "dark")
    assert worst["ratio"] >= 4.5, worst
    assert tab.errors == []


def test_everything_is_reached_by_keyboard_and_has_a_name(site: Site, tab: Tab) -> None:
    frame = dataset_page(tab, site)
    expect(chart(frame, "estimate").locator("canvas")).to_be_visible()

    for canvas in frame.locator("canvas").all():
        assert len(canvas.get_attribute("aria-label") or "") > 20
    for control in frame.locator("a, button, input, summary").all():
        named = control.evaluate("e => (e.ariaLabel || e.labels?.[0]?.textContent || e.textContent || '').trim()")
        assert named, control.evaluate("e => e.outerHTML")
    assert frame.locator("h1").count() == 1
    assert all(frame.locator("table caption, table thead th[scope=col]").all_text_contents())
    frame.get_by_role("link", name="28 days").focus()
    outline = frame.get_by_role("link", name="28 days").evaluate(
        "e => { e.focus({focusVisible: true}); const s = getComputedStyle(e); return s.outlineStyle + s.boxShadow }"
    )
    assert outline != "nonenone"
    tab.page.keyboard.press("Enter")
    expect(frame.locator("p.said")).to_contain_text(days_ago(27))
    assert frame.locator(":focus").text_content() == "28 days"  # where it was
