"""The fault campaign: each step of a run meets each fault of each server, and is then run again.

A case is a step, a server, a fault, and the number of the request that meets it: `tag-s3-lost-3` is the third request
of the tag step to S3, `tag-s3-lost-3+` that and all that follow. A cell is all of a step, a server and a fault:
`tag-s3-lost`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tagger.report import Summary
from tests.fault_proxy import OF_WRITES, Exchange, Fault, Kind
from tests.fault_site import CONCURRENCY, NEXT_RUN, RUN, Ended, Row, Site, State, key_asked, key_stored

Step = Literal["snapshot", "plan", "tag", "load", "report", "hand_over", "settle", "mail"]

SERVERS: dict[Step, tuple[str, ...]] = {
    "snapshot": ("source", "target", "s3", "disk"),
    "plan": ("target", "s3", "disk"),
    "tag": ("s3", "redis", "llm", "disk"),
    "load": ("target", "s3", "disk"),
    "report": ("s3",),
    "hand_over": ("s3", "llm", "disk"),
    "settle": ("target", "s3", "llm", "disk"),
}
"""What each step uses. `hand_over` is the tag step in batch mode, which hands its shards to the Batch API, waits and
collects; `settle` is the plan of a run that finds the batches of another, which was killed. `disk` is the local one."""

ORDER: tuple[Step, ...] = ("snapshot", "plan", "tag", "load", "report")

FILE_LIMITS = (0, 300, 1500)
"""Bytes that fit into a file of a disk that is full."""

ONCE: frozenset[Kind] = frozenset(["kill_before", "kill_after"])


@dataclass(frozen=True)
class Case:
    """One fault at one moment."""

    step: Step
    server: str
    fault: Fault

    def __str__(self) -> str:
        lasting = "+" if self.fault.lasting else ""
        return f"{self.step}-{self.server}-{self.fault.kind}-{self.fault.at}{lasting}"

    @property
    def cell(self) -> str:
        """The case without its moment."""
        return f"{self.step}-{self.server}-{self.fault.kind}"


@dataclass
class Result:
    """What was seen of a case."""

    case: str
    cell: str
    code: int
    """Of the command that met the fault; negative where a signal ended it."""
    seconds: float
    says: str
    """Its one line, if it failed."""
    struck: bool
    """Whether the request that was to meet the fault was made."""
    asked_again: int
    """Calls for texts whose answer was lost or not yet written."""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """What a run without a fault ends with."""

    rows: dict[int, Row]
    """The target."""
    next_rows: dict[int, Row]
    """The target at the end of the next run."""
    counts: dict[str, int]
    """Of the summary."""
    cost_usd: float


@dataclass
class Reference:
    """What a step does without a fault, from where it begins."""

    state: State
    requests: dict[str, int]
    """By server, as are the writes among them."""
    writes: dict[str, int]
    end: End | None = None


COUNTS = ("rows", "blank", "texts", "cached", "tagged", "refused", "failed", "skipped", "pending")


class Campaign:
    """The cases, over one deployment."""

    def __init__(self, site: Site) -> None:
        """Brings the deployment to where each step begins, and sees what follows without a fault."""
        self.site = site
        self.references: dict[Step, Reference] = {}
        self.site.first_day()
        self._must(("run", str(self.site.file("online")), "--run-id", "day1", "--all", "--limit", "7"))
        self.site.second_day()
        for step in ORDER:
            self._watch(step, self.site.keep(step))
        end = self._end("report")
        for known in self.references.values():
            known.end = end
        self.site.restore(self.references["snapshot"].state)
        self._must(*(self._command(step, "batch") for step in ("snapshot", "plan")))
        state = self.site.keep("hand_over")
        for step in ("hand_over", "settle"):
            self._begin(step, state)
            self._watch(step, state)
            self.references[step].end = self._end(step)

    def _watch(self, step: Step, state: State) -> None:
        """Run a step, and count its requests."""
        self._must(self._command_of(step))
        proxies = self.site.proxies.items()
        requests = {name: each.requests for name, each in proxies}
        self.references[step] = Reference(state, requests, {name: each.writes for name, each in proxies})

    def _end(self, step: Step) -> End:
        """Go on after a step, to the end of the next run."""
        self._must(*self._rest(step))
        rows, summary = self.site.rows(), self._summary(step)
        self._must(self._next(step))
        return End(rows, self.site.rows(), _counts(summary), summary.cost_usd or 0.0)

    def _begin(self, step: Step, state: State) -> None:
        """Bring everything to where a step begins."""
        self.site.restore(state)
        self.site.settle()
        if step == "settle":  # a run is killed when both of its batches are created, and that of one is not yet noted
            killed = self.site.run(self._command_of("hand_over"), server="llm", fault=Fault("kill_after", 4))
            assert killed.code == -9, killed.printed
            self._must(("snapshot", str(self.site.file("batch")), "--run-id", NEXT_RUN, "--all"))

    def _must(self, *commands: tuple[str, ...]) -> None:
        ended = self.site.run(*commands)
        assert ended.code == 0, ended.printed

    def _command(self, step: str, mode: str = "online", run_id: str = RUN) -> tuple[str, ...]:
        return (step, str(self.site.file(mode)), "--run-id", run_id)

    def _command_of(self, step: Step) -> tuple[str, ...]:
        if step == "hand_over":
            return self._command("tag", "batch")
        if step == "settle":
            return self._command("plan", "batch", NEXT_RUN)
        return self._command(step)

    def _rest(self, step: Step) -> list[tuple[str, ...]]:
        """Return the commands that complete a step's run."""
        if step == "hand_over":
            return [self._command(each, "batch") for each in ("load", "report")]
        if step == "settle":
            return [self._command(each, "batch", NEXT_RUN) for each in ("tag", "load", "report")]
        return [self._command(each) for each in ORDER[ORDER.index(step) + 1 :]]

    def _next(self, step: Step) -> tuple[str, ...]:
        mode, run_id = "online", NEXT_RUN
        if step in ("hand_over", "settle"):
            mode, run_id = "batch", "day4"
        return ("run", str(self.site.file(mode)), "--all", "--run-id", run_id)

    def _summary(self, step: Step) -> Summary:
        run_id = NEXT_RUN if step == "settle" else RUN
        return Summary.model_validate_json(self.site.object(f"runs/notes/{run_id}/summary.json"))

    # The cases

    def cases(self, cell: str) -> list[Case]:
        """Return all cases of a cell."""
        step, server, kind = cell.split("-")
        known: Any = self.references[step]  # type: ignore[index]
        if server == "disk":
            moments: Iterable[int] = FILE_LIMITS
        else:
            moments = range(1, (known.writes if kind in OF_WRITES else known.requests)[server] + 1)
        if (step, server, kind) == ("load", "target", "full"):
            moments = [0, *moments]  # 0: when a row is written
        lasting = [False] if kind in ONCE else [True] if kind == "full" else [False, True]
        return [Case(step, server, Fault(kind, at, each)) for at in moments for each in lasting]  # type: ignore[arg-type]

    def try_(self, case: Case) -> Result:
        """Let a fault happen, run the step again until it is done, then the rest of the run and the next run."""
        site, step, known = self.site, case.step, self.references[case.step].end
        assert known is not None
        self._begin(step, self.references[step].state)
        first = self._meet(case)
        struck = first.code != 0 if case.server == "disk" else bool(self._struck(case))
        problems = list(_told_badly(case, first, struck))
        if site.left_files:
            problems.append("it left temporary files")
        site.settle()
        ended = first
        for _ in range(3):
            if ended.code == 0:
                break
            ended = site.run(self._command_of(step))
        rest = site.run(*self._rest(step)) if ended.code == 0 else ended
        result = Result(str(case), case.cell, first.code, first.seconds, _says(first), struck, 0, problems)
        if ended.code:
            problems.append(f"the step run again ended with {ended.code}: {ended.printed}")
            return result
        if rest.code not in (0, 1):
            problems.append(f"the rest of the run ended with {rest.code}: {rest.printed}")
            return result
        printed = first.printed + ended.printed + rest.printed
        problems += self._check(case, known, rest)
        follows = site.run(self._next(step))
        if follows.code:
            problems.append(f"the next run ended with {follows.code}: {follows.printed}")
        problems += _differences("after the next run", site.rows(), known.next_rows)
        result.asked_again, unexcused = self._asked_again(case)
        problems += unexcused
        problems += [f"a text or a secret is in {where}" for where in site.leaks(printed + follows.printed)]
        return result

    def _meet(self, case: Case) -> Ended:
        command, fault = self._command_of(case.step), case.fault
        if case.server == "disk":
            return self.site.run(command, file_limit=fault.at)
        if fault.at == 0:
            with self.site.disk_full():
                return self.site.run(command)
        return self.site.run(command, server=case.server, fault=fault)

    def _struck(self, case: Case) -> int:
        return 1 if case.fault.at == 0 else self.site.proxies[case.server].struck

    def _check(self, case: Case, known: End, rest: Ended) -> Iterator[str]:
        """Yield what is wrong at the end of the run that met a fault."""
        summary = self._summary(case.step)
        counts = _counts(summary)
        if summary.texts != sum(counts[name] for name in COUNTS[3:]):
            yield f"the summary does not add up: {counts}"
        rows = self.site.rows()
        unfinished = {row_id for row_id, row in rows.items() if row.status in ("failed", "skipped", "pending")}
        # where the LLM did not answer, the step goes on without these texts, and the next run asks again
        if case.server == "llm" and unfinished:
            if rest.code != int(summary.failed > 0):
                yield f"{summary.failed} texts failed, and the report ended with {rest.code}: {rest.printed}"
            if summary.failed + summary.skipped + summary.pending == 0:
                yield f"rows are unfinished, and the summary knows of none: {counts}"
        else:
            if rest.code:
                yield f"the rest of the run ended with {rest.code}: {rest.printed}"
            if counts != known.counts:
                yield f"the summary has {counts}, expected {known.counts}"
            unfinished = set()
        done = {row_id: row for row_id, row in rows.items() if row_id not in unfinished}
        expected = {row_id: row for row_id, row in known.rows.items() if row_id not in unfinished}
        yield from _differences("after the run", done, expected)
        yield from self._check_cost(case, known, summary)

    def _check_cost(self, case: Case, known: End, summary: Summary) -> Iterator[str]:
        """Yield where money was forgotten. A process that is killed, or whose S3 is away, loses its last seconds."""
        if case.step not in ("snapshot", "plan", "tag"):  # in the others the calls were made before, or in batches
            spent = known.cost_usd
        else:
            answers = [json.loads(each.answer)["usage"] for each in self._paid() if each.delivered]
            spent = sum(each["prompt_tokens"] + 10 * each["completion_tokens"] for each in answers) / 1e6
        booked = summary.cost_usd or 0.0
        may_lose = case.step == "tag" and (case.fault.kind in ONCE or case.server == "s3")
        if booked > spent + 1e-9 or (booked < spent - 1e-9 and not may_lose):
            yield f"the summary has a cost of {booked:.6f}, the calls have {spent:.6f}"

    def _paid(self) -> list[Exchange]:
        asked = (each for each in self.site.asked.exchanges if each.status == 200 and key_asked(each))
        return [each for each in asked if each.path.endswith("/chat/completions")]

    def _asked_again(self, case: Case) -> tuple[int, list[str]]:
        """Return how many calls were made again, and what is wrong with them."""
        if case.step in ("hand_over", "settle"):
            return self._handed_over_again()
        stored: dict[str, int] = {}
        for each in self.site.s3.exchanges:
            stored.setdefault(key_stored(each), each.ended)
        known = self.references[case.step].state.objects
        again, problems, lost = 0, [], 0
        first: dict[str, Exchange] = {}
        for each in self._paid():
            key = key_asked(each)
            if stored.get(key, each.started) < each.started or any(f"/tag_{key}.json" in path for path in known):
                problems.append(f"{key} was asked again though its record was written")
            if (before := first.get(key)) is not None:
                again += 1
                lost += before.delivered
            first[key] = each
        problems += [f"{key} was asked and never recorded" for key in first.keys() - stored.keys()]
        may_lose = case.fault.kind in ONCE or (case.step, case.server) == ("tag", "s3")
        if lost > (2 * CONCURRENCY if may_lose else 0):
            problems.append(f"{lost} answers came and were not written")
        return again, problems

    def _handed_over_again(self) -> tuple[int, list[str]]:
        calls = Counter(call.key for call in self.site.llm.calls[self.site.calls_before :])
        twice = [f"{key} was asked {count} times" for key, count in calls.items() if count > 1]
        return sum(calls.values()) - len(calls), twice


def cells() -> list[str]:
    """Return all cells."""
    found = []
    for step, servers in SERVERS.items():
        for server in servers:
            kinds = [kind for kind in get_args(Kind) if kind not in OF_WRITES]
            reads_only = server == "source" or (server == "target" and step != "load")
            kinds += [] if reads_only else sorted(OF_WRITES)
            if server == "llm":
                kinds.remove("full")
            found += [f"{step}-{server}-{kind}" for kind in (["full"] if server == "disk" else kinds)]
    return found + [f"mail-smtp-{kind}" for kind in get_args(Kind) if not kind.startswith("kill")]


def _counts(summary: Summary) -> dict[str, int]:
    return {name: getattr(summary, name) for name in COUNTS}


def _told_badly(case: Case, ended: Ended, struck: bool) -> Iterator[str]:
    """Yield what is wrong with how a command ended."""
    if "Traceback" in ended.printed:
        yield f"it printed a traceback: {ended.printed}"
    killed = case.fault.kind in ONCE and struck
    waits = case.server in ("source", "target") and case.fault.kind == "timeout"
    # a batch that cannot be looked at goes on at the provider, and is waited for until the task's time is over
    waits |= (case.step, case.server, case.fault.lasting) == ("hand_over", "llm", True)
    allowed = (-9,) if killed else (0, 1, 2, -15) if waits else (0, 1, 2)
    if ended.code not in allowed:
        yield f"it ended with {ended.code} after {ended.seconds:.0f} s: {ended.printed}"
    elif len(ended.complaints) != (ended.code > 0):
        yield f"it ended with {ended.code} and said {ended.complaints}"


def _says(ended: Ended) -> str:
    line = ended.complaints[0].removeprefix("tagger: ") if ended.complaints else ""
    line = re.sub(r"127\.0\.0\.1:\d+", "HOST:PORT", line)
    line = re.sub(r"\bport \d+", "port PORT", line)
    return re.sub(r"[0-9a-f]{8,}(-\d+)*", "…", line)


def _differences(when: str, rows: dict[int, Row], expected: dict[int, Row]) -> Iterator[str]:
    for row_id in sorted(rows.keys() | expected.keys()):
        if rows.get(row_id) != expected.get(row_id):
            yield f"{when}, row {row_id} is {rows.get(row_id)}, expected {expected.get(row_id)}"
