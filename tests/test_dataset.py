"""Dataset files: what they hold, what they default to, and how each mistake in one is answered."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tagger.dataset import LLM, AssetSchedule, Dataset, Limits, Price, Shards
from tagger.dataset_files import dataset_files, find_dataset, load_dataset, load_datasets, parse_dataset, read_yaml
from tagger.exceptions import DatasetError, InputError
from tests.project import merged

SHIPPED = Path(__file__).resolve().parent.parent / "dags" / "datasets"

FULL = """\
dataset: articles                # [a-z][a-z0-9_]*; the DAG id is tag_articles
schedule: "0 1 * * *"            # cron; null: only on demand; {assets: [uri]}: when they change
timezone: Asia/Tokyo
start_date: 2026-11-01
storage: s3://tagger             # snapshots, cache and runs live under it
storage_conn_id: aws_default
source:
  conn_id: tagger_db
  table: articles                # schema.table allowed; a view serves as well
  id_column: id
  text_columns: [title, body]    # NULL and blank parts left out, the rest joined by a blank line
  updated_at: updated_at         # absent: every run takes all rows
  timezone: UTC                  # of naive timestamps; default: the dataset's
  lookback: 1d                   # how far before the window rows are taken again; the cache makes it free
  max_chars: 100000              # longer texts are refused (too_long) without a call
target:
  conn_id: tagger_db             # default: the source's
  table: article_tags            # created if missing
llm:
  conn_id: openai_default
  model: gpt-5-mini
  mode: online                   # or batch
  concurrency: 64                # calls in flight in one process
  requests_per_minute: 5000      # optional; of the whole run
  tokens_per_minute: 2000000     # optional; of the whole run
  price: {input: 0.25, cached_input: 0.025, output: 2.0}   # USD per million tokens
  params: {}                     # passed through to the request (temperature, reasoning_effort, …)
  pool: default_pool             # Airflow pool of the tag step
prompt: |
  You tag medical articles by topic.
tags:
  - {id: cardiology, description: Heart and blood vessels.}
max_tags: 3                      # 1: single label
allow_none: true                 # no tag may fit: status tagged, tags []
revision: 1                      # raise it to tag everything again
lock: {conn_id: redis_default}   # optional: several workers at once
limits: {max_cost_usd: 20, max_failed_fraction: 0.01, max_deleted_fraction: 0.1}
shards: {texts_per_shard: 5000, max: 16}
alerts: {to: [team@example.com], deadline: 2h}
"""
"""The example of the documentation, whole."""

MINIMAL = """\
dataset: notes
storage: s3://tagger
source: {conn_id: db, table: notes, id_column: id, text_columns: [body]}
target: {table: note_tags}
llm: {model: gpt-5-mini}
prompt: You tag notes.
tags: [{id: fruit}]
"""
"""The required keys and nothing else."""

REQUIRED = [
    "dataset",
    "storage",
    "source",
    "source.conn_id",
    "source.table",
    "source.id_column",
    "source.text_columns",
    "target",
    "target.table",
    "llm",
    "llm.model",
    "prompt",
    "tags",
]


def write(folder: Path, content: str | bytes, name: str = "notes.yaml") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def minimal(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    return merged(yaml.safe_load(MINIMAL), changes or {})


def mistakes(content: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        parse_dataset(content, "notes.yaml")
    return str(caught.value)


def loading_fails(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        load_dataset(path)
    return str(caught.value)


# what a file means


def test_full_example_has_the_values_it_states(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, FULL))

    assert dataset.model_dump() == {
        "dataset": "articles",
        "schedule": "0 1 * * *",
        "timezone": "Asia/Tokyo",
        "start_date": date(2026, 11, 1),
        "storage": "s3://tagger",
        "storage_conn_id": "aws_default",
        "source": {
            "conn_id": "tagger_db",
            "table": "articles",
            "id_column": "id",
            "text_columns": ["title", "body"],
            "updated_at": "updated_at",
            "timezone": "UTC",
            "lookback": "86400s",
            "max_chars": 100_000,
        },
        "target": {"conn_id": "tagger_db", "table": "article_tags"},
        "llm": {
            "conn_id": "openai_default",
            "model": "gpt-5-mini",
            "mode": "online",
            "batch_fallback": None,
            "texts_per_request": 1,
            "concurrency": 64,
            "requests_per_minute": 5000,
            "tokens_per_minute": 2_000_000,
            "price": {"input": 0.25, "cached_input": 0.025, "output": 2.0},
            "params": {},
            "pool": "default_pool",
        },
        "prompt": "You tag medical articles by topic.\n",
        "tags": [{"id": "cardiology", "description": "Heart and blood vessels."}],
        "max_tags": 3,
        "allow_none": True,
        "examples": [],
        "confidence": False,
        "review_below": None,
        "revision": 1,
        "lock": {"conn_id": "redis_default"},
        "limits": {
            "max_cost_usd": 20.0,
            "max_cost_usd_per_month": None,
            "max_failed_fraction": 0.01,
            "max_deleted_fraction": 0.1,
        },
        "rollout": None,
        "retention": {"snapshots": None, "runs": None},
        "shards": {"texts_per_shard": 5000, "max": 16},
        "alerts": {"to": ["team@example.com"], "deadline": "7200s"},
        "max_active_runs": 1,
        "tasks": {
            step: {"queue": None, "timeout": None, "retries": 3, "executor_config": {}}
            for step in ("default", "snapshot", "plan", "tag", "load_back", "report")
        },
    }


def test_minimal_file_gets_the_documented_defaults(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, MINIMAL))

    assert (dataset.schedule, dataset.timezone, dataset.start_date) == (None, "UTC", date(2026, 1, 1))
    assert (dataset.storage_conn_id, dataset.target_conn_id) == ("aws_default", "db")
    assert (dataset.source.updated_at, dataset.source.lookback) == (None, timedelta(days=1))
    assert dataset.source.max_chars == 100_000
    assert dataset.llm == LLM(model="gpt-5-mini", conn_id="openai_default", mode="online", concurrency=64)
    assert (dataset.llm.requests_per_minute, dataset.llm.tokens_per_minute, dataset.llm.price) == (None, None, None)
    assert (dataset.llm.params, dataset.llm.pool) == ({}, "default_pool")
    assert (dataset.max_tags, dataset.allow_none, dataset.revision) == (3, True, 1)
    assert dataset.limits == Limits(max_cost_usd=None, max_failed_fraction=0.01, max_deleted_fraction=0.1)
    assert dataset.shards == Shards(texts_per_shard=5000, max=16)
    assert (dataset.lock, dataset.alerts.to, dataset.alerts.deadline) == (None, [], None)
    assert dataset.tags[0].description == ""


def test_naive_timestamps_are_of_the_datasets_zone_unless_the_source_has_its_own() -> None:
    assert parse_dataset(minimal({"timezone": "Asia/Tokyo"}), "f").source_zone.key == "Asia/Tokyo"
    own = minimal({"timezone": "Asia/Tokyo", "source": {"timezone": "UTC"}})
    assert parse_dataset(own, "f").source_zone.key == "UTC"


@pytest.mark.parametrize(
    ("written", "seconds"), [("45s", 45), ("30m", 1800), ("2h", 7200), ("1d", 86_400), ("0s", 0), ("14d", 1_209_600)]
)
def test_durations_have_a_unit(written: str, seconds: int) -> None:
    assert parse_dataset(minimal({"source": {"lookback": written}}), "f").source.lookback.total_seconds() == seconds


def test_a_step_is_run_as_by_default_but_for_what_it_names_itself() -> None:
    tasks = {"default": {"queue": "safe", "retries": 5, "timeout": "1h"}, "tag": {"queue": "spot", "timeout": None}}

    dataset = parse_dataset(minimal({"tasks": tasks}), "notes.yaml")

    assert dataset.tasks.of("plan") == dataset.tasks.default
    tag = dataset.tasks.of("tag")
    assert (tag.queue, tag.retries, tag.timeout) == ("spot", 5, None)


def test_the_assets_are_the_tables_in_ascii() -> None:
    changes = {"source": {"conn_id": "db", "table": "public.記事"}, "target": {"table": "tags"}}

    dataset = parse_dataset(minimal(changes), "notes.yaml")

    assert dataset.source_asset == "x-tagger://db/public.%E8%A8%98%E4%BA%8B"
    assert dataset.target_asset == "x-tagger://db/tags"


@pytest.mark.parametrize("cron", ["0 1 * * *", "*/15 * * * *", "0 6 * * 1-5", "0 6 * * MON", "0 0 1 * *", "@daily"])
def test_a_schedule_may_be_cron(cron: str) -> None:
    assert parse_dataset(minimal({"schedule": cron}), "f").schedule == cron


def test_a_schedule_may_be_assets() -> None:
    dataset = parse_dataset(minimal({"schedule": {"assets": ["s3://bucket/articles"]}}), "f")

    assert dataset.schedule == AssetSchedule(assets=["s3://bucket/articles"])


def test_price_zero_stands_for_a_local_model() -> None:
    assert parse_dataset(minimal({"llm": {"price": 0}}), "f").llm.price == Price(input=0, output=0)


def test_target_of_the_same_name_in_another_database_is_no_mistake() -> None:
    dataset = parse_dataset(minimal({"target": {"conn_id": "warehouse", "table": "notes"}}), "f")

    assert dataset.target_conn_id == "warehouse"


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert load_dataset(write(tmp_path, "\ufeff" + MINIMAL)).dataset == "notes"


@pytest.mark.parametrize("content", [MINIMAL, FULL], ids=["minimal", "full"])
def test_a_frozen_dataset_reads_back_equal(content: str) -> None:
    dataset = parse_dataset(yaml.safe_load(content), "notes.yaml")

    assert parse_dataset(json.loads(dataset.model_dump_json()), "dataset.json") == dataset


@pytest.mark.parametrize("file", dataset_files(SHIPPED), ids=lambda path: path.stem)
def test_shipped_files_load(file: Path) -> None:
    dataset = load_dataset(file)

    assert dataset.dataset == file.stem
    assert all(tag.description for tag in dataset.tags)


def test_articles_and_survey_answers_are_shipped() -> None:
    assert [file.stem for file in dataset_files(SHIPPED)] == ["articles", "survey_answers"]


# mistakes: file, key, found, expected


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_required_key_is_named(key: str) -> None:
    content = yaml.safe_load(MINIMAL)
    *sections, last = key.split(".")
    section = content
    for name in sections:
        section = section[name]
    del section[last]

    assert f"notes.yaml: `{key}`: found nothing, expected a value" in mistakes(content)


@pytest.mark.parametrize(
    ("changes", "key", "near"),
    [
        ({"schedul": None}, "schedul", "schedule"),
        ({"source": {"colunm": "id", "id_colum": "id"}}, "source.id_colum", "id_column"),
        ({"target": {"tabel": "x"}}, "target.tabel", "table"),
        ({"llm": {"concurency": 8}}, "llm.concurency", "concurrency"),
        ({"llm": {"price": {"input": 1, "output": 1, "cached_inputs": 1}}}, "llm.price.cached_inputs", "cached_input"),
        ({"tags": [{"id": "fruit"}, {"id": "x", "descripton": "y"}]}, "tags[1].descripton", "description"),
        ({"limits": {"max_cost": 1}}, "limits.max_cost", "max_cost_usd"),
        ({"shards": {"maximum": 1}}, "shards.maximum", "max"),
        ({"alerts": {"deadlines": "2h"}}, "alerts.deadlines", "deadline"),
        ({"tasks": {"load": {}}}, "tasks.load", "load_back"),
        ({"tasks": {"tag": {"que": "spot"}}}, "tasks.tag.que", "queue"),
        ({"lock": {"conn_id": "r", "con_id": "r"}}, "lock.con_id", "conn_id"),
        ({"schedule": {"assets": ["a"], "asset": "b"}}, "schedule.asset", "assets"),
    ],
)
def test_unknown_key_is_answered_with_the_one_that_was_meant(changes: dict[str, Any], key: str, near: str) -> None:
    message = mistakes(minimal(changes))

    assert re.search(rf"^notes.yaml: `{re.escape(key)}`: found an unknown key, expected `{near}`", message, re.M)


def test_unknown_key_like_no_other_is_answered_with_those_there_are() -> None:
    assert "`target.zzz`: found an unknown key, expected one of conn_id, table" in mistakes(
        minimal({"target": {"zzz": 1}})
    )


INVALID: list[tuple[dict[str, Any], str, str, str]] = [
    # changes, key, found, expected
    ({"dataset": "Articles"}, "dataset", "'Articles'", "a-z"),
    ({"dataset": "1st"}, "dataset", "'1st'", "a-z"),
    ({"dataset": "a-b"}, "dataset", "'a-b'", "a-z"),
    ({"dataset": 5}, "dataset", "5", "text"),
    ({"schedule": "0 25 * * *"}, "schedule", "'0 25 * * *'", "a cron expression of five fields"),
    ({"schedule": "daily"}, "schedule", "'daily'", "a cron expression of five fields"),
    ({"schedule": "0 0 1 * * *"}, "schedule", "'0 0 1 * * *'", "a cron expression of five fields"),
    ({"schedule": "@reboot"}, "schedule", "'@reboot'", "a cron expression of five fields"),
    ({"schedule": ""}, "schedule", "''", "a cron expression of five fields"),
    ({"schedule": "0 0 30 2 *"}, "schedule", "'0 0 30 2 *'", "cron"),
    ({"schedule": "R R * * *"}, "schedule", "'R R * * *'", "cron"),
    ({"schedule": 5}, "schedule", "5", "text"),
    ({"schedule": {"assets": []}}, "schedule.assets", "a list of 0", "at least 1"),
    ({"schedule": {"assets": "s3://x"}}, "schedule.assets", "'s3://x'", "list"),
    ({"timezone": "Asia/Tokio"}, "timezone", "'Asia/Tokio'", "a time zone such as UTC or Asia/Tokyo"),
    ({"timezone": "Asia"}, "timezone", "'Asia'", "a time zone"),
    ({"timezone": "../UTC"}, "timezone", "'../UTC'", "a time zone"),
    ({"source": {"timezone": "JST+9"}}, "source.timezone", "'JST+9'", "a time zone"),
    ({"start_date": "tomorrow"}, "start_date", "'tomorrow'", "date"),
    ({"start_date": 20261101}, "start_date", "20261101", "date"),
    ({"storage": "gs://tagger"}, "storage", "'gs://tagger'", "s3://"),
    ({"storage": "tagger"}, "storage", "'tagger'", "s3://"),
    ({"storage": "/data"}, "storage", "'/data'", "s3://"),
    ({"source": {"lookback": "1w"}}, "source.lookback", "'1w'", "a duration such as 30m, 2h or 1d"),
    ({"source": {"lookback": 1}}, "source.lookback", "1", "a duration such as 30m, 2h or 1d"),
    ({"source": {"lookback": "-1d"}}, "source.lookback", "'-1d'", "a duration"),
    ({"source": {"lookback": "9999999999999999d"}}, "source.lookback", "'9999999999999999d'", "a duration"),
    ({"alerts": {"deadline": "soon"}}, "alerts.deadline", "'soon'", "a duration"),
    ({"source": {"max_chars": 0}}, "source.max_chars", "0", "greater than 0"),
    ({"source": {"text_columns": "body"}}, "source.text_columns", "'body'", "list"),
    ({"source": {"text_columns": []}}, "source.text_columns", "a list of 0", "at least 1"),
    ({"source": {"text_columns": ["body", "body"]}}, "source.text_columns", "a list of 2", "each column once"),
    ({"source": {"text_columns": [1]}}, "source.text_columns[0]", "1", "text"),
    ({"source": "notes"}, "source", "'notes'", "conn_id|dictionary|keys"),
    ({"source": ["notes"]}, "source", "a list of 1", "conn_id|dictionary|keys"),
    ({"target": {"table": "notes"}}, "target.table", "'notes'", "a table other than the source's"),
    ({"target": {"conn_id": "db", "table": "notes"}}, "target.table", "'notes'", "a table other than the source's"),
    ({"llm": {"mode": "fast"}}, "llm.mode", "'fast'", "'online' or 'batch'"),
    ({"llm": {"concurrency": 0}}, "llm.concurrency", "0", "greater than or equal to 1"),
    ({"llm": {"concurrency": "many"}}, "llm.concurrency", "'many'", "integer"),
    ({"llm": {"requests_per_minute": 0}}, "llm.requests_per_minute", "0", "greater than 0"),
    ({"llm": {"price": {"input": -1, "output": 1}}}, "llm.price.input", "-1", "greater than or equal to 0"),
    ({"llm": {"price": {"input": 1, "output": -0.5}}}, "llm.price.output", "-0.5", "greater than or equal to 0"),
    ({"llm": {"price": {"input": 1}}}, "llm.price.output", "nothing", "a value"),
    ({"llm": {"price": {"input": float("inf"), "output": 1}}}, "llm.price.input", "inf", "number"),
    ({"llm": {"price": 5}}, "llm.price", "5", "input|dictionary|keys"),
    ({"llm": {"params": ["temperature"]}}, "llm.params", "a list of 1", "dictionary|keys"),
    ({"llm": {"params": {"model": "x"}}}, "llm.params", "model", "tagger sets itself"),
    ({"llm": {"params": {"messages": []}}}, "llm.params", "messages", "tagger sets itself"),
    ({"llm": {"params": {"stream": True}}}, "llm.params", "stream", "tagger sets itself"),
    ({"llm": {"params": {"n": 2}}}, "llm.params", "n", "tagger sets itself"),
    ({"prompt": " \n "}, "prompt", r"' \n '", "what the texts are"),
    ({"prompt": None}, "prompt", "None", "text"),
    ({"prompt": {"text": "x"}}, "prompt", "keys text", "text"),
    ({"tags": []}, "tags", "a list of 0", "at least 1"),
    ({"tags": {"fruit": "apples"}}, "tags", "keys fruit", "list"),
    ({"tags": ["fruit"]}, "tags[0]", "'fruit'", "id|dictionary|keys"),
    ({"tags": [{"id": "a"}, {"id": "b"}, {"id": "a"}]}, "tags", "a list of 3", "`a` stands there twice"),
    ({"tags": [{"id": " a"}]}, "tags[0].id", "' a'", "one line without surrounding blanks"),
    ({"tags": [{"id": "a\nb"}]}, "tags[0].id", r"'a\nb'", "one line"),
    ({"tags": [{"id": ""}]}, "tags[0].id", "''", "at least 1"),
    ({"tags": [{"id": "x" * 65}]}, "tags[0].id", "xxx", "at most 64"),
    ({"tags": [{"id": f"t{i}"} for i in range(1001)]}, "tags", "a list of 1001", "at most 1000 tags"),
    ({"tags": [{"id": f"{i:060}"} for i in range(251)]}, "tags", "a list of 251", "15000 characters"),
    ({"max_tags": 0}, "max_tags", "0", "greater than or equal to 1"),
    ({"max_tags": "many"}, "max_tags", "'many'", "integer"),
    ({"max_tags": None}, "max_tags", "None", "integer"),
    ({"max_tags": True}, "max_tags", "True", "integer"),
    ({"revision": True}, "revision", "True", "integer"),
    ({"allow_none": "maybe"}, "allow_none", "'maybe'", "boolean"),
    ({"lock": "redis_default"}, "lock", "'redis_default'", "conn_id|dictionary|keys"),
    ({"limits": None}, "limits", "None", "max_cost_usd|dictionary|keys"),
    ({"limits": {"max_cost_usd": 0}}, "limits.max_cost_usd", "0", "greater than 0"),
    ({"limits": {"max_failed_fraction": 5}}, "limits.max_failed_fraction", "5", "less than or equal to 1"),
    ({"limits": {"max_failed_fraction": float("nan")}}, "limits.max_failed_fraction", "nan", "[01]|number"),
    ({"limits": {"max_deleted_fraction": -1}}, "limits.max_deleted_fraction", "-1", "greater than or equal to 0"),
    ({"shards": {"max": 0}}, "shards.max", "0", "greater than or equal to 1"),
    ({"alerts": {"to": "team@example.com"}}, "alerts.to", "'team@example.com'", "list"),
    ({"alerts": {"to": ["team"]}}, "alerts.to", "a list of 1", "addresses such as team@example.com"),
    ({"confidence": "very"}, "confidence", "'very'", "a valid boolean"),
    ({"confidence": True, "review_below": 0}, "review_below", "0 (a number)", "greater than 0"),
    ({"confidence": True, "review_below": 1.1}, "review_below", "1.1 (a number)", "less than or equal to 1"),
    ({"confidence": True, "review_below": True}, "review_below", "True (true/false)", "a number"),
    ({"review_below": 0.5}, "review_below", "0.5 (a number)", "no value without `confidence: true`"),
    ({"allow_none": False, "examples": [{"text": "x", "tags": []}]}, "examples[0].tags", "a list of 0", "from one to"),
    ({"alerts": {"to": ["a@b.c, d@e.f"]}}, "alerts.to", "a list of 1", "addresses"),
    ({"alerts": {"to": ["a@b.c\nBcc: d@e.f"]}}, "alerts.to", "a list of 1", "addresses"),
    ({"max_active_runs": 0}, "max_active_runs", "0", "greater than or equal to 1"),
    ({"tasks": {"tag": {"timeout": "0s"}}}, "tasks.tag.timeout", "'0s'", "more than 0s"),
    ({"tasks": {"tag": {"timeout": 60}}}, "tasks.tag.timeout", "60", "a duration"),
    ({"tasks": {"tag": {"retries": -1}}}, "tasks.tag.retries", "-1", "greater than or equal to 0"),
    ({"tasks": {"tag": {"retries": True}}}, "tasks.tag.retries", "True", "an integer"),
    ({"tasks": {"tag": {"queue": ""}}}, "tasks.tag.queue", "''", "at least 1 character"),
    ({"tasks": {"tag": {"executor_config": {"a": float("nan")}}}}, "tasks.tag.executor_config", "keys a", "JSON"),
    ({"tasks": {"tag": "spot"}}, "tasks.tag", "'spot'", "keys: executor_config, queue, retries, timeout"),
]


@pytest.mark.parametrize(("changes", "key", "found", "expected"), INVALID, ids=lambda value: str(value)[:60])
def test_wrong_value_is_answered_with_file_key_found_and_expected(
    changes: dict[str, Any], key: str, found: str, expected: str
) -> None:
    message = mistakes(minimal(changes))

    line = next((line for line in message.splitlines() if line.startswith(f"notes.yaml: `{key}`: found ")), "")
    said, _, wanted = line.removeprefix(f"notes.yaml: `{key}`: found ").partition(", expected ")
    assert line, message
    assert found in said
    assert re.search(expected, wanted)


@pytest.mark.parametrize(
    ("schedule", "key"), [(5, "schedule"), ({"assets": []}, "schedule.assets"), ([], "schedule")], ids=str
)
def test_one_mistake_is_answered_once(schedule: Any, key: str) -> None:
    assert re.findall("^notes.yaml: `(.*?)`", mistakes(minimal({"schedule": schedule})), re.M) == [key]


@pytest.mark.parametrize("changes", [{"limits": 5}, {"lock": "x"}, {"tags": ["x"]}, {"source": "x"}], ids=str)
def test_no_mistake_is_told_in_names_of_our_classes(changes: dict[str, Any]) -> None:
    assert "instance of" not in mistakes(minimal(changes))


@pytest.mark.parametrize(
    ("written", "found"),
    [("no", "False"), ("on", "True"), ("123", "123"), ("1.5", "1.5"), ("2026-01-01", "2026-01-01")],
)
def test_tag_id_that_yaml_reads_as_another_type_wants_quotes(tmp_path: Path, written: str, found: str) -> None:
    plain = MINIMAL.replace("id: fruit", f"id: {written}")
    message = loading_fails(write(tmp_path, plain))

    assert f"`tags[0].id`: found {found}" in message
    assert "expected text (in quotes" in message
    quoted = load_dataset(write(tmp_path, MINIMAL.replace("id: fruit", f'id: "{written}"')))
    assert quoted.tag_ids == [written]


def test_every_mistake_of_a_file_is_listed() -> None:
    message = mistakes(minimal({"timezone": "Mars/Base", "max_tags": 0, "surce": {}, "llm": {"mode": "x"}}))

    keys = re.findall("^notes.yaml: `(.*?)`", message, re.M)
    assert sorted(keys) == ["llm.mode", "max_tags", "surce", "timezone"]


@pytest.mark.parametrize("content", [None, "text", 5, [1], True])
def test_file_without_keys_is_a_mistake(content: Any) -> None:
    assert mistakes(content).startswith("notes.yaml: `file`: found ")


NOT_JSON: dict[str, Any] = {
    "date": {"seed": date(2026, 1, 1)},
    "bytes": {"user_data": b"x"},
    "set": {"stop": {"a", "b"}},
    "nan": {"temperature": float("nan")},
    "infinity": {"temperature": float("inf")},
    "half a surrogate pair": {"stop": "\ud800"},
}


@pytest.mark.parametrize("params", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_request_parameters_that_are_not_json_are_a_mistake(params: dict[str, Any]) -> None:
    assert "notes.yaml: `llm.params" in mistakes(minimal({"llm": {"params": params}}))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"tags": [{"id": "a", "description": "\ud800"}]}, "tags[0].description"),
        ({"llm": {"model": "\ud800"}}, "llm.model"),
        ({"llm": {"model": "m", "pool": "\ud800"}}, "llm.pool"),
        ({"source": {"text_columns": ["\ud800"]}}, "source.text_columns[0]"),
        ({"schedule": "\ud800"}, "schedule"),
        ({"llm": {"model": "a\nb"}}, "llm.model"),
        ({"llm": {"model": "m", "requests_per_minute": 10**400}}, "llm.requests_per_minute"),
        ({"revision": 10**16}, "revision"),
        ({"revision": "9" * 4000}, "revision"),
        ({"llm": {"model": "m", "price": {"input": 1e300, "output": 1}}}, "llm.price.input"),
    ],
)
def test_values_that_nothing_can_be_computed_or_sent_with_are_mistakes(changes: dict[str, Any], key: str) -> None:
    [message] = mistakes(minimal(changes)).splitlines()

    assert message.startswith(f"notes.yaml: `{key}`: found ")
    assert message.isprintable()


def test_aliases_that_make_a_file_endless_are_a_mistake(tmp_path: Path) -> None:
    levels = ", ".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 20)}]" for n in range(1, 12))
    content = f"{MINIMAL}retention: {{x0: &x0 [ha, ha], {levels}}}\n"

    assert "aliases that make the file too large" in loading_fails(write(tmp_path, content))
    with pytest.raises(InputError, match="no dataset `another`"):
        find_dataset("another", tmp_path)


def test_a_file_of_more_than_a_million_characters_is_a_mistake(tmp_path: Path) -> None:
    assert "found more than 1,000,000 characters" in loading_fails(write(tmp_path, MINIMAL + "#" * 1_000_000))


def test_ten_thousand_tags_are_counted_before_they_are_compared() -> None:
    clock = time.process_time()

    assert "at most 1000 tags" in mistakes(minimal({"tags": [{"id": f"t{n}"} for n in range(10_000)]}))
    assert time.process_time() - clock < 5


def test_a_key_that_is_a_text_stays_one_line() -> None:
    message = mistakes(minimal({"a\nb\x1b" + "c" * 5000: 1}))

    assert message.isprintable()
    assert len(message) < 2000


def test_prompt_that_cannot_be_encoded_is_a_mistake(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("prompt: You tag notes.", r'prompt: "You tag \uD800 notes."'))

    assert "`prompt`: found" in loading_fails(path)


# mistakes in YAML itself


@pytest.mark.parametrize(
    ("content", "where", "found"),
    [
        ("dataset: a: b\n", "line 1", "mapping values"),
        ("dataset: a\nsource: {table: x\n", "line 3", "expected"),
        ("dataset: a\n\tschedule: b\n", "line 2", "tab|cannot start"),
        ("dataset: a\nllm: *other\n", "line 2", "undefined alias"),
        ("dataset: a\ntimezone: UTC\ndataset: b\n", "line 3", "`dataset` twice"),
        ("source:\n  table: a\n  id_column: id\n  table: b\n", "line 4", "`table` twice"),
        ("llm: {params: {temperature: 0, temperature: 1}}\n", "line 1", "`temperature` twice"),
        ("a: 1\n---\nb: 2\n", "line 2", "another document"),
        ("a: !!python/object/apply:os.getcwd []\n", "line 1", "tag"),
        ("? [a, b]\n: c\n", "line 1", "key"),
    ],
)
def test_broken_yaml_is_answered_with_its_line(tmp_path: Path, content: str, where: str, found: str) -> None:
    message = loading_fails(write(tmp_path, content))

    assert re.search(rf"notes.yaml: `{where}(, column \d+)?`: found .*{found}.*, expected", message)


@pytest.mark.parametrize("written", ["2026-02-30", "2026-13-01"])
def test_date_that_does_not_exist_is_shown_with_its_key_or_line(tmp_path: Path, written: str) -> None:
    message = loading_fails(write(tmp_path, f"{MINIMAL}start_date: {written}\n"))

    assert re.search("`start_date`|line 8", message)


@pytest.mark.parametrize(
    "content",
    [
        "a: !!bool x\n",
        "a: !!timestamp x\n",
        "a: !!int x\n",
        "? !!set {a}\n: b\n",
        "a: \x01\n",
        "[" * 3000,
        "a: &a [*a]",
    ],
    ids=["bool", "timestamp", "int", "set as key", "control character", "deep", "recursive"],
)
def test_odd_yaml_is_a_mistake_like_any_other(tmp_path: Path, content: str) -> None:
    assert "notes.yaml: `" in loading_fails(write(tmp_path, content))


def test_recursive_parameters_are_a_mistake(tmp_path: Path) -> None:
    content = MINIMAL.replace("llm: {model: gpt-5-mini}", "llm: {model: gpt-5-mini, params: {a: &a [*a]}}")

    assert "`llm.params" in loading_fails(write(tmp_path, content))


def test_number_of_thousands_of_digits_is_a_mistake(tmp_path: Path) -> None:
    assert "`max_tags`" in loading_fails(write(tmp_path, f"{MINIMAL}max_tags: -0x{'f' * 5000}\n"))


def test_file_that_is_not_utf8_is_a_mistake(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.encode().replace(b"You tag", "日本語".encode("shift_jis")))

    assert re.search(r"notes.yaml: `file`: found byte \d+ is not UTF-8, expected UTF-8", loading_fails(path))


def test_file_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    assert "expected a readable file" in loading_fails(tmp_path / "notes.yaml")


# two files of one folder


def test_dataset_name_of_another_file_is_a_mistake(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "first.yaml")
    second = write(tmp_path, MINIMAL.replace("note_tags", "other_tags"), "second.yaml")

    message = loading_fails(second)
    assert "second.yaml: `dataset`: found 'notes', expected a name that first.yaml does not have" in message


def test_target_of_another_file_is_a_mistake(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "first.yaml")
    second = write(tmp_path, MINIMAL.replace("dataset: notes", "dataset: second"), "second.yml")

    message = loading_fails(second)
    assert (
        "second.yml: `target.table`: found 'note_tags', expected a table that is not the target of first.y" in message
    )


def test_target_table_of_that_name_in_another_database_is_no_mistake(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "first.yaml")
    other = MINIMAL.replace("dataset: notes", "dataset: second").replace("{table: note_tags}", "{conn_id: b, table: t}")

    assert load_dataset(write(tmp_path, other, "second.yaml")).dataset == "second"


@pytest.mark.parametrize("broken", [b"a: b: c", b"\xff\xfe", b"dataset: notes", b"start_date: 2026-13-01", b"[1]"])
def test_broken_file_does_not_spoil_the_others(tmp_path: Path, broken: bytes) -> None:
    write(tmp_path, broken, "broken.yaml")

    assert load_dataset(write(tmp_path, MINIMAL)).dataset == "notes"


# finding a file


def test_dataset_is_found_by_file_name_by_its_name_and_by_path(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL, "my_notes.yml")

    assert find_dataset("my_notes", tmp_path) == path
    assert find_dataset("notes", tmp_path) == path
    assert find_dataset(str(path)) == path


def test_datasets_are_looked_for_in_the_folder_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, MINIMAL)
    monkeypatch.setenv("TAGGER_DATASETS", str(tmp_path))

    assert find_dataset("notes") == path


def test_datasets_are_looked_for_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dags" / "datasets"
    folder.mkdir(parents=True)
    write(folder, MINIMAL)
    monkeypatch.chdir(tmp_path)

    assert find_dataset("notes").resolve() == (folder / "notes.yaml").resolve()


def test_unknown_dataset_is_answered_with_those_there_are(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)

    with pytest.raises(InputError, match=r"no dataset `nots` in .*there: notes.*TAGGER_DATASETS"):
        find_dataset("nots", tmp_path)


def test_unknown_dataset_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no dataset `notes` in .*there: none"):
        find_dataset("notes", tmp_path / "missing")


@pytest.mark.parametrize("name", ["missing.yaml", "folder/missing", "./missing.yml"])
def test_path_without_a_file_is_answered_with_the_path(name: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"no dataset file {name}")):
        find_dataset(name)


@pytest.mark.parametrize("broken", ["a: b: c", "start_date: 2026-13-01", "[" * 3000, "a: !!bool x"])
def test_dataset_is_found_beside_a_broken_file(tmp_path: Path, broken: str) -> None:
    write(tmp_path, broken, "a_broken.yaml")
    path = write(tmp_path, MINIMAL, "my_notes.yaml")

    assert find_dataset("notes", tmp_path) == path


# examples, in the file or in a CSV beside it


WITH_CSV = MINIMAL.replace("tags: [{id: fruit}]", "tags: [{id: fruit}, {id: animal}, {id: a;b}]\nexamples: shown.csv\n")
SECRET = "the patient 山田 at 12 Elm Street"


def with_csv(folder: Path, content: str | bytes, name: str = "shown.csv") -> Path:
    write(folder, content, name)
    return write(folder, WITH_CSV.replace("shown.csv", name))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text,tags\nAn apple,fruit\n", [("An apple", ["fruit"])]),
        ("tags,text\nfruit,An apple\n", [("An apple", ["fruit"])]),
        ("text,tags,why\nAn apple,fruit,it is one\n", [("An apple", ["fruit"])]),
        ("\ufefftext,tags\r\n林檎,fruit\r\n", [("林檎", ["fruit"])]),
        ("text,tags\na rock,\n", [("a rock", [])]),
        ("text,tags\na rock,[]\n", [("a rock", [])]),
        ("text,tags\nx,fruit; animal\n", [("x", ["fruit", "animal"])]),
        ('text,tags\nx,"[""a;b"", ""fruit""]"\n', [("x", ["a;b", "fruit"])]),
        ('text,tags\n"one, ""two""\nthree",fruit\n', [('one, "two"\nthree', ["fruit"])]),
        ('text,tags\r\n"one\r\ntwo",fruit\r\n', [("one\ntwo", ["fruit"])]),
        ("text,tags\n\nx,fruit\n,\n\ny,animal\n", [("x", ["fruit"]), ("y", ["animal"])]),
        ("text,tags\nx,fruit", [("x", ["fruit"])]),
        ("text,tags\n", []),
    ],
)
def test_examples_are_read_from_a_csv_beside_the_file(
    tmp_path: Path, content: str, expected: list[tuple[str, list[str]]]
) -> None:
    loaded = load_dataset(with_csv(tmp_path, content))

    assert [(example.text, example.tags) for example in loaded.examples] == expected


def test_a_csv_may_lie_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "shown").mkdir()

    assert load_dataset(with_csv(tmp_path, "text,tags\nx,fruit\n", "shown/notes.csv")).examples[0].tags == ["fruit"]


def test_examples_of_a_csv_are_those_of_a_list(tmp_path: Path) -> None:
    of_csv = load_dataset(with_csv(tmp_path, "text,tags\nx,fruit\ny,a;b\n".replace("a;b", '"[""a;b""]"')))
    content = yaml.safe_load(WITH_CSV)
    of_list = parse_dataset(
        content | {"examples": [{"text": "x", "tags": ["fruit"]}, {"text": "y", "tags": ["a;b"]}]}, ""
    )

    assert of_csv == of_list


def test_a_frozen_dataset_holds_the_examples_of_the_csv(tmp_path: Path) -> None:
    loaded = load_dataset(with_csv(tmp_path, "text,tags\nx,fruit\n"))

    assert parse_dataset(json.loads(loaded.model_dump_json()), "dataset.json") == loaded


def test_the_csv_is_read_where_all_files_of_the_folder_are(tmp_path: Path) -> None:
    """So does Airflow when it parses the DAGs."""
    path = with_csv(tmp_path, "text,tags\nx,fruit\n")

    loaded = load_datasets([path])[path]

    assert isinstance(loaded, Dataset)
    assert [example.tags for example in loaded.examples] == [["fruit"]]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "`shown.csv, row 1`: found 0 columns `text`"),
        ("tags\nfruit\n", "`shown.csv, row 1`: found 0 columns `text`"),
        ("text\nSECRET\n", "`shown.csv, row 1`: found 0 columns `tags`"),
        ("text;tags\nSECRET;fruit\n", "`shown.csv, row 1`: found 0 columns `text`"),
        ("SECRET,fruit\n", "`shown.csv, row 1`: found 0 columns `text`"),
        ("text,tags,text\nSECRET,fruit,x\n", "`shown.csv, row 1`: found 2 columns `text`"),
        ("text,tags\nx,fruit\nSECRET, too,fruit\n", "`shown.csv, row 3`: found 3 cells, expected 2"),
        ("text,tags\nSECRET\n", "`shown.csv, row 2`: found 1 cells, expected 2"),
        ('text,tags\n"SECRET,fruit\n', "`shown.csv, row 2`: found no valid CSV"),
        ('text,tags\n"SECRET"x,fruit\n', "`shown.csv, row 2`: found no valid CSV"),
        ('"text', "`shown.csv, row 1`: found no valid CSV"),
        (f"text,tags\nSECRET{'x' * 200_000},fruit\n", "`shown.csv, row 2`: found no valid CSV"),
        (b"text,tags\n\xff\xfe,fruit\n", "`shown.csv`: found byte 10 is not UTF-8"),
        ("text,tags\nx,fruit\n\nfruit,SECRET\n", "`shown.csv, row 4, tags`: found a list of 1, expected ids of `tags`"),
        (
            "text,tags\nSECRET,fruit;vegetable\n",
            "`shown.csv, row 2, tags`: found a list of 2, expected ids of `tags` (n",
        ),
        (
            "text,tags\nSECRET,fruit;fruit\n",
            "`shown.csv, row 2, tags`: found a list of 2, expected from none to 3 tags",
        ),
        ("text,tags\n  ,fruit\n", "`shown.csv, row 2, text`: found text, expected a text"),
        ("text,tags\nSECRET,[fruit]\n", "`shown.csv, row 2, tags`: found `[` and no JSON array of ids"),
        ('text,tags\nSECRET,"[[""fruit""]]"\n', "`shown.csv, row 2, tags`: found `[` and no JSON array of ids"),
        ("text,tags\nSECRET,[5]\n", "`shown.csv, row 2, tags`: found `[` and no JSON array of ids"),
    ],
)
def test_a_mistake_in_the_csv_is_told_once_with_row_and_column_and_without_the_text(
    tmp_path: Path, content: str | bytes, told: str
) -> None:
    message = loading_fails(
        with_csv(tmp_path, content.replace("SECRET", SECRET) if isinstance(content, str) else content)
    )

    assert f"notes.yaml: {told}" in message
    assert message.count("\n") == 0
    assert "patient" not in message and "山田" not in message


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing.csv", "`examples`: found missing.csv: No such file or directory, expected a readable file"),
        ("folder.csv", "`examples`: found folder.csv: Is a directory, expected a readable file"),
        ("../other.csv", "`examples`: found '../other.csv', expected a CSV in the folder of this file, or below it"),
        ("a/../../other.csv", "`examples`: found 'a/../../other.csv', expected a CSV in the folder"),
        ("/etc/other.csv", "`examples`: found '/etc/other.csv', expected a CSV in the folder"),
        ("/etc/passwd", "`examples`: found text that is no file's name, expected a list of {text, tags}, or the name"),
        (SECRET, "`examples`: found text that is no file's name, expected a list of {text, tags}, or the name"),
        ("a\0.csv", "`examples`: found text that is no file's name"),
        ("x" * 300 + ".csv", "File name too long, expected a readable file"),
    ],
)
def test_a_csv_that_cannot_be_read_is_told_once(tmp_path: Path, name: str, told: str) -> None:
    folder = tmp_path / "datasets"
    folder.mkdir()
    (folder / "folder.csv").mkdir()
    write(tmp_path, "text,tags\nx,fruit\n", "other.csv")
    content = {**yaml.safe_load(WITH_CSV), "examples": name}

    message = loading_fails(write(folder, yaml.safe_dump(content, allow_unicode=True)))

    assert told in message
    assert message.count("\n") == 0
    assert "patient" not in message


def test_the_other_mistakes_of_the_file_are_told_beside_that_in_its_csv(tmp_path: Path) -> None:
    with_csv(tmp_path, "text,tags\nx,vegetable\n")

    message = loading_fails(write(tmp_path, WITH_CSV.replace("missing", "shown") + "max_tag: 1\n"))
    unreadable = loading_fails(write(tmp_path, WITH_CSV.replace("shown", "missing") + "max_tag: 1\n"))

    assert "`max_tag`: found an unknown key, expected `max_tags`?" in message
    assert "`max_tag`: found an unknown key, expected `max_tags`?" in unreadable
    assert "missing.csv" in unreadable


@pytest.mark.parametrize(
    ("examples", "told"),
    [
        (SECRET, "`examples`: found text, expected a list of {text, tags}, or the name of a CSV"),
        (None, "`examples`: found nothing, expected a list of {text, tags}"),
        ({SECRET: ["fruit"]}, "`examples`: found keys, expected a list of {text, tags}"),
        ([SECRET], "`examples[0]`: found text, expected keys: tags, text"),
        (
            [{SECRET: ["fruit"], "text": "x", "tags": []}],
            "`examples[0]`: found an unknown key, expected one of tags, text",
        ),
        ([{"txt": SECRET, "text": "x", "tags": []}], "`examples[0]`: found an unknown key, expected `text`?"),
        ([{"text": SECRET}], "`examples[0].tags`: found nothing, expected a value (the key is required)"),
        ([{"text": [SECRET], "tags": []}], "`examples[0].text`: found a list of 1, expected text"),
        ([{"text": 901234, "tags": []}], "`examples[0].text`: found a number, expected text"),
        ([{"text": "\ud800 " + SECRET, "tags": []}], "`examples[0].text`: found text, expected text without halves"),
        ([{"text": SECRET, "tags": SECRET}], "`examples[0].tags`: found text, expected a list of tag ids"),
        (
            [{"text": "x", "tags": [SECRET]}],
            "`examples[0].tags`: found a list of 1, expected ids of `tags` (number 1 is",
        ),
        ([{"text": "x", "tags": [{SECRET: 1}]}], "`examples[0].tags[0]`: found keys, expected text"),
    ],
)
def test_a_mistake_in_the_list_of_examples_is_told_without_the_text(examples: Any, told: str) -> None:
    message = mistakes(minimal({"examples": examples}))

    assert f"notes.yaml: {told}" in message
    assert message.count("\n") == 0
    assert "patient" not in message and "901234" not in message


def test_a_text_that_is_a_key_twice_is_not_quoted(tmp_path: Path) -> None:
    message = loading_fails(write(tmp_path, MINIMAL + f"examples:\n- {SECRET}: 1\n  {SECRET}: 2\n"))

    assert "`line 10, column 3`: found key twice, expected valid YAML" in message
    assert "patient" not in message


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(cells, st.lists(st.sampled_from(["fruit", "animal", "a;b"]), max_size=3, unique=True))))
@settings(deadline=None)
def test_any_text_comes_out_of_a_csv_as_it_went_in(rows: list[tuple[str, list[str]]]) -> None:
    body = io.StringIO(newline="")
    csv.writer(body).writerows([("text", "tags"), *((text, json.dumps(tags)) for text, tags in rows)])
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_dataset(with_csv(Path(folder), body.getvalue()))

    assert [(example.text, example.tags) for example in loaded.examples] == rows


# anything at all

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.datetimes()
    | st.sampled_from(["", "0 1 * * *", "UTC", "s3://tagger", "1d", "online", "notes", "999999999999d", b"x"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=8
)


def paths(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the path of every key of a file, sections included."""
    below = [(key, *path) for key, value in content.items() if isinstance(value, dict) for path in paths(value)]
    return [(key,) for key in content] + below


def nest(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: value if len(path) == 1 else nest(path[1:], value)}


changes = st.one_of(
    st.builds(nest, st.sampled_from([*paths(yaml.safe_load(FULL)), ("unknown",)]), values),
    st.builds(nest, st.just(("source", "lookback")), st.builds("{}{}".format, st.integers(), st.sampled_from("smhdw"))),
    st.builds(nest, st.just(("schedule",)), st.text("0123456789*/,-LW#@ ", max_size=12)),
)


def is_dataset_or_mistake(content: Any) -> bool:
    try:
        return isinstance(parse_dataset(content, "notes.yaml"), Dataset)
    except DatasetError as e:
        return bool(e.mistakes) and str(e).startswith("notes.yaml: `")


@given(values)
@settings(max_examples=100, deadline=None)
def test_any_structure_is_a_dataset_or_a_mistake(content: Any) -> None:
    assert is_dataset_or_mistake(content)


@given(changes, changes)
@settings(max_examples=250, deadline=None)
def test_any_change_of_a_file_is_a_dataset_or_a_mistake(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert is_dataset_or_mistake(merged(merged(yaml.safe_load(FULL), first), second))


@given(st.text(max_size=60) | st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_file_is_read_or_a_mistake(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)

    try:
        read_yaml(path)
    except DatasetError as e:
        assert e.mistakes
