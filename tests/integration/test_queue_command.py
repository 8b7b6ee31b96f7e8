"""`queue SESSION` against a real Redis and the records, while no supervisor runs."""

import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from support import RedisServer

from storage.hold import Standing
from storage.sessions import Sessions
from whatsapp_worker import client
from whatsapp_worker.cli import main
from whatsapp_worker.outbox import Outbox
from whatsapp_worker.rq_job import Job

TO = "+5511999990001"


@pytest.fixture
def sessions(
    shared_redis_server: RedisServer, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Sessions:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("REDIS_URL", shared_redis_server.url)
    found = Sessions(tmp_path)
    found.prepare()
    found.create("sales", network="whatsapp", now=time.time())
    return found


@pytest.fixture
def ask(sessions: Sessions, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str, code: int = 0) -> Any:
        assert main(["queue", "sales", *words, "--json"]) == code
        told = capsys.readouterr()
        return json.loads(told.out) if told.out else told.err

    return run


def test_a_session_that_is_not_connected_says_why_nothing_goes(redis: Redis, ask: Any) -> None:
    assert ask()["head"] is None
    client.Outbox(redis).send_text("sales", TO, "Hi", message_id="m1")
    found = ask()
    assert (found["state"], found["depth"]) == ("idle", 1)
    assert "unlinked" in found["reason"]


def test_what_is_held_is_shown_and_released_by_resume(
    redis: Redis, sessions: Sessions, ask: Any
) -> None:
    client.Outbox(redis).send_text("sales", TO, "Hi", message_id="m1", priority="high")
    sessions.hold("sales").put(time.time())
    assert ask()["state"] == "held"
    assert ask()["head"]["high"] is True
    queue = "rq:queue:wa:out:sales:high"
    redis.lmove(queue, f"{queue}:intermediate", "LEFT", "RIGHT")  # a consumer looks, and puts back
    assert (ask()["state"], ask()["head"]["message_id"]) == ("held", "m1")
    assert ask("pause")["state"] == "paused"
    resumed = ask("resume", "--yes")
    assert (resumed["state"], resumed["held_before"], resumed["paused_at"]) == ("idle", None, None)


def told_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_a_queue_that_is_paused_and_held_says_both(
    redis: Redis, sessions: Sessions, ask: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = client.Outbox(redis)
    out.send_text("sales", TO, "Hi", message_id="m1")
    sessions.hold("sales").put(time.time())
    # What came later overtakes it, and hides nothing.
    out.send_text("sales", TO, "Hi", message_id="m2", priority="high")
    assert ask("pause")["state"] == "paused"
    [row] = json.loads(told_for(["status", "--json"], capsys))["sessions"]
    for found in (ask(), row["queue"]):
        assert found["state"] == "paused"
        assert "an operator paused it" in found["reason"]
        assert "an operator decides" in found["reason"]
    for words in (["status"], ["status", "sales"], ["queue", "sales"]):
        assert "paused, held" in told_for(words, capsys)
    assert "queue sales resume --keep-held" in told_for(["queue", "sales"], capsys)


def test_resume_sends_what_is_for_another_number_only_after_a_yes(
    redis: Redis, sessions: Sessions, ask: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out, hold = client.Outbox(redis), sessions.hold("sales")
    for n in range(3):
        out.send_text("sales", TO, "Hi", message_id=f"old {n}")
    out.send_text("sales", TO, "Hi", message_id="old later", send_at=time.time() + 3600)
    hold.put(time.time())
    out.send_text("sales", TO, "Hi", message_id="new")
    hold.pause(time.time())
    before = hold.read()
    refused = ask("resume", code=2)
    for words in ("4 messages", "another number", "--yes", "--keep-held"):
        assert words in refused
    assert hold.read() == before
    assert ask("resume", "--keep-held")["state"] == "held"
    assert hold.read() == before._replace(paused_at=None)
    refused = ask("resume", code=2)
    assert "4 messages" in refused and "--keep-held" not in refused
    assert main(["queue", "sales", "resume", "--yes"]) == 0
    assert "4 messages" in capsys.readouterr().err
    assert hold.read() == Standing()


def test_resume_asks_a_person(
    redis: Redis, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.Outbox(redis).send_text("sales", TO, "Hi", message_id="m1")
    hold = sessions.hold("sales")
    hold.put(time.time())
    for answer, code in (("no", 2), ("yes", 0)):
        terminal = io.StringIO(f"{answer}\n")
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr("sys.stdin", terminal)
        assert main(["queue", "sales", "resume"]) == code
        assert (hold.read() == Standing()) is (answer == "yes")


def test_resume_asks_nothing_where_nothing_waits_for_another_number(
    redis: Redis, sessions: Sessions, ask: Any
) -> None:
    hold = sessions.hold("sales")
    hold.put(time.time())
    client.Outbox(redis).send_text("sales", TO, "Hi", message_id="new")
    assert ask("resume")["held_before"] is None


def test_what_is_held_after_the_operator_looked_stays_held(sessions: Sessions) -> None:
    hold = sessions.hold("sales")
    hold.put(100.0)
    hold.pause(150.0)
    seen = hold.read()
    hold.put(200.0)  # yet another number was linked
    assert seen.held_before is not None
    assert hold.release(seen.held_before)
    assert hold.read() == Standing(held_before=200.0)
    assert not hold.release(seen.held_before)


def test_clearing_a_held_queue_keeps_it_held(redis: Redis, sessions: Sessions, ask: Any) -> None:
    out = client.Outbox(redis)
    jobs = out.send_many("sales", [client.text(TO, "x", message_id=f"m{n}") for n in range(450)])
    poison = out.send_text("sales", TO, "x", message_id="poison")
    redis.hset(f"rq:job:{poison.id}", "data", b"not a job")
    sessions.hold("sales").put(time.time())
    assert "--yes" in ask("clear", code=2)
    assert ask()["depth"] == 451
    cleared = ask("clear", "--yes")
    assert cleared == {"session": "sales", "cleared": 451, "as": {"cancelled": 450, "failed": 1}}
    assert {str(out.outcome(job).status) for job in jobs} == {"cancelled"}
    found = ask()
    assert (found["state"], found["depth"]) == ("idle", 0)
    assert found["held_before"] is not None
    assert ask("clear", "--yes")["cleared"] == 0


def test_clearing_takes_what_was_popped_and_leaves_what_is_being_sent(
    redis: Redis, ask: Any
) -> None:
    out = client.Outbox(redis)
    jobs = out.send_many("sales", [client.text(TO, "x", message_id=f"m{n}") for n in range(4)])
    queue = "rq:queue:wa:out:sales"
    for _ in range(2):  # as a consumer does; one of them is with WhatsApp
        redis.lmove(queue, f"{queue}:intermediate", "LEFT", "RIGHT")
    redis.hset(f"rq:job:{jobs[0].id}", "status", "started")
    assert ask("clear", "--yes")["cleared"] == 3
    assert [str(out.outcome(job).status) for job in jobs] == ["sending", *["cancelled"] * 3]
    assert redis.lrange(f"{queue}:intermediate", 0, -1) == [jobs[0].id.encode()]


def test_clearing_misses_nothing_that_is_put_back_meanwhile(
    redis: Redis, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its consumer popped the first, learns of a pause, and puts it back between two looks."""
    out = client.Outbox(redis)
    out.send_many("sales", [client.text(TO, "x", message_id=f"m{n}") for n in range(4)])
    queue = "rq:queue:wa:out:sales"
    redis.lmove(queue, f"{queue}:intermediate", "LEFT", "RIGHT")
    load = Outbox.load

    def load_late(outbox: Outbox, name: str, ids: Sequence[bytes]) -> list[Job]:
        redis.lmove(f"{queue}:intermediate", queue, "RIGHT", "LEFT")
        return load(outbox, name, ids)

    monkeypatch.setattr(Outbox, "load", load_late)
    assert ask("clear", "--yes")["as"] == {"cancelled": 4}
    assert ask()["depth"] == 0


def test_clearing_ends_a_job_that_was_enqueued_twice(redis: Redis, ask: Any) -> None:
    queue = Queue("wa:out:sales", connection=redis, serializer=JSONSerializer)
    kwargs = client.text(TO, "x", message_id="m1").kwargs("sales")
    for _ in range(2):
        queue.enqueue("jobs.outbound.send_message", job_id="same", kwargs=kwargs)
    assert ask("clear", "--yes")["as"] == {"cancelled": 2}
    assert ask()["depth"] == 0
    assert redis.xlen("wa:events") == 1


def test_the_pace_is_shown_where_it_is_limited(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask()["pace"]["per_minute"] is None
    monkeypatch.setenv("PACE_PER_MINUTE", "20")
    monkeypatch.setenv("PACE_PER_DAY", "50")
    pace = ask()["pace"]
    assert (pace["per_minute"], pace["per_day"], pace["sent_today"]) == (20, 50, 0)


def test_people_read_what_to_do_next(
    redis: Redis, sessions: Sessions, capsys: pytest.CaptureFixture[str]
) -> None:
    client.Outbox(redis).send_text("sales", TO, "Hi", message_id="m1")
    assert main(["queue", "sales", "pause"]) == 0
    told = capsys.readouterr().out
    for words in ("paused", "m1", "not limited", "whatsapp-worker queue sales resume"):
        assert words in told


def test_what_waits_is_listed_without_texts_or_whole_numbers(
    redis: Redis, sessions: Sessions, capsys: pytest.CaptureFixture[str]
) -> None:
    out, hold = client.Outbox(redis), sessions.hold("sales")
    assert "Nothing waits" in told_for(["queue", "sales", "list"], capsys)
    first = out.send_text("sales", TO, "secret", message_id="m1")
    hold.put(time.time())
    out.send_text("sales", "120363012345678901@g.us", "secret", message_id="m2")
    out.send_text("sales", TO, "secret", message_id="m3", priority="high")
    at = time.time() + 3600
    out.send_text("sales", TO, "secret", message_id="later", send_at=at)
    poison = out.send_text("sales", TO, "secret", message_id="poison")
    redis.hset(f"rq:job:{poison.id}", "data", b"not a job")
    queue = "rq:queue:wa:out:sales"
    redis.lmove(queue, f"{queue}:intermediate", "LEFT", "RIGHT")

    told = told_for(["queue", "sales", "list", "--json"], capsys)
    rows = [json.loads(line) for line in told.splitlines()]
    assert [row["message_id"] for row in rows] == ["m3", "m1", "m2", "later", None]
    assert rows[1] == {
        "session": "sales",
        "message_id": "m1",
        "job_id": first.id,
        "to": "...0001",
        "high": False,
        "sending": False,
        "held": True,
        "enqueued_at": pytest.approx(time.time(), abs=600),
        "send_at": None,
    }
    assert [row["held"] for row in rows] == [False, True, False, False, False]
    assert [row["high"] for row in rows] == [True, False, False, False, False]
    assert [row["to"] for row in rows] == ["...0001", "...0001", "...8901@g.us", "...0001", None]
    assert rows[3]["send_at"] == at and rows[4]["job_id"] == poison.id
    words = told_for(["queue", "sales", "list"], capsys)
    for expected in ("MESSAGE", "m1", "...0001", "held", "high", poison.id):
        assert expected in words
    assert "secret" not in told + words and TO[1:] not in told + words

    assert main(["queue", "sales", "list", "--limit", "2"]) == 0
    few = capsys.readouterr()
    assert "m1" in few.out and "m2" not in few.out
    assert "2 of 5" in few.err


def test_a_list_of_queued_messages_says_where_the_waiting_ones_are(
    redis: Redis, sessions: Sessions, capsys: pytest.CaptureFixture[str]
) -> None:
    client.Outbox(redis).send_text("sales", TO, "Hi", message_id="m1")
    for words in ([], ["--json"]):
        assert main(["messages", "list", "sales", "--status", "queued", *words]) == 0
        assert "whatsapp-worker queue sales list" in capsys.readouterr().err
    assert main(["messages", "show", "sales", "m1"]) == 1
    assert "whatsapp-worker queue sales list" in capsys.readouterr().err


def test_a_queue_whose_ledger_was_set_aside_says_what_holds_it_and_what_to_do(
    redis: Redis, sessions: Sessions, ask: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client.Outbox(redis).send_text("sales", TO, "Hi", message_id="m1")
    file = sessions.folder("sales") / "ledger.db.held"
    file.write_text("why")
    [row] = json.loads(told_for(["status", "--json"], capsys))["sessions"]
    for found in (ask(), row["queue"]):
        assert found["state"] == "held"
        for words in ("ledger", str(file), "queue sales list", "remove"):
            assert words in found["reason"]
    assert "1 waiting, held" in told_for(["status"], capsys)
    shown = told_for(["queue", "sales"], capsys)
    assert str(file) in shown and "Send it" not in shown

    refused = ask("resume", code=1)
    assert str(file) in refused and "queue sales list" in refused
    found = ask("pause")
    assert found["state"] == "paused" and str(file) in found["reason"]
    assert "paused, held" in told_for(["queue", "sales"], capsys)
    found = ask("resume")
    assert (found["state"], found["paused_at"]) == ("held", None)
    sessions.hold("sales").put(time.time())
    assert "another number" in ask("resume", code=2)
    assert "decides" in ask()["reason"] and str(file) in ask()["reason"]
    assert ask("resume", "--yes")["state"] == "held"
    file.unlink()
    assert ask()["state"] == "idle"
