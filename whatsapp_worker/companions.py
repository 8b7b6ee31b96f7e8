"""Other commands of ours that a supervisor runs beside its sessions, where nobody else does."""

import logging
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from whatsapp_worker import process

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "whatsapp_worker.cli")
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
STEADY_S = 60.0  # one that ran so long begins with the first wait again


class Companion:
    """One child command, started again with growing waits when it ends. Main thread only."""

    def __init__(self, words: Sequence[str], *, environ: Mapping[str, str]) -> None:
        self._words = tuple(words)
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._next_at = 0.0
        self._wait_s = FIRST_WAIT_S

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def tick(self, now: float) -> None:
        """Start it when it is due."""
        if self._process is not None and self._process.poll() is not None:
            self._ended(self._process.returncode, now)
        if self._process is None and now >= self._next_at:
            self._started_at = now
            command = [*COMMAND, *self._words]
            self._process = process.start_bound(command, environ=self._environ)

    def _ended(self, code: int, now: float) -> None:
        if now - self._started_at > STEADY_S:
            self._wait_s = FIRST_WAIT_S
        log.warning(
            "companion.ended",
            extra={"command": self._words[0], "code": code, "wait_s": self._wait_s},
        )
        self._process, self._next_at = None, now + self._wait_s
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)

    def ask_to_end(self) -> None:
        """SIGTERM."""
        if self._process is not None:
            self._process.terminate()

    def end(self, *, deadline: float) -> bool:
        """Wait until the deadline (monotonic), then SIGKILL; whether it went by itself."""
        if self._process is None:
            return True
        return process.end(self._process, timeout_s=max(0.0, deadline - time.monotonic()))
