"""`whatsapp-worker link`: shows codes as they rotate, until a phone has taken one."""

import os
import re
import shutil
import sys
import threading
from pathlib import Path

from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.host import Host
from whatsapp_worker.cli.linking import Attempt, Code, Linked, Moved
from whatsapp_worker.cli.terminal import emit, has_colours, paint, talk
from whatsapp_worker.errors import CapacityReached, LinkFailed, UsageError, WorkerError
from whatsapp_worker.session import Reason
from whatsapp_worker.settings import Settings

HOW_TO_SCAN = "On the phone: WhatsApp > Settings > Linked devices > Link a device, and scan:"
HOW_TO_TYPE = (
    "On the phone: WhatsApp > Settings > Linked devices > Link a device > Link with phone number"
    " instead, and type:"
)


def link(options: Options, settings: Settings) -> int:
    """Serve `link SESSION`."""
    try:
        _link(options, settings)
    except WorkerError as error:
        if not options.json:
            raise
        reason = error.reason if isinstance(error, LinkFailed) else _reason(error)
        emit({"event": "failed", "reason": reason, "sentence": str(error)})
        return error.exit_code
    return 0


def _link(options: Options, settings: Settings) -> None:
    attempt = Attempt(
        Host(settings), options.session, phone=_digits(options.phone), again=options.again
    )
    png = _writable(options.png)
    screen: Screen = JsonScreen(png) if options.json else Screen(options.session, png)
    try:
        with screen:
            for word in attempt.follow():
                screen.show(word)
    except (KeyboardInterrupt, OSError):
        attempt.withdraw()
        raise


def _reason(error: WorkerError) -> str:
    """A code for what went wrong around the attempt: `SessionDeleted` is `session-deleted`."""
    if isinstance(error, CapacityReached):
        return Reason.CAPACITY.value
    return re.sub(r"(?<=.)([A-Z])", r"-\1", type(error).__name__).lower()


def _writable(png: str | None) -> Path | None:
    """Where codes are to be drawn.

    Raises:
        UsageError: Nothing can be written there; said before a code is asked for.
    """
    path = Path(png) if png else None
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise UsageError(f"--png: {path} cannot be written")
    return path


def _digits(phone: str | None) -> str | None:
    if phone is None:
        return None
    digits = "".join(c for c in phone if c.isascii() and c.isdigit())
    if not 7 <= len(digits) <= 15 or not set(phone) <= set("+0123456789 -().\u00a0"):
        raise UsageError("--phone: 7 to 15 digits with the country code, such as +5511999990001")
    return digits


class Screen:
    """Draws codes on stdout, one in the place of the other where the terminal is large enough."""

    def __init__(self, session: str, png: Path | None = None) -> None:
        self._session = session
        self._png = png
        self._height = 0  # lines of the drawn code, with the count-down below it
        self._code: Code | None = None
        self._hint = ""
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Screen":
        if sys.stdout.isatty():
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with self._lock:
            self._end_count_down()
        if self._png:
            self._png.unlink(missing_ok=True)

    def show(self, word: Code | Moved | Linked) -> None:
        """Tell the person one thing."""
        with self._lock:
            if isinstance(word, Code):
                self._show_code(word)
            else:
                self._end_count_down()
                self._show_other(word)

    def _show_other(self, word: Moved | Linked) -> None:
        if isinstance(word, Linked):
            number = f" +{word.phone}" if word.phone else ""
            linked = "Linked" if word.is_new else "Already linked"
            talk(paint(f"{linked}{number}. Session {self._session} is connected.", "green", "bold"))
        elif word.state not in ("connected", "unlinked"):
            talk(paint(f"{self._session}: {word.state}", "dim", stream=sys.stderr))

    def _show_code(self, code: Code) -> None:
        """Draw over the code before this one when both fit on the screen."""
        if self._png and code.kind == "qr":
            from whatsapp_worker.cli import qr

            qr.write_png(code.code, self._png)
        rows = drawing(code, colours=has_colours(sys.stdout))
        if self._height == len(rows) and self._fits(rows):
            print(f"\x1b[{self._height}F", end="")
        else:
            self._end_count_down()
            talk(
                paint(HOW_TO_SCAN if code.kind == "qr" else HOW_TO_TYPE, "bold", stream=sys.stderr)
            )
        print("\n".join(rows), flush=True)
        self._height, self._code = len(rows), code
        self._hint = "" if self._fits(rows) else _hint(rows)
        self._count_down()

    def _fits(self, rows: list[str]) -> bool:
        size = shutil.get_terminal_size()
        return (
            sys.stdout.isatty() and size.lines > len(rows) + 1 and size.columns >= _width(rows[0])
        )

    def _tick(self) -> None:
        while not self._stop.wait(1):
            with self._lock:
                self._count_down()

    def _count_down(self) -> None:
        if self._code is None or not sys.stdout.isatty() or self._stop.is_set():
            return
        left = round(self._code.expires_in_s)
        text = f"{left} s left" if left else "waiting for the next code"
        print(f"\r\x1b[2K{paint(text, 'dim')}{self._hint}", end="", flush=True)

    def _end_count_down(self) -> None:
        if self._code is not None and sys.stdout.isatty():
            print("\r\x1b[2K", end="", flush=True)
        self._code, self._height = None, 0


class JsonScreen(Screen):
    """The same for programs: one JSON line a word."""

    def __init__(self, png: Path | None = None) -> None:
        super().__init__("", png)

    def __enter__(self) -> "JsonScreen":
        return self

    def show(self, word: Code | Moved | Linked) -> None:
        """Print the words of the contract; states are for people."""
        if isinstance(word, Code):
            if self._png and word.kind == "qr":
                from whatsapp_worker.cli import qr

                qr.write_png(word.code, self._png)
            seconds = round(word.expires_in_s, 1)
            emit({"event": word.kind, "code": word.code, "expires_in_s": seconds})
        elif isinstance(word, Linked):
            emit({"event": "linked", "phone": word.phone, "jid": word.jid})


def drawing(code: Code, *, colours: bool) -> list[str]:
    """A code as lines for the terminal."""
    if code.kind == "code":
        return ["", f"    {paint(code.code, 'bold')}", ""]
    from whatsapp_worker.cli import qr

    return qr.lines(code.code, colours=colours)


def _hint(rows: list[str]) -> str:
    """For a terminal that cannot show the code whole."""
    return f"; needs {_width(rows[0])} x {len(rows) + 2} characters here: enlarge, or use --png"


def _width(row: str) -> int:
    return len(re.sub(r"\x1b\[[0-9;]*m", "", row))
