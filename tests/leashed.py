"""Device and pairing processes without a supervisor: the test holds the other end of the channel.

Run as a script, it is the process: `leashed.py KIND SESSION FD JSON-ARGUMENTS`.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whatsapp_worker.endings import Ending
from whatsapp_worker.reports import Channel


class Leashed:
    """One device or pairing process; `close` kills it."""

    def __init__(
        self, kind: str, session: str, environ: Mapping[str, str], log: Path, **arguments: Any
    ) -> None:
        ours, theirs = socket.socketpair()
        descriptor = str(theirs.fileno())
        command = [sys.executable, __file__, kind, session, descriptor, json.dumps(arguments)]
        with log.open("ab") as output, theirs:
            self.process = subprocess.Popen(
                command,
                env={**environ, "NEONIZE_BOT_TAG": "off"},
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
            )
        self.channel: Channel | None = Channel(ours)
        self._sock = ours
        self.reports: list[dict[str, Any]] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    def expect(self, report: str, *, within_s: float = 15) -> dict[str, Any]:
        """The next report of this name, not taken yet."""
        deadline = time.monotonic() + within_s
        while True:
            for found in self.reports:
                if found["report"] == report:
                    self.reports.remove(found)
                    return found
            if not self._read() or time.monotonic() > deadline:
                raise AssertionError(f"no {report} within {within_s} s; heard {self.reports}")

    def _read(self) -> bool:
        if self.channel is None:
            return False
        heard = self.channel.receive()
        if heard is None:
            self.hang_up()
            return False
        self.reports += heard
        if not heard:
            time.sleep(0.005)
        return True

    def order(self, order: str, **facts: Any) -> None:
        assert self.channel is not None
        assert self.channel.send(order=order, **facts)

    def ended(self, *, within_s: float = 15) -> tuple[Ending, int]:
        """The last word and the exit code."""
        ending = Ending.from_report(self.expect("ended", within_s=within_s)["ending"])
        return ending, self.process.wait(5)

    def hang_up(self) -> None:
        """The supervisor is gone."""
        self.channel = None
        self._sock.close()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(5)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._sock.close()


def _become(kind: str, session: str, descriptor: int, arguments: dict[str, Any]) -> None:
    from whatsapp_worker import device_process, pairing, telemetry
    from whatsapp_worker.settings import Settings

    settings = Settings.read(os.environ)
    telemetry.set_up(settings)
    main = {"device": device_process.main, "pairing": pairing.main}[kind]
    main(session, Channel(socket.socket(fileno=descriptor)), settings, **arguments)


if __name__ == "__main__":
    _become(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
