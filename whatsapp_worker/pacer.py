"""The pace of one session: what it sent lately outlives its process, in a file of its own."""

import logging
import random
import time
from pathlib import Path
from typing import Any

from storage.documents import Document
from storage.errors import StorageError
from whatsapp_worker.pacing import Pace, Paced
from whatsapp_worker.settings import Settings

log = logging.getLogger(__name__)

FILE = "pacing.json"  # in the session's folder
LIMITED = "its pace is limited (PACE_PER_MINUTE)"


def pace_of(settings: Settings) -> Pace | None:
    """The rules; None while pacing is off."""
    if not settings.pace_per_minute:
        return None
    return Pace(
        per_minute=settings.pace_per_minute,
        jitter=settings.pace_jitter,
        per_day=settings.pace_per_day,
        new_contact_factor=settings.pace_new_contact_factor,
    )


class Pacer:
    """Says when the next message may be sent. Not thread-safe."""

    def __init__(self, pace: Pace, path: Path | None) -> None:
        """Reads what the process before left.

        Args:
            path: Its file; None keeps it in memory only.
        """
        self._pace = pace
        self._document = Document(path, version=1) if path else None
        self._paced = Paced.read(self._read())

    def due_at(self, *, is_new_contact: bool) -> float:
        """UTC seconds from which it may be sent; past when it may be now."""
        return self._paced.due_at(time.time(), self._pace, is_new_contact=is_new_contact)

    def sending(self) -> None:
        """A message is about to be handed over."""
        self._paced = self._paced.after(time.time(), random.uniform(-1, 1))
        if self._document is None:
            return
        try:
            self._document.write(self._paced.as_dict())
        except StorageError as error:
            log.warning("pacing.not_saved", extra={"error": str(error)})

    def as_dict(self) -> dict[str, Any]:
        """For those who look; times are UTC seconds."""
        now = time.time()
        return {
            "per_minute": self._pace.per_minute,
            "per_day": self._pace.per_day or None,
            "sent_today": self._paced.sent_today(now),
            "next_at": self._paced.due_at(now, self._pace, is_new_contact=False),
        }

    def _read(self) -> dict[str, Any] | None:
        try:
            return self._document.read() if self._document else None
        except StorageError as error:
            log.warning("pacing.unreadable", extra={"error": str(error)})
            return None
