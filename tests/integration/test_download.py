"""Files from a real web server that misbehaves, and from a folder that others write to."""

import io
import ipaddress
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
import wave
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import imageio_ffmpeg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from media_files import BIG, JPEG, PDF, Web, web
from PIL import Image

from whatsapp_worker import download
from whatsapp_worker.errors import MediaFailed
from whatsapp_worker.media import Media
from whatsapp_worker.settings import Settings


@pytest.fixture
def server() -> Iterator[Web]:
    with web() as made:
        yield made


def fetch(url: str, *, limit: int = 2_000_000, within_s: float = 5, private: bool = True) -> bytes:
    into = io.BytesIO()
    deadline = time.monotonic() + within_s
    download.download(url, into, limit=limit, deadline=deadline, allow_private=private)
    return into.getvalue()


def refusal(url: str, **options: float) -> str:
    with pytest.raises(MediaFailed) as failed:
        fetch(url, **options)  # type: ignore[arg-type]
    return str(failed.value)


def test_redirects_are_followed_and_checked_again(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch(f"{server.url}/redirect?{server.url}/redirect?/offer.pdf") == PDF
    # From here on our web server is the open Internet, and nothing else is.
    inside = f"http://127.0.0.2:{server.server_address[1]}/offer.pdf"
    public = ipaddress.ip_address("127.0.0.1")
    monkeypatch.setattr(download, "is_public", lambda address: address == public)
    assert fetch(f"{server.url}/offer.pdf", private=False) == PDF
    asked = len(server.asked)
    assert "private address" in refusal(f"{server.url}/redirect?{inside}", private=False)
    assert len(server.asked) == asked + 1


def test_a_name_is_resolved_once_and_the_connection_goes_to_what_was_checked(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that gives a public address to the check and a private one to the dial."""
    asked: list[str] = []
    real = socket.getaddrinfo
    port = int(server.server_address[1])

    def rebinding(host: str, *rest: object, **more: object) -> list[object]:
        if host != "rebinding.example":
            return real(host, *rest, **more)  # type: ignore[call-overload, no-any-return]
        asked.append(host)
        address = "127.0.0.2" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert "Refused" in refusal(f"http://rebinding.example:{port}/offer.pdf")
    assert asked == ["rebinding.example"] and server.asked == []


def test_one_private_address_among_public_ones_is_refused(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(2, 1, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert "private address" in refusal("http://both.example/", private=False)


def test_proxies_of_the_environment_are_not_used(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(f"{server.url}/offer.pdf") == PDF


def test_a_type_that_is_none_is_not_passed_on(server: Web) -> None:
    for said, type in (("Text/CSV;charset=x", "text/csv"), ("x" * 9000, ""), ("a/<b>", "")):
        url = f"{server.url}/typed?{said}"
        deadline = time.monotonic() + 5
        found = download.download(url, io.BytesIO(), limit=9, deadline=deadline, allow_private=True)
        assert found == type


def test_what_is_too_long_is_not_read_to_its_end(server: Web) -> None:
    assert "at most 100 are allowed" in refusal(f"{server.url}/offer.pdf", limit=100)
    began = time.monotonic()
    assert "is longer than" in refusal(f"{server.url}/endless", limit=3_000_000)
    assert time.monotonic() - began < 4


def test_a_server_that_sends_a_byte_now_and_then_is_cut_off(server: Web) -> None:
    began = time.monotonic()
    assert refusal(f"{server.url}/slow", within_s=0.5) == "the server took too long"
    assert 0.4 < time.monotonic() - began < 2


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"garbage\r\n\r\n"])
def test_a_server_that_never_finishes_its_head_is_cut_off(says: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.sendall(says)
                while client.recv(1000):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        began = time.monotonic()
        assert refusal(f"http://127.0.0.1:{port}/", within_s=0.5).startswith("the server ")
        assert time.monotonic() - began < 2
        thread.join(5)


def _certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate and its key, as one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def tls(server: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The web server by https, as localhost."""
    path = _certificate(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return f"https://localhost:{server.server_address[1]}"


def test_https_is_checked_against_the_name_in_the_url(tls: str) -> None:
    assert fetch(f"{tls}/offer.pdf") == PDF
    wrong = tls.replace("localhost", "127.0.0.1")
    assert "certificate" in refusal(f"{wrong}/offer.pdf")


def test_https_is_not_left_by_a_redirect(tls: str) -> None:
    plain = tls.replace("https", "http")
    assert "nobody may follow" in refusal(f"{tls}/redirect?{plain}/offer.pdf")


def test_a_server_that_does_not_shake_hands_is_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        assert refusal(url, within_s=0.5) == "the server took too long"
        assert time.monotonic() - began < 2


# Files of MEDIA_DIR


def media(folder: Path, **settings: object) -> Media:
    return Media(folder / "session", Settings(media_dir=folder / "offers", **settings))  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "offers" / "may").mkdir(parents=True)
    (tmp_path / "offers" / "may" / "a.jpg").write_bytes(JPEG)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.jpg").write_bytes(JPEG)
    return tmp_path


def image(file: str) -> dict[str, object]:
    return {"type": "image", "image": {"file": file}}


def test_a_file_is_a_copy_that_is_gone_afterwards(folder: Path) -> None:
    with media(folder).file(image("may/a.jpg")) as file:
        assert file.path.read_bytes() == JPEG
        assert file.path.parent == folder / "session" / "media"
        assert file.path.stat().st_mode & 0o777 == 0o600
        assert (file.name, file.mimetype, file.size) == ("a.jpg", "image/jpeg", len(JPEG))
    assert list((folder / "session" / "media").iterdir()) == []


def test_nothing_leads_out_of_the_folder(folder: Path) -> None:
    offers = folder / "offers"
    (offers / "link.jpg").symlink_to(folder / "secret" / "a.jpg")
    (offers / "out").symlink_to(folder / "secret")
    (offers / "may" / "in.jpg").symlink_to("a.jpg")
    os.mkfifo(offers / "pipe.jpg")
    before = len(os.listdir("/proc/self/fd"))
    for path in ("link.jpg", "out/a.jpg", "../secret/a.jpg", "may/in.jpg", "pipe.jpg", "may", ""):
        with pytest.raises(MediaFailed), media(folder).file(image(path)):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("source", ["link", "file"])
def test_a_file_is_never_whole_in_memory(folder: Path, server: Web, source: str) -> None:
    """Python's memory; what comes afterwards is told in docs/messages.md."""
    (folder / "offers" / "big").write_bytes(bytes(BIG))
    given = f"{server.url}/big" if source == "link" else "big"
    fetched = media(folder, media_allow_private=True)
    tracemalloc.start()
    try:
        with fetched.file({"type": "document", "document": {source: given}}) as file:
            assert file.size == file.path.stat().st_size == BIG
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < BIG / 10, "the test's own server hands out 2 MiB at a time"


def test_each_kind_has_its_own_limit_below_the_setting(folder: Path) -> None:
    limits = {"sticker": 1, "image": 16}
    for kind, mib in limits.items():
        path = folder / "offers" / kind
        path.write_bytes(JPEG)
        os.truncate(path, mib * 1024 * 1024 + 1)
        found = media(folder, media_max_mib=100).file({"type": kind, kind: {"file": kind}})
        reason = f"is longer than the {mib * 1024 * 1024} bytes"
        with pytest.raises(MediaFailed, match=reason), found:
            pass


def test_pictures_that_are_none_or_too_large_to_decode_are_refused(folder: Path) -> None:
    (folder / "offers" / "torn.jpg").write_bytes(JPEG[:300])
    Image.new("1", (6000, 6000)).save(folder / "offers" / "huge.png")
    Image.new("RGB", (6000, 6000)).save(folder / "offers" / "huge.jpg", progressive=True)
    for path, reason in (
        ("torn.jpg", "cannot be decoded|can be decoded"),
        ("huge.png", "too many"),
        ("huge.jpg", "too many"),
    ):
        with pytest.raises(MediaFailed, match=reason), media(folder).file(image(path)):
            pass


# ffmpeg


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose programs come first."""
    made = tmp_path / "tools"
    made.mkdir()
    monkeypatch.setenv("PATH", f"{made}:{os.environ['PATH']}")
    return made


@pytest.fixture
def ffmpeg(tools: Path) -> Path:
    (tools / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    return tools / "ffmpeg"


def voice(folder: Path) -> dict[str, object]:
    with wave.open(str(folder / "offers" / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(2 * 8000 * 3))
    return {"type": "audio", "audio": {"file": "a.wav", "voice": True}}


def test_ffmpeg_makes_a_voice_note_of_other_sound(folder: Path, ffmpeg: Path) -> None:
    with media(folder).file(voice(folder)) as file:
        assert (file.mimetype, file.details) == ("audio/ogg; codecs=opus", {"seconds": 3})
        assert file.path.read_bytes().startswith(b"OggS")


def test_sound_that_is_too_long_for_a_voice_note_is_not_cut_short(
    folder: Path, tools: Path
) -> None:
    """ffmpeg stops a little behind the size that it is told."""
    tool = tools / "ffmpeg"
    tool.write_text('#!/bin/sh\nfor out; do :; done\nhead -c 16780000 /dev/zero > "${out#file:}"\n')
    tool.chmod(0o700)
    with (
        pytest.raises(MediaFailed, match="longer than the 16777216 bytes"),
        media(folder).file(voice(folder)),
    ):
        pass


@pytest.mark.parametrize(
    ("size", "small"),
    [("640x360", (100, 56)), ("360x640", (56, 100)), ("16x2000", (1, 100)), ("5000x5000", None)],
)
def test_ffmpeg_finds_the_first_picture_of_a_film_unless_it_is_huge(
    folder: Path, ffmpeg: Path, size: str, small: tuple[int, int] | None
) -> None:
    made = folder / "offers" / "a.mp4"
    source = f"-v error -f lavfi -i color=red:s={size}:d=0.1 -c:v libx264 -preset ultrafast"
    subprocess.run([ffmpeg, *source.split(), made], check=True, timeout=60)
    with media(folder).file({"type": "video", "video": {"file": "a.mp4"}}) as file:
        assert file.path.read_bytes() == made.read_bytes()
        thumbnail = file.details.get("JPEGThumbnail")
    assert (thumbnail and Image.open(io.BytesIO(thumbnail)).size) == small


@pytest.mark.parametrize(
    "wants",
    [
        f"exec {sys.executable} -c 'import mmap; mmap.mmap(-1, 2 << 30)'",  # memory
        'exec head -c 100000000 /dev/zero > "$out"',  # disk
        "exec sleep 60",  # time
    ],
)
def test_what_ffmpeg_may_take_is_bounded(folder: Path, tools: Path, wants: str) -> None:
    sound = voice(folder)
    (tools / "ffmpeg").write_text(
        f"#!/bin/sh\nfor last; do :; done; out=${{last#file:}}; echo OggS > $out\n{wants}\n"
    )
    (tools / "ffmpeg").chmod(0o700)
    began = time.monotonic()
    with (
        pytest.raises(MediaFailed, match="ffmpeg could not make"),
        media(folder, media_timeout_s=2.0).file(sound),
    ):
        pass
    assert time.monotonic() - began < 30
    assert list((folder / "session" / "media").iterdir()) == []


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    place = folder / "session" / "media"
    place.mkdir(parents=True)
    (place / "left").write_bytes(b"x")
    media(folder).clean()
    assert not place.exists()
    media(folder).clean()
