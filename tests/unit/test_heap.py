"""Gaps in the C heap are closed; what a library left mapped is let go, and comes back."""

import ctypes
import subprocess
import sys

import pytest

# A process of its own each: what they do to a heap stays.
GAPS = """
import ctypes
from whatsapp_worker import heap
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = heap._Mallinfo2
libc.malloc.restype = ctypes.c_void_p
pieces = [libc.malloc(ctypes.c_size_t(40 + 56 * (n % 300))) for n in range(2000)]
for piece in pieces[::2]:
    libc.free(ctypes.c_void_p(piece))
def gaps():
    libc.malloc_trim(0)
    info = libc.mallinfo2()
    return info.fordblks - info.keepcost
before = gaps()
heap.close_gaps()
print(before, gaps())
"""

PAGES = """
from whatsapp_worker import neonize_loader
library = neonize_loader.load().gocode
def clean_kib():
    kib, is_library = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            is_library = "/neonize/" in line
        elif is_library and line.startswith(("Rss:", "Anonymous:")):
            kib += int(line.split()[1]) * (1 if line.startswith("Rss:") else -1)
    return kib
pages = neonize_loader.library_pages()
before = clean_kib()
pages.let_go()
print(before, clean_kib(), library.GetVersion().decode().count("."), flush=True)
import os
os._exit(0)
"""


def run(code: str, *words: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_no_free_piece_is_left_between_others() -> None:
    before, after = run(GAPS)
    assert before > 1_000_000
    assert after < 50_000


def test_what_a_library_left_mapped_is_let_go_and_comes_back() -> None:
    before, after, dots = run(PAGES)
    assert before > 8_000
    assert after < before / 2
    assert dots == 2  # of a version that the library was asked for
