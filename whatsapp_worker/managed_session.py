"""One session under supervision: what operators want and what its process tells become states.

Level-triggered: `tick` compares what is wanted with what is and takes the next step, so nothing
depends on the order in which requests, reports and exits come in. Times called `now` are
monotonic seconds, those in records are UTC seconds.
"""

import dataclasses
import logging
import random
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from storage.errors import LockHeld, StorageError
from storage.sessions import StateRecord, Wanted
from whatsapp_worker import device_store, reconnect
from whatsapp_worker.device_store import DeviceStoreBroken
from whatsapp_worker.endings import Ending, EndingKind
from whatsapp_worker.history import History
from whatsapp_worker.reconnect import Again, GiveUp, Policy, Standing
from whatsapp_worker.session import Reason, State, Trigger
from whatsapp_worker.session_link import LinkHost, SessionLink
from whatsapp_worker.session_process import DRAIN_S, SessionProcess
from whatsapp_worker.session_status import SessionStatus

log = logging.getLogger(__name__)

LOGOUT_ATTEMPT_S = 30.0
CONNECT_MARGIN_S = 5.0  # the device process ends a dial by itself; this is for one that does not
LOGOUT_RETRY_S = 3.0
LEFTOVER_RETRY_S = 0.5
READY_S = 0.75  # a process is started so long before it is to dial
RECYCLE_AFTER_S = 24 * 3600.0
RECYCLE_SPREAD_S = 6 * 3600.0  # sessions that began together are not recycled together
# One that is too big is recycled at this age, the next at twice that: one that is too big from the
# start would else log in all the time, to no avail.
YOUNG_S = 10.0
LONGEST_YOUTH_S = 3600.0
OPEN_FILES_SHARE = 0.8
FORCED_MEMORY = 1.5  # times the limit

_LONG_AGO = float("-inf")
_WORKING = frozenset({State.CONNECTING, State.CONNECTED, State.RECONNECTING, State.FAILED})
_WAITING = frozenset(State) - {State.CONNECTING, State.CONNECTED, State.DELETED}
# Without a process these go on by themselves, so there a dial is always due.
_UNDER_WAY = frozenset({State.LINKING, State.CONNECTING, State.CONNECTED, State.RECONNECTING})
_TRIGGERS = {
    EndingKind.LOGGED_OUT: Trigger.LOGGED_OUT,
    EndingKind.REPLACED: Trigger.REPLACED,
    EndingKind.BANNED: Trigger.BANNED,
    EndingKind.OUTDATED: Trigger.OUTDATED,
}


class Host(LinkHost, Protocol):
    """What a session needs of its supervisor."""

    policy: Policy

    def spawn(self, session: str, kind: str, arguments: Mapping[str, Any]) -> SessionProcess | None:
        """Have a process forked; None when that is impossible just now."""

    def has_room(self, session: str) -> bool:
        """Whether MAX_SESSIONS allows this session to run."""

    def admits_dial(self, session: str) -> bool:
        """Whether this session may dial now; True counts as a dial."""

    def logged_in(self, session: str) -> None:
        """A session has logged in: WhatsApp can be reached."""

    def finish_deletion(self, session: str, *, why: str) -> bool:
        """Remove all that is left of a session without a process; False: ask again."""

    def end_leftover(self, session: str) -> bool:
        """End a process of an earlier supervisor that holds the session; whether it is free."""


@dataclass
class LogoutAttempt:
    """A logout under way: at an operator's request, or for a deletion (request None)."""

    request: str | None
    deadline: float
    ordered: bool = False


class ManagedSession:
    """The supervisor's view of one session; used by its loop alone."""

    def __init__(
        self, id: str, *, host: Host, wanted: Wanted, record: StateRecord | None, now: float
    ) -> None:
        self.id = id
        self.wanted = wanted
        self.process: SessionProcess | None = None
        self.due_at: float | None = None  # when to dial; None: not by itself
        self.dialled_at = 0.0
        self._host = host
        self._database: Path = host.sessions.folder(id) / "device.db"
        self._past = reconnect.History()
        self._logout: LogoutAttempt | None = None
        self._is_restarting = False
        self._recycle_after_s = RECYCLE_AFTER_S + random.uniform(0, RECYCLE_SPREAD_S)
        self._youth_s = YOUNG_S
        self._not_before = 0.0  # no process is started before
        self._sent = 0  # messages of this process, as it last said
        self._is_told_held = False  # of a process that is not ours and holds the session
        self._phone_lists_it = False
        self._is_gone = False
        self._status = SessionStatus(
            id,
            sessions=host.sessions,
            record=record,
            touched_at=wanted.touched_at,
            history=History(self._database.parent, limit=host.settings.history_events),
            max_sessions=host.settings.max_sessions,
            tell=host.told,
            wall=host.wall,
        )
        self._link = SessionLink(id, host=host, status=self._status, dial=self._start)
        self._resume(now)

    # What it is

    @property
    def record(self) -> StateRecord:
        return self._status.record

    @property
    def state(self) -> State:
        return self._status.state

    @property
    def reason(self) -> Reason | None:
        return self._status.reason

    @property
    def standing(self) -> Standing:
        return Standing(self.id, self.state, self.reason, self.dialled_at)

    @property
    def holds_slot(self) -> bool:
        """Whether it counts towards MAX_SESSIONS."""
        return self.process is not None or self.state in _WORKING or self.state is State.LINKING

    @property
    def ready_at(self) -> float | None:
        """When it wants a process next; None: not by itself, or not before others make room."""
        if self.due_at is None or self.process is not None or self.reason is Reason.CAPACITY:
            return None
        return self.due_at - READY_S

    @property
    def is_logging_out(self) -> bool:
        """Whether an operator asked for a logout that is under way."""
        return self._logout is not None

    @property
    def is_gone(self) -> bool:
        """Whether its deletion is finished."""
        return self._is_gone

    @property
    def _is_at_home(self) -> bool:
        """Whether this supervisor serves the network that the session lives on."""
        return self.wanted.network == self._host.settings.network

    # What comes in

    def _resume(self, now: float) -> None:
        """Take up what an earlier supervisor left."""
        known = {**self.record.fields, "network": self.wanted.network}  # for a record that is lost
        self._status.set(pid=None, degraded=False, rss_mib=None, queue=None, fields=known)
        self._link.hide()
        is_behind = self.record.generation < self.wanted.generation
        if is_behind or self._link.is_new(self.wanted.link):
            self.want(self.wanted, now)
        if self.wanted.run != "run":
            return
        if self._is_at_home and not self._link.is_open and self.due_at is None:
            self._resume_running(now)

    def _resume_running(self, now: float) -> None:
        match self.state:
            case State.LOGGED_OUT | State.REPLACED | State.OUTDATED | State.UNLINKED:
                return
            case State.BANNED:
                self._wait_out_ban(now)
            case State.FAILED if not self._host.settings.failed_cooldown_s:
                return
            case _:
                self._start(now)

    def want(self, wanted: Wanted, now: float) -> None:
        """Operators changed their mind; of several commands the last counts.

        What is asked for here is handled now or superseded, and never done later.
        """
        self.wanted = wanted
        is_logout = self._take_up("logout", wanted.logout)
        is_restart = self._take_up("restart", wanted.restart)
        if wanted.run != "run" or is_logout:  # a link that came later would have taken these back
            self._link.refuse(wanted.link, Reason.OPERATOR, now)
        if wanted.run != "run" or not self._is_at_home:
            self._link.give_up(Reason.OPERATOR, now)
            self._logout, self.due_at = None, None
        if wanted.run != "run":
            return
        if not self._link.is_of(wanted.link):
            self._link.give_up(Reason.OPERATOR, now)
        is_link = self._link.is_new(wanted.link)
        if is_link:
            self._begin_link(wanted.link or {}, now)
        if not self._is_at_home:
            return
        if is_logout:
            self._logout = LogoutAttempt(wanted.logout, now + LOGOUT_ATTEMPT_S)
            if self.process is None and self.state is not State.LOGGED_OUT:
                self._start(now)
        elif is_restart:
            self._is_restarting = self.process is not None
            self._start(now)
        elif not is_link and self.process is None and not self._link.is_open:
            self._start(now)

    def _begin_link(self, link: Mapping[str, Any], now: float) -> None:
        """Take up a link request, or answer it at once."""
        good = self.state is not State.LOGGED_OUT and not link.get("again")
        pairs = not (good and (self._has_device() or self._has_credentials()))
        age_s = max(0.0, self._host.wall() - self.wanted.touched_at)
        self._link.begin(link, age_s=age_s, pairs=pairs, now=now)
        if not self._is_at_home:
            self._link.give_up(Reason.WRONG_NETWORK, now)
        elif self._link.is_late(now):  # whoever asked is long gone
            self._link.give_up(Reason.QR_EXPIRED, now)
        elif pairs and not self._host.has_room(self.id):
            self._link.give_up(Reason.CAPACITY, now)
        elif not pairs and self.process is None:
            self._start(now)
        elif not pairs and self.state is State.CONNECTED:
            self._link.succeed(now)

    def _take_up(self, kind: str, request: str | None) -> bool:
        """Note a request as handled; whether it is new."""
        if not request or request == self.record.fields.get(kind):
            return False
        self._status.set(fields={**self.record.fields, kind: request})
        return True

    def _start(self, now: float) -> None:
        """Dial now, with a clean slate."""
        self._past = reconnect.History()
        self.due_at = now

    def release(self, now: float) -> None:
        """The outage is over: dial as soon as the gate lets it."""
        if self.standing.is_cut_off and self.due_at is not None:
            self._past = dataclasses.replace(self._past, attempt=1)
            self.due_at = now

    def hear(self, now: float) -> None:
        """Read and act on what its process said."""
        if self.process is None:
            return
        for report in self.process.hear(now):
            self._on_report(report, now)

    def _on_report(self, report: dict[str, Any], now: float) -> None:
        match report.get("report"):
            case "connecting" if self._is_dial_due(now + READY_S):
                self._tell_dial()
            case "connected":
                self._on_connected(report, now)
            case "heartbeat":
                self._on_heartbeat(report)
            case "qr" | "code":
                self._link.show(report)
            case "paired":
                self._link.accepted(now)
            case "failure":
                log.warning("device.failure", extra={"session": self.id, "facts": report})

    def _on_connected(self, report: dict[str, Any], now: float) -> None:
        facts = {name: report.get(name) for name in ("jid", "lid", "phone", "push_name")}
        if not self._status.move(Trigger.LOGIN, None, attempt=0, next_attempt_at=None, **facts):
            return
        wall = self._host.wall()
        self._status.set(touched_at=wall, proof_of_life_at=wall, banned_until=None)
        self._past = reconnect.logged_in(self._past)
        self.due_at = None
        self._link.succeed(now)
        self._host.logged_in(self.id)

    def _on_heartbeat(self, report: dict[str, Any]) -> None:
        age_s = report.get("proof_of_life_age_s")
        sent, self._sent = self._sent, int(report.get("sent") or 0)
        if self._sent > sent:
            self._status.set(touched_at=round(self._host.wall(), 3))
        alive_at = None if age_s is None else round(self._host.wall() - float(age_s), 1)
        self._status.set(
            degraded=bool(report.get("degraded")) and self.state is State.CONNECTED,
            proof_of_life_at=alive_at or self.record.proof_of_life_at,
            rss_mib=report.get("rss_mib"),
            queue=report.get("queue"),
        )

    # What happens with time

    def tick(self, now: float) -> None:
        """Take the next step, whatever it is."""
        if self.process is not None:
            self._watch(self.process, now)
        self._pursue(now)
        if not self._is_gone:
            self._status.save(now)

    def _pursue(self, now: float) -> None:
        if self.wanted.run == "delete":
            self._pursue_deletion(now)
        elif not self._is_at_home:
            self._rest(now, Reason.WRONG_NETWORK)
        elif self.wanted.run == "stop":
            self._rest(now, Reason.OPERATOR)
        elif self._link.is_pairing:
            self._pursue_pairing(now)
        else:
            self._pursue_running(now)
        if self.process is None and self.state is State.CONNECTED:
            self._status.move(Trigger.DIAL, None)  # the next process may be some time in coming

    def _rest(self, now: float, reason: Reason) -> None:
        if self.process is not None:
            self.leave(now, drain_s=DRAIN_S)
            return
        if (self.state, self.reason) != (State.STOPPED, reason):
            self._status.move(Trigger.STOP, reason, attempt=0, next_attempt_at=None)
        self._status.set(generation=self.wanted.generation)

    def _pursue_pairing(self, now: float) -> None:
        self._status.set(generation=self.wanted.generation)
        arguments = self._link.pursue(self.process, now)
        if arguments is None or now < self._not_before:
            return
        if self._spawn("pairing", arguments, now):
            assert self.process is not None
            self._link.started(self.process)

    def _pursue_running(self, now: float) -> None:
        if self.process is None and self.due_at is None and self.state in _UNDER_WAY:
            self.due_at = now
        if self._link.is_late(now):
            self._link.give_up(self.reason or Reason.CONNECTION_FAILED, now)
        if self._logout is not None:
            self._pursue_logout(self._logout, now)
        if self.process is not None and self.process.kind == "pairing":
            self.process.kill(now)  # of an attempt that was given up
        elif self.process is not None and self._is_restarting:
            self.process.ask(now, drain_s=DRAIN_S, verdict=Ending(EndingKind.RECYCLED))
        elif self.process is None and self.due_at is not None and now >= self.due_at - READY_S:
            self._dial(now)
        elif self.process is not None and self._is_dial_due(now):
            self._tell_dial()
        if not self._is_starting(now):
            self._status.set(generation=self.wanted.generation)

    def _is_starting(self, now: float) -> bool:
        """Whether a command waits for a dial that is due, or for something to end before it."""
        if self.process is not None and self.process.is_ending:
            return True
        is_due = self.process is None and self.due_at is not None and now >= self.due_at
        is_waiting = is_due and self._host.has_room(self.id)
        return is_waiting or self._is_restarting or self._logout is not None

    def _pursue_logout(self, logout: LogoutAttempt, now: float) -> None:
        process = self.process
        if self.state is State.LOGGED_OUT:
            self._logout = None
        elif process is None and not self._has_credentials():
            self._logout, self.due_at = None, now  # which comes to rest without a dial
        elif now > logout.deadline:
            log.warning("session.logout_failed", extra={"session": self.id})
            self._logout = None
        elif process is not None and not logout.ordered and not process.is_ending:
            logout.ordered = process.channel.send(order="logout")
        elif process is None:
            logout.ordered = False

    def _pursue_deletion(self, now: float) -> None:
        """Log out while that is possible, then remove everything; one step a tick."""
        self._link.give_up(Reason.OPERATOR, now)
        if self._logout is None:
            self._phone_lists_it = self.state is not State.LOGGED_OUT and self._has_credentials()
            # Credentials of the other network mean nothing here, and are not shown to it.
            could = self._phone_lists_it and self._is_at_home
            self._logout = LogoutAttempt(None, now + LOGOUT_ATTEMPT_S if could else _LONG_AGO)
            self._past, self.due_at = reconnect.History(), now
        if self.state is not State.DELETED:
            self._status.move(Trigger.DELETE, Reason.OPERATOR, said="It is being deleted.")
        if now <= self._logout.deadline and self._phone_lists_it:
            self._pursue_last_logout(self._logout, now)
        elif self.process is not None:
            self.process.end(now, Ending(EndingKind.STOPPED))
        else:
            self._is_gone = self._host.finish_deletion(self.id, why=self._epitaph())

    def _pursue_last_logout(self, logout: LogoutAttempt, now: float) -> None:
        if self.process is None:
            logout.ordered = False
            if self.due_at is not None and now >= self.due_at and self._host.admits_dial(self.id):
                self.due_at = now + self._host.settings.reconnect_waits_s[0]
                self._spawn("device", {}, now)
        elif self.process.kind != "device":
            self.process.kill(now)
        if self.process is not None and not logout.ordered and not self.process.is_ending:
            logout.ordered = self.process.channel.send(order="logout")

    def _epitaph(self) -> str:
        if self._phone_lists_it:
            return (
                "deleted; WhatsApp could not be told, so the phone still lists this device:"
                " remove it there under Linked devices"
            )
        return self.wanted.why or "delete"

    # Dialling

    def _dial(self, now: float) -> None:
        if now < self._not_before:
            return
        if not self._database.exists():
            self._rest_unlinked()
            return
        if not self._host.has_room(self.id):
            if self.reason is not Reason.CAPACITY:
                self._status.move(Trigger.STOP, Reason.CAPACITY, attempt=0, next_attempt_at=None)
            self._link.give_up(Reason.CAPACITY, now)
            return
        if not self._host.admits_dial(self.id):
            return
        try:
            has_credentials = self._read_credentials()
        except LockHeld:
            self._on_locked(now)
            return
        if has_credentials:
            self.dial(now)
        else:
            self._rest_unlinked()

    def _rest_unlinked(self) -> None:
        """There are no credentials to dial with."""
        self.due_at = None
        if self.state not in (State.UNLINKED, State.LOGGED_OUT):
            self._status.move(Trigger.UNPAIRED, None)

    def dial(self, now: float, *, as_canary: bool = False) -> bool:
        """Start a device process; it gets ready and dials when that is due."""
        dial_at = now if as_canary or self.due_at is None else max(now, self.due_at)
        if not self._spawn("device", {"dial_at": dial_at}, now):
            return False
        assert self.process is not None
        self.process.is_canary = as_canary
        self.dialled_at = now
        if dial_at <= now:
            self._tell_dial()
        return True

    def _is_dial_due(self, now: float) -> bool:
        """Whether a process that was started early dials now."""
        is_early = self.state in _WAITING
        return is_early and self.due_at is not None and now >= self.due_at

    def _tell_dial(self) -> None:
        if self.process is None or not self.process.is_canary:
            self.due_at = None
        reason = self.reason if self._past.attempt and self.state is not State.STOPPED else None
        self._status.move(Trigger.DIAL, reason, attempt=self._past.attempt, next_attempt_at=None)

    def _spawn(self, kind: str, arguments: dict[str, Any], now: float) -> bool:
        self.process = self._host.spawn(self.id, kind, arguments)
        if self.process is None:
            return False
        self._status.set(pid=None)
        return True

    def _has_device(self) -> bool:
        return self.process is not None and self.process.kind == "device"

    def _has_credentials(self) -> bool:
        try:
            return self._read_credentials()
        except LockHeld:
            return True

    def _read_credentials(self) -> bool:
        """Whether device.db holds credentials; of an unreadable one its process will tell.

        Raises:
            LockHeld: A process holds the session (transient).
        """
        if not self._database.exists():
            return False
        try:
            with self._host.sessions.session_lock(self.id):
                return device_store.identity(self._database) is not None
        except LockHeld:
            raise
        except (DeviceStoreBroken, StorageError) as error:
            log.warning("device_store.unreadable", extra={"session": self.id, "why": str(error)})
            return True

    # Watching

    def _watch(self, process: SessionProcess, now: float) -> None:
        """Find what went wrong with a process that does not say so itself."""
        if process.pid != self.record.pid:
            self._status.set(pid=process.pid)
        process.escalate(now)
        if process.is_ending:
            return
        verdict = self._judge(process, now)
        if verdict is not None:
            self._status.note("process.ended", reason=verdict.reason, detail=verdict.detail)
            process.end(now, verdict)
        elif process.login_at is not None and process.heartbeat.get("idle"):
            self._recycle(process, now - process.login_at, now)

    def _judge(self, process: SessionProcess, now: float) -> Ending | None:
        """The verdict over a process that must be ended at once; None for a sound one."""
        settings = self._host.settings
        silent_s = now - process.heard_at
        hang_s = settings.hang_timeout_s
        ages = [
            process.heartbeat.get(name) for name in ("loop_age_s", "consumer_age_s", "client_age_s")
        ]
        if silent_s > hang_s or any(age is not None and age > hang_s for age in ages):
            return Ending(EndingKind.CRASHED, Reason.PROCESS_HUNG, "no progress")
        if process.closed_at is not None and now - process.closed_at > CONNECT_MARGIN_S:
            return Ending(EndingKind.CRASHED, Reason.PROCESS_HUNG, "closed its channel")
        if process.is_dialling and process.connecting_at is not None:
            limit_s = settings.connect_timeout_s + CONNECT_MARGIN_S
            if process.is_canary:  # a dial into a dead network must not hold up the next
                limit_s = min(limit_s, reconnect.CANARY_EVERY_S)
            if now - process.connecting_at > limit_s:
                return Ending(EndingKind.LOST, Reason.CONNECTION_FAILED, "no login in time")
        if self._is_too_big(process, FORCED_MEMORY):
            return Ending(EndingKind.CRASHED, Reason.MEMORY_LIMIT)
        life_age_s = process.heartbeat.get("proof_of_life_age_s")
        if process.heartbeat.get("degraded") and life_age_s is not None and life_age_s > hang_s:
            return Ending(EndingKind.LOST, Reason.KEEPALIVE_TIMEOUT, "no proof of life")
        return None

    def _is_too_big(self, process: SessionProcess, times: float) -> bool:
        rss_mib = process.heartbeat.get("rss_mib")
        return rss_mib is not None and rss_mib > times * self._host.settings.memory_limit_mib

    def _recycle(self, process: SessionProcess, age_s: float, now: float) -> None:
        """Replace an idle process that is old, or that is too big and no child any more."""
        is_big = self._is_too_big(process, 1)
        is_leaking = (is_big or _descriptors_run_out(process)) and age_s > self._youth_s
        if is_leaking:
            self._youth_s = min(2 * self._youth_s, LONGEST_YOUTH_S)
        if is_leaking or age_s > self._recycle_after_s:
            reason = Reason.MEMORY_LIMIT if is_big else None
            process.ask(now, drain_s=DRAIN_S, verdict=Ending(EndingKind.RECYCLED, reason))

    # Endings

    def on_exit(self, ending: Ending, *, was_locked: bool, now: float) -> None:
        """Its process is reaped.

        Args:
            ending: Why, all things considered.
            was_locked: It left at once because another process holds the session.
        """
        process, self.process = self.process, None
        if process is None:
            return
        self._is_restarting, self._sent = False, 0
        self._is_told_held &= was_locked
        self._status.set(pid=None, degraded=False, rss_mib=None, queue=None)
        self._status.note(f"{process.kind}.ended", **ending.report())
        log.info(
            "process.ended", extra={"session": self.id, "kind": process.kind, **ending.report()}
        )
        if self.wanted.run == "delete":
            self._on_exit_in_deletion(ending)
        elif was_locked:
            self._on_locked(now)
        elif process.kind == "pairing":
            self._link.on_ended(process, ending, now)
        else:
            self._on_device_ended(process, ending, now)

    def _on_exit_in_deletion(self, ending: Ending) -> None:
        if ending.kind is EndingKind.LOGGED_OUT:
            self._phone_lists_it = False

    def _on_locked(self, now: float) -> None:
        freed = self._host.end_leftover(self.id)
        if not self._is_told_held:
            log.warning("session.held", extra={"session": self.id, "freed": freed})
        self._is_told_held = True
        self._not_before = now + LEFTOVER_RETRY_S
        self.due_at = max(now, self.due_at or now)

    def _on_device_ended(self, process: SessionProcess, ending: Ending, now: float) -> None:
        if self.wanted.run != "run" or self._link.is_pairing:
            return
        if self._is_dial_due(now + READY_S):  # it ended before it could dial
            self._tell_dial()
        if ending.kind in _TRIGGERS:
            self._on_final(ending, now)
        elif ending.kind in (EndingKind.LOST, EndingKind.CRASHED):
            self._on_lost(process, ending, now)
        elif ending.kind is EndingKind.REFUSED:
            log.error("session.refused", extra={"session": self.id, "problem": ending.detail})
            self._on_lost(process, dataclasses.replace(ending, reason=Reason.CANNOT_RUN), now)
        else:  # stopped or recycled: the next one begins at once, or soon after a logout refused
            self.due_at = now + (LOGOUT_RETRY_S if self._logout else 0.0)

    def _on_final(self, ending: Ending, now: float) -> None:
        """Only a person, or the end of a ban, helps."""
        self.due_at = None
        self._status.move(
            _TRIGGERS[ending.kind],
            ending.reason,
            banned_until=ending.until,
            attempt=0,
            next_attempt_at=None,
        )
        if ending.kind is EndingKind.BANNED:
            self._wait_out_ban(now)
        if ending.kind is EndingKind.LOGGED_OUT:
            self._link.pair_instead(ending.reason)
        else:
            self._link.give_up(ending.reason, now)

    def _wait_out_ban(self, now: float) -> None:
        until = self.record.banned_until or self._host.wall()
        self.due_at = now + max(0.0, until - self._host.wall())

    def _on_lost(self, process: SessionProcess, ending: Ending, now: float) -> None:
        lost_at = process.ended_at or now
        reason = ending.reason or Reason.CONNECTION_FAILED
        said = None  # the reason's own sentence; this one only points at the log
        if reason is Reason.CANNOT_RUN and ending.detail:
            said = f"This host cannot run the session: {ending.detail}"
        if process.is_canary and process.login_at is None:
            # The outage goes on; nothing is counted, and the cool-down stands.
            next_at = None if self.due_at is None else self._at(max(0.0, self.due_at - now))
            self._status.move(Trigger.SPENT, reason, said=said, next_attempt_at=next_at)
            return
        verdict = self._host.policy.lost(self._past, now=lost_at, login_at=process.login_at)
        self._past = verdict.history
        if isinstance(verdict, Again):
            self._wait_for_attempt(verdict, reason, said, lost_at)
        else:
            self._fail(verdict, reason, said, lost_at, now)

    def _wait_for_attempt(
        self, again: Again, reason: Reason, said: str | None, lost_at: float
    ) -> None:
        self.due_at = lost_at + again.wait_s
        attempt = again.history.attempt
        self._status.move(
            Trigger.LOSS, reason, said=said, attempt=attempt, next_attempt_at=self._at(again.wait_s)
        )
        log.info(
            "session.reconnect_scheduled",
            extra={
                "session": self.id,
                "attempt": attempt,
                "wait_s": round(again.wait_s, 3),
                "reason": reason,
            },
        )

    def _fail(
        self, end: GiveUp, reason: Reason, said: str | None, lost_at: float, now: float
    ) -> None:
        wait_s = end.cooldown_s
        self.due_at = None if wait_s is None else lost_at + wait_s
        self._status.move(
            Trigger.SPENT,
            Reason.FLAPPING if end.flapping else reason,
            said=None if end.flapping else said,
            attempt=0,
            next_attempt_at=None if wait_s is None else self._at(wait_s),
        )
        self._link.give_up(self.reason, now)  # the phone accepted, or had long ago: yet no login

    def _at(self, wait_s: float) -> float:
        return round(self._host.wall() + wait_s, 3)

    # Leaving

    def leave(self, now: float, *, drain_s: float) -> None:
        """The supervisor shuts down: ask the process to end. Nothing is started any more."""
        self._link.hide()
        if self.process is None:
            return
        if self.process.kind == "pairing":
            self.process.kill(now)
        else:
            self.process.ask(now, drain_s=drain_s, verdict=Ending(EndingKind.STOPPED))

    def left(self, now: float) -> None:
        """The last word of a supervisor that shuts down; without one nothing is connected."""
        if self.state in _WORKING and self.state is not State.FAILED and self.wanted.run == "run":
            self._status.move(
                Trigger.STOP, Reason.OPERATOR, said=_LEFT, next_attempt_at=None, attempt=0
            )
        self._status.save(now, at_last=True)


_LEFT = "The supervisor was shut down. The session starts again with it: whatsapp-worker run"


def _descriptors_run_out(process: SessionProcess) -> bool:
    """Whether it has most of the open files that it may have; its limit is ours."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return int(process.heartbeat.get("fds") or 0) > OPEN_FILES_SHARE * limit
