"""The public labelled sets, as `tagger evaluate` takes them: here a few texts of the same form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.labelled import MEDICAL, SETS, convert
from demo.stand_in import StandIn, completion
from tagger.dataset_files import load_dataset
from tagger.labels import read_labels
from tests.conftest import REPOSITORY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of both sets, small."""
    folder = tmp_path / "sets"
    folder.mkdir()
    lines = "".join(f'{n},"An abstract, number {n}."\n' for n in range(1, 6))
    (folder / "medical_tc_test.csv").write_text(f"condition_label,medical_abstract\n{lines}")
    splits = {"test": [["do i owe", "balance"], ["yes please", "yes"]], "oos_test": [["who won", "oos"]]}
    (folder / "data_full.json").write_text(json.dumps({"train": [["never", "read"]], **splits}))
    return folder


@pytest.mark.parametrize("name", list(SETS))
def test_a_set_becomes_a_dataset_file_and_labels_that_fit_it(folder: Path, tmp_path: Path, name: str) -> None:
    convert(name, folder, tmp_path / "out")

    dataset = load_dataset(tmp_path / "out" / f"{name}.yaml")
    labels = read_labels(tmp_path / "out" / f"{name}.labels.csv", dataset, lambda _: None)

    assert dataset.max_tags == 1
    assert all(tag.description for tag in dataset.tags)
    assert not labels.describe()
    gold = [(label.text, *label.tags) for label in labels.labels]
    if name == "medical_abstracts":
        assert gold == [(f"An abstract, number {n}.", tag) for n, tag in enumerate(MEDICAL, 1)]
    else:
        assert gold == [("do i owe", "balance"), ("yes please", "yes"), ("who won",)]


def test_two_variables_and_the_model_take_it_to_another_endpoint(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench.labelled", "clinc_oos", str(folder), str(out), "--model", "other-llm", "--"]
    command += [
        sys.executable,
        "-m",
        "tagger.cli",
        "evaluate",
        "clinc_oos",
        str(out / "clinc_oos.labels.csv"),
        "--json",
    ]
    with StandIn(api_key="other-key") as endpoint:
        endpoint.script(*[completion('{"tags": ["yes"]}', model="other-llm")] * 3)
        environment = {**os.environ, "OPENAI_BASE_URL": endpoint.base_url, "OPENAI_API_KEY": "other-key"}
        done = subprocess.run(
            command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
        )
        asked = len(endpoint.calls)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (asked, found["model"], found["stand_in"]) == (3, "other-llm", False)
    assert found["quality"]["exact_match"]["value"] == pytest.approx(1 / 3)
