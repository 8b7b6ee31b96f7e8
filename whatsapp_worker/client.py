"""For CRMs in Python: what they enqueue by plain RQ, with types and checked at the call.

    out = Outbox(redis)
    job = out.send_text("sales", "+5511999990001", "Hello", message_id="crm-4711")
    out.wait(job).status                   # "sent"

The jobs are exactly those of the raw path (docs/crm.md): a CRM may use both. Nothing here needs
the worker's settings or files, only its Redis.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Concatenate, Literal, ParamSpec, TypedDict, Unpack

from redis import Redis
from redis.exceptions import ResponseError
from rq import Queue
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from whatsapp_worker.errors import CommandTimeout, LedgerUnavailable, WorkerError
from whatsapp_worker.event_names import Status
from whatsapp_worker.keys import (
    CANCEL_REQUESTS,
    EVENTS_STREAM,
    SEND_MESSAGE,
    SessionId,
    outbound_queue,
    session_id,
)
from whatsapp_worker.message import check_message_id, validate
from whatsapp_worker.rq_job import Outcome

Fields = dict[str, Any]

_DESCRIPTION = "send_message"  # RQ's default would repeat text and numbers
_BATCH = 500  # jobs a round trip
_POLL_S = (0.02, 0.5)  # first and longest wait between two looks
_STALE_MS = 60_000  # an event unacknowledged for so long belonged to a dead consumer


class JobGone(WorkerError):
    """RQ has no such job: it expired (RESULT_TTL_S after its end), or it never was."""


class Options(TypedDict, total=False):
    """What every message may say beside its content.

    Attributes:
        message_id: Idempotency key of 1 to 200 printable characters: a message id is sent once,
            however often it is enqueued. A random one without it.
        expires_at: UTC seconds; not sent afterwards (status `expired`).
        ttl_s: The same, counted from enqueueing.
        send_at: UTC seconds; not sent before.
        priority: `high` overtakes within its session.
        on_unknown: `resend` sends again what may have arrived, at most twice.
        metadata: JSON, at most 4096 bytes; repeated in every event of the message.
        reply_to: WhatsApp id of the message that this one answers.
        reply_from: Who wrote that message, a number or JID; needed in groups.
        reply_text: What the quotation shows.
    """

    message_id: str
    expires_at: float
    ttl_s: float
    send_at: float
    priority: Literal["normal", "high"]
    on_unknown: Literal["keep", "resend"]
    metadata: Fields
    reply_to: str
    reply_from: str
    reply_text: str


@dataclass(frozen=True, slots=True)
class Draft:
    """A message before it is enqueued; made by `text`, `image` and the other functions below.

    It has a message id, so enqueueing one draft again sends nothing twice.
    """

    to: str
    message: Fields  # a Cloud API message object
    options: Fields

    def kwargs(self, session: str) -> Fields:
        """The keyword arguments of its job."""
        return {"session": session, "to": self.to, "message": self.message, **self.options}


def _draft(to: str, kind: str, content: Any, options: Options) -> Draft:
    given: Fields = {"message_id": str(uuid.uuid4()), **options}
    message = {"type": kind, kind: content}
    context = {key: given.pop(name) for name, key in _CONTEXT.items() if name in given}
    if context:
        message["context"] = context
    return Draft(to, message, given)


_CONTEXT = {"reply_to": "message_id", "reply_from": "from", "reply_text": "text"}


def _given(**fields: Any) -> Fields:
    """Those that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def _list(items: Sequence[str] | None) -> list[str] | None:
    return None if items is None else list(items)


def text(
    to: str,
    body: str,
    *,
    preview_url: bool | None = None,
    mentions: Sequence[str] | None = None,
    **options: Unpack[Options],
) -> Draft:
    """A text. `mentions` are numbers or JIDs whose `@number` stands in the body."""
    content = _given(body=body, preview_url=preview_url, mentions=_list(mentions))
    return _draft(to, "text", content, options)


def image(
    to: str,
    *,
    link: str | None = None,
    file: str | None = None,
    caption: str | None = None,
    mentions: Sequence[str] | None = None,
    **options: Unpack[Options],
) -> Draft:
    """A picture, by URL or by a path inside the worker's media folder; so all media below."""
    content = _given(link=link, file=file, caption=caption, mentions=_list(mentions))
    return _draft(to, "image", content, options)


def video(
    to: str,
    *,
    link: str | None = None,
    file: str | None = None,
    caption: str | None = None,
    mentions: Sequence[str] | None = None,
    **options: Unpack[Options],
) -> Draft:
    """A video."""
    content = _given(link=link, file=file, caption=caption, mentions=_list(mentions))
    return _draft(to, "video", content, options)


def audio(
    to: str, *, link: str | None = None, file: str | None = None, **options: Unpack[Options]
) -> Draft:
    """A sound file."""
    return _draft(to, "audio", _given(link=link, file=file), options)


def voice(
    to: str, *, link: str | None = None, file: str | None = None, **options: Unpack[Options]
) -> Draft:
    """A sound file that is shown as a voice note."""
    return _draft(to, "audio", _given(link=link, file=file, voice=True), options)


def document(
    to: str,
    *,
    link: str | None = None,
    file: str | None = None,
    filename: str | None = None,
    caption: str | None = None,
    mentions: Sequence[str] | None = None,
    **options: Unpack[Options],
) -> Draft:
    """Any file; `filename` is what the recipient sees."""
    content = _given(
        link=link, file=file, filename=filename, caption=caption, mentions=_list(mentions)
    )
    return _draft(to, "document", content, options)


def sticker(
    to: str, *, link: str | None = None, file: str | None = None, **options: Unpack[Options]
) -> Draft:
    """A sticker (WebP)."""
    return _draft(to, "sticker", _given(link=link, file=file), options)


def location(
    to: str,
    *,
    latitude: float,
    longitude: float,
    name: str | None = None,
    address: str | None = None,
    **options: Unpack[Options],
) -> Draft:
    """A place, in degrees."""
    content = _given(latitude=latitude, longitude=longitude, name=name, address=address)
    return _draft(to, "location", content, options)


def contacts(to: str, cards: Sequence[Fields], **options: Unpack[Options]) -> Draft:
    """Contact cards: Cloud API contact objects."""
    return _draft(to, "contacts", list(cards), options)


def contact(to: str, *, name: str, phone: str, **options: Unpack[Options]) -> Draft:
    """One contact card with one number."""
    card = {"name": {"formatted_name": name, "first_name": name}, "phones": [{"phone": phone}]}
    return contacts(to, [card], **options)


def reaction(
    to: str, *, target: str, emoji: str, author: str | None = None, **options: Unpack[Options]
) -> Draft:
    """A reaction to the message with the WhatsApp id `target`; an empty emoji takes it back.

    `author` is who wrote that message, a number or JID; it is needed in groups.
    """
    return _draft(to, "reaction", {**_about(target, author), "emoji": emoji}, options)


def _about(target: str, author: str | None) -> Fields:
    return _given(message_id=target, **{"from": author})


def poll(
    to: str,
    *,
    question: str,
    choices: Sequence[str],
    selectable: int = 1,
    **options: Unpack[Options],
) -> Draft:
    """A poll; `selectable` is how many choices a voter may take, 0 for any number."""
    content = {"question": question, "options": list(choices), "selectable_count": selectable}
    return _draft(to, "poll", content, options)


def edit(
    to: str,
    *,
    target: str,
    body: str,
    mentions: Sequence[str] | None = None,
    **options: Unpack[Options],
) -> Draft:
    """New text for a text of ours, by its WhatsApp id."""
    content = {"message_id": target, "text": _given(body=body, mentions=_list(mentions))}
    return _draft(to, "edit", content, options)


def revoke(to: str, *, target: str, author: str | None = None, **options: Unpack[Options]) -> Draft:
    """Delete a message for everyone: ours, or that of `author` in a group that we administer."""
    return _draft(to, "revoke", _about(target, author), options)


def mark_read(
    to: str, *, target: str, author: str | None = None, **options: Unpack[Options]
) -> Draft:
    """Tell the sender of a received message that it was read; `author` is needed in groups."""
    return _draft(to, "read", _about(target, author), options)


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One entry of `wa:events`.

    Attributes:
        id: The same for a repetition of the same happening: drop what was seen.
        event: Its name, for example `message.sent`.
        session: Empty for an event of the host.
        at: UTC seconds.
        payload: What happened.
        entry_id: Its place in the stream.
    """

    id: str
    event: str
    session: str
    at: float
    payload: Fields
    entry_id: str


P = ParamSpec("P")


def _sender(
    draft: Callable[Concatenate[str, P], Draft],
) -> Callable[Concatenate["Outbox", str, str, P], Job]:
    """The method `(session, to, ...)` that enqueues such a draft."""

    def send(self: "Outbox", session: str, to: str, *args: P.args, **kwargs: P.kwargs) -> Job:
        return self.send(session, draft(to, *args, **kwargs))

    send.__doc__ = f"`send` of a `{draft.__name__}`: {draft.__doc__}"
    return send  # type: ignore[return-value]  # it takes session and to by name as well


class Outbox:
    """Enqueues messages, tells what became of them, and reads events. Keeps no state.

    Every method may raise redis.RedisError: whether the call took effect is then not known, and
    it may be repeated with the same message ids or drafts.
    """

    def __init__(self, redis: Redis) -> None:
        """
        Args:
            redis: A client of the worker's Redis, without `decode_responses`: RQ needs bytes.
        """
        self._redis = redis

    def send(self, session: str, draft: Draft) -> Job:
        """Enqueue one message.

        Returns:
            Its RQ job.

        Raises:
            InvalidMessage: It can never be sent; names the field. Nothing was enqueued.
        """
        return self.send_many(session, [draft])[0]

    def send_many(self, session: str, drafts: Iterable[Draft]) -> list[Job]:
        """Enqueue many messages in a round trip per 500; in this order, within each priority.

        Every message is checked before the first is enqueued.

        Raises:
            InvalidMessage: One can never be sent; names the field. None was enqueued.
        """
        calls = [draft.kwargs(session) for draft in drafts]
        for kwargs in calls:
            validate(kwargs)
        jobs: dict[int, Job] = {}
        for high in (True, False):
            lane = [n for n, kwargs in enumerate(calls) if _is_high(kwargs) is high]
            enqueued = self._enqueue(session, high, [calls[n] for n in lane])
            jobs.update(zip(lane, enqueued, strict=True))
        return [jobs[number] for number in range(len(calls))]

    def _enqueue(self, session: str, high: bool, calls: Sequence[Fields]) -> Iterator[Job]:
        name = outbound_queue(SessionId(session), high=high)
        queue = Queue(name, connection=self._redis, serializer=JSONSerializer)
        rest = iter(calls)
        while batch := list(islice(rest, _BATCH)):
            yield from queue.enqueue_many(
                Queue.prepare_data(SEND_MESSAGE, kwargs=kwargs, description=_DESCRIPTION)
                for kwargs in batch
            )

    send_text = _sender(text)
    send_image = _sender(image)
    send_video = _sender(video)
    send_audio = _sender(audio)
    send_voice = _sender(voice)
    send_document = _sender(document)
    send_sticker = _sender(sticker)
    send_location = _sender(location)
    send_contacts = _sender(contacts)
    send_contact = _sender(contact)
    send_reaction = _sender(reaction)
    send_poll = _sender(poll)
    send_edit = _sender(edit)
    send_revoke = _sender(revoke)
    mark_read = _sender(mark_read)

    def cancel(self, session: str, message_id: str, *, timeout_s: float = 10.0) -> Outcome | None:
        """Cancel a message that still waits. The worker's supervisor does it and answers.

        Returns:
            What became of the message: `cancelled` when it was in time, else the outcome that it
            has, `sending` while that is open. None when no such message waits or was ever sent.

        Raises:
            UsageError: It is no session id.
            InvalidMessage: It is no message id.
            CommandTimeout: No supervisor answered within `timeout_s` seconds; the text says
                whether the message may be cancelled all the same (transient: call it again).
            LedgerUnavailable: The worker's database did not answer (transient).
        """
        id = uuid.uuid4().hex
        asked = {"session": session_id(session), "message_id": check_message_id(message_id)}
        request = json.dumps({"id": id, **asked}).encode()
        self._redis.rpush(CANCEL_REQUESTS, request)
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            found: Any = self._redis.blpop([f"{CANCEL_REQUESTS}:{id}"], timeout=_wait_s(left_s))
            if found:
                return _answer(json.loads(found[1]))
        if self._redis.lrem(CANCEL_REQUESTS, 1, request):  # type: ignore[arg-type]
            raise CommandTimeout("no supervisor answered: nothing was cancelled")
        raise CommandTimeout("the supervisor has not answered: it may be cancelled or not")

    def outcome(self, job: Job | str) -> Outcome:
        """What became of a job so far: `queued`, `sending`, or how it ended.

        Receipts are told by `events` only: here `sent` stays `sent`.

        Args:
            job: An RQ job or its id.

        Raises:
            JobGone: RQ has no record of it.
        """
        return self._outcomes([_id(job)])[0]

    def wait(self, job: Job | str, *, timeout_s: float = 60.0) -> Outcome:
        """Wait until a job has ended.

        Raises:
            CommandTimeout: Not within `timeout_s` seconds; it stays queued (transient).
            JobGone: RQ has no record of it.
        """
        return self.wait_many([job], timeout_s=timeout_s)[0]

    def wait_many(self, jobs: Iterable[Job | str], *, timeout_s: float = 60.0) -> list[Outcome]:
        """Wait until all of them have ended; raises as `wait`."""
        ids = [_id(job) for job in jobs]
        ended: dict[str, Outcome] = {}
        deadline = time.monotonic() + timeout_s
        pause_s, longest_s = _POLL_S
        while waiting := [id for id in dict.fromkeys(ids) if id not in ended]:
            found = zip(waiting, self._outcomes(waiting), strict=True)
            ended.update((id, outcome) for id, outcome in found if _has_ended(outcome))
            if len(ended) < len(set(ids)):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise CommandTimeout(
                        f"{len(set(ids)) - len(ended)} of {len(set(ids))} jobs have not ended"
                        f" within {timeout_s:g} s; they stay queued"
                    )
                time.sleep(min(pause_s, left_s))
                pause_s = min(pause_s * 1.5, longest_s)
        return [ended[id] for id in ids]

    def _outcomes(self, ids: Sequence[str]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        rest = iter(ids)
        while batch := list(islice(rest, _BATCH)):
            pipeline = self._redis.pipeline(transaction=False)
            for id in batch:
                pipeline.hmget(f"{RQ_KEY_PREFIX}:job:{id}", "status", "meta")
            for id, (status, meta) in zip(batch, pipeline.execute(), strict=True):
                outcomes.append(_outcome(id, status, meta))
        return outcomes

    def events(
        self,
        group: str,
        *,
        consumer: str = "1",
        since: str = "0",
        timeout_s: float | None = None,
    ) -> Iterator[StreamEvent]:
        """Events as they happen, each acknowledged when the next is asked for.

        What was not acknowledged comes again, also after a crash and from consumers that died:
        an event may come twice, with the same id. Give a group to each program that needs every
        event; consumers of one group share them.

        Args:
            group: Made when missing.
            consumer: Name of this process, unique within the group.
            since: Where a new group begins: `0` with everything there is, `$` with what comes.
            timeout_s: End after so long without an event; never without it.
        """
        self._make_group(group, since)
        claimed_at = time.monotonic() - _STALE_MS / 1000
        heard_at = time.monotonic()
        while True:
            now = time.monotonic()
            if now - claimed_at >= _STALE_MS / 1000:
                yield from self._unfinished(group, consumer)
                claimed_at = now
            left_s = 1.0 if timeout_s is None else heard_at + timeout_s - now
            if left_s <= 0:
                return
            entries = self._read(group, consumer, ">", block_ms=int(_wait_s(left_s) * 1000))
            if entries:
                yield from self._batch(group, entries)
                heard_at = time.monotonic()

    def _make_group(self, group: str, since: str) -> None:
        try:
            self._redis.xgroup_create(EVENTS_STREAM, group, id=since, mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _unfinished(self, group: str, consumer: str) -> Iterator[StreamEvent]:
        """What this consumer read and never acknowledged, and what a dead one left."""
        cursor: Any = "0-0"
        while cursor is not None:
            reply = self._redis.xautoclaim(
                EVENTS_STREAM, group, consumer, _STALE_MS, cursor, count=_BATCH, justid=False
            )
            cursor = None if reply[0] == b"0-0" else reply[0]
        last: Any = "0-0"
        while entries := self._read(group, consumer, last):
            last = entries[-1][0]
            yield from self._batch(group, entries)

    def _read(self, group: str, consumer: str, after: Any, *, block_ms: int | None = None) -> Any:
        streams: dict[Any, Any] = {EVENTS_STREAM: after}
        reply = self._redis.xreadgroup(group, consumer, streams, count=100, block=block_ms)
        return _entries(reply)

    def _batch(self, group: str, entries: Sequence[Any]) -> Iterator[StreamEvent]:
        for entry_id, fields in entries:
            if fields:  # trimmed ones have none
                yield _event(entry_id, fields)
            self._redis.xack(EVENTS_STREAM, group, entry_id)


def _wait_s(left_s: float) -> float:
    """For a command that blocks; never so short that an old Redis takes it for no limit at all."""
    return min(max(left_s, 0.01), 1.0)


def _id(job: Job | str) -> str:
    return job if isinstance(job, str) else job.id


def _is_high(kwargs: Fields) -> bool:
    return bool(kwargs.get("priority") == "high")


def _outcome(id: str, status: bytes | None, meta: bytes | None) -> Outcome:
    if status is None:
        raise JobGone(f"there is no job {id}: it expired, or it never was")
    noted = json.loads(meta).get("outcome") if meta else None
    # Not one that RQ's `cancel` took from the queue: it may have been in hand, and the worker says
    # within seconds what became of it.
    has_ended = status.decode() in (JobStatus.FINISHED, JobStatus.FAILED)
    if noted and has_ended:
        return Outcome(**{**noted, "status": Status(noted["status"])})
    if has_ended:
        return Outcome(Status.FAILED)
    is_started = status.decode() == JobStatus.STARTED
    return Outcome(Status.SENDING if is_started else Status.QUEUED)


def _answer(answer: Fields) -> Outcome | None:
    """What the supervisor says to a request to cancel."""
    if "error" in answer:
        raise LedgerUnavailable(answer["error"])
    found = answer["outcome"]
    return found and Outcome(**{**found, "status": Status(found["status"])})


def _has_ended(outcome: Outcome) -> bool:
    return outcome.status not in (Status.QUEUED, Status.SENDING)


def _entries(reply: Any) -> list[Any]:
    """The entries of one stream; RESP2 gives pairs, RESP3 a dictionary."""
    if not reply:
        return []
    if isinstance(reply, dict):
        [entries] = reply.values()
        return list(entries[0]) if entries and isinstance(entries[0], list) else list(entries)
    return list(reply[0][1])


def _event(entry_id: bytes, fields: dict[bytes, bytes]) -> StreamEvent:
    return StreamEvent(
        id=fields[b"id"].decode(),
        event=fields[b"event"].decode(),
        session=fields[b"session"].decode(),
        at=int(fields[b"timestamp_ms"]) / 1000,
        payload=json.loads(fields[b"payload"]),
        entry_id=entry_id.decode(),
    )
