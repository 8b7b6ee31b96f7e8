"""The Signal protocol of the simulated contacts, both sides of it."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whatsapp_worker.sandbox import signal
from whatsapp_worker.sandbox.signal import (
    Bundle,
    Chain,
    DuplicateMessage,
    KeyPair,
    NoSession,
    Party,
    SenderKeys,
    Session,
    UndecryptableMessage,
    UntrustedBundle,
)


class Peer:
    """A party, its bundle, and its session with the other one."""

    def __init__(self) -> None:
        identity, signed = KeyPair.generate(), KeyPair.generate()
        self.prekeys = {7: KeyPair.generate()}
        self.party = Party(
            registration_id=4711,
            identity=identity,
            signed_prekey_id=1,
            signed_prekey=signed,
            signature=signal.sign(identity.private, b"\x05" + signed.public),
            prekey=self.prekeys.get,
        )
        self.session = Session()

    def bundle(self, prekey_id: int | None = 7) -> Bundle:
        return Bundle(
            registration_id=self.party.registration_id,
            identity=self.party.identity.public,
            signed_prekey_id=1,
            signed_prekey=self.party.signed_prekey.public,
            signature=self.party.signature,
            prekey_id=prekey_id,
            prekey=self.prekeys[prekey_id].public if prekey_id else None,
        )

    def write(self, text: bytes) -> tuple[str, bytes]:
        return self.session.encrypt(self.party, text)

    def read(self, message: tuple[str, bytes]) -> bytes:
        return self.session.decrypt(self.party, *message)

    def restart(self) -> None:
        self.session = Session.from_json(json.loads(json.dumps(self.session.to_json())))


@pytest.fixture
def pair() -> tuple[Peer, Peer]:
    alice, bob = Peer(), Peer()
    alice.session.begin(alice.party, bob.bundle())
    return alice, bob


def test_many_first_messages_stay_pkmsg_until_the_other_answers(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    for text in (b"one", b"two", b"three"):
        message = alice.write(text)
        assert message[0] == "pkmsg"
        assert bob.read(message) == text
    assert alice.read(bob.write(b"answer")) == b"answer"
    assert alice.write(b"four")[0] == "msg"


def test_a_bundle_without_one_time_prekey_works() -> None:
    alice, bob = Peer(), Peer()
    alice.session.begin(alice.party, bob.bundle(None))
    assert bob.read(alice.write(b"hello")) == b"hello"


def test_first_messages_arrive_in_any_order(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    messages = [alice.write(b"%d" % i) for i in range(4)]
    assert [bob.read(messages[i]) for i in (2, 0, 3, 1)] == [b"2", b"0", b"3", b"1"]


@pytest.mark.parametrize("answered", [False, True])
def test_a_repeated_message_is_a_duplicate_and_harms_nothing(
    pair: tuple[Peer, Peer], answered: bool
) -> None:
    alice, bob = pair
    if answered:
        bob.read(alice.write(b"first"))
        alice.read(bob.write(b"answer"))
    message = alice.write(b"once")
    assert bob.read(message) == b"once"
    before = bob.session.to_json()
    with pytest.raises(DuplicateMessage):
        bob.read(message)
    assert bob.session.to_json() == before
    assert bob.read(alice.write(b"next")) == b"next"


def test_both_may_write_first_at_the_same_time(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    bob.session.begin(bob.party, alice.bundle())
    from_alice, from_bob = alice.write(b"from alice"), bob.write(b"from bob")
    assert (alice.read(from_bob), bob.read(from_alice)) == (b"from bob", b"from alice")
    for _ in range(3):
        assert bob.read(alice.write(b"a")) == b"a"
        assert alice.read(bob.write(b"b")) == b"b"


def test_a_peer_with_a_new_identity_starts_afresh(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    bob.read(alice.write(b"old phone"))
    renewed = Peer()
    renewed.session.begin(renewed.party, bob.bundle())
    assert bob.read(renewed.write(b"new phone")) == b"new phone"
    assert bob.session.peer_identity == renewed.party.identity.public
    assert renewed.read(bob.write(b"hi")) == b"hi"


def test_a_message_without_any_session_says_so() -> None:
    with pytest.raises(NoSession):
        Peer().read(("msg", b"\x33" + bytes(60)))
    with pytest.raises(NoSession):
        Peer().write(b"hello")


def test_a_bundle_signed_by_another_is_refused() -> None:
    alice, bob, mallory = Peer(), Peer(), Peer()
    forged = dataclasses.replace(bob.bundle(), identity=mallory.party.identity.public)
    with pytest.raises(UntrustedBundle):
        alice.session.begin(alice.party, forged)
    assert alice.session.states == []


@pytest.mark.parametrize(("signed_prekey_id", "prekey_id"), [(9, 7), (1, 9)])
def test_keys_that_are_not_ours_are_refused(signed_prekey_id: int, prekey_id: int) -> None:
    alice, bob = Peer(), Peer()
    foreign = dataclasses.replace(
        bob.bundle(), signed_prekey_id=signed_prekey_id, prekey_id=prekey_id
    )
    alice.session.begin(alice.party, foreign)
    with pytest.raises(UndecryptableMessage, match="is not ours"):
        bob.read(alice.write(b"hello"))


def test_a_counter_far_ahead_is_refused_and_skipped_keys_are_bounded() -> None:
    chain = Chain(bytes(32))
    with pytest.raises(UndecryptableMessage, match="too far"):
        chain.ahead(signal.MAX_SKIPPED + 1)
    for target in (1500, 3000, 4500):
        _, chain = chain.ahead(target)
    assert len(chain.skipped) == signal.MAX_SKIPPED
    with pytest.raises(DuplicateMessage):
        chain.ahead(0)


def test_session_states_and_chains_are_bounded(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    for _ in range(signal.MAX_STATES + 3):
        alice.session.begin(alice.party, bob.bundle())
        for _ in range(signal.MAX_CHAINS + 2):
            bob.read(alice.write(b"ping"))
            alice.read(bob.write(b"pong"))
    for peer in pair:
        assert len(peer.session.states) <= signal.MAX_STATES
        assert all(len(state.receiving) <= signal.MAX_CHAINS for state in peer.session.states)


def test_a_session_restored_from_before_some_receipts_catches_up(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    bob.read(alice.write(b"zero"))
    saved = bob.session.to_json()
    for i in range(50):
        bob.read(alice.write(b"%d" % i))
    bob.session = Session.from_json(saved)
    assert bob.read(alice.write(b"later")) == b"later"


actions = st.lists(
    st.tuples(st.booleans(), st.sampled_from(["write", "write", "read", "read last", "restart"])),
    min_size=10,
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(actions=actions)
def test_any_conversation_is_understood_by_both(actions: list[tuple[bool, str]]) -> None:
    alice, bob = Peer(), Peer()
    alice.session.begin(alice.party, bob.bundle())
    bob.read(alice.write(b"hello"))
    under_way: dict[bool, list[tuple[bytes, tuple[str, bytes]]]] = {True: [], False: []}
    for is_alice, action in actions:
        peer = alice if is_alice else bob
        inbox = under_way[is_alice]
        if action == "write":
            text = os.urandom(5)
            under_way[not is_alice].append((text, peer.write(text)))
        elif action == "restart":
            peer.restart()
        elif inbox:
            text, message = inbox.pop(0 if action == "read" else -1)
            assert peer.read(message) == text


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_messages_are_refused_and_harm_nothing(data: st.DataObject) -> None:
    alice, bob = Peer(), Peer()
    alice.session.begin(alice.party, bob.bundle())
    bob.read(alice.write(b"hello"))
    enc_type, message = alice.write(b"world")
    before = bob.session.to_json()
    if data.draw(st.booleans(), label="garbage"):
        damaged = data.draw(st.binary(max_size=120))
    else:
        at = data.draw(st.integers(0, len(message) - 1))
        flipped = message[at] ^ data.draw(st.integers(1, 255))
        damaged = message[:at] + bytes([flipped]) + message[at + 1 :]
    try:
        assert bob.read((data.draw(st.sampled_from([enc_type, "msg"])), damaged)) == b"world"
    except UndecryptableMessage:
        assert bob.session.to_json() == before
    assert bob.session.states


def test_the_wire_format_is_libsignals(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    _, outer = alice.write(b"hello")
    assert outer[0] == 0x33
    fields = signal._parse(outer[1:])
    assert fields[1] == 7 and fields[5] == 4711 and fields[6] == 1
    assert fields[3] == b"\x05" + alice.party.identity.public
    inner = fields[4]
    assert isinstance(inner, bytes) and inner[0] == 0x33
    body = signal._parse(inner[1:-8])
    assert list(body) == [1, 2, 3, 4] and body[2] == 0 and body[3] == 0
    assert isinstance(body[1], bytes) and body[1][0] == 5 and len(body[1]) == 33
    assert bob.read(("pkmsg", outer)) == b"hello"


def test_signatures_of_either_sign_are_verified() -> None:
    key = KeyPair.generate()
    signature = signal.sign(key.private, b"text")
    assert signal.verify(key.public, b"text", signature)
    assert not signal.verify(key.public, b"other", signature)
    assert not signal.verify(key.public, b"text", signature[:-1])
    assert not signal.verify(bytes(32), b"text", signature)


class Sender:
    """The sending half of a group key, which only a client has."""

    def __init__(self) -> None:
        self.signing, self.chain, self.key_id = KeyPair.generate(), Chain(os.urandom(32)), 99

    def distribution(self) -> bytes:
        return b"\x33" + signal._emit(
            (1, self.key_id),
            (2, self.chain.index),
            (3, self.chain.key),
            (4, b"\x05" + self.signing.public),
        )

    def write(self, text: bytes) -> bytes:
        index = self.chain.index
        keys = signal._derive(self.chain.step(), b"WhisperGroup", 48)
        body = signal._encrypt_cbc(keys[16:], keys[:16], text)
        signed = b"\x33" + signal._emit((1, self.key_id), (2, index), (3, body))
        return signed + signal.sign(self.signing.private, signed)


def test_group_messages_are_read_in_any_order_and_once() -> None:
    sender, keys = Sender(), SenderKeys()
    with pytest.raises(NoSession):
        keys.decrypt(sender.write(b"before"))
    keys.learn(sender.distribution())
    messages = [sender.write(b"%d" % i) for i in range(4)]
    assert [keys.decrypt(messages[i]) for i in (1, 3, 0)] == [b"1", b"3", b"0"]
    keys = SenderKeys.from_json(json.loads(json.dumps(keys.to_json())))
    assert keys.decrypt(messages[2]) == b"2"
    with pytest.raises(DuplicateMessage):
        keys.decrypt(messages[2])


def test_the_same_group_key_again_loses_no_place() -> None:
    sender, keys = Sender(), SenderKeys()
    distribution = sender.distribution()
    keys.learn(distribution)
    message = sender.write(b"one")
    keys.decrypt(message)
    keys.learn(distribution)
    with pytest.raises(DuplicateMessage):
        keys.decrypt(message)


def test_a_group_message_with_a_wrong_signature_is_refused() -> None:
    sender, keys = Sender(), SenderKeys()
    keys.learn(sender.distribution())
    message = sender.write(b"one")
    with pytest.raises(UndecryptableMessage):
        keys.decrypt(message[:-1] + bytes([message[-1] ^ 1]))
    assert keys.decrypt(message) == b"one"


@settings(max_examples=80, deadline=None)
@given(garbage=st.binary(max_size=200))
def test_group_garbage_is_refused(garbage: bytes) -> None:
    keys = SenderKeys()
    keys.learn(Sender().distribution())
    with pytest.raises(UndecryptableMessage):
        keys.decrypt(garbage)
