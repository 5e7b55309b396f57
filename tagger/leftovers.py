"""Files of our batches that are left at the provider: their deletion, once a batch is collected, may have failed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime, timedelta
from functools import partial

from tagger.batch_api import BatchAPI
from tagger.batches import FILE_NAME
from tagger.runs import disk_errors

_KEY = re.compile(rb'"([0-9a-f]{32})"')


SAME_BATCH = timedelta(hours=24)
"""By how much the provider's time of a batch may differ from that of its books: it is created right after these are
opened, or by a later try of its shard."""


def find_leftovers(
    api: BatchAPI, keys: Collection[str], booked: Mapping[str, Collection[datetime]], waiting: Collection[str]
) -> Iterator[str]:
    """Yield the provider's names of left files that hold a line of one of the keys.

    `booked` tells of those keys whose answers by batches are in the books when these were opened: answers to others, or
    of other times, may be those of another installation with the same account, which is yet to collect them. Requests
    serve nobody once their batch has ended. `waiting` are our names of the batches that are not collected.

    Raises:
        LLMStopped: the endpoint refuses the request, or does not answer.
    """
    files = api.files()
    batches = api.handed_over() if files else {}
    suspects: dict[str, Collection[str]] = {}
    for file_id, file_name in files.items():
        name = FILE_NAME.fullmatch(file_name)
        if name and name[1] not in waiting and (name[1] not in batches or batches[name[1]].ended):
            suspects[file_id] = keys
    for batch, state in batches.items():
        if state.ended and batch not in waiting:
            ours = {key for key, times in booked.items() if any(map(partial(_is_near, state.created_at), times))}
            suspects.update((file_id, ours) for file_id in state.files if file_id in files)
    for file_id, wanted in suspects.items():
        if wanted and _holds(api, file_id, {key.encode() for key in wanted}):
            yield file_id


def _is_near(created_at: datetime | None, booked_at: datetime) -> bool:
    return created_at is not None and abs(created_at - booked_at) < SAME_BATCH


def _holds(api: BatchAPI, file_id: str, keys: set[bytes]) -> bool:
    with disk_errors(), tempfile.TemporaryFile() as file:
        return api.download(file_id, file) and any(not keys.isdisjoint(_KEY.findall(line)) for line in file)
