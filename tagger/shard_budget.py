"""What an attempt at a shard may spend: what is left of the run's budget where its shards share a Redis, else its part.

The attempts' files are the books. Redis only tells the shards of each other sooner than the files could.
"""

import math
from typing import TYPE_CHECKING, Literal, Protocol, overload

from tagger.ledger import Ledger, read_attempts
from tagger.price import usd
from tagger.runs import Plan, Run

if TYPE_CHECKING:
    from redis import Redis

KEY_SECONDS = 3600
"""How long Redis keeps what a run spent after its last call. It is read from the files again where it is gone."""


class ShardBudget(Protocol):
    """What an attempt at a shard may spend."""

    name: str

    def is_spent(self, by_attempt: float) -> bool:
        """Return whether no further call may start, this attempt having spent so much (USD)."""
        ...


class LocalBudget:
    """An amount (USD) that is the attempt's alone."""

    def __init__(self, amount: float, name: str) -> None:
        self.name = name
        self._amount = amount

    def is_spent(self, by_attempt: float) -> bool:
        """Return whether no further call may start, this attempt having spent so much (USD)."""
        return by_attempt >= self._amount


class SharedBudget:
    """An amount (USD) that all attempts of a run spend together, added up in Redis.

    Redis holds what each attempt has spent, which only grows, so that nothing is lost or counted twice when a command
    is late, repeated or forgotten.
    """

    _BOOK = """
    if ARGV[2] == '' and redis.call('EXISTS', KEYS[1]) == 0 then return false end
    for i = 3, #ARGV, 2 do
        if tonumber(ARGV[i + 1]) >= tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or 0) then
            redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
        end
    end
    redis.call('EXPIRE', KEYS[1], ARGV[1])
    local total = 0
    for _, spent in ipairs(redis.call('HVALS', KEYS[1])) do total = total + spent end
    return string.format('%.17g', total)
    """

    def __init__(self, client: "Redis", run: Run, attempt: str, amount: float, name: str) -> None:
        """`attempt` is the name of this attempt's file."""
        self.name = name
        self._run = run
        self._key = f"tagger:spend:{run.dataset_name}:{run.run_id}"
        self._attempt = attempt
        self._amount = amount
        self._has_read_files = False
        self._script = client.register_script(self._BOOK)

    def is_spent(self, by_attempt: float) -> bool:
        """Return whether no further call may start, this attempt having spent so much (USD).

        Raises:
            RedisError: Redis does not answer.
            StorageError: the files of other attempts, which Redis knows nothing of, cannot be read.
        """
        total = self._book({self._attempt: by_attempt}) if self._has_read_files else None
        if total is None:
            in_files = {
                f"shard-{each.shard}-{each.attempt}.parquet": each.spent_usd for each in read_attempts(self._run)
            }
            total = self._book(in_files | {self._attempt: by_attempt}, anew=True)
            self._has_read_files = True
        return total >= self._amount

    @overload
    def _book(self, spent: dict[str, float], *, anew: Literal[True]) -> float: ...
    @overload
    def _book(self, spent: dict[str, float]) -> float | None: ...
    def _book(self, spent: dict[str, float], *, anew: bool = False) -> float | None:
        """Return what all attempts have spent; None, and book nothing, where Redis does not know the run."""
        pairs = [word for name, amount in spent.items() for word in (name, repr(amount))]
        total = self._script(keys=[self._key], args=[KEY_SECONDS, "anew" if anew else "", *pairs])
        return None if total is None else float(total)


def shard_budget(
    plan: Plan, run: Run, shard: int, ledger: Ledger, redis: "Redis | None", *, alone: bool
) -> ShardBudget:
    """Return what an attempt may spend, whose books are open. Money of all earlier attempts at the run counts.

    `alone` tells that the run's shards go one after the other, so that each has all that is left.

    Raises:
        StorageError: the file of an earlier attempt is damaged.
    """
    if plan.budget_usd is None:
        return LocalBudget(math.inf, "no budget")
    name = f"the run's budget of {usd(plan.budget_usd)}"
    if redis is not None:
        return SharedBudget(redis, run, ledger.create().rpartition("/")[2], plan.budget_usd, name)
    attempts = read_attempts(run)
    left = plan.budget_usd - sum(attempt.spent_usd for attempt in attempts)
    if alone or len(plan.shards) == 1:
        return LocalBudget(left, name)
    before = sum(attempt.spent_usd for attempt in attempts if attempt.plan_id != plan.plan_id)
    own = sum(attempt.spent_usd for attempt in attempts if (attempt.plan_id, attempt.shard) == (plan.plan_id, shard))
    share = (plan.budget_usd - before) / len(plan.shards) - own
    return LocalBudget(min(share, left), f"this shard's share of {name}")
