"""The lock against double calls: gokart's own run-lock, one per text, over the Redis of an Airflow connection.

gokart makes its client from a host and a port alone, and starts a scheduler thread for each lock to renew it. `held`
puts a client with password, TLS and database number in the place of the first, and one thread for all locks in the
place of the second; taking, checking and freeing a lock stay gokart's.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from redis import Redis
from redis.exceptions import DataError, LockError, RedisError
from redis.lock import Lock

from tagger.exceptions import LockFailed
from tagger.redis_connection import ping_redis, redis_failure

logger = logging.getLogger(__name__)

LOCK_SECONDS = 50
"""After how long the lock of a dead worker is free."""

RENEW_SECONDS = 10.0


class RunLocks:
    """The run-locks of one worker.

    Raises:
        InputError: Redis does not answer, or refuses the connection's password or database.
    """

    def __init__(self, client: Redis, conn_id: str) -> None:
        ping_redis(client, conn_id)
        self._client = client
        self._conn_id = conn_id
        self._held: set[Lock] = set()
        self._mutex = threading.Lock()

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters that make gokart lock a task's run; host and port only name the lock's client."""
        return {"should_lock_run": True, "redis_host": self._conn_id, "redis_port": 0, "redis_timeout": LOCK_SECONDS}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let gokart take its locks through this, and renew those that are held, while the block runs."""
        from gokart.conflict_prevention_lock import task_lock, task_lock_wrappers

        module: Any = task_lock
        wrappers: Any = task_lock_wrappers
        originals = module.RedisClient, wrappers.set_lock_scheduler
        module.RedisClient, wrappers.set_lock_scheduler = lambda host, port: self, self._renewed
        ended = threading.Event()
        renewer = threading.Thread(target=self._renew_until, args=(ended,), name="locks", daemon=True)
        renewer.start()
        try:
            yield
        finally:
            ended.set()
            renewer.join(1)  # Redis may hang
            module.RedisClient, wrappers.set_lock_scheduler = originals

    def get_redis_client(self) -> Redis:
        """Return the client, as gokart's RedisClient does."""
        return self._client

    def failure(self, error: RedisError) -> LockFailed:
        """Return what an error of Redis means for the shard."""
        return LockFailed(str(redis_failure(error, self._client, self._conn_id)))

    def _renewed(self, task_lock: Lock, task_lock_params: object) -> "_Renewal":
        with self._mutex:
            self._held.add(task_lock)
        return _Renewal(self, task_lock)

    def forget(self, lock: Lock) -> None:
        """Renew a lock no longer."""
        with self._mutex:
            self._held.discard(lock)

    def _renew_until(self, ended: threading.Event) -> None:
        while not ended.wait(RENEW_SECONDS):
            with self._mutex:
                held = list(self._held)
            for lock in held:
                try:
                    lock.extend(LOCK_SECONDS, replace_ttl=True)
                except (LockError, DataError):  # freed in this moment, or lost: its text may be asked twice then
                    self.forget(lock)
                except RedisError as e:
                    logger.warning("lock `%s` cannot be renewed now: %s", self._conn_id, type(e).__name__)
                    break


class _Renewal:
    """Stands for the scheduler that gokart starts for each lock."""

    def __init__(self, locks: RunLocks, lock: Lock) -> None:
        self._locks = locks
        self._lock = lock

    def shutdown(self) -> None:
        self._locks.forget(self._lock)
