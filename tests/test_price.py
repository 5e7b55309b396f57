"""What tokens cost."""

from typing import Any

import pytest

from tagger.cache import Usage
from tagger.dataset import LLM, Price
from tagger.price import cost_usd, price_of, usd


def llm(**fields: Any) -> LLM:
    return LLM.model_validate({"model": "gpt-5-mini", **fields})


def test_the_files_price_comes_before_the_librarys() -> None:
    assert price_of(llm(price={"input": 7, "cached_input": 3, "output": 11})) == Price(
        input=7, cached_input=3, output=11
    )


def test_the_library_knows_gpt_5_mini() -> None:
    price = price_of(llm())

    assert price is not None
    assert price.input == pytest.approx(0.25)
    assert price.cached_input == pytest.approx(0.025)
    assert price.output == pytest.approx(2.0)


FILE = {"input": 7, "cached_input": 3, "output": 11}
HALF = Price(input=3.5, cached_input=1.5, output=5.5)


@pytest.mark.parametrize(
    ("params", "batch"), [({}, True), ({"service_tier": "flex"}, False), ({"service_tier": "flex"}, True)]
)
def test_what_can_wait_costs_half_once(params: dict[str, Any], batch: bool) -> None:
    assert price_of(llm(price=FILE, params=params), batch=batch) == HALF


@pytest.mark.parametrize("tier", ["auto", "default", "priority"])
def test_other_tiers_are_not_halved(tier: str) -> None:
    assert price_of(llm(price=FILE, params={"service_tier": tier})) == Price.model_validate(FILE)


def test_half_of_the_librarys_price_is_halved_too() -> None:
    price = price_of(llm(), batch=True)

    assert price is not None
    assert (price.input, price.cached_input, price.output) == pytest.approx((0.125, 0.0125, 1.0))


def test_half_of_nothing_is_free_and_half_of_an_unknown_price_is_unknown() -> None:
    assert price_of(llm(price=0), batch=True) == Price(input=0, output=0)
    assert price_of(llm(model="qwen3-our-own-finetune"), batch=True) is None


@pytest.mark.parametrize("model", ["offline-stand-in", "qwen3-our-own-finetune", "x"])
def test_an_unknown_model_has_no_price(model: str) -> None:
    assert price_of(llm(model=model)) is None


def test_a_price_of_zero_is_free_and_not_unknown() -> None:
    price = price_of(llm(model="qwen3-our-own-finetune", price=0))

    assert cost_usd(Usage(input=10**6, cached_input=10**5, output=10**6), price) == 0.0


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        (Usage(), 0.0),
        (Usage(input=1_000_000), 2.0),
        (Usage(output=1_000_000), 10.0),
        (Usage(input=1_000_000, cached_input=1_000_000), 0.5),
        (Usage(input=1_000_000, cached_input=400_000, output=100_000), 0.6 * 2 + 0.4 * 0.5 + 1.0),
        (Usage(input=123, output=4), (123 * 2 + 4 * 10) / 1_000_000),
    ],
)
def test_cached_input_is_part_of_the_input_and_has_its_own_price(usage: Usage, cost: float) -> None:
    assert cost_usd(usage, Price(input=2.0, cached_input=0.5, output=10.0)) == pytest.approx(cost)


def test_without_a_price_of_its_own_cached_input_costs_like_input() -> None:
    usage = Usage(input=1_000_000, cached_input=400_000)

    assert cost_usd(usage, Price(input=2.0, output=10.0)) == pytest.approx(2.0)


def test_more_cached_input_than_input_gives_nothing_back() -> None:
    cost = cost_usd(Usage(input=0, cached_input=1_000_000), Price(input=2.0, cached_input=0.5, output=10.0))

    assert cost == pytest.approx(0.5)


def test_an_unknown_price_is_no_cost_of_zero() -> None:
    assert cost_usd(Usage(input=1), None) is None


@pytest.mark.parametrize(
    ("amount", "text"),
    [(None, "an unknown amount"), (0, "$0.00"), (0.0123, "$0.0123"), (31, "$31.00"), (1234.5, "$1,234.50")],
)
def test_an_amount_reads_well(amount: float | None, text: str) -> None:
    assert usd(amount) == text
