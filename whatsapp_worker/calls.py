"""Threads for calls that block and cannot be interrupted, so that they can be given up."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, NoReturn, TypeVar

T = TypeVar("T")


class CallThread(threading.Thread, Generic[T]):
    """Makes calls for another thread, one at a time. A call that was given up keeps it for as
    long as it lasts: then nothing more can be begun."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._calls: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[T | Exception | None] = queue.SimpleQueue()

    def nudge(self) -> None:
        """Let whoever waits for an answer look up; from any thread and from signal handlers."""
        self._answers.put(None)

    def begin(self, call: Callable[[], T]) -> None:
        """Start a call; its answer must be taken before the next is begun."""
        self._calls.put(call)

    def answer(self, timeout_s: float | None = None) -> T | Exception | None:
        """What the call returned (never None) or raised; None while it has not.

        Args:
            timeout_s: Wait at most so long; without it until there is something.
        """
        try:
            return self._answers.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def run(self) -> None:
        while True:
            call = self._calls.get()
            try:
                self._answers.put(call())
            except Exception as error:
                self._answers.put(error)


class Limit:
    """How long the blocking call in hand may take. One thread makes the calls, another watches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends_at: float | None = None  # monotonic; None while no call is in hand
        self._is_over = False

    def call(self, do: Callable[[], T], *, within_s: float) -> T:
        """Make a call. Never returns once `give_up` has been told that it is over: whoever gave
        it up goes on without this thread."""
        with self._lock:
            self._ends_at = time.monotonic() + within_s
        try:
            return do()
        finally:
            with self._lock:
                self._ends_at = None
                is_over = self._is_over
            if is_over:
                _for_ever()

    def left_s(self, stop_at: float | None) -> float | None:
        """Seconds until the call in hand must be over, or until `stop_at` (monotonic) where that
        is sooner; None while there is none."""
        ends_at = self._ends_at
        if ends_at is None:
            return None
        return max(0.0, min(ends_at, stop_at or ends_at) - time.monotonic())

    def give_up(self, stop_at: float | None) -> bool:
        """End the call in hand where its time is over; whether there was one to end."""
        with self._lock:
            self._is_over = self.left_s(stop_at) == 0.0
            return self._is_over


def _for_ever() -> NoReturn:
    while True:
        threading.Event().wait()
