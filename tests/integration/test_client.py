"""The client for CRMs against a real Redis; the worker's side is written out by hand."""

import pytest
from published import SCHEMA
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from whatsapp_worker import client, content, message, redis_client
from whatsapp_worker.client import JobGone, Outbox
from whatsapp_worker.errors import CommandTimeout, InvalidMessage
from whatsapp_worker.event_names import Event, Status
from whatsapp_worker.rq_job import Outcome
from whatsapp_worker.stream import EventStream

TO = "+5511999990001"


@pytest.fixture
def out(redis):
    return Outbox(redis)


def fields(redis, job):
    return {name.decode(): value for name, value in redis.hgetall(f"rq:job:{job.id}").items()}


def worker_reads(redis, job):
    found = Job.fetch(job.id, connection=redis, serializer=JSONSerializer)
    assert found.func_name == "jobs.outbound.send_message" and not found.args
    return message.validate(found.kwargs, session="sales")


def settle(redis, job, **outcome):
    found = Job.fetch(job.id, connection=redis, serializer=JSONSerializer)
    found.meta["outcome"] = Outcome(**outcome).as_dict()
    found.save_meta()
    found.set_status("finished" if outcome["status"] == Status.SENT else "failed")


def test_a_job_is_exactly_what_plain_rq_makes(redis, out):
    raw = Queue("wa:out:sales", connection=redis, serializer=JSONSerializer).enqueue(
        "jobs.outbound.send_message",
        description="send_message",
        kwargs={
            "session": "sales",
            "to": TO,
            "message": {"type": "text", "text": {"body": "Hello"}},
            "message_id": "crm-1",
        },
    )
    ours = out.send_text("sales", TO, "Hello", message_id="crm-1")
    theirs, mine = fields(redis, raw), fields(redis, ours)
    times = {"created_at", "enqueued_at"}
    assert {name: value for name, value in mine.items() if name not in times} == {
        name: value for name, value in theirs.items() if name not in times
    }
    assert redis.lrange("rq:queue:wa:out:sales", 0, -1) == [raw.id.encode(), ours.id.encode()]


def test_the_worker_can_read_a_job_with_every_option(redis, out):
    job = out.send_text(
        "sales",
        TO,
        "Hello",
        message_id="crm-1",
        expires_at=2_000_000_000.0,
        ttl_s=60.0,
        send_at=1_900_000_000.0,
        priority="high",
        on_unknown="resend",
        metadata={"deal": 7},
        reply_to="3EB0C767D097B7C4B5",
    )
    assert redis.lrange("rq:queue:wa:out:sales:high", 0, -1) == [job.id.encode()]
    order = worker_reads(redis, job)
    assert order.on_unknown == "resend" and order.metadata == {"deal": 7}
    assert order.content["context"] == {"message_id": "3EB0C767D097B7C4B5"}


def test_neither_text_nor_number_stands_in_the_description(redis, out):
    assert fields(redis, out.send_text("sales", TO, "Hello"))["description"] == b"send_message"


def test_there_is_a_method_for_every_kind_of_message(out, monkeypatch):
    sent = []
    monkeypatch.setattr(Outbox, "send", lambda self, session, draft: sent.append(draft))
    out.send_text("sales", TO, "Hello", message_id="1")
    out.send_image("sales", TO, link="https://example.com/a.jpg", caption="A")
    out.send_video("sales", TO, file="a.mp4")
    out.send_audio("sales", TO, file="a.ogg")
    out.send_voice("sales", TO, file="a.ogg")
    out.send_document("sales", TO, file="a.pdf")
    out.send_sticker("sales", TO, file="a.webp")
    out.send_location("sales", TO, latitude=1.0, longitude=2.0)
    out.send_contact("sales", TO, name="Ana", phone="+5511999990002")
    out.send_contacts("sales", TO, [])
    out.send_reaction("sales", TO, target="3EB0", emoji="👍")
    out.send_poll("sales", TO, question="When?", choices=["Now", "Later"])
    out.send_edit("sales", TO, target="3EB0", body="Hello!")
    out.send_revoke("sales", TO, target="3EB0")
    out.mark_read("sales", TO, target="3EB0")
    assert len({draft.message["type"] for draft in sent}) == 13
    assert sent[0] == client.text(TO, "Hello", message_id="1")


def test_a_bad_message_raises_at_the_call_and_enqueues_nothing(redis, out):
    for field, call in {
        "to": lambda: out.send_text("sales", "nobody", "Hello"),
        "session": lambda: out.send_text("Sales!", TO, "Hello"),
        "message.text.body": lambda: out.send_text("sales", TO, ""),
        "message_id": lambda: out.send_text("sales", TO, "Hello", message_id=""),
        "ttl_s": lambda: out.send_text("sales", TO, "Hello", ttl_s=-1.0),
    }.items():
        with pytest.raises(InvalidMessage) as problem:
            call()
        assert problem.value.field == field
    drafts = [client.text(TO, "Hello"), client.text("nobody", "Hello")]
    with pytest.raises(InvalidMessage):
        out.send_many("sales", drafts)
    assert redis.keys("*") == []


def test_thousands_are_enqueued_in_order_and_few_round_trips(redis, shared_redis_server):
    counted = redis_client.connect(shared_redis_server.url)
    trips = count_round_trips(counted)
    drafts = [client.text(TO, "Hello", message_id=f"crm-{n}") for n in range(2000)]
    jobs = Outbox(counted).send_many("sales", drafts)
    assert len(trips) <= 10
    ids = [id.decode() for id in redis.lrange("rq:queue:wa:out:sales", 0, -1)]
    assert ids == [job.id for job in jobs]
    assert worker_reads(redis, jobs[-1]).message_id == "crm-1999"


def count_round_trips(redis: Redis) -> list[int]:
    """A list that grows with each."""
    trips: list[int] = []
    connection = redis.connection_pool.get_connection()
    send = connection.send_packed_command
    connection.send_packed_command = lambda *a, **k: (trips.append(1), send(*a, **k))[1]
    redis.connection_pool.release(connection)
    return trips


def test_a_draft_enqueued_again_is_the_same_message(redis, out):
    draft = client.text(TO, "Hello")
    first, again = out.send_many("sales", [draft]) + out.send_many("sales", [draft])
    assert first.kwargs == again.kwargs and first.kwargs["message_id"]
    assert client.text(TO, "Hello").kwargs("sales") != first.kwargs


def test_jobs_come_back_in_the_order_of_their_drafts(redis, out):
    drafts = [
        client.text(TO, "a", message_id="1"),
        client.text(TO, "b", message_id="2", priority="high"),
        client.text(TO, "c", message_id="3"),
    ]
    jobs = out.send_many("sales", drafts)
    assert [job.kwargs["message_id"] for job in jobs] == ["1", "2", "3"]
    assert out.send_many("sales", []) == []


def test_an_outcome_is_told_at_each_stage(redis, out):
    job = out.send_text("sales", TO, "Hello")
    assert out.outcome(job).status is Status.QUEUED
    redis.hset(f"rq:job:{job.id}", "status", "started")
    assert out.outcome(job.id).status is Status.SENDING
    settle(redis, job, status=Status.SENT, wa_message_id="3EB0", wa_id="5511999990001")
    assert out.wait(job) == Outcome(Status.SENT, wa_message_id="3EB0", wa_id="5511999990001")


def test_waiting_for_many_gives_their_outcomes_in_order(redis, out):
    jobs = out.send_many("sales", [client.text(TO, str(n)) for n in range(600)])
    for number, job in enumerate(jobs):
        settle(redis, job, status=Status.SENT if number % 2 else Status.UNKNOWN, error=str(number))
    outcomes = out.wait_many([*jobs, jobs[0].id])
    assert [outcome.error for outcome in outcomes] == [*map(str, range(600)), "0"]
    assert outcomes[0].status is Status.UNKNOWN


def test_a_wait_ends_in_time_and_says_so(redis, out):
    job = out.send_text("sales", TO, "Hello")
    with pytest.raises(CommandTimeout, match="1 of 1"):
        out.wait(job, timeout_s=0.1)


def test_a_job_that_rq_forgot_is_gone(redis, out):
    with pytest.raises(JobGone):
        out.outcome("no-such-job")
    with pytest.raises(JobGone):
        out.wait("no-such-job", timeout_s=0.1)


def test_a_job_failed_by_others_counts_as_failed(redis, out):
    job = out.send_text("sales", TO, "Hello")
    redis.hset(f"rq:job:{job.id}", "status", "failed")
    assert out.wait(job).status is Status.FAILED


def test_a_job_cancelled_with_rq_has_not_ended_until_the_worker_says_so(redis, out):
    job = out.send_text("sales", TO, "Hello")
    job.cancel()
    assert out.outcome(job).status is Status.QUEUED
    settle(redis, job, status=Status.SENT)  # it was in hand
    assert out.wait(job).status is Status.SENT


def tell(redis, *names):
    stream = EventStream(redis)
    for name in names:
        stream.add(Event.SENT, "sales", {"message_id": name}, id=f"id-{name}")


def seen(events):
    return [event.payload["message_id"] for event in events]


@pytest.mark.parametrize("protocol", [2, 3])
def test_events_are_read_once_in_order(redis, shared_redis_server, protocol):
    url = shared_redis_server.url
    out = Outbox(Redis.from_url(url, protocol=protocol))
    tell(redis, *map(str, range(250)))
    assert seen(out.events("crm", timeout_s=0.05)) == [str(n) for n in range(250)]
    assert seen(out.events("crm", timeout_s=0.05)) == []
    tell(redis, "late")
    [event] = out.events("crm", timeout_s=0.05)
    assert (event.id, event.event, event.session) == ("id-late", "message.sent", "sales")
    assert event.at > 1_700_000_000


def test_an_event_whose_handling_failed_comes_again(redis, out):
    tell(redis, "a", "b", "c")
    with pytest.raises(ZeroDivisionError):
        for event in out.events("crm", timeout_s=0.05):
            if event.payload["message_id"] == "b":
                raise ZeroDivisionError
    assert seen(out.events("crm", timeout_s=0.05)) == ["b", "c"]


def test_an_event_is_acknowledged_when_the_next_is_asked_for(redis, out):
    tell(redis, *"abcde")
    reader = out.events("crm")
    left = [(next(reader), redis.xpending("wa:events", "crm")["pending"])[1] for _ in range(3)]
    assert left == [5, 4, 3]


def test_what_a_dead_consumer_left_is_taken_over(redis, out, monkeypatch):
    tell(redis, *map(str, range(150)))
    dead = out.events("crm", consumer="dead")
    next(dead)
    monkeypatch.setattr(client, "_STALE_MS", 0)
    assert seen(out.events("crm", consumer="heir", timeout_s=0.05)) == [str(n) for n in range(150)]


def test_a_new_group_may_begin_with_what_comes(redis, out):
    tell(redis, "old")
    events = out.events("crm", since="$", timeout_s=5)
    redis.xgroup_create("wa:events", "crm", id="$")
    tell(redis, "new")
    assert next(events).payload == {"message_id": "new"}


def test_a_trimmed_event_is_passed_over(redis, out):
    tell(redis, "a")
    reader = out.events("crm", timeout_s=0.05)
    next(reader)
    reader.close()
    redis.xtrim("wa:events", maxlen=0, approximate=False)
    assert seen(out.events("crm", timeout_s=0.05)) == []


GROUP = "120363000000000001@g.us"
DRAFTS = {
    "text": client.text(TO, "Hi @5511999990002", mentions=["5511999990002"], preview_url=True),
    "reply": client.text(GROUP, "Yes", reply_to="3EB0", reply_from=TO, reply_text="Really?"),
    "image": client.image(TO, link="https://example.com/a.jpg", caption="A", mentions=[TO]),
    "video": client.video(TO, file="a.mp4", caption="A"),
    "audio": client.audio(TO, link="https://example.com/a.ogg"),
    "voice": client.voice(TO, file="voices/a.ogg"),
    "document": client.document(TO, link="https://example.com/a.pdf", filename="a.pdf"),
    "sticker": client.sticker(TO, link="https://example.com/a.webp"),
    "location": client.location(TO, latitude=-23.5, longitude=-46.6, name="Here"),
    "contact": client.contact(TO, name="Ana", phone="+5511999990002"),
    "reaction": client.reaction(TO, target="3EB0", emoji="👍"),
    "reaction in a group": client.reaction(GROUP, target="3EB0", emoji="", author=TO),
    "poll": client.poll(TO, question="When?", choices=["Now", "Later"], selectable=0),
    "edit": client.edit(TO, target="3EB0", body="Hello!", mentions=[]),
    "revoke": client.revoke(GROUP, target="3EB0", author=TO),
    "read": client.mark_read(GROUP, target="3EB0", author=TO),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_the_worker_accepts_every_type(redis, out, name):
    job = out.send("sales", DRAFTS[name])
    SCHEMA.validate(job.kwargs)
    assert worker_reads(redis, job).content["type"] == DRAFTS[name].message["type"]


def test_every_type_of_the_worker_can_be_made():
    assert {draft.message["type"] for draft in DRAFTS.values()} == set(content.TYPES)
