"""A Sentry ingest endpoint on loopback that keeps what it is sent, and looks through all of it."""

import contextlib
import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEXT = "meet me at the old harbour"  # of messages; it must never arrive here
_NEVER = {"breadcrumbs", "vars", "request", "user", "modules", "sys.argv"}
_IDS = re.compile(r"\b([0-9a-f]{16}|[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})\b")


class Ingest:
    """Answers on a free port between `start` and `close`.

    Attributes:
        events: The decoded events that it took, in the order of their arrival.
        raw: All bodies as they came, unzipped.
        asked: How many requests came, answered or not.
        status: What it answers with.
        hang_s: How long it waits before it answers.
    """

    def __init__(self, *, port: int = 0) -> None:
        self.events: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.asked = 0
        self.status = 200
        self.hang_s = 0.0
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.dsn = f"http://public@127.0.0.1:{self.port}/1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def start(self) -> "Ingest":
        self._thread.start()
        return self

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self.look_through()

    def look_through(self) -> None:
        """Only alerts of ours came, and nothing private in them.

        Raises:
            AssertionError: Something else did: a message's text, a phone number, a log line,
                variables of a stack, an event that no alert of ours is.
        """
        for event in list(self.events):
            tags = event.get("tags", {})
            assert tags.get("event") and event["server_name"] == tags["host"], event
        for body in list(self.raw):
            assert TEXT.encode() not in body
            for path, value in _leaves([json.loads(line) for line in body.split(b"\n") if line]):
                assert not _NEVER & set(path), (path, value)
                number = not isinstance(value, float) and re.search(
                    r"\d{7}", _IDS.sub("", f"{path[-1]} {value}")
                )
                assert not number, (path, value)

    def await_events(self, count: int, *, within_s: float = 10) -> list[dict[str, Any]]:
        """The events once there are so many."""
        deadline = time.monotonic() + within_s
        while len(self.events) < count:
            assert time.monotonic() < deadline, f"{len(self.events)} of {count} events arrived"
            time.sleep(0.01)
        return self.events

    def _take(self, body: bytes) -> None:
        _, *rest = body.split(b"\n")
        for header, payload in zip(rest[::2], rest[1::2], strict=False):
            if header and json.loads(header).get("type") == "event":
                self.events.append(json.loads(payload))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        ingest = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                ingest.raw.append(body)
                ingest.asked += 1
                ingest._closing.wait(ingest.hang_s)
                if ingest.status == 200:
                    ingest._take(body)
                with contextlib.suppress(OSError):  # the client has given up
                    self.send_response(ingest.status)
                    self.send_header("Content-Length", "2")
                    self.send_header("Retry-After", "1")  # with 429
                    self.end_headers()
                    self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        return Handler


def _leaves(value: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of JSON data that holds no others, and the keys that lead to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list):
            yield from _leaves(item, *path, str(key))
        else:
            yield (*path, str(key)), item
