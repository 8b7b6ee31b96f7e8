"""A thousand mixed messages over five sessions while WhatsApp refuses, answers get lost,
connections drop, the database and Redis go away and come back: what is said of every single one is
true, and everybody says the same.

The mixture is in `mixture.py`, what is true in `judging.py`. `THOUSAND_SEED` chooses another
mixture; the seed is printed with the table of what became of it (`pytest -s`).
"""

import contextlib
import copy
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import media_files
import mixture
import postgres
import psutil
from judging import Arrival, Facts, Verdict
from lies import LIES
from mixture import Mixture, Order
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from support import events, eventually
from world import World

from storage.ledger import Ledger, Row
from whatsapp_worker import breaker_board
from whatsapp_worker.client import Outbox

SEED = int(os.environ.get("THOUSAND_SEED", "1"))
SESSIONS = [f"s{n}" for n in range(mixture.SESSIONS)]
ENDED = ("finished", "failed")
SEND_TIMEOUT_S = 3

Disturbance = Callable[[], contextlib.AbstractContextManager[None]]


class Thousand:
    """One run: a world, its sessions, and what is done to them."""

    def __init__(self, world: World) -> None:
        """Links the sessions and tells the sandbox what to do; nothing is enqueued yet."""
        self.world = world
        self.control = world.control
        self.phones = {name: world.link(name) for name in SESSIONS}
        members = ["5521988880001", "5521988880002"]
        groups = {n: self.control.group(n, [p, *members]) for n, p in self.phones.items()}
        self.mixture = Mixture(SEED, groups)
        self.enqueued: list[Order] = []
        self.due: dict[str, float] = {}
        self.answers: dict[str, str | None] = {}
        self.full_disk = (0.0, 0.0)
        for order in self.mixture:
            self._prepare(order)

    def _prepare(self, order: Order) -> None:
        """What the sandbox shall do about a message."""
        for fault in order.fate.faults:
            options = {name: value for name, value in fault.items() if name != "how"}
            self.control.send_fault(fault["how"], to=order.to, **options)
        if order.fate.receipts != "delivered":
            self.control.contacts(order.to, receipts=order.fate.receipts)
        if order.fate_name == "not on WhatsApp":
            self.control.unknown_number(order.to)

    def play(self, *disturbances: Disturbance) -> None:
        """Enqueue half a wave; once some of it has ended, disturb it, and enqueue the rest while
        it is disturbed; then the next."""
        for wave, disturbance in zip(self.mixture.waves, disturbances, strict=True):
            before = len(self.enqueued)
            for orders in wave.values():
                self._enqueue(orders[: len(orders) // 2])
            self._await_ended(before + 10)
            with disturbance():
                for orders in wave.values():
                    self._enqueue(orders[len(orders) // 2 :])
            self._cancel([order for orders in wave.values() for order in orders])
            self._await_ended(before + 100)
        eventually(lambda: not self._open(), within_s=120, what="every job ends")

    def _await_ended(self, count: int) -> None:
        eventually(
            lambda: len(self.enqueued) - len(self._open()) >= count,
            within_s=90,
            what=f"{count} jobs have ended",
        )

    def _open(self) -> list[str]:
        """The jobs that have not ended."""
        pipeline = self.world.redis.pipeline(transaction=False)
        for order in self.enqueued:
            pipeline.hget(f"rq:job:{order.job_id}", "status")
        found = zip(self.enqueued, pipeline.execute(), strict=True)
        return [order.job_id for order, status in found if (status or b"").decode() not in ENDED]

    # As a CRM does it: plain RQ

    def _enqueue(self, orders: list[Order]) -> None:
        for is_high in (True, False):
            lane = [order for order in orders if order.is_high is is_high]
            self._queue(orders[0].session, is_high=is_high).enqueue_many(
                Queue.prepare_data(
                    "jobs.outbound.send_message",
                    description="send_message",
                    job_id=order.job_id,
                    kwargs=self._arguments(order),
                )
                for order in lane
                if not order.is_by_rq
            )
        for order in orders:
            if order.is_by_rq:
                arguments = self._arguments(order)
                self._queue(order.session).enqueue_at(
                    datetime.fromtimestamp(self.due[order.job_id], UTC),
                    "jobs.outbound.send_message",
                    description="send_message",
                    job_id=order.job_id,
                    kwargs=arguments,
                )
        self.enqueued += orders

    def _queue(self, session: str, *, is_high: bool = False) -> Queue:
        name = f"wa:out:{session}" + (":high" if is_high else "")
        return Queue(name, connection=self.world.redis, serializer=JSONSerializer)

    def _arguments(self, order: Order) -> dict[str, Any]:
        now = time.time()
        if order.send_in_s is not None:
            due = now + order.send_in_s
            self.due[order.job_id] = int(due) if order.is_by_rq else due  # RQ keeps whole seconds
        return order.arguments(now)

    def _cancel(self, orders: list[Order]) -> None:
        """By request, many at once; and as any user of RQ may, too late or not."""
        wanted = [order for order in orders if order.fate_name in mixture.CANCELLED]
        with ThreadPoolExecutor(len(wanted)) as threads:
            answers = threads.map(self._ask_to_cancel, wanted)
        self.answers |= dict(answers)
        for order in orders:
            if order.fate_name == "cancelled by RQ":
                job = Job.fetch(order.job_id, self.world.redis, serializer=JSONSerializer)
                job.cancel()

    def _ask_to_cancel(self, order: Order) -> tuple[str, str | None]:
        outcome = Outbox(self.world.redis).cancel(order.session, order.message_id, timeout_s=30)
        return order.message_id, outcome and outcome.status.value

    # What is done to it

    @contextlib.contextmanager
    def redis_restarted(self) -> Iterator[None]:
        self.world.kill_redis()
        self.world.redis_server.start()
        yield

    @contextlib.contextmanager
    def redis_lost(self) -> Iterator[None]:
        """Away until every session has felt it."""
        began = self._log_size()
        self.world.kill_redis()
        eventually(lambda: self._logged("consumer.redis_lost", began) == set(SESSIONS), within_s=30)
        self.world.redis_server.start()
        yield

    @contextlib.contextmanager
    def database_lost(self, outage: Disturbance, *, redis: bool = False) -> Iterator[None]:
        """Away until every session has felt it, with its breaker or on its way back.

        Args:
            redis: Redis restarts meanwhile.
        """
        began = self._log_size()
        with outage():
            if redis:
                self.world.kill_redis()
                self.world.redis_server.start()
            yield
            eventually(lambda: self._felt(began) == set(SESSIONS), within_s=60)

    def _felt(self, began: int) -> set[str]:
        """Whose device process says that the database is away, or could not begin without it.
        Where the disk is full there is no log, and the record names a process of the past."""
        board = breaker_board.read(self.world.redis, SESSIONS)
        felt = {session for session, breakers in board.items() if "database" in breakers}
        for word in ("consumer.database_lost", "device_process.waiting"):
            felt |= self._logged(word, began)
        return felt | {name for name in SESSIONS if not _lives(self.world.state(name).get("pid"))}

    def _logged(self, event: str, began: int) -> set[str]:
        """The sessions that logged this since."""
        text = (self.world.folder / "run.log").read_text(errors="replace")[began:]
        lines = [line for line in text.splitlines() if event in line]
        return {name for name in SESSIONS if any(f"session={name} " in line for line in lines)}

    def processes(self) -> list[psutil.Process]:
        """Those that send and tell."""
        assert self.world.supervisor is not None
        supervisor = psutil.Process(self.world.supervisor.pid)
        events = psutil.Process(self.world.events.pid)
        return [supervisor, events, *supervisor.children(recursive=True)]

    def _log_size(self) -> int:
        return len((self.world.folder / "run.log").read_text(errors="replace"))

    # What became of it

    def facts(self) -> Facts:
        jobs = Job.fetch_many(
            [order.job_id for order in self.enqueued],
            connection=self.world.redis,
            serializer=JSONSerializer,
        )
        return Facts(
            jobs={
                job.id: (str(job.get_status(refresh=False).value), job.meta.get("outcome") or {})
                for job in jobs
                if job is not None
            },
            rows={row.message_id: row for session in SESSIONS for row in self._rows(session)},
            events=events(self.world.redis),
            arrivals=[Arrival.of(row) for row in self.control.messages()],
            due=self.due,
            answers=self.answers,
            full_disk=self.full_disk,
        )

    def _rows(self, session: str) -> list[Row]:
        path = self.world.data / "sessions" / session / "ledger.db"
        location = self.world.environ.get("DATABASE_URL", path)
        with contextlib.closing(Ledger.open(location, session)) as ledger:
            return ledger.recent(10_000)

    def verdict(self) -> Verdict:
        return Verdict(self.mixture, self.phones, self.facts())

    def left_behind(self) -> dict[str, int]:
        """What must be empty."""
        redis = self.world.redis
        found = {}
        for pattern in ("rq:queue:wa:out:*", "rq:wip:*", "rq:scheduled:*", "rq:canceled:*"):
            for key in redis.scan_iter(pattern):
                is_list = redis.type(key) == b"list"
                found[key.decode()] = redis.llen(key) if is_list else redis.zcard(key)
        return {key: count for key, count in found.items() if count}


def _lives(pid: int | None) -> bool:
    return pid is not None and psutil.pid_exists(pid)


@contextlib.contextmanager
def thousand(folder: Path, **environ: str) -> Iterator[Thousand]:
    print(f"THOUSAND_SEED={SEED}")
    media_dir = folder / "media"
    media_dir.mkdir()
    for name, data in media_files.FILES.items():
        (media_dir / name.removeprefix("/")).write_bytes(data)
    environ |= {"SEND_TIMEOUT_S": f"{SEND_TIMEOUT_S}", "MSG_RESET_S": "1", "DB_RESET_S": "1"}
    with World.running(folder, MEDIA_DIR=str(media_dir), **environ) as world:
        yield Thousand(world)


def conclude(run: Thousand) -> None:
    """Everything is true, every lie about it is noticed, and nothing is left."""
    last: list[str] = []

    def is_true() -> bool:
        last[:] = run.verdict().problems()
        return not last

    try:
        eventually(is_true, within_s=30)
    except AssertionError:
        raise AssertionError("\n".join(last)) from None
    eventually(lambda: not run.left_behind(), what=f"nothing is left: {run.left_behind()}")
    report(run)
    facts = run.facts()
    for lie in LIES:
        told = copy.deepcopy(facts)
        lie(told, Verdict(run.mixture, run.phones, told))
        problems = Verdict(run.mixture, run.phones, told).problems()
        assert problems, f"nobody noticed: {lie.__name__}"


def report(run: Thousand) -> None:
    verdict = run.verdict()
    print(f"{len(run.enqueued)} jobs, {len(verdict.facts.arrivals)} arrivals")
    words = Counter((order.fate_name, verdict.status(order)) for order in run.mixture)
    for (fate, status), count in sorted(words.items()):
        print(f"  {fate:<32}{status:<12}{count:>5}")


# SQLite


@contextlib.contextmanager
def locked(run: Thousand) -> Iterator[None]:
    """Another process holds every ledger."""
    holder = (
        "import sqlite3, sys\n"
        "options = {'timeout': 30, 'isolation_level': None}\n"
        "held = [sqlite3.connect(path, **options) for path in sys.argv[1:]]\n"
        "for ledger in held: ledger.execute('BEGIN EXCLUSIVE')\n"
        "print('locked', flush=True); sys.stdin.read()\n"
    )
    ledgers = [str(path) for path in run.world.data.glob("sessions/*/ledger.db")]
    with subprocess.Popen(
        [sys.executable, "-c", holder, *ledgers], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def full_disk(run: Thousand) -> Iterator[None]:
    """Whatever a process of ours writes to a file finds no place for it."""
    began = time.time() - SEND_TIMEOUT_S
    _fill_disk(run, True)
    try:
        yield
    finally:
        _fill_disk(run, False)
        run.full_disk = (began, time.time())


def _fill_disk(run: Thousand, is_full: bool) -> None:
    """For all that runs and will run; what is being forked shows a moment later."""
    clean_looks = 0

    def is_done() -> bool:
        nonlocal clean_looks
        others = [process for process in run.processes() if _limit_files(process, is_full)]
        clean_looks = 0 if others else clean_looks + 1
        return clean_looks == 20

    eventually(is_done, what="the limit holds for everybody")


def _limit_files(process: psutil.Process, is_full: bool) -> bool:
    """The process may write nothing to files, or all that it might; whether that is new."""
    with contextlib.suppress(psutil.NoSuchProcess):
        had, most = process.rlimit(psutil.RLIMIT_FSIZE)
        limit = 0 if is_full else most
        process.rlimit(psutil.RLIMIT_FSIZE, (limit, most))
        return bool(had != limit)
    return False


def test_sqlite_locked_and_full(tmp_path: Path) -> None:
    with thousand(tmp_path) as run:
        run.play(
            run.redis_restarted,
            lambda: run.database_lost(lambda: locked(run)),
            lambda: run.database_lost(lambda: full_disk(run), redis=True),
            run.redis_lost,
            contextlib.nullcontext,
        )
        conclude(run)


# PostgreSQL


@contextlib.contextmanager
def stopped(server: postgres.Server, how: str) -> Iterator[None]:
    server.stop(how)
    try:
        yield
    finally:
        server.start()


def test_postgresql_stopped_and_started(tmp_path: Path) -> None:
    with postgres.own_server() as server:
        if server is None:
            postgres.missing("stopping a PostgreSQL needs its programs here: initdb and postgres")
        with thousand(tmp_path, DATABASE_URL=server.url) as run:
            run.play(
                run.redis_restarted,
                lambda: run.database_lost(lambda: stopped(server, "fast")),
                lambda: run.database_lost(lambda: stopped(server, "immediate"), redis=True),
                run.redis_lost,
                contextlib.nullcontext,
            )
            conclude(run)
