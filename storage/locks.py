"""Exclusive locks between processes (and threads), by flock on a file that is never unlinked.

flock belongs to the open file: it ends with the process however that ends, a forked child shares
it for as long as it keeps the descriptor, an exec'd one does not have it. The only way a lock file
goes away is together with its folder; `acquire` notices that and takes the file that replaced it.
"""

import contextlib
import errno
import fcntl
import json
import os
import random
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from storage.errors import LockHeld, LockUnusable, reason

_SLEEP_MIN_S = 0.0005
_SLEEP_MAX_S = 0.01
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NFS_UNLOCKED = {"nolock", "local_lock=all", "local_lock=flock"}


class FileLock:
    """One exclusive lock. Use an instance for one holder; instances of one path exclude each other.

    Args:
        path: The lock file; made when missing, mode 0600.
        signed: Write who holds it into the file, for people and for `LockHeld.holder`.
    """

    def __init__(self, path: Path, *, signed: bool = True) -> None:
        self.path = path
        self._signed = signed
        self._fd: int | None = None

    @property
    def is_held(self) -> bool:
        return self._fd is not None

    def acquire(self, timeout_s: float = 0, *, note: dict[str, Any] | None = None) -> None:
        """Take the lock, waiting at most `timeout_s` seconds.

        Args:
            note: Facts beside the pid to write into the file (JSON).

        Raises:
            LockHeld: Somebody else has it still (transient).
            LockUnusable: The file cannot be opened or the filesystem has no locks.
        """
        if self._fd is not None:
            raise ValueError(f"{self.path} is already held by this object")
        deadline = time.monotonic() + timeout_s
        sleep_s = _SLEEP_MIN_S
        while (fd := _try(self.path)) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise LockHeld(self.path, holder(self.path))
            # The jitter keeps many waiters from asking in step.
            time.sleep(min(left_s, sleep_s * random.uniform(0.5, 1.0)))
            sleep_s = min(sleep_s * 1.5, _SLEEP_MAX_S)
        self._fd = fd
        if self._signed:
            _sign(fd, {"pid": os.getpid(), **(note or {})})

    def release(self) -> None:
        """Give it back; nothing happens when it is not held."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        if self._signed:
            _sign(fd, None)
        os.close(fd)

    def __enter__(self) -> Self:
        if self._fd is None:
            self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def holder(path: Path) -> dict[str, Any] | None:
    """What the last holder wrote into a signed lock; None for nothing or nonsense."""
    try:
        found = json.loads(path.read_bytes()[:4096])
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock at this moment.

    It shares the lock for an instant to find out, so that probes do not see each other; who needs
    a lock that is probed so should wait for it a little (`acquire(1.0)`).

    Raises:
        LockUnusable: The file may not be looked at.
    """
    try:
        if not path.exists():
            return False
    except OSError as error:
        raise _unusable(path, error) from error
    fd = _try(path, fcntl.LOCK_SH)
    if fd is None:
        return True
    os.close(fd)
    return False


def check_locking(folder: Path) -> None:
    """Make sure that locks in this folder exclude anybody at all.

    Raises:
        LockUnusable: They do not: an NFS mount without locking, or a filesystem that has none.
    """
    if options := _unlocked_nfs(folder):
        raise LockUnusable(
            folder,
            f"{folder} is on NFS mounted without locking between hosts ({options}): mount it with"
            " locking (without nolock and local_lock), or use a local disk",
        )
    path = folder / ".locking"
    with contextlib.suppress(LockHeld), FileLock(path, signed=False):
        if not is_locked(path):
            raise LockUnusable(
                folder, f"the filesystem of {folder} grants one lock twice: use a local disk"
            )


def _try(path: Path, kind: int = fcntl.LOCK_EX) -> int | None:
    """Open and lock the file; None while another has it."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError as error:
            os.close(fd)
            raise _unusable(path, error) from error
        # Race: the folder was removed and made anew between open and flock; then this locks a
        # file that nobody else will ever open.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        os.close(fd)


def _unusable(path: Path, error: OSError) -> LockUnusable:
    if error.errno in _NO_LOCKS:
        text = f"the filesystem of {path} has no locks ({error.strerror}): use a local disk"
    else:
        text = f"cannot lock {path}: {reason(error)}"
    return LockUnusable(path, text, error.errno)


def _sign(fd: int, facts: dict[str, Any] | None) -> None:
    """For people only: a full disk must not cost the lock."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        if facts is not None:
            os.pwrite(fd, json.dumps(facts, default=str).encode(), 0)


def _unlocked_nfs(folder: Path) -> str | None:
    """The mount options that give it away; None on any other filesystem or without /proc."""
    try:
        device = os.stat(folder).st_dev
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    return unlocked_nfs(lines, f"{os.major(device)}:{os.minor(device)}")


def unlocked_nfs(mountinfo: list[str], device: str) -> str | None:
    """The options that keep an NFS mount from locking between hosts; None for any other mount.

    Args:
        mountinfo: Lines of /proc/self/mountinfo, see proc(5).
        device: `major:minor` of the filesystem in question.
    """
    for line in mountinfo:
        mount, _, filesystem = line.partition(" - ")
        if mount.split(" ")[2:3] == [device] and filesystem.startswith(("nfs ", "nfs4 ")):
            options = set(filesystem.split(" ")[-1].split(","))
            return ",".join(sorted(options & _NFS_UNLOCKED)) or None
    return None
