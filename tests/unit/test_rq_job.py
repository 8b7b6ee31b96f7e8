"""Reading job hashes that nobody vouches for."""

import json
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from whatsapp_worker.event_names import Status
from whatsapp_worker.rq_job import (
    MAX_META,
    Outcome,
    decode,
    fresh_fields,
    noted_meta,
    settled_fields,
)

_GOOD = {
    "session": "s1",
    "to": "+5511999990001",
    "message_id": "m1",
    "message": {"type": "text", "text": {"body": "Hello"}},
}


def data(kwargs: Any = None, function: str = "jobs.outbound.send_message") -> bytes:
    return zlib.compress(json.dumps([function, None, [], kwargs or _GOOD]).encode())


def fields(**changes: bytes) -> dict[str, bytes]:
    return {
        "data": data(),
        "status": b"queued",
        "created_at": b"2026-11-22T03:00:00.123456Z",
        "enqueued_at": b"2026-11-22T03:00:01.000000Z",
    } | changes


def read(**changes: bytes) -> Any:
    return decode(b"job-1", fields(**changes), session="s1", queue="wa:out:s1")


def test_a_good_job_becomes_an_order() -> None:
    job = read()
    assert job.problem is None
    assert job.order.message_id == job.message_id == "m1"
    assert job.enqueued_at == 1795316401.0


def test_a_message_of_high_priority_is_refused_where_it_would_overtake_nobody() -> None:
    high = data({**_GOOD, "priority": "high"})
    refused = read(data=high)
    assert str(refused.problem) == "priority: high overtakes on the queue wa:out:s1:high only"
    for sent in (high, data()):
        assert decode(b"j", fields(data=sent), session="s1", queue="wa:out:s1:high").problem is None


@pytest.mark.parametrize("id", ["nota\u00a01", "\u3000", "👩\u200d🚀", "a\x85b", "x" * 200])
def test_every_message_id_that_is_accepted_is_told_in_events(id: str) -> None:
    job = read(data=data({**_GOOD, "message_id": id}))
    assert job.order is not None and job.order.message_id == job.message_id == id


@pytest.mark.parametrize("id", ["", "a\nb", "\ud800", "x" * 201, 7, None])
def test_no_other_message_id_is(id: object) -> None:
    job = read(data=data({**_GOOD, "message_id": id}))
    assert job.order is None and job.message_id is None


def test_times_are_read_in_every_form_that_rq_reads() -> None:
    assert read(enqueued_at=b"2026-11-22T03:00:01Z").enqueued_at == 1795316401.0
    assert read(enqueued_at=b"2026-11-22T03:00:01.5Z").enqueued_at == 1795316401.5


def test_a_job_without_compression_is_read_as_rq_does() -> None:
    assert read(data=zlib.decompress(data())).problem is None


def test_a_settled_job_tells_its_message_id_but_no_text() -> None:
    settled = settled_fields(read(), "s1", Outcome(Status.SENT, "WA1"))
    again = read(data=settled["data"], meta=settled["meta"].encode(), status=b"finished")
    assert again.is_settled
    assert again.outcome == Outcome(Status.SENT, "WA1")
    assert again.message_id == "m1"
    assert again.content_hash == read().content_hash
    assert again.order is None
    assert "wiped" in str(again.problem)
    assert b"Hello" not in zlib.decompress(settled["data"])


def test_what_the_producer_put_into_meta_stays() -> None:
    settled = settled_fields(read(meta=b'{"lead": 7}'), "s1", Outcome(Status.FAILED, error="x"))
    assert json.loads(settled["meta"])["lead"] == 7


@pytest.mark.parametrize(
    "value",
    [
        b'"' + "ж".encode() * 32_000 + b'"',
        b'"' + "👩".encode() * 16_000 + b'"',
        b'"' + rb"\ud800" * 10_000 + b'"',
        b"[" + b",".join([b"1e15"] * 13_000) + b"]",
        b"{" + b",".join(b'"%d":0' % number for number in range(7_000)) + b"}",
    ],
)
def test_what_we_add_to_the_longest_meta_keeps_nobody_from_reading_it(value: bytes) -> None:
    job = read(meta=b'{"note":%b}' % value)
    sent = Outcome(Status.SENT, "WA1", claimed_at=1.0)
    for _ in range(2):  # what was written once is written again
        meta = noted_meta(job, sent).encode()
        again = read(meta=meta, status=b"started")
        assert again.problem is None and again.order is not None
        assert (again.outcome, again.meta["note"]) == (sent, job.meta["note"])
        crm = RqJob("job-1", connection=object(), serializer=JSONSerializer)  # type: ignore[arg-type]
        crm.restore({"data": b"[]", "created_at": b"2026-11-22T03:00:00Z", "meta": meta})
        assert crm.meta["outcome"] == sent.as_dict()
        job = again


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_producer_may_write_so_much_into_meta_and_no_more(size: int) -> None:
    empty = len(b'{"note":""}')
    job = read(meta=b'{"note":"%b"}' % (b"x" * (MAX_META - empty + size)))
    assert (str(job.problem) == "meta: longer than 65536 bytes") == (size > 0)


@pytest.mark.parametrize("meta", [b"[]", b"\x80\x04.", b'{"note":"%b"}' % (b"x" * MAX_META)])
def test_a_job_whose_meta_cannot_be_read_tells_its_message_id(meta: bytes) -> None:
    job = read(meta=meta)
    assert job.problem is not None and job.order is None
    assert (job.message_id, job.meta) == ("m1", {})


_BYTES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b"queued", b"bogus", b"\x80\x04.", b"null", b"{}", b"[]", b"1", b"\xff"]),
    st.builds(lambda value: json.dumps(value).encode(), st.lists(st.integers(), max_size=4)),
    st.just(data()),
    st.just(data(function="os.system")),
)
_NAMES = st.sampled_from(
    (
        *("data", "status", "created_at", "enqueued_at", "started_at", "ended_at", "meta"),
        *("description", "origin", "result_ttl", "ttl", "retries_left", "webhooks"),
        *("group_id", "dependency_ids", "enqueue_at_front", "worker_name", "repeat_intervals"),
        *("failure_callback_name", "last_heartbeat", "exc_info", "timeout", "result"),
    )
)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=12) | st.just(b"job-1"), st.dictionaries(_NAMES, _BYTES, max_size=6))
def test_no_record_crashes_the_reader_and_rq_can_read_what_is_written_instead(
    raw_id: bytes, changes: dict[str, bytes]
) -> None:
    job = decode(raw_id, fields(**changes), session="s1", queue="wa:out:s1")
    assert (job.order is None) == (job.problem is not None)
    outcome = Outcome(Status.FAILED, error="x")
    written = fresh_fields(job, "s1", outcome)
    if job.exists:
        stored = {
            name: value.encode() if isinstance(value, str) else value
            for name, value in written.items()
        }
        crm = RqJob(job.id, connection=object(), serializer=JSONSerializer)  # type: ignore[arg-type]
        crm.restore(stored)
        assert crm.meta["outcome"]["status"] == "failed"
        assert set(crm.kwargs) == {"session", "message_id", "content_hash"}
    if job.problem is None:
        kept = {**fields(**changes), **{"data": b"[]"}}
        RqJob("job-1", connection=object(), serializer=JSONSerializer).restore(kept)  # type: ignore[arg-type]
