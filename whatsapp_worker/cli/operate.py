"""`start`, `stop`, `restart`, `logout`, `delete`: write what is wanted, wait until it is so."""

import dataclasses
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from storage.errors import StorageError
from storage.sessions import StateRecord, Wanted
from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.host import Host
from whatsapp_worker.cli.terminal import emit, paint, talk
from whatsapp_worker.errors import (
    CapacityReached,
    CommandFailed,
    CommandTimeout,
    UsageError,
    WorkerError,
)
from whatsapp_worker.keys import session_id
from whatsapp_worker.session import Reason, State
from whatsapp_worker.settings import Settings

_DISCONNECT_S = 30.0  # how long the supervisor tries to log a device out before it deletes it
_SLACK_S = 10.0

# States that a start can end in, and whether that is what was asked for.
_STARTED = {
    State.CONNECTED: True,
    State.UNLINKED: False,
    State.FAILED: False,
    State.LOGGED_OUT: False,
    State.REPLACED: False,
    State.BANNED: False,
    State.OUTDATED: False,
}
# Those that a start does not change.
_LASTING = (State.CONNECTED, State.UNLINKED, State.LOGGED_OUT)
# Why a session that is wanted to run stays stopped.
_REFUSED = (Reason.CAPACITY, Reason.WRONG_NETWORK)


@dataclass(frozen=True)
class Operation:
    """One verb: what it changes, and when it is done.

    Attributes:
        change: The record that says what is wanted now; what it supersedes is taken back.
        judge: Gets the state before and now (None: the session is gone); True when it is so,
            False when it never will be, None while it may still become so.
        timeout_s: Longest wait in seconds.
    """

    verb: str
    change: Callable[[Wanted], Wanted]
    judge: Callable[[StateRecord | None, StateRecord | None], bool | None]
    timeout_s: float


def start(options: Options, settings: Settings) -> int:
    """Serve `start`."""
    if not options.all:
        Host(settings).restore(session_id(options.session), why="start")
    return _operate(options, settings, _start(settings, force=options.force))


def stop(options: Options, settings: Settings) -> int:
    """Serve `stop`."""
    operation = Operation(
        "stop",
        lambda wanted: dataclasses.replace(
            wanted, run="stop", logout=None, restart=None, why="stop"
        ),
        lambda _, now: (now is not None and now.state == State.STOPPED) or None,
        settings.shutdown_timeout_s + _SLACK_S,
    )
    return _operate(options, settings, operation)


def restart(options: Options, settings: Settings) -> int:
    """Serve `restart`."""
    request = str(uuid.uuid4())
    begin = _start(settings)

    def judge(before: StateRecord | None, now: StateRecord | None) -> bool | None:
        old = before.pid if before else None
        is_old = now is not None and old is not None and now.pid == old
        return None if is_old else begin.judge(before, now)

    operation = Operation(
        "restart",
        lambda wanted: dataclasses.replace(
            wanted, run="run", logout=None, restart=request, why="restart"
        ),
        judge,
        settings.shutdown_timeout_s + begin.timeout_s,
    )
    return _operate(options, settings, operation)


def logout(options: Options, settings: Settings) -> int:
    """Serve `logout`."""
    request = str(uuid.uuid4())
    done = (State.LOGGED_OUT, State.UNLINKED)
    operation = Operation(
        "logout",
        # A stopped session must run once more to tell WhatsApp.
        lambda wanted: dataclasses.replace(
            wanted, run="run", logout=request, restart=None, why="logout"
        ),
        lambda _, now: now is not None and now.state in done,
        _DISCONNECT_S + settings.shutdown_timeout_s + _SLACK_S,
    )
    return _operate(options, settings, operation)


def delete(options: Options, settings: Settings) -> int:
    """Serve `delete`."""
    host = Host(settings)
    _make_sure(options, host)
    operation = Operation(
        "delete",
        lambda wanted: dataclasses.replace(wanted, run="delete", why="delete"),
        lambda _, now: True if now is None else None,
        _DISCONNECT_S + settings.shutdown_timeout_s + _SLACK_S,
    )
    return _operate(options, settings, operation)


def _start(settings: Settings, *, force: bool = False) -> Operation:
    def change(wanted: Wanted) -> Wanted:
        exported_at = None if force else wanted.exported_at
        return dataclasses.replace(
            wanted, run="run", logout=None, exported_at=exported_at, why="start"
        )

    def judge(before: StateRecord | None, now: StateRecord | None) -> bool | None:
        if now is None:
            return False
        state = State(now.state)
        if state is State.STOPPED and now.reason in _REFUSED:
            return False
        is_old = before is not None and (before.state, before.since) == (now.state, now.since)
        if is_old and state not in _LASTING:
            return None  # the dial is still to come
        return _STARTED.get(state)

    return Operation(
        "start",
        change,
        judge,
        settings.connect_timeout_s + _SLACK_S,
    )


def _make_sure(options: Options, host: Host) -> None:
    """Ask before something is gone for good.

    Raises:
        UsageError: Nobody is there to ask, or the answer was no.
    """
    if options.yes:
        return
    what = (
        "every session"
        if options.all
        else f"session {host.wanted(options.session) and options.session}"
    )
    if options.json or not sys.stdin.isatty():
        raise UsageError(f"delete removes {what} for good: say --yes")
    print(f"This logs out and removes {what} for good, its queue and history too.", file=sys.stderr)
    print("Type yes to go on: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        raise UsageError("nothing was deleted")


def _operate(options: Options, settings: Settings, operation: Operation) -> int:
    """Write every record first, then wait for each, so that many take no longer than one."""
    host = Host(settings)
    names = host.sessions.ids() if options.all else [options.session]
    if not options.all:
        host.wanted(options.session)
    asked: list[tuple[str, StateRecord | None, Wanted]] = []
    failures: list[Exception] = []
    for name in names:
        before = host.read_state(name)
        try:
            wanted = host.sessions.want(name, operation.change, now=time.time())
        except StorageError as error:
            failures.append(error)
            continue
        asked.append((name, before, wanted))
    for name, before, wanted in asked:
        try:
            _await(options, host, operation, name, before, wanted)
        except (WorkerError, StorageError) as error:
            failures.append(error)
    for failure in failures[:-1]:
        talk(f"whatsapp-worker: {failure}")
    if failures:
        raise failures[-1]
    if not names:
        talk("There is no session.")
    return 0


def _await(
    options: Options,
    host: Host,
    operation: Operation,
    name: str,
    before: StateRecord | None,
    wanted: Wanted,
) -> None:
    def judged(now: StateRecord | None) -> bool:
        return operation.judge(before, now) is not None

    try:
        now = host.wait_for(name, wanted.generation, judged, timeout_s=operation.timeout_s)
    except TimeoutError as error:
        raise CommandTimeout(
            f"{operation.verb} {name}: not done within {operation.timeout_s:g} s (now: {error})"
        ) from None
    state = now.state if now else State.DELETED.value
    why = now.sentence if now else _epitaph(host, name)
    is_so = operation.judge(before, now)
    if options.json:
        emit({"session": name, "state": state})
    elif is_so:
        print(f"{name}: {paint(state, 'bold')}" + (f". {why}" if why else ""))
    if not is_so:
        is_full = now is not None and now.reason == Reason.CAPACITY
        failed = CapacityReached if is_full else CommandFailed
        raise failed(f"{operation.verb} {name}: it is {state}. {why}".strip())


def _epitaph(host: Host, name: str) -> str:
    stone = host.sessions.tombstones.find(name)
    why = stone.why.removeprefix("deleted; ") if stone else ""
    return "" if why == "delete" else why
