"""Files known by their bytes, pages read for previews: whatever strangers put into them."""

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import FILES, HTML, JPEG, MP3, PDF, PNG, WAV, WEBP, mp4, ogg

from whatsapp_worker import media_types, page
from whatsapp_worker.content import is_link
from whatsapp_worker.media_types import OPUS, sniff, taken_as


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (JPEG, "image/jpeg"),
        (PNG, "image/png"),
        (WEBP, "image/webp"),
        (b"GIF89a", "image/gif"),
        (mp4(1), "video/mp4"),
        (mp4(1, b"3gp5"), "video/3gpp"),
        (mp4(1, b"qt  "), "video/quicktime"),
        (mp4(1, b"M4A "), "audio/mp4"),
        (mp4(1, b"heic"), "image/heic"),
        (ogg(1), OPUS),
        (ogg(1, b"\x01vorbis\0\0\0"), "audio/ogg"),
        (MP3, "audio/mpeg"),
        (b"\xff\xfb\x90\x00", "audio/mpeg"),
        (b"\xff\xf1\x50\x80", "audio/aac"),
        (b"#!AMR\n", "audio/amr"),
        (WAV, "audio/wav"),
        (PDF, "application/pdf"),
        (b"#!/bin/sh", None),
        (b"<html>", None),
        (b"\xff", None),
        (b"", None),
    ],
)
def test_a_file_is_known_by_its_first_bytes(head: bytes, found: str | None) -> None:
    assert sniff(head) == found


def test_whatsapp_takes_some_types_of_each_kind() -> None:
    assert taken_as("image", "image/png") == "image/png"
    assert taken_as("image", "image/webp") is None
    assert taken_as("audio", "video/mp4") == "audio/mp4"
    assert taken_as("video", "audio/mp4") is None
    assert taken_as("sticker", None) is None
    for kind, types in media_types.TAKEN.items():
        assert all(taken_as(kind, type) == type for type in types)


def test_films_and_voice_notes_say_how_long_they_play() -> None:
    for seconds in (1, 59, 3600):
        film, voice = mp4(seconds), ogg(seconds)
        assert media_types.mp4_seconds(io.BytesIO(film), len(film)) == seconds
        assert media_types.opus_seconds(io.BytesIO(voice), len(voice)) == seconds
    assert media_types.mp4_seconds(io.BytesIO(PDF), len(PDF)) is None
    assert media_types.opus_seconds(io.BytesIO(PDF), len(PDF)) is None


def box(name: bytes, content: bytes, *, is_long: bool = False) -> bytes:
    """Of an MP4; the long form has its length in 64 bits."""
    if is_long:
        return struct.pack(">I4sQ", 1, name, 16 + len(content)) + content
    return struct.pack(">I4s", 8 + len(content), name) + content


@pytest.mark.parametrize("is_long", [False, True])
def test_a_film_is_measured_whatever_the_width_of_its_numbers(is_long: bool) -> None:
    header = struct.pack(">B3xQQIQ", 1, 7, 8, 1000, 90_500) + bytes(80)  # version 1
    moov = box(b"moov", box(b"udta", b"x") + box(b"mvhd", header, is_long=is_long))
    film = box(b"ftyp", b"isom") + box(b"mdat", bytes(1000), is_long=is_long) + moov
    assert media_types.mp4_seconds(io.BytesIO(film), len(film)) == 90
    assert media_types.mp4_seconds(io.BytesIO(film[:-100]), len(film)) is None


def test_what_an_opus_file_skips_at_its_start_is_not_played() -> None:
    voice = bytearray(ogg(2))
    struct.pack_into(
        "<H", voice, voice.find(b"OpusHead") + 10, 313
    )  # one more than its end allows for
    assert media_types.opus_seconds(io.BytesIO(voice), len(voice)) == 1


@pytest.mark.parametrize(("flags", "is_animated"), [(0x02, True), (0x12, True), (0x10, False)])
def test_an_animated_sticker_is_known_by_its_flags(flags: int, is_animated: bool) -> None:
    head = b"RIFF\0\0\0\0WEBPVP8X\n\0\0\0" + bytes([flags])
    assert media_types.is_animated(head) is is_animated
    assert not media_types.is_animated(head[:-1])
    assert not media_types.is_animated(head.replace(b"VP8X", b"VP8L"))


_DAMAGED = st.sampled_from([*FILES.values(), mp4(9, b"qt  ")]).flatmap(
    lambda file: st.builds(
        lambda at, piece: file[:at] + piece + file[at + len(piece) :],
        st.integers(0, max(1, min(len(file), 200))),
        st.binary(max_size=8),
    )
)


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=300) | _DAMAGED)
def test_no_file_confuses_those_who_look_at_it(data: bytes) -> None:
    sniff(data)
    media_types.is_animated(data)
    for read in (media_types.mp4_seconds, media_types.opus_seconds):
        seconds = read(io.BytesIO(data), len(data))
        assert seconds is None or 0 <= seconds < 100_000


def test_a_page_says_what_it_is() -> None:
    found = page.read(HTML, "https://example.org/x/page")
    assert found.fields == {"title": "Offers & more", "description": "All of May"}
    assert found.picture == "https://example.org/a.jpg"
    plain = page.read(b"<title> A\n title </title><img src=x>", "https://example.org")
    assert (plain.fields, plain.picture) == ({"title": "A title"}, None)
    torn = page.read(HTML + b"<![\x00", "https://example.org")
    assert torn.fields == found.fields
    assert page.read(b"", "https://example.org").fields == {}


@settings(max_examples=1000, deadline=None)
@given(
    st.binary(max_size=300)
    | st.text(alphabet="<>!-/='\" metaogi:contentpr&#[", max_size=200).map(str.encode)
)
def test_no_page_confuses_its_reader(html: bytes) -> None:
    found = page.read(b"<meta property=og:image content='" + html + b"'>" + html, "https://a.b/")
    assert found.picture is None or is_link(found.picture)
    assert all(len(text) <= 500 for text in found.fields.values())
