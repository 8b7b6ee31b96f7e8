"""The stream wa:events as the demo, or any CRM, reads it."""

import json
from typing import Any

from redis import Redis


class Events:
    """What the stream told of one session since this was made."""

    def __init__(self, redis: Redis, session: str) -> None:
        self._redis = redis
        self._session = session
        self._last_id = "0-0"
        self._states: list[str] = []
        self._messages: dict[str, dict[str, dict[str, Any]]] = {}

    def states(self) -> list[str]:
        """The states that the session went through since the last call."""
        self._read()
        states, self._states = self._states, []
        return states

    def of_message(self, message_id: str) -> dict[str, dict[str, Any]]:
        """Event name to payload of everything told of one message."""
        self._read()
        return self._messages.get(message_id, {})

    def _read(self) -> None:
        entries: Any = self._redis.xrange("wa:events", min=f"({self._last_id}")
        for entry_id, fields in entries:
            self._last_id = entry_id.decode()
            if fields[b"session"].decode() == self._session:
                self._take(fields[b"event"].decode(), json.loads(fields[b"payload"]))

    def _take(self, event: str, payload: dict[str, Any]) -> None:
        if event == "session.state_changed":
            self._states.append(payload["state"])
        elif message_id := payload.get("message_id"):
            self._messages.setdefault(message_id, {})[event] = payload
