"""`whatsapp-worker run`: one a host; starts, watches and ends the processes of all sessions.

One thread and one loop. What may block lives elsewhere: events on the announcer's thread, the
queues of nobody on the keeper's, deletions on a worker's. The children:

    supervisor ── fork helper ── device and pairing processes (adopted when the helper dies)
               ├─ redis-server, without REDIS_URL
               └─ events, maintenance, when asked for
"""

import contextlib
import dataclasses
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.errors import LockHeld, RecordLost, StorageError
from storage.ledger import Ledger
from storage.locks import FileLock
from storage.sessions import Sessions
from whatsapp_worker import maintenance, process, reconnect, redis_client
from whatsapp_worker.alarm import Alarm
from whatsapp_worker.alerts import FLUSH_S
from whatsapp_worker.announcer import Announcer
from whatsapp_worker.companions import Companion
from whatsapp_worker.errors import AlreadyRunning, CommandFailed
from whatsapp_worker.event_names import Event
from whatsapp_worker.fork_helper import encode_settings
from whatsapp_worker.forker import COMMAND, Forker, ForkerGone
from whatsapp_worker.graves import Graves
from whatsapp_worker.keeper import Keeper
from whatsapp_worker.leftovers import Leftovers
from whatsapp_worker.managed_session import ManagedSession
from whatsapp_worker.notify import Notifier
from whatsapp_worker.redis_server import EmbeddedRedis
from whatsapp_worker.reports import Exit
from whatsapp_worker.session import State
from whatsapp_worker.session_process import DRAIN_S, SessionProcess, socket_pair
from whatsapp_worker.settings import Settings
from whatsapp_worker.stream import EventStream

log = logging.getLogger(__name__)

NOT_DRAINED = 9  # exit code: the shutdown had to be forced

TICK_S = 0.25
OUTAGE_EVERY_S = 1.0
FORK_TIMEOUT_S = 15.0  # an answer of the fork helper, once it is ready
HELPER_START_S = 60.0
HELPER_RETRY_S = 1.0
HELPER_END_S = 2.0  # it has nothing in hand
REDIS_RETRY_S = 1.0
SPAWN_RETRY_S = 1.0
UNREADABLE_RETRY_S = 5.0
LEFTOVER_TIMEOUT_S = 4.0
LEDGER_TIMEOUT_S = 5.0  # one call
LAST_WORDS_S = 1.0  # for what is flushed at the very end of a shutdown


def run(settings: Settings, *, also: Sequence[str] = ()) -> int:
    """Run the sessions of `settings.data_dir` until SIGTERM or SIGINT; call on the main thread.

    Args:
        settings: Of this process; handed on to the device processes as they are.
        also: Commands of ours (`events`, `maintenance`) to run as children, started again when
            they end, for hosts without a process manager.

    Returns:
        0 when everything drained, NOT_DRAINED when the shutdown was forced.

    Raises:
        AlreadyRunning: Another supervisor holds the data folder; the text says who.
        SandboxUnsafe: Sandbox mode in an environment that could reach WhatsApp.
        RedisUnavailable: No REDIS_URL, and no Redis server program is installed.
        StorageError: The data folder cannot be used.
        CommandFailed: Not on Linux.
    """
    if sys.platform != "linux":
        raise CommandFailed("whatsapp-worker run needs Linux; see docs/running.md")
    settings = dataclasses.replace(settings, data_dir=settings.data_dir.absolute())
    if settings.network == "sandbox":
        from whatsapp_worker.sandbox import patch

        patch.check_environment(os.environ)
    sessions = Sessions(settings.data_dir, max_tombstones=settings.max_tombstones)
    sessions.prepare()
    lock = FileLock(settings.data_dir / "supervisor.lock")
    note = {"host": socket.gethostname(), "network": settings.network, "started_at": time.time()}
    try:
        lock.acquire(1.0, note=note)
    except LockHeld as held:
        raise AlreadyRunning(_who_holds(settings.data_dir, held.holder)) from None
    process.raise_open_files(process.open_files_needed(settings.max_sessions))
    with lock:
        return Supervisor(settings, sessions, environ=os.environ, also=also).run()


def _who_holds(folder: Path, holder: Mapping[str, Any] | None) -> str:
    facts = holder or {}
    who = f"process {facts['pid']}" if "pid" in facts else "another process"
    where = f" on {facts['host']}" if "host" in facts else ""
    return (
        f"A supervisor runs on {folder} already: {who}{where}. There can be one: stop that one"
        " first, or use another DATA_DIR"
    )


class Supervisor:
    """The loop and what it owns. Also the `Host` of its sessions."""

    def __init__(
        self,
        settings: Settings,
        sessions: Sessions,
        *,
        environ: Mapping[str, str],
        also: Sequence[str] = (),
        helper: Sequence[str] = COMMAND,
    ) -> None:
        """
        Args:
            environ: Handed on whole to every child, with additions only.
            helper: The fork helper's program.
        """
        self.sessions = sessions
        self.policy = reconnect.Policy.of(settings)
        self._environ = {**environ, "DATA_DIR": str(settings.data_dir)}
        self._redis: EmbeddedRedis | None = None
        if settings.redis_url is None:
            self._redis = EmbeddedRedis(settings.data_dir, environ=self._environ)
            settings = dataclasses.replace(settings, redis_url=self._redis.url)
        self.settings = settings
        self._redis_retry_at = 0.0
        self._companions = [Companion([name], environ=self._environ) for name in also]
        self._helper_command = helper
        self._helper: Forker | None = None
        self._helper_asked_at = 0.0
        self._managed: dict[str, ManagedSession] = {}
        self._processes: dict[int, SessionProcess] = {}  # by run
        self._runs = 0
        self._spawn_at = 0.0  # no process is asked for before
        self._look_at = 0.0  # no record is looked at before
        self._unreadable: dict[str, float] = {}  # session: when to look at its records again
        self._selector = selectors.DefaultSelector()
        self._gate = reconnect.DialGate()
        self._is_outage = False
        self._outage_check_at = 0.0
        self._canary_at = 0.0
        self._leftovers = Leftovers()
        self._graves = Graves(settings)
        self._signals = 0
        self._notifier = Notifier(environ)
        self._consumed: frozenset[str] = frozenset()
        self._announcer = Announcer(self._stream())
        self._alarm = Alarm(settings)
        redis = redis_client.connect(self._url)
        self._keeper = Keeper(
            redis=redis,
            stream=self._stream(),
            sessions=Sessions(settings.data_dir, max_tombstones=settings.max_tombstones),
            consumed=lambda: self._consumed,
            result_ttl_s=settings.result_ttl_s,
            ledger_of=self._ledger_of,
            ledgers_are_one=settings.database_url is not None,
            timetable=lambda: maintenance.enqueue_purge(redis, settings, now=time.time()),
            on_fill=self._alarm.stream_is,
            on_poisoned=self._alarm.job_poisoned,
        )

    @property
    def _url(self) -> str:
        assert self.settings.redis_url is not None
        return self.settings.redis_url

    def _ledger_of(self, session: str) -> Ledger:
        folder = self.settings.data_dir / "sessions" / session
        where = self.settings.database_url or folder / "ledger.db"
        # Opening makes two calls, and no signal ends one: a stop is heeded in time all the same.
        timeout_s = min(LEDGER_TIMEOUT_S, self.settings.shutdown_timeout_s / 3)
        return Ledger.open(where, session, timeout_s=timeout_s)

    def _stream(self) -> EventStream:
        return EventStream(redis_client.connect(self._url), events_max=self.settings.events_max)

    # The life of a supervisor

    def run(self) -> int:
        """Until a signal; returns the exit code."""
        self._open()
        log.info(
            "supervisor.started",
            extra={"data_dir": str(self.settings.data_dir), "network": self.settings.network},
        )
        while not self._signals:
            self._wait()
            now = time.monotonic()
            self._reap(now)  # collect exits; each session judges what they mean
            self._hear(now)  # reports of the processes
            self._read_wanted(now)  # what operators want now
            self._keep_children(now)  # fork helper, Redis, companions
            self._tick(now)  # each session takes its next step
            self._mind_outage(now)  # one canary for all
            self._notifier.ticked(now)
        return self._drain()

    def _open(self) -> None:
        process.set_name("wa-supervisor")
        process.adopt_orphans()
        self._catch_signals()
        self.sessions.install_key()
        self.sessions.clean()
        locks = [self.sessions.session_lock(id).path for id in self.sessions.ids()]
        self._leftovers.end_all(locks, timeout_s=LEFTOVER_TIMEOUT_S)
        self._keep_children(time.monotonic())
        self._announcer.start()
        self._alarm.start()
        self._keeper.start()
        self._read_wanted(time.monotonic())
        self._notifier.ready()

    def _catch_signals(self) -> None:
        self._wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._on_signal)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(self._wake_read, selectors.EVENT_READ)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1

    def _wait(self) -> None:
        """Until something happens, or the next tick."""
        for key, _ in self._selector.select(self._nap_s()):
            if key.fd == self._wake_read:
                os.read(self._wake_read, 4096)

    def _nap_s(self) -> float:
        """Until the next process is due, a tick at most; shorter while some wait at the gate."""
        now = time.monotonic()
        ready = (
            session.ready_at for session in self._managed.values() if not self._is_held(session)
        )
        waits = (at - now for at in ready if at is not None)
        return max(reconnect.DIAL_SPACING_S, min(TICK_S, min(waits, default=TICK_S)))

    def _is_held(self, session: ManagedSession) -> bool:
        """Whether it leaves its dials to the canary."""
        return self._is_outage and session.standing.is_cut_off

    # Children

    def _keep_children(self, now: float) -> None:
        keepers = [self._keep_redis, *(companion.tick for companion in self._companions)]
        for keep in [*keepers, self._keep_helper]:
            try:
                keep(now)
            except OSError as error:  # no memory, no disk, no descriptors: try again
                log.error("child.not_started", extra={"problem": str(error)})

    def _keep_redis(self, now: float) -> None:
        if self._redis is None or self._redis.is_running() or now < self._redis_retry_at:
            return
        self._redis_retry_at = now + REDIS_RETRY_S
        self._redis.start()
        log.info("redis.started", extra={"pid": self._redis.pid})

    def _keep_helper(self, now: float) -> None:
        helper = self._helper
        if helper is None:
            if now >= self._helper_asked_at + HELPER_RETRY_S:
                self._helper_asked_at = now
                self._helper = Forker(self._environ, command=self._helper_command)
                self._selector.register(self._helper, selectors.EVENT_READ)
        elif not helper.is_running():
            self._on_helper_gone(helper, now)
        elif self._helper_hangs(helper, now):
            log.error("fork_helper.hung", extra={"pid": helper.pid})
            helper.kill()

    def _helper_hangs(self, helper: Forker, now: float) -> bool:
        if not helper.is_ready:
            return now > self._helper_asked_at + HELPER_START_S
        waiting = [run.started_at for run in self._processes.values() if run.is_unanswered]
        return bool(waiting) and now > min(waiting) + FORK_TIMEOUT_S

    def _on_helper_gone(self, helper: Forker, now: float) -> None:
        """Its children live on, as ours: the kernel gives orphans to the nearest subreaper."""
        self._on_answers(helper, now)
        log.warning("fork_helper.gone", extra={"pid": helper.pid})
        self._selector.unregister(helper)
        helper.close(timeout_s=0)
        self._helper = None
        for run in self._processes.values():
            run.is_orphan = True

    def _on_answers(self, helper: Forker, now: float) -> None:
        for answer in helper.hear():
            if "forked" in answer and answer["forked"] in self._processes:
                self._processes[answer["forked"]].forked(answer["pid"])
            elif "failed" in answer and answer["failed"] in self._processes:
                log.error("fork_helper.failed", extra={"problem": answer["problem"]})
                self._on_exit(self._processes[answer["failed"]], None, now)
            elif "exited" in answer:
                self._on_pid_exit(answer["exited"], answer["status"], now)

    def _reap(self, now: float) -> None:
        """Hear what the helper reaped, and reap what was adopted from a dead one."""
        if self._helper is not None:
            self._on_answers(self._helper, now)
        for run in list(self._processes.values()):
            if run.is_orphan:
                self._reap_orphan(run, now)
            elif run.has_vanished(now):
                self._on_exit(run, None, now)
        self._reap_strangers()

    def _reap_strangers(self) -> None:
        """Adopted processes that nobody knows: what a device process started and left behind."""
        children = [self._helper, self._redis, *self._companions, *self._processes.values()]
        known = {child.pid for child in children if child is not None}
        with contextlib.suppress(ChildProcessError):
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in known:  # its owner will ask for it
                    return
                os.waitpid(found.si_pid, 0)

    def _reap_orphan(self, run: SessionProcess, now: float) -> None:
        if run.pid is None:  # it was never forked, or will tell its id
            if run.closed_at is not None:
                self._on_exit(run, None, now)
            return
        try:
            pid, status = os.waitpid(run.pid, os.WNOHANG)
        except ChildProcessError:  # the helper reaped it and died before it could say so
            self._on_exit(run, None, now)
            return
        if pid:
            self._on_exit(run, status, now)

    def _on_pid_exit(self, pid: int, status: int, now: float) -> None:
        for run in self._processes.values():
            if run.pid == pid:
                self._on_exit(run, status, now)
                return

    def _on_exit(self, run: SessionProcess, status: int | None, now: float) -> None:
        """One device or pairing process is no more."""
        session = self._managed.get(run.session)
        if session is not None and session.process is run:
            with self._contained(run.session):
                session.hear(now)  # its last word may still lie in the channel
        self._pass_on(run)
        if words := run.last_words():
            facts = {"session": run.session, "kind": run.kind, "traceback": words}
            log.warning("process.crashed", extra=facts)
        self._forget(run)
        if session is not None and session.process is run:
            code = None if status is None else os.waitstatus_to_exitcode(status)
            run.was_forced |= code == Exit.NOT_DRAINED
            with self._contained(run.session):
                session.on_exit(run.ending(status), was_locked=code == Exit.LOCKED, now=now)

    def _forget(self, run: SessionProcess) -> None:
        del self._processes[run.run]
        self._unwatch(run)
        run.close()
        self._count_consumed()

    def _count_consumed(self) -> None:
        runs = self._processes.values()
        self._consumed = frozenset(run.session for run in runs if run.kind == "device")

    # Sessions

    def _hear(self, now: float) -> None:
        for run in list(self._processes.values()):
            session = self._managed.get(run.session)
            if run.closed_at is None:
                with self._contained(run.session):
                    if session is not None and session.process is run:
                        session.hear(now)
                    else:
                        run.hear(now)
            self._pass_on(run)
            if run.closed_at is not None:  # else the end of file would wake the loop for ever
                self._unwatch(run)

    def _pass_on(self, run: SessionProcess) -> None:
        """What went wrong in a device process, for a person to know."""
        failures, run.failures = run.failures, []
        for failure in failures:
            with self._contained(run.session):
                self._alarm.device_failed(run.session, failure)

    def _unwatch(self, run: SessionProcess) -> None:
        with contextlib.suppress(KeyError):  # done already
            self._selector.unregister(run.channel)

    def _read_wanted(self, now: float) -> None:
        if now < self._look_at:
            return
        try:
            changed = self.sessions.changed()
        except StorageError as error:
            log.error("sessions.unreadable", extra={"problem": str(error)})
            self._look_at = now + UNREADABLE_RETRY_S
            return
        again = {id for id, at in self._unreadable.items() if now >= at}
        for id in changed | again:
            try:
                self._take_up(id, now)
            except Exception as error:  # one session's records must not cost the others
                if id in changed:
                    why = {"session": id, "problem": str(error)}
                    bug = not isinstance(error, StorageError)
                    log.error("session.unreadable", extra=why, exc_info=bug)
                self._unreadable[id] = now + UNREADABLE_RETRY_S
            else:
                self._unreadable.pop(id, None)

    def _take_up(self, id: str, now: float) -> None:
        session = self._managed.get(id)
        try:
            wanted = self.sessions.wanted(id)
        except RecordLost:
            if session is None:
                raise  # whether it is to run is for a person to say
            self.sessions.restore(id, session.wanted)
            log.warning("session.record_restored", extra={"session": id})
            return
        if wanted is None:
            if session is not None and not self._graves.is_digging(id):  # else our own doing
                log.warning("session.vanished", extra={"session": id})
                self._drop(session, now)
        elif session is None or session.wanted.created_at != wanted.created_at:
            if session is not None:
                self._drop(session, now)
            record = self.sessions.state(id)
            self._managed[id] = ManagedSession(id, host=self, wanted=wanted, record=record, now=now)
        elif wanted.generation != session.wanted.generation or wanted.run != session.wanted.run:
            session.want(wanted, now)

    def _drop(self, session: ManagedSession, now: float) -> None:
        """Forget a session whose record is gone."""
        del self._managed[session.id]
        self._graves.forget(session.id)
        if session.process is not None:
            session.process.end(now, None)

    def _tick(self, now: float) -> None:
        for session in self._in_order():
            with self._contained(session.id):
                session.tick(now)
            if session.is_gone:
                del self._managed[session.id]
        for run in self._processes.values():
            run.escalate(now)
        self._notifier.status(self._status())

    @contextlib.contextmanager
    def _contained(self, session: str) -> Iterator[None]:
        """A bug that one session meets must not cost the others."""
        try:
            yield
        except Exception:
            log.exception("session.failed_here", extra={"session": session})

    def _in_order(self) -> list[ManagedSession]:
        """Those that have waited longest for their dial come first."""
        never = float("inf")
        return sorted(
            self._managed.values(),
            key=lambda session: (never if session.due_at is None else session.due_at, session.id),
        )

    def _status(self) -> str:
        connected = sum(session.state is State.CONNECTED for session in self._managed.values())
        return f"{connected} of {len(self._managed)} sessions connected"

    # One outage of the host is one fact

    def _mind_outage(self, now: float) -> None:
        if now < self._outage_check_at or not self.settings.failed_cooldown_s:
            return
        self._outage_check_at = now + OUTAGE_EVERY_S
        standings = [session.standing for session in self._managed.values()]
        if not self._is_outage and reconnect.outage(standings):
            self._is_outage, self._canary_at = True, now
            log.warning("outage.began", extra={"sessions": len(standings)})
        if self._is_outage and now >= self._canary_at and not self._has_canary():
            self._send_canary(standings, now)

    def _has_canary(self) -> bool:
        return any(run.is_canary for run in self._processes.values())

    def _send_canary(self, standings: list[reconnect.Standing], now: float) -> None:
        who = reconnect.canary(standings)
        if who is None:  # nobody is cut off any more: operators changed things
            self._is_outage = False
        elif self._managed[who].wanted.run == "run" and self._managed[who].process is None:
            self._canary_at = now + reconnect.CANARY_EVERY_S
            with self._contained(who):
                self._managed[who].dial(now, as_canary=True)

    # What sessions need of their host

    def wall(self) -> float:
        return time.time()

    def spawn(self, session: str, kind: str, arguments: Mapping[str, Any]) -> SessionProcess | None:
        now = time.monotonic()
        if self._helper is None or not self._helper.is_ready or self._signals:
            return None
        if now < self._spawn_at:
            return None
        self._runs += 1
        request = {
            "run": self._runs,
            "kind": kind,
            "session": session,
            "settings": encode_settings(self.settings),
            "args": dict(arguments),
        }
        try:
            run = self._ask_for(self._helper, request, now)
        except (OSError, ForkerGone) as error:  # no descriptors, no memory, no helper: try again
            log.error("process.not_started", extra={"session": session, "problem": str(error)})
            self._spawn_at = now + SPAWN_RETRY_S
            return None
        self._processes[run.run] = run
        self._count_consumed()
        return run

    def _ask_for(self, helper: Forker, request: dict[str, Any], now: float) -> SessionProcess:
        """Have a process forked, with a channel and an output file that we watch and own."""
        with contextlib.ExitStack() as undo:
            output = process.output_file()
            undo.callback(os.close, output)
            channel, theirs = socket_pair()
            undo.callback(channel.close)
            with theirs:
                self._selector.register(channel, selectors.EVENT_READ)
                undo.callback(self._selector.unregister, channel)
                helper.fork(request, theirs.fileno(), output)
            undo.pop_all()
        return SessionProcess(
            request["run"], request["kind"], request["session"], channel, now, output=output
        )

    def has_room(self, session: str) -> bool:
        others = sum(other.holds_slot for other in self._managed.values() if other.id != session)
        return others < self.settings.max_sessions

    def admits_dial(self, session: str) -> bool:
        if self._helper is None or not self._helper.is_ready:
            return False
        if session in self._managed and self._is_held(self._managed[session]):
            return False
        dialling = sum(run.is_dialling for run in self._processes.values())
        return self._gate.admit(now=time.monotonic(), dialling=dialling)

    def told(self, event: Event, session: str, payload: Mapping[str, Any]) -> None:
        self._announcer.announce(event, session, payload)
        if event is Event.STATE_CHANGED:
            managed = self._managed.get(session)
            was_asked = managed is not None and managed.is_logging_out
            self._alarm.session_changed(session, payload, was_asked=was_asked)

    def logged_in(self, session: str) -> None:
        if not self._is_outage:
            return
        self._is_outage = False
        log.info("outage.ended", extra={"session": session})
        now = time.monotonic()
        for other in self._managed.values():
            other.release(now)

    def finish_deletion(self, session: str, *, why: str) -> bool:
        return self._graves.dig(session, why=why, now=time.monotonic())

    def end_leftover(self, session: str) -> bool:
        lock = self.sessions.session_lock(session).path
        mine = [run.pid for run in self._processes.values() if run.pid is not None]
        return self._leftovers.end(lock, mine=mine, now=time.monotonic())

    # Shutdown: starting undone, in reverse, under one shrinking deadline

    def _drain(self) -> int:
        """The first signal asks, the second insists."""
        deadline = time.monotonic() + self.settings.shutdown_timeout_s
        log.info("supervisor.stopping", extra={"within_s": self.settings.shutdown_timeout_s})
        self._notifier.stopping()
        drained = self._drain_sessions(deadline - LAST_WORDS_S)
        for companion in self._companions:
            companion.ask_to_end()
        now = time.monotonic()
        for session in self._managed.values():
            with self._contained(session.id):
                session.left(now)
        if self._helper is not None:
            self._helper.close(timeout_s=min(HELPER_END_S, self._left_s(deadline)))
        drained &= self._keeper.stop(timeout_s=self._left_s(deadline))
        self._graves.stop(timeout_s=min(LAST_WORDS_S, self._left_s(deadline)))
        self._announcer.stop(timeout_s=min(LAST_WORDS_S, self._left_s(deadline)))
        for companion in self._companions:
            drained &= companion.end(deadline=time.monotonic() + self._left_s(deadline))
        if self._redis is not None:
            drained &= self._redis.stop(timeout_s=max(0.5, self._left_s(deadline)))
        self._alarm.close(timeout_s=min(FLUSH_S, max(0.5, self._left_s(deadline))))
        log.info("supervisor.stopped", extra={"drained": drained})
        return 0 if drained else NOT_DRAINED

    def _left_s(self, deadline: float) -> float:
        return 0.0 if self._signals > 1 else max(0.0, deadline - time.monotonic())

    def _drain_sessions(self, deadline: float) -> bool:
        """End all processes; whether every device process went by itself."""
        now = time.monotonic()
        drain_s = min(DRAIN_S, max(0.0, deadline - now - 4.0))
        for session in self._managed.values():
            with self._contained(session.id):
                session.leave(now, drain_s=drain_s)
        for run in self._processes.values():
            run.hasten(deadline)
        runs = [run for run in self._processes.values() if run.kind == "device"]
        while self._processes:
            self._wait()
            now = time.monotonic()
            if self._helper is not None and not self._helper.is_running():
                self._on_helper_gone(self._helper, now)
            self._reap(now)
            self._hear(now)
            for run in self._processes.values():
                if self._signals > 1 or now >= deadline:
                    run.kill(now)
                run.escalate(now)
            if now > deadline + LAST_WORDS_S:
                return False
        return not any(run.was_forced for run in runs)
