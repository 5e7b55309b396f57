"""The provider's Batch API: files of requests go up, files of answers come down within 24 hours, at half the price."""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import IO, Any, Literal, TypeVar

import openai

from tagger.batches import Batch
from tagger.completion import paren
from tagger.dataset import Dataset
from tagger.exceptions import LLMStopped, LLMUnreachable
from tagger.request import request_options
from tagger.runs import utc_now

T = TypeVar("T")

ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"

METADATA = "tagger"
"""Key of the batch's metadata under which our name of it stands."""

TRIES = 5
"""Of a request that is free, by the SDK, as the server says or with growing waits."""

LOOK_UP_AFTER = (2.0, 10.0, 30.0)
"""Seconds from a try to create a batch that got no answer to the look whether it is there all the same."""

CLOCKS_DIFFER = 3600.0
"""Seconds by which the provider's clock may be behind ours."""

NOT_IN_BODY = frozenset({"extra_body", "extra_headers", "extra_query", "timeout"})
"""Arguments of the SDK's that are no part of a request's body."""

UNREACHABLE, UNKNOWN = "unreachable", "unknown to the provider"
"""States of ours: of a batch that cannot be looked at now, and of one that is not there though it should have ended."""

IN_PROGRESS = frozenset({"validating", "in_progress", "finalizing", "cancelling", UNREACHABLE})

LOST_AFTER = timedelta(hours=25)
"""A batch ends within 24 hours: what is older and not at the provider was never created, or is gone."""


class Gone(Exception):
    """The endpoint knows no such file or batch, or no Batch API."""


@dataclass(frozen=True)
class State:
    """Where a batch is at the provider."""

    status: str
    done: int
    """Requests that have an answer or an error."""
    files: list[str]
    """The files of answers and of errors."""
    reason: str | None
    """The provider's code for why it failed as a whole."""
    created_at: datetime | None = None
    """By the provider's clock; None where it does not know the batch."""

    @property
    def ended(self) -> bool:
        """Whether no further answer will come."""
        return self.status not in IN_PROGRESS


class BatchAPI:
    """Files and batches at the endpoint of a client.

    Raises (all methods):
        LLMStopped: the endpoint refuses the request, or has no Batch API.
        LLMUnreachable: it does not answer, or not now.
    """

    def __init__(self, client: openai.OpenAI) -> None:
        self._client = client
        self._free = client.with_options(max_retries=TRIES)
        self._endpoint = f"LLM endpoint {client.base_url.copy_with(userinfo=b'', query=None)}"

    def check(self) -> None:
        """Raise unless there is a Batch API."""
        self._ask_at_start(lambda: self._free.batches.list(limit=1))

    def request_options(self, dataset: Dataset) -> dict[str, Any]:
        """Return the parameters of each request's body, beside model and messages: those of an online call."""
        options = request_options(self._client, dataset)
        return {**{k: v for k, v in options.items() if k not in NOT_IN_BODY}, **options["extra_body"]}

    def upload(self, file: IO[bytes], batch: Batch) -> str:
        """Upload a batch's requests, the file from its start; return the provider's name of it."""

        def upload() -> str:
            file.seek(0)
            return self._free.files.create(file=(batch.file_name, file), purpose="batch").id

        return self._ask_at_start(upload)

    def find_file(self, batch: Batch) -> str | None:
        """Return the file of a batch's requests, where an earlier try uploaded it."""

        def find() -> str | None:
            files = self._free.files.list(purpose="batch", order="desc")
            return next((file.id for file in files if file.filename == batch.file_name), None)

        return self._ask_at_start(find)

    def create(self, batch: Batch, input_file: str) -> str:
        """Create a batch of its uploaded requests, which is the paid call; return the provider's name of it.

        Where no answer comes, the batch is looked for before it is created again. Only after `LLMUnreachable` may it
        be there all the same.
        """

        def create() -> str:
            made = self._client.batches.create(
                input_file_id=input_file,
                endpoint=ENDPOINT,
                completion_window="24h",
                metadata={METADATA: batch.batch},
            )
            return made.id

        unclear: LLMStopped | None = None
        for wait in (*LOOK_UP_AFTER, None):
            try:
                return self._ask_at_start(create)
            except LLMUnreachable as e:
                unclear = e
            except LLMStopped:
                if unclear is None:
                    raise
                break
            if wait is not None:
                time.sleep(wait)
                if (found := self.find(batch)) is not None:
                    return found
        assert unclear is not None
        raise unclear

    def has_file(self, file_id: str) -> bool:
        """Return whether a file is there."""
        try:
            self._ask(lambda: self._free.files.retrieve(file_id))
        except Gone:
            return False
        return True

    def find(self, batch: Batch) -> str | None:
        """Return the provider's name of a batch that an earlier try may have created."""
        since = batch.intended_at.timestamp() - CLOCKS_DIFFER

        def find() -> str | None:
            for remote in self._free.batches.list(limit=100):
                if (remote.metadata or {}).get(METADATA) == batch.batch:
                    return remote.id
                if remote.created_at < since:  # they come newest first
                    break
            return None

        return self._ask_at_start(find)

    def state(self, remote: str, since: datetime) -> State:
        """Return where a batch is that was handed over at `since`."""
        try:
            return self._ask(lambda: _state_of(self._free.batches.retrieve(remote)))
        except Gone:
            if utc_now() - since > LOST_AFTER:
                return State(UNKNOWN, 0, [], None)
        raise LLMStopped(f"{self._endpoint} does not know the batch {remote}", at_start=False)

    def files(self) -> dict[str, str]:
        """Return the names of all files of requests and answers, by the provider's; none without a Batch API."""

        def find() -> dict[str, str]:
            purposes = ("batch", "batch_output")
            return {file.id: file.filename or "" for each in purposes for file in self._free.files.list(purpose=each)}

        with suppress(Gone):
            return self._ask(find, at_start=True)
        return {}

    def handed_over(self) -> dict[str, State]:
        """Return where the batches are that have a name of ours, by that name."""

        def find() -> dict[str, State]:
            named = ((remote, (remote.metadata or {}).get(METADATA)) for remote in self._free.batches.list(limit=100))
            return {name: _state_of(remote) for remote, name in named if name is not None}

        return self._ask_at_start(find)

    def download(self, file_id: str, to: IO[bytes]) -> bool:
        """Download a file into an empty one; return whether it is there."""

        def download() -> None:
            to.seek(0)
            to.truncate()
            to.writelines(self._free.files.content(file_id).iter_bytes())

        try:
            self._ask(download)
        except Gone:
            return False
        to.seek(0)
        return True

    def delete(self, file_id: str) -> None:
        """Delete a file, unless it is gone."""
        with suppress(Gone):
            self._ask(lambda: self._free.files.delete(file_id))

    def _ask_at_start(self, request: Callable[[], T]) -> T:
        try:
            return self._ask(request, at_start=True)
        except Gone:
            pass
        raise LLMStopped(
            f"{self._endpoint} has no Batch API (HTTP 404): set `llm.mode: online` in the dataset file", at_start=True
        )

    def _ask(self, request: Callable[[], T], *, at_start: bool = False) -> T:
        """Make a request. No error of the SDK leaves it, not even as the context of one of ours."""
        try:
            return request()
        except openai.APIStatusError as e:
            error = self._of_status(e, at_start)
        except openai.APIConnectionError as e:  # time-outs are one of them
            error = LLMUnreachable(f"{self._endpoint} does not answer ({type(e).__name__})", at_start=at_start)
        except (openai.APIResponseValidationError, AttributeError, TypeError, ValueError):
            error = LLMStopped(f"{self._endpoint}: its answer is none of the Batch API", at_start=at_start)
        raise error

    def _of_status(self, error: openai.APIStatusError, at_start: bool) -> Exception:
        status, code = error.status_code, str(error.code or "")
        said = f" (HTTP {status}{paren(code)})"
        if status == 404:
            return Gone()
        if status in (401, 403):
            return LLMStopped(f"{self._endpoint} refuses the API key{said}", at_start=at_start)
        if status == 429 and ("insufficient_quota" in code or "billing" in code):
            return LLMStopped(f"{self._endpoint}: the account's quota is exhausted{said}", at_start=at_start)
        is_new_file = status == 400 and error.param == "file_id"  # uploaded moments ago, and not to be seen everywhere
        if status in (408, 409, 429) or status >= 500 or is_new_file:
            return LLMUnreachable(f"{self._endpoint} does not take the batch now{said}", at_start=at_start)
        return LLMStopped(f"{self._endpoint} does not take the batch{said}", at_start=at_start)


def _state_of(remote: openai.types.Batch) -> State:
    counts, errors = remote.request_counts, remote.errors.data if remote.errors else None
    code = str(errors[0].code) if errors else ""
    return State(
        status=str(remote.status),
        done=counts.completed + counts.failed if counts else 0,
        files=[file for file in (remote.output_file_id, remote.error_file_id) if file],
        reason=code if re.fullmatch("[a-z_]{1,40}", code) else None,
        created_at=datetime.fromtimestamp(remote.created_at, UTC),
    )
