"""Sets of keys: they do what Python's sets do."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagger.keys import KEYS_A_PART, Keys, digests

FEW = st.tuples(st.integers(0, 3), st.integers(0, 9)).map(
    lambda halves: f"{halves[0] << 62:016x}{halves[1] << 56:016x}"
)
"""Keys of a few, many of which have their first half in common, and many of whose bytes are zero."""

SETS = st.lists(FEW).map(lambda keys: (Keys.of(keys), set(keys)))


@settings(deadline=None)
@given(SETS, SETS)
def test_they_are_sets(one: tuple[Keys, set[str]], two: tuple[Keys, set[str]]) -> None:
    (keys, plain), (others, plain_others) = one, two

    assert list(keys) == sorted(plain)
    assert (len(keys), bool(keys)) == (len(plain), bool(plain))
    assert list(keys | others) == sorted(plain | plain_others)
    assert list(keys & others) == sorted(plain & plain_others)
    assert list(keys - others) == sorted(plain - plain_others)


@settings(deadline=None)
@given(SETS, st.lists(st.none() | FEW))
def test_places_are_those_in_their_order(one: tuple[Keys, set[str]], asked: list[str | None]) -> None:
    keys, plain = one
    order = sorted(plain)

    places = keys.places(pa.array(["before", *asked, "after"], pa.string())[1:-1])

    assert places.tolist() == [order.index(key) if key in plain else -1 for key in asked]


def test_what_is_no_key_is_left_out() -> None:
    key = "0123456789abcdef" * 2

    assert list(Keys.of([key, "", key[1:], "x" + key[1:], " " * 32, key[:30] + "  ", key[:-1] + "0" * 33])) == [key]


@pytest.mark.parametrize("odd", ["", "ab", "x" * 32, "0" * 31 + " "])
def test_digests_are_of_keys_alone(odd: str) -> None:
    for keys in (["0" * 32, odd], pa.array(["0" * 32, odd])):
        with pytest.raises(ValueError, match=r"^$|Non-hex"):
            digests(keys)


def test_more_keys_than_a_part_has() -> None:
    count = KEYS_A_PART + 1

    keys = Keys.of(f"{number:032x}" for number in [*range(count), 5, 6])

    assert (len(keys), len(set(keys))) == (count, count)
    assert [len(part) for part in keys.parts(KEYS_A_PART)] == [KEYS_A_PART, 1]
