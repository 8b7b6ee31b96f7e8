"""What the sandbox reads out of the installed neonize: its Go library, as an ELF file.

Nothing is loaded or run: the file is read, and positions in it are told as the addresses that
they have relative to wherever the library gets loaded.
"""

from __future__ import annotations

import importlib.util
import platform
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

_RELATIVE = 8  # R_X86_64_RELATIVE: the word at `offset` becomes load base + addend
_LOAD = 1
_WRITABLE = 2
_RELA = 4
_STRING_HEADER_SIZE = 16  # Go: pointer, length


class LibraryUnreadable(Exception):
    """The installed neonize is missing, or its library is not built as we know it."""


class Segment(NamedTuple):
    """One part of the file that is mapped into memory; in bytes."""

    flags: int
    offset: int
    address: int
    size: int


def find_library() -> Path:
    """The Go library of the installed neonize, without importing neonize.

    Raises:
        LibraryUnreadable: Not installed, or not on Linux x86-64.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise LibraryUnreadable("the sandbox network needs Linux on x86-64")
    spec = importlib.util.find_spec("neonize")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "neonize-linux-amd64.so"
        if path.is_file():
            return path
    raise LibraryUnreadable("neonize is not installed with its library: pip install neonize")


class Library:
    """The library's file, addressed as it will lie in memory (load base 0).

    Raises:
        LibraryUnreadable: The file is no 64-bit little-endian ELF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        if self.data[:6] != b"\x7fELF\x02\x01":
            raise LibraryUnreadable(f"{path} is no 64-bit ELF file")
        self.segments = tuple(self._segments())

    def only_address_of(self, content: bytes) -> int:
        """The address of bytes that must be present once, in a writable segment.

        Raises:
            LibraryUnreadable: They are missing, present twice, or not writable.
        """
        position = self.data.find(content)
        if position < 0 or self.data.find(content, position + 1) >= 0:
            raise LibraryUnreadable(f"{self.path} does not hold the expected bytes exactly once")
        for segment in self.segments:
            if segment.flags & _WRITABLE and 0 <= position - segment.offset < segment.size:
                return position - segment.offset + segment.address
        raise LibraryUnreadable(f"{self.path} holds the expected bytes outside of its data")

    def string_headers(self, text: bytes) -> Iterator[int]:
        """Addresses of every Go string header (pointer, length) that says `text`."""
        position = self.data.find(text)
        while position >= 0:
            address = self._address(position)
            for header in self._headers_by_target.get(address, ()) if address is not None else ():
                if self._length(header) == len(text):
                    yield header
            position = self.data.find(text, position + 1)

    def strings(self, header: int, count: int) -> list[str]:
        """Read a Go array of `count` strings whose first header lies at an address.

        Raises:
            LibraryUnreadable: Something there is no string.
        """
        return [self._string(header + i * _STRING_HEADER_SIZE) for i in range(count)]

    def _string(self, header: int) -> str:
        length = self._length(header)
        target = self._relocations.get(header)
        position = None if target is None else self._position(target)
        if length == 0:
            return ""
        if length is None or position is None:
            raise LibraryUnreadable(f"{self.path}: no string at {header:#x}")
        try:
            return self.data[position : position + length].decode()
        except UnicodeDecodeError as error:
            raise LibraryUnreadable(f"{self.path}: no string at {header:#x}") from error

    def _length(self, header: int) -> int | None:
        position = self._position(header + 8)
        if position is None or position + 8 > len(self.data):
            return None
        return int(struct.unpack_from("<Q", self.data, position)[0])

    def _position(self, address: int) -> int | None:
        for segment in self.segments:
            if 0 <= address - segment.address < segment.size:
                return address - segment.address + segment.offset
        return None

    def _address(self, position: int) -> int | None:
        for segment in self.segments:
            if 0 <= position - segment.offset < segment.size:
                return position - segment.offset + segment.address
        return None

    def _segments(self) -> Iterator[Segment]:
        table = struct.unpack_from("<Q", self.data, 0x20)[0]
        entry_size, count = struct.unpack_from("<HH", self.data, 0x36)
        for i in range(count):
            kind, flags, offset, address, _, size, _, _ = struct.unpack_from(
                "<IIQQQQQQ", self.data, table + i * entry_size
            )
            if kind == _LOAD:
                yield Segment(flags, offset, address, size)

    @cached_property
    def _relocations(self) -> dict[int, int]:
        """Where a pointer lies -> the address that it will point at."""
        table = struct.unpack_from("<Q", self.data, 0x28)[0]
        entry_size, count, _ = struct.unpack_from("<HHH", self.data, 0x3A)
        found: dict[int, int] = {}
        for i in range(count):
            section = struct.unpack_from("<IIQQQQIIQQ", self.data, table + i * entry_size)
            if section[1] != _RELA:
                continue
            content = self.data[section[4] : section[4] + section[5]]
            for offset, info, addend in struct.iter_unpack("<QQq", content):
                if info == _RELATIVE:
                    found[offset] = addend
        return found

    @cached_property
    def _headers_by_target(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for header, target in self._relocations.items():
            found.setdefault(target, []).append(header)
        return found
