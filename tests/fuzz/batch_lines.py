"""Output files of the Batch API: each of a batch's texts comes to one fate, whatever the lines say."""

import io
import json
import math
from typing import Any

from hypothesis import strategies as st

from tagger.batch_answers import FATES, Answers
from tagger.batch_api import State
from tagger.batches import HandedOver
from tagger.cache import Cache, parse_record
from tagger.exceptions import InputError
from tagger.ledger import Ledger, latest_outcomes, read_attempts
from tagger.price import price_of
from tagger.runs import Run
from tests.fuzz.answers import DATASETS, TOKENS, assert_no_answer, bodies, completions, errors
from tests.fuzz.held import Held
from tests.fuzz.hostile import MARKER, changed, damaged, values, words
from tests.fuzz.promises import assert_allowed, assert_clear
from tests.fuzz.rounds import Target

KEYS = [f"{n:032x}" for n in range(1, 5)]


def _line(key: str, status: Any, body: Any, error: Any) -> bytes:
    return json.dumps({"custom_id": key, "response": {"status_code": status, "body": body}, "error": error}).encode()


lines = st.builds(
    _line,
    st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), words),
    st.sampled_from((200, 200, 200, 400, 413, 500, "200", None, True)),
    st.one_of(completions, completions, errors, values),
    st.one_of(st.none(), errors, st.just({"code": "batch_expired", "message": MARKER})),
)
odd_lines = st.one_of(
    changed([json.loads(_line(KEYS[0], 200, {}, None))]).map(lambda line: json.dumps(line).encode()),
    damaged(lines, TOKENS),
    bodies,
    st.sampled_from((300, 900, 100_000)).map(
        lambda depth: _line(KEYS[0], 200, "BODY", None).replace(
            b'"BODY"', b'{"choices": ' + b"[" * depth + b"]" * depth + b"}"
        )
    ),
    st.sampled_from(
        ("self", "_cls", "__cls", "_BaseModel__cls", "cls", "_fields_set", "model_config", "__class__")
    ).map(lambda name: _line(KEYS[0], 200, {name: "x"}, None)),
)

STATES = ("completed", "expired", "cancelled", "failed")


def check(case: tuple[int, list[bytes], str]) -> str:
    """Read a file of lines, then end the batch."""
    number, raw, status = case
    dataset = DATASETS[number]
    run = Run(Held({}), "notes", "run")
    cache = Cache(run.storage, "0123456789ab", dataset.llm.model)
    texts = {key: HandedOver(f"row-{n}", 10, 2) for n, key in enumerate(KEYS)}
    try:
        with Ledger(run, "plan", 1, price_of(dataset.llm, batch=True)) as ledger:
            answers = Answers(dataset, texts, cache, ledger)
            answers.read(io.BytesIO(b"\n".join(raw)))
            answers.end(State(status, 0, [], None))
    except InputError as e:
        assert_clear(e)
        return "refused: the stand-in answers for a real model"
    assert answers.fates.total() == len(KEYS) and set(answers.fates) <= set(FATES)
    [attempt] = read_attempts(run)
    outcomes = latest_outcomes([attempt])
    assert outcomes.keys() == texts.keys(), "a text without an outcome"
    assert 0 <= attempt.spent_usd < math.inf, "money that is none"
    assert MARKER not in str([each._replace(model=None) for each in outcomes.values()]), "the books show the answer"
    for key, outcome in outcomes.items():
        body = run.storage.get(cache.path(key))
        assert (body is not None) == (outcome.status in ("tagged", "refused"))
        if body is not None:
            record = parse_record(body, dataset.llm.model)
            assert record.cost_usd is not None and 0 <= record.cost_usd < math.inf, "a cost that is none"
            if record.status == "tagged":
                assert_allowed(dataset, record.tags)
            assert_no_answer(record)
    return "fates: " + ", ".join(fate for fate in FATES if answers.fates[fate])


TARGET = Target(
    "batch-lines",
    st.tuples(
        st.sampled_from(range(len(DATASETS))),
        st.lists(st.one_of(lines, lines, odd_lines), max_size=6),
        st.sampled_from(STATES),
    ),
    check,
    share=8_000,
)
