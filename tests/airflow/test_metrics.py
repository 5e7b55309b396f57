"""A run's metrics as a StatsD server and an OpenTelemetry collector get them, from the report step of a real run."""

import atexit
import json
import re
import runpy
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.sdk._shared.observability.metrics.otel_logger import flush_otel_metrics
from airflow.sdk.observability import stats
from airflow.sdk.observability.metrics.stats_utils import get_stats_factory
from opentelemetry import metrics as opentelemetry
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from demo.processes import LOOPBACK
from demo.stand_in import completion
from tagger.airflow.metrics import sent
from tagger.exceptions import RunFailed, Unreachable
from tests.conftest import REPOSITORY
from tests.databases import teach
from tests.project import Project

NIGHT = datetime(2026, 11, 5, 1, tzinfo=UTC)
SECRET = "the patient ate an apple in the storm"


class StatsD:
    """A StatsD server: what it was sent, by name; a name that comes again replaces."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((LOOPBACK, 0))
        self._socket.settimeout(0.3)
        self.port = self._socket.getsockname()[1]

    def lines(self) -> list[str]:
        """Return the lines of ours since the last time."""
        found = []
        while True:
            try:
                found.append(self._socket.recv(65536).decode())
            except TimeoutError:
                return [line for line in found if ".tagger." in line]

    def close(self) -> None:
        """Free the port."""
        self._socket.close()


@pytest.fixture
def statsd(monkeypatch: pytest.MonkeyPatch) -> Iterator[StatsD]:
    server = StatsD()
    switch_on(monkeypatch, statsd_on="True", statsd_host=LOOPBACK, statsd_port=str(server.port))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def metrics_off_afterwards() -> Iterator[None]:
    yield
    stats.initialize(factory=get_stats_factory(), export_legacy_names=True)


def switch_on(monkeypatch: pytest.MonkeyPatch, **options: str) -> None:
    """Set `[metrics]`, and let Airflow begin anew with it, as the process of a task does."""
    for option, value in options.items():
        monkeypatch.setenv(f"AIRFLOW__METRICS__{option.upper()}", value)
    stats.initialize(factory=get_stats_factory(), export_legacy_names=True)


def run_dag(project: Project, folder: Path, monkeypatch: pytest.MonkeyPatch, day: int = 0, **conf: Any) -> Any:
    """Run the project's DAG in Airflow."""
    from airflow.utils.db import initdb

    initdb()
    (folder / "datasets").mkdir(exist_ok=True)
    (folder / "datasets" / "notes.yaml").write_text(yaml.safe_dump(project.content, allow_unicode=True))
    monkeypatch.setenv("TAGGER_DATASETS", str(folder / "datasets"))
    for conn_id in ("db", "aws_default", "openai_default"):
        connection = project.connections(conn_id)
        fields = {name: getattr(connection, name) for name in ("conn_type", "host", "login", "password", "extra")}
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(fields))
    dag = runpy.run_path(str(REPOSITORY / "dags" / "tagging.py"))["tag_notes"]
    return dag.test(logical_date=NIGHT + timedelta(days=day), run_conf=conf or None)


def test_a_run_in_airflow_sends_its_figures(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statsd: StatsD
) -> None:
    project.change(limits={"max_failed_fraction": 1, "max_cost_usd_per_month": 10})
    for number, body in enumerate([SECRET, f"{SECRET}, twice", "a zebra"]):
        project.put(number, body)
    teach(project.llm, zebra=completion("no json"))

    run = run_dag(project, tmp_path, monkeypatch)

    summary = project.summary(project.open(run.run_id))
    sent_lines = statsd.lines()
    gauges = dict(line.removesuffix("|g").split(":") for line in sent_lines if line.endswith("|g"))
    assert len(gauges) == len(sent_lines)
    cost, tokens = summary.cost_usd, summary.input_tokens
    assert cost
    left = 10 - cost
    expected: dict[str, Any] = {
        "run.success.notes": 1,
        "run.rows.notes": 3,
        "run.texts.notes.cached": 0,
        "run.texts.notes.tagged": 2,
        "run.texts.notes.refused": 0,
        "run.texts.notes.failed": 1,
        "run.texts.notes.skipped": 0,
        "run.texts.notes.pending": 0,
        "run.requests.notes": summary.llm_requests,
        "run.tokens.notes.input": tokens,
        "run.tokens.notes.cached_input": summary.cached_input_tokens,
        "run.tokens.notes.output": summary.output_tokens,
        "run.cost_usd.notes": pytest.approx(cost, abs=1e-6),
        "run.estimated_usd.notes": pytest.approx(summary.estimated_usd, abs=1e-6),
        "run.saved_usd.notes.cache": 0,
        "run.saved_usd.notes.duplicates": 0,
        "run.saved_usd.notes.batch": 0,
        "run.saved_usd.notes.prompt_caching": pytest.approx(summary.saved_by_prompt_caching_usd, abs=1e-6),
        **{f"run.seconds.notes.{step}": seconds for step, seconds in summary.seconds.items()},
        "month.spent_usd.notes": pytest.approx(cost, abs=1e-6),
        "month.saved_usd.notes": pytest.approx(summary.total_saved_usd, abs=1e-6),
        "month.budget_left_usd.notes": pytest.approx(left, abs=1e-6),
    }
    assert {name: float(value) for name, value in gauges.items()} == {
        f"airflow.tagger.{name}": value for name, value in expected.items()
    }
    assert "patient" not in "".join(sent_lines)
    documented = (REPOSITORY / "docs" / "api-and-metrics.md").read_text(encoding="utf-8")
    assert {name.partition(".notes")[0] for name in expected} <= set(re.findall(r"`tagger\.([a-z_.]+)` \|", documented))


def report_again(project: Project) -> None:
    from tagger.report import report

    run = project.open("manual__1")
    with sent(run):
        report(run)


def test_a_report_that_is_done_again_says_the_same_again(project: Project, statsd: StatsD) -> None:
    project.put(1, SECRET)
    project.run("manual__1")

    report_again(project)
    first = [line for line in statsd.lines() if "seconds" not in line]
    report_again(project)

    assert [line for line in statsd.lines() if "seconds" not in line] == first != []


def test_a_run_that_is_not_acceptable_sends_its_figures_too(project: Project, statsd: StatsD) -> None:
    project.put(1, SECRET)
    teach(project.llm, patient=completion("no json"))
    with pytest.raises(RunFailed):
        project.run("manual__1")

    with pytest.raises(RunFailed):
        report_again(project)

    lines = statsd.lines()
    assert {"airflow.tagger.run.success.notes:0|g", "airflow.tagger.run.texts.notes.failed:1|g"} <= set(lines)


def test_a_dry_run_sends_nothing(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statsd: StatsD
) -> None:
    project.put(1, SECRET)

    run = run_dag(project, tmp_path, monkeypatch, day=1, dry_run=True)

    assert str(run.state) == "success"
    assert statsd.lines() == []


def test_what_is_not_known_is_not_sent(project: Project, statsd: StatsD) -> None:
    project.change(llm={"price": None})
    project.put(1, SECRET)
    project.run("manual__1")

    report_again(project)

    names = {line.split(":")[0] for line in statsd.lines()}
    assert "airflow.tagger.run.tokens.notes.input" in names
    assert not {name for name in names if "cost_usd" in name or "spent_usd" in name or "budget" in name}


def test_a_report_that_fails_itself_sends_nothing(project: Project, statsd: StatsD) -> None:
    project.put(1, SECRET)
    project.run("manual__1")

    with pytest.raises(Unreachable), sent(project.open("manual__1")):
        raise Unreachable("S3 does not answer")

    assert statsd.lines() == []


def test_no_fault_in_sending_fails_the_step(project: Project, statsd: StatsD, caplog: pytest.LogCaptureFixture) -> None:
    project.put(1, SECRET)
    project.run("manual__1")
    run = project.open("manual__1")
    run.storage.put(f"{run.files}summary.json", b"damaged")

    with sent(run):
        pass

    assert [record.getMessage() for record in caplog.records] == [
        "metrics: not all are sent: StorageError; the run's summary has the figures"
    ]


def test_tags_stand_apart_from_the_name_where_the_channel_has_them(
    project: Project, statsd: StatsD, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch_on(monkeypatch, statsd_influxdb_enabled="True")
    project.put(1, SECRET)
    project.run("manual__1")

    report_again(project)

    lines = statsd.lines()
    assert "airflow.tagger.run.texts,dataset=notes,outcome=tagged:1|g" in lines
    assert "airflow.tagger.run.rows,dataset=notes:1|g" in lines


def test_nothing_is_read_where_nothing_is_sent(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.put(1, SECRET)
    project.run("manual__1")
    run = project.open("manual__1")
    run.storage.put(f"{run.files}summary.json", b"damaged")  # which would be told

    with sent(run):
        pass


class Collector(HTTPServer):
    """An OpenTelemetry collector, over HTTP."""

    def __init__(self) -> None:
        self.points: dict[tuple[str, str, str], float] = {}
        super().__init__((LOOPBACK, 0), _Collecting)


class _Collecting(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = ExportMetricsServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.gauge.data_points:
                        tags = {tag.key: tag.value.string_value for tag in point.attributes}
                        key = (metric.name, tags.pop("dataset", ""), *tags.values(), "")[:3]
                        self.server.points[key] = point.as_double or point.as_int  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def test_a_collector_gets_gauges_with_tags(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.put(1, SECRET)
    project.run("manual__1")
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{LOOPBACK}:{collector.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "3600000")
        switch_on(monkeypatch, otel_on="True")

        report_again(project)
        flush_otel_metrics()  # type: ignore[no-untyped-call] # as at the end of a task's process
        atexit.unregister(flush_otel_metrics)
        provider: Any = opentelemetry.get_meter_provider()
        provider.shutdown()
        collector.shutdown()

    assert collector.points["airflow.tagger.run.texts", "notes", "tagged"] == 1
    assert collector.points["airflow.tagger.run.rows", "notes", ""] == 1
    assert collector.points["airflow.tagger.run.cost_usd", "notes", ""] > 0
    assert {name for name, dataset, _ in collector.points if dataset != "notes"} == set()
