"""The sandbox network itself: linking, its faults, its restart, and hostile bytes."""

import contextlib
import http.client
import ipaddress
import random
import shutil
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from raw_client import RawClient
from sandboxed import Sandbox
from world import eventually

from whatsapp_worker.sandbox import noise, protobufs
from whatsapp_worker.sandbox.control import ControlError

E2E = protobufs.load("waE2E.WAWebProtobufsE2E_pb2")
WA6 = protobufs.load("waWa6.WAWebProtobufsWa6_pb2")
PHONE = "5511900007777"
ANA = "5521966665555"
TIMED_OUT_S = 20


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    sandbox = Sandbox(tmp_path_factory.mktemp("sandbox"))
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def linked(sandbox: Sandbox) -> RawClient:
    return sandbox.link("seven", PHONE)


@pytest.fixture
def client(sandbox: Sandbox, linked: RawClient) -> Iterator[RawClient]:
    """A connected client on a network without faults."""
    sandbox.control.reset()
    yield linked
    sandbox.control.reset()
    eventually(lambda: sandbox.is_online(PHONE), what="the client is back")


def text(body: str) -> Any:
    return E2E.Message(conversation=body)


# Linking


def test_a_fresh_number_is_made_up_for_a_scan_without_one(sandbox: Sandbox) -> None:
    client = sandbox.client("fresh")
    scanned = sandbox.control.scan(client.expect("qr")["code"])
    assert scanned["outcome"] == "paired"
    client.expect("connected")
    (device,) = sandbox.control.devices(scanned["phone"])
    assert (device["jid"], device["logins"], device["online"]) == (scanned["jid"], 1, True)
    assert device["prekeys"] > 0
    client.close()
    eventually(lambda: not sandbox.is_online(scanned["phone"]), what="the end is noticed")


def test_a_wrong_hmac_links_nothing(sandbox: Sandbox) -> None:
    client = sandbox.client("mistrusting")
    scanned = sandbox.control.scan(client.expect("qr")["code"], "5511900000666", hmac="wrong")
    assert scanned["outcome"] == "refused: hmac-mismatch"
    assert sandbox.control.devices("5511900000666") == []
    client.close()


def test_an_expired_code_cannot_be_scanned(sandbox: Sandbox) -> None:
    client = sandbox.client("late")
    code = client.expect("qr")["code"]
    assert sandbox.control.expire_qr() == 1
    with pytest.raises(ControlError, match="expired"):
        sandbox.control.scan(code)
    assert sandbox.control.connections()[-1]["ended"] == "qr expired"
    client.close()


def test_what_is_no_code_of_this_network_is_refused(sandbox: Sandbox) -> None:
    for code in ("", "https://wa.me/settings/linked_devices#a,b", "x,???,b,c,d"):
        with pytest.raises(ControlError) as refused:
            sandbox.control.scan(code)
        assert refused.value.status == 400


def test_a_code_typed_into_a_phone_links_it(sandbox: Sandbox) -> None:
    client = sandbox.client("typed")
    client.expect("qr")
    code = client.pair_phone("+5511900000999")
    with pytest.raises(ControlError, match="no client shows"):
        sandbox.control.enter_code(code, "5511900000998")
    wrong = "1" + code[1:] if code[0] != "1" else "2" + code[1:]
    assert sandbox.control.enter_code(wrong, "5511900000999")["outcome"] == "refused: wrong code"
    scanned = sandbox.control.enter_code(code, "5511900000999")
    assert (scanned["outcome"], scanned["phone"]) == ("paired", "5511900000999")
    client.expect("connected")
    client.close()


def test_a_removed_device_is_logged_out_for_good(sandbox: Sandbox) -> None:
    client = sandbox.link("removed", "5511900000111")
    assert sandbox.control.logout_device("5511900000111") == 1
    client.expect("logged_out")
    client.close()
    assert sandbox.control.devices("5511900000111") == []
    with pytest.raises(ControlError) as unknown:
        sandbox.control.logout_device("5511900000111")
    assert unknown.value.status == 404


# Connections


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_dropped_client_comes_back(sandbox: Sandbox, client: RawClient, how: Any) -> None:
    with sandbox.comes_back(PHONE):
        assert sandbox.control.drop(PHONE, how) == 1
    (attempt,) = sandbox.control.connections(PHONE)
    assert (attempt["reached"], attempt["ended"]) == ("connected", None)


def test_refused_dials_are_counted(sandbox: Sandbox, client: RawClient) -> None:
    sandbox.control.refuse(count=2)
    with sandbox.comes_back(PHONE):
        sandbox.control.drop(PHONE)
    ends = [attempt["ended"] for attempt in sandbox.control.connections()]
    assert ends == ["refused", "refused", None]


def test_dials_are_refused_for_so_many_seconds(sandbox: Sandbox, client: RawClient) -> None:
    until = time.monotonic() + 1
    sandbox.control.refuse(seconds=1)
    with sandbox.comes_back(PHONE):
        sandbox.control.drop(PHONE)
    *refused, last = sandbox.control.connections()
    assert refused and {attempt["ended"] for attempt in refused} == {"refused"}
    assert last["ended"] is None and last["monotonic"] >= until


def test_one_phone_is_refused_as_soon_as_it_is_known(sandbox: Sandbox, client: RawClient) -> None:
    sandbox.control.refuse("5511900009999")
    sandbox.control.refuse(PHONE, count=1)
    with sandbox.comes_back(PHONE):
        sandbox.control.drop(PHONE)
    refused, last = sandbox.control.connections()
    assert (refused["phone"], refused["reached"], refused["ended"]) == (
        PHONE,
        "handshaken",
        "refused",
    )
    assert last["ended"] is None


def test_a_client_that_trusts_another_root_links_with_nobody(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    """Its proxy, its CA: all is right but the key that the client's memory holds, as it would be
    where it met the real WhatsApp."""
    folder = tmp_path / "sandbox"
    shutil.copytree(sandbox.state_dir, folder)
    (folder / "root.pub").write_bytes(bytes(range(32)))
    sandbox.control.reset()
    client = sandbox.client("mistrustful", SSL_CERT_FILE=str(folder / "ca.pem"))
    [attempt] = eventually(
        lambda: [a for a in sandbox.control.connections() if a["ended"]], what="it hangs up"
    )
    assert (attempt["reached"], attempt["ended"]) == ("encrypted", "closed by client")
    client.close()


def test_silence_holds_a_send_until_it_ends(sandbox: Sandbox, client: RawClient) -> None:
    client.send(ANA, text("before"))
    sandbox.control.stall(PHONE)
    sending = threading.Thread(target=client.send, args=(ANA, text("held back")))
    sending.start()
    sending.join(0.5)
    assert sending.is_alive()
    assert [row["text"] for row in sandbox.control.messages(to=ANA)] == ["before"]
    sandbox.control.unstall(PHONE)
    sending.join(TIMED_OUT_S)
    assert [row["text"] for row in sandbox.control.messages(to=ANA)] == ["before", "held back"]


def test_silence_ends_by_itself(sandbox: Sandbox, client: RawClient) -> None:
    sandbox.control.stall(seconds=0.3)
    client.send(ANA, text("a little late"))
    assert sandbox.control.messages(to=ANA)[0]["acked"]


def test_after_a_stream_error_503_a_client_comes_back(sandbox: Sandbox, client: RawClient) -> None:
    with sandbox.comes_back(PHONE):
        sandbox.control.stream_error(PHONE, "503")


def test_a_replaced_client_stays_away(sandbox: Sandbox) -> None:
    client = sandbox.link("replaced", "5511900000222")
    sandbox.control.stream_error("5511900000222", conflict="replaced")
    eventually(lambda: not sandbox.is_online("5511900000222"), what="the client is gone")
    client.close()
    again = sandbox.client("replaced")
    again.expect("connected")
    assert [a["ended"] for a in sandbox.control.connections("5511900000222")] == [
        "stream error 515",
        "stream error replaced",
        None,
    ]
    again.close()


def test_a_second_login_replaces_the_first(sandbox: Sandbox) -> None:
    first = sandbox.link("twice", "5511900000333")
    second = sandbox.client("twice")
    second.expect("connected")
    ends = [a["ended"] for a in sandbox.control.connections("5511900000333")]
    assert ends == ["stream error 515", "stream error replaced", None]
    first.close()
    second.close()


def test_failures_answer_logins(sandbox: Sandbox, client: RawClient) -> None:
    sandbox.control.connect_failure(503, PHONE, count=2)
    with sandbox.comes_back(PHONE):
        sandbox.control.drop(PHONE)
    ends = [attempt["ended"] for attempt in sandbox.control.connections(PHONE)]
    assert ends == ["failure 503", "failure 503", None]


@pytest.mark.parametrize("reason", [402, 405, 409])
def test_failures_that_keep_the_credentials(sandbox: Sandbox, reason: int) -> None:
    phone = f"551190000{reason}"
    sandbox.link(f"failed-{reason}", phone).close()
    sandbox.control.connect_failure(reason, phone, expire=60 if reason == 402 else None)
    turned_away = sandbox.client(f"failed-{reason}")
    eventually(
        lambda: sandbox.control.connections(phone)[-1]["ended"] == f"failure {reason}",
        what="the login fails",
    )
    turned_away.close()
    again = sandbox.client(f"failed-{reason}")
    again.expect("connected")
    again.close()


def test_a_401_ends_the_credentials(sandbox: Sandbox) -> None:
    sandbox.link("dead", "5511900000444").close()
    sandbox.control.connect_failure(401, "5511900000444")
    client = sandbox.client("dead")
    client.expect("logged_out")
    client.close()


# Messages


def test_a_refused_message_does_not_arrive(sandbox: Sandbox, client: RawClient) -> None:
    sandbox.control.send_fault("refuse", PHONE, code=421)
    with pytest.raises(AssertionError, match="421"):
        client.send(ANA, text("refused"))
    client.send(ANA, text("taken"))
    assert [row["text"] for row in sandbox.control.messages(to=ANA)] == ["taken"]
    both = sandbox.control.messages(to=ANA, refused=True)
    assert [(row["refused"], row["acked"]) for row in both] == [(421, False), (None, True)]


def test_a_message_sent_twice_under_one_id_is_one_row(sandbox: Sandbox, client: RawClient) -> None:
    sandbox.control.send_fault("drop_after", PHONE)
    message_id = client.send(ANA, text("twice"))
    (row,) = sandbox.control.messages(to=ANA)
    assert (row["id"], row["times"], row["acked"], row["text"]) == (message_id, 2, True, "twice")
    assert row["receipts"] == ["delivered"]


def test_a_message_lost_on_the_way_counts_once(sandbox: Sandbox, client: RawClient) -> None:
    sandbox.control.send_fault("drop_before", PHONE, to=ANA, after=1)
    client.send("5521900000000", text("to another"))
    client.send(ANA, text("first"))
    client.send(ANA, text("lost, then repeated"))
    assert [(row["text"], row["times"]) for row in sandbox.control.messages(to=ANA)] == [
        ("first", 1),
        ("lost, then repeated", 1),
    ]


def test_a_slow_acknowledgement_is_slow(sandbox: Sandbox, client: RawClient) -> None:
    sandbox.control.send_fault("slow", PHONE, delay_s=3)
    sending = threading.Thread(target=client.send, args=(ANA, text("slow")))
    sending.start()
    rows = eventually(lambda: sandbox.control.messages(to=ANA), what="the message arrives")
    assert (rows[0]["text"], rows[0]["acked"]) == ("slow", False)
    sending.join(TIMED_OUT_S)
    assert sandbox.control.messages(to=ANA)[0]["acked"]


def test_an_unacknowledged_message_is_in_the_list(sandbox: Sandbox) -> None:
    phone = "5511900000555"
    client = sandbox.link("unanswered", phone)
    sandbox.control.send_fault("no_ack", phone)
    sending = threading.Thread(target=_fail, args=(client,))
    sending.start()
    rows = eventually(lambda: sandbox.control.messages(sender=phone), what="it arrives")
    assert (rows[0]["times"], rows[0]["acked"]) == (1, False)
    client.expect("receipt", id=rows[0]["id"])
    client.close()
    sending.join(TIMED_OUT_S)


def _fail(client: RawClient) -> None:
    with contextlib.suppress(AssertionError):
        client.send(ANA, text("no answer"))


def test_a_number_can_be_unknown(sandbox: Sandbox, client: RawClient) -> None:
    sandbox.control.unknown_number("5521911110000")
    with pytest.raises(AssertionError, match="no LID found"):
        client.send("5521911110000", text("nobody"))
    sandbox.control.known_number("5521911110000")
    client.send("5521911110000", text("somebody"))


def test_a_number_with_an_alias_is_found_only_by_who_asks_for_it_as_a_contact(
    sandbox: Sandbox, client: RawClient
) -> None:
    dialled, known = "5569911110000", "556911110000"
    sandbox.control.number_alias(dialled, known)
    with pytest.raises(AssertionError, match="no LID found"):
        client.send(dialled, text("nobody"))
    client.send(known, text("somebody"))


def test_rows_are_told_since_a_number(sandbox: Sandbox, client: RawClient) -> None:
    for body in ("one", "two", "three"):
        client.send(ANA, text(body))
    first, second, third = sandbox.control.messages(to=ANA)
    since = sandbox.control.messages(since=first["seq"], decode=False)
    assert [row["seq"] for row in since] == [second["seq"], third["seq"]]
    assert since[0]["message"] is None
    assert third["message"] == {"conversation": "three"}
    assert since.dropped == 0


# The control API


def test_the_control_api_wants_its_key(sandbox: Sandbox) -> None:
    for key in ({}, {"X-Api-Key": "wrong"}, {"X-Api-Key": "ä"}):
        assert _get(sandbox, "/devices", key) == 401
    assert _get(sandbox, "/health", {}) == 200


def test_misspelled_and_wrong_fields_are_named(sandbox: Sandbox) -> None:
    for path, fields in (
        ("/drop", {"fone": PHONE}),
        ("/stall", {"phone": "12"}),
        ("/send-fault", {"how": "sideways"}),
        ("/connect-failure", {"reason": 1}),
        ("/refuse", {"seconds": "long"}),
    ):
        with pytest.raises(ControlError) as refused:
            sandbox.control._call("POST", path, **fields)
        assert refused.value.status == 400
        assert str(refused.value).split(":")[0] == next(iter(fields))


def test_it_listens_on_loopback_only_and_nowhere_but_where_it_says(sandbox: Sandbox) -> None:
    open_ = psutil.Process(sandbox.endpoints["pid"]).net_connections("inet")
    told = [urlsplit(sandbox.endpoints[name]) for name in ("proxy_url", "control_url")]
    listening = {(s.laddr.ip, s.laddr.port) for s in open_ if s.status == psutil.CONN_LISTEN}
    assert listening == {(url.hostname, url.port) for url in told}
    addresses = {part.ip for s in open_ for part in (s.laddr, s.raddr) if part}
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses


def test_private_files_are_private(sandbox: Sandbox) -> None:
    assert sandbox.state_dir.stat().st_mode & 0o777 == 0o700
    for path in sandbox.state_dir.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def _get(sandbox: Sandbox, path: str, headers: dict[str, str]) -> int:
    url = urlsplit(sandbox.endpoints["control_url"])
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=10)
    with contextlib.closing(connection):
        connection.request(
            "GET", path, headers={name: value.encode() for name, value in headers.items()}
        )
        return connection.getresponse().status


# Restart


def test_a_restart_keeps_ports_keys_devices_and_what_waits(
    sandbox: Sandbox, client: RawClient
) -> None:
    before = sandbox.endpoints
    away = sandbox.link("away", "5511900000888")
    away.close()
    eventually(lambda: not sandbox.is_online("5511900000888"), what="the client is gone")
    client.send("5511900000888", text("for later"))
    with sandbox.comes_back(PHONE):
        sandbox.stop()
        sandbox.start()
    assert {**sandbox.endpoints, "pid": 0} == {**before, "pid": 0}
    away = sandbox.client("away")
    away.expect("message", text="for later")
    client.send(ANA, text("after the restart"))
    assert sandbox.control.messages(to=ANA)[0]["text"] == "after the restart"
    away.close()


# Hostile bytes


def test_a_hundred_garbage_connections_do_not_end_it(sandbox: Sandbox, client: RawClient) -> None:
    source = random.Random(7)
    steps = (_as_it_is, _as_tls, _inside_tls, _as_websocket, _as_handshake, _as_stanzas)
    for attempt in range(102):
        with contextlib.suppress(OSError):
            steps[attempt % len(steps)](sandbox, source)
    reached = {attempt["reached"] for attempt in sandbox.control.connections()}
    assert reached >= {"accepted", "proxied", "encrypted", "handshaken", "pairing"}
    client.send(ANA, text("still there"))
    assert sandbox.control.messages(to=ANA)[-1]["text"] == "still there"
    eventually(
        lambda: sum(a["ended"] is None for a in sandbox.control.connections()) <= 1,
        what="every garbage connection is closed",
    )


def _as_it_is(sandbox: Sandbox, source: random.Random) -> None:
    with _dial(sandbox) as sock:
        sock.sendall(source.randbytes(source.randrange(1, 40_000)) + b"\r\n\r\n")
        _drain(sock)


def _as_tls(sandbox: Sandbox, source: random.Random) -> None:
    with _proxy(sandbox) as sock:
        sock.sendall(source.randbytes(source.randrange(1, 4_000)))
        _drain(sock)


def _inside_tls(sandbox: Sandbox, source: random.Random) -> None:
    with _connect(sandbox) as sock:
        sock.sendall(source.randbytes(source.randrange(1, 40_000)) + b"\r\n\r\n")
        _drain(sock)


def _as_websocket(sandbox: Sandbox, source: random.Random) -> None:
    with _upgrade(sandbox) as sock:
        sock.sendall(source.randbytes(source.randrange(1, 4_000)))
        sock.shutdown(socket.SHUT_WR)
        _drain(sock)


def _as_handshake(sandbox: Sandbox, source: random.Random) -> None:
    with _upgrade(sandbox) as sock:
        garbage = source.randbytes(source.randrange(1, 300))
        sock.sendall(_frame(noise.PROLOGUE + len(garbage).to_bytes(3, "big") + garbage))
        _drain(sock)


def _as_stanzas(sandbox: Sandbox, source: random.Random) -> None:
    """A right handshake, a payload that is none or a registration, then encrypted garbage."""
    with _upgrade(sandbox) as sock:
        writer = _shake_hands(sock, source.choice([b"", b"\xff\xff", source.randbytes(40)]))
        for _ in range(5):
            frame = writer.encrypt(b"\x00" + source.randbytes(source.randrange(0, 200)))
            sock.sendall(_frame(len(frame).to_bytes(3, "big") + frame))
        _drain(sock)


def _dial(sandbox: Sandbox) -> socket.socket:
    url = urlsplit(sandbox.endpoints["proxy_url"])
    sock = socket.create_connection((url.hostname or "", url.port or 0), timeout=5)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 5, 0))
    return sock


def _proxy(sandbox: Sandbox) -> socket.socket:
    sock = _dial(sandbox)
    sock.sendall(b"CONNECT web.whatsapp.com:443 HTTP/1.1\r\nHost: web.whatsapp.com\r\n\r\n")
    assert sock.recv(100).startswith(b"HTTP/1.1 200")
    return sock


def _connect(sandbox: Sandbox) -> ssl.SSLSocket:
    sock = _proxy(sandbox)
    context = ssl.create_default_context(cafile=sandbox.endpoints["ca_file"])
    return context.wrap_socket(sock, server_hostname="web.whatsapp.com")


def _upgrade(sandbox: Sandbox) -> ssl.SSLSocket:
    sock = _connect(sandbox)
    sock.sendall(
        b"GET /ws/chat HTTP/1.1\r\nHost: web.whatsapp.com\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    assert sock.recv(1000).startswith(b"HTTP/1.1 101")
    return sock


def _frame(payload: bytes) -> bytes:
    return b"\x82\xfe" + len(payload).to_bytes(2, "big") + bytes(4) + payload


def _drain(sock: socket.socket) -> None:
    """Read until the other side ends it, for at most the socket's time-out."""
    sock.settimeout(2)
    with contextlib.suppress(OSError):
        while sock.recv(65_536):
            pass


def _shake_hands(sock: ssl.SSLSocket, payload: bytes) -> noise.Cipher:
    """The client's side of the handshake, in short; no certificate is checked."""
    ephemeral, static = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    client = noise.ServerHandshake(static=static.private_bytes_raw(), certificate=b"")
    public = ephemeral.public_key().public_bytes_raw()
    client._authenticate(public)
    hello = WA6.HandshakeMessage()
    hello.clientHello.ephemeral = public
    data = hello.SerializeToString()
    sock.sendall(_frame(noise.PROLOGUE + len(data).to_bytes(3, "big") + data))
    received = sock.recv(65_536)
    start = 2 if received[1] < 126 else 4
    answer = WA6.HandshakeMessage.FromString(received[start + 3 :]).serverHello
    client._authenticate(answer.ephemeral)
    client._mix(ephemeral, answer.ephemeral)
    client._mix(ephemeral, client._decrypt(answer.static))
    client._decrypt(answer.payload)
    finish = WA6.HandshakeMessage()
    finish.clientFinish.static = client._encrypt(static.public_key().public_bytes_raw())
    client._mix(static, answer.ephemeral)
    finish.clientFinish.payload = client._encrypt(payload)
    data = finish.SerializeToString()
    sock.sendall(_frame(len(data).to_bytes(3, "big") + data))
    return noise.Cipher(noise._expand(client._salt, b"")[0])


def test_ending_a_connection_again_and_again_is_no_trouble(
    sandbox: Sandbox, client: RawClient
) -> None:
    with sandbox.comes_back(PHONE):
        for _ in range(20):
            sandbox.control.drop(PHONE, "close")
            sandbox.control.drop(PHONE, "reset")
            sandbox.control.stream_error(PHONE, "503")
