"""The errors that tagger raises.

TaggerError                the work failed (exit code 1)
├── InputError             the input is wrong, or refused at the start (exit code 2)
│   ├── DatasetError       a mistake in a dataset file
│   └── Unreachable        a database, bucket or endpoint does not answer
├── StorageError           S3 failed in the middle of the work
├── LockFailed             Redis failed in the middle of the work
├── Terminated             the process was told to end (exit code 143)
├── RunFailed              the run ended, and its result is not acceptable
├── LLMStopped             the endpoint refuses every call: no further call is made
│   └── LLMUnreachable     it did not even answer the first ones
└── TextFailed             one text got no answer; the run goes on

No message ever holds a text of the source table.
"""

from dataclasses import dataclass

BUDGET_REACHED = "budget reached"
"""How the reason of a shard starts that stopped at `limits.max_cost_usd`."""

LONGEST_SHOWN = 1000
"""Characters of what stands in a dataset file."""


class TaggerError(Exception):
    """Base of all errors of tagger; `exit_code` is the console script's."""

    exit_code = 1


class InputError(TaggerError):
    """The input is wrong, or something was refused before any work was done."""

    exit_code = 2


class Unreachable(InputError):
    """A database, a bucket or an endpoint does not answer."""


@dataclass(frozen=True)
class Mistake:
    """One mistake in a dataset file: where it is, what stands there, what should."""

    key: str
    found: str
    expected: str


class DatasetError(InputError):
    """A dataset file that cannot be used. `mistakes` has one entry for each thing to mend."""

    def __init__(self, file: str, mistakes: list[Mistake]) -> None:
        self.file = file
        self.mistakes = mistakes
        lines = (f"{file}: `{printable(m.key)}`: found {printable(m.found)}, expected {m.expected}" for m in mistakes)
        super().__init__("\n".join(lines))


def printable(text: str) -> str:
    """Return a text as part of one line: without line breaks and control characters, and not too long."""
    plain = "".join(char if char.isprintable() else "\ufffd" for char in text[:LONGEST_SHOWN])
    return plain if len(text) <= LONGEST_SHOWN else f"{plain}…"


class StorageError(TaggerError):
    """S3 failed in the middle of the work."""


class LockFailed(TaggerError):
    """Redis failed in the middle of the work: nobody can tell who asks which text."""


class Terminated(TaggerError):
    """The process got SIGTERM in the middle of the work. What was answered until then is kept."""

    exit_code = 143


class RunFailed(TaggerError):
    """The run ended, and its result is not acceptable: too many failures, a broken shard, too many deletions."""


class LLMStopped(TaggerError):
    """The endpoint refuses every call (wrong key, unknown model, no quota): asking on would be of no use.

    `exit_code` is 2 when it happened before the first answer, else 1.
    """

    def __init__(self, message: str, *, at_start: bool) -> None:
        super().__init__(message)
        self.exit_code = 2 if at_start else 1


class LLMUnreachable(LLMStopped):
    """The endpoint does not answer; a later try may find it back."""


class TextFailed(TaggerError):
    """One text got no answer. `kind` is a short name for the report, such as `timeout`; nothing is recorded."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
