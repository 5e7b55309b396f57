"""How far a shard is: a bar on a terminal, a line every few seconds elsewhere."""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from tagger.ledger import Ledger
from tagger.runs import Shard

logger = logging.getLogger(__name__)

LINE_SECONDS = 10.0
BAR_SECONDS = 0.5

RATE_SECONDS = 60.0
"""The rate, and so the time left, is that of the last minute."""


class Progress:
    """The state of a shard in words."""

    def __init__(self, shard: Shard, ledger: Ledger, before: int) -> None:
        self._shard = shard
        self._ledger = ledger
        self._before = before
        self._seen: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def done(self) -> int:
        """Return the number of texts that have an outcome, those of earlier attempts included."""
        return self._before + self._done()

    def _done(self) -> int:
        counts = self._ledger.counts()
        return sum(counts.get(status, 0) for status in ("tagged", "refused", "failed"))

    def rest(self) -> str:
        """Return what a line says beyond done and total."""
        now, done = time.monotonic(), self._done()
        self._seen.append((now, done))
        while self._seen[0][0] < now - RATE_SECONDS:
            self._seen.popleft()
        since, before = self._seen[0]
        rate = (done - before) / (now - since) if now > since else 0.0
        missing = self._shard.texts - self.done()
        left = f"{_duration(missing / rate)} left" if rate else "time left unknown"
        failed = self._ledger.counts().get("failed", 0)
        return f"{rate:.1f} texts/s, {failed} failed, ${self._ledger.spent_usd:.4f}, {left}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


@contextmanager
def showing(shard: Shard, ledger: Ledger, before: int) -> Iterator[None]:
    """Show how far a shard is while the block runs; `before` is the number of texts answered by earlier attempts."""
    progress = Progress(shard, ledger, before)
    ended = threading.Event()
    show = _bar if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=show, args=(shard, progress, ended), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _lines(shard: Shard, progress: Progress, ended: threading.Event) -> None:
    while not ended.wait(LINE_SECONDS):
        done, rest = progress.done(), progress.rest()
        logger.info("shard %d/%d: %d of %d texts, %s", shard.shard, shard.of, done, shard.texts, rest)


def _bar(shard: Shard, progress: Progress, ended: threading.Event) -> None:
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} texts{postfix}"
    name, done = f"shard {shard.shard}/{shard.of}", progress.done()
    with (
        logging_redirect_tqdm(),
        tqdm(total=shard.texts, initial=done, desc=name, bar_format=form, dynamic_ncols=True) as bar,
    ):
        going = True
        while going:
            going = not ended.wait(BAR_SECONDS)
            bar.n = progress.done()
            bar.set_postfix_str(progress.rest())
