"""Cache records: whatever bytes lie there, a record that the spec allows, damage, or a newer version."""

import json
import math
from collections.abc import Sequence
from datetime import UTC
from typing import Any

from hypothesis import strategies as st

from tagger.cache import Cache, Record, parse_record
from tagger.exceptions import InputError
from tests.fuzz.answers import DATASETS, TOKENS
from tests.fuzz.held import Held
from tests.fuzz.hostile import changed, damaged, nested
from tests.fuzz.promises import assert_clear
from tests.fuzz.rounds import Target

KEY = "0" * 32

RECORD: dict[str, Any] = {
    "version": 1,
    "status": "tagged",
    "reason": None,
    "tags": ["fruit"],
    "confidence": None,
    "model": "served-model",
    "usage": {"input": 100, "cached_input": 50, "output": 7},
    "cost_usd": 0.001,
    "finish_reason": "stop",
    "asked": "online",
    "chars": {"narrow": 7, "wide": 0},
    "created_at": "2026-07-01T12:00:00Z",
}

RECORDS = [
    RECORD,
    RECORD | {"confidence": [0.75]},
    RECORD | {"tags": ["animal", "fruit"], "confidence": [1.0, 0.5], "asked": "together"},
    RECORD | {"status": "refused", "reason": "refusal", "tags": [], "finish_reason": "refusal"},
    {k: v for k, v in RECORD.items() if k not in ("confidence", "asked", "chars")},
]

CHANGES: list[dict[str, Any]] = [
    {"tags": ["hacked"]},
    {"tags": ["fruit", "fruit"]},
    {"tags": ["fruit", "animal", "weather"]},
    {"tags": []},
    {"version": "2"},
    {"version": 2.0},
    {"version": True},
    {"created_at": "9999-12-31T23:59:59-23:59"},
    {"created_at": "0001-01-01T00:00:00+23:59"},
    {"created_at": "2026-07-01T12:00:00"},
    {"created_at": 1e300},
    {"model": "a\x00b"},
    {"model": "\ud800"},
    {"reason": "a\x00b"},
    {"cost_usd": -1.0},
    {"cost_usd": float("nan")},
    {"usage": {"input": 10**30}},
    {"usage": {"input": -5}},
    {"confidence": [float("nan")]},
]
ODD = [RECORD | change for change in CHANGES]


def _raw(content: Any) -> bytes:
    return json.dumps(content).encode()


bodies = st.one_of(
    changed(RECORDS).map(_raw),
    changed([*RECORDS, *ODD]).map(_raw),
    damaged(st.sampled_from(RECORDS).map(_raw), TOKENS),
    st.sampled_from(ODD).map(_raw),
    st.binary(max_size=150),
    st.sampled_from((10, 1000, 100_000)).map(lambda depth: nested('{"version":', "}", depth).encode()),
)


def check(case: tuple[int, bytes]) -> str:
    """Read a record."""
    number, body = case
    dataset = DATASETS[number]
    storage = Held({})
    cache = Cache(storage, "0123456789ab", dataset.llm.model, dataset.tag_ids)
    storage.put(cache.path(KEY), body)
    try:
        record = cache.read(KEY)
    except InputError as e:
        assert_clear(e)
        return "refused: a newer version"
    if record is None:
        assert storage.objects == {}, "damage that stays"
        return "damaged"
    _assert_fit(record, dataset.tag_ids)
    return record.status


def _assert_fit(record: Record, tag_ids: Sequence[str]) -> None:
    """Assert that the target and the books can take what a record says."""
    assert set(record.tags) <= set(tag_ids), "a tag outside the enum"
    assert len(set(record.tags)) == len(record.tags), "a tag twice"
    for word in (record.model, record.reason, record.finish_reason):
        assert word is None or (word.isprintable() and len(word) < 1000), "a word that no table takes"
    assert record.created_at.astimezone(UTC).utcoffset() is not None
    assert all(0 <= value <= 1 for value in record.confidence or ()), "a confidence that is none"
    assert record.cost_usd is None or 0 <= record.cost_usd < math.inf, "a cost that is none"
    assert all(0 <= tokens < 2**63 for tokens in record.usage.model_dump().values()), "a usage that is none"
    assert parse_record(record.to_bytes(), "any") == record, "written again it is another"


TARGET = Target("cache-records", st.tuples(st.sampled_from(range(len(DATASETS))), bodies), check, share=12_000)
