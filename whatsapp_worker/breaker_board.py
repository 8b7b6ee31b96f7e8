"""The breakers of one session in Redis, where every process can see them. Nobody decides by what
stands there: a Redis that is down or was emptied neither opens nor closes a breaker."""

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from redis import Redis, RedisError

from whatsapp_worker.keys import breakers_key

TTL_S = 3600  # at least; what a process left that is gone
_REFRESH_S = 60.0


class BreakerBoard:
    """Writes one session's. Not thread-safe; never raises."""

    def __init__(self, redis: Redis, session: str) -> None:
        """
        Args:
            redis: From `redis_client.connect`; not to be shared with another thread.
        """
        self._redis = redis
        self._key = breakers_key(session)
        self._posted: dict[str, str] | None = None
        self._posted_at = 0.0

    def post(self, breakers: Mapping[str, Mapping[str, Any]]) -> None:
        """Say how the breakers are, if that is new.

        Args:
            breakers: `message`, `database` and `pause`, each as JSON data with `until` (UTC seconds
                or None) and `reason`; one that is closed and counts nothing is left out.
        """
        fields = {name: json.dumps(facts) for name, facts in breakers.items()}
        is_old = time.monotonic() - self._posted_at > _REFRESH_S
        if fields == self._posted and not (fields and is_old):
            return
        ends = [facts.get("until") or 0.0 for facts in breakers.values()]
        with contextlib.suppress(RedisError):
            pipeline: Any = self._redis.pipeline(transaction=True)
            pipeline.delete(self._key)
            if fields:
                pipeline.hset(self._key, mapping=fields)
                pipeline.expire(self._key, TTL_S + int(max(0.0, max(ends) - time.time())))
            pipeline.execute()
            self._posted, self._posted_at = fields, time.monotonic()


def read(redis: Redis, sessions: Iterable[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """What stands there, by session and breaker; sessions without anything are left out.

    Raises:
        RedisError: Redis did not answer (transient).
    """
    names = list(sessions)
    pipeline: Any = redis.pipeline(transaction=False)
    for name in names:
        pipeline.hgetall(breakers_key(name))
    found = zip(names, pipeline.execute() if names else [], strict=True)
    return {name: _decoded(fields) for name, fields in found if fields}


def _decoded(fields: Mapping[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """What can be read of it."""
    found = {}
    for name, text in fields.items():
        with contextlib.suppress(ValueError):
            facts = json.loads(text)
            if isinstance(facts, dict):
                found[name.decode("ascii", "replace")] = facts
    return found
