"""What the sandbox's server does with stanzas that no real client sends, and with slow clients."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from whatsapp_worker.sandbox import api, connection, groups, protobufs, server
from whatsapp_worker.sandbox.binary import Jid, MalformedNode, Node
from whatsapp_worker.sandbox.media import Media
from whatsapp_worker.sandbox.model import Attempt, Device, PreKey
from whatsapp_worker.sandbox.network import Network
from whatsapp_worker.sandbox.session import DeviceSession
from whatsapp_worker.sandbox.signal import KeyPair, sign

PHONE = "5511999990001"
_wa6 = protobufs.load("waWa6.WAWebProtobufsWa6_pb2")


class Link:
    """A connection that takes whatever is sent."""

    def __init__(self) -> None:
        self.attempt = Attempt(1)
        self.sent: list[Node] = []

    def send(self, node: Node) -> None:
        self.sent.append(node)

    def close(self, why: str) -> None: ...

    def reset(self, why: str) -> None: ...

    def stall(self, on: bool) -> None: ...


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(state_dir=tmp_path, later=lambda seconds, call: None)
    yield made
    made.close()


def linked(network: Network, number: int) -> Device:
    keys = KeyPair.generate()
    signature = sign(keys.private, b"\x05" + keys.public)
    device = Device(PHONE, number, bytes(32), keys.public, 1, 1, keys.public, signature)
    network.add_device(device)
    return device


def upload(id: bytes, key: bytes) -> Node:
    """A client's one-time prekeys."""
    prekey = Node("key", {}, [Node("id", {}, id), Node("value", {}, key)])
    return Node("iq", {"type": "set", "xmlns": "encrypt"}, [Node("list", {}, [prekey])])


@pytest.mark.parametrize(("id", "key"), [(b"\xff" * 20, bytes(32)), (b"\0\0\1", b"short")])
def test_prekeys_that_are_none_end_one_connection_and_nothing_else(
    network: Network, id: bytes, key: bytes
) -> None:
    device = linked(network, 1)
    device.link = link = Link()
    session = DeviceSession(network, device, link)
    with pytest.raises(MalformedNode):
        session.handle(upload(id, key))
    session.handle(upload(b"\0\0\1", bytes(32)))
    assert network.store.count_prekeys(device) == 1


def test_a_change_that_fails_leaves_the_store_as_it_was(network: Network) -> None:
    device = linked(network, 1)
    with pytest.raises(OverflowError):
        network.store.add_prekeys(device, [PreKey(1, b"a"), PreKey(2**64, b"b")])
    unwritable = Node("message", {"to": Jid("1", "lid", 300)})
    with pytest.raises(ValueError):
        network.store.add_waiting(device, [Node("message"), unwritable])
    assert network.store.count_prekeys(device) == 0
    waiting = network.store.count_waiting(device)
    network.store.add_waiting(device, [Node("message")])
    assert network.store.count_waiting(device) == waiting + 1


@pytest.mark.parametrize("field", ["eIdent", "eRegid", "eSkeyID", "eSkeyVal", "eSkeySig"])
def test_a_client_whose_keys_are_none_is_not_linked(network: Network, field: str) -> None:
    sizes = {"eIdent": 32, "eRegid": 4, "eSkeyID": 3, "eSkeyVal": 32, "eSkeySig": 64}
    registration: Any = {name: bytes(size) for name, size in sizes.items()} | {field: b"x"}
    payload = _wa6.ClientPayload(devicePairingData=registration).SerializeToString()
    with pytest.raises(MalformedNode):
        network.admit(Link(), bytes(32), payload)
    assert network.pairing.expire(close=False) == 0


def test_a_group_has_two_members_and_there_are_not_too_many(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "MAX_GROUPS", 1)
    for members in ([PHONE], [PHONE, PHONE]):
        with pytest.raises(ValueError, match="different"):
            network.groups.create("x", members)
    network.groups.create("x", [PHONE, "5511999990002"])
    with pytest.raises(ValueError, match="already"):
        network.groups.create("x", [PHONE, "5511999990002"])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/refuse", {}),
        ("/stall", {}),
        ("/connect-failure", {"reason": 503}),
        ("/send-fault", {"how": "no_ack"}),
        ("/query-fault", {}),
    ],
)
def test_there_are_not_too_many_faults(
    network: Network, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr(api, "MAX_RULES", 2)
    route: Any = api.Api(network).routes()["POST", path]
    for _ in range(2):
        route(api.Fields(dict(fields)))
    with pytest.raises(api.BadRequest, match="already"):
        route(api.Fields(dict(fields)))


@pytest.mark.parametrize("text", [7, "x" * (api.MAX_TEXT + 1), "half a \ud800 pair"])
def test_a_text_that_no_stanza_can_carry_is_refused_by_name(text: object) -> None:
    with pytest.raises(api.BadRequest, match="text:"):
        api.Fields({"text": text}).text("text")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "example.com"])
def test_a_host_off_loopback_is_refused_before_anything_is_made(tmp_path: Path, host: str) -> None:
    def listens(told: object) -> None:
        pytest.fail(f"it listens: {told}")

    with pytest.raises(ValueError, match="loopback only"):
        server.serve(state_dir=tmp_path / "sandbox", host=host, ready=listens)
    assert list(tmp_path.iterdir()) == []


def test_every_route_of_the_control_api_but_health_wants_the_key(
    network: Network, tmp_path: Path
) -> None:
    app = api.make_app(network, Media(tmp_path / "media"), "right")
    routes = [
        (route.method, route.resource.canonical.format(message_id="x"))
        for route in app.router.routes()
        if route.resource
    ]
    assert len(routes) > 25, routes

    async def let_in() -> set[str]:
        async with TestClient(TestServer(app)) as client:
            wrong = {"X-Api-Key": "wrong"}
            answers = [await client.request(*route, headers=wrong) for route in routes]
            return {answer.url.path for answer in answers if answer.status != 401}

    assert asyncio.run(let_in()) == {"/health"}


class Wire(asyncio.Transport):
    """A transport on which nothing is written."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: Any) -> None: ...

    def abort(self) -> None: ...


def test_a_file_may_take_longer_than_a_handshake(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_LIMIT_S", 0.01)

    async def after_limit(head: bytes) -> str | None:
        made: Any = connection.Connection(
            network=network, codec=None, tls=None, handshake=None, media=Media(tmp_path / "media")
        )
        made.connection_made(Wire())
        made._host, made._step = "mmg.whatsapp.net", made._read_request  # as after TLS
        made.data_received(head)
        await asyncio.sleep(0.05)
        return made.attempt.ended

    upload = b"POST /mms/image/x HTTP/1.1\r\nContent-Length: 10\r\n\r\n12345"
    assert asyncio.run(after_limit(upload)) is None
    assert asyncio.run(after_limit(upload[:10])) == "handshake took too long"
