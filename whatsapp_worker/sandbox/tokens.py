"""The token dictionary of WhatsApp's binary XML, read out of the installed neonize."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from whatsapp_worker.sandbox.library import Library, LibraryUnreadable

DICTIONARY_VERSION = 3
SINGLE_COUNT = 236
DOUBLE_TABLES = 4
DOUBLE_COUNT = 256


@dataclass(frozen=True)
class Tokens:
    """Strings that travel as one byte, or as two.

    Attributes:
        single: String of each one-byte token; "" where the byte means something else.
        double: Four tables of strings that take a table byte and an index byte.
    """

    single: tuple[str, ...] = ()
    double: tuple[tuple[str, ...], ...] = ()

    @cached_property
    def encoded(self) -> dict[str, bytes]:
        """How each string travels."""
        found = {
            text: bytes((SINGLE_COUNT + table, index))
            for table, texts in enumerate(self.double)
            for index, text in enumerate(texts)
        }
        found.update({text: bytes((index,)) for index, text in enumerate(self.single) if text})
        return found


def read_tokens(library: Library) -> Tokens:
    """Find the dictionary in the library, by strings that stand at known places in it.

    Raises:
        LibraryUnreadable: It is not where it was in every version known to us.
    """
    starts = list(library.string_headers(b"xmlstreamstart"))
    if len(starts) != 1:
        raise LibraryUnreadable(f"{library.path}: the one-byte tokens were not found")
    single = library.strings(starts[0] - 16, SINGLE_COUNT)  # before it: the empty string
    for header in library.string_headers(b"read-self"):
        try:
            double = library.strings(header, DOUBLE_TABLES * DOUBLE_COUNT)
        except LibraryUnreadable:
            continue  # the same string used elsewhere
        if double[1] == "active":
            tables = (
                tuple(double[i * DOUBLE_COUNT : (i + 1) * DOUBLE_COUNT])
                for i in range(DOUBLE_TABLES)
            )
            return Tokens(tuple(single), tuple(tables))
    raise LibraryUnreadable(f"{library.path}: the two-byte tokens were not found")
