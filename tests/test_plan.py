"""The plan: which texts are new, and how they are spread over shards."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from itertools import chain, pairwise
from typing import Any

import pytest

from tagger.cache import Cache, Record, Usage
from tagger.exceptions import InputError, StorageError
from tagger.load import load_back
from tagger.plan import WITHOUT_LOCK, describe, plan
from tagger.runs import (
    Plan,
    Run,
    new_keys_path,
    opened_parquet,
    read_parquet,
    rows_path,
    shard_path,
)
from tagger.spec import normalise, spec_id, text_key
from tagger.window import Options
from tests.databases import REFUSAL, make_project, put_all, teach, watch
from tests.project import Project


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def make_plan(project: Project) -> tuple[Run, Plan]:
    run = project.take()
    return run, plan(run, project.connections)


def column(run: Run, path: str, name: str) -> list[Any]:
    return [value for batch in read_parquet(run.storage, path) for value in batch.column(name).to_pylist()]


def shard_texts(run: Run, planned: Plan) -> list[list[str]]:
    """Returns the texts of each shard."""
    return [column(run, shard_path(run, planned.plan_id, shard.shard), "text") for shard in planned.shards]


def key(project: Project, text: str) -> str:
    return text_key(spec_id(project.dataset), normalise(text))


def write_record(project: Project, text: str) -> None:
    record = Record(
        status="tagged",
        tags=["fruit"],
        model="offline-stand-in",
        usage=Usage(input=10),
        cost_usd=0.5,
        finish_reason="stop",
        created_at=datetime(2026, 7, 1, tzinfo=UTC),
    )
    spec = spec_id(project.dataset)
    Cache(project.open("any").storage, spec, "offline-stand-in").write(key(project, text), record)


def test_a_text_in_many_rows_is_asked_once(either: Project) -> None:
    put_all(either, "apple", "zebra", "apple", "apple")

    run, planned = make_plan(either)

    assert (planned.rows, planned.texts, planned.new) == (4, 2, 2)
    assert sorted(chain.from_iterable(shard_texts(run, planned))) == ["apple", "zebra"]


@pytest.mark.parametrize(
    "variant", ["apple 105", "ａｐｐｌｅ １０５", "  apple 105\n", "apple\u3000105", "apple 10⁵", "apple\u00a0105"]
)
def test_variants_of_a_text_are_one_text(project: Project, variant: str) -> None:
    put_all(project, "apple 105", variant)

    assert make_plan(project)[1].texts == 1


def test_line_ends_make_no_difference(project: Project) -> None:
    put_all(project, "apple\nzebra", "apple\r\nzebra", "apple\rzebra")

    assert make_plan(project)[1].texts == 1


def test_the_text_is_sent_as_it_stands_in_the_row(project: Project) -> None:
    put_all(project, " ａｐｐｌｅ 10⁵ ")

    assert shard_texts(*make_plan(project)) == [[" ａｐｐｌｅ 10⁵ "]]


def test_blank_texts_are_left_out(either: Project) -> None:
    put_all(either, "apple", None, "", " \n", "\u3000\u00a0")

    run, planned = make_plan(either)

    assert (planned.rows, planned.blank, planned.texts, planned.new) == (1, 4, 1, 1)
    assert column(run, rows_path(run, planned.plan_id), "key") == [key(either, "apple"), None, None, None, None]


def test_no_rows_are_a_plan_of_zeros(either: Project) -> None:
    _, planned = make_plan(either)

    assert (planned.rows, planned.blank, planned.texts, planned.cached, planned.new) == (0, 0, 0, 0, 0)
    assert planned.shards == []


def test_texts_over_the_limit_are_not_asked(project: Project) -> None:
    put_all(project, "x" * 10, "x" * 11, "x" * 11, "apple")
    project.change(source={"max_chars": 10})

    run, planned = make_plan(project)

    assert (planned.rows, planned.texts, planned.too_long, planned.new) == (4, 3, 1, 2)
    assert sorted(shard_texts(run, planned)[0]) == ["apple", "x" * 10]


def test_cached_texts_are_in_no_shard(project: Project) -> None:
    put_all(project, "apple", "zebra", "rain")
    write_record(project, "zebra")

    run, planned = make_plan(project)

    assert (planned.texts, planned.cached, planned.new) == (3, 1, 2)
    assert sorted(shard_texts(run, planned)[0]) == ["apple", "rain"]
    assert sorted(column(run, new_keys_path(run, planned.plan_id), "key")) == sorted(
        [key(project, "apple"), key(project, "rain")]
    )


def test_with_all_texts_cached_there_is_no_shard(project: Project) -> None:
    put_all(project, "apple", "apple")
    write_record(project, "apple")

    run, planned = make_plan(project)

    assert (planned.cached, planned.new, planned.shards) == (1, 0, [])
    assert [path for path, _ in run.storage.list(run.texts) if "shard" in path] == []


@pytest.mark.parametrize(
    ("texts", "texts_per_shard", "most", "sizes"),
    [
        (1, 5000, 16, [1]),
        (10, 10, 16, [10]),
        (11, 10, 16, [6, 5]),
        (30, 10, 16, [10, 10, 10]),
        (30, 1, 4, [8, 8, 7, 7]),
        (3, 1, 16, [1, 1, 1]),
    ],
)
def test_every_new_text_is_in_one_shard(
    project: Project, texts: int, texts_per_shard: int, most: int, sizes: list[int]
) -> None:
    put_all(project, *(f"text {i}" for i in range(texts)), "text 0")
    project.change(shards={"texts_per_shard": texts_per_shard, "max": most})

    run, planned = make_plan(project)

    in_shards = shard_texts(run, planned)
    assert [len(part) for part in in_shards] == sizes
    assert [(shard.shard, shard.of, shard.texts) for shard in planned.shards] == [
        (i + 1, len(sizes), size) for i, size in enumerate(sizes)
    ]
    assert Counter(chain.from_iterable(in_shards)) == Counter(f"text {i}" for i in range(texts))


def test_the_texts_are_dealt_out_in_the_order_of_their_rows(project: Project) -> None:
    put_all(project, *"abacdebfg")
    project.change(shards={"texts_per_shard": 1, "max": 3})
    write_record(project, "d")

    assert shard_texts(*make_plan(project)) == [["a", "e"], ["b", "f"], ["c", "g"]]


def waves(run: Run, planned: Plan) -> list[list[int]]:
    """Returns the number of texts in each row group of each shard's file."""
    sizes = []
    for shard in planned.shards:
        with opened_parquet(run.storage, shard_path(run, planned.plan_id, shard.shard)) as parquet:
            sizes.append([parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)])
    return sizes


@pytest.mark.parametrize(
    ("texts", "most", "expected"),
    [(6, 1, [[3, 3]]), (7, 1, [[3, 3, 1]]), (2, 1, [[2]]), (11, 2, [[3, 3], [3, 2]])],
)
def test_a_row_group_of_a_shard_is_a_wave_of_so_many_texts(
    project: Project, monkeypatch: pytest.MonkeyPatch, texts: int, most: int, expected: list[list[int]]
) -> None:
    monkeypatch.setattr("tagger.shards.WAVE_TEXTS", 3)
    put_all(project, *(f"text {i}" for i in range(texts)))
    project.change(shards={"texts_per_shard": 5, "max": most})

    assert waves(*make_plan(project)) == expected


@pytest.mark.parametrize(
    ("limits", "most", "expected"),
    [
        pytest.param({"WAVE_CHARS": 10}, 1, [["aaaa", "bbbb"], ["c" * 20], ["dddd", "ee", "ffff"], ["g"]], id="a-wave"),
        pytest.param(
            {"BUFFERED_CHARS": 20}, 2, [["aaaa"], ["c" * 20], ["ee", "g"], ["bbbb", "dddd"], ["ffff"]], id="all"
        ),
    ],
)
def test_a_wave_has_only_so_many_characters_or_one_text(
    project: Project, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], most: int, expected: list[list[str]]
) -> None:
    for name, limit in limits.items():
        monkeypatch.setattr(f"tagger.shards.{name}", limit)
    put_all(project, "aaaa", "bbbb", "c" * 20, "dddd", "ee", "ffff", "g")
    project.change(shards={"texts_per_shard": 1, "max": most})

    run, planned = make_plan(project)

    sizes = list(chain.from_iterable(waves(run, planned)))
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    texts = list(chain.from_iterable(shard_texts(run, planned)))
    assert [texts[start:end] for start, end in pairwise(ends)] == expected


def test_key_row_and_text_belong_together_over_many_row_groups(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.snapshot.ROWS_A_WRITE", 3)
    monkeypatch.setattr("tagger.shards.WAVE_TEXTS", 2)
    texts: list[str | None] = [f"text {i % 13}" for i in range(40)]
    texts[2], texts[11], texts[20], texts[21] = None, " ", "x" * 50, "cached"
    put_all(project, *texts)
    project.change(source={"max_chars": 20}, shards={"texts_per_shard": 4, "max": 3})
    write_record(project, "cached")

    run, planned = make_plan(project)

    assert column(run, rows_path(run, planned.plan_id), "key") == [
        key(project, text) if text and text.strip() else None for text in texts
    ]
    found: dict[str, tuple[str, str]] = {}
    for shard in planned.shards:
        path = shard_path(run, planned.plan_id, shard.shard)
        texts_of, rows_of, keys_of = (column(run, path, name) for name in ("text", "row_id", "key"))
        found |= dict(zip(texts_of, zip(rows_of, keys_of, strict=True), strict=True))
    assert found == {f"text {i}": (str(texts.index(f"text {i}")), key(project, f"text {i}")) for i in range(13)}
    assert [shard.texts for shard in planned.shards] == [5, 4, 4]


def test_the_row_whose_text_is_too_long_is_not_the_one_that_is_asked(project: Project) -> None:
    put_all(project, "apple" + " " * 50, "apple")
    project.change(source={"max_chars": 20})

    run, planned = make_plan(project)

    path = shard_path(run, planned.plan_id, 1)
    assert (column(run, path, "text"), column(run, path, "row_id")) == (["apple"], ["1"])


def test_the_snapshot_is_read_and_hashed_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    put_all(project, *(f"text {i}" for i in range(20)))
    run = project.take()
    requests = watch(run.storage)
    hashed = []

    def noted(spec: str, normalised: str) -> str:
        hashed.append(normalised)
        return text_key(spec, normalised)

    monkeypatch.setattr("tagger.plan.text_key", noted)

    plan(run, project.connections)

    assert requests.of("GetObject", run.snapshot().rows_file) == [run.snapshot().rows_file]
    assert len(hashed) == 20


def test_a_shard_tells_how_many_texts_it_has(project: Project) -> None:
    put_all(project, "apple", "zebra", "rain")
    project.change(shards={"texts_per_shard": 2})

    assert [shard.name for shard in make_plan(project)[1].shards] == ["shard 1/2 · 2 texts", "shard 2/2 · 1 texts"]


def test_a_shard_knows_a_row_of_each_text(project: Project) -> None:
    put_all(project, "apple", "zebra", "apple")

    run, planned = make_plan(project)

    path = shard_path(run, planned.plan_id, 1)
    by_text = dict(zip(column(run, path, "text"), column(run, path, "row_id"), strict=True))
    assert by_text["zebra"] == "1"
    assert by_text["apple"] in ("0", "2")


def test_only_the_snapshots_folder_holds_texts(project: Project) -> None:
    put_all(project, "a distinctive apple")

    make_plan(project)

    assert b"distinctive" not in project.everything_stored()


def test_the_cache_is_asked_in_bulk(project: Project) -> None:
    put_all(project, *(f"text {i}" for i in range(100)))
    project.run()
    run = project.take()
    requests = watch(run.storage)

    plan(run, project.connections)

    cache_requests = [made for made in requests.made if made[1].startswith("cache/")]
    assert len(cache_requests) <= 17
    assert {operation for operation, _ in cache_requests} == {"ListObjectsV2"}


def test_a_new_spec_makes_all_texts_new_and_counts_the_rows_of_the_old_one(either: Project) -> None:
    put_all(either, "apple", "zebra", "apple", None)
    either.run()
    either.change(revision=2)

    _, planned = make_plan(either)

    assert (planned.cached, planned.new) == (0, 2)
    assert (planned.target_rows, planned.older_spec_rows, planned.older_spec_texts) == (3, 3, 2)


def test_under_the_same_spec_nothing_is_said_of_old_rows(either: Project) -> None:
    put_all(either, "apple")
    either.run()

    run, planned = make_plan(either)

    assert (planned.target_rows, planned.older_spec_rows) == (1, 0)
    assert len(describe(planned, either.dataset, run.snapshot())) == 1


def test_the_plan_says_what_is_new(project: Project) -> None:
    put_all(project, "apple", "zebra", "x" * 50, None)
    project.change(source={"max_chars": 20})
    write_record(project, "zebra")

    run, planned = make_plan(project)

    told = describe(planned, project.dataset, run.snapshot())[0]
    for words in ("3 rows", "1 more are blank", "3 distinct texts", "1 cached", "1 new", "1 over 20", "1 shards"):
        assert words in told


@pytest.mark.parametrize(
    ("cached", "lock", "expected"),
    [(False, None, [WITHOUT_LOCK]), (True, None, []), (False, {"conn_id": "redis"}, [])],
    ids=["new-without-lock", "none-new", "lock"],
)
def test_what_is_not_sure_without_a_lock_is_told_where_there_are_new_texts(
    project: Project, cached: bool, lock: dict[str, str] | None, expected: list[str]
) -> None:
    put_all(project, "apple")
    project.change(lock=lock)
    if cached:
        write_record(project, "apple")

    run, planned = make_plan(project)

    told = describe(planned, project.dataset, run.snapshot())
    assert [line for line in told if "lock" in line] == expected


@pytest.mark.parametrize("limit", ["max_cost_usd", "max_cost_usd_per_month"])
def test_a_budget_needs_a_known_price(project: Project, limit: str) -> None:
    project.change(llm={"price": None}, limits={limit: 5})
    run = project.take()

    with pytest.raises(InputError, match=rf"`limits\.{limit}`.*`offline-stand-in`.*`llm\.price`.*`{limit}: null`"):
        plan(run, project.connections)


@pytest.mark.parametrize(
    "changes",
    [
        {"llm": {"price": 0}, "limits": {"max_cost_usd": 5}},
        {"llm": {"price": None, "model": "gpt-5-mini"}, "limits": {"max_cost_usd": 5}},
        {"llm": {"price": None}},
    ],
    ids=["given", "of-the-library", "no-budget"],
)
def test_a_plan_is_made_where_the_price_is_known_or_not_needed(project: Project, changes: dict[str, Any]) -> None:
    put_all(project, "apple")
    project.change(**changes)

    assert make_plan(project)[1].new == 1


def test_without_a_snapshot_there_is_no_plan(project: Project) -> None:
    run = project.open("none")

    with pytest.raises(InputError, match=r"run `none` of `notes` has no .*`tagger snapshot` has not succeeded"):
        plan(run, project.connections)


def test_a_plan_made_again_replaces_the_first(project: Project) -> None:
    put_all(project, "apple", "zebra")
    run, first = make_plan(project)
    write_record(project, "zebra")

    second = plan(run, project.connections)

    assert run.plan() == second
    assert (second.plan_id != first.plan_id, second.new) == (True, 1)
    assert shard_texts(run, second) == [["apple"]]


def test_a_plan_that_cannot_be_made_again_leaves_none(project: Project) -> None:
    put_all(project, "apple")
    run, _ = make_plan(project)
    run.storage.delete(run.snapshot().rows_file)

    with pytest.raises(StorageError, match="rows-"):
        plan(run, project.connections)

    with pytest.raises(InputError, match=r"no plan\.json"):
        run.plan()


def test_an_edit_of_the_file_after_the_snapshot_changes_nothing(project: Project) -> None:
    put_all(project, "apple")
    run = project.take()
    before = spec_id(project.dataset)
    project.change(prompt="You tag something else.")

    assert plan(run, project.connections).spec_id == before


def test_a_text_that_is_too_long_in_one_row_alone_is_counted_once(project: Project) -> None:
    put_all(project, "apple", "apple" + " " * 50)
    project.change(source={"max_chars": 20})

    summary = project.run()

    assert (summary.rows, summary.texts, summary.tagged, summary.refused) == (2, 1, 1, 0)
    assert [row.status for row in project.target().values()] == ["tagged", "refused"]


# Options of a run


def asking(project: Project, **options: Any) -> tuple[Run, Plan]:
    """Plan a run over all rows with these options."""
    run = project.take(all_rows=True, options=Options(**options))
    return run, plan(run, project.connections)


def test_a_limit_takes_the_first_new_texts_in_the_order_of_the_rows(either: Project) -> None:
    put_all(either, "apple", "zebra", "apple", "rain", "storm")
    write_record(either, "zebra")
    either.change(shards={"texts_per_shard": 1})

    run, planned = asking(either, limit=2)

    assert (planned.new, planned.cached, len(planned.shards)) == (3, 1, 2)
    assert sorted(chain(*shard_texts(run, planned))) == ["apple", "rain"]
    told = describe(planned, either.dataset, run.snapshot())
    assert "only the first 2 new texts are asked (`limit`); the others are skipped until the next run" in told


def test_a_limit_beyond_the_new_texts_changes_nothing(project: Project) -> None:
    put_all(project, "apple", "zebra")

    run, planned = asking(project, limit=3)

    assert sorted(chain(*shard_texts(run, planned))) == ["apple", "zebra"]
    assert "`limit`" not in " ".join(describe(planned, project.dataset, run.snapshot()))


def test_a_dry_run_has_no_shards_and_the_estimate_of_the_real_one(project: Project) -> None:
    put_all(project, "apple", "zebra", "大きな林檎" * 50)

    dry_run, dry = asking(project, dry_run=True)
    _, real = asking(project)

    assert (dry.new, dry.shards) == (3, [])
    assert dry.estimated_usd == real.estimated_usd
    assert dry.estimated_usd is not None and dry.estimated_usd > 0
    told = describe(dry, project.dataset, dry_run.snapshot())
    assert "dry run: no text is asked, nothing is written to the target" in told
    assert not [path for path, _ in dry_run.storage.list(dry_run.texts) if "shard-" in path]


def test_with_nothing_new_the_estimate_is_nothing_and_without_a_price_unknown(project: Project) -> None:
    put_all(project, "apple")
    project.change(llm={"price": None})

    assert asking(project)[1].estimated_usd is None
    write_record(project, "apple")
    assert asking(project)[1].estimated_usd == 0


def test_refused_texts_are_new_again_only_when_that_is_asked_for(either: Project) -> None:
    teach(either.llm, secretly=REFUSAL)
    put_all(either, "apple", "apple, secretly", "zebra, secretly")
    either.run()

    _, as_usual = asking(either)
    run, again = asking(either, retry_refused=True)

    assert (as_usual.new, as_usual.cached) == (0, 3)
    assert (again.new, again.cached, again.asked_again) == (2, 1, 2)
    assert sorted(chain(*shard_texts(run, again))) == ["apple, secretly", "zebra, secretly"]


def test_refused_texts_are_found_where_the_target_knows_nothing_of_them(project: Project) -> None:
    teach(project.llm, secretly=REFUSAL)
    put_all(project, "apple", "apple, secretly")
    project.run()
    project.execute("DELETE FROM note_tags")

    _, again = asking(project, retry_refused=True)

    assert (again.new, again.asked_again) == (1, 1)


def test_a_refused_text_that_is_not_asked_again_keeps_its_record(project: Project) -> None:
    teach(project.llm, secretly=REFUSAL)
    put_all(project, "apple, secretly", "rain, secretly", "zebra, secretly")
    project.run()

    asking(project, retry_refused=True, dry_run=True)
    assert asking(project)[1].cached == 3
    run, _ = asking(project, retry_refused=True, limit=1)

    load_back(run, project.connections)
    assert asking(project)[1].cached == 2
    assert Counter(row.status for row in project.target().values()) == {"refused": 2, "skipped": 1}


def examples_told(project: Project) -> list[str]:
    run = project.take()
    planned = plan(run, project.connections)
    return [line for line in describe(planned, project.dataset, run.snapshot()) if line.startswith("examples: ")]


def test_the_plan_says_what_an_example_costs(project: Project) -> None:
    put_all(project, "apple")
    project.change(examples=[{"text": "日" * 60, "tags": ["fruit"]}] * 5, llm={"price": {"input": 0.25, "output": 2}})

    assert examples_told(project) == [
        "examples: 5 in the prompt, about 64 tokens each; one more would add up to $0.0160 per 1,000 requests, "
        "and make all texts new once"
    ]


def test_the_plan_says_how_long_an_example_is_where_the_price_is_unknown(project: Project) -> None:
    put_all(project, "apple")
    project.change(examples=[{"text": "日" * 60, "tags": ["fruit"]}], llm={"price": None})

    assert examples_told(project) == [
        "examples: 1 in the prompt, about 64 tokens each; one more would add as many to each request, "
        "and make all texts new once"
    ]


def test_a_plan_without_examples_does_not_speak_of_them(project: Project) -> None:
    put_all(project, "apple")

    assert examples_told(project) == []
