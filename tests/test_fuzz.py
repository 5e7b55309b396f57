"""Some cases of each target of `python -m tests.fuzz`, which runs a hundred thousand; and its rounds."""

import tempfile
from collections.abc import Callable

import pytest
from hypothesis import strategies as st

from tests.fuzz.__main__ import main
from tests.fuzz.rounds import Target, run_round
from tests.fuzz.targets import TARGETS

CASES = {"whole-runs": 2, "run-files": 40, "texts": 60}


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_breaks_no_promise(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.getbasetemp()))
    cases = CASES.get(name, 120)

    result = run_round(TARGETS[name], 0, 0, cases)

    assert result.failure is None, result.failure
    assert result.outcomes.total() == cases


def made_of(check: Callable[[int], str]) -> Target:
    return Target("numbers", st.integers(0, 10_000), check, share=100_000)


def test_the_same_seed_makes_the_same_cases() -> None:
    drawn: list[list[int]] = [[], [], []]
    for made, seed in zip(drawn, (7, 7, 8), strict=True):

        def note(number: int, made: list[int] = made) -> str:
            made.append(number)
            return "noted"

        run_round(made_of(note), seed, 3, 50)

    assert drawn[0] == drawn[1] != drawn[2]


def test_a_broken_promise_is_told_with_the_smallest_case() -> None:
    def refuse(number: int) -> str:
        assert number < 500, "too large"
        return "small"

    result = run_round(made_of(refuse), 1, 0, 200)

    assert result.failure is not None
    assert "AssertionError: too large" in result.failure
    assert "case=500" in result.failure


def test_the_command_counts_what_became_of_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3", "--cases", "500", "--workers", "1", "cache-records"]) == 0

    shown = capsys.readouterr().out
    assert "cache-records: 60 cases" in shown
    assert "60 cases, 0 of 1 rounds failed; seed 3" in shown


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["nonesuch"])

    assert "no target 'nonesuch'" in capsys.readouterr().err
