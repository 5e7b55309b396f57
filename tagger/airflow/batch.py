"""The tag step where `llm.mode` is batch: it holds no worker while the provider works."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from airflow.sdk import BaseOperator, Context
from airflow.triggers.base import BaseTrigger, TriggerEvent

from tagger.airflow import steps
from tagger.airflow.connections import converted

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 5.0, 60.0


class TagBatch(BaseOperator):
    """Hands a shard to the Batch API, is deferred until its batches have ended, then collects and tags.

    Each try, and each return from the trigger, goes through the same steps: what is handed over is not handed over
    again, and what is not ended defers the task once more.
    """

    def __init__(self, *, shard: dict[str, Any], **settings: Any) -> None:
        """Describe the task of one shard, which is given by number and name."""
        super().__init__(**settings)
        self.shard = shard

    def execute(self, context: Context) -> dict[str, int]:
        """Tag the shard, or defer; return the number of its texts by status."""
        return self._go_on()

    def resume(self, context: Context, event: dict[str, Any]) -> dict[str, int]:
        """Go on after the trigger."""
        return self._go_on()

    def _go_on(self) -> dict[str, int]:
        number = self.shard["shard"]
        conn_id, waiting = steps.hand_over(number)
        if waiting:
            self.defer(trigger=BatchesEnded(conn_id=conn_id, batches=waiting), method_name="resume")
        return steps.tag(number)


class BatchesEnded(BaseTrigger):
    """Fires when no batch of a task is in progress any more, or when the endpoint refuses to tell.

    Args:
        conn_id: The connection of the LLM.
        batches: The provider's names of the batches.
    """

    def __init__(self, conn_id: str, batches: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conn_id = conn_id
        self.batches = batches

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the trigger as Airflow keeps it over a restart of the triggerer."""
        return f"{__name__}.{type(self).__name__}", {"conn_id": self.conn_id, "batches": self.batches}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Ask now and then, from a thread, so that a slow endpoint holds up no other trigger."""
        from airflow.sdk import Connection
        from airflow.sdk.exceptions import AirflowNotFoundException

        from tagger.connections import openai_client

        try:
            found = converted(self.conn_id, await Connection.async_get(self.conn_id))
        except AirflowNotFoundException:
            found = None
        waiting, pause = list(self.batches), FIRST_POLL_SECONDS
        client = openai_client(self.conn_id, lambda _: found)
        try:
            while waiting := await asyncio.to_thread(_in_progress, client, waiting):
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, LONGEST_POLL_SECONDS)
        finally:
            client.close()
        yield TriggerEvent({"batches": self.batches})  # type: ignore[no-untyped-call]


def _in_progress(client: Any, batches: list[str]) -> list[str]:
    from tagger.batch_api import BatchAPI
    from tagger.exceptions import LLMStopped, LLMUnreachable
    from tagger.runs import utc_now

    api, waiting = BatchAPI(client), []
    for batch in batches:
        try:
            if not api.state(batch, utc_now()).ended:
                waiting.append(batch)
        except LLMUnreachable:
            waiting.append(batch)
        except LLMStopped:  # the task will say why
            continue
    return waiting
