"""The console script in processes that start at once: one that has everything imported forks for each order.

    python -m tests.fault_child

It reads orders from stdin, a JSON object a line, and writes the process id of each to stdout. What the process prints
goes to stderr, and after it, as the last line, a NUL and how it ended. The product's waits are shortened, so that a
fault takes seconds of the campaign where it takes minutes of a night.
"""

import time
from typing import Any, NoReturn

_sleep = time.sleep


def _sleep_shortly(seconds: Any) -> None:
    _sleep(min(seconds, 0.05))


time.sleep = _sleep_shortly  # before others import it by its name

import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import traceback  # noqa: E402
from functools import cache  # noqa: E402

import botocore.config  # noqa: E402
import botocore.session  # noqa: E402
import croniter  # noqa: E402, F401
import openai.resources.chat  # noqa: E402
import psycopg  # noqa: E402, F401
import sqlalchemy as sa  # noqa: E402
import tqdm  # noqa: E402, F401

import tagger.batch  # noqa: E402
import tagger.cache  # noqa: E402
import tagger.cli  # noqa: E402
import tagger.engine  # noqa: E402
import tagger.ledger  # noqa: E402
import tagger.llm  # noqa: E402
import tagger.load  # noqa: E402
import tagger.lock  # noqa: E402
import tagger.plan  # noqa: E402
import tagger.redis_connection  # noqa: E402
import tagger.report  # noqa: E402
import tagger.s3_connection  # noqa: E402
import tagger.snapshot  # noqa: E402
import tagger.storage  # noqa: E402
import tagger.tag  # noqa: E402
import tagger.tasks  # noqa: E402

TIMEOUT_SECONDS = 1.0
"""Of S3, the LLM and Redis."""


class QuickConfig(botocore.config.Config):
    """botocore's, with our time-outs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"connect_timeout": TIMEOUT_SECONDS, "read_timeout": TIMEOUT_SECONDS})


def quicken() -> None:
    """Shorten the product's waits."""
    config: Any = botocore.config
    session: Any = botocore.session
    storage: Any = tagger.storage
    client: Any = tagger.llm.Client
    config.Config = QuickConfig
    session.create_loader = cache(session.create_loader)  # what S3 is takes longer to read than a step
    tagger.cache.PATIENCE_SECONDS = 1.5
    tagger.engine.LOCKED_SECONDS = 0.2
    tagger.ledger.FLUSH_SECONDS = 0.5
    tagger.lock.LOCK_SECONDS = 2
    tagger.lock.RENEW_SECONDS = 0.5
    tagger.redis_connection.REDIS_SECONDS = 1
    client._sleep = lambda self, seconds: self._throttle.stopped.wait(min(seconds, 0.05))
    tagger.s3_connection.s3_client("aws_default", lambda _: None)
    sa.create_engine("postgresql+psycopg://")
    _ = openai.OpenAI(api_key="none").chat.completions
    storage.s3_client = cache(storage.s3_client)  # one for all commands of an order


def obey(order: dict[str, Any]) -> int:
    """Run the commands of an order until one fails; return its exit code."""
    os.dup2(2, 1)
    tempfile.tempdir = order["temporary"]
    if (limit := order["file_limit"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for command in order["commands"]:
        try:
            if code := tagger.cli.main(command):
                return code
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


def _end(code: int) -> NoReturn:
    """End the process as the interpreter does: when its threads have ended, but without taking all objects apart."""
    shutdown: Any = threading
    shutdown._shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    """Take orders until stdin ends."""
    quicken()
    gc.collect()
    gc.freeze()  # else each process copies all that is imported
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _end(obey(order))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(f"\n\0{os.waitstatus_to_exitcode(status)}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
