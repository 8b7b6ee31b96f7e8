"""What was deleted, so that it stays deleted: one document, oldest out first."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storage.documents import Document, Fields
from storage.errors import DocumentBroken

log = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True, slots=True)
class Tombstone:
    """One deleted session.

    Attributes:
        id: Its session id.
        number_hash: HMAC of its phone number; None when that was not known.
        why: What deleted it, in a few words.
        at: When, in unix seconds. The order of deletion is the order in the file, not this.
    """

    id: str
    number_hash: str | None
    why: str
    at: float

    @classmethod
    def read(cls, fields: Fields) -> "Tombstone":
        """Raises ValueError, KeyError or TypeError when it is none."""
        stone = cls(fields["id"], fields["number_hash"], fields["why"], float(fields["at"]))
        if not (isinstance(stone.id, str) and isinstance(stone.why, str)):
            raise ValueError("a tombstone's id and why are text")
        return stone


class Tombstones:
    """At most `limit` tombstones in one file. Reading is cached until the file changes."""

    def __init__(self, path: Path, limit: int) -> None:
        self._document = Document(path, version=VERSION, check=_check)
        self._limit = limit
        self._seen: tuple[int, int, int] | None = None
        self._cache: dict[str, Tombstone] = {}

    def add(self, id: str, number_hash: str | None, why: str, now: float) -> Tombstone:
        """Remember a deletion. Adding an id again changes nothing, so it may be repeated.

        Raises:
            DocumentUnwritable, LockHeld: It is not remembered (transient).
        """
        stone = Tombstone(id, number_hash, why, now)

        def change(fields: Fields | None) -> Fields | None:
            nonlocal stone
            entries = _entries(fields)
            for entry in entries:
                if entry["id"] == id:
                    stone = Tombstone.read(entry)
                    return None
            return {"tombstones": [*entries, dataclasses.asdict(stone)][-self._limit :]}

        self._change(change)
        return stone

    def remove(self, id: str) -> bool:
        """Forget a deletion because the id was created again on purpose; whether there was one."""
        was_there = False

        def change(fields: Fields | None) -> Fields | None:
            nonlocal was_there
            entries = _entries(fields)
            others = [entry for entry in entries if entry["id"] != id]
            was_there = len(others) < len(entries)
            return {"tombstones": others} if was_there else None

        self._change(change)
        return was_there

    def find(self, id: str) -> Tombstone | None:
        """The tombstone of this id.

        Raises:
            DocumentNewer: A newer version wrote the file.
        """
        return self._read().get(id)

    def all(self) -> list[Tombstone]:
        """Every tombstone, oldest first."""
        return list(self._read().values())

    def clean(self) -> None:
        """Remove what a killed writer left behind."""
        self._document.clean()

    def _change(self, change: Callable[[Fields | None], Fields | None]) -> None:
        try:
            self._document.update(change)
        except DocumentBroken as error:
            # Starting afresh forgets deletions that are long finished; one under way is also
            # written in the session's own record. Refusing would stop every session.
            log.error("tombstones.lost", extra={"problem": str(error)})
            self._document.write({"tombstones": []})
            self._document.update(change)

    def _read(self) -> dict[str, Tombstone]:
        signature = self._signature()
        if signature is None or signature != self._seen:
            try:
                self._cache = _stones(self._document.read())
            except DocumentBroken as error:
                log.error("tombstones.unreadable", extra={"problem": str(error)})
                self._cache = {}
            # Taken before reading: a change in between is read again next time.
            self._seen = signature
        return self._cache

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            found = self._document.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def _entries(fields: Fields | None) -> list[Fields]:
    return list(fields["tombstones"]) if fields else []


def _stones(fields: Fields | None) -> dict[str, Tombstone]:
    return {stone.id: stone for stone in map(Tombstone.read, _entries(fields))}


def _check(fields: Fields) -> None:
    _stones(fields)
