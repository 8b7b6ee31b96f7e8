"""What happened to one session lately: one JSON object a line in its folder, bounded.

For people, so nothing is fsynced and a torn line is skipped.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

KEPT_S = 4 * 3600.0
FILE_NAME = "history.jsonl"


class History:
    """A session's last events: at most `limit`, none older than four hours. One writer."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        self._path = folder / FILE_NAME
        self._limit = limit
        self._lines: int | None = None

    def add(self, event: dict[str, Any], *, now: float) -> None:
        """Append one event, with `at` (UTC seconds); a full disk costs the event, no more."""
        line = json.dumps({"at": round(now, 3), **event}, separators=(",", ":"), default=str)
        with contextlib.suppress(OSError):
            if self._lines is None:
                self._lines = len(self._read_lines())
            if self._lines >= 2 * self._limit:
                self._shorten(now)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with open(descriptor, "a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._lines += 1

    def read(self, *, now: float) -> list[dict[str, Any]]:
        """The events, oldest first."""
        events = []
        for line in self._read_lines():
            with contextlib.suppress(ValueError, TypeError):
                event = json.loads(line)
                if isinstance(event, dict) and now - float(event.get("at", 0)) <= KEPT_S:
                    events.append(event)
        return events[-self._limit :]

    def _read_lines(self) -> list[str]:
        try:
            return self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []

    def _shorten(self, now: float) -> None:
        kept = [json.dumps(event, separators=(",", ":")) for event in self.read(now=now)]
        temporary = self._path.with_name(FILE_NAME + ".tmp")
        temporary.touch(mode=0o600)
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self._path)
        self._lines = len(kept)
