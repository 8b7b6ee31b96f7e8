"""A Sentry ingest endpoint on loopback that keeps what it is sent."""

import contextlib
import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Ingest:
    """Answers on a free port between `start` and `close`.

    Attributes:
        events: The decoded events, in the order of their arrival.
        raw: The bodies as they came, unzipped: for looking for what must not travel.
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

    def await_events(self, count: int, *, within_s: float = 10) -> list[dict[str, Any]]:
        """The events once there are so many."""
        deadline = time.monotonic() + within_s
        while len(self.events) < count:
            assert time.monotonic() < deadline, f"{len(self.events)} of {count} events arrived"
            time.sleep(0.01)
        return self.events

    def _take(self, body: bytes) -> None:
        self.raw.append(body)
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
                ingest.asked += 1
                ingest._closing.wait(ingest.hang_s)
                if ingest.status == 200:
                    ingest._take(body)
                with contextlib.suppress(OSError):  # the client has given up
                    self.send_response(ingest.status)
                    self.send_header("Content-Length", "2")
                    self.end_headers()
                    self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        return Handler
