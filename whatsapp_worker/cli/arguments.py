"""The words, options and help of the command line, and which function serves each command."""

import argparse
import importlib
import re
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from whatsapp_worker import __version__

Options: TypeAlias = argparse.Namespace
Command: TypeAlias = Callable[[Options, Any], int]
N = TypeVar("N", int, float)

INTERRUPTED = 130
EXIT_CODES = {
    0: "done",
    1: "the command was understood and did not succeed",
    2: "wrong usage or wrong settings; all problems are listed",
    3: "no such session",
    4: "MAX_SESSIONS is reached",
    5: "another process holds this data folder or session",
    6: "Redis, the database or the supervisor did not answer; try again",
    7: "not done in time; it may still happen",
    8: "sandbox mode in an environment that could reach the real WhatsApp",
    9: "`run` had to be forced to stop",
    INTERRUPTED: "interrupted (Ctrl-C)",
}

_ABOUT = """\
Owns WhatsApp linked-device sessions and sends through them.

  whatsapp-worker run                     start it (the supervisor, in the foreground)
  whatsapp-worker link sales              link a phone: shows a QR code to scan
  whatsapp-worker send sales +5511999990001 "Hello" --wait
  whatsapp-worker status                  what every session is doing
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line; importing no part of the program but its words."""
    top = argparse.ArgumentParser(
        prog="whatsapp-worker",
        description=_ABOUT,
        epilog=_epilog(),
        formatter_class=_Help,
    )
    top.add_argument("--version", action="version", version=f"whatsapp-worker {__version__}")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands"
    )
    for add in (_processes, _sessions, _messages, _looking):
        add(commands)
    return top


def command(options: Options) -> Command:
    """Import the function that serves the chosen command; only then its dependencies load."""
    module, _, name = options.serve.partition(":")
    function: Command = getattr(importlib.import_module(f"whatsapp_worker.cli.{module}"), name)
    return function


def _processes(commands: Any) -> None:
    run = _command(
        commands,
        "run",
        "processes:run",
        "Run the supervisor: one a host, in the foreground, until SIGTERM or Ctrl-C.",
        examples=["run --all", "REDIS_URL=redis://redis.example/0 {} run"],
        serves=True,
    )
    run.add_argument(
        "--all",
        action="store_true",
        help="also run the events and maintenance processes, for hosts without a process manager",
    )
    _command(
        commands,
        "events",
        "processes:events",
        "Write delivery and read receipts from the stream wa:events into the ledger.",
        serves=True,
    )
    _command(
        commands,
        "maintenance",
        "processes:maintenance",
        "Run the periodic jobs of this host: the purge.",
        serves=True,
    )
    sandbox = _command(
        commands,
        "sandbox",
        "processes:sandbox",
        "Run a WhatsApp network of your own on loopback: no phone, no account, no internet.",
        examples=["sandbox", "sandbox --env"],
        serves=True,
    )
    sandbox.add_argument(
        "--state-dir",
        metavar="DIR",
        help="where its keys, contacts and paired devices lie (default: DATA_DIR/sandbox)",
    )
    _port(sandbox, "--proxy-port", "that workers dial")
    _port(sandbox, "--control-port", "of the control API")
    sandbox.add_argument(
        "--env",
        action="store_true",
        help="do not run it: print the variables that put a worker on the running sandbox",
    )
    _json(sandbox, "say where it listens as one JSON line")
    demo = _command(
        commands,
        "demo",
        "processes:demo",
        "Show the whole path with the real client in a sandbox; under a minute, no phone.",
    )
    demo.add_argument("--keep", action="store_true", help="leave it running until Ctrl-C")


def _sessions(commands: Any) -> None:
    link = _command(
        commands,
        "link",
        "link:link",
        "Link a phone to a session by QR or pairing code; creates the session if needed.",
        examples=[
            "link sales",
            "link sales --png /tmp/qr.png",
            "link sales --phone +5511999990001",
        ],
    )
    _session(link)
    link.add_argument(
        "--png", metavar="FILE", help="write each QR code to this file as well (0600)"
    )
    link.add_argument(
        "--phone",
        metavar="NUMBER",
        help="ask for a pairing code to type on the phone of this number, instead of a QR code",
    )
    link.add_argument(
        "--again",
        action="store_true",
        help="link anew though it is linked already; the phone still lists the device from before:"
        " remove it there under Linked devices",
    )
    _json(link, "one JSON line for each code, then linked or failed")
    status = _command(
        commands,
        "status",
        "status:status",
        "Show the supervisor, Redis, the database and every session.",
        examples=["status", "status sales", "status --watch", "status --json"],
    )
    status.add_argument("session", metavar="SESSION", nargs="?", help="one session in full")
    status.add_argument("--watch", action="store_true", help="go on showing it until Ctrl-C")
    _json(status, "one JSON line (with --watch one a second)")
    for name, about in (
        ("start", "Run a session: stopped, failed, replaced or outdated ones try again at once."),
        ("stop", "Disconnect a session and keep it so; its queue waits."),
        ("restart", "End the device process after the send in hand, and start the next."),
        ("logout", "Log the device out at WhatsApp; only linking again helps afterwards."),
    ):
        made = _operation(commands, name, about)
        if name == "start":
            made.add_argument(
                "--force", action="store_true", help="run it though it was exported to another host"
            )
    delete = _operation(
        commands, "delete", "Log out and remove a session for good; its queued messages fail."
    )
    delete.add_argument("--yes", action="store_true", help="do not ask")
    _transfer(commands)


def _transfer(commands: Any) -> None:
    session = _command(
        commands,
        "session",
        "upkeep:export_session",
        "Move a session to another host in one encrypted file, without a new QR code.",
        examples=["session export sales sales.session", "session import sales.session"],
    )
    kinds = session.add_subparsers(dest="kind", required=True, metavar="export|import")
    out = kinds.add_parser("export", help="write a stopped session into a new file")
    out.set_defaults(serve="upkeep:export_session")
    _session(out)
    into = kinds.add_parser("import", help="make a session of such a file")
    into.set_defaults(serve="upkeep:import_session")
    into.add_argument("--as", dest="name", metavar="SESSION", help="another id than it had")
    for made in (out, into):
        made.add_argument("file", metavar="FILE", help="the encrypted file")
        made.epilog = "The passphrase is asked for, or taken from SESSION_PASSPHRASE;"
        _common(made)
        _json(made, "one JSON line")


def _operation(commands: Any, name: str, about: str) -> argparse.ArgumentParser:
    made = _command(
        commands, name, f"operate:{name}", about, examples=[f"{name} sales", f"{name} --all"]
    )
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("session", metavar="SESSION", nargs="?", help="session id")
    which.add_argument("--all", action="store_true", help="every session of this data folder")
    _json(made, 'print {"session":...,"state":...} once it is so')
    return made


def _messages(commands: Any) -> None:
    send = _command(
        commands,
        "send",
        "send:send",
        "Enqueue one text message, exactly as a CRM does.",
        examples=['send sales +5511999990001 "Hello" --wait'],
    )
    _session(send)
    send.add_argument("to", metavar="TO", help="7 to 15 digits with or without +, or a JID")
    send.add_argument("text", metavar="TEXT", help="the text; - reads it from stdin")
    send.add_argument("--id", metavar="ID", help="message id (default: a new one); used once only")
    send.add_argument("--wait", action="store_true", help="wait for the outcome")
    send.add_argument(
        "--timeout",
        type=_duration,
        default=60.0,
        metavar="SECONDS",
        help="how long --wait waits, in seconds (default: 60)",
    )
    _json(send, "print message_id, status, wa_message_id and error as one JSON line")
    queue = _command(
        commands,
        "queue",
        "queue:queue",
        "Show what waits for a session and why it rests; list, pause, resume or clear it.",
        examples=[
            "queue sales",
            "queue sales list",
            "queue sales pause",
            "queue sales clear --yes",
        ],
    )
    _session(queue)
    queue.add_argument(
        "action",
        nargs="?",
        choices=["list", "pause", "resume", "clear"],
        help="list: each message that waits;"
        " pause: send nothing until resume, which also releases what is held for another number;"
        " clear: cancel what waits",
    )
    queue.add_argument("--yes", action="store_true", help="clear, resume: do not ask")
    queue.add_argument(
        "--keep-held", action="store_true", help="resume: end the pause alone, release nothing"
    )
    queue.add_argument(
        "--limit",
        type=_positive,
        default=50,
        metavar="N",
        help="list: at most so many (default: 50)",
    )
    _json(queue, "one JSON line; list: one a message")
    messages = _command(
        commands,
        "messages",
        "messages:list_messages",
        "Look up what became of messages, cancel waiting ones, resolve unknown ones.",
        examples=[
            "messages list sales --status unknown",
            "messages show sales crm-4711",
            "messages cancel sales crm-4711",
            "messages resolve sales crm-4711 sent",
        ],
    )
    kinds = messages.add_subparsers(dest="kind", required=True, metavar="list|show|cancel|resolve")
    listing = kinds.add_parser("list", help="the newest messages of a session")
    listing.set_defaults(serve="messages:list_messages")
    _session(listing)
    listing.add_argument("--status", metavar="STATUS", help="only those of this status")
    listing.add_argument(
        "--limit", type=_positive, default=50, metavar="N", help="at most so many (default: 50)"
    )
    _common(listing)
    _json(listing, "one JSON line a message")
    for name, about in (
        ("show", "one message in full"),
        ("cancel", "cancel one that still waits; exit code 1 when it is too late"),
        ("resolve", "say what became of an unknown one, after a look at the phone"),
    ):
        one = kinds.add_parser(name, help=about, description=about)
        one.set_defaults(serve=f"messages:{name}_message")
        _session(one)
        one.add_argument("message", metavar="MESSAGE_ID", help="the id that the CRM gave")
        if name == "resolve":
            one.add_argument("status", choices=["sent", "failed"], help="what became of it")
        _common(one)
        _json(one, "as one JSON line")


def _looking(commands: Any) -> None:
    purge = _command(
        commands,
        "purge",
        "upkeep:purge",
        "Remove what nobody needs any more, now; the maintenance process does it by itself.",
        examples=["purge --dry-run"],
    )
    purge.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    _json(purge, "print what was removed as one JSON line")
    doctor = _command(
        commands,
        "doctor",
        "upkeep:doctor",
        "Check all that the worker stands on, and say what to do; exit code 1 for a problem.",
        examples=["doctor", "doctor --fix"],
    )
    doctor.add_argument("--fix", action="store_true", help="mend what is safe to mend")
    _json(doctor, "one JSON line a check")
    health = _command(
        commands,
        "health",
        "health:health",
        "Say whether this host is well: exit code 0 or 1, for monitors.",
        examples=["health", "health --sessions"],
    )
    health.add_argument(
        "--sessions",
        action="store_true",
        help="also fail when a session needs a person; a restart of the host would not help it",
    )
    _json(health, 'print {"healthy":...,"problems":[...]}')
    logs = _command(
        commands,
        "logs",
        "logs:logs",
        "Show the log lines of this host, or of one session.",
        examples=["logs", "logs sales --follow", "logs --errors"],
    )
    logs.add_argument("session", metavar="SESSION", nargs="?", help="only this session's")
    logs.add_argument("--errors", action="store_true", help="only warnings and errors")
    logs.add_argument("--follow", action="store_true", help="go on with new ones until Ctrl-C")
    logs.add_argument(
        "--lines", type=_positive, default=200, metavar="N", help="the last so many (default: 200)"
    )
    _json(logs, "one JSON line each, as in the file")
    settings = _command(
        commands,
        "settings",
        "settings:show",
        "Print every setting with its value and where that comes from; secrets masked.",
    )
    _json(settings, "one JSON line a setting")


def _command(
    commands: Any,
    name: str,
    serve: str,
    about: str,
    *,
    examples: list[str] | None = None,
    serves: bool = False,
) -> argparse.ArgumentParser:
    """A subcommand; `serves` marks those that run until they are stopped and log to stderr."""
    lines = [
        example.format("whatsapp-worker") if "{}" in example else f"whatsapp-worker {example}"
        for example in examples or []
    ]
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=_short(about),
        description=about,
        epilog="examples:\n" + "\n".join(f"  {line}" for line in lines) if lines else None,
        formatter_class=_Help,
    )
    made.set_defaults(serve=serve, serves=serves)
    _common(made)
    return made


def _short(about: str) -> str:
    """The first clause of a sentence, for the list of commands."""
    first = re.split(r"[.:;](?: |$)", about)[0]
    return first[0].lower() + first[1:]


def _common(made: argparse.ArgumentParser) -> None:
    made.epilog = f"{made.epilog or ''}\n\nexit codes and variables: whatsapp-worker --help".strip()
    made.add_argument("--verbose", action="store_true", help="log lines and tracebacks on stderr")


def _session(made: argparse.ArgumentParser) -> None:
    made.add_argument("session", metavar="SESSION", help="session id: a-z, 0-9, - and _")


def _json(made: argparse.ArgumentParser, about: str) -> None:
    made.add_argument("--json", action="store_true", help=f"for programs: {about}")


def _port(made: argparse.ArgumentParser, name: str, about: str) -> None:
    made.add_argument(
        name,
        type=_port_number,
        default=0,
        metavar="PORT",
        help=f"port {about} (default: the last, or any)",
    )


def _duration(text: str) -> float:
    return _number(float, text, 0.001, 86_400, "seconds")


def _positive(text: str) -> int:
    return _number(int, text, 1, 100_000)


def _port_number(text: str) -> int:
    return _number(int, text, 0, 65_535)


def _number(read: Callable[[str], N], text: str, low: N, high: N, unit: str = "") -> N:
    """A number of a command line; argparse would name our function to the user."""
    try:
        value = read(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g} {unit}".strip())
    return value


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **more: Any) -> None:
        more.setdefault("max_help_position", 30)
        super().__init__(prog, **more)


def _epilog() -> str:
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())
    return (
        f"exit codes:\n{codes}\n\n"
        "variables (whatsapp-worker settings lists all of them):\n"
        "  DATA_DIR          sessions, credentials and state (default: ./data)\n"
        "  REDIS_URL         the Redis that holds the queues (default: one of its own)\n"
        "  DATABASE_URL      PostgreSQL for the ledger (default: SQLite, one file a session)\n"
        "  WHATSAPP_NETWORK  whatsapp or sandbox (default: whatsapp)\n"
        "  LOG_LEVEL         DEBUG, INFO, WARNING or ERROR (default: INFO)"
    )
