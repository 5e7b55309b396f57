"""What tokens cost."""

from tagger.cache import Chars, Usage
from tagger.dataset import LLM, Price

HALF = 0.5
"""What a call costs, against one at once, where its result can wait: through the Batch API or at the `flex` tier."""


def price_of(llm: LLM, *, batch: bool = False) -> Price | None:
    """Return the price of a dataset's model: the file's, else the price library's, else None (unknown).

    Half of it through the Batch API (`batch`), and likewise where `params` ask for the `flex` tier.
    """
    price = llm.price or _library_price(llm.model)
    if price is None or not (batch or llm.params.get("service_tier") == "flex"):
        return price
    cached = price.cached_input
    return Price(
        input=price.input * HALF,
        cached_input=None if cached is None else cached * HALF,
        output=price.output * HALF,
    )


def _library_price(model: str) -> Price | None:
    from genai_prices import Usage as LibraryUsage
    from genai_prices import calc_price

    million = 1_000_000
    try:
        fresh = calc_price(LibraryUsage(input_tokens=million), model_ref=model)
        cached = calc_price(LibraryUsage(input_tokens=million, cache_read_tokens=million), model_ref=model)
        output = calc_price(LibraryUsage(output_tokens=million), model_ref=model)
    except LookupError:
        return None
    return Price(
        input=float(fresh.total_price), cached_input=float(cached.total_price), output=float(output.total_price)
    )


def cost_usd(usage: Usage, price: Price | None) -> float | None:
    """Return what a usage costs in USD; None where the price is unknown."""
    if price is None:
        return None
    cached_price = price.input if price.cached_input is None else price.cached_input
    fresh = max(usage.input - usage.cached_input, 0)
    return (fresh * price.input + usage.cached_input * cached_price + usage.output * price.output) / 1_000_000


def estimated_tokens(text: str) -> int:
    """Return about how many tokens a text has."""
    return Chars.of(text).tokens


def usd(amount: float | None) -> str:
    """Return an amount of money to read."""
    if amount is None:
        return "an unknown amount"
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${amount:.4f}"
