"""Looks for messages that stayed `unknown`: handed over, and no receipt told of them in time.

A thread of the supervisor, since ledgers may be slow or down. It only reads.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from storage.errors import StorageError
from storage.ledger import Ledger
from storage.sessions import Sessions
from whatsapp_worker.alert_policy import Alert, message_unknown
from whatsapp_worker.event_names import Status
from whatsapp_worker.settings import Settings

log = logging.getLogger(__name__)

LOOK_EVERY_S = 300.0  # or twelve times in UNKNOWN_ALERT_S
LOOK_BACK_S = 3600.0  # at the start: whose time was over while no supervisor ran
_MOST = 100  # messages looked at of one session


class Unsettled:
    """Looks now and then, from `start` to `stop`."""

    def __init__(
        self,
        *,
        settings: Settings,
        sessions: Sessions,
        raise_alert: Callable[[Alert], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            sessions: An instance of its own.
            raise_alert: `Alerts.raise_alert`.
            clock: UTC seconds.
        """
        self._settings = settings
        self._sessions = sessions
        self._ledgers = _Ledgers(settings, sessions)
        self._raise_alert = raise_alert
        self._clock = clock
        self._patience_s = settings.unknown_alert_s
        self._since = clock() - self._patience_s - LOOK_BACK_S
        self._looked: dict[str, float] = {}  # session: what became unknown before was looked at
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="unsettled", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, timeout_s: float) -> bool:
        """End after the ledger in hand; whether that was done in time."""
        self._leave.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._leave.wait(min(LOOK_EVERY_S, self._patience_s / 12)):
            try:
                self.look()
            except Exception:
                log.exception("unsettled.look_failed")

    def look(self) -> None:
        """Alert for every session with messages whose time was over since the last look.

        A ledger that cannot be read waits for the next: its trouble is told elsewhere.
        """
        until = self._clock() - self._patience_s
        looked: dict[str, float] = {}
        with contextlib.closing(self._ledgers) as ledgers:
            for session in self._sessions.ids():
                if self._leave.is_set():
                    return
                since = looked[session] = self._looked.get(session, self._since)
                try:
                    found = self._found(ledgers, session, since, until)
                except StorageError as error:
                    extra = {"session": session, "problem": str(error)}
                    log.debug("unsettled.ledger_skipped", extra=extra)
                    continue
                looked[session] = until
                if found:
                    alert = message_unknown(
                        session, message_ids=found, older_than_s=self._patience_s
                    )
                    self._raise_alert(alert)
        self._looked = looked

    def _found(self, ledgers: "_Ledgers", session: str, since: float, until: float) -> list[str]:
        with ledgers.of(session) as ledger:
            if ledger is None:
                return []
            rows = ledger.recent(_MOST, status=Status.UNKNOWN, before=until)
        # By the time at which it became unknown: recovery may find that out long after the claim.
        times = ((row.message_id, row.settled_at or row.claimed_at) for row in rows)
        return [id for id, at in times if since <= at < until]


class _Ledgers:
    """Opens ledgers one after another; a shared database is connected to once in a look."""

    def __init__(self, settings: Settings, sessions: Sessions) -> None:
        self._settings = settings
        self._sessions = sessions
        self._shared: Ledger | None = None
        self._sound: dict[str, int] = {}  # inodes of those that were opened once

    @contextlib.contextmanager
    def of(self, session: str) -> Iterator[Ledger | None]:
        """One session's ledger; None before it has one."""
        timeout_s = self._settings.db_timeout_s
        if self._settings.database_url is not None:
            if self._shared is None:
                self._shared = Ledger.open(
                    self._settings.database_url, session, timeout_s=timeout_s
                )
            yield self._shared.of(session)
            return
        path = self._sessions.folder(session) / "ledger.db"
        try:
            inode = path.stat().st_ino
        except OSError:
            self._sound.pop(session, None)
            yield None
            return
        was_sound = self._sound.get(session) == inode
        opened = Ledger.open(path, session, timeout_s=timeout_s, was_sound=was_sound)
        with contextlib.closing(opened) as ledger:
            self._sound[session] = inode
            yield ledger

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None
