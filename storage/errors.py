"""Every error that storage raises on purpose.

    StorageError                   root
    ├── LockError
    │   ├── LockHeld               another process or thread has it; transient (5)
    │   └── LockUnusable           this folder or filesystem cannot lock
    ├── DocumentError              one JSON file; names its path
    │   ├── DocumentBroken         neither the file nor its .bak can be read
    │   ├── DocumentNewer          written by a newer version; left untouched
    │   └── DocumentUnwritable     disk full, read-only, permission; the old version is intact;
    │                              transient
    ├── RecordError                one session's record
    │   ├── RecordMissing          there is none (3)
    │   ├── RecordLost             there is none, and there are a state or credentials of the id
    │   ├── RecordExists           there is one already
    │   ├── RecordBeingDeleted     its deletion has begun and is not finished; transient (3)
    │   └── RecordExported         it was moved to another host
    └── LedgerError
        ├── LedgerUnavailable      the database did not answer in time or refused; transient (6)
        ├── LedgerNewer            its schema is newer than this code
        └── LedgerBroken           damaged beyond repair, or set aside and awaiting an operator

`transient` says whether the same call may succeed later without anybody acting; `exit_code` is
what a command ends with when the error reaches it.
"""

import errno
from pathlib import Path
from typing import Any, ClassVar

_REMEDIES = {
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the disk quota is used up: make room",
    errno.EROFS: "the filesystem is read-only: mount it for writing",
    errno.EACCES: "permission denied: run this as the owner of the data folder",
    errno.EPERM: "permission denied: run this as the owner of the data folder",
    errno.ENOENT: "its folder is gone",
    errno.ENOTDIR: "a file lies where a folder must be: set DATA_DIR to a folder",
    errno.EEXIST: "a file lies where a folder must be: set DATA_DIR to a folder",
}


def reason(error: OSError) -> str:
    """What happened and what to do, for people."""
    return _REMEDIES.get(error.errno or 0, str(error.strerror or error))


class StorageError(Exception):
    """Root of the tree. The text is for people: what happened and what to do next."""

    transient: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1


class LockError(StorageError):
    """A lock was not taken."""

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(text)
        self.path = path


class LockHeld(LockError):
    """Somebody else has the lock. `holder` is what they wrote into it, if anything."""

    transient = True
    exit_code = 5

    def __init__(self, path: Path, holder: dict[str, Any] | None) -> None:
        who = f" by process {holder['pid']}" if holder and "pid" in holder else ""
        super().__init__(path, f"{path} is locked{who}; it is free when that one ends")
        self.holder = holder


class LockUnusable(LockError):
    """The lock file cannot be made or the filesystem does not lock. `number` is the errno."""

    def __init__(self, path: Path, text: str, number: int | None = None) -> None:
        super().__init__(path, text)
        self.number = number


class DocumentError(StorageError):
    """Something about one JSON file."""

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(f"{path}: {text}")
        self.path = path


class DocumentBroken(DocumentError):
    """The file is damaged and so is its `.bak`, or there is none. The damaged file stays."""


class DocumentNewer(DocumentError):
    """A newer version of this software wrote the file. It was not touched."""


class DocumentUnwritable(DocumentError):
    """The new version was not saved; the old one is intact. Try again when the cause is gone."""

    transient = True


class RecordError(StorageError):
    """Something about one session's record."""

    def __init__(self, session: str, text: str) -> None:
        super().__init__(text)
        self.session = session


class RecordMissing(RecordError):
    """There is no record of this id."""

    exit_code = 3


class RecordLost(RecordError):
    """The record is gone and the session is not: its state or credentials are there."""


class RecordExists(RecordError):
    """There is a record of this id already."""


class RecordBeingDeleted(RecordError):
    """The deletion of this id has begun; it can be created again when that is finished."""

    transient = True
    exit_code = 3


class RecordExported(RecordError):
    """The session was moved to another host; running it here too would break it there."""


class LedgerError(StorageError):
    """Something about a ledger."""


class LedgerUnavailable(LedgerError):
    """The ledger's database did not answer within the time, or refused the call.

    A call that wrote may or may not have been committed; repeating the same call is safe.
    """

    transient = True
    exit_code = 6


class LedgerNewer(LedgerError):
    """A newer version of this software upgraded the ledger. It was not touched."""


class LedgerBroken(LedgerError):
    """The ledger is damaged beyond repair, or was set aside and waits for an operator.

    Sending on with an empty ledger would forget what was claimed and send messages twice.
    """
