"""What a device or pairing process and its supervisor say to each other.

One JSON object a line over a socket pair. The device reports facts; the supervisor decides. No
Redis is needed for any of it, so liveness never depends on Redis. End of file in either direction
means that the other process is gone: a device process then ends by itself within a second.
"""

import json
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

from whatsapp_worker.errors import WorkerError

MAX_LINE = 1_048_576  # bytes; a longer line is no report of ours

# Device to supervisor, under the key "report":
#   started    pid
#   connecting
#   connected  jid lid phone push_name
#   qr         code expires_in_s number(of this attempt, from 1)       (pairing process)
#   code       code (ABCD-EFGH)                                        (pairing process)
#   paired     jid lid phone platform                                  (pairing process)
#   heartbeat  loop_age_s consumer_age_s client_age_s proof_of_life_age_s degraded rss_mib fds
#              threads sent idle queue{state,reason,until,depth}
#   failure    breaker failures and other facts that the supervisor keeps or alerts on:
#              kind + details
#   leaving                     it is over, and the send in hand gets its time
#   ended      ending: {kind, reason, detail, until} (endings.Ending.report); the last word
# Supervisor to device, under the key "order":
#   stop       drain_s          leave after the send in hand
#   logout                      log out at WhatsApp, then leave


class Exit:
    """Exit codes of device and pairing processes; anything else is a crash."""

    OK = 0  # drained because it was asked to
    CRASHED = 70  # an exception that nobody expected
    CONNECTION_ENDED = 80  # the connection is gone; `ended` says how
    ORPHANED = 81  # the supervisor is gone
    LOCKED = 82  # another process holds this session
    SEND_HUNG = 83  # a send got no answer in time; its outcome is unknown
    UNSAFE = 84  # sandbox mode, and the environment could reach WhatsApp
    NOT_DRAINED = 85  # asked to stop; the send in hand did not end in time
    STORE_BROKEN = 86  # credentials or ledger cannot be used


class Channel:
    """One end of the socket pair. `send` may be called from any thread and never blocks long."""

    def __init__(self, sock: socket.socket, *, send_timeout_s: float = 5.0) -> None:
        # Python's own time-out would make `receive` wait too: the kernel's is for sends alone.
        sock.setblocking(True)
        whole_s, part_s = divmod(send_timeout_s, 1)
        timeval = struct.pack("@ll", int(whole_s), int(part_s * 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._sock = sock
        self._is_broken = False  # half a line went out: what follows could not be read
        self._buffer = b""
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def send(self, **message: Any) -> bool:
        """Say one thing; False when the other end is gone or did not read for the time-out."""
        line = json.dumps(message, separators=(",", ":"), default=str).encode() + b"\n"
        with self._lock:
            if self._is_broken:
                return False
            try:
                self._sock.sendall(line)
            except OSError:
                self._is_broken = True
                return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """Everything that waits, without blocking; None at the end of file.

        Raises:
            ChannelGarbage: The other end sent something that is no report.
        """
        ended = False
        while True:
            try:
                data = self._sock.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                ended = True
                break
            self._buffer += data
            if len(self._buffer) > MAX_LINE:
                break
        messages = list(self._split())
        return None if ended and not messages else messages

    def _split(self) -> Iterator[dict[str, Any]]:
        *lines, self._buffer = self._buffer.split(b"\n")
        if len(self._buffer) > MAX_LINE:
            self._buffer = b""
            raise ChannelGarbage("a report is longer than 1 MiB")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                raise ChannelGarbage(f"not JSON: {line[:80]!r}") from None
            if not isinstance(message, dict):
                raise ChannelGarbage(f"not an object: {line[:80]!r}")
            yield message


class ChannelGarbage(WorkerError):
    """The other end of a channel does not speak our protocol."""
