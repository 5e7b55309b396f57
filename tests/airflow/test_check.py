"""What `tagger check` tells of Airflow's own things, where there is an Airflow."""

from pathlib import Path
from typing import Any

import pytest
from airflow.models.pool import Pool
from airflow.utils.session import create_session

from tagger.airflow.check import check_airflow
from tagger.dataset_files import parse_dataset
from tagger.exceptions import InputError
from tests.project import MINIMAL, merged


@pytest.fixture(scope="module", autouse=True)
def airflow_database() -> None:
    from airflow.utils.db import initdb

    initdb()


def check(**changes: Any) -> list[str]:
    content = merged(MINIMAL, {"storage": "s3://bucket", **changes})
    return list(check_airflow(parse_dataset(content, "notes.yaml"), lambda conn_id: None))


def test_the_default_pool_needs_no_word() -> None:
    assert check() == []


def test_a_missing_pool_is_an_error_that_says_how_to_make_it() -> None:
    with pytest.raises(InputError, match=r"`llm\.pool`: without the pool `calls` .* airflow pools set calls 16"):
        check(llm={"pool": "calls"})


def test_a_pool_is_found() -> None:
    with create_session() as session:
        Pool.create_or_update_pool("for_tags", 4, "", False, session=session)

    assert check(llm={"pool": "for_tags"}) == ["pool for_tags: there"]


def test_an_airflow_without_tables_is_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "none"))

    [line] = check(llm={"pool": "other"})

    assert line.startswith("pool other: not checked")
