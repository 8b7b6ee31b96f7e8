"""The binary XML codec: round trips, whatsmeow's other spellings, and garbage."""

import zlib
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from whatsapp_worker.sandbox.binary import (
    MAX_DEPTH,
    MAX_INFLATED_BYTES,
    Codec,
    Jid,
    MalformedNode,
    Node,
)
from whatsapp_worker.sandbox.library import Library, find_library
from whatsapp_worker.sandbox.tokens import Tokens, read_tokens


@cache
def tokens() -> Tokens:
    return read_tokens(Library(find_library()))


CODECS = pytest.mark.parametrize(
    "codec", [Codec(tokens()), Codec(Tokens())], ids=["tokens", "bare"]
)

words = st.text(max_size=300) | st.sampled_from(sorted(tokens().encoded))
users = st.text(st.characters(codec="ascii", categories=["Nd", "L"]), min_size=1, max_size=20)
jids = st.builds(
    Jid, st.just("") | users, st.sampled_from(["s.whatsapp.net", "g.us", "lid"]), st.just(0)
) | (
    st.builds(
        Jid,
        users,
        st.sampled_from(["s.whatsapp.net", "lid", "hosted", "hosted.lid"]),
        st.integers(1, 255),
    )
)
leaves = st.builds(
    Node,
    st.text(min_size=1, max_size=20) | st.sampled_from(["iq", "message", "enc"]),
    st.dictionaries(words, words | jids, max_size=5),
    st.none() | st.binary(max_size=400),
)
nodes = st.recursive(
    leaves,
    lambda inner: st.builds(
        Node, st.text(min_size=1, max_size=9), st.just({}), st.lists(inner, min_size=1, max_size=4)
    ),
    max_leaves=12,
)


@CODECS
@given(node=nodes)
def test_a_node_comes_back_as_it_was(codec: Codec, node: Node) -> None:
    assert codec.decode(codec.encode(node)) == node


@CODECS
@pytest.mark.parametrize("size", [0, 255, 256, (1 << 16) + 1, (1 << 20) + 7])
def test_content_of_any_size_comes_back(codec: Codec, size: int) -> None:
    assert codec.decode(codec.encode(Node("enc", {}, bytes(size)))).data == bytes(size)


@CODECS
@pytest.mark.parametrize("count", [255, 256, 70])
def test_many_children_come_back(codec: Codec, count: int) -> None:
    node = Node("list", {}, [Node("key", {"id": str(i)}) for i in range(count)])
    assert codec.decode(codec.encode(node)) == node


def test_more_children_than_the_format_knows_are_refused() -> None:
    with pytest.raises(ValueError, match="65,535"):
        Codec(Tokens()).encode(Node("list", {}, [Node("key")] * 65_536))


@given(frame=st.binary(max_size=400))
@example(b"")
@example(b"\x00")
@example(b"\x02\x78\x9c")
@example(b"\x00\xf8\x01\xff\x7f")
@example(b"\x00\xf8\x03\x05\xfe\xff\xff\xff\xff")
def test_garbage_is_refused_and_nothing_else_happens(frame: bytes) -> None:
    try:
        Codec(tokens()).decode(frame)
    except MalformedNode:
        return


@given(node=nodes, data=st.data())
def test_a_damaged_node_is_refused_or_read(node: Node, data: st.DataObject) -> None:
    frame = bytearray(Codec(tokens()).encode(node))
    position = data.draw(st.integers(0, len(frame) - 1))
    frame[position] = data.draw(st.integers(0, 255))
    try:
        Codec(tokens()).decode(bytes(frame[: data.draw(st.integers(0, len(frame)))]))
    except MalformedNode:
        return


def test_a_node_deeper_than_any_real_one_is_refused() -> None:
    node = Node("iq")
    for _ in range(MAX_DEPTH + 1):
        node = Node("iq", {}, [node])
    with pytest.raises(MalformedNode, match="deep"):
        Codec(tokens()).decode(Codec(tokens()).encode(node))


def test_a_bomb_is_not_inflated() -> None:
    bomb = b"\x02" + zlib.compress(bytes(MAX_INFLATED_BYTES + 2))
    with pytest.raises(MalformedNode, match="16 MiB"):
        Codec(tokens()).decode(bomb)


def test_a_compressed_node_is_read() -> None:
    node = Node("iq", {"id": "1"}, b"content")
    frame = b"\x02" + zlib.compress(Codec(tokens()).encode(node)[1:])
    assert Codec(tokens()).decode(frame) == node


def test_packed_digits_and_hex_are_read() -> None:
    """whatsmeow packs such strings, this codec spells them out."""
    digits = bytes((255, 0x80 | 4, 0x12, 0x3A, 0xB4, 0x5F))
    hexadecimal = bytes((251, 2, 0x3E, 0xB0))
    frame = b"\x00" + bytes((248, 5, 252, 1)) + b"t" + digits + hexadecimal * 2 + digits
    node = Codec(tokens()).decode(frame)
    assert node.attrs == {"123-.45": "3EB0", "3EB0": "123-.45"}


def test_strings_as_content_are_bytes() -> None:
    frame = b"\x00" + bytes((248, 2, 252, 1)) + b"t" + tokens().encoded["s.whatsapp.net"]
    assert Codec(tokens()).decode(frame).content == b"s.whatsapp.net"


def test_the_dictionary_of_the_installed_neonize_is_whole() -> None:
    found = tokens()
    assert (len(found.single), [len(table) for table in found.double]) == (236, [256] * 4)
    assert found.single[1:4] == ("xmlstreamstart", "xmlstreamend", "s.whatsapp.net")
    assert found.double[0][:2] == ("read-self", "active")
    assert all(text.isprintable() for table in found.double for text in table)


def test_a_codec_without_tokens_writes_none() -> None:
    """What is stored on disk must be read by the next version of neonize too."""
    frame = Codec(Tokens()).encode(Node("iq", {"type": "get"}))
    assert b"iq" in frame and b"type" in frame
    assert Codec(tokens()).decode(frame) == Node("iq", {"type": "get"})
