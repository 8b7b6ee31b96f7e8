"""The loop that sends: takes jobs in order, claims, sends, settles, finishes.

    recover() once, before connecting: what an earlier process left behind is settled
    run()     while connected, in the main thread, until asked to stop or a send goes astray
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, Protocol

from storage.ledger import Ledger

from whatsapp_worker.device import SendAck
from whatsapp_worker.outbox import Outbox
from whatsapp_worker.settings import Settings


class Send(Protocol):
    """`Device.send`: blocks; raises SendFailed."""

    def __call__(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> SendAck: ...


class Ending(StrEnum):
    """Why `Consumer.run` returned. After all but `stopped` the process must leave at once by
    `os._exit`: a send may still be under way, and the next process's recovery settles it."""

    STOPPED = "stopped"  # asked to; nothing is in hand
    NOT_DRAINED = "not-drained"  # asked to; the send in hand did not return in time
    SEND_HUNG = "send-hung"  # a send got no answer within SEND_TIMEOUT_S
    SEND_UNSURE = "send-unsure"  # a send failed and may have reached WhatsApp: recovery looks
    NOT_CONNECTED = "not-connected"  # neonize refused to send: this connection is gone


class Consumer:
    """Sends what is queued for one session, one message at a time."""

    def __init__(
        self,
        *,
        session: str,
        send: Send,
        ledger: Ledger,
        outbox: Outbox,
        install_key: bytes,
        settings: Settings,
        on_sent: Callable[[str, str], None] | None = None,
    ) -> None:
        """Nothing is touched yet.

        Args:
            session: Its id.
            send: `Device.send`; called on a thread of its own.
            ledger: Open, and used by no other thread.
            outbox: The session's queues.
            install_key: `Sessions.install_key()`.
            settings: SEND_TIMEOUT_S, SEND_RETRIES ...
            on_sent: Called with (WhatsApp's id, message id) of every acknowledged message, on
                the thread that runs `run`: `FactWriter.sent`.
        """
        raise NotImplementedError

    def recover(self, handed_over: Callable[[Iterable[bytes]], Mapping[bytes, str]]) -> bool:
        """Settle what an earlier process left. Before connecting, under the session's lock.

        Waits, ticking, for Redis and the database to come back, until `stop` is called.

        Args:
            handed_over: `device_store.handed_over` with its path filled in.

        Returns:
            False when stopped before it was done: do not connect.
        """
        raise NotImplementedError

    def run(self) -> Ending:
        """Send until `stop` is called or a send goes astray. Call while connected."""
        raise NotImplementedError

    def stop(self, *, drain_s: float = 8.0) -> None:
        """Ask `run` or `recover` to return: at once when idle, else when the send in hand
        returns, at the latest after `drain_s`. From any thread and from signal handlers; a
        second call can only shorten the wait."""
        raise NotImplementedError

    @property
    def progressed_at(self) -> float:
        """`time.monotonic()` of the loop's last tick; waiting with a ticking loop is progress."""
        raise NotImplementedError

    @property
    def sent(self) -> int:
        """Messages acknowledged since the start."""
        raise NotImplementedError

    @property
    def is_idle(self) -> bool:
        """No send is under way and nothing is waiting to be settled."""
        raise NotImplementedError

    def queue_state(self) -> dict[str, Any]:
        """For the heartbeat: {"state", "reason", "until", "depth"}; from any thread, no I/O."""
        raise NotImplementedError
