"""What the supervisor does about happenings that a person must know of: it turns them into alerts.

Callable from every thread, never blocks.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

from storage.sessions import Sessions
from whatsapp_worker import __version__, alert_policy
from whatsapp_worker.alerts import Alerts
from whatsapp_worker.event_names import Event
from whatsapp_worker.session import Reason, State
from whatsapp_worker.settings import Settings
from whatsapp_worker.unsettled import Unsettled

STREAM_ALERT = 0.9  # of EVENTS_MAX

# In these a device process runs, or will: what it said of the database stands.
_RUNNING = frozenset({State.CONNECTING, State.CONNECTED, State.RECONNECTING, State.FAILED})


class Alarm:
    """Alerts of one host, from `start` to `close`."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            SettingsError: SENTRY_DSN is no DSN.
        """
        self._alerts = Alerts(
            settings.sentry_dsn,
            host=settings.host,
            memory=settings.data_dir / "alerts.json",
            repeat_s=settings.alert_repeat_s,
            release=__version__,
        )
        self._unsettled = Unsettled(
            settings=settings,
            sessions=Sessions(settings.data_dir, max_tombstones=settings.max_tombstones),
            raise_alert=self._alerts.raise_alert,
        )
        self._lock = threading.Lock()
        self._without_database: set[str] = set()

    def start(self) -> None:
        self._alerts.start()
        self._unsettled.start()

    def close(self, *, timeout_s: float) -> bool:
        """Tell what waits; whether that was done in time."""
        self._unsettled.stop(timeout_s=0)
        return self._alerts.close(timeout_s=timeout_s)

    def session_changed(
        self, session: str, change: Mapping[str, Any], *, was_asked: bool = False
    ) -> None:
        """A session entered a state.

        Args:
            change: The payload of `session.state_changed`.
            was_asked: An operator wanted it so.
        """
        state = change["state"]
        alert = alert_policy.session_changed(
            session,
            state=state,
            reason="operator" if was_asked else change["reason"],
            sentence=change["sentence"],
            heals=_heals(change),
        )
        if alert is not None:
            self._alerts.raise_alert(alert)
        if state == State.CONNECTED:  # its process has opened the ledger, and put it in order
            self._database_answers(session)
        elif state not in _RUNNING:
            with self._lock:
                self._without_database.discard(session)

    def device_failed(self, session: str, report: Mapping[str, Any]) -> None:
        """A device process reported a `failure`."""
        match report:
            case {"kind": Event.BREAKER_OPENED, "breaker": "message" | "database" as breaker}:
                if breaker == "database":
                    with self._lock:
                        self._without_database.add(session)
                alert = alert_policy.breaker_opened(
                    breaker,
                    session=session,
                    failure=str(report.get("failure")),
                    failures=report.get("failures") or [],
                    retry_after_s=float(report.get("retry_after_s") or 0),
                )
                self._alerts.raise_alert(alert)
            case {"kind": Event.BREAKER_CLOSED, "breaker": "message"}:
                open_s = _age_s(report.get("opened_at"))
                closed = alert_policy.breaker_closed("message", session=session, open_s=open_s)
                self._alerts.raise_alert(closed)
            case {"kind": Event.BREAKER_CLOSED, "breaker": "database"}:
                self._database_answers(session, _age_s(report.get("opened_at")))
            case {"kind": "job.poisoned"}:
                self.job_poisoned(session, str(report.get("job_id")), str(report.get("problem")))

    def _database_answers(self, session: str, open_s: float | None = None) -> None:
        """It does for this session again; the alert ends with the last that had lost it."""
        with self._lock:
            self._without_database.discard(session)
            if self._without_database:
                return
        closed = alert_policy.breaker_closed("database", session=session, open_s=open_s)
        self._alerts.raise_alert(closed)

    def job_poisoned(self, session: str, job_id: str, problem: str) -> None:
        """A job that cannot be read was taken out of its queue."""
        self._alerts.raise_alert(alert_policy.job_poisoned(session, job_id=job_id, problem=problem))

    def stream_is(self, full: float, slowest_group: str | None) -> None:
        """How full the event stream is, 0 to 1, and who has read least of it."""
        if full >= STREAM_ALERT:
            self._alerts.raise_alert(
                alert_policy.stream_filling(full=full, slowest_group=slowest_group)
            )


def _age_s(at: float | None) -> float | None:
    return None if at is None else max(0.0, time.time() - at)


def _heals(change: Mapping[str, Any]) -> bool:
    """Whether the session goes on by itself. A ban that is over stays on record until the next
    login; what this host cannot run is tried again only in case somebody has acted."""
    if change["state"] == State.BANNED:
        return bool(change["banned_until"])
    return bool(change["next_attempt_at"]) and change["reason"] != Reason.CANNOT_RUN
