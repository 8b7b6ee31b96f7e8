"""Kills or fails a process at a chosen step of its work on files, and recalls the steps."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

CHANGING = ("open", "write", "fchmod", "fsync", "link", "rename", "replace", "unlink", "rmdir")
Step = Callable[[str, tuple[Any, ...]], None]


@contextmanager
def before_each_step(act: Step, *, also: Sequence[tuple[Any, str]] = ()) -> Iterator[None]:
    """Call `act(name, arguments)` before every call of `os` that changes a file or folder.

    Args:
        also: Functions of other modules or classes that are steps, too.
    """
    places = [*((os, name) for name in CHANGING), *also]
    originals = [(place, name, getattr(place, name)) for place, name in places]

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            act(name, arguments)
            return original(*arguments, **named)

        return call

    try:
        for place, name, original in originals:
            setattr(place, name, wrap(name, original))
        yield
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


class At:
    """Acts at step `number`, counted from 0; `count` is how many steps there were."""

    def __init__(self, number: int, act: Step) -> None:
        self.count = 0
        self._number = number
        self._act = act

    def __call__(self, name: str, arguments: tuple[Any, ...]) -> None:
        here, self.count = self.count, self.count + 1
        if here == self._number:
            self._act(name, arguments)


def kill(name: str, arguments: tuple[Any, ...]) -> None:
    """SIGKILL to this very process; a write gets half of its bytes onto the disk before."""
    if name == "write":
        fd, data = arguments
        os.pwrite(fd, bytes(data[: len(data) // 2]), 0)
    os.kill(os.getpid(), signal.SIGKILL)


def fail_with(number: int) -> Step:
    """Raise an OSError of this errno."""

    def act(name: str, arguments: tuple[Any, ...]) -> None:
        raise OSError(number, os.strerror(number))

    return act


def killed_at(
    step: int, work: Callable[[], object], *, also: Sequence[tuple[Any, str]] = ()
) -> bool:
    """Do the work in a forked child that is killed at that step; False when it got to the end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with before_each_step(At(step, kill), also=also):
                work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "the work failed by itself"
    return False


def steps_until_killed(steps: Callable[[], Iterable[object]], *, after_s: float) -> int:
    """Take one step after the other in a forked child that is killed then; how many it had taken
    for sure."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for _ in steps():
                os.write(writing, b".")
        finally:
            os._exit(1)
    os.close(writing)
    time.sleep(after_s)  # the moment of the kill is what is random here
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as pipe:
        return len(pipe.read())
