"""A thread for calls that block and cannot be interrupted, so that they can be given up."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Sender(threading.Thread, Generic[T]):
    """Makes one call at a time. A call that was given up keeps the thread for as long as it
    lasts: then nothing more can be begun, and the process must end."""

    def __init__(self) -> None:
        super().__init__(name="sender", daemon=True)
        self._calls: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()
        self._taken = threading.Semaphore(0)

    def begin(self, call: Callable[[], T]) -> None:
        """Start a call. Waits until the thread has it: else the caller, who has work of its own,
        would keep the interpreter from it for up to a switch interval (5 ms)."""
        self._calls.put(call)
        self._taken.acquire()

    def answer(self, timeout_s: float) -> T | Exception | None:
        """What the call returned or raised; None while it has not."""
        try:
            return self._answers.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def run(self) -> None:
        while True:
            call = self._calls.get()
            self._taken.release()
            try:
                self._answers.put(call())
            except Exception as error:
                self._answers.put(error)
