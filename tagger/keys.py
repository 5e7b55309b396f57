"""Sets of keys: tens of millions of them must fit into memory."""

from __future__ import annotations

import re
from binascii import unhexlify
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Digests = npt.NDArray[np.bytes_]
"""Keys as the 16 bytes that their 32 hex digits stand for."""

_KEY = re.compile("[0-9a-f]{32}")

KEYS_A_PART = 100_000
"""Keys that are text at once."""


def digests(keys: Sequence[str] | pa.StringArray) -> Digests:
    """Return keys as digests, in the same order. An Arrow array, which has no NULL, takes a tenth of a list's time.

    Raises:
        ValueError: one of them is no key, of 32 hex digits.
    """
    digits = _digits(keys) if isinstance(keys, pa.StringArray) else "".join(keys)
    if len(digits) != 32 * len(keys):
        raise ValueError
    return np.frombuffer(unhexlify(digits), "S16")


def _digits(keys: pa.StringArray) -> memoryview:
    _, ends, texts = keys.buffers()
    bounds = np.frombuffer(ends, np.int32)[keys.offset : keys.offset + len(keys) + 1]
    return memoryview(texts)[bounds[0] : bounds[-1]] if len(keys) else memoryview(b"")


class Keys:
    """A set of keys, in 16 bytes each, that goes by their order."""

    def __init__(self, *parts: Digests) -> None:
        """Take the digests of all parts, in which a key may stand more than once."""
        each = np.concatenate([np.empty(0, "S16"), *parts])
        each.sort()
        again = np.flatnonzero(each[1:] == each[:-1])
        self.digests = np.delete(each, again) if len(again) else each

    @classmethod
    def of(cls, keys: Iterable[str]) -> Keys:
        """Return the set of these keys; what is no key is left out."""
        left, found = iter(keys), list[Digests]()
        while part := list(islice(left, KEYS_A_PART)):
            try:
                found.append(digests(part))
            except ValueError:
                found.append(digests(list(filter(_KEY.fullmatch, part))))
        return cls(*found)

    def __len__(self) -> int:
        return len(self.digests)

    def __iter__(self) -> Iterator[str]:
        for part in self.parts(KEYS_A_PART):
            yield from part

    def parts(self, size: int) -> Iterator[list[str]]:
        """Yield the keys in order, in lists of `size`."""
        for start in range(0, len(self), size):
            digits = self.digests[start : start + size].tobytes().hex()
            yield [digits[at : at + 32] for at in range(0, len(digits), 32)]

    def __or__(self, other: Keys) -> Keys:
        return Keys(self.digests, other.digests)

    def __and__(self, other: Keys) -> Keys:
        return self.where(other.holds(self.digests))

    def __sub__(self, other: Keys) -> Keys:
        return self.where(~other.holds(self.digests))

    def where(self, mask: npt.NDArray[np.bool_]) -> Keys:
        """Return those of the keys, in their order, that a mask picks."""
        if mask.all():
            return self
        picked = Keys()
        picked.digests = self.digests[mask]
        return picked

    def holds(self, some: Digests) -> npt.NDArray[np.bool_]:
        """Return for each of some digests, which should be in order, whether it is in the set."""
        held = np.zeros(len(some), bool)
        for start in range(0, len(some) if len(self) else 0, KEYS_A_PART):
            part = some[start : start + KEYS_A_PART]
            held[start : start + KEYS_A_PART] = self.digests[self._at(part)] == part
        return held

    def places(self, keys: pa.Array) -> npt.NDArray[np.int64]:
        """Return where each of some keys stands in the set's order; -1 for those that do not, or are NULL."""
        places = np.full(len(keys), -1)
        there = np.flatnonzero(keys.is_valid())
        if len(self) and len(there):
            some = digests(keys.drop_null())
            order = np.argsort(_heads(some))  # a search in order finds what it needs in the processor's cache
            there, some = there[order], some[order]
            at = self._at(some)
            places[there] = np.where(self.digests[at] == some, at, -1)
        return places

    @cached_property
    def _own_heads(self) -> npt.NDArray[np.uint64]:
        return _heads(self.digests)

    def _at(self, some: Digests) -> npt.NDArray[np.int64]:
        """Return where each digest stands, or anything where it does not.

        Numbers are found in a third of the time that digests take; where several have the same head, it is done again.
        """
        heads = _heads(some)
        at = np.minimum(np.searchsorted(self._own_heads, heads), len(self) - 1)
        again = np.flatnonzero((self._own_heads[at] == heads) & (self.digests[at] != some))
        if len(again):
            at[again] = np.minimum(np.searchsorted(self.digests, some[again]), len(self) - 1)
        return at


def _heads(some: Digests) -> npt.NDArray[np.uint64]:
    """Return the first half of each digest as a number, which has the digests' order."""
    return some.view(">u8")[::2].astype(np.uint64)
