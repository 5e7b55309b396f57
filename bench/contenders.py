"""The contenders, each in a process of its own: `python -m bench.contenders NAME SETTINGS`.

`steps`    tagger's own steps
`tables`   those of them that read and write tables, with answers that nobody gave
`floor`    the bare openai SDK on threads, and one S3 write per answer that holds no call's slot
`gokart`   gokart as its documentation shows it: one task per text, processes as workers

A contender's function does the imports and makes the connections, and returns what can be asked of it, by name.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from bench.measure import serve_steps

WRITERS = 16
"""Threads of the floor that write to S3."""

Steps = dict[str, Callable[[], Any]]


def steps(settings: dict[str, Any]) -> Steps:
    """Return tagger's steps for one run. `settings`: content (of the dataset file), run_id, shards (to tag)."""
    import tagger.engine
    import tagger.tasks  # noqa: F401 - `tag` imports both when it has work
    from tagger.connections import connections_from_env as connections
    from tagger.dataset_files import parse_dataset
    from tagger.plan import plan
    from tagger.runs import open_run
    from tagger.snapshot import snapshot
    from tagger.tag import tag
    from tagger.window import select_rows

    dataset = parse_dataset(settings["content"], "bench.yaml")
    _warm_up(dataset)
    run = open_run(dataset, settings["run_id"], connections)
    counted = _count_requests(run.storage._client)

    def take() -> dict[str, Any]:
        selection = select_rows(dataset, end=datetime.now(UTC), kind="regular", day=None, all_rows=False)
        return {"rows": snapshot(dataset, run, selection, connections).rows}

    def make_plan() -> dict[str, Any]:
        planned = plan(run, connections)
        return {"texts": planned.texts, "cached": planned.cached, "new": planned.new, "shards": len(planned.shards)}

    def tag_all() -> dict[str, int]:
        counts: dict[str, int] = {}
        for shard in run.plan().shards:
            for status, count in tag(run, shard.shard, connections).items():
                counts[status] = counts.get(status, 0) + count
        return counts

    return {
        "snapshot": take,
        "plan": make_plan,
        "tag": tag_all,
        "tag_first": lambda: tag(run, 1, connections),
        "requests": lambda: dict(counted),
    }


def tables(settings: dict[str, Any]) -> Steps:
    """Return the steps that read and write tables, and what stands for those between them.

    `settings`: content (of the dataset file), run_id, limit (of the texts that are asked). `answer` books an answer to
    each text that the plan gives to the shards; `settle` makes of it the run of a day on which these texts are cached.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    import tagger.postgres_copy  # noqa: F401 - the steps import it when they need it
    from tagger.connections import connections_from_env as connections
    from tagger.connections import database
    from tagger.dataset_files import parse_dataset
    from tagger.ledger import SCHEMA, Ledger
    from tagger.load import load_back
    from tagger.plan import NEW_KEYS_SCHEMA, plan
    from tagger.runs import Plan, new_keys_path, open_run, opened_parquet, rows_path, shard_path, writing_parquet
    from tagger.snapshot import snapshot
    from tagger.window import Options, select_rows

    dataset = parse_dataset(settings["content"], "bench.yaml")
    run = open_run(dataset, settings["run_id"], connections)
    run.storage.check(create=True)
    database(dataset.source.conn_id, connections).connect().close()

    def take() -> dict[str, Any]:
        selection = select_rows(dataset, end=datetime.now(UTC), kind="regular", day=None, all_rows=True)
        options = Options(limit=settings["limit"])
        return {"rows": snapshot(dataset, run, selection, connections, options).rows}

    def make_plan() -> dict[str, Any]:
        planned = plan(run, connections)
        return {"texts": planned.texts, "new": planned.new, "shards": len(planned.shards)}

    def shards(planned: Plan, *columns: str) -> Iterator[tuple[int, pa.Table]]:
        for shard in planned.shards:
            with opened_parquet(run.storage, shard_path(run, planned.plan_id, shard.shard)) as file:
                yield shard.shard, file.read(columns=columns)

    def answer() -> dict[str, Any]:
        planned, answered = run.plan(), 0
        for number, asked in shards(planned, "key", "row_id"):
            same = {"status": "tagged", "model": dataset.llm.model, "requests": 1, "answered_at": datetime.now(UTC)}
            columns = {name: pa.repeat(pa.scalar(value), len(asked)) for name, value in same.items()}
            columns["tags"] = pa.array([[dataset.tag_ids[i % 8]] for i in range(len(asked))])
            columns |= {name: asked.column(name) for name in asked.column_names}
            nothing = [name for name in SCHEMA.names if name not in columns]
            columns |= {name: pa.nulls(len(asked), SCHEMA.field(name).type) for name in nothing}
            books = Ledger(run, planned.plan_id, number, None)
            books.create()
            books._written.append(pa.table(columns).select(SCHEMA.names).cast(SCHEMA))
            books._write("done", None)
            answered += len(asked)
        return {"answered": answered}

    def settle() -> None:
        planned = run.plan()
        run.storage.delete_many([path for path, _ in run.storage.list(f"{run.files}shard-")])
        asked = pa.concat_tables([texts for _, texts in shards(planned, "key")])["key"].combine_chunks()
        with opened_parquet(run.storage, new_keys_path(run, planned.plan_id)) as file:
            keys = file.read(columns=["key"])["key"]
        left = keys.filter(pc.invert(pc.is_in(keys, asked)))
        changed = {"plan_id": "settled", "cached": planned.texts - len(left), "new": len(left), "shards": []}
        rows = run.storage.get(rows_path(run, planned.plan_id))
        assert rows is not None
        run.storage.put(rows_path(run, "settled"), rows)
        with writing_parquet(run.storage, new_keys_path(run, "settled"), NEW_KEYS_SCHEMA) as parquet:
            parquet.write({"key": left, "deferred": pa.repeat(pa.scalar(False), len(left))})
        run.write("plan.json", planned.model_copy(update=changed))
        run.write("snapshot.json", run.snapshot().model_copy(update={"options": Options()}))

    def load() -> dict[str, Any]:
        loaded = load_back(run, connections)
        return {"written": loaded.written, "deleted": loaded.deleted, "tags": sum(loaded.tags.values())}

    return {"snapshot": take, "plan": make_plan, "answer": answer, "settle": settle, "load": load}


def floor(settings: dict[str, Any]) -> Steps:
    """Return the floor. `settings`: content (of the dataset file), texts, in_flight."""
    from bench.project import request, text
    from tagger.connections import connections_from_env as connections
    from tagger.connections import openai_client
    from tagger.dataset_files import parse_dataset
    from tagger.s3_connection import s3_client
    from tagger.spec import normalise, spec_id, text_key

    dataset = parse_dataset(settings["content"], "bench.yaml")
    _warm_up(dataset)
    client = openai_client(dataset.llm.conn_id, connections)
    s3 = s3_client(dataset.storage_conn_id, connections)
    bucket, _, prefix = dataset.storage.removeprefix("s3://").partition("/")
    spec, same = spec_id(dataset), request(dataset, "", "")
    system = same["messages"][0]  # one object for all, or 20,000 texts would take 50 MB
    texts = [(text_key(spec, normalise(text(number))), text(number)) for number in range(settings["texts"])]
    asked = [(k, same | {"messages": [system, request(dataset, k, each)["messages"][1]]}) for k, each in texts]

    def write(key: str, record: dict[str, Any]) -> None:
        path = f"{prefix}/cache/{spec}/{key[:2]}/tag_{key}.json"
        s3.put_object(Bucket=bucket, Key=path, Body=json.dumps(record).encode())

    def ask(key: str, question: dict[str, Any]) -> None:
        completion = client.chat.completions.create(**question)
        choice, usage = completion.choices[0], completion.usage
        record = {
            "version": 1,
            "status": "tagged",
            "reason": None,
            "tags": json.loads(choice.message.content or "")["tags"],
            "model": completion.model,
            "usage": {"input": usage.prompt_tokens, "output": usage.completion_tokens} if usage else {},
            "cost_usd": 0.00012,
            "finish_reason": choice.finish_reason,
            "asked": "online",
            "created_at": datetime.now(UTC).isoformat(),
        }
        written.append(writers.submit(write, key, record))

    def tag() -> dict[str, int]:
        with ThreadPoolExecutor(settings["in_flight"]) as callers:
            for call in [callers.submit(ask, key, question) for key, question in asked]:
                call.result()
        for each in written:
            each.result()
        return {"tagged": len(written)}

    written: list[Future[None]] = []
    writers = ThreadPoolExecutor(WRITERS)
    return {"tag": tag}


def gokart(settings: dict[str, Any]) -> Steps:
    """Return gokart's own way. `settings`: content (of the dataset file), texts, in_flight."""
    from bench.naive import tree

    return {"tag": tree(settings)}


def _warm_up(dataset: Any) -> None:
    """Go once through what the SDKs import and load at first use, with clients that are then thrown away."""
    from bench.project import request
    from tagger.connections import connections_from_env as connections
    from tagger.connections import openai_client
    from tagger.s3_connection import s3_client

    client = openai_client(dataset.llm.conn_id, connections)
    client.chat.completions.create(**request(dataset, "0", "warm up"))
    s3 = s3_client(dataset.storage_conn_id, connections)
    bucket, _, prefix = dataset.storage.removeprefix("s3://").partition("/")
    s3.put_object(Bucket=bucket, Key=f"{prefix}/warm-up", Body=b"warm up")
    s3.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/warm-up")
    s3.delete_object(Bucket=bucket, Key=f"{prefix}/warm-up")


def _count_requests(client: Any) -> dict[str, int]:
    """Count a client's requests by operation, for servers that do not."""
    counts: dict[str, int] = {}
    lock = threading.Lock()

    def count(event_name: str, **_: object) -> None:
        operation = event_name.rpartition(".")[2]
        with lock:
            counts[operation] = counts.get(operation, 0) + 1

    client.meta.events.register("before-send.s3", count)
    return counts


if __name__ == "__main__":
    chosen = {"steps": steps, "tables": tables, "floor": floor, "gokart": gokart}[sys.argv[1]]
    serve_steps(lambda: chosen(json.loads(sys.argv[2])))
