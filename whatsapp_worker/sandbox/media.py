"""The sandbox's media server: keeps what clients upload, and opens it for tests.

A client encrypts a file, uploads it under the hash of the ciphertext and puts the key into the
message. So anyone who holds the message can open the file, as a contact's phone does.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from whatsapp_worker.sandbox import protobufs
from whatsapp_worker.sandbox.websocket import ProtocolViolation, Request

e2e = protobufs.load("waE2E.WAWebProtobufsE2E_pb2")

HOST = "mmg.whatsapp.net"
MAX_FILE_BYTES = 128 * 1024 * 1024  # of ciphertext; WhatsApp takes documents of 100 MB
MAX_TOTAL_BYTES = 1024 * 1024 * 1024  # then the oldest files go

_UPLOAD = re.compile(r"/(?:mms|newsletter)/([a-z-]{1,40})/([A-Za-z0-9_-]{43}=)")
_DOWNLOAD = re.compile(r"/v/([a-z-]{1,40})/([A-Za-z0-9_-]{43}=)")
_MAC_BYTES = 10
_KEYS = {
    "imageMessage": b"WhatsApp Image Keys",
    "stickerMessage": b"WhatsApp Image Keys",
    "videoMessage": b"WhatsApp Video Keys",
    "ptvMessage": b"WhatsApp Video Keys",
    "audioMessage": b"WhatsApp Audio Keys",
    "documentMessage": b"WhatsApp Document Keys",
}


class MediaUnavailable(Exception):
    """A message's file cannot be opened: no media in it, not (or no longer) stored, or damaged."""


class Answer(NamedTuple):
    """An HTTP response, to be sent as it is."""

    status: int
    body: bytes
    content_type: str

    def to_bytes(self) -> bytes:
        """The whole response; the connection may stay open."""
        head = (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n"
            f"Content-Type: {self.content_type}\r\nContent-Length: {len(self.body)}\r\n\r\n"
        )
        return head.encode() + self.body


class Media:
    """The files of one sandbox.

    Args:
        folder: Made (0700) when missing.
        max_total_bytes: Beyond this the oldest files are removed.
    """

    def __init__(self, folder: Path, *, max_total_bytes: int = MAX_TOTAL_BYTES) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._max_total_bytes = max_total_bytes
        for torn in folder.glob("*.part"):
            torn.unlink()

    def answer(self, method: str, target: str, body: bytes) -> Answer:
        """Answer one HTTP request to a media host.

        Args:
            method: POST stores, GET fetches, DELETE forgets.
            target: The request target: path and query.
            body: The whole body, at most MAX_FILE_BYTES.
        """
        path = target.partition("?")[0]
        uploaded, stored = _UPLOAD.fullmatch(path), _DOWNLOAD.fullmatch(path)
        if method == "POST" and uploaded:
            return self._store(uploaded[1], uploaded[2], body)
        if method == "DELETE" and uploaded:
            (self._folder / uploaded[2]).unlink(missing_ok=True)
            return _told({})
        if method == "GET" and stored:
            return self._fetch(stored[2])
        return _told({"error": "no such resource"}, HTTPStatus.NOT_FOUND)

    def step(
        self,
        request: Request,
        buffer: bytearray,
        transport: asyncio.Transport,
        done: Callable[[], None],
    ) -> Callable[[], bool]:
        """How a connection goes on after the head of a request.

        Returns:
            A step: False while the body in `buffer` is not whole; else it answers, calls `done`
            and says True.

        Raises:
            ProtocolViolation: A body without a length, or of more than MAX_FILE_BYTES.
        """
        length = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers or not re.fullmatch("[0-9]{1,12}", length):
            raise ProtocolViolation("a body without a length")
        size = int(length)
        if size > MAX_FILE_BYTES:
            raise ProtocolViolation(f"a file of more than {MAX_FILE_BYTES} bytes")

        def answer_when_whole() -> bool:
            if len(buffer) < size:
                return False
            body = bytes(memoryview(buffer)[:size])
            del buffer[:size]
            transport.write(self.answer(request.method, request.target, body).to_bytes())
            done()
            return True

        return answer_when_whole

    def open(self, content: bytes) -> bytes:
        """The file that a message points at, decrypted and checked as its receiver would.

        Args:
            content: A serialized `waE2E.Message` (`Received.content`).

        Raises:
            MediaUnavailable: It has no file, or the file is not stored, or does not fit the key.
        """
        message = e2e.Message.FromString(content)
        for name, info in _KEYS.items():
            if message.HasField(name):
                return self._open(getattr(message, name), info)
        raise MediaUnavailable("the message has no file")

    def _open(self, media: Any, info: bytes) -> bytes:
        found = _DOWNLOAD.fullmatch(media.directPath.partition("?")[0])
        path = self._folder / found[2] if found else None
        if path is None or not path.exists():
            raise MediaUnavailable("the file is not stored here")
        encrypted = path.read_bytes()
        if hashlib.sha256(encrypted).digest() != media.fileEncSHA256:
            raise MediaUnavailable("the ciphertext has another hash than the message says")
        plaintext = _decrypted(encrypted, media.mediaKey, info)
        if hashlib.sha256(plaintext).digest() != media.fileSHA256:
            raise MediaUnavailable("the file has another hash than the message says")
        if len(plaintext) != media.fileLength:
            raise MediaUnavailable("the file has another length than the message says")
        return plaintext

    def _store(self, kind: str, token: str, body: bytes) -> Answer:
        if base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode() != token:
            return _told({"error": "the token is not the hash of the file"}, HTTPStatus.BAD_REQUEST)
        part = self._folder / f"{token}.part"
        with open(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
            file.write(body)
        part.rename(self._folder / token)
        self._make_room()
        direct_path = f"/v/{kind}/{token}?ccb=1"  # clients append their own query with "&"
        return _told({"url": f"https://{HOST}{direct_path}", "direct_path": direct_path})

    def _fetch(self, token: str) -> Answer:
        try:
            body = (self._folder / token).read_bytes()
        except FileNotFoundError:
            return _told({"error": "not stored"}, HTTPStatus.NOT_FOUND)
        return Answer(HTTPStatus.OK, body, "application/octet-stream")

    def _make_room(self) -> None:
        """Remove the oldest files, but never the one just stored."""
        files = sorted(
            ((path.stat(), path) for path in self._folder.iterdir()),
            key=lambda file: file[0].st_mtime_ns,
        )
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in files[:-1]:
            if total <= self._max_total_bytes:
                return
            path.unlink()
            total -= stat.st_size


def _told(facts: dict[str, str], status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return Answer(status, json.dumps(facts).encode(), "application/json")


def _decrypted(encrypted: bytes, media_key: bytes, info: bytes) -> bytes:
    keys = HKDF(algorithm=SHA256(), length=112, salt=None, info=info).derive(media_key)
    iv, cipher_key, mac_key = keys[:16], keys[16:48], keys[48:80]
    ciphertext, mac = encrypted[:-_MAC_BYTES], encrypted[-_MAC_BYTES:]
    if not hmac.compare_digest(mac, hmac.digest(mac_key, iv + ciphertext, "sha256")[:_MAC_BYTES]):
        raise MediaUnavailable("the key of the message does not fit the file")
    decryptor = Cipher(algorithms.AES(cipher_key), modes.CBC(iv)).decryptor()
    padded = decryptor.update(ciphertext) + decryptor.finalize()
    return padded[: -padded[-1]]
