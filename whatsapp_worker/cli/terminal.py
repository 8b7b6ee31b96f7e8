"""What a person sees: colours where they help, durations, columns; JSON lines for programs."""

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def paint(text: str, *styles: str, stream: TextIO | None = None) -> str:
    """Colour a text when the stream (default stdout) is a terminal and NO_COLOR is not set."""
    if not styles or not has_colours(stream or sys.stdout):
        return text
    return f"\x1b[{';'.join(_CODES[style] for style in styles)}m{text}\x1b[0m"


def has_colours(stream: TextIO) -> bool:
    """Whether escape sequences are welcome there."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def emit(document: dict[str, Any]) -> None:
    """One JSON document on a line of its own on stdout, at once."""
    print(json.dumps(document, ensure_ascii=False, default=str), flush=True)


def talk(text: str) -> None:
    """Say something to the person; never on stdout."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `5 d 2 h`."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86_400
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min" if minutes % 60 else f"{hours} h"
    return f"{days} d {hours % 24} h" if hours % 24 else f"{days} d"


def moment(at: float | None) -> str:
    """A time as people of this host read it, with its zone; `-` for none."""
    if at is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at))


def columns(rows: Iterable[Sequence[str]], *, head: Sequence[str] = ()) -> list[str]:
    """Rows as aligned lines; the last column is not padded. Colours do not count as width."""
    table = [list(row) for row in ([head, *rows] if head else rows)]
    if not table:
        return []
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell + " " * (width - _width(cell))
            for cell, width in zip(row[:-1], widths[:-1], strict=True)
        ]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    if head:
        lines[0] = paint(lines[0], "dim")
    return lines


def printable(text: object) -> str:
    """A text from outside, unable to steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def _width(cell: str) -> int:
    plain, escape = 0, False
    for c in cell:
        if c == "\x1b":
            escape = True
        elif escape:
            escape = c != "m"
        else:
            plain += 1
    return plain
