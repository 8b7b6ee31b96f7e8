"""Whether what is said of messages is true: statuses against arrivals, and every teller's word
against the others'. Pure."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixture import SENT, Order

from storage.ledger import Row

FINAL_EVENTS = {
    f"message.{word}": word for word in ("sent", "failed", "unknown", "expired", "cancelled")
}
_MARK = re.compile(r"mark-[0-9]{4}")


def allowed(status: str, *, resends: int = 0) -> range:
    """How often a message with this status may have arrived.

    Args:
        resends: How often it may have been sent again though the first may have arrived.
    """
    if status in SENT:
        return range(1, 2 + resends)
    if status == "unknown":
        return range(0, 2 + resends)
    assert status in ("failed", "expired", "cancelled"), status
    return range(0, 1)


def word(status: str) -> str:
    """Receipts move the ledger on; a job and its event say `sent`."""
    return "sent" if status in SENT else status


@dataclass(frozen=True)
class Arrival:
    """What a contact, or a group's members, decrypted under one WhatsApp id."""

    phone: str  # the sender's
    mark: str
    wa_message_id: str
    at: float  # UTC seconds

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Arrival":
        """From `Control.messages`; the mark is `?` where there is none, or more than one."""
        marks = set(_MARK.findall(repr(row["message"])))
        mark = marks.pop() if len(marks) == 1 and not row["undecryptable"] else "?"
        return cls(row["from"], mark, row["id"], row["at"])


@dataclass
class Facts:
    """What everybody says in the end. A message is named by its id: it is unique here."""

    jobs: dict[str, tuple[str, dict[str, Any]]]  # by job id: RQ's status, the outcome
    rows: dict[str, Row]  # the ledger's
    events: list[dict[str, Any]]  # id, event, payload; in the stream's order
    arrivals: list[Arrival]  # in their order
    due: dict[str, float]  # by job id: UTC seconds before which it must not arrive
    answers: dict[str, str | None]  # to requests to cancel
    full_disk: tuple[float, float]  # UTC seconds from which until which nothing could be written


class Verdict:
    """Everything that contradicts something else; nothing when all is well."""

    def __init__(self, orders: Iterable[Order], phones: Mapping[str, str], facts: Facts) -> None:
        """
        Args:
            phones: By session.
        """
        self.orders = {order.job_id: order for order in orders}
        self.facts = facts
        self._sessions = {phone: session for session, phone in phones.items()}
        self._arrivals: dict[str, list[Arrival]] = defaultdict(list)
        for arrival in facts.arrivals:
            self._arrivals[arrival.mark].append(arrival)
        self._told: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by job id
        for event in facts.events:
            if event["event"] in FINAL_EVENTS:
                self._told[event["payload"]["job_id"]].append(event)

    def status(self, order: Order) -> str:
        """The word of its job; `none` where that has not ended."""
        status, outcome = self.facts.jobs.get(order.job_id, ("gone", {}))
        return str(outcome.get("status")) if status in ("finished", "failed") else "none"

    def sender(self, order: Order) -> Order | None:
        """The job that its message was sent by, or ended with; None without a row."""
        row = self.facts.rows.get(order.message_id)
        return self.orders[row.job_id] if row is not None else None

    def problems(self) -> list[str]:
        found = [f"a stranger arrived: {arrival}" for arrival in self._strangers()]
        for order in self.orders.values():
            said = [*self._of_job(order), *self._of_row(order), *self._of_events(order)]
            said += [*self._of_arrivals(order), *self._of_cancelling(order)]
            found += [f"{order.job_id} ({order.fate_name}): {problem}" for problem in said]
        found += self._of_receipts()
        found += self._of_sessions()
        for session in self._sessions.values():
            found += [f"{session}: {problem}" for problem in self._of_order(session)]
        return found

    def _strangers(self) -> Iterator[Arrival]:
        marks = {order.mark for order in self.orders.values()}
        return (a for a in self.facts.arrivals if a.mark not in marks)

    def _of_job(self, order: Order) -> Iterator[str]:
        status = self.status(order)
        if status not in order.fate.ends and not self._met_a_full_disk(order, status):
            outcome = self.facts.jobs.get(order.job_id)
            yield f"ended as {status}, not {'/'.join(sorted(order.fate.ends))}: {outcome}"
        is_finished = self.facts.jobs.get(order.job_id, ("gone",))[0] == "finished"
        if is_finished != (status in SENT):
            yield f"RQ says finished={is_finished}, its outcome {status}"

    def _met_a_full_disk(self, order: Order, status: str) -> bool:
        """Then its file finds no place, or neonize gives up half-way, in a send that had begun."""
        claimed_at = self.facts.jobs.get(order.job_id, ("", {}))[1].get("claimed_at") or 0.0
        begin, end = self.facts.full_disk
        return status in ("failed", "unknown") and begin <= claimed_at <= end

    def _of_row(self, order: Order) -> Iterator[str]:
        """The row is that of the job that sent it; jobs of an id that was used repeat it, unless
        they were refused for what they say."""
        row, sender = self.facts.rows.get(order.message_id), self.sender(order)
        if row is None or sender is None:
            if order.fate_name != "invalid":
                yield "the ledger does not know it"
            return
        status = self.status(order)
        if sender is order and word(row.status) != word(status):
            yield f"the ledger says {row.status}, its job {status}"
        outcome = self.facts.jobs.get(order.job_id, ("", {}))[1]
        if status in SENT and outcome.get("wa_message_id") != row.wa_message_id:
            yield f"the ledger names {row.wa_message_id}, its job {outcome.get('wa_message_id')}"

    def _of_events(self, order: Order) -> Iterator[str]:
        """One final event; `unknown` may be followed by `sent`, as a receipt proved. That of a job
        whose message another has sent has the same id as the other's."""
        told = {event["id"]: event for event in reversed(self._told[order.job_id])}
        words = [FINAL_EVENTS[event["event"]] for event in reversed(told.values())]
        last = word(self.status(order))
        if words not in ([last], ["unknown", "sent"]) or words[-1:] != [last]:
            yield f"the events say {words}, its job {self.status(order)}"
        sender = self.sender(order)
        if last == "sent" and sender is not None:
            ids = {
                event["id"]
                for job_id in (order.job_id, sender.job_id)
                for event in self._told[job_id]
                if event["event"] == "message.sent"
            }
            if len(ids) != 1:
                yield f"it was told as sent {len(ids)} times"
        for event in told.values():
            if event["payload"].get("metadata") != order.metadata:
                yield f"{event['event']} does not repeat its metadata: {event['payload']}"

    def _of_arrivals(self, order: Order) -> Iterator[str]:
        """A job that did not send the message says nothing of its arrivals, unless its content is
        another."""
        sender = self.sender(order)
        arrivals, status = self._arrivals[order.mark], self.status(order)
        is_about_it = sender is order or sender is None or sender.mark != order.mark
        if status == "none":
            return
        if is_about_it and len(arrivals) not in allowed(status, resends=order.fate.resends):
            yield f"{status}, and arrived {len(arrivals)} times"
        row = self.facts.rows.get(order.message_id)
        names = {arrival.wa_message_id for arrival in arrivals}
        if sender is order and row and status in SENT and row.wa_message_id not in names:
            yield f"nothing arrived as {row.wa_message_id}: {arrivals}"
        due = self.facts.due.get(order.job_id, 0.0)
        if sender is order and any(arrival.at < due for arrival in arrivals):
            yield f"arrived before {due}: {arrivals}"

    def _of_cancelling(self, order: Order) -> Iterator[str]:
        if order.message_id in self.facts.answers:
            answer, status = self.facts.answers[order.message_id], self.status(order)
            if answer is None or (answer == "cancelled") != (status == "cancelled"):
                yield f"asked to cancel it, the answer was {answer}; it is {status}"

    def _of_receipts(self) -> Iterator[str]:
        """Each names its message, and repeats the metadata of the job that sent it."""
        by_mark = {order.mark: order for order in self.orders.values()}
        senders = {
            arrival.wa_message_id: self.sender(order) or order
            for arrival in self.facts.arrivals
            if (order := by_mark.get(arrival.mark)) is not None
        }
        for event in self.facts.events:
            if event["event"] not in ("message.delivered", "message.read", "message.played"):
                continue
            payload = event["payload"]
            sender = senders.get(payload["wa_message_id"])
            if sender is None:
                yield f"a receipt of nothing that arrived: {event}"
            elif payload["message_id"] is None and sender.fate.is_unanswered:
                continue  # whose it was, nobody knew when it came
            elif payload["message_id"] != sender.message_id:
                yield f"a receipt of {sender.job_id} does not name it: {event}"
            elif payload.get("metadata") != sender.metadata:
                yield f"a receipt does not repeat the metadata of {sender.job_id}: {event}"

    def _of_sessions(self) -> Iterator[str]:
        """What went wrong was none of the sessions' fault: each just came back."""
        for event in self.facts.events:
            if event["event"] == "session.state_changed":
                reason = event["payload"]["reason"]
                if reason not in (None, "flapping") and not reason.startswith("wa-"):
                    yield f"a session changed its state: {event}"

    def _of_order(self, session: str) -> Iterator[str]:
        """First come, first sent, within a lane. What the design lets out of it:

        - high priority is a lane of its own;
        - what is laid aside (`send_at`, RQ's `enqueue_at`) may be late, but overtakes nothing;
        - what was refused for the moment, or is resent, stays at the head: each of its arrivals
          counts, and stands in order;
        - a message id that failed and was enqueued again has the place of the later job.
        """
        for is_high in (False, True):
            latest = -1
            for order in self._sent_orders(session):
                if order.is_high is not is_high:
                    continue
                if order.number < latest and order.send_in_s is None:
                    yield f"{order.job_id} arrived after job-{latest:04d}"
                if order.send_in_s is None:
                    latest = order.number
        yield from self._overtakers(session)

    def _overtakers(self, session: str) -> Iterator[str]:
        """What was laid aside and arrived before something that had been enqueued before it."""
        arrived: Sequence[Order] = list(self._sent_orders(session))
        earliest = float("inf")
        for order in reversed(arrived):
            if order.is_high:
                continue
            if order.send_in_s is None:
                earliest = min(earliest, order.number)
            elif order.number > earliest:
                yield f"{order.job_id}, laid aside, overtook job-{earliest:04d}"

    def _sent_orders(self, session: str) -> Iterator[Order]:
        """The jobs behind what arrived from a session, in the order of arrival."""
        by_mark = {order.mark: order for order in self.orders.values()}
        for arrival in self.facts.arrivals:
            order = by_mark.get(arrival.mark)
            if self._sessions.get(arrival.phone) == session and order is not None:
                yield self.sender(order) or order
