"""`whatsapp-worker logs`: the log files of this host, rotated ones too, as people read them."""

import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.errors import reason
from whatsapp_worker import telemetry
from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.terminal import emit, paint, printable, talk
from whatsapp_worker.errors import CommandFailed
from whatsapp_worker.keys import session_id
from whatsapp_worker.settings import Settings

_POLL_S = 0.25
_COLOURS = {"ERROR": ("red",), "CRITICAL": ("red",), "WARNING": ("yellow",), "DEBUG": ("dim",)}


def logs(options: Options, settings: Settings) -> int:
    """Serve `logs [SESSION]`."""
    try:
        return _logs(options, settings)
    except PermissionError as error:
        raise CommandFailed(f"the log files cannot be read: {reason(error)}") from error


def _logs(options: Options, settings: Settings) -> int:
    wanted = session_id(options.session) if options.session else None
    path = telemetry.log_file(settings.data_dir)

    def matches(facts: dict[str, Any]) -> bool:
        if wanted is not None and facts.get("session") != wanted:
            return False
        return not options.errors or facts.get("level") in ("ERROR", "CRITICAL", "WARNING")

    files = _files(path)
    last: deque[dict[str, Any]] = deque(maxlen=options.lines)
    position = 0
    for file in files:
        position = 0
        for facts, end in _read(file, 0):
            position = end
            if matches(facts):
                last.append(facts)
    for facts in last:
        _show(options, facts)
    if not files:
        talk(f"No log file in {path.parent.absolute()} yet.")
    elif not last:
        talk("No such line yet.")
    if options.follow:
        _follow(options, path, position, matches)
    return 0


def _follow(options: Options, path: Path, position: int, matches: Any) -> None:
    """Go on with what is appended, over rotations, until Ctrl-C."""
    inode = path.stat().st_ino if path.exists() else None
    while True:
        time.sleep(_POLL_S)
        if not path.exists():
            continue
        if (now := path.stat().st_ino) != inode:
            # What was written between our last look and the rotation lies in the file before.
            rotated = path.with_name(f"{path.name}.1")
            if inode is not None and rotated.exists() and rotated.stat().st_ino == inode:
                _show_from(options, rotated, position, matches)
            inode, position = now, 0
        position = _show_from(options, path, position, matches)


def _show_from(options: Options, path: Path, position: int, matches: Any) -> int:
    for facts, end in _read(path, position):
        position = end
        if matches(facts):
            _show(options, facts)
    return position


def _files(path: Path) -> list[Path]:
    """Oldest first."""
    older = sorted(
        (file for file in path.parent.glob(f"{path.name}.*") if file.suffix[1:].isdigit()),
        key=lambda file: -int(file.suffix[1:]),
    )
    return [*older, path] if path.exists() else older


def _read(path: Path, position: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole lines from a position on, with the position behind each; nonsense is skipped."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                position += len(line)
                try:
                    facts = json.loads(line)
                except ValueError:
                    continue
                if isinstance(facts, dict):
                    yield facts, position
    except FileNotFoundError:
        return


def _show(options: Options, facts: dict[str, Any]) -> None:
    if options.json:
        emit(facts)
        return
    text = "\n".join(printable(line) for line in telemetry.render(facts).split("\n"))
    print(paint(text, *_COLOURS.get(str(facts.get("level")), ())), flush=True)
