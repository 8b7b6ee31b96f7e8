"""The stream `wa:events`: what CRMs are told, in the order in which it happened."""

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from redis import Redis

from whatsapp_worker.event_names import Event
from whatsapp_worker.keys import EVENTS_STREAM

_TRIM_FROM = 0.8  # parts of EVENTS_MAX
_TRIM_TO = 0.7


def event_id(*parts: object) -> str:
    """The id of one happening: the same parts give the same id, so a repetition is recognised.

    For messages the parts are session, message id, attempt and event name.
    """
    text = "\0".join(str(part) for part in parts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class EventStream:
    """Writer and keeper of the stream. Safe to share between threads."""

    def __init__(self, redis: Redis, *, events_max: int = 100_000) -> None:
        """Nothing is sent yet.

        Args:
            redis: From `redis_client.connect`.
            events_max: `EVENTS_MAX`, the most entries that the stream ever holds.
        """
        self._redis = redis
        self.events_max = events_max

    def add(
        self, event: Event, session: str, payload: Mapping[str, Any], *, id: str | None = None
    ) -> None:
        """Append one event.

        Args:
            event: Its name.
            session: Session id, or empty for an event of the host.
            payload: JSON data; never a QR code.
            id: From `event_id` when the same happening may be told twice; else random.

        Raises:
            redis.RedisError: Not appended, or not known to be (transient: say it again).
        """
        self.add_many([self.entry(event, session, payload, id=id)])

    def add_many(self, entries: Iterable[Mapping[str, str | int]]) -> None:
        """Append what `entry` made, in one round trip. Raises as `add` does."""
        pipeline: Any = self._redis.pipeline(transaction=False)
        for fields in entries:
            pipeline.xadd(EVENTS_STREAM, fields, maxlen=self.events_max, approximate=False)
        pipeline.execute()

    def entry(
        self, event: Event, session: str, payload: Mapping[str, Any], *, id: str | None = None
    ) -> dict[str, str | int]:
        """The fields of an entry, for `add_many` or a transaction of the caller's."""
        return {
            "id": id or secrets.token_hex(16),
            "event": event.value,
            "session": session,
            "timestamp_ms": int(time.time() * 1000),
            "payload": json.dumps(payload, separators=(",", ":")),
        }

    def trim(self) -> float:
        """Drop what every consumer group has read, once the stream is 80 % full.

        Consumers without a group cannot be waited for: they find at least 70 % of EVENTS_MAX.

        Returns:
            How full the stream is afterwards, 0 to 1. At 1 the oldest entries are dropped
            unread: alert well before that.

        Raises:
            redis.RedisError: Transient.
        """
        length = int(self._redis.xlen(EVENTS_STREAM))
        if length > self.events_max * _TRIM_FROM:
            surplus = int(length - self.events_max * _TRIM_TO)
            self._redis.xtrim(EVENTS_STREAM, minid=self._slowest(), approximate=True, limit=surplus)
            length = int(self._redis.xlen(EVENTS_STREAM))
        return length / self.events_max

    def slowest_group(self) -> str | None:
        """The consumer group that has read and acknowledged least; None without any group.

        Raises:
            redis.RedisError: Transient.
        """
        return min(self._ends(), default=(None, None))[1]

    def _slowest(self) -> str:
        """The id before which every group has read and acknowledged everything."""
        (milliseconds, sequence), _ = min(
            self._ends(), default=((int(time.time() * 1000), 0), None)
        )
        return f"{milliseconds}-{sequence}"

    def _ends(self) -> list[tuple[tuple[int, int], str]]:
        """Each group's name after the id before which it has read and acknowledged everything."""
        ends = []
        for group in self._redis.xinfo_groups(EVENTS_STREAM):
            name = _text(group["name"])
            ends.append((_order(_text(group["last-delivered-id"])), name))
            if group["pending"]:
                pending = self._redis.xpending(EVENTS_STREAM, name)
                ends.append((_order(_text(pending["min"])), name))
        return ends


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or "0-0"


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)
