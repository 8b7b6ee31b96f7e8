"""HTTP heads and WebSocket frames, the server's side. Pure."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

MAX_HEAD_BYTES = 16 * 1024
MAX_MESSAGE_BYTES = 1 << 25
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


class ProtocolViolation(Exception):
    """The other side sent what no client may send; the connection is of no more use."""


@dataclass(frozen=True)
class Request:
    """The head of an HTTP/1.1 request; header names in lower case."""

    method: str
    target: str
    headers: dict[str, str]


def read_head(buffer: bytearray) -> Request | None:
    """Take one request head off the buffer; None while it is not whole.

    Raises:
        ProtocolViolation: No HTTP, or more than 16 KiB of it.
    """
    end = buffer.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
    if end < 0:
        if len(buffer) >= MAX_HEAD_BYTES:
            raise ProtocolViolation("a head of more than 16 KiB")
        return None
    lines = buffer[:end].decode("latin-1").split("\r\n")
    del buffer[: end + 4]
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise ProtocolViolation("no HTTP request")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon:
            raise ProtocolViolation("no HTTP header")
        headers[name.strip().lower()] = value.strip()
    return Request(parts[0], parts[1], headers)


def upgrade(request: Request) -> bytes:
    """The answer that turns a request into a WebSocket.

    Raises:
        ProtocolViolation: The request asks for no WebSocket.
    """
    key = request.headers.get("sec-websocket-key")
    if request.headers.get("upgrade", "").lower() != "websocket" or not key:
        raise ProtocolViolation("no WebSocket request")
    accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def frame(payload: bytes, opcode: int = BINARY) -> bytes:
    """One unmasked, final frame."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, size))
    elif size < 1 << 16:
        head = bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big")
    return head + payload


def read_frame(buffer: bytearray) -> tuple[int, bytes] | None:
    """Take one client frame off the buffer as (opcode, payload); None while it is not whole.

    Fragments come out as they are, the later ones with opcode 0: what flows inside is a byte
    stream with lengths of its own.

    Raises:
        ProtocolViolation: Not masked, reserved bits set, or larger than 32 MiB.
    """
    if len(buffer) < 6:
        return None
    first, second = buffer[0], buffer[1]
    if not second & 0x80 or first & 0x70:
        raise ProtocolViolation("no client frame")
    size, start = second & 0x7F, 2
    if size == 126:
        size, start = int.from_bytes(buffer[2:4], "big"), 4
    elif size == 127:
        if len(buffer) < 10:
            return None
        size, start = int.from_bytes(buffer[2:10], "big"), 10
    if size > MAX_MESSAGE_BYTES:
        raise ProtocolViolation("a frame of more than 32 MiB")
    end = start + 4 + size
    if len(buffer) < end:
        return None
    payload = _unmask(bytes(buffer[start : start + 4]), bytes(buffer[start + 4 : end]))
    del buffer[:end]
    return first & 0x0F, payload


def _unmask(mask: bytes, masked: bytes) -> bytes:
    size = len(masked)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(masked, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")
