"""Whatever is told of a message repeats what its CRM gave it along, whoever tells it: the device
process, its successor's recovery, the queue keeper, the events process, an operator's command."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import events
from world import World, eventually

from whatsapp_worker.client import Outbox
from whatsapp_worker.event_names import Event

CONTACT, SILENT, NOBODY = "5521988880001", "5521988880002", "5521988880003"
LATER = 4_000_000_000.0

# What is told of each message, in order.
STORY: dict[str, list[Event]] = {
    "m-sent": [Event.SENT, Event.DELIVERED, Event.READ, Event.PLAYED],
    "m-refused": [Event.FAILED],
    "m-invalid": [Event.FAILED],
    "m-expired": [Event.EXPIRED],
    "m-expired-unconsumed": [Event.EXPIRED],
    "m-cancelled": [Event.CANCELLED],
    "m-cancelled-by-rq": [Event.CANCELLED],
    "m-unknown": [Event.UNKNOWN],
    "m-proven": [Event.UNKNOWN, Event.DELIVERED, Event.SENT],
    "m-resolved-sent": [Event.UNKNOWN, Event.SENT],
    "m-resolved-failed": [Event.UNKNOWN, Event.FAILED],
    "m-resent": [Event.SENT],
    "m-deleted-session": [Event.FAILED],
    "m-unknown-session": [Event.FAILED],
}
LOST = [id for id, names in STORY.items() if names[0] is Event.UNKNOWN]


class Told:
    """A world in which all of this happened, and its events about messages by message id."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.phone = world.link("sales")
        world.control.contacts(SILENT, receipts="none")
        world.control.unknown_number(NOBODY)
        world.link("idle")
        assert world.run("stop", "idle").returncode == 0
        self.end_unconsumed()
        self.send()
        self.lose_answers()
        self.receive()
        self.told = self.read()

    def enqueue(self, id: str, to: str = CONTACT, session: str = "sales", **more: Any) -> Any:
        return self.world.enqueue(session, to, id, id, metadata={"deal": id}, **more)

    def wait(self, *ids: str) -> None:
        """Until the last thing of each was told."""
        eventually(
            lambda: all(STORY[id][-1] in self.read().get(id, {}) for id in ids),
            within_s=60,
            what=f"{ids} are told to the end",
        )

    def end_unconsumed(self) -> None:
        """The keeper's share."""
        self.enqueue("m-unknown-session", session="nobody")
        self.enqueue("m-expired-unconsumed", session="idle", expires_at=time.time() - 1)
        self.wait("m-unknown-session", "m-expired-unconsumed")
        self.enqueue("m-deleted-session", session="idle")
        assert self.world.run("delete", "idle", "--yes", timeout_s=90).returncode == 0
        self.enqueue("m-cancelled", send_at=LATER)
        assert Outbox(self.world.redis).cancel("sales", "m-cancelled", timeout_s=60)
        self.enqueue("m-cancelled-by-rq", send_at=LATER).cancel()
        self.wait("m-deleted-session", "m-cancelled", "m-cancelled-by-rq")

    def send(self) -> None:
        self.enqueue("m-sent")
        self.enqueue("m-refused", NOBODY)
        self.enqueue("m-invalid", "12")
        self.enqueue("m-expired", expires_at=time.time() - 1)
        self.wait("m-refused", "m-invalid", "m-expired")
        eventually(lambda: Event.DELIVERED in self.read()["m-sent"])

    def lose_answers(self) -> None:
        """Each ends its device process; the next one's recovery tells."""
        for id in (*LOST, "m-resent"):
            self.world.control.send_fault("no_ack", self.phone, count=1)
            more = {"on_unknown": "resend"} if id == "m-resent" else {}
            self.enqueue(id, SILENT, **more)
            eventually(lambda: self.read().get(id), what=id)  # noqa: B023
        for word in ("sent", "failed"):
            done = self.world.run("messages", "resolve", "sales", f"m-resolved-{word}", word)
            assert done.returncode == 0, done.stderr

    def receive(self) -> None:
        """Receipts, to a process that sent none of these messages."""
        control, told = self.world.control, self.read()
        control.receipts(told["m-proven"][Event.UNKNOWN][0]["wa_message_id"], "delivered")
        for step in ("read", "played"):
            control.receipts(told["m-sent"][Event.SENT][0]["wa_message_id"], step)
        self.wait(*STORY)

    def read(self) -> dict[str, dict[Event, list[dict[str, Any]]]]:
        """The payloads by message id and event."""
        found: dict[str, dict[Event, list[dict[str, Any]]]] = {}
        for entry in events(self.world.redis):
            event, payload = Event(entry["event"]), entry["payload"]
            if event.startswith("message."):
                by_event = found.setdefault(payload["message_id"], {})
                by_event.setdefault(event, []).append(payload)
        return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    # So many lost answers in a row would open the breaker.
    settings = {"SEND_TIMEOUT_S": "3", "MSG_FAILURE_THRESHOLD": "20"}
    with World.running(tmp_path_factory.mktemp("metadata"), **settings) as world:
        yield Told(world)


def test_these_are_all_events_of_an_outbound_message() -> None:
    names = {event for event in Event if event.startswith("message.")} - {Event.RECEIVED}
    assert {event for names in STORY.values() for event in names} == names


@pytest.mark.parametrize(
    ("id", "event"), [(id, event) for id, events in STORY.items() for event in events]
)
def test_an_event_repeats_the_metadata_of_its_message(told: Told, id: str, event: Event) -> None:
    payloads = told.told[id][event]
    assert [payload["metadata"] for payload in payloads] == [{"deal": id}]


def test_nothing_else_was_told_and_nothing_twice(told: Told) -> None:
    assert {id: set(events) for id, events in told.told.items()} == {
        id: set(events) for id, events in STORY.items()
    }
