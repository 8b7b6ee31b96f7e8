"""The sandbox's media server, with files encrypted as whatsmeow does it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.padding import PKCS7
from hypothesis import given
from hypothesis import strategies as st

from whatsapp_worker.sandbox.media import MAX_FILE_BYTES, Media, MediaUnavailable, e2e
from whatsapp_worker.sandbox.websocket import ProtocolViolation, Request


@pytest.fixture
def media(tmp_path: Path) -> Media:
    return Media(tmp_path / "media")


def encrypted(plaintext: bytes, key: bytes, info: bytes) -> bytes:
    keys = HKDF(algorithm=SHA256(), length=112, salt=None, info=info).derive(key)
    padder = PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES(keys[16:48]), modes.CBC(keys[:16])).encryptor()
    body = encryptor.update(padder.update(plaintext) + padder.finalize()) + encryptor.finalize()
    return body + hmac.digest(keys[48:80], keys[:16] + body, "sha256")[:10]


def upload(media: Media, body: bytes, kind: str = "image") -> dict[str, Any]:
    token = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode()
    answer = media.answer("POST", f"/mms/{kind}/{token}?auth=a&token={token}", body)
    assert answer.status == 200
    told: dict[str, Any] = json.loads(answer.body)
    return told


def describe(part: Any, plaintext: bytes, body: bytes, key: bytes, direct_path: str) -> None:
    part.mediaKey, part.directPath, part.fileLength = key, direct_path, len(plaintext)
    part.fileSHA256 = hashlib.sha256(plaintext).digest()
    part.fileEncSHA256 = hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    ("field", "info"),
    [
        ("imageMessage", b"WhatsApp Image Keys"),
        ("stickerMessage", b"WhatsApp Image Keys"),
        ("videoMessage", b"WhatsApp Video Keys"),
        ("audioMessage", b"WhatsApp Audio Keys"),
        ("documentMessage", b"WhatsApp Document Keys"),
    ],
)
def test_an_uploaded_file_is_opened_with_its_message(media: Media, field: str, info: bytes) -> None:
    plaintext, key = os.urandom(5000), os.urandom(32)
    body = encrypted(plaintext, key, info)
    told = upload(media, body)
    message = e2e.Message()
    describe(getattr(message, field), plaintext, body, key, told["direct_path"])
    assert media.open(message.SerializeToString()) == plaintext

    fetched = media.answer("GET", told["direct_path"] + "&hash=x&mms-type=image&__wa-mms=", b"")
    assert (fetched.status, fetched.body) == (200, body)
    assert told["url"] == "https://mmg.whatsapp.net" + told["direct_path"]


@pytest.mark.parametrize("wrong", ["mediaKey", "fileSHA256", "fileEncSHA256", "fileLength", "path"])
def test_a_file_that_does_not_fit_its_message_is_refused(media: Media, wrong: str) -> None:
    plaintext, key = b"picture", os.urandom(32)
    body = encrypted(plaintext, key, b"WhatsApp Image Keys")
    message = e2e.Message()
    part = message.imageMessage
    describe(part, plaintext, body, key, upload(media, body)["direct_path"])
    if wrong == "path":
        part.directPath = "/v/image/../../etc/passwd"
    elif wrong == "fileLength":
        part.fileLength = 3
    else:
        setattr(part, wrong, bytes(32))
    with pytest.raises(MediaUnavailable):
        media.open(message.SerializeToString())


def test_a_text_has_no_file(media: Media) -> None:
    with pytest.raises(MediaUnavailable):
        media.open(e2e.Message(conversation="hi").SerializeToString())


def test_a_body_under_a_wrong_token_is_refused(media: Media, tmp_path: Path) -> None:
    token = base64.urlsafe_b64encode(bytes(32)).decode()
    assert media.answer("POST", f"/mms/image/{token}", b"body").status == 400
    assert list((tmp_path / "media").iterdir()) == []


def test_what_is_not_stored_is_not_found(media: Media) -> None:
    token = base64.urlsafe_b64encode(bytes(32)).decode()
    assert media.answer("GET", f"/v/image/{token}?ccb=1", b"").status == 404
    assert media.answer("GET", "/anything", b"").status == 404
    assert media.answer("PUT", f"/mms/image/{token}", b"").status == 404


def test_a_deleted_file_is_gone(media: Media) -> None:
    told = upload(media, b"body")
    token = told["direct_path"].split("/")[3].split("?")[0]
    assert media.answer("DELETE", f"/mms/image/{token}?token=x", b"").status == 200
    assert media.answer("GET", told["direct_path"], b"").status == 404


def test_the_oldest_files_make_room(tmp_path: Path) -> None:
    media = Media(tmp_path, max_total_bytes=25)
    paths = []
    for i in range(4):
        paths.append(upload(media, bytes([i]) * 10)["direct_path"])
        stored = tmp_path / paths[-1].split("/")[3].split("?")[0]
        os.utime(stored, ns=(i, i))
        assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert [media.answer("GET", path, b"").status for path in paths] == [404, 404, 200, 200]
    upload(media, b"larger than all the room that there is")
    assert len(list(tmp_path.iterdir())) == 1


def test_files_survive_a_restart_and_torn_ones_are_removed(tmp_path: Path) -> None:
    told = upload(Media(tmp_path), b"body")
    (tmp_path / "x.part").write_bytes(b"half")
    again = Media(tmp_path)
    assert again.answer("GET", told["direct_path"], b"").body == b"body"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_response_is_whole_http(media: Media) -> None:
    told = upload(media, b"body")
    head, _, body = media.answer("GET", told["direct_path"], b"").to_bytes().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"Content-Length: 4" in head
    assert body == b"body"


class Transport:
    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data


def test_a_request_is_answered_once_its_body_is_whole(media: Media) -> None:
    body, transport, buffer, done = b"abc" * 100, Transport(), bytearray(), []
    token = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode()
    request = Request("POST", f"/mms/image/{token}", {"content-length": str(len(body))})
    step = media.step(request, buffer, transport, lambda: done.append(1))  # type: ignore[arg-type]
    buffer += body[:-1]
    assert step() is False and not transport.written
    buffer += body[-1:] + b"GET / HTTP/1.1"
    assert step() is True and done == [1]
    assert transport.written.startswith(b"HTTP/1.1 200 OK")
    assert buffer == b"GET / HTTP/1.1"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-length": "-1"},
        {"content-length": "x"},
        {"content-length": str(MAX_FILE_BYTES + 1)},
        {"transfer-encoding": "chunked"},
    ],
)
def test_a_body_of_unknown_or_huge_size_is_refused(media: Media, headers: dict[str, str]) -> None:
    with pytest.raises(ProtocolViolation):
        media.step(Request("POST", "/", headers), bytearray(), Transport(), int)  # type: ignore[arg-type]


@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT", "x"]),
    target=st.text(max_size=60),
    body=st.binary(max_size=20),
)
def test_any_request_gets_an_answer(
    tmp_path_factory: pytest.TempPathFactory, method: str, target: str, body: bytes
) -> None:
    media = Media(tmp_path_factory.getbasetemp() / "any")
    assert media.answer(method, target, body).status in (200, 400, 404)
