"""What several tests need: waiting for things, what was told, a ledger that is locked, and a Redis
that may be killed."""

import contextlib
import json
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from redis import Redis

from whatsapp_worker import redis_client, redis_server


def eventually(probe: Callable[[], Any], *, within_s: float = 60.0, what: str = "") -> Any:
    """Ask again and again until the answer is true; the last answer, or an AssertionError."""
    deadline = time.monotonic() + within_s
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what or probe} (last: {answer!r})")
        time.sleep(0.01)


def events(redis: "Redis") -> list[dict[str, Any]]:
    """What the stream tells, oldest first; `payload` is read."""
    found = []
    for _, fields in redis.xrange("wa:events"):
        entry = {name.decode(): value.decode() for name, value in fields.items()}
        found.append(entry | {"payload": json.loads(entry["payload"])})
    return found


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Somebody writes to it, and does not come to an end."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        yield


class RedisServer:
    """A redis-server of its own on a Unix socket; it keeps everything on disk."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._socket = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    def start(self) -> "RedisServer":
        """Start it, again after `kill`, and wait until it answers."""
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "everysec",  # what a SIGKILL may not lose is with the kernel by then
            "save": "",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [redis_server.program(), *words], stdout=subprocess.DEVNULL
        )
        client = self.client()
        eventually(lambda: _answers(client), what="redis-server answers")
        client.close()
        return self

    def client(self) -> "Redis":
        return redis_client.connect(self.url)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Silence without a closed socket, until `resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def _answers(client: "Redis") -> bool:
    with contextlib.suppress(Exception):
        return bool(client.ping())
    return False
