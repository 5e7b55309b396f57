"""The budget: what a run may cost, by its own limit and by the month's."""

import math
from dataclasses import dataclass
from datetime import datetime

from tagger.dataset import Dataset
from tagger.exceptions import BUDGET_REACHED, InputError
from tagger.ledger import read_attempts
from tagger.price import price_of, usd
from tagger.runs import Estimate, Run, utc_now
from tagger.spend import spent_usd


def check_price(dataset: Dataset) -> None:
    """Check that the cost of a run with a limit will be known.

    Raises:
        InputError: the price of the model is not known.
    """
    for name in ("max_cost_usd", "max_cost_usd_per_month"):
        if getattr(dataset.limits, name) is not None and price_of(dataset.llm) is None:
            raise InputError(
                f"`limits.{name}` is set, but the price of `{dataset.llm.model}` is not known: set `llm.price` "
                f"(0 for a local model), or `{name}: null`"
            )


@dataclass(frozen=True)
class Budget:
    """What a run may cost, in USD. None: no limit."""

    run: float | None = None
    """`limits.max_cost_usd`."""
    month: float | None = None
    """What other runs have left of `limits.max_cost_usd_per_month`."""
    spent: float = 0.0
    """By earlier attempts at this run; it counts toward both."""

    @property
    def total(self) -> float | None:
        """The least of the limits."""
        return min((limit for limit in (self.run, self.month) if limit is not None), default=None)

    def problem(self, expected: Estimate, *, is_trial: bool = False) -> str | None:
        """Return why the texts of an estimate are not to be asked, and what to do; None where the budget will do."""
        if self.total is None or expected.usd is None or expected.usd <= self.total - self.spent:
            return None
        left = max(self.total - self.spent, 0.0)
        limit = "max_cost_usd" if self.total == self.run else "max_cost_usd_per_month"
        one_run = ", give this run a `max_cost_usd` of its own (--max-cost-usd)" if limit == "max_cost_usd" else ""
        fitting = int(expected.texts * left / expected.usd)
        fewer = f", or let it ask fewer texts: `limit` {fitting} (--limit {fitting})" if fitting else ""
        if is_trial:
            fewer = ", or take fewer texts (--sample)"
        return (
            f"{BUDGET_REACHED}: {expected.texts:,} new texts would cost about {usd(expected.usd)}, and "
            f"`limits.{limit}` leaves this run {usd(left)}: none was asked. Raise `limits.{limit}`{one_run}{fewer}"
        )


def budget_of(run: Run, dataset: Dataset) -> Budget:
    """Return what a run may cost. A month is one of the calendar, in the dataset's time zone."""
    limits, month = dataset.limits, None
    if limits.max_cost_usd is None and limits.max_cost_usd_per_month is None:
        return Budget()
    if limits.max_cost_usd_per_month is not None:
        start, end = month_of(utc_now(), dataset)
        others = spent_usd(run.storage, run.dataset_name, start, end, but_run=run.run_id)
        month = max(limits.max_cost_usd_per_month - others, 0.0)
    return Budget(limits.max_cost_usd, month, math.fsum(attempt.spent_usd for attempt in read_attempts(run)))


def month_of(instant: datetime, dataset: Dataset) -> tuple[datetime, datetime]:
    """Return the beginning of an instant's month, and of the next one, in the dataset's time zone."""
    first = instant.astimezone(dataset.zone).replace(day=1, hour=0, minute=0, second=0, microsecond=0, fold=0)
    return first, first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
