"""Files of our batches that are left at the provider: their deletion, once a batch is collected, may have failed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from tagger.batch_api import BatchAPI
from tagger.batches import FILE_NAME
from tagger.runs import disk_errors

_KEY = re.compile(rb'"([0-9a-f]{32})"')


def find_leftovers(
    api: BatchAPI, keys: Collection[str], answered: Collection[str], waiting: Collection[str]
) -> Iterator[str]:
    """Yield the provider's names of left files that hold a line of one of the keys.

    `answered` are those of the keys whose answers by a batch are in the books: only files of answers to one of them are
    ours for sure, for another installation may use the same account. `waiting` are our names of the batches that are
    not collected, whose files are in use.

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
            suspects.update((file_id, answered) for file_id in state.files if file_id in files)
    for file_id, wanted in suspects.items():
        if wanted and _holds(api, file_id, {key.encode() for key in wanted}):
            yield file_id


def _holds(api: BatchAPI, file_id: str, keys: set[bytes]) -> bool:
    with disk_errors(), tempfile.TemporaryDirectory(prefix="tagger-") as folder:
        file = Path(folder, "file")
        if not api.download(file_id, file):
            return False
        with file.open("rb") as lines:
            return any(not keys.isdisjoint(_KEY.findall(line)) for line in lines)
