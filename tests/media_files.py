"""Small files of every kind, and a web server that hands them out, or misbehaves."""

import http.server
import io
import random
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image


def _image(form: str, **options: object) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (320, 200), (200, 30, 30)).save(made, form, **options)
    return made.getvalue()


def _box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), name) + body


def mp4(seconds: int, brand: bytes = b"isom") -> bytes:
    """An MP4 that says how long it plays, with nothing to play."""
    header = _box(b"mvhd", struct.pack(">IIIII", 0, 0, 0, 1000, seconds * 1000) + bytes(80))
    return (
        _box(b"ftyp", brand + bytes(4) + brand) + _box(b"mdat", b"x" * 99) + _box(b"moov", header)
    )


def ogg(seconds: int, codec: bytes = b"OpusHead\x01\x01") -> bytes:
    """Two pages of an Ogg file; the second says how long it plays."""

    def page(samples: int, body: bytes) -> bytes:
        return b"OggS\0\2" + struct.pack("<qIIIB", samples, 1, 0, 0, 1) + b"\x13" + body

    skipped = 312
    first = page(0, codec + struct.pack("<HI", skipped, 48_000) + bytes(3))
    return first + page(seconds * 48_000 + skipped, b"sound" * 50)


JPEG = _image("JPEG")
PNG = _image("PNG")
WEBP = _image("WEBP")
MP3 = b"ID3\x04" + bytes(600)
WAV = b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + bytes(200)
PDF = b"%PDF-1.7\n" + bytes(range(256)) * 40
HTML = (
    b"<html><head><title>ignored</title><meta property='og:title' content='Offers &amp; more'>"
    b"<meta property='og:description' content='All of May'><meta property='og:image'"
    b" content='/a.jpg'></head><body>x</body></html>"
)

FILES = {
    "/a.jpg": JPEG,
    "/a.png": PNG,
    "/a.webp": WEBP,
    "/a.mp4": mp4(7),
    "/a.ogg": ogg(3),
    "/a.mp3": MP3,
    "/a.wav": WAV,
    "/offer.pdf": PDF,
    "/page": HTML,
    "/empty": b"",
}

BIG = 64 * 1024 * 1024  # bytes of /big and /held, as large as MEDIA_MAX_MIB allows


def big() -> bytes:
    """A large file that no compression makes smaller."""
    return random.Random(1).randbytes(BIG)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: "Web"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name, _, argument = self.path.partition("?")
        if name == "/redirect":
            self._head(302, Location=argument)
        elif name == "/typed":
            self._head(200, Content_Type=argument)
            self._write(b"x")
        elif name == "/slow":
            self._drip()
        elif name == "/hesitant":
            self.server.ending.wait(1.5)
            self._head(200)
            self._write(PDF)
        elif name == "/endless":
            self._head(200)
            self._write(b"%PDF" + bytes(1_000_000), times=1000)
        elif name == "/big":
            self._head(200, Content_Length=str(BIG))
            self._write(bytes(BIG // 32), times=32)
        elif name == "/held":
            whole = big()
            self._head(200, Content_Length=str(BIG))
            self._write(whole[:-1])
            self.server.finishing.wait(60)
            self._write(whole[-1:])
        elif name == "/short":
            self._head(200, Content_Length="1000")
            self._write(b"%PDF only the start")
        elif name == "/gzip":
            self._head(200, Content_Encoding="gzip")
            self._write(b"x")
        elif name in FILES:
            self._head(200, Content_Length=str(len(FILES[name])))
            self._write(FILES[name])
        else:
            self._head(404)

    def _drip(self) -> None:
        """A byte now and then, so that no read ever waits for long."""
        self._head(200, Content_Length="1000000")
        while not self.server.ending.wait(0.05) and self._write(b"x"):
            pass

    def _head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _write(self, data: bytes, times: int = 1) -> bool:
        try:
            for _ in range(times):
                self.wfile.write(data)
            return True
        except OSError:
            return False

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


class Web(http.server.ThreadingHTTPServer):
    """A web server on loopback; `asked` are the paths that it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.ending = threading.Event()
        self.finishing = threading.Event()  # the last byte of /held is given

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what is tested."""


@contextmanager
def web() -> Iterator[Web]:
    """A running web server."""
    server = Web()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        thread.join()
        server.server_close()


def soon(seconds: float) -> float:
    """Monotonic seconds from now."""
    return time.monotonic() + seconds
