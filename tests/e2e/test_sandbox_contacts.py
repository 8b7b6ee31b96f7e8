"""Real neonize clients and simulated contacts understand each other, both ways."""

import base64
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from raw_client import RawClient
from sandboxed import Sandbox
from world import eventually

from whatsapp_worker.sandbox import protobufs
from whatsapp_worker.sandbox.control import ControlError

E2E = protobufs.load("waE2E.WAWebProtobufsE2E_pb2")
ANA = "5521988887777"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    sandbox = Sandbox(tmp_path_factory.mktemp("sandbox"))
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def client(sandbox: Sandbox) -> RawClient:
    return sandbox.link("one", "5511900001111")


def text(body: str) -> Any:
    return E2E.Message(conversation=body)


def test_a_text_arrives_with_its_secret(sandbox: Sandbox, client: RawClient) -> None:
    message = text("Olá, tudo bem? 👋")
    message.messageContextInfo.messageSecret = bytes(range(32))
    row = sandbox.arrived(client.send(ANA, message))
    assert (row["from"], row["to"]) == ("5511900001111", ANA)
    assert (row["type"], row["text"], row["times"]) == ("text", "Olá, tudo bem? 👋", 1)
    assert row["message"] is not None
    secret = row["message"]["messageContextInfo"]["messageSecret"]
    assert secret == "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


def test_what_neonize_marks_as_a_bots_is_told(sandbox: Sandbox) -> None:
    client = sandbox.client("robot", NEONIZE_BOT_TAG="on")
    sandbox.control.scan(client.expect("qr")["code"], phone="5511900005555")
    client.expect("connected")
    assert sandbox.arrived(client.send(ANA, text("beep")))["bot"]
    client.close()


def test_many_texts_in_a_row_arrive_in_order(sandbox: Sandbox, client: RawClient) -> None:
    ids = [client.send("5521977770001", text(f"number {i}")) for i in range(30)]
    sandbox.arrived(ids[-1])
    rows = sandbox.control.messages(to="5521977770001")
    assert [row["text"] for row in rows] == [f"number {i}" for i in range(30)]
    assert all(row["undecryptable"] is None for row in rows)


def test_a_contact_and_a_client_hold_a_conversation(sandbox: Sandbox, client: RawClient) -> None:
    contact = "5521977770002"
    for i in range(4):
        assert sandbox.arrived(client.send(contact, text(f"question {i}")))["text"]
        sandbox.control.inbound(sender=contact, to="5511900001111", text=f"answer {i}")
        heard = client.expect("message", text=f"answer {i}")
        assert heard["sender"] == f"{contact}@s.whatsapp.net"
        assert heard["chat"].endswith("@lid") and not heard["from_me"]


def test_a_contact_may_write_first(sandbox: Sandbox, client: RawClient) -> None:
    contact = "5521977770003"
    for body in ("hello?", "anybody there?"):
        sandbox.control.inbound(sender=contact, to="5511900001111", text=body)
        heard = client.expect("message", text=body)
    client.mark_read(heard)
    assert sandbox.arrived(client.send(contact, text("yes")))["text"] == "yes"
    sandbox.control.inbound(sender=contact, to="5511900001111", text="good")
    client.expect("message", text="good")


def test_receipts_reach_the_client(sandbox: Sandbox, client: RawClient) -> None:
    contact = "5521977770004"
    delivered = client.send(contact, text("one"))
    client.expect("receipt", id=delivered, type=1)
    sandbox.control.contacts(contact, receipts="read")
    read = client.send(contact, text("two"))
    client.expect("receipt", id=read, type=1)
    client.expect("receipt", id=read, type=4)
    sandbox.control.contacts(contact, receipts="none")
    by_hand = client.send(contact, text("three"))
    sandbox.control.receipts(by_hand, "played")
    client.expect("receipt", id=by_hand, type=6)


def test_a_contact_that_never_answers_gets_first_messages_only(
    sandbox: Sandbox, client: RawClient
) -> None:
    contact = "5521977770005"
    sandbox.control.contacts(contact, receipts="none")
    rows = [sandbox.arrived(client.send(contact, text(str(i)))) for i in range(3)]
    assert [row["text"] for row in rows] == ["0", "1", "2"]


def message_of(field: str, **values: Any) -> Any:
    message = E2E.Message()
    part = getattr(message, field)
    part.SetInParent()
    for name, value in values.items():
        setattr(part, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "kind", "shown"),
    [
        (message_of("extendedTextMessage", text="see https://x.y"), "extended_text", "see https"),
        (message_of("locationMessage", degreesLatitude=-23.5, name="SP"), "location", "SP"),
        (message_of("contactMessage", displayName="Ana", vcard="BEGIN:"), "contact", "Ana"),
        (message_of("reactionMessage", text="👍"), "reaction", "👍"),
        (message_of("pollCreationMessage", name="Lunch?"), "poll", "Lunch?"),
    ],
)
def test_kinds_of_messages_are_told_apart(
    sandbox: Sandbox, client: RawClient, message: Any, kind: str, shown: str
) -> None:
    row = sandbox.arrived(client.send(ANA, message))
    assert row["type"] == kind and (row["text"] or "").startswith(shown)


@pytest.mark.parametrize("kind", ["image", "video", "audio", "document"])
def test_a_file_opens_to_the_same_bytes(sandbox: Sandbox, client: RawClient, kind: str) -> None:
    data = kind.encode() * 20_000
    uploaded = client.upload(data, kind.title())
    message = message_of(
        f"{kind}Message",
        directPath=uploaded["DirectPath"],
        URL=uploaded["url"],
        fileLength=len(data),
        mediaKey=base64.b64decode(uploaded["MediaKey"]),
        fileSHA256=base64.b64decode(uploaded["FileSHA256"]),
        fileEncSHA256=base64.b64decode(uploaded["FileEncSHA256"]),
    )
    assert client.download(message) == data
    row = sandbox.arrived(client.send(ANA, message))
    assert row["type"] == kind
    assert sandbox.control.media(row["id"]) == data


def test_a_message_without_a_file_has_none_to_open(sandbox: Sandbox, client: RawClient) -> None:
    row = sandbox.arrived(client.send(ANA, text("only words")))
    with pytest.raises(ControlError) as refused:
        sandbox.control.media(row["id"])
    assert refused.value.status == 404


def test_two_clients_write_to_each_other(sandbox: Sandbox, client: RawClient) -> None:
    other = sandbox.link("two", "5511900002222")
    for i in range(2):
        client.send("5511900002222", text(f"ping {i}"))
        heard = other.expect("message", text=f"ping {i}")
        assert heard["sender"] == "5511900001111@s.whatsapp.net"
        sent = other.send("5511900001111", text(f"pong {i}"))
        client.expect("message", text=f"pong {i}")
        other.expect("receipt", id=sent)
    other.mark_read(heard)
    client.expect("receipt", id=heard["id"], type=4)


def test_a_second_device_of_the_same_number_gets_copies(
    sandbox: Sandbox, client: RawClient
) -> None:
    second = sandbox.link("one-b", "5511900001111")

    def is_copied() -> bool:
        client.send(ANA, text("seen on both"))
        with contextlib.suppress(AssertionError):
            return bool(second.expect("message", text="seen on both", from_me=True, within_s=2))
        return False

    # The first device learns of the second by a notification that may come after its next send.
    eventually(is_copied, what="the second device gets a copy")
    sandbox.control.inbound(sender=ANA, to="5511900001111", text="to both of you")
    client.expect("message", text="to both of you")
    second.expect("message", text="to both of you")


def test_a_group_reads_what_a_client_writes(sandbox: Sandbox, client: RawClient) -> None:
    other = sandbox.link("grouped", "5511900005555")
    group = sandbox.control.group("Team", ["5511900001111", ANA, "5521977770009", "5511900005555"])
    for i in range(3):
        message_id = client.send(group, text(f"to all {i}"))
        row = sandbox.arrived(message_id)
        assert (row["to"], row["type"], row["text"]) == (group, "text", f"to all {i}")
        assert row["undecryptable"] is None
        heard = other.expect("message", text=f"to all {i}")
        assert heard["chat"] == group and heard["sender"] == "5511900001111@s.whatsapp.net"
        for _ in range(2):
            client.expect("receipt", id=message_id, type=1)


def test_a_group_that_is_not_there_is_an_error(client: RawClient) -> None:
    with pytest.raises(AssertionError, match="failed to get group members"):
        client.send("120363000000000000@g.us", text("nobody"))


def test_what_arrives_while_a_client_is_away_waits_for_it(sandbox: Sandbox) -> None:
    away = sandbox.link("away", "5511900003333")
    away.close()
    eventually(lambda: not sandbox.control.devices("5511900003333")[0]["online"])
    for body in ("while", "you", "were out"):
        sandbox.control.inbound(sender=ANA, to="5511900003333", text=body)
    back = sandbox.client("away")
    back.expect("connected")
    for body in ("while", "you", "were out"):
        back.expect("message", text=body)


@pytest.mark.parametrize("end", [Sandbox.stop, Sandbox.kill])
def test_everything_goes_on_after_a_restart_of_the_sandbox(
    tmp_path: Path, request: pytest.FixtureRequest, end: Callable[[Sandbox], None]
) -> None:
    sandbox = Sandbox(tmp_path)
    request.addfinalizer(sandbox.close)
    client = sandbox.link("one", "5511900004444")
    sandbox.arrived(client.send(ANA, text("before")))
    sandbox.control.inbound(sender=ANA, to="5511900004444", text="answer")
    client.expect("message", text="answer")
    end(sandbox)
    sandbox.start()
    message_id = eventually(
        lambda: _sent(client, "after"), within_s=30, what="the client is back and sends"
    )
    assert sandbox.arrived(message_id)["text"] == "after"
    sandbox.control.inbound(sender=ANA, to="5511900004444", text="answer again")
    client.expect("message", text="answer again")


def _sent(client: RawClient, body: str) -> str | None:
    with contextlib.suppress(AssertionError):
        return client.send(ANA, text(body))
    return None
