"""The media host: keeps what clients upload, and serves it again. In memory, bounded."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from whatsapp_worker.sandbox.queries import MEDIA_HOST
from whatsapp_worker.sandbox.websocket import ProtocolViolation, Request

MAX_FILE_BYTES = 128 << 20
MAX_KEPT_BYTES = 256 << 20


class Media:
    """Uploaded files by the last part of their path; the oldest go first when there are too many."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._kept_bytes = 0

    def step(
        self,
        request: Request,
        buffer: bytearray,
        transport: asyncio.Transport,
        done: Callable[[], None],
    ) -> Callable[[], bool]:
        """A connection's step that waits for the request's body, answers, and calls `done`.

        Raises:
            ProtocolViolation: A body without a length, or of more than 128 MiB.
        """
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_FILE_BYTES:
            raise ProtocolViolation("a body without a length, or of more than 128 MiB")
        size = int(length)

        def wait_for_body() -> bool:
            if len(buffer) < size:
                return False
            body = bytes(buffer[:size])
            del buffer[:size]
            transport.write(self._answer(request, body))
            done()
            return True

        return wait_for_body

    def get(self, token: str) -> bytes | None:
        """What was uploaded under that token, encrypted as it came."""
        return self._files.get(token)

    def _answer(self, request: Request, body: bytes) -> bytes:
        path = urlsplit(request.target).path
        token = path.rpartition("/")[2]
        if request.method == "POST":
            self._keep(token, body)
            url = f"https://{MEDIA_HOST}{path}"
            return _response(200, json.dumps({"url": url, "direct_path": path + "?sandbox=1"}))
        if request.method == "GET" and token in self._files:
            return _response(200, self._files[token])
        return _response(404, "")

    def _keep(self, token: str, body: bytes) -> None:
        self._kept_bytes += len(body) - len(self._files.pop(token, b""))
        self._files[token] = body
        while self._kept_bytes > MAX_KEPT_BYTES:
            self._kept_bytes -= len(self._files.popitem(last=False)[1])


def _response(status: int, body: str | bytes) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    reason = "OK" if status == 200 else "Not Found"
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content
