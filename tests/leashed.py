"""Device and pairing processes from a real fork helper, without a supervisor: the test holds the
other end of their channels."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

from world import eventually

from whatsapp_worker.endings import Ending
from whatsapp_worker.fork_helper import encode_settings
from whatsapp_worker.forker import Forker
from whatsapp_worker.reports import Channel
from whatsapp_worker.settings import Settings


class Stable:
    """A fork helper in one environment, and the processes that it forked; `close` kills them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = dict(environ)
        self._forker = Forker(environ)
        self._runs = 0
        self._pids: dict[int, int] = {}  # run to pid
        self._statuses: dict[int, int] = {}  # pid to exit code
        eventually(self._is_ready, within_s=60, what="the fork helper is ready")

    def _is_ready(self) -> bool:
        self.hear()
        return self._forker.is_ready

    def start(
        self, kind: str, session: str, settings: Mapping[str, str], **arguments: Any
    ) -> "Leashed":
        """Fork one; `settings` are variables beside those of the environment."""
        self._runs += 1
        request = {
            "run": self._runs,
            "kind": kind,
            "session": session,
            "settings": encode_settings(Settings.read(self._environ | dict(settings))),
            "args": arguments,
        }
        ours, theirs = socket.socketpair()
        with theirs:
            self._forker.fork(request, theirs.fileno())
        run = self._runs
        eventually(lambda: self.hear() or run in self._pids, what="it was forked")
        return Leashed(self, self._pids[run], ours)

    def hear(self) -> None:
        for answer in self._forker.hear():
            if "forked" in answer:
                self._pids[answer["forked"]] = answer["pid"]
            elif "exited" in answer:
                self._statuses[answer["exited"]] = os.waitstatus_to_exitcode(answer["status"])

    def exit_code(self, pid: int) -> int | None:
        self.hear()
        return self._statuses.get(pid)

    def close(self) -> None:
        self.hear()
        for pid in set(self._pids.values()) - set(self._statuses):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._forker.close(timeout_s=5)


class Leashed:
    """One device or pairing process."""

    def __init__(self, stable: Stable, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self._stable = stable
        self._sock = sock
        self._channel: Channel | None = Channel(sock)
        self._reports: list[dict[str, Any]] = []

    def expect(self, report: str, *, within_s: float = 60) -> dict[str, Any]:
        """The next report of this name, not taken yet."""
        deadline = time.monotonic() + within_s
        while True:
            for found in self._reports:
                if found["report"] == report:
                    self._reports.remove(found)
                    return found
            if not self._read() or time.monotonic() > deadline:
                raise AssertionError(f"no {report} within {within_s} s; heard {self._reports}")

    def _read(self) -> bool:
        if self._channel is None:
            return False
        heard = self._channel.receive()
        if heard is None:
            self.hang_up()
            return False
        self._reports += heard
        if not heard:
            time.sleep(0.005)
        return True

    def order(self, order: str, **facts: Any) -> None:
        assert self._channel is not None
        assert self._channel.send(order=order, **facts)

    def ended(self, *, within_s: float = 60) -> tuple[Ending, int]:
        """The last word and the exit code."""
        ending = Ending.from_report(self.expect("ended", within_s=within_s)["ending"])
        return ending, self.wait(30)

    def wait(self, within_s: float) -> int:
        """Its exit code, negative for a signal."""
        eventually(lambda: self._exit_code() is not None, within_s=within_s, what="it exits")
        code = self._exit_code()
        assert code is not None
        return code

    def _exit_code(self) -> int | None:
        return self._stable.exit_code(self.pid)

    def hang_up(self) -> None:
        """The supervisor is gone."""
        self._channel = None
        self._sock.close()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait(30)

    def close(self) -> None:
        """Kill it if it still runs."""
        if self._exit_code() is None:
            self.kill()
        self._sock.close()
