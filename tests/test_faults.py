"""The fault campaign, one case of each cell; `python -m tests.faults` tries more of them."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fault_campaign import SERVERS, Campaign, Step, cells
from tests.fault_mails import Mails
from tests.fault_site import Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEED = 1


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with Site(tmp_path_factory.mktemp("faults")) as site:
        yield Campaign(site)


@pytest.fixture(scope="module")
def mail_campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mails]:
    with Mails(tmp_path_factory.mktemp("mails")) as mails:
        yield mails


@pytest.mark.parametrize("step", SERVERS)
def test_rows_are_right_without_a_fault(campaign: Campaign, step: Step) -> None:
    known = campaign.references[step]
    assert known.end is not None

    tagged = {row_id: row for row_id, row in known.end.next_rows.items() if row_id != 17}
    assert sorted(tagged) == [1, 2, 3, 6, 7, 8, *range(9, 17)]
    assert {row.status for row in tagged.values()} == {"tagged"}
    tags = (["fruit"], ["animal"], ["weather"], ["animal"], ["fruit"])
    texts = {3: 30, 15: 9, 16: 1}
    assert {row_id: row.tags for row_id, row in tagged.items()} == {
        row_id: tags[texts.get(row_id, row_id) % 5] for row_id in tagged
    }
    assert known.end.next_rows[17].error == "too_long: over 200 characters"
    assert {name for name, count in known.requests.items() if count} == {*SERVERS[step]} - {"disk"}


@pytest.mark.parametrize("cell", cells())
def test_what_a_fault_leaves_is_as_it_should_be(request: pytest.FixtureRequest, cell: str) -> None:
    tried: Any = request.getfixturevalue("mail_campaign" if cell.startswith("mail-") else "campaign")
    case = random.Random(f"{SEED} {cell}").choice(tried.cases(cell))

    result = tried.try_(case)

    assert result.problems == [], case
