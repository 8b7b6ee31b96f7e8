"""`whatsapp-worker maintenance`: the RQ worker of this host's periodic jobs.

JSON only, functions by allow-list. It runs RQ's own worker in short bursts: between two the
process waits on its stop flag, not inside RQ, whose signal handlers lose jobs.
"""

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from redis import Redis, RedisError
from rq import Queue, SimpleWorker
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.timeouts import BaseDeathPenalty

from jobs import purge as purge_job
from whatsapp_worker import __version__, redis_client, redis_server
from whatsapp_worker.errors import AlreadyRunning, RedisUnavailable, UsageError
from whatsapp_worker.keys import PURGE_SESSIONS, maintenance_queue
from whatsapp_worker.purge import Purge, Report
from whatsapp_worker.purge_queues import WORKER_PREFIX, PurgeQueues
from whatsapp_worker.settings import Settings
from whatsapp_worker.stream import EventStream

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
REDIS_RETRY_S = 5.0
RESULT_TTL_S = 7 * 86_400
_ALLOWED: dict[str, Callable[..., Any]] = {PURGE_SESSIONS: purge_job.purge_sessions}


def run(settings: Settings) -> int:
    """Run this host's periodic jobs until SIGTERM or SIGINT; call on the main thread."""
    from whatsapp_worker.sentry import maintenance_sentry  # not for those who only purge

    stop = threading.Event()

    def asked(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    sentry = maintenance_sentry(
        settings.sentry_dsn,
        host=settings.host,
        release=__version__,
        repeat_s=settings.alert_repeat_s,
    )
    try:
        with sentry:
            Maintenance(settings, stop=stop).run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def purge(
    settings: Settings,
    *,
    dry_run: bool = False,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Report:
    """Purge in this process, with whatever Redis there is; for the job and the command line.

    Raises:
        AlreadyRunning: Another purge runs (transient).
        StorageError: The data folder cannot be used.
    """
    with _redis(settings) as redis:
        queues = None
        if redis is not None:
            stream = EventStream(redis, events_max=settings.events_max)
            queues = PurgeQueues(
                redis, stream=stream, host=settings.host, result_ttl_s=settings.result_ttl_s
            )
        return Purge(settings, queues=queues, dry_run=dry_run, is_stopping=is_stopping).run()


def enqueue_purge(redis: Redis, settings: Settings, *, now: float) -> bool:
    """Enqueue this host's purge once in each `CLEANUP_INTERVAL_S`; whether that was done now.

    For the supervisor's timetable; any number of callers may ask as often as they like.

    Args:
        now: Unix seconds.

    Raises:
        RedisError: Redis did not answer (transient: ask again).
    """
    interval_s = settings.cleanup_interval_s
    slot = f"wa:purge:{settings.host}:{int(now / interval_s)}"
    if not redis.set(slot, "1", nx=True, ex=max(1, int(interval_s * 2))):
        return False
    queue = Queue(maintenance_queue(settings.host), connection=redis, serializer=JSONSerializer)
    try:
        if len(queue) == 0:  # nobody ran the last one: one is enough
            _enqueue(queue)
    except RedisError:
        with contextlib.suppress(RedisError):
            redis.delete(slot)
        raise
    return True


def _enqueue(queue: Queue) -> None:
    queue.enqueue(
        PURGE_SESSIONS,
        description="purge_sessions",
        job_timeout=-1,  # it bounds itself
        result_ttl=RESULT_TTL_S,
        failure_ttl=RESULT_TTL_S,
    )


class Maintenance:
    """The loop of the process."""

    def __init__(self, settings: Settings, *, stop: threading.Event) -> None:
        self._settings = settings
        self._stop = stop
        self._queue = maintenance_queue(settings.host)

    def run(self) -> None:
        purge_job.bind(self._purge)
        log.info("maintenance.started", extra={"queue": self._queue})
        was_down = False
        wait_s = 0.0
        while not self._stop.wait(wait_s):
            try:
                self.work()
                was_down, wait_s = False, LOOK_EVERY_S
            except (RedisError, RedisUnavailable) as error:
                if not was_down:
                    log.warning("redis.unavailable", extra={"problem": str(error)})
                was_down, wait_s = True, REDIS_RETRY_S
        log.info("maintenance.stopped")

    def work(self) -> None:
        """Run what waits, if anything.

        Raises:
            RedisError, RedisUnavailable: Redis does not answer (transient).
        """
        url = redis_server.resolve_url(self._settings)
        with contextlib.closing(redis_client.connect(url)) as redis:
            if not redis.llen(f"{RQ_KEY_PREFIX}:queue:{self._queue}"):
                return
            _drop_poison(redis, self._queue)
            # RQ changes the time-outs of the connections that it is given.
            with contextlib.closing(redis_client.connect(url)) as own:
                _Worker.make(self._queue, own).work(burst=True, logging_level="WARNING")

    def _purge(self) -> dict[str, Any]:
        try:
            return purge(self._settings, is_stopping=self._stop.is_set).as_dict()
        except AlreadyRunning as error:
            log.info("purge.skipped", extra={"why": str(error)})
            return {"skipped": str(error)}


class _Job(Job):
    """A job whose function is looked up in the allow-list, never imported."""

    @property
    def func(self) -> Callable[..., Any]:
        if self.instance is not None or self.func_name not in _ALLOWED:
            raise UsageError(f"{self.func_name!r:.80} is not a function of this queue")
        return _ALLOWED[self.func_name]

    def restore(self, raw_data: Any) -> None:
        """Without callbacks and webhooks: code and URLs of a producer's choosing."""
        super().restore(raw_data)
        self._success_callback_name = None
        self._failure_callback_name = None
        self._stopped_callback_name = None
        self.webhooks = []


class _NoPenalty(BaseDeathPenalty):
    """RQ's would raise from a signal handler in the middle of a removal; jobs bound themselves."""

    def setup_death_penalty(self) -> None:
        """Nothing to set up."""

    def cancel_death_penalty(self) -> None:
        """Nothing to take back."""


class _Worker(SimpleWorker):
    death_penalty_class = _NoPenalty

    @classmethod
    def make(cls, queue: str, redis: Redis) -> "_Worker":
        # A name of its own each time: a fixed one is blocked by a killed predecessor's record.
        name = f"{WORKER_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        return cls([queue], name=name, connection=redis, job_class=_Job, serializer=JSONSerializer)

    def _install_signal_handlers(self) -> None:
        """The process has its own, which only set a flag."""

    def _set_ip_address(self, connection: Redis) -> None:
        """RQ's asks Redis, and ends over the answer where a socket's path has a space in it."""
        self.ip_address = "unknown"


def _drop_poison(redis: Any, queue: str) -> None:
    """Remove jobs that cannot even be read: one would end RQ's worker before the next is run."""
    key = f"{RQ_KEY_PREFIX}:queue:{queue}"
    for name in (key, f"{key}:intermediate"):
        for raw_id in redis.lrange(name, 0, 1000):
            id = raw_id.decode(errors="replace")
            try:
                _Job.fetch(id, connection=redis, serializer=JSONSerializer)
            except RedisError:
                raise
            except Exception as error:
                redis.lrem(name, 0, raw_id)
                log.error("job.poisoned", extra={"job": id, "problem": f"{error!r:.200}"})


@contextlib.contextmanager
def _redis(settings: Settings) -> Iterator["Redis | None"]:
    """A connection that has just answered; None where there is none."""
    try:
        redis = redis_client.connect(redis_server.resolve_url(settings))
        redis.ping()
    except (RedisError, RedisUnavailable) as error:
        log.warning("redis.unavailable", extra={"problem": str(error)})
        yield None
        return
    with contextlib.closing(redis):
        yield redis
