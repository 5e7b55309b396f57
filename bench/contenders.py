"""The contenders, each in a process of its own: `python -m bench.contenders NAME SETTINGS`.

`steps`    tagger's own steps
`floor`    the bare openai SDK on threads, and one S3 write per answer that holds no call's slot
`gokart`   gokart as its documentation shows it: one task per text, processes as workers

A contender's function does the imports and makes the connections, and returns what can be asked of it, by name.
"""

import json
import sys
import threading
from collections.abc import Callable
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
    chosen = {"steps": steps, "floor": floor, "gokart": gokart}[sys.argv[1]]
    serve_steps(lambda: chosen(json.loads(sys.argv[2])))
