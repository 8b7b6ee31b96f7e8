"""What a command sees of its host: the session records and whether the services answer."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage import locks
from storage.sessions import Sessions, StateRecord, Wanted
from whatsapp_worker.cli.terminal import duration, talk
from whatsapp_worker.errors import (
    SessionDeleted,
    SessionError,
    SupervisorUnavailable,
    UnknownSession,
)
from whatsapp_worker.settings import Settings

if TYPE_CHECKING:
    from redis import Redis

POLL_S = 0.1
# A supervisor that was started together with the command has so long to appear.
SUPERVISOR_GRACE_S = 15.0


@dataclass(frozen=True)
class Supervisor:
    """Whether a supervisor holds the data folder, and what it wrote about itself."""

    alive: bool
    network: str  # that it runs on; where none runs, that of the settings
    pid: int | None = None


class Host:
    """One data folder and the services beside it. Cheap to make; connects to nothing by itself."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sessions = Sessions(settings.data_dir, max_tombstones=settings.max_tombstones)

    def supervisor(self) -> Supervisor:
        """Who holds the data folder now."""
        path = self.settings.data_dir / "supervisor.lock"
        if not locks.is_locked(path):
            return Supervisor(alive=False, network=self.settings.network)
        note = locks.holder(path) or {}
        pid, network = note.get("pid"), note.get("network", self.settings.network)
        return Supervisor(
            alive=True, network=str(network), pid=pid if isinstance(pid, int) else None
        )

    def redis(self, *, timeout_s: float = 5.0) -> "Redis":
        """A client for the Redis of this host; nothing is sent yet.

        Raises:
            RedisUnavailable: No REDIS_URL, and no supervisor with a Redis of its own.
        """
        from whatsapp_worker import redis_client, redis_server

        url = redis_server.resolve_url(self.settings)
        if not self.settings.redis_url and not self.supervisor().alive:
            # One that was killed took its Redis with it, and left the word where it was.
            raise redis_server.none_known(self.settings)
        return redis_client.connect(url, timeout_s=timeout_s)

    def wanted(self, session: str) -> Wanted:
        """The record of a session.

        Raises:
            RecordLost: It has lost its record; says how to make it anew.
            UnknownSession: There is none; says which there are.
            SessionDeleted: Only its tombstone is left; says since when.
        """
        from whatsapp_worker.keys import session_id

        found = self.sessions.wanted(session_id(session))
        if found is None:
            raise self._unknown(session)
        return found

    def restore(self, session: str, *, why: str) -> None:
        """Make the record anew of a session that has lost it, as a stopped one."""
        from storage.errors import RecordLost

        try:
            self.sessions.wanted(session)
        except RecordLost:
            state, now = self.sessions.state(session), time.time()
            network = state.fields.get("network") if state else None
            self.sessions.restore(
                session,
                Wanted(
                    generation=state.generation + 1 if state else 1,
                    network=str(network or self.supervisor().network),
                    run="stop",
                    created_at=now,
                    touched_at=now,
                    why=why,
                ),
            )

    def _unknown(self, session: str) -> SessionError:
        if stone := self.sessions.tombstones.find(session):
            ago = duration(time.time() - stone.at)
            return SessionDeleted(f"session {session} was deleted {ago} ago")
        known = self.sessions.ids()
        names = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        have = f"there are: {names}" if known else "there is none yet"
        where = self.settings.data_dir.absolute()
        return UnknownSession(
            f"there is no session {session} in {where}; {have}. Make it: whatsapp-worker link"
            f" {session}"
        )

    def wait_for(
        self,
        session: str,
        generation: int,
        done: Callable[[StateRecord | None], bool],
        *,
        timeout_s: float,
    ) -> StateRecord | None:
        """Wait until the supervisor acts on a generation and the state is as it should be.

        Args:
            done: Judges a state of at least that generation; gets None when the record is gone.

        Returns:
            The state that was accepted; None when the record is gone.

        Raises:
            SupervisorUnavailable: None runs; the request stays recorded (transient).
            TimeoutError: Not in time.
        """
        patience = SupervisorPatience(self)
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.read_state(session)
            gone = state is None and not self.sessions.folder(session).exists()
            acted = gone or (state is not None and state.generation >= generation)
            if acted and done(state):
                return state
            patience.check()
            if time.monotonic() >= deadline:
                raise TimeoutError(state.state if state else "no state yet")
            time.sleep(POLL_S)

    def read_state(self, session: str) -> StateRecord | None:
        """The state record; None when there is none or it cannot be read at this moment."""
        from storage.errors import StorageError

        with contextlib.suppress(StorageError):
            return self.sessions.state(session)
        return None


class SupervisorPatience:
    """Gives a supervisor that is still starting, or being restarted, its time to appear."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._missing_since: float | None = None
        self._is_told = False
        self._checked_at = 0.0

    def check(self) -> bool:
        """Whether one runs; looks once a second.

        Raises:
            SupervisorUnavailable: None has run for SUPERVISOR_GRACE_S.
        """
        now = time.monotonic()
        if now - self._checked_at < 1:
            return self._missing_since is None
        self._checked_at = now
        if self._host.supervisor().alive:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now
            if not self._is_told:
                talk("No supervisor runs yet; waiting for one: whatsapp-worker run")
            self._is_told = True
        elif now - self._missing_since > SUPERVISOR_GRACE_S:
            raise SupervisorUnavailable(
                f"No supervisor runs on {self._host.settings.data_dir.absolute()}. The request is"
                " recorded and takes effect when one does: whatsapp-worker run"
            )
        return self._missing_since is None


def check_redis(host: Host) -> dict[str, Any]:
    """`{"ok", "url", "error"}` of the Redis of this host; credentials in the URL masked."""
    import redis

    from whatsapp_worker.errors import RedisUnavailable
    from whatsapp_worker.settings import mask

    found: dict[str, Any] = {"ok": False, "url": None, "embedded": not host.settings.redis_url}
    try:
        from whatsapp_worker import redis_server

        found["url"] = mask(redis_server.resolve_url(host.settings))
        with contextlib.closing(host.redis(timeout_s=2.0)) as client:
            client.ping()
    except RedisUnavailable as error:
        return found | {"error": str(error)}
    except (redis.RedisError, OSError) as error:
        return found | {"error": f"{type(error).__name__}: {error}"}
    return found | {"ok": True, "error": None}


def check_database(settings: Settings) -> dict[str, Any]:
    """`{"ok", "kind", "url", "error"}` of the ledger's database."""
    if settings.database_url is None:
        return {"ok": True, "kind": "sqlite", "url": None, "error": None}
    import psycopg

    from whatsapp_worker.settings import mask

    found = {"ok": False, "kind": "postgresql", "url": mask(settings.database_url)}
    url = settings.database_url.replace("postgresql+psycopg://", "postgresql://", 1)
    try:
        with psycopg.connect(url, connect_timeout=3) as connection:
            connection.execute("SELECT 1")
    except psycopg.Error as error:
        return found | {"error": " ".join(str(error).split())}
    return found | {"ok": True, "error": None}
