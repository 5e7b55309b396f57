"""The guide's commands, and the demo's shell in which they run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GUIDE = REPOSITORY / "docs" / "guide.md"
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shell(folder: Path, commands: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "demo", "--shell"],
        cwd=REPOSITORY,
        env=os.environ | {"TAGGER_DEMO": str(folder)},
        input=commands,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_every_command_of_the_guide_runs_and_prints_what_the_guide_says(tmp_path: Path) -> None:
    first, *rest = COMMANDS.findall(GUIDE.read_text(encoding="utf-8"))
    assert first == "scripts/demo --shell\n"

    done = shell(tmp_path, "".join(rest))

    assert done.returncode == 0, done.stdout + done.stderr
    shown = "".join(PRINTED.findall(GUIDE.read_text(encoding="utf-8")))
    assert [line for line in shown.splitlines() if line not in done.stdout] == []
    assert "price" in shown


def test_the_shell_ends_with_the_first_command_that_fails(tmp_path: Path) -> None:
    done = shell(tmp_path, "tagger check nowhere.yaml\necho not reached\n")

    assert done.returncode == 2
    assert "not reached" not in done.stdout
    assert "nowhere.yaml" in done.stderr
