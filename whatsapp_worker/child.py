"""What device and pairing processes have in common: a name, a quiet stdout, and a leash.

Both are forked from the fork helper, hang on their supervisor's channel, load a Go library whose
threads nothing can stop, and leave by `os._exit`.
"""

import contextlib
import ctypes
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from whatsapp_worker import process, telemetry
from whatsapp_worker.endings import MAX_WEIGHT, Ending, EndingKind
from whatsapp_worker.reports import Channel, ChannelGarbage, Exit
from whatsapp_worker.session import Reason

log = logging.getLogger(__name__)

TICK_S = 1.0


def begin(role: str, session: str) -> None:
    """First thing in a forked child: name it, and keep stdout for nobody.

    neonize and Go print on descriptor 1: addresses, and errors with phone numbers in them.
    """
    telemetry.bind(session=session)
    process.set_name(f"wa:{session}")
    _show(f"whatsapp-worker {role} {session}")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.close(sink)


def _show(command_line: str) -> None:
    """Let `ps` show this command line: written over the parent's arguments in our memory.

    The environment lies right behind them and stays untouched, since Go reads HTTPS_PROXY there.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
        text = command_line.encode()[: end - start - 1]
        if text:
            ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def live(channel: Channel, life: Callable[[], tuple[Ending, int]]) -> NoReturn:
    """Run a life to its end, whatever that is, and leave."""
    try:
        ending, code = life()
    except BaseException as error:
        log.exception("child.crashed")
        ending = Ending(EndingKind.CRASHED, Reason.PROCESS_CRASHED, type(error).__name__)
        code = Exit.CRASHED
    leave(channel, ending, code)


_leaving = threading.Lock()  # one thread says the last word; it is never released


def leave(channel: Channel, ending: Ending, code: int) -> NoReturn:
    """Say the last word and end the process: the only way that stops Go's threads."""
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()
    log.info("child.leaving", extra={**ending.report(), "exit_code": code})
    channel.send(report="ended", ending=ending.report())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


class Leash(threading.Thread):
    """The thread that hears the supervisor and SIGTERM, and ticks.

    It never touches Redis, the ledger or neonize, so nothing that hangs there can keep the process
    from noticing that its supervisor is gone or that its time is up.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        on_order: Callable[[dict[str, Any]], None],
        on_stop: Callable[[], None],
        on_orphaned: Callable[[], None],
        on_tick: Callable[[], float],
    ) -> None:
        """Call on the main thread: it takes SIGTERM over. All callbacks run on this thread.

        Args:
            channel: The supervisor's end is watched for orders and for its end.
            on_order: Called with each order.
            on_stop: Called for each SIGTERM.
            on_orphaned: Called once, when the supervisor is gone.
            on_tick: Called at least every second; returns the seconds until it wants to be
                called again.
        """
        super().__init__(name="leash", daemon=True)
        self._channel = channel
        self._on_order = on_order
        self._on_stop = on_stop
        self._on_orphaned = on_orphaned
        self._on_tick = on_tick
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # The handler does nothing: the interpreter writes the signal's number into the pipe, even
        # while the main thread is in a C call.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to answer
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def wake(self) -> None:
        """Tick now; from any thread."""
        with contextlib.suppress(OSError):
            os.write(self._write, b"\0")

    def run(self) -> None:
        try:
            self._watch()
        except BaseException:
            log.exception("child.leash_broken")  # without it nothing would end this process
            os._exit(Exit.CRASHED)

    def _watch(self) -> None:
        watched = [self._read, self._channel.fileno()]
        while True:
            wait_s = max(0.0, min(TICK_S, self._on_tick()))
            readable, _, _ = select.select(watched, [], [], wait_s)
            if self._read in readable and signal.SIGTERM in os.read(self._read, 4096):
                self._on_stop()
            if self._channel.fileno() in readable and not self._hear():
                watched.remove(self._channel.fileno())
                self._on_orphaned()

    def _hear(self) -> bool:
        try:
            orders = self._channel.receive()
        except ChannelGarbage as garbage:
            log.error("child.order_unreadable", extra={"problem": str(garbage)})
            return True
        for order in orders or ():
            self._on_order(order)
        return orders is not None


class Departure:
    """How and when this process leaves: the first ending, unless a weightier one follows.

    Safe from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadline = float("inf")
        self._ending = Ending(EndingKind.CRASHED, Reason.PROCESS_CRASHED, "left without a reason")
        self._code: int = Exit.CRASHED
        self._weight = -1
        self.is_due = threading.Event()  # set with the first word
        self.is_certain = threading.Event()  # set with a word that no other can outweigh

    def announce(self, ending: Ending, code: int, *, within_s: float) -> None:
        """Leave with this ending; a later call may outweigh it, and can shorten the time left."""
        with self._lock:
            if ending.weight > self._weight:
                self._ending, self._code, self._weight = ending, code, ending.weight
            self._deadline = min(self._deadline, time.monotonic() + within_s)
        self.is_due.set()
        if ending.weight == MAX_WEIGHT:
            self.is_certain.set()

    def verdict(self) -> tuple[Ending, int]:
        """The ending that counts, and the exit code that goes with it."""
        with self._lock:
            return self._ending, self._code

    def left_s(self) -> float:
        """Seconds until the time is over: infinite before the first word, never negative."""
        return max(0.0, self._deadline - time.monotonic())
