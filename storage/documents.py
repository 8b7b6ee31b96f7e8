"""One JSON document in one file, written whole or not at all.

A write takes the document's lock, fills `<name>.tmp` and fsyncs it, hard-links the current file to
`<name>.bak.tmp` and renames that to `<name>.bak`, renames `<name>.tmp` over the current file and
fsyncs the folder. So the current file is never absent, whoever dies when, and readers need no lock.
The temporary names are fixed: writes happen under the lock, so what lies there is a leftover.
"""

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from storage.errors import (
    DocumentBroken,
    DocumentNewer,
    DocumentUnwritable,
    LockHeld,
    LockUnusable,
    reason,
)
from storage.locks import FileLock

log = logging.getLogger(__name__)

Fields = dict[str, Any]

MAX_BYTES = 16 * 1024 * 1024  # a longer file is none of ours
MAX_CORRUPT = 5  # damaged versions kept beside a document
LOCK_TIMEOUT_S = 5.0

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class Document:
    """A JSON object with a `version`. Instances hold no state: any number may share one path.

    Args:
        path: The file. Its folder must exist.
        version: What this code writes. An older file is read through `upgrade` and upgraded when
            it is next written; a newer one is refused, untouched.
        upgrade: Makes yesterday's object today's; gets it with its old `version`. Without it an
            older file counts as broken.
        check: Raises ValueError (or KeyError, TypeError) for an object whose shape is wrong; such
            a file counts as broken.
        mode: Permissions of the file.
        afresh: What to do, or what follows, once a broken file was removed; ends that sentence.
    """

    def __init__(
        self,
        path: Path,
        *,
        version: int,
        upgrade: Callable[[Fields], Fields] | None = None,
        check: Callable[[Fields], object] | None = None,
        mode: int = 0o600,
        afresh: str = "to start it afresh",
    ) -> None:
        self.path = path
        self._version = version
        self._upgrade = upgrade
        self._check = check
        self._mode = mode
        self._afresh = afresh

    # Made when needed: most documents are only ever read, and reading needs none of these.

    @property
    def _backup(self) -> Path:
        return self.path.with_name(self.path.name + ".bak")

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(self.path.name + ".tmp")

    @property
    def _backup_temporary(self) -> Path:
        return self.path.with_name(self.path.name + ".bak.tmp")

    def read(self) -> Fields | None:
        """The document; None when it was never written or was removed.

        A damaged or vanished file is restored from `.bak` with a warning.

        Raises:
            DocumentBroken: It is damaged, and `.bak` is too or there is none.
            DocumentNewer: A newer version wrote it.
        """
        try:
            return self._load(self.path)
        except FileNotFoundError:
            # Removing takes .bak away first. So a .bak without its file is damage done by others.
            if not self._backup.exists():
                return None
        except _Damage:
            pass
        return self._recover()

    def update(
        self, change: Callable[[Fields | None], Fields | None], *, timeout_s: float = LOCK_TIMEOUT_S
    ) -> Fields | None:
        """Read, change and write under the lock, so that no other update is lost.

        Args:
            change: Gets the document (None when there is none) and returns the new one, or None
                to leave things as they are. `version` is filled in.
            timeout_s: How long to wait for other writers.

        Returns:
            The document as it is afterwards.

        Raises:
            DocumentBroken, DocumentNewer: As `read`.
            DocumentUnwritable: The new version is not saved, the old one is intact (transient).
            LockHeld: Other writers kept the lock for `timeout_s` (transient).
        """
        with self._locked(timeout_s):
            found = self._read_locked()
            fields = change(found)
            if fields is None:
                return found
            fields = {**fields, "version": self._version}
            self._save(fields)
            return fields

    def write(self, fields: Fields, *, timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Replace the document whatever it was; a broken one is set aside.

        Raises:
            DocumentNewer: A newer version wrote what is there.
            DocumentUnwritable: It is not saved, the old version is intact (transient).
            LockHeld: Other writers kept the lock for `timeout_s` (transient).
        """
        with self._locked(timeout_s):
            try:
                self._read_locked()
            except DocumentBroken as error:
                kept = self._set_aside()
                log.warning(
                    "document.replaced",
                    extra={"path": str(self.path), "kept_as": kept, "problem": str(error)},
                )
            self._save({**fields, "version": self._version})

    def remove(self, *, timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Take the document away for good; nothing happens when it is gone already.

        Raises:
            DocumentUnwritable: It is still there (transient).
            LockHeld: Other writers kept the lock for `timeout_s` (transient).
        """
        with self._locked(timeout_s), self._saying_why():
            self._clean()
            # .bak goes first and for certain: a .bak left alone would be taken for damage.
            self._backup.unlink(missing_ok=True)
            sync_folder(self.path.parent)
            self.path.unlink(missing_ok=True)
            sync_folder(self.path.parent)

    def clean(self) -> None:
        """Remove what a killed writer left behind; skipped while somebody writes."""
        with contextlib.suppress(LockHeld, DocumentUnwritable), self._locked(0), self._saying_why():
            self._clean()

    def _clean(self) -> None:
        self._temporary.unlink(missing_ok=True)
        self._backup_temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, timeout_s: float) -> Iterator[None]:
        lock = FileLock(self.path.with_name(self.path.name + ".lock"), signed=False)
        try:
            lock.acquire(timeout_s)
        except LockUnusable as error:
            raise DocumentUnwritable(self.path, f"not saved: {error}") from error
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _saying_why(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DocumentUnwritable(self.path, f"not saved: {reason(error)}") from error

    def _load(self, path: Path) -> Fields:
        """Parse one file.

        Raises:
            FileNotFoundError: There is none.
            _Damage: It is no document of ours.
        """
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DocumentBroken(self.path, f"cannot be read: {reason(error)}") from error
        fields = _parse(data)
        if fields["version"] > self._version:
            raise DocumentNewer(
                self.path,
                f"has version {fields['version']}, and this software knows {self._version} at most:"
                " upgrade it, or restore the data folder that belongs to this version",
            )
        try:
            if fields["version"] < self._version:
                if self._upgrade is None:
                    raise ValueError(f"version {fields['version']} was never used")
                fields = {**self._upgrade(fields), "version": self._version}
            if self._check is not None:
                self._check(fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Damage(f"unusable content: {error!r:.200}") from error
        return fields

    def _recover(self) -> Fields | None:
        """Restore the file from `.bak`, under the lock; only read `.bak` where that is impossible.

        Readers come here too: they never see a file half written, so what they saw is damage.
        """
        try:
            with self._locked(LOCK_TIMEOUT_S):
                return self._read_locked()
        except (LockHeld, DocumentUnwritable) as error:
            log.warning(
                "document.not_repaired", extra={"path": str(self.path), "problem": str(error)}
            )
            return self._load_backup("is damaged or missing")

    def _read_locked(self) -> Fields | None:
        try:
            return self._load(self.path)
        except FileNotFoundError:
            if not self._backup.exists():
                return None
            problem = "is missing"
        except _Damage as damage:
            problem = str(damage)
        fields = self._load_backup(problem)
        lost_s = _age_s(self._backup, self.path)
        kept = self._set_aside()
        self._save(fields, keep_backup=True)
        log.warning(
            "document.recovered",
            extra={
                "path": str(self.path),
                "problem": problem,
                "kept_as": kept,
                "lost": "the last change"
                + (f", made {lost_s:.0f} s after the version restored" if lost_s else ""),
            },
        )
        return fields

    def _load_backup(self, problem: str) -> Fields:
        try:
            return self._load(self._backup)
        except FileNotFoundError:
            found = "there is no .bak"
        except _Damage as damage:
            found = f"its .bak too ({damage})"
        raise DocumentBroken(
            self.path,
            f"{problem}, and {found}: restore it from a backup, or remove it and"
            f" {self._backup.name} {self._afresh}",
        )

    def _set_aside(self) -> str | None:
        """Keep the damaged file as `.corrupt-<time>`, at most five; current stays where it is."""
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + f".{time.time_ns() % 10**9:09d}Z"
        kept = self.path.with_name(f"{self.path.name}.corrupt-{stamp}")
        try:
            _link_or_copy(self.path, kept, self._mode)
        except OSError:  # missing, or no room to keep it: recovering matters more
            return None
        older = sorted(self.path.parent.glob(self.path.name + ".corrupt-*"))[:-MAX_CORRUPT]
        for path in older:
            with contextlib.suppress(OSError):
                path.unlink()
        return kept.name

    def _save(self, fields: Fields, *, keep_backup: bool = False) -> None:
        """Write a new version, under the lock."""
        data = json.dumps(fields, allow_nan=False, separators=(",", ":"), sort_keys=True).encode()
        with self._saying_why():
            try:
                self._clean()
                write_synced(self._temporary, data, self._mode)
                if not keep_backup:
                    self._back_up()
                self._temporary.replace(self.path)
                sync_folder(self.path.parent)
            except OSError:
                with contextlib.suppress(OSError):
                    self._clean()
                raise

    def _back_up(self) -> None:
        try:
            _link_or_copy(self.path, self._backup_temporary, self._mode)
        except FileNotFoundError:
            return  # the first version has none before it
        self._backup_temporary.replace(self._backup)
        # Where a killed write made .bak of this very version already, rename(2) does nothing.
        self._backup_temporary.unlink(missing_ok=True)


class _Damage(Exception):
    """A file is no document of ours; says why."""


def _parse(data: bytes) -> Fields:
    if not data.strip(b"\0 \t\r\n"):
        raise _Damage("empty")
    if len(data) > MAX_BYTES:
        raise _Damage(f"longer than {MAX_BYTES} bytes")
    try:
        fields = json.loads(data.decode("utf-8"), parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise _Damage(f"no JSON ({error!s:.200})") from error
    if not isinstance(fields, dict):
        raise _Damage("no JSON object")
    version = fields.get("version")
    if type(version) is not int or version < 1:
        raise _Damage(f"no version: {version!r:.40}")
    return fields


def _number(word: str) -> float:
    """Only one that can be written again."""
    if not math.isfinite(value := float(word)):
        raise ValueError(f"{word} is not JSON")
    return value


def write_synced(path: Path, data: bytes, mode: int) -> None:
    """Make a new file that survives a power loss once its folder is synced too."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(fd, mode)  # whatever the umask says
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _link_or_copy(source: Path, target: Path, mode: int) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        write_synced(target, source.read_bytes(), mode)


def _age_s(older: Path, newer: Path) -> float:
    with contextlib.suppress(OSError):
        return max(0.0, newer.stat().st_mtime - older.stat().st_mtime)
    return 0.0
