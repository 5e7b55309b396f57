"""The shards: the new texts of a plan, dealt out to files that a tag step each takes."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tagger.dataset import Shards
from tagger.estimate import Lengths
from tagger.keys import Keys
from tagger.runs import WAVE_CHARS, WAVE_TEXTS, ParquetFile, Run, Shard, shard_path, writing_parquet

SCHEMA = pa.schema([("key", pa.string()), ("row_id", pa.string()), ("text", pa.string())])

BUFFERED_CHARS = 64_000_000
"""Of the waves of all shards that are being filled: what bounds the memory where texts are long."""


class NewTexts:
    """The new texts of a snapshot that are asked, in the order of its rows, each once."""

    def __init__(self, snapshot: pq.ParquetFile, new: Keys, limit: int | None, lengths: Lengths) -> None:
        self._snapshot = snapshot
        self._new = new
        self._is_left = np.ones(len(new), bool)
        self.size = len(new) if limit is None else min(limit, len(new))
        self.lengths = lengths
        """Of the texts that were given out."""

    @property
    def left(self) -> Keys:
        """Keys of the new texts that were not given out."""
        return self._new.where(self._is_left)

    def read(self, rows: pq.ParquetFile) -> Iterator[tuple[str, str, str]]:
        """Yield key, row id and text; `rows` are the plan's."""
        wanted = self.size
        for group in range(self._snapshot.num_row_groups):
            known = rows.read_row_group(group, ["key", "too_long"])
            places = self._new.places(known.column("key").combine_chunks())
            picked = []
            for i in np.flatnonzero((places >= 0) & ~known.column("too_long").to_numpy()):
                if self._is_left[places[i]] and wanted:
                    self._is_left[places[i]] = False
                    wanted -= 1
                    picked.append(i)
            if picked:
                keys = known.column("key").take(picked).to_pylist()
                found = self._snapshot.read_row_group(group).take(picked).to_pydict()
                for key, row_id, text in zip(keys, found["id"], found["text"], strict=True):
                    self.lengths.add(text)
                    yield key, str(row_id), text
            if not wanted:
                break

    def count(self, rows: pq.ParquetFile) -> None:
        """Read them all, for the sake of their number and length."""
        for _ in self.read(rows):
            pass


class ShardFile:
    """A shard's file while it is written: a row group for each wave of texts."""

    def __init__(self, parquet: ParquetFile, wave_chars: int) -> None:
        self._parquet = parquet
        self._wave_chars = wave_chars
        self._wave: list[tuple[str, str, str]] = []
        self._chars = 0
        self.texts = 0

    def add(self, key: str, row_id: str, text: str) -> None:
        """Add a text."""
        if len(self._wave) == WAVE_TEXTS or self._chars + len(text) > self._wave_chars:
            self.end_wave()
        self._wave.append((key, row_id, text))
        self._chars += len(text)
        self.texts += 1

    def end_wave(self) -> None:
        """Write what was added since the last wave."""
        if self._wave:
            columns = zip(*self._wave, strict=True)
            self._parquet.write(dict(zip(SCHEMA.names, map(list, columns), strict=True)))
        self._wave, self._chars = [], 0


def write_shards(run: Run, plan_id: str, asked: NewTexts, rows: pq.ParquetFile, shards: Shards) -> list[Shard]:
    """Deal the new texts out to the shards, in the order of their first rows."""
    count = min(shards.max, -(-asked.size // shards.texts_per_shard))
    wave_chars = min(WAVE_CHARS, BUFFERED_CHARS // count)
    with ExitStack() as stack:
        paths = [shard_path(run, plan_id, i + 1) for i in range(count)]
        parquets = [stack.enter_context(writing_parquet(run.storage, path, SCHEMA)) for path in paths]
        files = [ShardFile(parquet, wave_chars) for parquet in parquets]
        for file, text in zip(cycle(files), asked.read(rows), strict=False):
            file.add(*text)
        for file in files:
            file.end_wave()
    return [Shard(shard=i + 1, of=count, texts=file.texts) for i, file in enumerate(files)]
