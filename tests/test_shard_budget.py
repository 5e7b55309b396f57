"""What an attempt at a shard may spend: its part of the budget, or with others what is left of it in Redis."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demo.stand_in import StandIn, completion, token_usage
from tagger.cache import Cache, Usage
from tagger.connections import Connection, openai_client
from tagger.dataset import Price
from tagger.exceptions import StorageError
from tagger.ledger import Ledger
from tagger.llm import Client
from tagger.packing import Packer
from tagger.redis_connection import redis_client
from tagger.runs import Plan, Run, Shard, utc_now
from tagger.shard_budget import KEY_SECONDS, ShardBudget, shard_budget
from tagger.tag import ShardAsker
from tagger.throttle import Stopped, Throttle
from tests.project import Project

Redis = redis.Redis

A_DOLLAR_A_TOKEN = Price(input=1_000_000.0, output=0.0)


@pytest.fixture
def run(project: Project) -> Run:
    return project.open("run")


@pytest.fixture
def shared(redis_default: Connection) -> Iterator[Redis]:
    with redis_client("redis_default", lambda _: redis_default) as client:
        yield client


def planned(usd: float | None, shards: int = 4, plan_id: str = "plan") -> Plan:
    return Plan(
        plan_id=plan_id,
        spec_id="spec",
        rows=0,
        blank=0,
        texts=0,
        cached=0,
        too_long=0,
        new=0,
        shards=[Shard(shard=number, of=shards, texts=100) for number in range(1, shards + 1)],
        target_rows=0,
        older_spec_rows=0,
        budget_usd=usd,
        planned_at=utc_now(),
        seconds=0.0,
    )


def attempt(run: Run, shard: int, usd: int = 0, plan_id: str = "plan") -> Ledger:
    """Return the books of an attempt that was killed after it had spent so much, and written so."""
    ledger = Ledger(run, plan_id, shard, A_DOLLAR_A_TOKEN)
    ledger.create()
    if usd:
        spend(ledger, usd)
        ledger._write("running", None)
    return ledger


def spend(ledger: Ledger, usd: int, key: str = "key") -> float:
    ledger.spend(key, "row", Usage(input=usd))
    return ledger.spent_usd


def left(budget: ShardBudget, most: int = 200) -> int:
    """Return how many dollars may be spent until no call starts."""
    return next((usd for usd in range(most) if budget.is_spent(usd)), most)


# Without Redis


def alone_in(run: Run, plan: Plan, shard: int, *, alone: bool = False) -> ShardBudget:
    return shard_budget(plan, run, shard, attempt(run, shard, plan_id=plan.plan_id), None, alone=alone)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_each_shard_has_the_same_part(run: Run, shards: int) -> None:
    plan = planned(100.0, shards)

    assert [left(alone_in(run, plan, shard + 1)) for shard in range(shards)] == [100 // shards] * shards


def test_no_budget_is_no_limit(run: Run) -> None:
    assert not alone_in(run, planned(None), 1).is_spent(1e12)


def test_a_budget_of_nothing_is_spent_at_once(run: Run) -> None:
    assert alone_in(run, planned(0.0), 1).is_spent(0.0)


def test_earlier_attempts_at_a_shard_have_spent_its_part(run: Run) -> None:
    attempt(run, 2, 10)
    attempt(run, 2, 5)
    attempt(run, 3, 100)

    plan = planned(200.0)
    assert (left(alone_in(run, plan, 1)), left(alone_in(run, plan, 2))) == (50, 35)


def test_what_an_earlier_plan_of_the_run_spent_is_shared_out(run: Run) -> None:
    attempt(run, 1, 10, plan_id="before")
    attempt(run, 7, 30, plan_id="before")

    assert [left(alone_in(run, planned(100.0), shard)) for shard in (1, 2, 3, 4)] == [15] * 4


def test_a_shards_part_is_never_more_than_what_is_left(run: Run) -> None:
    attempt(run, 1, 90)  # as the first of shards that went one after the other

    assert left(alone_in(run, planned(100.0), 2)) == 10


def test_shards_that_go_one_after_the_other_have_all_that_is_left(run: Run) -> None:
    attempt(run, 1, 10, plan_id="before")
    attempt(run, 1, 30)

    assert left(alone_in(run, planned(100.0), 2, alone=True)) == 60


def test_money_of_other_runs_is_not_counted(project: Project, run: Run) -> None:
    attempt(project.open("another"), 1, 50)

    assert left(alone_in(run, planned(100.0, shards=1), 1)) == 100


@pytest.mark.parametrize(("shards", "alone", "part"), [(1, False, False), (4, True, False), (4, False, True)])
def test_the_message_says_whose_money_is_spent(run: Run, shards: int, alone: bool, part: bool) -> None:
    name = alone_in(run, planned(20.0, shards), 1, alone=alone).name

    assert name == ("this shard's share of " if part else "") + "the run's budget of $20.00"


# With Redis


def together(run: Run, client: Redis, shard: int, usd: float = 100.0, ledger: Ledger | None = None) -> ShardBudget:
    ledger = ledger or attempt(run, shard)
    return shard_budget(planned(usd), run, shard, ledger, client, alone=False)


def test_what_one_shard_spends_the_others_have_no_more(run: Run, shared: Redis) -> None:
    one, two, three = (together(run, shared, shard) for shard in (1, 2, 3))

    assert not one.is_spent(60)
    assert not two.is_spent(39)
    assert two.is_spent(40)
    assert three.is_spent(0)
    assert one.is_spent(60)


def test_what_is_told_late_or_twice_counts_once(run: Run, shared: Redis) -> None:
    one, two = (together(run, shared, shard) for shard in (1, 2))

    for usd in (50, 50, 20, 50, 0):
        one.is_spent(usd)

    assert left(two) == 50


def test_earlier_attempts_count_whichever_plan_and_shard_they_were_of(run: Run, shared: Redis) -> None:
    attempt(run, 1, 10, plan_id="before")
    attempt(run, 9, 20, plan_id="before")
    attempt(run, 2, 30)

    assert left(together(run, shared, 2)) == 40


def test_a_second_try_knows_what_the_first_spent_since_it_last_wrote(run: Run, shared: Redis) -> None:
    first = attempt(run, 1, 10)
    together(run, shared, 1, ledger=first).is_spent(25)

    assert left(together(run, shared, 1)) == 75


def test_a_second_try_knows_what_the_first_could_not_tell_redis(run: Run, shared: Redis) -> None:
    first = attempt(run, 1)
    together(run, shared, 1, ledger=first).is_spent(5)
    spend(first, 30)
    first._write("broken", "Redis went away")

    assert left(together(run, shared, 1)) == 70


def test_a_redis_that_has_forgotten_all_is_told_again(run: Run, shared: Redis) -> None:
    attempt(run, 1, 10)
    ended, going_on = attempt(run, 2), attempt(run, 3)
    of_ended, of_going_on = (together(run, shared, 4, usd=60.0, ledger=each) for each in (ended, going_on))
    of_ended.is_spent(spend(ended, 20))
    ended._write("done", None)
    assert not of_going_on.is_spent(29)

    shared.flushall()

    assert not of_going_on.is_spent(29)
    assert of_going_on.is_spent(30)
    assert left(together(run, shared, 4)) == 40


def test_the_attempts_that_go_on_tell_a_forgetful_redis_of_themselves(run: Run, shared: Redis) -> None:
    one, two = (together(run, shared, shard) for shard in (1, 2))
    one.is_spent(30)
    two.is_spent(40)

    shared.flushall()  # before either has written its books again
    two.is_spent(40)
    one.is_spent(30)

    assert left(together(run, shared, 3)) == 30


def test_runs_do_not_share_their_money(project: Project, shared: Redis) -> None:
    one, other = (together(project.open(run_id), shared, 1) for run_id in ("one", "other"))

    assert one.is_spent(100)
    assert not other.is_spent(99)


def test_redis_forgets_a_run_after_its_last_call(run: Run, shared: Redis) -> None:
    together(run, shared, 1).is_spent(1)

    [key] = shared.keys("*")
    assert key == b"tagger:spend:notes:run"
    assert 0 < shared.ttl(key) <= KEY_SECONDS


def test_small_amounts_are_not_lost(run: Run, shared: Redis) -> None:
    one, two = together(run, shared, 1, usd=1e-7), together(run, shared, 2, usd=1e-7)

    assert not one.is_spent(4e-8)
    assert not two.is_spent(5e-8)
    assert two.is_spent(6.1e-8)


def test_a_redis_that_is_away_is_an_error(run: Run, redis_default: Connection) -> None:
    away = replace(redis_default, port=1)
    with redis_client("redis_default", lambda _: away) as client:
        budget = together(run, client, 1)

        with pytest.raises(redis.RedisError):
            budget.is_spent(0)


def test_books_that_cannot_be_read_are_an_error_and_no_money(run: Run, shared: Redis) -> None:
    attempt(run, 1, 10)
    run.storage.put(f"{run.files}shard-1-1.parquet", b"damaged")
    budget = together(run, shared, 2)

    for _ in range(2):
        with pytest.raises(StorageError, match=r"shard-1-1\.parquet"):
            budget.is_spent(0)
    assert shared.keys("*") == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans()), max_size=30))
def test_the_total_is_the_sum_of_what_each_attempt_has_spent(
    run: Run, shared: Redis, steps: list[tuple[int, int, bool]]
) -> None:
    for path, _ in run.storage.list(run.files):
        run.storage.delete(path)
    shared.flushall()
    ledgers = [attempt(run, shard) for shard in range(4)]
    budgets = [together(run, shared, shard, usd=40.0, ledger=ledger) for shard, ledger in enumerate(ledgers)]

    for shard, usd, forget in steps:
        spend(ledgers[shard], usd)
        ledgers[shard]._write("running", None)
        if forget:
            shared.flushall()
        assert budgets[shard].is_spent(ledgers[shard].spent_usd) == (sum(each.spent_usd for each in ledgers) >= 40.0)


# Four shards at once


@pytest.mark.parametrize("with_redis", [True, False], ids=["Redis", "no Redis"])
@pytest.mark.parametrize("texts_per_request", [1, 5])
def test_four_shards_at_once_stop_at_the_cap_and_the_calls_in_flight(
    project: Project, run: Run, llm: StandIn, shared: Redis, with_redis: bool, texts_per_request: int
) -> None:
    concurrency, cap, texts = 3, 40, 200
    price = {"input": 1e6, "output": 0.0}
    project.change(llm={"concurrency": concurrency, "price": price, "texts_per_request": texts_per_request})
    plan = planned(float(cap))
    one_dollar = completion("?" if texts_per_request > 1 else '{"tags": []}', usage=token_usage(1, 0))
    llm.latency = 0.02
    llm.script(*[replace(one_dollar, delay=0.02)] * 1000)
    ready = threading.Barrier(4)

    def shard(number: int, stack: ExitStack) -> tuple[Ledger, str]:
        dataset = project.dataset
        ledger = attempt(run, number)
        budget = shard_budget(plan, run, number, ledger, shared if with_redis else None, alone=False)
        throttle = Throttle(concurrency, None, lambda: budget.is_spent(ledger.spent_usd))
        client = Client(dataset, openai_client(dataset.llm.conn_id, project.connections), throttle)
        stack.callback(client.close)
        row_ids = {f"{number}{text:031x}": str(text) for text in range(texts)}
        options: dict[str, Any] = {"budget": budget, "locks": None, "recheck": False}
        packer = Packer(client, texts_per_request)
        asker = ShardAsker(Cache(run.storage, "s", "m"), packer, throttle, ledger, dict(row_ids), **options)

        def ask(key: str) -> None:
            try:
                asker.ask(key, f"note {key}")
            except Exception as e:
                asker.failed(key, e)

        ready.wait(30)
        with ThreadPoolExecutor(2 * concurrency * texts_per_request) as threads:
            list(threads.map(ask, row_ids))
        return ledger, str(asker.stopped_by)

    with ExitStack() as stack, ThreadPoolExecutor(4) as shards:
        ended = list(shards.map(lambda number: shard(number, stack), range(1, 5)))

    spent = [ledger.spent_usd for ledger, _ in ended]
    in_flight = 4 * concurrency
    assert cap <= sum(spent) <= cap + in_flight - (1 if with_redis else 4)
    assert sum(spent) == len(llm.calls)
    name = "the run's budget of $40.00"
    name = name if with_redis else f"this shard's share of {name}"
    assert {reason for _, reason in ended} == {f"budget reached: {name} is spent"}
    if not with_redis:
        assert all(cap / 4 <= usd < cap / 4 + concurrency for usd in spent)


def test_a_shard_with_nothing_in_flight_starts_no_call_when_the_others_have_spent_all(run: Run, shared: Redis) -> None:
    others, idle = together(run, shared, 1), attempt(run, 2)
    budget = together(run, shared, 2, ledger=idle)
    throttle = Throttle(4, None, lambda: budget.is_spent(idle.spent_usd))
    with throttle.call(0):
        pass

    others.is_spent(100)

    with pytest.raises(Stopped), throttle.call(0):
        pass
