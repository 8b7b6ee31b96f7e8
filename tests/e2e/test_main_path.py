"""The main job from end to end: link, enqueue as a CRM does, deliver, learn what became of it."""

import contextlib
import os
import pickle
import signal
import sqlite3
import zlib

import psutil
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from support import events, eventually
from world import World

CONTACT = "5521988880001"


def test_a_message_is_sent_delivered_and_read(world: World):
    world.control.contacts(CONTACT, receipts="read")
    world.link("sales")
    job = world.enqueue("sales", f"+{CONTACT}", "Olá, João", "crm-1")
    [outcome] = world.await_outcomes([job])
    assert outcome["status"] == "sent"
    assert outcome["wa_id"] == CONTACT
    [arrived] = world.arrived(to=CONTACT)
    assert (arrived["text"], arrived["id"]) == ("Olá, João", outcome["wa_message_id"])
    assert arrived["type"] == "text" and arrived["times"] == 1 and not arrived["bot"]
    assert set(arrived["message"]) == {"conversation", "messageContextInfo"}
    eventually(lambda: world.status_of("sales", "crm-1") == "read")
    told = {entry["event"]: entry["payload"] for entry in events(world.redis)}
    for name in ("message.sent", "message.delivered", "message.read"):
        assert (told[name]["message_id"], told[name]["wa_id"]) == ("crm-1", CONTACT)
    assert "Olá" not in world.logs() and CONTACT not in world.logs()
    assert b"Jo" not in zlib.decompress(world.redis.hget(f"rq:job:{job.id}", "data") or _EMPTY)


_EMPTY = zlib.compress(b"")


def test_wa_id_is_the_number_behind_a_hidden_id(world: World):
    world.link("sales")
    world.await_outcomes([world.enqueue("sales", CONTACT, "by number", "m1")])
    with sqlite3.connect(world.data / "sessions" / "sales" / "device.db") as store:
        [(lid,)] = store.execute(
            "SELECT lid FROM whatsmeow_lid_map WHERE pn = ?", [CONTACT]
        ).fetchall()
    jobs = [world.enqueue("sales", f"{lid}@lid", "by hidden id", f"m{n}") for n in (2, 3)]
    assert [o["wa_id"] for o in world.await_outcomes(jobs)] == [CONTACT, CONTACT]


def test_two_sessions_each_send_their_own_messages(world: World):
    phones = {name: world.link(name) for name in ("one", "two")}
    jobs = [
        world.enqueue(name, CONTACT, f"{name} {n}", f"{name}-{n}")
        for n in range(20)
        for name in phones
    ]
    assert {o["status"] for o in world.await_outcomes(jobs)} == {"sent"}
    for name, phone in phones.items():
        texts = [row["text"] for row in world.arrived(sender=phone)]
        assert texts == [f"{name} {n}" for n in range(20)]


def test_the_same_message_id_twice_arrives_once_and_tells_the_first_outcome(world: World):
    world.link("sales")
    first, second = (world.enqueue("sales", CONTACT, "once", "same") for _ in range(2))
    one, two = world.await_outcomes([first, second])
    assert one["status"] == "sent" and two["wa_message_id"] == one["wa_message_id"]
    assert [row["times"] for row in world.arrived(to=CONTACT)] == [1]
    other = world.enqueue("sales", CONTACT, "other words", "same")
    [refused] = world.await_outcomes([other])
    assert refused["status"] == "failed" and "message_id" in refused["error"]


def test_what_was_in_hand_when_the_phone_removed_the_device_is_not_sent_again(world: World):
    phone = world.link("sales")
    world.await_outcomes([world.enqueue("sales", CONTACT, "before", "m1")])
    world.control.send_fault("no_ack")
    job = world.enqueue("sales", CONTACT, "in hand", "m2")
    eventually(lambda: len(world.arrived(to=CONTACT)) == 2)
    world.control.logout_device(phone)
    world.await_state("sales", "logged_out")
    [outcome] = world.await_outcomes([job])
    assert outcome["status"] == "unknown" and "unlinked" in outcome["error"]
    world.link("sales", phone=phone)
    world.await_outcomes([world.enqueue("sales", CONTACT, "after", "m3")])
    assert [row["text"] for row in world.arrived(to=CONTACT)] == ["before", "in hand", "after"]


def test_a_wrong_hmac_ends_the_link_with_a_reason_and_no_process(world: World):
    with world.linking("sales") as lines:
        code = next(line["code"] for line in lines if line["event"] == "qr")
        world.control.scan(code, hmac="wrong")
        last = list(lines)[-1]
    assert last["event"] == "failed" and last["reason"] and last["sentence"]
    eventually(lambda: world.session("sales")["pid"] is None)
    assert world.link("sales")


def test_codes_rotate_and_when_they_expired_the_link_ends_with_a_reason_and_no_process(tmp_path):
    with World.running(tmp_path, LINK_ATTEMPT_S="35") as world:
        world.control.expire_qr(codes=2)  # so few are shown for 20 s each, the first one too
        with world.linking("sales") as lines:
            first, second, last = lines
        assert first["event"] == second["event"] == "qr" and first["code"] != second["code"]
        assert 15 < second["expires_in_s"] <= 20
        assert (last["event"], last["reason"]) == ("failed", "qr-expired")
        eventually(lambda: world.session("sales")["pid"] is None)
        assert world.state("sales")["state"] == "unlinked"
        assert world.link("sales")


def test_pickle_and_foreign_functions_are_refused_and_nothing_runs(world: World, tmp_path):
    world.link("sales")
    trap = tmp_path / "trap"
    queue = Queue("wa:out:sales", connection=world.redis, serializer=JSONSerializer)
    foreign = queue.enqueue("os.system", f"touch {trap}")
    pickled = _pickled(world.redis, "wa:out:sales", str(trap))
    after = world.enqueue("sales", CONTACT, "the next one runs", "after")
    assert world.await_outcomes([after])[0]["status"] == "sent"
    for job_id in (foreign.id, pickled):
        eventually(lambda job_id=job_id: _raw_status(world, job_id) == b"failed")
    assert not trap.exists()
    assert set(world.limbo("sales").values()) == {0}


def _pickled(redis: Redis, queue: str, trap: str) -> str:
    class Trap:
        def __reduce__(self) -> object:
            return os.system, (f"touch {trap}",)

    job = Job.create("jobs.outbound.send_message", connection=redis, serializer=JSONSerializer)
    job.origin = queue
    job.save()
    data = zlib.compress(pickle.dumps(Trap()))
    redis.hset(f"rq:job:{job.id}", mapping={"data": data, "meta": pickle.dumps(Trap())})
    redis.rpush(f"rq:queue:{queue}", job.id)
    return str(job.id)


def _raw_status(world: World, job_id: str) -> bytes | None:
    return world.redis.hget(f"rq:job:{job_id}", "status")


def test_bad_input_fails_at_once_and_names_the_field(world: World):
    world.link("sales")
    bad = {
        "to": world.enqueue("sales", "12", "hi", "b1"),
        "message.text.body": world.enqueue("sales", CONTACT, "", "b2"),
        "body": world.enqueue("sales", CONTACT, "x" * 65_537, "b3"),
        "surprise": world.enqueue("sales", CONTACT, "hi", "b4", surprise=1),
        "unknown session": world.enqueue("nobody", CONTACT, "hi", "b5"),
    }
    for field, job in bad.items():
        [outcome] = world.await_outcomes([job], within_s=15)
        assert outcome["status"] == "failed" and field in outcome["error"], (field, outcome)
    assert world.arrived(to=CONTACT) == []


def _lives(process: psutil.Process) -> bool:
    """A zombie has ended; whoever adopted it has not looked yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def test_sigterm_drains_the_supervisor_within_ten_seconds(world: World):
    world.link("sales")
    jobs = [world.enqueue("sales", CONTACT, f"{n}", f"m{n}") for n in range(500)]
    eventually(lambda: len(world.arrived(to=CONTACT)) > 5)
    assert world.supervisor is not None
    children = psutil.Process(world.supervisor.pid).children(recursive=True)
    world.supervisor.send_signal(signal.SIGTERM)
    assert world.supervisor.wait(10) == 0
    assert not [child for child in children if _lives(child)]
    limbo = world.limbo("sales")
    assert limbo["queue"] > 0 and limbo["intermediate"] == limbo["started"] == 0
    world.start_supervisor()
    assert {o["status"] for o in world.await_outcomes(jobs)} == {"sent"}
    assert [row["text"] for row in world.arrived(to=CONTACT)] == [f"{n}" for n in range(500)]
