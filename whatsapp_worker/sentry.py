"""The Sentry SDK: the only file that imports it, for the supervisor and the maintenance process.

Device processes and the fork helper never load it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import sentry_sdk
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.transport import HttpTransport
from sentry_sdk.types import Event, Hint
from sentry_sdk.utils import BadDsn

from whatsapp_worker.alert_policy import Memory, purge_failed, scrub
from whatsapp_worker.errors import SettingsError

FLUSH_S = 2.0
_QUEUE_MAX = 1000  # events on their way


@contextlib.contextmanager
def maintenance_sentry(
    dsn: str | None, *, host: str, release: str, repeat_s: float
) -> Iterator[None]:
    """Report failed jobs of this process, the maintenance worker, by RQ's integration.

    Once, at process entry, before the worker is made, and nowhere else: it would report every
    message that failed. At the end what waits is sent, for FLUSH_S at most. Nothing happens
    without a DSN.

    Args:
        repeat_s: ALERT_REPEAT_S; a purge that fails again sooner is not told again.

    Raises:
        SettingsError: SENTRY_DSN is no DSN.
    """
    if not dsn:
        yield
        return
    from sentry_sdk.integrations.rq import RqIntegration

    memory = Memory(repeat_s=repeat_s)

    def before_send(event: Event, hint: Hint) -> Event | None:
        alert = purge_failed(problem="")
        if memory.judge(alert, time.time()) is None:
            return None
        event["tags"] = {"event": alert.event, "host": host}
        event["fingerprint"] = [alert.key, host]
        return _scrub_job(event, hint)

    with _dsn_named():
        sentry_sdk.init(
            dsn,
            **_options(host, release),
            integrations=[_quiet_logging(), RqIntegration()],
            before_send=before_send,
        )
    try:
        yield
    finally:
        sentry_sdk.get_client().close(timeout=FLUSH_S)


class _Transport(HttpTransport):
    """Sentry's own, which also says what was taken and what was lost."""

    on_end: Callable[[str, bool], None] = staticmethod(lambda event_id, is_taken: None)

    def record_lost_event(
        self, reason: str, data_category: Any = None, item: Any = None, *, quantity: int = 1
    ) -> None:
        if item is not None and reason in ("network_error", "queue_overflow", "ratelimit_backoff"):
            self._tell(item, is_taken=False)

    def _handle_response(self, response: Any, envelope: Any) -> None:
        super()._handle_response(response, envelope)
        # A loss is recorded by now, but for 429. What is too large (413) would be so for ever.
        self._tell(envelope, is_taken=response.status != 429)

    def _tell(self, whole: Any, *, is_taken: bool) -> None:
        event = whole.get_event()
        if event:
            self.on_end(str(event["event_id"]), is_taken)


def client(
    dsn: str, *, host: str, release: str, on_end: Callable[[str, bool], None]
) -> "sentry_sdk.Client":
    """A client of our own: nothing in this process is captured but what we hand to it.

    Args:
        on_end: Told the id of each event that left, and whether Sentry took it (the first word
            counts) or is to be asked again; on any thread.

    Raises:
        SettingsError: SENTRY_DSN is no DSN.
    """
    # It warns of each of its retries; ours say it in one line.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    with _dsn_named():
        made = sentry_sdk.Client(
            dsn,
            **_options(host, release),
            integrations=[_quiet_logging()],
            transport=_Transport,
            before_send=_before_send,
        )
    if isinstance(made.transport, _Transport):
        made.transport.on_end = on_end
    return made


@contextlib.contextmanager
def _dsn_named() -> Iterator[None]:
    try:
        yield
    except BadDsn as error:
        raise SettingsError([f"SENTRY_DSN is no DSN: {error}"]) from error


def _options(host: str, release: str) -> dict[str, Any]:
    return {
        "release": release,
        "server_name": host,
        # Each of them could capture arguments, queries or URLs.
        "default_integrations": False,
        "auto_enabling_integrations": False,
        "include_local_variables": False,
        "max_request_body_size": "never",
        "max_breadcrumbs": 0,
        "auto_session_tracking": False,
        "send_client_reports": False,
        "enable_backpressure_handling": False,
        "spotlight": False,
        "shutdown_timeout": FLUSH_S,
        "transport_queue_size": _QUEUE_MAX,
    }


def _quiet_logging() -> LoggingIntegration:
    # Logging alone never alerts, and log lines never travel.
    return LoggingIntegration(level=None, event_level=None)


def _before_send(event: Event, hint: Hint) -> Event:
    for name in ("message", "fingerprint", "tags", "contexts"):
        if name in event:
            event[name] = scrub(event[name])
    return event


def _scrub_job(event: Event, hint: Hint) -> Event:
    event.pop("contexts", None)  # the trace of one job alone, whose ids look like numbers
    job = event.get("extra", {}).get("rq-job")
    if isinstance(job, dict):
        job.pop("description", None)  # RQ's default repeats the arguments
    for problem in (event.get("exception") or {}).get("values", []):
        problem["value"] = scrub(problem.get("value"))
    event["extra"] = scrub(event.get("extra", {}))
    return _before_send(event, hint)
