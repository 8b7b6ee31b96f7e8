"""The purge: removes what nobody needs any more, within a bounded time, and reports it.

It decides by `purge_rules` under the session's lock and records `delete`; a running supervisor
carries that out, else it is done here by the same code. Every step may be repeated: a purge killed
at any point is finished by the next.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import RedisError

from storage.documents import Fields
from storage.errors import LockHeld, StorageError
from storage.ledger import Ledger
from storage.locks import FileLock, is_locked
from storage.sessions import Sessions, StateRecord, Wanted
from whatsapp_worker import device_store, purge_memory
from whatsapp_worker.deletion import delete_session
from whatsapp_worker.errors import AlreadyRunning
from whatsapp_worker.event_names import Event
from whatsapp_worker.purge_queues import PurgeQueues
from whatsapp_worker.purge_rules import Facts, Keep, Kind, Limits, Record, Remove, judge
from whatsapp_worker.session import State
from whatsapp_worker.settings import Settings

log = logging.getLogger(__name__)

MAX_RUN_S = 300.0
LEDGER_EVERY_S = 86_400.0  # old rows are looked for once a day
_BATCH = 200  # sessions whose queues are asked about in one round trip


@dataclass
class Report:
    """What a purge did, or with `dry_run` would do.

    Attributes:
        purged: Removed, by kind: the words of `purge_rules.Kind`, and files, jobs, queues,
            workers, ledger_rows. Sessions that a supervisor is removing count as removed.
        bytes_freed: By this process.
        tombstones: How many there are now.
        skipped: Sessions that stay though one might expect otherwise: `{"session", "why"}`.
        is_complete: False when time ran out; the next purge goes on where this one stopped.
    """

    dry_run: bool = False
    purged: dict[str, int] = field(default_factory=dict)
    bytes_freed: int = 0
    tombstones: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    is_complete: bool = True
    duration_s: float = 0.0

    def count(self, kind: str, number: int = 1) -> None:
        if number:
            self.purged[kind] = self.purged.get(kind, 0) + number

    def skip(self, session: str, why: str) -> None:
        self.skipped.append({"session": session, "why": why})

    def as_dict(self) -> dict[str, Any]:
        """As JSON for programs."""
        return dataclasses.asdict(self)


class Purge:
    """One run. Make a new one for the next."""

    def __init__(
        self,
        settings: Settings,
        *,
        queues: PurgeQueues | None,
        dry_run: bool = False,
        clock: Callable[[], float] = time.time,
        is_stopping: Callable[[], bool] = lambda: False,
        max_run_s: float = MAX_RUN_S,
    ) -> None:
        """
        Args:
            queues: What Redis holds; None when there is no Redis, and then no session that might
                have messages waiting is removed.
            dry_run: Look and report; change nothing.
            clock: Unix seconds.
            is_stopping: Asked between steps; the run then ends early, incomplete.
        """
        self._settings = settings
        self._sessions = Sessions(settings.data_dir, max_tombstones=settings.max_tombstones)
        self._limits = Limits(
            link_timeout_s=settings.link_timeout_s,
            stale_after_s=settings.stale_after_s,
            purge_linked_after_s=settings.purge_linked_after_s,
        )
        self._queues = queues
        self._clock = clock
        self._is_stopping = is_stopping
        self._max_run_s = max_run_s
        self._memory = purge_memory.document(settings.data_dir)
        self._report = Report(dry_run=dry_run)
        self._is_dry = dry_run

    def run(self) -> Report:
        """Do it all, at most for `max_run_s` and the step in hand.

        Raises:
            AlreadyRunning: Another purge runs on this data folder (transient).
            StorageError: The data folder cannot be used.
        """
        self._began = time.monotonic()
        self._deadline = self._began + self._max_run_s
        if self._settings.data_dir.is_dir():
            with self._alone():
                self._run()
        else:
            self._sessions.ids()  # a folder that is absent is empty; something else is refused
            self._sum_up()
        if not self._is_dry:
            self._tell()
        return self._report

    def _run(self) -> None:
        memory = self._remembered()
        self._clean()
        memory["sessions"] = self._purge_sessions(memory.get("sessions"))
        self._with_redis(self._purge_queues)
        memory["ledgers"] = self._purge_ledgers(memory.get("ledgers") or {})
        self._sum_up()
        if not self._is_dry:
            self._memory.write({**memory, **self._counted(memory)})

    def _counted(self, memory: Fields) -> Fields:
        done = self._report
        facts = {"bytes_freed": done.bytes_freed, "duration_s": done.duration_s}
        facts |= {"runs": 1, "incomplete": int(not done.is_complete)}
        return purge_memory.counted(memory, facts, purged=done.purged, now=self._clock())

    def _sum_up(self) -> None:
        self._report.tombstones = len(self._sessions.tombstones.all())
        self._report.duration_s = round(time.monotonic() - self._began, 3)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        lock = FileLock(self._settings.data_dir / "purge.lock")
        try:
            lock.acquire(0.1)
        except LockHeld as error:
            raise AlreadyRunning(f"another purge is running: {error}") from error
        with lock:
            yield

    def _remembered(self) -> Fields:
        with contextlib.suppress(StorageError):
            return dict(self._memory.read() or {})
        return {}

    def _is_late(self) -> bool:
        late = time.monotonic() > self._deadline or self._is_stopping()
        if late:
            self._report.is_complete = False
        return late

    def _tell(self) -> None:
        facts = self._report.as_dict()
        log.info("purge.completed", extra={**facts, "skipped": len(self._report.skipped)})
        told = {**facts, "skipped": self._report.skipped[:100]}
        self._with_redis(lambda queues: queues.tell(Event.PURGE_COMPLETED, told))

    def _with_redis(self, act: Callable[[PurgeQueues], object]) -> None:
        """Nothing of this is worth failing the purge for; the next one tries again."""
        if self._queues is None:
            return
        try:
            act(self._queues)
        except RedisError as error:
            log.warning("purge.redis_unavailable", extra={"problem": str(error)})
            self._queues = None
            self._report.is_complete = False

    # Sessions

    def _purge_sessions(self, resume_after: object) -> str | None:
        """Judge every session; the id after which the next run goes on, None when all were seen."""
        ids = _rotated(self._sessions.ids(), resume_after)
        seen = resume_after if isinstance(resume_after, str) else None
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            waiting = self._waiting(batch)
            for session in batch:
                if self._is_late():
                    return seen
                self._purge_session(session, waiting.get(session))
                seen = session
        return None

    def _waiting(self, sessions: list[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        self._with_redis(lambda queues: found.update(queues.waiting(sessions)))
        return found

    def _purge_session(self, session: str, waiting: int | None) -> None:
        try:
            verdict = judge(self._facts(session, waiting), self._limits, self._clock())
            if isinstance(verdict, Remove) and not self._is_dry:
                self._remove(session)
            elif isinstance(verdict, Remove):
                self._report.count(verdict.kind)
            elif verdict.why:
                self._report.skip(session, verdict.why)
            if isinstance(verdict, Keep) and not self._is_dry:
                self._tidy(session)
        except (StorageError, RedisError, OSError) as error:
            # One session must not keep the others from being purged.
            self._report.skip(session, f"{type(error).__name__}: {error}")

    def _facts(self, session: str, waiting: int | None, *, is_leased: bool | None = None) -> Facts:
        folder = self._sessions.folder(session)
        record, wanted = self._wanted(session)
        state = self._state(session)
        touched = [found.touched_at for found in (wanted, state) if found is not None]
        if record is Record.MISSING:
            touched.append(_changed_at(folder))
        is_buried = self._sessions.tombstones.find(session) is not None
        return Facts(
            session=session,
            record=record,
            state=_word(state),
            is_wanted_deleted=is_buried or (wanted is not None and wanted.run == "delete"),
            was_linked=bool(state and state.jid) or (folder / "device.db").exists(),
            is_leased=is_locked(folder / "session.lock") if is_leased is None else is_leased,
            is_link_pending=self._is_link_pending(wanted, state),
            is_supervised=self._is_supervised(),
            touched_at=max(touched, default=0.0),
            alive_at=(state.proof_of_life_at or 0.0) if state else 0.0,
            waiting=waiting,
        )

    def _wanted(self, session: str) -> tuple[Record, Wanted | None]:
        try:
            wanted = self._sessions.wanted(session)
        except StorageError:
            return Record.BROKEN, None
        return (Record.WHOLE if wanted else Record.MISSING), wanted

    def _state(self, session: str) -> StateRecord | None:
        with contextlib.suppress(StorageError):
            return self._sessions.state(session)
        return None

    def _is_link_pending(self, wanted: Wanted | None, state: StateRecord | None) -> bool:
        if not wanted or wanted.run != "run" or wanted.network != self._settings.network:
            return False  # nobody will answer it
        asked = (wanted.link or {}).get("request")
        answered = ((state and state.link) or {}).get("request")
        return asked is not None and asked != answered

    def _is_supervised(self) -> bool:
        return is_locked(self._settings.data_dir / "supervisor.lock")

    def _remove(self, session: str) -> None:
        """Decide again under the session's lock, since things may have changed; then act."""
        lock = self._sessions.session_lock(session)
        try:
            lock.acquire()
        except LockHeld:
            return  # a process runs it
        with lock:
            waiting = self._waiting([session]).get(session)
            facts = self._facts(session, waiting, is_leased=False)
            verdict = judge(facts, self._limits, self._clock())
            if not isinstance(verdict, Remove):
                return
            # A supervisor only sees records that can be read.
            is_supervisors = facts.is_supervised and facts.record is Record.WHOLE
            if is_supervisors and facts.is_wanted_deleted:
                return  # it is at it
            if facts.record is Record.WHOLE and not facts.is_wanted_deleted:
                self._want_deleted(session, verdict.kind)
            if not is_supervisors:
                self._delete(session, verdict.kind, lock)
        self._report.count(verdict.kind)

    def _want_deleted(self, session: str, kind: Kind) -> None:
        self._sessions.want(
            session, lambda wanted: dataclasses.replace(wanted, run="delete", why=f"purge: {kind}")
        )

    def _delete(self, session: str, kind: Kind, lock: FileLock) -> None:
        deleted = delete_session(
            self._sessions,
            session,
            why=f"purge: {kind}" if kind is not Kind.DELETED else "operator",
            now=self._clock(),
            fail_queue=self._queues.fail if self._queues else None,
            forget=self._forget if self._settings.database_url else None,
            lock=lock,
        )
        self._report.bytes_freed += deleted.bytes_freed
        self._report.count("jobs", deleted.jobs_failed)

    def _forget(self, session: str) -> None:
        with contextlib.closing(self._ledger(session)) as ledger:
            ledger.forget()

    # Leftovers

    def _clean(self) -> None:
        if not self._is_dry:
            self._report.count("files", len(self._sessions.clean()))

    def _tidy(self, session: str) -> None:
        """Remove files that a session that stays does not need."""
        folder = self._sessions.folder(session)
        codes = [path for path in (folder / "link.json", folder / "pairing.db") if path.exists()]
        if codes and _word(self._state(session)) is not State.LINKING:
            with contextlib.suppress(LockHeld), self._sessions.session_lock(session):
                for path in codes:
                    self._unlink(path)
                    device_store.remove(path)  # and what SQLite left beside it
        old = self._clock() - self._settings.ledger_retention_days * 86_400
        for path in [*folder.glob("*.corrupt-*"), *folder.glob("*.broken-*")]:
            if _changed_at(path) < old:
                self._unlink(path)

    def _unlink(self, path: Path) -> None:
        size = path.stat().st_size
        path.unlink()
        self._report.count("files")
        self._report.bytes_freed += size

    def _purge_queues(self, queues: PurgeQueues) -> None:
        known = set(self._sessions.ids())
        # The keeper of a running supervisor fails the jobs of unknown sessions; and nobody else
        # may while a device process could consume them.
        fails_jobs = not self._is_supervised()
        for kind, number in queues.sweep(known, fails_jobs=fails_jobs, dry_run=self._is_dry):
            self._report.count(kind, number)

    def _purge_ledgers(self, memory: Fields) -> Fields:
        """Remove old rows once a day; where it stopped when time runs out."""
        now = self._clock()
        began_at = memory.get("began_at")
        if memory.get("resume_after") is None:
            is_due = not isinstance(began_at, int | float) or not (
                0 <= now - began_at < min(LEDGER_EVERY_S, self._retention_s)
            )
            if not is_due or self._is_dry:
                return memory
            memory = {"began_at": now}
        seen = memory.get("resume_after") or ""
        for session in _rotated(self._sessions.ids(), seen):
            if self._is_late():
                return {**memory, "resume_after": seen}
            self._purge_ledger(session, now - self._retention_s)
            seen = session
        return {**memory, "resume_after": None}

    @property
    def _retention_s(self) -> float:
        return self._settings.ledger_retention_days * 86_400

    def _purge_ledger(self, session: str, older_than: float) -> None:
        if self._settings.database_url is None and not self._ledger_path(session).exists():
            return
        try:
            with contextlib.closing(self._ledger(session)) as ledger:
                self._report.count("ledger_rows", ledger.purge(older_than))
        except StorageError as error:
            self._report.skip(session, f"its ledger: {error}")

    def _ledger(self, session: str) -> Ledger:
        where = self._settings.database_url or self._ledger_path(session)
        return Ledger.open(where, session, timeout_s=self._settings.db_timeout_s)

    def _ledger_path(self, session: str) -> Path:
        return self._sessions.folder(session) / "ledger.db"


def _rotated(ids: Iterable[str], resume_after: object) -> list[str]:
    """Those after the one where the last run stopped; all when it saw all."""
    if not isinstance(resume_after, str):
        return list(ids)
    return [id for id in ids if id > resume_after]


def _word(state: StateRecord | None) -> State | None:
    with contextlib.suppress(ValueError):
        return State(state.state) if state else None
    return None


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()
