"""What a file is, by its first bytes, and what WhatsApp takes: pure, over bytes from strangers.

Neither a file's name nor a server's Content-Type is believed.
"""

import struct
from typing import BinaryIO

MIB = 1024 * 1024
HEAD = 4096  # bytes that `sniff` looks at
OPUS = "audio/ogg; codecs=opus"

# MiB of each kind, WhatsApp's own; MEDIA_MAX_MIB is the limit of all kinds.
LIMITS_MIB = {"image": 16, "video": 100, "audio": 16, "document": 100, "sticker": 1}

# What phones show; the Cloud API takes the same.
TAKEN = {
    "image": ("image/jpeg", "image/png"),
    "video": ("video/mp4", "video/3gpp"),
    "audio": ("audio/aac", "audio/amr", "audio/mpeg", "audio/mp4", OPUS),
    "sticker": ("image/webp",),
}

# ffmpeg's readers of what it may make a voice note of. Named, so that a file that pretends to be
# a playlist is not read as one.
DEMUXERS = {
    "audio/aac": "aac",
    "audio/amr": "amr",
    "audio/flac": "flac",
    "audio/mp4": "mov",
    "audio/mpeg": "mp3",
    "audio/ogg": "ogg",
    "audio/wav": "wav",
    "video/3gpp": "mov",
    "video/mp4": "mov",
    "video/webm": "matroska",
}

_PREFIXES = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF8", "image/gif"),
    (b"#!AMR", "audio/amr"),
    (b"ID3", "audio/mpeg"),
    (b"fLaC", "audio/flac"),
    (b"\x1aE\xdf\xa3", "video/webm"),
    (b"%PDF-", "application/pdf"),
)
_RIFF = {b"WEBP": "image/webp", b"WAVE": "audio/wav", b"AVI ": "video/x-msvideo"}
_BRANDS = {
    b"M4A": "audio/mp4",
    b"M4B": "audio/mp4",
    b"3gp": "video/3gpp",
    b"3g2": "video/3gpp",
    b"qt ": "video/quicktime",
    b"avi": "image/avif",
    b"hei": "image/heic",
    b"hev": "image/heic",
    b"mif": "image/heic",
}


def sniff(head: bytes) -> str | None:
    """The media type of a file that begins so; None when it is none of those known here."""
    for prefix, found in _PREFIXES:
        if head.startswith(prefix):
            return found
    if head.startswith(b"RIFF"):
        return _RIFF.get(head[8:12])
    if head.startswith(b"OggS"):
        return OPUS if b"OpusHead" in head[:128] else "audio/ogg"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:11], "video/mp4")
    if len(head) > 1 and head[0] == 0xFF:
        return _mpeg_audio(head[1])
    return None


def _mpeg_audio(second: int) -> str | None:
    if second & 0xF6 == 0xF0:
        return "audio/aac"
    return "audio/mpeg" if second & 0xE0 == 0xE0 and second & 0x06 else None


def taken_as(kind: str, sniffed: str | None) -> str | None:
    """The media type to say in a message of that kind; None when WhatsApp would not take it."""
    if kind == "audio" and sniffed == "video/mp4":
        sniffed = "audio/mp4"  # the container tells no sound from a film
    return sniffed if sniffed in TAKEN[kind] else None


def is_animated(head: bytes) -> bool:
    """Whether a WebP is an animation."""
    return head[12:16] == b"VP8X" and len(head) > 20 and bool(head[20] & 2)


def opus_seconds(file: BinaryIO, size: int) -> int | None:
    """How long an Ogg Opus file plays; None when it does not say."""
    start = file.read(128)
    at = start.find(b"OpusHead")
    file.seek(max(0, size - 65_536))
    end = file.read(65_536)
    last = end.rfind(b"OggS")
    if at < 0 or last < 0 or len(end) < last + 14 or len(start) < at + 12:
        return None
    (skipped,) = struct.unpack_from("<H", start, at + 10)
    (samples,) = struct.unpack_from("<q", end, last + 6)
    seconds = (samples - skipped) // 48_000
    return seconds if 0 <= seconds < 100_000 else None


def mp4_seconds(file: BinaryIO, size: int) -> int | None:
    """How long an MP4 plays; None when it does not say."""
    header = _box(file, 0, size, b"moov")
    header = header and _box(file, *header, b"mvhd")
    if not header:
        return None
    file.seek(header[0])
    body = file.read(32)
    form, at = (">IQ", 20) if body[:1] == b"\x01" else (">II", 12)
    if len(body) < 32:
        return None
    scale, duration = struct.unpack_from(form, body, at)
    seconds = duration // scale if scale else 0
    return seconds if 0 < seconds < 100_000 else None


def _box(file: BinaryIO, at: int, end: int, wanted: bytes) -> tuple[int, int] | None:
    """Where the content of a box begins and ends; looks at the first hundred."""
    for _ in range(100):
        file.seek(at)
        head = file.read(16)
        if at + 8 > end or len(head) < 8:
            return None
        length, name = struct.unpack_from(">I4s", head)
        start = at + 8
        if length == 1 and len(head) == 16:
            (length,) = struct.unpack_from(">Q", head, 8)
            start += 8
        if name == wanted:
            return start, min(end, at + length) if length else end
        if length < 8 or length > end:
            return None
        at += length
    return None
