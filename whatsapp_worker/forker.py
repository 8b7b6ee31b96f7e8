"""The supervisor's side of the fork helper: starts it, asks it to fork, hears what it reaped."""

import contextlib
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from whatsapp_worker import heap, process
from whatsapp_worker.fork_helper import PACKET, ROOM

COMMAND = (sys.executable, "-m", "whatsapp_worker.fork_helper")


class ForkerGone(Exception):
    """The helper cannot be asked now; a new one will come."""


class Forker:
    """One fork helper process. When it dies, its children live on: make a new Forker."""

    def __init__(self, environ: Mapping[str, str], *, command: Sequence[str] = COMMAND) -> None:
        """Start it. It answers `ready` when it has imported everything.

        Args:
            environ: Handed on whole, with additions, and so what Go sees in its children.
            command: Its program; gets the descriptor of its socket as first argument.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Python's own time-out would make `hear` wait, too: the kernel's is for sends alone.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 1, 0))
        descriptor = theirs.fileno()
        self._process = subprocess.Popen(
            [*command, str(descriptor), ROOM],
            env={**heap.FRUGAL, **process.importable(environ), "NEONIZE_BOT_TAG": "off"},
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[descriptor],
            start_new_session=True,  # Ctrl-C in a terminal is the supervisor's alone
        )
        theirs.close()
        self._sock = ours
        self.is_ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self._sock.fileno()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def fork(self, request: dict[str, Any], *descriptors: int) -> None:
        """Ask for a child that gets these descriptors: its channel, and the stderr of its native
        libraries, which without one is ours. The answer comes through `hear`.

        Raises:
            ForkerGone: It is dead or does not read (transient).
        """
        try:
            socket.send_fds(self._sock, [json.dumps(request).encode()], descriptors)
        except OSError as error:
            raise ForkerGone(str(error)) from error

    def hear(self) -> list[dict[str, Any]]:
        """Its answers that wait, without blocking."""
        answers = []
        while True:
            try:
                data = self._sock.recv(PACKET, socket.MSG_DONTWAIT)
            except OSError:
                break
            if not data:
                break
            answers.append(json.loads(data))
        self.is_ready = self.is_ready or any("ready" in answer for answer in answers)
        return answers

    def kill(self) -> None:
        """SIGKILL; `is_running` turns false."""
        self._process.kill()

    def close(self, *, timeout_s: float) -> None:
        """Let it go: it ends at the end of its socket."""
        self._sock.close()
        try:
            self._process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
