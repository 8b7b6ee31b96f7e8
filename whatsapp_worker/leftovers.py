"""Processes that an earlier supervisor left behind, found by the session locks that they hold.

A device process ends by itself when its supervisor is gone; one that is stopped (SIGSTOP) or
stuck cannot, and would keep its session from being run, or wake up later.
"""

import logging
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from whatsapp_worker import process

log = logging.getLogger(__name__)

PATIENCE_S = 2.0  # a process that notices by itself needs a second
_OURS = ("whatsapp-worker device ", "whatsapp-worker link ", "whatsapp_worker.fork_helper")


class Leftovers:
    """Ends them: SIGKILL once they have had their time. Tools that hold a lock are left alone."""

    def __init__(self) -> None:
        self._seen_at: dict[int, float] = {}

    def end(self, lock: Path, *, mine: Iterable[int], now: float) -> bool:
        """End whoever holds this session lock.

        Args:
            mine: Processes of this supervisor, which are no leftovers.
            now: Monotonic seconds.

        Returns:
            Whether nobody holds it any more; else ask again soon.
        """
        holders = set(process.lock_holders(lock)) - set(mine) - {os.getpid()}
        for pid in holders:
            first = self._seen_at.setdefault(pid, now)
            if now - first >= PATIENCE_S and _is_ours(pid):
                log.warning("leftover.killed", extra={"pid": pid, "lock": str(lock)})
                _kill(pid)
        return not holders

    def end_all(self, locks: Iterable[Path], *, timeout_s: float) -> bool:
        """End the leftovers of a start; whether all are gone within the time."""
        deadline = time.monotonic() + timeout_s
        waiting = [lock for lock in locks if process.lock_holders(lock)]
        while waiting and time.monotonic() < deadline:
            time.sleep(0.05)
            now = time.monotonic()
            waiting = [lock for lock in waiting if not self.end(lock, mine=(), now=now)]
        return not waiting


def _is_ours(pid: int) -> bool:
    return any(words in process.command_line(pid) for words in _OURS)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError as error:
        log.error("leftover.not_killed", extra={"pid": pid, "problem": str(error)})
