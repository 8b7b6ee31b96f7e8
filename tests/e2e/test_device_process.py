"""Device and pairing processes with real neonize; the test is their supervisor."""

import itertools
import signal
import sqlite3
import time
from contextlib import closing

import pytest
from leashed import Stable
from world import World, eventually

from storage.ledger import Ledger
from storage.sessions import Sessions
from whatsapp_worker import device_store
from whatsapp_worker.device_process import DRAIN_S
from whatsapp_worker.endings import EndingKind
from whatsapp_worker.reports import Exit
from whatsapp_worker.session import Reason


class Bench:
    """A sandbox, a Redis, and processes on leashes that the test holds."""

    def __init__(self, folder):
        self.world = World(folder, HEALTH_CHECK_INTERVAL_S="0.5", CONNECT_TIMEOUT_S="20")
        try:
            self.world.start_sandbox()
        except BaseException:
            self.world.close()
            raise
        self.control = self.world.control
        self.sessions = Sessions(self.world.data)
        self.sessions.prepare()
        self.stable = Stable(self.world.environ)
        self.leashed = []
        self._phones = 0

    def start(self, kind, session, *, settings=None, stable=None, **arguments):
        made = (stable or self.stable).start(kind, session, settings or {}, **arguments)
        self.leashed.append(made)
        return made

    def create(self, session):
        self.sessions.create(session, network="sandbox", now=time.time())
        return self.sessions.folder(session)

    def link(self, session):
        """A linked session; returns its phone number."""
        folder = self.create(session)
        self._phones += 1
        phone = f"55119800000{self._phones:02d}"
        pairing = self.start("pairing", session, method="qr")
        self.control.scan(pairing.expect("qr")["code"], phone=phone)
        ending, code = pairing.ended()
        assert (ending.kind, code) == (EndingKind.LINKED, 0)
        device_store.adopt(folder / "pairing.db", folder / "device.db")
        return phone

    def connect(self, session, **settings):
        """A device process that has logged in."""
        device = self.start("device", session, settings=settings)
        device.expect("connected")
        return device

    def ended_lock(self, session):
        lock = self.sessions.session_lock(session)
        lock.acquire(5)
        lock.release()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.stable.close()
    made.world.close()


@pytest.fixture
def bench(shared):
    shared.control.reset()
    yield shared
    for leashed in shared.leashed:
        leashed.close()
    shared.leashed.clear()


_numbers = itertools.count()


def unique(name):
    return f"{name}{next(_numbers)}"


# Linking


def test_a_scanned_code_links_and_leaves_usable_credentials(bench):
    session = unique("link")
    folder = bench.create(session)
    pairing = bench.start("pairing", session, method="qr")
    assert pairing.expect("started")["pid"] == pairing.pid
    code = pairing.expect("qr")
    assert code["number"] == 1 and code["expires_in_s"] == 60
    bench.control.scan(code["code"], phone="5511970000001")
    assert pairing.expect("paired")["phone"] == "5511970000001"
    ending, exit_code = pairing.ended()
    assert (ending.kind, exit_code) == (EndingKind.LINKED, Exit.OK)
    assert (folder / "pairing.db").stat().st_mode & 0o777 == 0o600
    who = device_store.adopt(folder / "pairing.db", folder / "device.db")
    assert who.phone == "5511970000001" and who.lid


def test_a_wrong_hmac_ends_the_attempt_at_once_and_says_so(bench):
    session = unique("hmac")
    bench.create(session)
    pairing = bench.start("pairing", session, method="qr")
    bench.control.scan(pairing.expect("qr")["code"], hmac="wrong")
    ending, _ = pairing.ended()
    assert (ending.kind, ending.reason) == (EndingKind.LINK_FAILED, Reason.LINK_REFUSED)


def test_codes_that_expired_end_the_attempt_at_once(bench):
    session = unique("expired")
    bench.create(session)
    pairing = bench.start("pairing", session, method="qr")
    pairing.expect("qr")
    bench.control.expire_qr()
    ending, _ = pairing.ended()
    assert (ending.kind, ending.reason) == (EndingKind.LINK_FAILED, Reason.QR_EXPIRED)


def test_a_pairing_code_links_without_a_camera(bench):
    session = unique("typed")
    bench.create(session)
    pairing = bench.start("pairing", session, method="phone", phone="5511970000003")
    code = pairing.expect("code")["code"]
    assert len(code) == 9 and code[4] == "-"
    bench.control.enter_code(code, "5511970000003")
    assert pairing.expect("paired")["phone"] == "5511970000003"
    assert pairing.ended()[0].kind is EndingKind.LINKED


def test_a_link_attempt_ends_at_its_deadline(bench):
    session = unique("slow")
    bench.create(session)
    settings = {"LINK_ATTEMPT_S": "10"}
    started = time.monotonic()
    pairing = bench.start("pairing", session, settings=settings, method="qr")
    pairing.expect("qr")
    ending, _ = pairing.ended()
    assert (ending.kind, ending.reason) == (EndingKind.LINK_FAILED, Reason.QR_EXPIRED)
    assert time.monotonic() - started < 30


def test_a_link_attempt_without_a_network_says_so(bench):
    session = unique("nonet")
    bench.create(session)
    bench.control.refuse(count=1)
    pairing = bench.start("pairing", session, method="qr")
    ending, _ = pairing.ended()
    assert (ending.kind, ending.reason) == (EndingKind.LOST, Reason.CONNECTION_FAILED)


def test_a_login_that_fails_after_pairing_still_counts_as_linked(bench):
    session = unique("half")
    folder = bench.create(session)
    pairing = bench.start("pairing", session, method="qr")
    code = pairing.expect("qr")["code"]
    bench.control.connect_failure(500, phone="5511970000009", count=1)
    bench.control.scan(code, phone="5511970000009")
    ending, _ = pairing.ended()
    assert ending.kind is EndingKind.LINKED
    assert device_store.adopt(folder / "pairing.db", folder / "device.db").phone == "5511970000009"
    bench.connect(session)


def test_a_pairing_process_ends_when_its_supervisor_is_gone(bench):
    session = unique("orphan")
    bench.create(session)
    pairing = bench.start("pairing", session, method="qr")
    pairing.expect("qr")
    pairing.hang_up()
    pairing.wait(30)


# Running


def test_a_device_process_logs_in_and_says_who_it_is(bench):
    session = unique("run").ljust(64, "-")  # the longest id there is
    phone = bench.link(session)
    started = time.monotonic()
    device = bench.start("device", session)
    device.expect("started")
    device.expect("connecting")
    connected = device.expect("connected")
    assert connected["phone"] == phone and connected["lid"].endswith("@lid")
    assert time.monotonic() - started < 30
    beat = _beat(device, lambda beat: beat["proof_of_life_age_s"] is not None)
    assert beat["proof_of_life_age_s"] < 10 and not beat["degraded"]
    assert beat["idle"] and beat["rss_mib"] > 1 and beat["fds"] > 1 and beat["threads"] > 1
    assert max(beat["loop_age_s"], beat["consumer_age_s"], beat["client_age_s"]) < 5
    with open(f"/proc/{device.pid}/cmdline", "rb") as file:
        assert file.read().startswith(f"whatsapp-worker device {session}\0".encode())


def _beat(device, wanted, within_s=20):
    """The first heartbeat of this kind."""
    deadline = time.monotonic() + within_s
    while not wanted(beat := device.expect("heartbeat")):
        assert time.monotonic() < deadline, beat
    return beat


def test_queued_messages_arrive_and_the_job_knows(bench):
    session = unique("send")
    bench.link(session)
    jobs = [bench.world.enqueue(session, "+5511911112222", f"hello {n}", f"m{n}") for n in range(5)]
    bench.connect(session)
    outcomes = bench.world.await_outcomes(jobs)
    assert {outcome["status"] for outcome in outcomes} <= {"sent", "delivered", "read"}
    arrived = bench.world.arrived(to="5511911112222")
    assert [row["text"] for row in arrived][-5:] == [f"hello {n}" for n in range(5)]
    assert {row["id"] for row in arrived} >= {outcome["wa_message_id"] for outcome in outcomes}


ENDINGS = {
    "reset": (lambda c, p: c.drop(p, "reset"), EndingKind.LOST),
    "close": (lambda c, p: c.drop(p, "close"), EndingKind.LOST),
    "503": (lambda c, p: c.stream_error(p, "503"), EndingKind.LOST),
    "516": (lambda c, p: c.stream_error(p, "516"), EndingKind.LOST),
    "replaced": (lambda c, p: c.stream_error(p, conflict="replaced"), EndingKind.REPLACED),
    "removed": (
        lambda c, p: c.stream_error(p, conflict="device_removed"),
        EndingKind.LOGGED_OUT,
    ),
    "logout": (lambda c, p: c.logout_device(p), EndingKind.LOGGED_OUT),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_each_way_to_lose_a_connection_ends_the_process_within_a_second(bench, name):
    do, kind = ENDINGS[name]
    session = unique("end")
    phone = bench.link(session)
    device = bench.connect(session)
    done = time.monotonic()
    do(bench.control, phone)
    ending, code = device.ended()
    assert time.monotonic() - done < 1.5
    assert (ending.kind, code) == (kind, Exit.CONNECTION_ENDED), ending
    bench.ended_lock(session)


FAILURES = {
    401: (EndingKind.LOGGED_OUT, Reason.LOGGED_OUT),
    402: (EndingKind.BANNED, Reason.TEMPORARY_BAN),
    403: (EndingKind.LOGGED_OUT, Reason.MAIN_DEVICE_GONE),
    405: (EndingKind.OUTDATED, Reason.CLIENT_OUTDATED),
    406: (EndingKind.LOGGED_OUT, Reason.LOGGED_OUT),
    409: (EndingKind.OUTDATED, Reason.CLIENT_OUTDATED),
    499: (EndingKind.LOST, Reason.CONNECTION_FAILED),
    500: (EndingKind.LOST, Reason.CONNECTION_FAILED),
    503: (EndingKind.LOST, Reason.CONNECTION_FAILED),
}


@pytest.mark.parametrize("reason", FAILURES)
def test_each_refusal_of_a_login_has_its_ending(bench, reason):
    session = unique("refused")
    phone = bench.link(session)
    bench.control.connect_failure(reason, phone, expire=120, count=5)
    device = bench.start("device", session)
    ending, code = device.ended()
    assert (ending.kind, ending.reason) == FAILURES[reason], ending
    assert code == Exit.CONNECTION_ENDED
    if reason == 402:
        assert 100 < ending.until - time.time() < 125


def test_failure_413_crashes_this_process_and_is_seen_as_a_crash(bench):
    from whatsapp_worker.endings import of_exit

    session = unique("panic")
    phone = bench.link(session)
    bench.control.connect_failure(413, phone)
    device = bench.start("device", session)
    code = device.wait(60)
    assert of_exit(code, None).kind is EndingKind.CRASHED


def test_stream_error_515_is_survived_without_a_new_process(bench):
    session = unique("restart")
    phone = bench.link(session)
    device = bench.connect(session)
    bench.control.stream_error(phone, "515")
    device.expect("connected")
    job = bench.world.enqueue(session, "5511911113333", "after 515", "m1")
    assert bench.world.await_outcomes([job])[0]["status"] == "sent"


def test_a_network_that_cannot_be_reached_ends_the_attempt(bench):
    session = unique("dial")
    bench.link(session)
    bench.control.refuse(count=1)
    ending, _ = bench.start("device", session).ended()
    assert (ending.kind, ending.reason) == (EndingKind.LOST, Reason.CONNECTION_FAILED)


def test_a_server_that_stays_silent_at_login_ends_the_attempt_in_time(bench):
    session = unique("mute")
    bench.link(session)
    bench.control.stall()
    job = bench.world.enqueue(session, "5511911113336", "not before the login", "m1")
    device = bench.start("device", session, settings={"CONNECT_TIMEOUT_S": "2"})
    device.expect("connecting")
    ending, _ = device.ended(within_s=15)
    bench.control.unstall()
    assert (ending.kind, ending.reason) == (EndingKind.LOST, Reason.CONNECTION_FAILED)
    assert job.get_status(refresh=True) == "queued"
    assert bench.world.limbo(session) == {"queue": 1, "intermediate": 0, "started": 0}


def test_a_deaf_connection_is_degraded_and_then_recycled(bench):
    session = unique("deaf")
    phone = bench.link(session)
    device = bench.connect(session, HANG_TIMEOUT_S="38")
    bench.control.stall(phone)
    beat = _beat(device, lambda beat: beat["degraded"], within_s=90)  # pings: 20 to 30 s, then 10 s
    assert 10 < beat["proof_of_life_age_s"] < 45
    ending, code = device.ended()
    bench.control.unstall()
    assert (ending.kind, ending.reason) == (EndingKind.LOST, Reason.KEEPALIVE_TIMEOUT)
    assert code == Exit.CONNECTION_ENDED


def test_two_clients_with_the_same_credentials_end_one_of_them_as_replaced(bench):
    session, twin = unique("twin"), unique("twin")
    bench.link(session)
    bench.create(twin)
    source = bench.sessions.folder(session) / "device.db"
    target = bench.sessions.folder(twin) / "device.db"
    target.write_bytes(source.read_bytes())
    first = bench.connect(session)
    bench.connect(twin)
    ending, _ = first.ended()
    assert ending.kind is EndingKind.REPLACED


# Being stopped


def test_sigterm_drains_the_send_in_hand_and_leaves_the_queue(bench):
    session = unique("drain")
    phone = bench.link(session)
    bench.control.send_fault("slow", phone, delay_s=4, count=1)
    device = bench.connect(session)
    first = bench.world.enqueue(session, "5511911114444", "slow", "m1")
    second = bench.world.enqueue(session, "5511911114444", "waits", "m2")
    eventually(lambda: _messages(bench, "slow"), what="the slow one was handed over")
    device.signal(signal.SIGTERM)
    ending, code = device.ended()
    assert (ending.kind, code) == (EndingKind.STOPPED, Exit.OK)
    assert bench.world.outcome(first)["status"] == "sent"
    assert second.get_status(refresh=True) == "queued"
    limbo = bench.world.limbo(session)
    assert (limbo["queue"], limbo["intermediate"], limbo["started"]) == (1, 0, 0)


def _messages(bench, text):
    return [row for row in bench.control.messages() if row["text"] == text]


def test_sigterm_is_obeyed_while_neonize_hangs_in_a_login(bench):
    session = unique("waits")
    bench.link(session)
    bench.control.stall()
    device = bench.start("device", session)
    device.expect("connecting")
    asked = time.monotonic()
    device.signal(signal.SIGTERM)
    ending, code = device.ended()
    bench.control.unstall()
    assert (ending.kind, code) == (EndingKind.STOPPED, Exit.OK)
    assert time.monotonic() - asked < DRAIN_S, "it was forced, or waited for the login"


def test_sigterm_is_heard_while_a_send_hangs_in_neonize_and_bounds_it(bench):
    session = unique("term")
    phone = bench.link(session)
    bench.control.send_fault("no_ack", phone, count=1)
    device = bench.connect(session)
    bench.world.enqueue(session, "5511911114445", "hangs in Go", "m1")
    eventually(lambda: _messages(bench, "hangs in Go"))
    asked = time.monotonic()
    device.signal(signal.SIGTERM)
    device.expect("leaving", within_s=DRAIN_S)
    ending, code = device.ended(within_s=20)
    assert (ending.kind, code) == (EndingKind.STOPPED, Exit.NOT_DRAINED)
    assert time.monotonic() - asked < 20, "it waited for the send, SEND_TIMEOUT_S"


def test_an_order_to_stop_is_obeyed_at_once_when_idle(bench):
    session = unique("stop")
    bench.link(session)
    device = bench.connect(session)
    asked = time.monotonic()
    device.order("stop", drain_s=8)
    ending, code = device.ended()
    assert (ending.kind, code) == (EndingKind.STOPPED, Exit.OK)
    assert time.monotonic() - asked < 2


@pytest.mark.parametrize("drain_s", [0.5, 0])
def test_a_send_that_outlasts_its_time_is_left_to_the_next_process(bench, drain_s):
    session = unique("late")
    phone = bench.link(session)
    bench.control.send_fault("no_ack", phone, count=1)
    device = bench.connect(session)
    job = bench.world.enqueue(session, "5511911119999", "no answer", "m1")
    eventually(lambda: _messages(bench, "no answer"))
    asked = time.monotonic()
    device.order("stop", drain_s=drain_s)
    ending, code = device.ended()
    assert (ending.kind, code) == (EndingKind.STOPPED, Exit.NOT_DRAINED)
    assert time.monotonic() - asked < 3.5
    bench.connect(session)
    assert bench.world.await_outcomes([job])[0]["status"] == "unknown"
    assert len(_messages(bench, "no answer")) == 1


def test_a_process_that_waits_for_redis_hears_its_supervisor(bench):
    session = unique("noredis")
    bench.link(session)
    nowhere = {"REDIS_URL": "redis://127.0.0.1:1/0"}
    device = bench.start("device", session, settings=nowhere)
    device.expect("heartbeat")
    device.order("stop", drain_s=1)
    ending, code = device.ended()
    assert (ending.kind, code) == (EndingKind.STOPPED, Exit.OK)
    orphan = bench.start("device", session, settings=nowhere)
    orphan.expect("heartbeat")
    orphan.hang_up()
    assert orphan.wait(30) == Exit.ORPHANED


def test_a_receipt_that_comes_while_redis_hangs_is_left_to_the_ledger(bench):
    session, contact = unique("hung"), "5511911116666"
    phone = bench.link(session)
    bench.control.contacts(contact, receipts="none")
    device = bench.connect(session)
    job = bench.world.enqueue(session, f"+{contact}", "before the silence", "m1")
    [outcome] = bench.world.await_outcomes([job])
    bench.world.redis_server.pause()
    try:
        _beat(device, _misses_redis, within_s=60)
        bench.control.receipts(outcome["wa_message_id"])
        bench.control.stream_error(phone, "503")
        ending, code = device.ended()
    finally:
        bench.world.redis_server.resume()
    assert (ending.kind, code) == (EndingKind.LOST, Exit.CONNECTION_ENDED)
    with closing(Ledger.open(bench.sessions.folder(session) / "ledger.db", session)) as ledger:
        row = ledger.find("m1")
    assert row is not None and row.status == "delivered"


def _misses_redis(beat):
    return beat["queue"] is not None and beat["queue"]["reason"] == "Redis does not answer"


def test_an_order_to_log_out_removes_the_device_from_the_phone(bench):
    session = unique("bye")
    phone = bench.link(session)
    device = bench.connect(session)
    device.order("logout")
    ending, _ = device.ended()
    assert (ending.kind, ending.reason) == (EndingKind.LOGGED_OUT, Reason.LOGGED_OUT)
    assert not bench.control.devices(phone)
    assert device_store.identity(bench.sessions.folder(session) / "device.db") is None


def test_a_process_without_its_supervisor_ends_by_itself(bench):
    session = unique("orphan")
    bench.link(session)
    device = bench.connect(session)
    started = time.monotonic()
    device.hang_up()
    assert device.wait(30) == Exit.ORPHANED
    assert time.monotonic() - started < 2.5


def test_a_second_process_of_the_same_session_refuses(bench):
    session = unique("two")
    phone = bench.link(session)
    bench.connect(session)
    second = bench.start("device", session)
    _, code = second.ended()
    assert code == Exit.LOCKED
    assert len([row for row in bench.control.devices(phone) if row["online"]]) == 1


def test_a_process_in_an_unsafe_environment_refuses_and_dials_nobody(bench):
    session = unique("unsafe")
    bench.link(session)
    before = len(bench.control.connections())
    stable = Stable(bench.world.environ | {"NO_PROXY": "*"})
    ending, code = bench.start("device", session, stable=stable).ended()
    stable.close()
    assert (ending.kind, code) == (EndingKind.REFUSED, Exit.UNSAFE)
    assert len(bench.control.connections()) == before


def test_damaged_credentials_are_refused(bench):
    session = unique("damaged")
    (bench.create(session) / "device.db").write_bytes(b"no database" * 500)
    ending, code = bench.start("device", session).ended()
    assert (ending.kind, code) == (EndingKind.REFUSED, Exit.STORE_BROKEN)


def test_no_credentials_mean_logged_out(bench):
    session = unique("nobody")
    bench.create(session)
    ending, _ = bench.start("device", session).ended()
    assert ending.kind is EndingKind.LOGGED_OUT


# Dying


def test_a_message_that_was_handed_over_before_a_kill_becomes_unknown_with_its_id(bench):
    session = unique("killed")
    phone = bench.link(session)
    bench.control.send_fault("no_ack", phone, count=1)
    device = bench.connect(session)
    job = bench.world.enqueue(session, "5511911115555", "handed over", "m1")
    arrived = eventually(lambda: _messages(bench, "handed over"))
    device.kill()
    bench.connect(session)
    outcome = bench.world.await_outcomes([job])[0]
    assert outcome["status"] == "unknown"
    assert outcome["wa_message_id"] == arrived[0]["id"]
    assert len(_messages(bench, "handed over")) == 1


def test_a_message_that_was_only_claimed_before_a_kill_is_sent_once(bench):
    session = unique("claimed")
    bench.link(session)
    device = bench.connect(session)
    device.signal(signal.SIGSTOP)
    job = bench.world.enqueue(session, "5511911116666", "only claimed", "m1")
    device.kill()
    _pretend_claimed(bench, session, job)
    bench.connect(session)
    outcome = bench.world.await_outcomes([job])[0]
    assert outcome["status"] == "sent"
    assert len(_messages(bench, "only claimed")) == 1


def _pretend_claimed(bench, session, job):
    """What a kill right after the claim leaves: a row `sending`, its job in the limbo list."""
    from storage.ledger import Claim, Ledger

    queue = f"rq:queue:wa:out:{session}"
    bench.world.redis.lmove(queue, f"{queue}:intermediate", "LEFT", "RIGHT")
    from whatsapp_worker.message import validate

    order = validate(job.kwargs)
    ledger = Ledger.open(bench.sessions.folder(session) / "ledger.db", session)
    claim = Claim(order.message_id, order.content_hash, job.id, "hash", time.time())
    ledger.claim(claim, secret=lambda attempt: b"never handed over".ljust(32))
    ledger.close()


def test_a_send_without_an_answer_ends_the_process_and_is_unknown(bench):
    session = unique("hung")
    phone = bench.link(session)
    bench.control.send_fault("no_ack", phone, count=1)
    device = bench.connect(session, SEND_TIMEOUT_S="1")
    job = bench.world.enqueue(session, "5511911117777", "hung", "m1")
    ending, code = device.ended()
    assert (ending.kind, code) == (EndingKind.LOST, Exit.SEND_HUNG)
    bench.connect(session)
    assert bench.world.await_outcomes([job])[0]["status"] == "unknown"
    assert len(_messages(bench, "hung")) == 1


def test_the_secret_of_every_message_stands_in_the_device_database(bench):
    session = unique("secret")
    bench.link(session)
    device = bench.connect(session)
    job = bench.world.enqueue(session, "5511911118888", "with a secret", "m1")
    outcome = bench.world.await_outcomes([job])[0]
    device.order("stop")
    device.ended()
    path = bench.sessions.folder(session) / "device.db"
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT message_id, key FROM whatsmeow_message_secrets").fetchall()
    assert [row[0] for row in rows] == [outcome["wa_message_id"]]
    assert device_store.handed_over(path, [rows[0][1]]) == {rows[0][1]: rows[0][0]}
