"""Keeps a queue for the number that it was filled for: one small document beside the records.

When an id is used again after its deletion, or linked to another number, what was enqueued before
that moment is held until an operator decides.
"""

from pathlib import Path

from storage.documents import Document, Fields

VERSION = 1


class Hold:
    """`queue.json` of one session. Every method raises DocumentError where the file cannot be
    used, and those that write LockHeld (transient)."""

    def __init__(self, folder: Path) -> None:
        self._document = Document(folder / "queue.json", version=VERSION, check=_check)

    def before(self) -> float | None:
        """Unix seconds: what was enqueued earlier is held; None when nothing is."""
        found: float | None = (self._document.read() or {}).get("held_before")
        return found

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

    def release(self) -> bool:
        """Send what is held; whether anything could have been."""
        was_held = False

        def change(fields: Fields | None) -> Fields | None:
            nonlocal was_held
            was_held = (fields or {}).get("held_before") is not None
            return {**(fields or {}), "held_before": None} if was_held else None

        self._document.update(change)
        return was_held


def _check(fields: Fields) -> None:
    before, number = fields.get("held_before"), fields.get("number_hash")
    if before is not None and (isinstance(before, bool) or not isinstance(before, int | float)):
        raise ValueError("held_before is no time")
    if number is not None and not isinstance(number, str):
        raise ValueError("number_hash is no text")
