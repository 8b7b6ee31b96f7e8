"""What native libraries wrote as they fell; threads whose timers may be late."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator

import pytest

from whatsapp_worker import process

PANIC = """\
panic: runtime error: invalid memory address or nil pointer dereference
[signal SIGSEGV: segmentation violation code=0x1 addr=0x0 pc=0x7f2a]

goroutine 51 [running]:
"""


@pytest.fixture
def output() -> Iterator[int]:
    descriptor = process.output_file()
    yield descriptor
    os.close(descriptor)


def test_the_last_words_begin_where_the_crash_does(output: int) -> None:
    os.write(output, b"Press Ctrl+C to exit\n" + PANIC.encode())
    assert process.last_words(output) == PANIC.rstrip()


def test_chatter_is_no_crash(output: int) -> None:
    os.write(output, b"Press Ctrl+C to exit\nsaid panic: in the middle of a line\n")
    assert process.last_words(output) == ""


def test_a_long_crash_is_cut(output: int) -> None:
    os.write(output, b"fatal error: concurrent map writes\n" + b"main.go:1 \xff\n" * 100_000)
    words = process.last_words(output)
    assert words.startswith("fatal error: concurrent map writes\n")
    assert len(words.splitlines()) == 40


def test_an_output_file_stays_small(output: int) -> None:
    process.keep_small(output)
    os.write(output, b"x" * (2 << 20))
    process.keep_small(output)
    os.write(output, PANIC.encode())
    assert os.fstat(output).st_size == len(PANIC)
    assert process.last_words(output).startswith("panic: ")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a timer slack")
def test_threads_begun_meanwhile_have_late_timers_and_no_others() -> None:
    before = slack_ns()
    found: list[int] = []
    inner = threading.Thread(target=lambda: found.append(slack_ns()))
    outer = threading.Thread(target=lambda: (inner.start(), found.append(slack_ns())))
    with process.late_timers(0.001):
        outer.start()
    outer.join()
    inner.join()
    assert found == [1_000_000] * 2
    assert slack_ns() == before != 1_000_000


def slack_ns() -> int:
    """Of the calling thread: PR_GET_TIMERSLACK of prctl(2)."""
    return int(ctypes.CDLL(None).prctl(30, 0, 0, 0, 0))
