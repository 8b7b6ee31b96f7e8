"""Receipts and inbound messages on their way from neonize's event thread to `wa:events`."""

import contextlib
import json
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from redis.exceptions import RedisError

from storage.errors import StorageError
from storage.ledger import Ledger
from storage.ledger import Receipt as KeptReceipt
from whatsapp_worker.event_names import Event
from whatsapp_worker.facts import Inbound, Receipt
from whatsapp_worker.stream import EventStream, event_id

log = logging.getLogger(__name__)

MAX_WAITING = 10_000  # facts
_REMEMBERED = 2000  # messages whose ids are known without asking the ledger; 0.4 KiB each
_REMEMBERED_TEXT = 512 * 1024  # characters of their metadata
_BATCH = 200
_FIRST_REST_S, _LONGEST_REST_S = 0.1, 2.0
# A receipt may overtake the return of the send that it is for.
_OVERTAKING_S = 0.5
_RETRY_S = 0.05
_ASK_AGAIN_S = 2.0  # not before, where the ledger did not answer: that can take its whole time-out
_GATHER_S = 0.2  # between two writes: many facts cost little more than one


class _Message(NamedTuple):
    """A message of the CRM."""

    id: str | None
    metadata: str | None = None  # JSON
    wa_id: str | None = None  # of its recipient


class _Heard(NamedTuple):
    """A fact as it was offered."""

    fact: Receipt | Inbound
    expires_at: float  # monotonic; then it is written though its message is not known


class _Item(NamedTuple):
    """One WhatsApp id of one fact."""

    fact: Receipt | Inbound
    wa_message_id: str
    expires_at: float


class FactWriter:
    """A bounded thread that tells the stream what the client heard. Redis down never blocks
    the caller; 10,000 facts wait for it, later ones are dropped with an ERROR line."""

    def __init__(
        self,
        session: str,
        stream: EventStream,
        *,
        ledger: Ledger | None = None,
    ) -> None:
        """Starts nothing.

        Args:
            session: Whose client it is.
            stream: With a connection of its own.
            ledger: Asked whose receipt it is when `sent` was not told, as after a restart.
        """
        self._session = session
        self._stream = stream
        self._ledger = ledger
        self._waiting: queue.Queue[_Heard | None] = queue.Queue(MAX_WAITING)
        self._known: OrderedDict[str, _Message] = OrderedDict()  # by WhatsApp's id
        self._known_text = 0  # characters of metadata in it
        self._ask_at = 0.0  # monotonic; not before, the ledger is asked whose receipt it is
        self._todo: deque[_Item] = deque()
        self._lock = threading.Lock()
        self._asked_at: float | None = None  # monotonic; while Redis has not answered
        self._give_up_at = float("inf")  # monotonic; then what is left is the ledger's
        self._closing = threading.Event()
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="facts", daemon=True)

    def start(self) -> None:
        """Start the (daemon) thread."""
        self._thread.start()

    def offer(self, fact: Receipt | Inbound) -> None:
        """Hand over a fact; returns at once. From any thread."""
        try:
            self._waiting.put_nowait(_Heard(fact, time.monotonic() + _OVERTAKING_S))
        except queue.Full:
            self._dropped += 1
            if self._dropped % 1000 == 1:
                extra = {"session": self._session, "dropped": self._dropped}
                log.error("facts.dropped", extra=extra)

    def sent(
        self,
        wa_message_id: str,
        message_id: str,
        metadata: str | None = None,
        *,
        wa_id: str | None = None,
    ) -> None:
        """Remember which message of the CRM a WhatsApp id belongs to; from any thread.

        Args:
            metadata: As the ledger keeps it; its receipts repeat it.
            wa_id: Its recipient, as WhatsApp resolved it.
        """
        with self._lock:
            self._known[wa_message_id] = _Message(message_id, metadata, wa_id)
            self._known_text += len(metadata or "")
            while len(self._known) > _REMEMBERED or self._known_text > _REMEMBERED_TEXT:
                _, forgotten = self._known.popitem(last=False)
                self._known_text -= len(forgotten.metadata or "")

    def close(self, *, timeout_s: float = 1.0) -> None:
        """Write what waits, at most for `timeout_s`, and end the thread. Receipts that Redis does
        not take in half of that time go to the ledger. From any thread."""
        begun_at = time.monotonic()
        self._give_up_at = begun_at + timeout_s / 2
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)  # ends the wait
        if not self._thread.is_alive():
            return
        silent_s = begun_at - (self._asked_at or begun_at)
        self._thread.join(max(0.0, timeout_s / 2 - silent_s))
        if self._thread.is_alive():  # it may hang for as long as Redis does
            leaving = threading.Thread(
                target=self._leave_to_the_ledger, name="goodbye", daemon=True
            )
            leaving.start()
            leaving.join(max(0.0, begun_at + timeout_s - time.monotonic()))

    def _run(self) -> None:
        rest_s = _FIRST_REST_S
        while not (self._closing.is_set() and self._is_empty()):
            if len(self._todo) < _BATCH:
                self._todo.extend(self._take())
            if time.monotonic() > self._give_up_at:
                self._leave_to_the_ledger()
                return
            try:
                if self._write_all():
                    self._closing.wait(_GATHER_S)
                elif self._todo:
                    self._closing.wait(_RETRY_S)
                rest_s = _FIRST_REST_S
            except RedisError as error:
                extra = {"session": self._session, "error": repr(error)}
                log.warning("facts.redis_lost", extra=extra)
                if self._closing.is_set():
                    self._leave_to_the_ledger()
                    return
                self._closing.wait(rest_s)
                rest_s = min(rest_s * 2, _LONGEST_REST_S)

    def _leave_to_the_ledger(self) -> None:
        """Else nobody would ever hear of these receipts: WhatsApp tells each once. Nothing is
        taken away, so that two threads may do it: the ledger only moves forward."""
        with self._waiting.mutex:
            waiting = list(self._waiting.queue)
        found = [
            KeptReceipt(item.wa_message_id, item.fact.kind, item.fact.at)
            for item in (*self._todo, *_items(waiting))
            if isinstance(item.fact, Receipt)
        ]
        if self._ledger is not None and found:
            with contextlib.suppress(StorageError):
                self._ledger.receipts(found, now=time.time())

    def _is_empty(self) -> bool:
        return not self._todo and self._waiting.empty()

    def _take(self) -> Iterator[_Item]:
        """What was offered, one item for each WhatsApp id; waits where there is nothing to do."""
        wait_s = 0.0 if self._todo else None  # `close` ends the wait
        with contextlib.suppress(queue.Empty):
            for _ in range(_BATCH):
                heard = self._waiting.get(timeout=wait_s)
                wait_s = 0.0
                yield from _items([heard])

    def _write_all(self) -> bool:
        """Write what can be written, and say whether there was anything; keep a receipt that
        overtook its message for a moment."""
        entries = []
        kept: deque[_Item] = deque()
        known: dict[str, _Message] = {}  # many in a group may have got the same message
        for item in self._todo:
            entry = self._entry(item, known)
            if entry is None:
                kept.append(item)
            else:
                entries.append(entry)
        if entries:
            self._asked_at = time.monotonic()
            try:
                self._stream.add_many(entries)
            finally:
                self._asked_at = None
        self._todo = kept
        return bool(entries)

    def _entry(self, item: _Item, known: dict[str, _Message]) -> Mapping[str, str | int] | None:
        """The event; None for a receipt whose message is not known yet."""
        fact = item.fact
        if isinstance(fact, Inbound):
            return self._inbound(fact)
        if item.wa_message_id not in known:
            known[item.wa_message_id] = self._message(item.wa_message_id)
        message = known[item.wa_message_id]
        is_late = time.monotonic() > item.expires_at or self._closing.is_set()
        if message.id is None and not is_late:
            return None
        event = Event(f"message.{fact.kind}")
        payload: dict[str, Any] = {
            "message_id": message.id,
            "wa_message_id": item.wa_message_id,
            "wa_id": _who(fact, message.wa_id),
            "chat": fact.chat,
            "at": fact.at,
        }
        if message.metadata:
            payload["metadata"] = json.loads(message.metadata)
        id = event_id(self._session, "receipt", item.wa_message_id, fact.sender, event)
        return self._stream.entry(event, self._session, payload, id=id)

    def _inbound(self, fact: Inbound) -> Mapping[str, str | int]:
        payload: dict[str, Any] = {
            "wa_message_id": fact.wa_message_id,
            "from": _who(fact),
            "chat": fact.chat,
            "sender": fact.sender,
            "push_name": fact.push_name,
            "type": fact.type,
            "text": fact.text,
            "at": fact.at,
        }
        id = event_id(self._session, "inbound", fact.chat, fact.sender, fact.wa_message_id)
        return self._stream.entry(Event.RECEIVED, self._session, payload, id=id)

    def _message(self, wa_message_id: str) -> _Message:
        with self._lock:
            known = self._known.get(wa_message_id)
        if known is not None:
            return known
        row = None
        if self._ledger is not None and time.monotonic() >= self._ask_at:
            try:
                row = self._ledger.find_by_wa_id(wa_message_id)
            except StorageError:  # then the ledger gets it when it can
                self._ask_at = time.monotonic() + _ASK_AGAIN_S
        if row is None:
            return _Message(None)
        return _Message(row.message_id, row.metadata, row.wa_id)


def _items(heard: Iterable[_Heard | None]) -> Iterator[_Item]:
    """One for each WhatsApp id."""
    for one in heard:
        if one is None:
            continue
        fact, expires_at = one
        ids = (fact.wa_message_id,) if isinstance(fact, Inbound) else fact.wa_message_ids
        yield from (_Item(fact, id, expires_at) for id in ids)


def _who(fact: Receipt | Inbound, recipient: str | None = None) -> str:
    """Whom a fact is from: the digits of the number, else the JID of the hidden id, whose digits
    alone would be taken for a number; both can be written to."""
    if fact.phone:
        return fact.phone
    if recipient is not None and not recipient.endswith("@g.us"):
        return recipient
    user, _, server = fact.sender.partition("@")
    return f"{user.partition(':')[0]}@{server}"
