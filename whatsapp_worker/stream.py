"""The stream `wa:events`: what CRMs are told, in the order in which it happened."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from redis import Redis
from redis.client import Pipeline

from whatsapp_worker.event_names import Event
from whatsapp_worker.keys import EVENTS_STREAM

log = logging.getLogger(__name__)


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
        raise NotImplementedError

    def add(
        self, event: Event, session: str, payload: Mapping[str, Any], *, id: str | None = None
    ) -> None:
        """Append one event.

        Args:
            event: Its name.
            session: Session id, or empty for an event of the host.
            payload: JSON data; no message text, no QR code.
            id: From `event_id` when the same happening may be told twice; else random.

        Raises:
            redis.RedisError: Not appended, or not known to be (transient: say it again).
        """
        raise NotImplementedError

    def queue(
        self,
        pipeline: Pipeline,
        event: Event,
        session: str,
        payload: Mapping[str, Any],
        *,
        id: str | None = None,
    ) -> None:
        """`add` as one command of the caller's pipeline."""
        raise NotImplementedError

    def trim(self) -> float:
        """Drop what every consumer group has read, once the stream is 80 % full.

        Returns:
            How full the stream is afterwards, 0 to 1. At 1 the oldest entries are dropped
            unread: alert well before that.

        Raises:
            redis.RedisError: Transient.
        """
        raise NotImplementedError
