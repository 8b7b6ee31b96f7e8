"""Deletions finished on a thread of their own, since Redis and the ledger may be slow or down."""

import contextlib
import logging
import queue
import threading
import time
from dataclasses import dataclass, field

from storage.ledger import Ledger
from storage.sessions import Sessions
from whatsapp_worker import deletion, outbox, redis_client
from whatsapp_worker.keys import SessionId, outbound_queue
from whatsapp_worker.settings import Settings
from whatsapp_worker.stream import EventStream

log = logging.getLogger(__name__)

RETRY_S = 2.0
REDIS_PATIENCE_S = 15.0  # afterwards the queue keeper ends the jobs, when Redis is back
BATCH = 500


@dataclass(slots=True, eq=False)
class _Grave:
    """One deletion, tried until it succeeds. Times are monotonic seconds."""

    session: str
    why: str
    begun_at: float
    asks_redis: bool = True
    is_tried: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None  # of the last try
    retry_at: float | None = None  # None while it is tried


class Graves:
    """Runs `deletion.delete_session` for sessions that no process runs any more.

    Its methods are for the supervisor's loop alone.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sessions = Sessions(settings.data_dir, max_tombstones=settings.max_tombstones)
        self._graves: dict[str, _Grave] = {}
        self._orders: queue.SimpleQueue[_Grave | None] = queue.SimpleQueue()
        self._leave = threading.Event()
        # A daemon, so that a deletion that hangs never keeps the supervisor from ending.
        self._thread = threading.Thread(target=self._run, name="deletion", daemon=True)

    def dig(self, session: str, *, why: str, now: float) -> bool:
        """Begin, or look how far it is; True once when nothing is left of the session.

        Args:
            now: Monotonic seconds.
        """
        grave = self._graves.get(session)
        if grave is None:
            grave = self._graves[session] = _Grave(session, why, begun_at=now)
            self._try(grave)
        elif grave.retry_at is None and grave.is_tried.is_set():
            if grave.error is None:
                del self._graves[session]
                return True
            grave.retry_at = now + RETRY_S
            problem = str(grave.error)
            log.warning("session.not_deleted", extra={"session": session, "problem": problem})
        elif grave.retry_at is not None and now >= grave.retry_at:
            grave.asks_redis = now - grave.begun_at < REDIS_PATIENCE_S
            self._try(grave)
        return False

    def is_digging(self, session: str) -> bool:
        """Whether `dig` has begun with this session and not said True yet."""
        return session in self._graves

    def forget(self, session: str) -> None:
        """Nobody asks for it any more; the next `dig` begins anew."""
        self._graves.pop(session, None)

    def stop(self, *, timeout_s: float) -> None:
        """Begin nothing new; a deletion cut short is taken up again at the next start."""
        self._leave.set()
        self._orders.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _try(self, grave: _Grave) -> None:
        grave.retry_at, grave.error = None, None
        grave.is_tried.clear()
        self._orders.put(grave)
        if self._thread.ident is None:
            self._thread.start()

    def _run(self) -> None:
        while (grave := self._orders.get()) is not None and not self._leave.is_set():
            try:
                self._delete(grave.session, grave.why, grave.asks_redis)
            except Exception as error:
                grave.error = error
            grave.is_tried.set()

    def _delete(self, session: str, why: str, asks_redis: bool) -> None:
        deletion.delete_session(
            self._sessions,
            session,
            why=why,
            now=time.time(),
            fail_queue=self._fail_queues if asks_redis else None,
            forget=self._forget_rows if self._settings.database_url else None,
        )

    def _fail_queues(self, session: str) -> int:
        """Tell every job that waits that its session is deleted."""
        with contextlib.closing(redis_client.connect(self._settings.redis_url or "")) as redis:
            stream = EventStream(redis, events_max=self._settings.events_max)
            failed = 0
            for high in (True, False):
                batch = BATCH
                while batch == BATCH:
                    batch = outbox.fail_queue(
                        redis,
                        outbound_queue(SessionId(session), high=high),
                        "session deleted",
                        stream=stream,
                        result_ttl_s=self._settings.result_ttl_s,
                        limit=BATCH,
                    )
                    failed += batch
            return failed

    def _forget_rows(self, session: str) -> None:
        """Remove its rows from the shared ledger."""
        assert self._settings.database_url is not None
        with contextlib.closing(Ledger.open(self._settings.database_url, session)) as ledger:
            ledger.forget()
