"""A PostgreSQL for tests: TEST_DATABASE_URL, else one started here, else the one of this host."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psycopg
import pytest

LOCAL = "postgresql://127.0.0.1:5432/postgres"
HOW = (
    "PostgreSQL is not there: install its server (initdb and postgres, Debian: postgresql), run"
    " one on 127.0.0.1:5432, or set TEST_DATABASE_URL"
)


class Server:
    """A PostgreSQL server of our own that a test may stop, freeze and start again."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries = binaries
        self._folder = folder
        self._user = "nobody" if os.geteuid() == 0 else None  # postgres refuses to run as root
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self._port = sock.getsockname()[1]
        self.url = f"postgresql://tester@127.0.0.1:{self._port}/postgres"
        if self._user:
            shutil.chown(folder, self._user)
        arguments = ["-D", "pg", "-U", "tester", "-A", "trust", "-N", "--no-locale", "-E", "UTF8"]
        subprocess.run(
            [binaries / "initdb", *arguments],
            cwd=folder,
            user=self._user,
            check=True,
            capture_output=True,
        )

    def start(self) -> None:
        options = f"-p {self._port} -h 127.0.0.1 -k {self._folder} -c shared_buffers=16MB"
        self._process = subprocess.Popen(
            [self._binaries / "postgres", "-D", "pg", *options.split(), "-c", "fsync=off"],
            cwd=self._folder,
            user=self._user,
            start_new_session=True,
            preexec_fn=_end_with_parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, "PostgreSQL did not start"
                time.sleep(0.05)

    def stop(self, how: str = "fast") -> None:
        """Every connection ends; after "immediate" the next start recovers, as from a crash."""
        if self._process is not None:
            self._process.send_signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[how])
            self._process.wait(30)
            self._process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The server answers nothing, though its connections stay open."""
        processes = self._group()
        try:
            _send_all(processes, signal.SIGSTOP)
            yield
        finally:
            _send_all(processes, signal.SIGCONT)

    def _group(self) -> list[int]:
        assert self._process is not None
        import psutil

        parent = psutil.Process(self._process.pid)
        return [parent.pid, *(child.pid for child in parent.children(recursive=True))]


def _send_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a connection that has just ended
            os.kill(pid, number)


def _end_with_parent() -> None:
    """A killed test run leaves no server behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


def missing(how: str = HOW) -> NoReturn:
    """Fail in CI, skip on a laptop; says how to get it."""
    if os.environ.get("CI") == "true":
        pytest.fail(how)
    pytest.skip(how)


def binaries() -> Path | None:
    """Where initdb and postgres lie."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found := shutil.which("initdb"):
        folders.insert(0, Path(found).parent)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    return None


@contextlib.contextmanager
def own_server() -> Iterator[Server | None]:
    """A started server of our own; None where its programs are not installed."""
    found = binaries()
    if found is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        server = Server(found, Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()


def reachable(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


@contextlib.contextmanager
def fresh_schema(url: str, name: str) -> Iterator[str]:
    """A URL whose tables are seen by nobody else; they are dropped afterwards."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")
        connection.execute(f"CREATE SCHEMA {name}")
    yield f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{name}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")
