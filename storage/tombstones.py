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
        self._unburied: list[str] = []  # ids whose creation may not be done

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
            kept = [*entries, dataclasses.asdict(stone)][-self._limit :]
            return {**(fields or {}), "tombstones": kept}

        self._change(change)
        return stone

    def unbury(self, id: str) -> bool:
        """Take its tombstone away because the id is created again on purpose; that it was used
        once is remembered until `forget`, should the creation fail. Whether it was.

        Raises:
            DocumentUnwritable, LockHeld: Nothing has changed (transient).
        """
        if id not in self._read() and id not in self._unburied:
            return False
        was_used = False

        def change(fields: Fields | None) -> Fields | None:
            nonlocal was_used
            entries, unburied = _entries(fields), _unburied(fields)
            others = [entry for entry in entries if entry["id"] != id]
            was_there = len(others) < len(entries)
            was_used = was_there or id in unburied
            kept = [*(other for other in unburied if other != id), id][-self._limit :]
            if not was_there:
                return None
            return {**(fields or {}), "tombstones": others, "unburied": kept}

        self._change(change)
        return was_used

    def forget(self, id: str) -> None:
        """The creation that `unbury` began is done. A tombstone is never touched."""

        def change(fields: Fields | None) -> Fields | None:
            unburied = _unburied(fields)
            kept = [other for other in unburied if other != id]
            return {**(fields or {}), "unburied": kept} if len(kept) < len(unburied) else None

        self._change(change)

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
                fields = self._document.read()
                self._cache, self._unburied = _stones(fields), _unburied(fields)
            except DocumentBroken as error:
                log.error("tombstones.unreadable", extra={"problem": str(error)})
                self._cache, self._unburied = {}, []
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


def _unburied(fields: Fields | None) -> list[str]:
    found = (fields or {}).get("unburied")
    return [id for id in found if isinstance(id, str)] if isinstance(found, list) else []


def _stones(fields: Fields | None) -> dict[str, Tombstone]:
    return {stone.id: stone for stone in map(Tombstone.read, _entries(fields))}


def _check(fields: Fields) -> None:
    _stones(fields)
