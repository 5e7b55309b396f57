"""The naive tree: one text is one gokart task, its output a file in the workspace, as gokart's documentation has it."""
# mypy: allow-untyped-calls, allow-untyped-decorators

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import gokart
import luigi
from gokart.build import GokartBuildError
from gokart.utils import FlattenableItems
from openai import OpenAI

from bench.project import request, text
from tagger.connections import connections_from_env, openai_client
from tagger.dataset_files import parse_dataset


class Asked:
    """What all tasks ask with. No call is made before the fork, so that no child shares a connection to the LLM."""

    client: OpenAI
    dataset: Any


class TagText(gokart.TaskOnKart[dict[str, Any]]):
    """Tag one text."""

    number: luigi.Parameter[int] = luigi.IntParameter()
    text: luigi.Parameter[str] = luigi.Parameter()

    def run(self) -> None:
        """Ask the LLM and keep its answer."""
        asked = request(Asked.dataset, f"{self.number:032x}", self.text)
        completion = Asked.client.chat.completions.create(**asked)
        answer: dict[str, Any] = json.loads(completion.choices[0].message.content or "")
        self.dump(answer)


class TagAll(gokart.TaskOnKart[int]):
    """Tag all texts."""

    texts: luigi.Parameter[int] = luigi.IntParameter()

    def requires(self) -> FlattenableItems[gokart.TaskOnKart[Any]]:
        """Return a task per text."""
        return [TagText(number=number, text=text(number)) for number in range(self.texts)]

    def run(self) -> None:
        """Keep the number of texts."""
        self.dump(self.texts)


def tree(settings: dict[str, Any]) -> Callable[[], dict[str, int]]:
    """Return what builds the tree, with `in_flight` workers."""
    Asked.dataset = parse_dataset(settings["content"], "bench.yaml")
    Asked.client = openai_client(Asked.dataset.llm.conn_id, connections_from_env)
    luigi.configuration.get_config().set("TaskOnKart", "workspace_directory", Asked.dataset.storage)
    failures = tempfile.TemporaryFile("a+")  # noqa: SIM115 - the forked tasks append to it

    @gokart.TaskOnKart.event_handler(luigi.Event.FAILURE)
    @gokart.TaskOnKart.event_handler(luigi.Event.BROKEN_TASK)
    def note(_task: gokart.TaskOnKart[Any], error: Exception) -> None:
        print(f"{type(error).__name__}: {str(error).strip()[:200]}".splitlines()[0], file=failures, flush=True)

    def build() -> dict[str, int]:
        try:
            gokart.build(TagAll(texts=settings["texts"]), return_value=False, workers=settings["in_flight"])
        except GokartBuildError:
            failures.seek(0)
            causes = Counter(failures.read().splitlines())
            raise RuntimeError("; ".join(f"{count} x {cause}" for cause, count in causes.items())) from None
        return {"tagged": settings["texts"]}

    return build
