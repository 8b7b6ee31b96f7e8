"""`whatsapp-worker demo`: the whole path in five steps, with the real client and no phone.

Everything runs as it would for an operator: a supervisor and a sandbox network as processes of
their own, a link attempt as `link` makes it, jobs as a CRM enqueues them. All of it ends with the
demo, however that ends.
"""

import contextlib
import inspect
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from redis import Redis, RedisError

from storage.errors import LockHeld
from storage.locks import FileLock, is_locked
from whatsapp_worker import process, redis_client, redis_server, settings
from whatsapp_worker.cli import demo_crm
from whatsapp_worker.cli.demo_events import Events
from whatsapp_worker.cli.host import Host
from whatsapp_worker.cli.link import HOW_TO_SCAN, drawing
from whatsapp_worker.cli.linking import Attempt, Code, Linked
from whatsapp_worker.cli.terminal import has_colours, paint
from whatsapp_worker.errors import AlreadyRunning, CommandFailed, WorkerError
from whatsapp_worker.settings import Settings

if TYPE_CHECKING:
    from whatsapp_worker.sandbox.control import Control, Message

SESSION = "demo"
PHONE = "5511999990001"
CONTACT = "5521988880002"
TEXTS = ("Hello from a queue.", "Olá! Your order 4711 is on its way. 🚚", "Reply STOP to opt out.")
AFTERWARDS = "I was killed in between, and nobody had to scan anything."

STEP_S = 30.0  # the most that one step may take
STOP_SUPERVISOR_S = 6.0
STOP_SANDBOX_S = 2.0
_MARK = ".whatsapp-worker-demo"
_COMMAND = (sys.executable, "-m", "whatsapp_worker.cli")


class StepFailed(CommandFailed):
    """A step of the demo did not do what it should."""


class Stopped(Exception):
    """SIGTERM asked the demo to end."""


def run(folder: Path, *, keep: bool) -> int:
    """Show the five steps.

    Args:
        folder: Of the demo alone; emptied first.
        keep: Leave everything running afterwards until Ctrl-C or SIGTERM.

    Returns:
        0 when every step did what it should, else 1.

    Raises:
        AlreadyRunning: Another demo uses the folder.
        UsageError: The folder holds something else.
    """
    folder = folder.absolute()
    with _reserved(folder), contextlib.ExitStack() as stack:
        previous = signal.signal(signal.SIGTERM, _on_sigterm)
        stack.callback(signal.signal, signal.SIGTERM, previous)
        demo = Demo(folder)
        stack.callback(demo.stop)
        try:
            demo.show()
            if keep:
                demo.stay()
        except Stopped:
            print("Stopping.", flush=True)
        except (WorkerError, RedisError, OSError, AssertionError) as error:
            demo.explain(error)
            return 1
    return 0


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise Stopped


@contextlib.contextmanager
def _reserved(folder: Path) -> Iterator[None]:
    """An empty folder of our own, locked against a second demo."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire()
    except LockHeld as error:
        raise AlreadyRunning(f"another demo runs on {folder}; stop that one first") from error
    with lock:
        _empty(folder)
        yield


def _empty(folder: Path) -> None:
    if folder.exists():
        if not (folder / _MARK).exists():
            raise AlreadyRunning(f"{folder} is not the demo's: move it away, or set DATA_DIR")
        # Left by a demo that was killed; its processes end by themselves within seconds.
        deadline = time.monotonic() + 10
        while any(is_locked(folder / name) for name in ("supervisor.lock", "sandbox/lock")):
            if time.monotonic() > deadline:
                raise AlreadyRunning(f"processes of an earlier demo still run on {folder}")
            time.sleep(0.1)
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    (folder / _MARK).touch()


class Demo:
    """The five steps, and the processes that they need."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logs = folder / "logs"
        self._environ = _clean_environment() | {
            "DATA_DIR": str(folder),
            "LINK_ATTEMPT_S": f"{STEP_S:g}",
            "CONNECT_TIMEOUT_S": f"{STEP_S:g}",
        }
        self._sandbox: subprocess.Popen[bytes] | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._host = Host(Settings.read(self._environ))
        self._step = "preparing"
        self._redis: Redis
        self._control: Control
        self._events: Events
        self._begun_at = time.monotonic()

    def show(self) -> None:
        """All five steps.

        Raises:
            StepFailed: One did not do what it should; `explain` tells which.
        """
        print(paint("whatsapp-worker demo", "bold"))
        print("The real WhatsApp client on a WhatsApp network of its own: no phone, no account.")
        self._begin(1, "Starting")
        self._start()
        self._begin(2, f'Linking a phone to the session "{SESSION}"')
        self._link()
        self._begin(3, "Sending three messages as a CRM does: plain RQ, none of our code")
        self._send_three()
        self._begin(4, "Killing the device process, and watching it heal")
        self._kill()
        self._begin(5, f"All of it worked, in {time.monotonic() - self._begun_at:.0f} s")
        self._point_onwards()

    def _begin(self, number: int, title: str) -> None:
        self._step = f"step {number} ({title.split(',')[0].split(':')[0]})"
        print(f"\n{paint(f'{number} ', 'cyan', 'bold')}{paint(title, 'bold')}", flush=True)

    def _start(self) -> None:
        self._logs.mkdir()
        begun_at = time.monotonic()
        self._sandbox = self._spawn("sandbox", "--state-dir", str(self._folder / "sandbox"))
        endpoints = self._await("the sandbox network", self._endpoints)
        self._environ |= endpoints.environment()
        from whatsapp_worker.sandbox.control import Control

        self._control = Control.from_state_dir(self._folder / "sandbox")
        _tick("sandbox network", f"{endpoints.proxy_url}  stands in for web.whatsapp.com", begun_at)
        begun_at = time.monotonic()
        self._supervisor = self._spawn("run", "--all")
        self._host = Host(Settings.read(self._environ))
        self._redis = self._await("Redis", self._connect)
        _tick("Redis", "brought along, append-only, on a socket in the demo's folder", begun_at)
        self._await("the supervisor", lambda: self._host.supervisor().alive)
        _tick("supervisor", f"process {self._supervisor.pid}, with the events process", begun_at)
        self._host.sessions.prepare()
        _tick("ledger", "SQLite, one file a session", begun_at)
        self._events = Events(self._redis, SESSION)

    def _spawn(self, *words: str) -> "subprocess.Popen[bytes]":
        """Start a command of ours that ends when the demo does; its log is in logs/."""
        with (self._logs / f"{words[0]}.log").open("ab") as log:
            return process.start_bound([*_COMMAND, *words], environ=self._environ, output=log)

    def _endpoints(self) -> Any:
        from whatsapp_worker.sandbox.endpoints import read_endpoints

        return read_endpoints(self._folder / "sandbox")

    def _connect(self) -> Redis | None:
        with contextlib.suppress(WorkerError, RedisError):
            client = redis_client.connect(redis_server.resolve_url(self._host.settings))
            client.ping()
            return client
        return None

    def _link(self) -> None:
        _say(f"$ whatsapp-worker link {SESSION}", "dim")
        print(HOW_TO_SCAN)
        states = self._states()
        linked, scanned = None, False
        for word in Attempt(self._host, SESSION).follow():
            if isinstance(word, Code):
                print("\n".join(drawing(word, colours=has_colours(sys.stdout))), flush=True)
                print(
                    f"An admin has {word.expires_in_s:.0f} s to scan it, then comes the next one."
                    f" Now a simulated phone scans it, +{PHONE}:"
                )
                self._control.scan(word.code, phone=PHONE)
                scanned = True
            elif isinstance(word, Linked):
                linked = word
            if scanned:
                states.show()
        if linked is None:
            raise StepFailed("the link attempt ended without a word")
        self._await("the session to be connected", lambda: states.show() == "connected")
        states.end()
        _tick("linked", f"+{linked.phone} as {linked.jid}")

    def _states(self) -> "_States":
        return _States(self._events)

    def _send_three(self) -> None:
        source = inspect.getsource(demo_crm.enqueue)
        _say(textwrap.indent(source.rstrip(), "   "), "dim")
        print()
        for number, text in enumerate(TEXTS, start=1):
            self._send(f"demo-{number}", text)

    def _send(self, message_id: str, text: str) -> None:
        """Enqueue one message and follow it until the contact has decrypted it."""
        begun_at = time.monotonic()
        job = demo_crm.enqueue(self._redis, message_id, f"+{CONTACT}", text)
        line = f"   {message_id}  {_word(str(job.get_status(refresh=False).value), begun_at)}"
        print(line, end="", flush=True)
        for event in ("message.sent", "message.delivered"):
            self._await(f"{event} of {message_id}", partial(self._heard, event, message_id))
            arrow = f" {paint('→', 'dim')} {_word(event.removeprefix('message.'), begun_at)}"
            print(arrow, end="", flush=True)
        found = self._await("the contact's copy", lambda: self._arrived(text))
        if len(found) != 1 or found[0]["times"] != 1:
            raise StepFailed(f"{message_id} arrived {len(found)} times")
        print(f"\n     the contact decrypted: {paint(found[0]['text'], 'green')}", flush=True)

    def _heard(self, event: str, message_id: str) -> bool:
        """Whether the stream told it; a failure on the stream ends the wait."""
        told = self._events.of_message(message_id)
        for bad in ("message.failed", "message.unknown"):
            if bad in told:
                raise StepFailed(f"{message_id}: {told[bad].get('error') or bad}")
        return event in told

    def _arrived(self, text: str) -> "list[Message]":
        return [row for row in self._control.messages(to=CONTACT) if row["text"] == text]

    def _kill(self) -> None:
        state = self._host.read_state(SESSION)
        if state is None or state.pid is None:
            raise StepFailed("the session has no device process")
        states = self._states()
        _say(f"$ kill -9 {state.pid}", "dim")
        begun_at = time.monotonic()
        os.kill(state.pid, signal.SIGKILL)
        self._await("the session to come back", lambda: states.show() == "connected")
        states.end()
        healed = self._host.read_state(SESSION)
        _tick("healed", f"process {healed and healed.pid}, without a new QR code", begun_at)
        self._send("demo-4", AFTERWARDS)

    def _point_onwards(self) -> None:
        """Where to look next; every command works as it is printed."""
        script, folder = _script(), shlex.quote(_relative(self._folder))
        rows = [
            ("look around", "make demo KEEP=1, then in another terminal:"),
            ("", f"export DATA_DIR={folder} WHATSAPP_NETWORK=sandbox"),
            ("", f"{script} status            (also: status --watch)"),
            ("", f"{script} messages list {SESSION}"),
            ("", f'{script} send {SESSION} +{CONTACT} "Hi" --wait'),
            ("a real phone", f"make run, then in another terminal: {script} link sales"),
            ("your own tests", f"{script} sandbox   (README: Testing your integration)"),
            ("data and logs", f"{folder}  (the next demo empties it)"),
        ]
        for name, text in rows:
            print(f"   {paint(f'{name:<15}', 'cyan')}{text}")

    def stay(self) -> None:
        """Leave everything running until Ctrl-C or SIGTERM.

        Raises:
            StepFailed: A process ended by itself.
        """
        self._step = "keeping it running"
        print(f"\n{paint('It goes on running.', 'bold')} Ctrl-C stops everything.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                self._check_processes()
                time.sleep(0.5)
        print("\nStopping.", flush=True)

    def _await(self, what: str, probe: Callable[[], Any]) -> Any:
        """Ask until the answer is true.

        Raises:
            StepFailed: Not within STEP_S, or a process that it needs has ended.
        """
        deadline = time.monotonic() + STEP_S
        while True:
            answer = probe()
            if answer:
                return answer
            self._check_processes()
            if time.monotonic() > deadline:
                raise StepFailed(f"waited {STEP_S:g} s in vain for {what}")
            time.sleep(0.02)

    def _check_processes(self) -> None:
        for name, started in (("sandbox", self._sandbox), ("supervisor", self._supervisor)):
            if started is not None and (code := started.poll()) is not None:
                raise StepFailed(f"the {name} ended by itself with exit code {code}")

    def explain(self, error: BaseException) -> None:
        """Say which step failed and why, with the log lines that matter."""
        print(flush=True)
        print(paint(f"The demo failed in {self._step}: {error}", "red", "bold"), file=sys.stderr)
        for path in sorted(self._logs.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()
            bad = [line for line in lines if " ERROR " in line or " WARNING " in line]
            print(f"\n{path}, last lines:", file=sys.stderr)
            for line in [*bad[-5:], *[line for line in lines[-15:] if line not in bad]]:
                print(f"  {line}", file=sys.stderr)

    def stop(self) -> None:
        """End every process, the supervisor first: within STOP_SUPERVISOR_S + STOP_SANDBOX_S."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for started, timeout_s in (
            (self._supervisor, STOP_SUPERVISOR_S),
            (self._sandbox, STOP_SANDBOX_S),
        ):
            if started is not None and started.poll() is None:
                process.end(started, timeout_s=timeout_s)


class _States:
    """Prints the states of the session as they pass, each once, on one line."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._last: str | None = None
        events.states()  # what was before is not news

    def show(self) -> str | None:
        """Print what is new; the latest state."""
        for state in self._events.states():
            if state != self._last:
                lead = "   " if self._last is None else f" {paint('→', 'dim')} "
                print(f"{lead}{paint(state, *_STYLES.get(state, ()))}", end="", flush=True)
                self._last = state
        return self._last

    def end(self) -> None:
        print(flush=True)


_STYLES = {"connected": ("green", "bold"), "reconnecting": ("yellow",), "linking": ("yellow",)}


def _clean_environment() -> dict[str, str]:
    """Ours, without any setting and proxy of the user's own: the demo touches nothing of theirs."""
    ours = {declaration.variable for declaration in settings.declarations().values()}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ours
        and not name.lower().endswith("_proxy")
        and name not in ("SSL_CERT_FILE", "SSL_CERT_DIR", "NOTIFY_SOCKET")
    }


def _tick(name: str, facts: str, begun_at: float | None = None) -> None:
    took = "" if begun_at is None else paint(f"  {time.monotonic() - begun_at:.1f} s", "dim")
    print(f"   {paint('✓', 'green')} {name:<16} {facts}{took}", flush=True)


def _word(status: str, begun_at: float) -> str:
    """A status with the time since the message was enqueued."""
    return f"{status} {paint(f'{(time.monotonic() - begun_at) * 1000:.0f} ms', 'dim')}"


def _say(text: str, *styles: str) -> None:
    print("\n".join(paint(line, *styles) for line in text.splitlines()), flush=True)


def _relative(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _script() -> str:
    """How the user calls us: the script beside this Python, when it is not on PATH."""
    beside = Path(sys.executable).with_name("whatsapp-worker")
    if shutil.which("whatsapp-worker") or not beside.exists():
        return "whatsapp-worker"
    return shlex.quote(_relative(beside))
