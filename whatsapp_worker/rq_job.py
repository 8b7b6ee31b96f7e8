"""The hash of an RQ job: reading one that nobody vouches for, and the words of a settled one.

Nothing here imports, unpickles or calls what a producer named. Pure: no Redis.
"""

import json
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rq.job import JOB_ID_PATTERN, JobStatus
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer
from rq.utils import str_to_date, utcformat

from whatsapp_worker.errors import InvalidMessage, WorkerError
from whatsapp_worker.event_names import RANK, Status
from whatsapp_worker.keys import HIGH_SUFFIX, SEND_MESSAGE
from whatsapp_worker.message import Outgoing, readable_metadata, validate

MAX_PAYLOAD = 1_048_576  # bytes of `data`, inflated
MAX_META = 65_536  # bytes, as a producer wrote it; with our outcome up to MAX_PAYLOAD
MAX_HASH = 4 * MAX_PAYLOAD  # bytes of all fields together
# What is noted of an attempt that is to be followed by another: a row `failed` with one of these
# was certainly never sent, and its job waits at the head.
NOT_HANDED_OVER = "the process ended before it was handed over; it is sent again"
NOT_CONNECTED = "the connection was lost before it was handed over; it is sent again"
PAUSED = "WhatsApp asked this number to pause; it is sent again later"
RESTING = "WhatsApp refused it for the moment; it is sent again after a rest"
RELEASED = (NOT_HANDED_OVER, NOT_CONNECTED, PAUSED, RESTING)
ALLOWED = {SEND_MESSAGE: validate}  # the only functions that a job may name

_DATES = ("created_at", "enqueued_at", "started_at", "ended_at", "last_heartbeat")
_NUMBERS = ("result_ttl", "failure_ttl", "ttl", "retries_left", "number_of_retries")
_CALLBACKS = ("success_callback_name", "failure_callback_name", "stopped_callback_name", "webhooks")
_RQ_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_READ = frozenset(
    ("data", "meta", "result", "status", "description", "origin", *_DATES, *_NUMBERS, *_CALLBACKS)
)
_ID = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,200}")  # what `validate` takes as message_id
_NO_REDIS: Any = object()  # reading a record asks nothing of it


class JobRefused(WorkerError):
    """A job that can never be run, whatever its message says; the text names what is wrong."""


class TextWiped(WorkerError):
    """A settled job was put on the queue again; its text is gone."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a CRM reads in `meta["outcome"]`; times are UTC seconds."""

    status: Status
    wa_message_id: str | None = None
    wa_id: str | None = None  # the number that WhatsApp resolved
    error: str | None = None
    claimed_at: float | None = None
    sent_at: float | None = None

    @property
    def is_success(self) -> bool:
        """Whether RQ's job is `finished`: the message was sent."""
        return RANK[self.status] >= RANK[Status.SENT]

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of `meta["outcome"]`."""
        return {
            "status": self.status.value,
            "wa_message_id": self.wa_message_id,
            "wa_id": self.wa_id,
            "error": self.error,
            "claimed_at": self.claimed_at,
            "sent_at": self.sent_at,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One popped job: `order` says what to send, or `problem` why it can never be sent."""

    id: str
    raw_id: bytes  # as it stands in the lists
    queue: str = ""
    order: Outgoing | None = None
    problem: WorkerError | None = None
    message_id: str | None = None  # as far as it could be read
    content_hash: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    enqueued_at: float = 0.0  # UTC seconds
    status: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)  # the producer's, and our outcome
    kept: Mapping[str, str] = field(default_factory=dict)  # fields of a hash that is written anew
    exists: bool = True  # False: there is no hash to write an outcome to

    @property
    def outcome(self) -> Outcome | None:
        """What was noted in its meta, by this attempt or an earlier one."""
        noted: Any = self.meta.get("outcome")
        try:
            return Outcome(**{**noted, "status": Status(noted["status"])})
        except (TypeError, KeyError, ValueError):
            return None

    @property
    def is_settled(self) -> bool:
        """Finished already: a second list entry of the same job id."""
        return self.status in (JobStatus.FINISHED, JobStatus.FAILED) and self.outcome is not None

    @property
    def poison(self) -> str | None:
        """What in it nobody can read, without its content; None when the producer's program is
        not to blame: the job can be read, or its record has expired."""
        is_expired = not self.exists and self.is_named
        if not isinstance(self.problem, JobRefused) or is_expired:
            return None
        return str(self.problem).partition(":")[0][:40]

    @property
    def is_named(self) -> bool:
        """Whether what stood in the queue is a job id at all."""
        return JOB_ID_PATTERN.fullmatch(self.id) is not None

    @property
    def is_cancelled(self) -> bool:
        """Somebody called RQ's own `cancel` after it was popped."""
        return self.status == JobStatus.CANCELED


def decode(raw_id: bytes, fields: Mapping[str, bytes], *, session: str, queue: str) -> Job:
    """Read a job. Never raises: what is wrong with it becomes its `problem`.

    Args:
        raw_id: The id as it stood in the queue.
        fields: The hash; empty when there is none.
        session: Whose queue it was on.
        queue: RQ's name of that queue.
    """
    id = raw_id.decode("ascii", "backslashreplace")
    if not JOB_ID_PATTERN.fullmatch(id):
        return Job(id, raw_id, queue, problem=JobRefused("it is no RQ job id"), exists=False)
    if not fields:
        return Job(id, raw_id, queue, problem=JobRefused("its record is gone"), exists=False)
    problem: WorkerError | None
    kept, problem = _read_record(fields)
    meta: Mapping[str, Any] = {}
    kwargs: Mapping[str, Any] = {}
    order = message_id = content_hash = None
    try:
        meta = _read_meta(fields.get("meta", b""))
    except WorkerError as error:
        problem = problem or error
    try:  # whatever its meta is: by the message id its outcome is found
        kwargs = _read_kwargs(fields.get("data", b""))
        message_id = _text(kwargs.get("message_id"))
        content_hash = _text(kwargs.get("content_hash"))
        if problem is None:
            order = _order(kwargs, session, queue)
            content_hash = order.content_hash
    except WorkerError as error:
        problem = problem or error
    return Job(
        id,
        raw_id,
        queue,
        order=order,
        problem=problem,
        message_id=message_id,
        content_hash=content_hash,
        metadata=order.metadata if order else readable_metadata(kwargs.get("metadata")),
        enqueued_at=_enqueued_at(kept),
        status=kept.get("status", ""),
        meta=meta,
        kept=kept,
    )


def message_id_of(data: bytes) -> str | None:
    """The message that packed arguments name, whether they could be sent or not."""
    try:
        return _text(_read_kwargs(data).get("message_id"))
    except WorkerError:
        return None


def _read_record(fields: Mapping[str, bytes]) -> tuple[dict[str, str], WorkerError | None]:
    """The fields that RQ itself can read, and what is wrong with the others."""
    kept: dict[str, str] = {}
    problem: WorkerError | None = None
    for name in ("status", "description", "origin", *_DATES, *_NUMBERS):
        value = fields.get(name)
        if not value:
            continue
        try:
            text = value.decode()
            _CHECKS.get(name, str)(text)
            kept[name] = text
        except ValueError:
            problem = problem or JobRefused(f"{name}: RQ cannot read it")
    for name in _CALLBACKS:
        if fields.get(name):
            problem = problem or JobRefused(f"{name}: callbacks and webhooks are refused")
    return kept, problem or _read_rest(fields)


def _read_rest(fields: Mapping[str, bytes]) -> WorkerError | None:
    """What is wrong with the fields that concern us only because a CRM will fetch the job."""
    rest = {name: value for name, value in fields.items() if name not in _READ}
    if rest.get("timeout", b"").isdigit():
        del rest["timeout"]  # what every job has
    name = "exc_info"
    try:
        _inflate(rest.pop("exc_info", b"")).decode()
        name = ", ".join(sorted(rest))[:80]
        if rest:
            probe = RqJob("probe", connection=_NO_REDIS, serializer=JSONSerializer)
            probe.restore({**rest, "data": b"[]"})
    except Exception:  # RQ's own readers raise what they please, AssertionError included
        return JobRefused(f"{name}: RQ cannot read it")
    return None


def _date(text: str) -> datetime:
    """RQ's time, read 20 times faster than by strptime where it is as RQ writes it."""
    return datetime.fromisoformat(text) if _RQ_TIME.fullmatch(text) else str_to_date(text)


_CHECKS: dict[str, Any] = {
    "status": JobStatus,
    **dict.fromkeys(_DATES, _date),
    **dict.fromkeys(_NUMBERS, int),
}


def _read_meta(raw: bytes) -> dict[str, Any]:
    if not raw:
        return {}
    is_long = len(raw) > MAX_META
    meta = _json("meta", raw) if len(raw) <= MAX_PAYLOAD else {}
    if not isinstance(meta, dict):
        raise JobRefused("meta: not a JSON object")
    if is_long and "outcome" not in meta:
        raise JobRefused(f"meta: longer than {MAX_META} bytes")
    return meta


def noted_meta(job: Job, outcome: Outcome) -> str:
    """A job's meta with its outcome; it can be read again, whatever the producer wrote.

    Not in ASCII, which makes a text three times as long. Numbers may still grow, to four times.
    """
    noted = {**job.meta, "outcome": outcome.as_dict()}
    text = json.dumps(noted, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates stay escaped


def _read_kwargs(data: bytes) -> dict[str, Any]:
    payload = _json("data", _inflate(data))
    if not isinstance(payload, list) or len(payload) != 4:
        raise JobRefused("data: not [function, null, [], {arguments}]")
    function, instance, args, kwargs = payload
    if not isinstance(function, str) or function not in ALLOWED:
        raise JobRefused(f"function: {function!r:.80} is not allowed here; use {SEND_MESSAGE!r}")
    if instance is not None:
        raise JobRefused("instance: must be null")
    if args != []:
        raise JobRefused("args: must be empty; pass keyword arguments")
    if not isinstance(kwargs, dict):
        raise JobRefused("kwargs: must be an object")
    return kwargs


def _inflate(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(data, MAX_PAYLOAD + 1)
        is_whole = stream.eof or len(plain) > MAX_PAYLOAD
    except zlib.error:
        is_whole = False
    if not is_whole:
        plain = data  # RQ reads what was never compressed, too
    if len(plain) > MAX_PAYLOAD:
        raise JobRefused(f"data: longer than {MAX_PAYLOAD} bytes")
    return plain


def _json(name: str, raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise JobRefused(f"{name}: not JSON; enqueue with serializer=JSONSerializer") from None


def _order(kwargs: Mapping[str, Any], session: str, queue: str) -> Outgoing:
    if "content_hash" in kwargs and "message" not in kwargs:
        raise TextWiped("message: its text was wiped when it was settled; enqueue it anew")
    try:
        order = validate(kwargs, session=session)
    except RecursionError:
        raise InvalidMessage("kwargs", "nested too deeply") from None
    if order.priority == "high" and not queue.endswith(HIGH_SUFFIX):
        # Nobody reads it before its turn, and then there is nothing left to overtake.
        raise InvalidMessage("priority", f"high overtakes on the queue {queue}{HIGH_SUFFIX} only")
    return order


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and _ID.fullmatch(value) else None


def _enqueued_at(kept: Mapping[str, str]) -> float:
    text = kept.get("enqueued_at") or kept.get("created_at")
    return _date(text).timestamp() if text else time.time()


def settled_fields(job: Job, session: str, outcome: Outcome) -> dict[str, Any]:
    """The fields of a job's hash that change when it is settled: its text goes, a hash stays."""
    fields: dict[str, Any] = {
        "status": (JobStatus.FINISHED if outcome.is_success else JobStatus.FAILED).value,
        "ended_at": rq_time(time.time()),
        "data": _wiped(job, session),
        "meta": noted_meta(job, outcome),
    }
    description = job.kept.get("description", "")
    if not description or description.startswith(f"{SEND_MESSAGE}("):
        fields["description"] = "send_message"  # RQ's default repeats text and numbers
    return fields


def fresh_fields(job: Job, session: str, outcome: Outcome) -> dict[str, Any]:
    """A whole hash for a job whose own RQ could not read."""
    now = rq_time(time.time())
    kept = {name: job.kept[name] for name in ("created_at", "enqueued_at") if name in job.kept}
    return {"created_at": now, "origin": job.queue, **kept, **settled_fields(job, session, outcome)}


def _wiped(job: Job, session: str) -> bytes:
    kwargs: dict[str, Any] = {"session": session, "message_id": job.message_id}
    kwargs["content_hash"] = job.content_hash
    if job.metadata:
        kwargs["metadata"] = job.metadata
    return zlib.compress(json.dumps([SEND_MESSAGE, None, [], kwargs]).encode())


def rq_time(at: float) -> str:
    """UTC seconds as RQ writes them."""
    return utcformat(datetime.fromtimestamp(at, UTC))
