"""What keeps a queue from being sent: one small document beside the records.

When an id is used again after its deletion, or linked to another number, what was enqueued before
that moment is held until an operator decides. An operator may also pause the whole queue.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

from storage.documents import Document, Fields

VERSION = 1


class Standing(NamedTuple):
    """What keeps a queue; unix seconds, None for what does not."""

    held_before: float | None = None  # what was enqueued earlier is for another number
    paused_at: float | None = None  # when an operator paused it


class Hold:
    """`queue.json` of one session. Every method raises DocumentError where the file cannot be
    used, and those that write LockHeld (transient)."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "queue.json"
        self._document = Document(self._path, version=VERSION, check=_check)
        self._seen: tuple[tuple[int, int, int], Standing] | None = None

    def read(self) -> Standing:
        """What keeps the queue now; asked before each message, so an unchanged file is not read
        again."""
        file = self._identity()
        if self._seen is not None and self._seen[0] == file:
            return self._seen[1]
        fields = self._document.read() or {}
        standing = Standing(fields.get("held_before"), fields.get("paused_at"))
        self._seen = None if file is None else (file, standing)
        return standing

    def _identity(self) -> tuple[int, int, int] | None:
        """Of the file as it is now: every write makes a new one."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def before(self) -> float | None:
        """Unix seconds: what was enqueued earlier is held; None when nothing is."""
        return self.read().held_before

    def put(self, now: float) -> None:
        """Hold what was enqueued until `now`."""
        self._document.update(lambda fields: {**(fields or {}), "held_before": now})

    def number_is(self, number_hash: str, now: float) -> bool:
        """Say whose queue it is from now on; before anything of it is sent.

        Returns:
            Whether it was another number's: then what was enqueued until `now` is held.
        """
        was: list[str | None] = []

        def change(fields: Fields | None) -> Fields | None:
            was.append((fields or {}).get("number_hash"))
            if was[-1] == number_hash:
                return None
            more = {"held_before": now} if was[-1] else {}
            return {**(fields or {}), "number_hash": number_hash, **more}

        self._document.update(change)
        return was[-1] not in (None, number_hash)

    def device(self) -> str | None:
        """Whose credentials the last process had; None before anybody said so."""
        found: str | None = (self._document.read() or {}).get("device")
        return found

    def device_is(self, device: str) -> None:
        """Say whose credentials claim messages from now on."""
        self._document.update(
            lambda fields: (
                None
                if (fields or {}).get("device") == device
                else {**(fields or {}), "device": device}
            )
        )

    def pause(self, now: float) -> None:
        """Send nothing until `release`; a second pause changes nothing."""

        def change(fields: Fields | None) -> Fields | None:
            is_paused = (fields or {}).get("paused_at") is not None
            return None if is_paused else {**(fields or {}), "paused_at": now}

        self._document.update(change)

    def release(self, held_before: float = math.inf) -> bool:
        """Send what is paused, and what is held; whether anything was.

        Args:
            held_before: What the operator saw; what is held up to a later moment stays so. With 0
                only the pause ends.
        """
        lifted: list[str] = []

        def change(fields: Fields | None) -> Fields | None:
            known = fields or {}
            limits = {"held_before": held_before, "paused_at": math.inf}
            lifted[:] = [
                name
                for name, limit in limits.items()
                if known.get(name) is not None and known[name] <= limit
            ]
            return {**known, **dict.fromkeys(lifted)} if lifted else None

        self._document.update(change)
        return bool(lifted)


def _check(fields: Fields) -> None:
    for name in ("held_before", "paused_at"):
        time = fields.get(name)
        if time is not None and (isinstance(time, bool) or not isinstance(time, int | float)):
            raise ValueError(f"{name} is no time")
    for name in ("number_hash", "device"):
        if not isinstance(fields.get(name), str | None):
            raise ValueError(f"{name} is no text")
