"""Deletions finished on a thread of their own, since Redis and the ledger may be slow or down."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor

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


class Graves:
    """Runs `deletion.delete_session` for sessions that no process runs any more."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sessions = Sessions(settings.data_dir, max_tombstones=settings.max_tombstones)
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="deletion")
        self._running: dict[str, Future[object]] = {}
        self._begun_at: dict[str, float] = {}
        self._retry_at: dict[str, float] = {}

    def dig(self, session: str, *, why: str, now: float) -> bool:
        """Begin, or look how far it is; True once when nothing is left of the session.

        Args:
            now: Monotonic seconds.
        """
        begun_at = self._begun_at.setdefault(session, now)
        running = self._running.get(session)
        if running is None:
            if now >= self._retry_at.get(session, 0.0):
                asks_redis = now - begun_at < REDIS_PATIENCE_S
                self._running[session] = self._workers.submit(
                    self._delete, session, why, asks_redis
                )
            return False
        if not running.done():
            return False
        del self._running[session]
        error = running.exception()
        if error is not None:
            self._retry_at[session] = now + RETRY_S
            log.warning("session.not_deleted", extra={"session": session, "problem": str(error)})
            return False
        del self._begun_at[session]
        self._retry_at.pop(session, None)
        return True

    def stop(self) -> None:
        """Begin nothing new; a deletion cut short is taken up again at the next start."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _delete(self, session: str, why: str, asks_redis: bool) -> None:
        deletion.delete_session(
            self._sessions,
            session,
            why=why,
            now=time.time(),
            fail_queue=self._fail_queues if asks_redis else None,
            forget=self._forget if self._settings.database_url else None,
        )

    def _fail_queues(self, session: str) -> int:
        """Tell every job that waits that its session is deleted."""
        redis = redis_client.connect(self._settings.redis_url or "")
        stream = EventStream(redis, events_max=self._settings.events_max)
        failed = 0
        for high in (True, False):
            queue = outbound_queue(SessionId(session), high=high)
            batch = BATCH
            while batch == BATCH:
                batch = outbox.fail_queue(
                    redis,
                    queue,
                    "session deleted",
                    stream=stream,
                    result_ttl_s=self._settings.result_ttl_s,
                    limit=BATCH,
                )
                failed += batch
        redis.close()
        return failed

    def _forget(self, session: str) -> None:
        """Remove its rows from the shared ledger."""
        assert self._settings.database_url is not None
        ledger = Ledger.open(self._settings.database_url, session)
        try:
            ledger.forget()
        finally:
            ledger.close()
