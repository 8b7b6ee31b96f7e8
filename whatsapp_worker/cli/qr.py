"""A QR code as terminal lines or as a PNG file."""

import contextlib
import io
import os
from pathlib import Path

import segno

_QUIET = 2  # modules of margin; phones need no more on a screen
_INK = "\x1b[38;5;16;48;5;231m"  # black on white, whatever the terminal's own colours are
_RESET = "\x1b[0m"
# (upper dark, lower dark) to a character whose foreground is dark.
_DARK = {(True, True): "█", (True, False): "▀", (False, True): "▄", (False, False): " "}
# Without colours the terminal's background must serve as the dark: most are dark.
_LIGHT = {(True, True): " ", (True, False): "▄", (False, True): "▀", (False, False): "█"}


def lines(code: str, *, colours: bool) -> list[str]:
    """The code as it is shown: two modules a character, all lines equally wide.

    Args:
        code: What the code says.
        colours: Whether escape sequences may be used; without them a dark background is assumed.
    """
    modules = [
        [bool(module) for module in row]
        for row in segno.make_qr(code, error="l").matrix_iter(border=_QUIET)
    ]
    if len(modules) % 2:
        modules.append([False] * len(modules[0]))
    characters = _DARK if colours else _LIGHT
    drawn = [
        "".join(characters[pair] for pair in zip(upper, lower, strict=True))
        for upper, lower in zip(modules[::2], modules[1::2], strict=True)
    ]
    return [f"{_INK}{line}{_RESET}" for line in drawn] if colours else drawn


def write_png(code: str, path: Path) -> None:
    """Write the code as a picture for this user's eyes only: whoever sees it can take the session.

    Raises:
        OSError: It cannot be written; the old file is intact.
    """
    image = io.BytesIO()
    segno.make_qr(code, error="l").save(image, kind="png", scale=8, border=4)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as to:
            to.write(image.getvalue())
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
