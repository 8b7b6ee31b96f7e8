"""What Linux offers to keep a family of processes together; each is a no-op elsewhere."""

import contextlib
import ctypes
import fcntl
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_TIMERSLACK = 29
_PR_SET_CHILD_SUBREAPER = 36

# How a crash begins that no Python handler sees: Go's, Python's own, C++'s.
_CRASH = re.compile(
    rb"^(panic: |fatal error: |SIG[A-Z]+: |Fatal Python error: |terminate called)", re.MULTILINE
)
_CRASH_LINES = 40
_CRASH_BYTES = 4000
_OUTPUT_MAX = 1 << 20

_FILES_BASE = 128
_FILES_A_SESSION = 8  # of the supervisor; a device process alone needs fewer than _FILES_BASE


def _prctl(option: int, argument: int | bytes) -> bool:
    if sys.platform != "linux":
        return False
    value = argument if isinstance(argument, bytes) else ctypes.c_ulong(argument)
    return int(ctypes.CDLL(None).prctl(option, value, 0, 0, 0)) == 0


def adopt_orphans() -> bool:
    """Become the parent of grandchildren whose parent dies, so that they can be reaped."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_name(name: str) -> bool:
    """Name this process (15 bytes are kept) as `ps -o comm` and `top` show it."""
    return _prctl(_PR_SET_NAME, name.encode()[:15] + b"\0")


def open_files_needed(sessions: int) -> int:
    """How many files a supervisor of so many sessions has open at most."""
    return _FILES_BASE + _FILES_A_SESSION * sessions


def raise_open_files(count: int) -> None:
    """Raise this process's limit of open files to `count`, as far as the hard limit lets it, and
    never lower it; children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


@contextlib.contextmanager
def late_timers(slack_s: float) -> Iterator[None]:
    """Threads that this one begins meanwhile, and those that they begin, may be woken so much later
    from a sleep than they asked for; what else wakes them does so at once."""
    _prctl(_PR_SET_TIMERSLACK, int(slack_s * 1e9))
    try:
        yield
    finally:
        _prctl(_PR_SET_TIMERSLACK, 0)  # as it was when this thread began


def output_file() -> int:
    """A file in memory to be the stderr of a child's native libraries; gone with its last user."""
    descriptor = os.memfd_create("stderr")
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    return descriptor


def keep_small(descriptor: int) -> None:
    """Empty an output file that has grown beyond a MiB."""
    if os.fstat(descriptor).st_size > _OUTPUT_MAX:
        os.ftruncate(descriptor, 0)


def last_words(descriptor: int) -> str:
    """How the crash began that an output file tells of; empty when it tells of none."""
    text = os.pread(descriptor, 2 * _OUTPUT_MAX, 0)
    crash = _CRASH.search(text)
    if crash is None:
        return ""
    words = text[crash.start() :][:_CRASH_BYTES].decode(errors="replace")
    return "\n".join(words.splitlines()[:_CRASH_LINES])


def start_bound(
    command: Sequence[str], *, environ: Mapping[str, str], output: "int | IO[bytes]" = 2
) -> "subprocess.Popen[bytes]":
    """Start a program that gets SIGTERM when the calling thread ends, however that happens.

    Call it on a thread that lives as long as the program should (the main thread): Linux watches
    the thread that forked. The program gets a session of its own, so that Ctrl-C in a terminal
    reaches only its owner.

    Args:
        output: Where its stdout and stderr go; our stderr without it.
    """
    wrapper = [sys.executable, "-m", "whatsapp_worker.process", str(os.getpid()), *command]
    return subprocess.Popen(
        wrapper,
        env=importable(environ),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def importable(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment, with this package on PYTHONPATH: it may run from a folder not installed."""
    here = str(Path(__file__).resolve().parent.parent)
    paths = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if here not in paths:
        paths.append(here)
    return {**environ, "PYTHONPATH": os.pathsep.join(paths)}


def _become(parent: int, command: Sequence[str]) -> None:
    """Turn into the program, bound to the parent; gone at once if the parent is gone already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died between the fork and the prctl
        sys.exit(1)
    os.execvp(command[0], list(command))


def lock_holders(path: Path) -> list[int]:
    """The processes that hold an flock on this file; none where the system does not say.

    A process in another container shows as pid 0 there and is left out.
    """
    try:
        status = path.stat()
        locks = Path("/proc/locks").read_text()
    except OSError:
        return []
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    rows = (line.split() for line in locks.splitlines())
    return [
        int(row[4])
        for row in rows
        if len(row) > 5 and row[1] == "FLOCK" and row[5] == wanted and int(row[4]) > 0
    ]


def is_alive(pid: int) -> bool:
    """Whether a process of this id exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def command_line(pid: int) -> str:
    """The command line of a process; empty when it is gone."""
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    return ""


def working_folder(pid: int) -> Path | None:
    """Where a process works; None when it is gone, or another user's."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cwd").readlink()
    return None


def end(process: "subprocess.Popen[bytes]", *, timeout_s: float) -> bool:
    """SIGTERM, wait, SIGKILL; whether it went without the SIGKILL."""
    deadline = time.monotonic() + timeout_s
    process.terminate()
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it sleeps where nothing wakes it
            process.wait(1.0)
        return False
    return True


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
