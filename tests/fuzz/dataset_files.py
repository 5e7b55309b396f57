"""Dataset files: whatever bytes, a dataset or one line for each mistake."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tagger.dataset import Dataset
from tagger.dataset_files import load_dataset, parse_dataset
from tagger.exceptions import DatasetError
from tagger.prompt import Prompt, response_format
from tagger.spec import spec_id
from tests.fuzz.hostile import changed, damaged, nested, rarely, words
from tests.fuzz.promises import assert_clear
from tests.fuzz.rounds import Target, folder
from tests.project import MINIMAL, merged

FULL: dict[str, Any] = merged(
    MINIMAL,
    {
        "schedule": "0 1 * * 1-5",
        "timezone": "Asia/Tokyo",
        "start_date": "2026-11-01",
        "storage": "s3://bucket/prefix",
        "source": {"updated_at": "updated_at", "timezone": "UTC", "lookback": "36h", "max_chars": 5000},
        "target": {"conn_id": "other"},
        "llm": {
            "mode": "online",
            "texts_per_request": 4,
            "requests_per_minute": 100,
            "tokens_per_minute": 100_000,
            "params": {"temperature": 0.2, "stop": ["\n"], "extra_body": {"top_k": 4}},
        },
        "allow_none": False,
        "examples": [{"text": "a text", "tags": ["fruit"]}, {"text": "林檎", "tags": ["fruit", "animal"]}],
        "confidence": True,
        "review_below": 0.5,
        "revision": 3,
        "lock": {"conn_id": "redis_default"},
        "limits": {"max_cost_usd": 20, "max_cost_usd_per_month": 100.5, "max_failed_fraction": 0.5},
        "rollout": {"texts_per_run": 100},
        "shards": {"texts_per_shard": 100, "max": 4},
        "alerts": {"to": ["team@example.com"], "deadline": "2h"},
        "tasks": {"default": {"queue": "q"}, "tag": {"retries": 1, "timeout": "1h", "executor_config": {"a": [1]}}},
    },
)
"""A dataset file with all the kinds of keys there are."""

TOKENS = tuple(
    token.encode("utf-8", "surrogatepass")
    for token in (
        "\x00", "\ufeff", "\ud800", "\t", "\n", "\r", "\x85", "- ", ": ", "? ", "|\n", ">+\n", "# ", "'", '"', "[", "{",
        "}", "&a ", "*a", "*b", "<<: *a\n", "!!set ", "!!binary ", "!!python/object/apply:os.system ['true']", "!%0A",
        "!!timestamp ", "!!float ", "!!int ", "!!omap ", "!!null ", "%YAML 9.9\n---\n", "---\n", "...\n", "2026-02-30",
        "9999-12-31T23:59:59-23:59", "1:2:3", "0x" + "f" * 5000, "9" * 5000, "1e999", ".nan", "-.inf", "=", "~",
        "tags:\n", "llm:\n", "examples: examples.csv\n", "\\ud800", '"\\ud800"',
    )
)  # fmt: skip

EXAMPLE_FILES = [path.read_bytes() for path in sorted(Path(__file__).parents[2].glob("dags/datasets/*.yaml"))]

JSON = [json.loads(json.dumps(content)) for content in (MINIMAL, FULL)]


def _written(content: Any, as_yaml: bool) -> bytes:
    text = yaml.safe_dump(content, allow_unicode=True) if as_yaml else json.dumps(content, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def _laughing(depth: int, width: int, place: str) -> bytes:
    """Return a file that its aliases make `width` to the `depth`-th as large."""
    lines = ["x0: &x0 [ha, ha]", *(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * width)}]" for n in range(1, depth))]
    content = {**JSON[0], "llm": {**JSON[0]["llm"], "params": "PARAMS"}}
    inner = "{" + ", ".join(lines) + "}"
    text = json.dumps(content)
    if place == "params":
        text = text.replace('"PARAMS"', inner)
    elif place == "tags":
        text = json.dumps({**JSON[0], "tags": "TAGS"}).replace(
            '"TAGS"', f"[{', '.join(['&t {id: a}', *['*t'] * depth * width * 100])}]"
        )
    elif place == "examples":
        long_text = "word " * width * 100
        many = ", ".join([f"&e {{text: '{long_text}', tags: [fruit]}}", *["*e"] * depth * width * 10])
        text = json.dumps({**JSON[0], "examples": "E"}).replace('"E"', f"[{many}]")
    else:
        text = inner
    return text.encode()


def _deep(opening: str, closing: str, depth: int, key: str) -> bytes:
    return f"{json.dumps(JSON[0])[:-1]}, {key}: {nested(opening, closing, depth)}}}".encode()


def _large(unit: str, size: int, how: str) -> bytes:
    count = size // (len(unit) + 12)
    if how == "tags":
        content: Any = {**JSON[0], "tags": [{"id": f"{unit}{n}"} for n in range(count)]}
    elif how == "words":
        content = {**JSON[0], "prompt": unit * count}
    elif how == "keys":
        content = {**JSON[0], **{f"{unit}{n}": n for n in range(count)}}
    else:
        return (unit * count).encode("utf-8", "surrogatepass")
    return _written(content, as_yaml=False)


structures = st.builds(_written, changed(JSON), st.booleans())
shapes = st.one_of(
    st.builds(
        _laughing,
        st.integers(1, 12),
        st.sampled_from((1, 2, 9, 40)),
        st.sampled_from(("params", "tags", "examples", "top")),
    ),
    st.builds(
        _deep,
        st.sampled_from(("[", "{a: ", "[&a ", "- ", "? ", "!!set {", "\n ")),
        st.sampled_from(("", "]", "}")),
        st.sampled_from((10, 200, 1000, 10_000)),
        st.sampled_from(("prompt", "tags", "examples", "schedule", "x")),
    ),
)
large = st.builds(
    _large,
    words.filter(bool),
    st.sampled_from((20_000, 200_000, 5_000_000)),
    st.sampled_from(("tags", "words", "keys", "raw")),
)
files = st.one_of(
    structures,
    structures,
    structures,
    damaged(st.one_of(structures, st.sampled_from(EXAMPLE_FILES)), TOKENS),
    st.binary(max_size=60),
)


def check(body: bytes) -> str:
    """Read a dataset file."""
    path = folder("dataset") / "notes.yaml"
    path.write_bytes(body)
    path.with_name("examples.csv").write_text("text,tags\na text,fruit\n")
    try:
        dataset = load_dataset(path)
    except DatasetError as e:
        assert_clear(e, lines=len(e.mistakes), may_show=True)  # what stands in the file
        assert all(line.startswith(f"{path}: `") for line in str(e).split("\n"))
        key = re.match(r"[a-z_]+", e.mistakes[0].key)
        return f"refused: {key[0] if key and key[0] in _KEYS else 'unknown key'}"
    frozen = parse_dataset(json.loads(dataset.model_dump_json().encode()), "dataset.json")
    assert frozen == dataset, "the frozen dataset is another"
    assert spec_id(frozen) == spec_id(dataset), "the frozen dataset has another spec"
    for together in (False, True):
        json.dumps(response_format(dataset, together=together)).encode()
    json.dumps(Prompt(dataset).messages("0" * 32, "a text"), ensure_ascii=False).encode()
    return "a dataset"


_KEYS = {*Dataset.model_fields, "file", "line"}

TARGET = Target("dataset-files", rarely(rarely(large, shapes, 20), files, 60), check, share=16_000)
