"""Commands against the records alone: no supervisor, or one that only writes records."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.ledger import Claim, Ledger, Settlement
from storage.locks import FileLock
from storage.sessions import Sessions, StateRecord, Wanted
from whatsapp_worker import telemetry
from whatsapp_worker.cli import host, main, operate

RUNNING = (Path(__file__).parents[2] / "docs" / "running.md").read_text()


@pytest.fixture
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sessions:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setattr(host, "SUPERVISOR_GRACE_S", 0.2)
    return Sessions(tmp_path)


def make(sessions: Sessions, name: str, state: str, **facts: object) -> Wanted:
    wanted = sessions.create(name, network="whatsapp", now=time.time())
    record = StateRecord(generation=wanted.generation, state=state, since=time.time())
    sessions.put_state(name, dataclasses.replace(record, **facts))
    return wanted


@contextlib.contextmanager
def supervised(
    sessions: Sessions, answer: Callable[[str, Wanted], StateRecord | None]
) -> Iterator[None]:
    """Holds the supervisor's lock and answers each change with a state; None removes it."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.02):
            for name in sessions.changed():
                wanted = sessions.wanted(name)
                if wanted is None:
                    continue
                state = answer(name, wanted)
                if state is None:
                    sessions.remove(name)
                else:
                    sessions.put_state(name, state)

    sessions.changed()
    thread = threading.Thread(target=run)
    with FileLock(sessions.data_dir / "supervisor.lock"):
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def answering(state: str, **facts: object) -> Callable[[str, Wanted], StateRecord]:
    def answer(name: str, wanted: Wanted) -> StateRecord:
        return StateRecord(generation=wanted.generation, state=state, since=time.time(), **facts)

    return answer


def documented(document: str) -> set[str]:
    """The fields that the docs name."""
    [fields] = re.findall(rf"^\| `{document}` \| (.*?) \|", RUNNING, re.MULTILINE)
    return set(re.findall(r"\w+", fields))


def row(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("state", ["connected", "connecting", "linking", "reconnecting"])
def test_without_a_supervisor_nothing_is_called_connected(sessions, capsys, state):
    make(sessions, "sales", state, pid=4711, phone="5511999990001")
    assert main(["status", "--json"]) == 0
    found = row(capsys)
    assert found["supervisor"] == {"alive": False, "pid": None}
    [told] = found["sessions"]
    assert told["state"] == "stopped" and told["pid"] is None
    assert "whatsapp-worker run" in told["sentence"]


def test_status_tells_exactly_the_keys_that_are_documented(sessions, capsys):
    make(sessions, "sales", "unlinked")
    make(sessions, "torn", "unlinked")
    for path in sessions.folder("torn").glob("state.json*"):
        path.write_text("{")
    sessions.create("new", network="whatsapp", now=time.time())
    with supervised(sessions, lambda name, wanted: sessions.state(name)):
        assert main(["status", "--json"]) == 0
    told = row(capsys)
    rows = told["sessions"]
    assert [found["session"] for found in rows] == ["new", "sales", "torn"]
    assert told.keys() == documented("status")
    assert told["supervisor"].keys() == documented("supervisor")
    assert told["redis"].keys() == documented("redis")
    assert told["database"].keys() == documented("database")
    for found in rows:
        assert found.keys() == documented("sessions")
        assert found["queue"].keys() == documented("queue")
    main(["status", "sales", "--json"])
    [in_full] = row(capsys)["sessions"]
    assert in_full.keys() == documented("sessions") | {"history"}


@pytest.mark.parametrize(
    "words", [["send", "sales", "+5511999990001", "Hi"], ["queue", "sales"], ["status"]]
)
def test_a_redis_that_went_with_its_killed_supervisor_is_told_as_one_that_ended(
    sessions, capsys, words
):
    make(sessions, "sales", "connected")
    path = sessions.data_dir / "redis" / "redis.sock"
    announced = {"url": f"unix://{path}", "pid": 4711}
    (sessions.data_dir / "redis.json").write_text(json.dumps(announced))
    main(words)
    told = capsys.readouterr()
    said = told.out + told.err
    assert "whatsapp-worker run` on" in said and "ConnectionError" not in said


def test_messages_tell_exactly_the_keys_that_are_documented(sessions, capsys):
    make(sessions, "sales", "connected")
    path = sessions.folder("sales") / "ledger.db"
    with contextlib.closing(Ledger.open(path, "sales")) as ledger:
        for message_id, status in (("m1", "sent"), ("m2", "failed")):
            claim = Claim(message_id, "hash", "job", "recipient", time.time())
            ledger.claim(claim, secret=lambda attempt: bytes(32))
            ledger.settle(Settlement(message_id, status, at=time.time()))
    assert main(["messages", "list", "sales", "--json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [found["message_id"] for found in listed] == ["m2", "m1"]
    assert main(["messages", "show", "sales", "m1", "--json"]) == 0
    assert row(capsys) == listed[1]
    for found in listed:
        assert found.keys() == documented("messages")


def test_status_is_headed_by_supervisor_network_redis_and_database(sessions, capsys):
    make(sessions, "sales", "stopped")
    for words in (["status"], ["status", "sales"]):
        assert main(words) == 0
        heading, _, rest = capsys.readouterr().out.partition("\n\n")
        names = [line.split()[0] for line in heading.splitlines()]
        assert names == ["supervisor", "network", "redis", "database", "data"]
        assert "whatsapp-worker run" in heading and "SQLite" in heading
        assert "sales" in rest


def test_a_broken_record_costs_its_own_row_only(sessions, capsys):
    make(sessions, "good", "stopped")
    make(sessions, "torn", "stopped")
    for path in sessions.folder("torn").glob("state.json*"):
        path.write_text("{")
    assert main(["status", "--json"]) == 0
    states = {told["session"]: told["state"] for told in row(capsys)["sessions"]}
    assert states == {"good": "stopped", "torn": "failed"}


def test_a_request_without_a_supervisor_is_recorded_and_says_so(sessions, capsys):
    make(sessions, "sales", "stopped")
    assert main(["stop", "sales", "--json"]) == 6
    told = capsys.readouterr()
    assert told.out == "" and "recorded" in told.err
    assert sessions.wanted("sales").run == "stop"


@pytest.mark.parametrize(
    ("command", "state", "code"),
    [
        ("stop", "stopped", 0),
        ("start", "connected", 0),
        ("start", "unlinked", 1),
        ("start", "banned", 1),
        ("restart", "connected", 0),
        ("logout", "logged_out", 0),
        ("logout", "connected", 1),
    ],
)
def test_an_operation_waits_for_its_state_and_tells_it(sessions, capsys, command, state, code):
    make(sessions, "sales", "connected", pid=1)
    with supervised(sessions, answering(state, pid=2)):
        assert main([command, "sales", "--json"]) == code
    assert row(capsys) == {"session": "sales", "state": state}


@pytest.mark.parametrize(
    ("command", "done_without"),
    [
        ("start", {"logout"}),
        ("restart", {"logout"}),
        ("link", {"logout"}),
        ("logout", {"restart"}),
        ("stop", {"logout", "restart"}),
    ],
)
def test_a_command_takes_back_what_it_supersedes(sessions, capsys, command, done_without):
    make(sessions, "sales", "stopped")
    asked = {"logout": "l1", "restart": "x1"}
    sessions.want("sales", lambda wanted: dataclasses.replace(wanted, **asked))
    main([command, "sales", "--json"])  # no supervisor runs: it is recorded
    wanted = sessions.wanted("sales")
    left = {name for name, request in asked.items() if getattr(wanted, name) == request}
    assert left == asked.keys() - done_without - {command}


def test_an_operation_that_is_not_done_in_time_says_so(sessions, capsys, monkeypatch):
    monkeypatch.setenv("CONNECT_TIMEOUT_S", "1")
    monkeypatch.setattr(operate, "_SLACK_S", 0.0)
    make(sessions, "sales", "stopped")
    with supervised(sessions, answering("connecting")):
        assert main(["start", "sales", "--json"]) == 7
    told = capsys.readouterr()
    assert told.out == "" and "not done within 1 s (now: connecting)" in told.err
    assert sessions.wanted("sales").run == "run"


def test_delete_ends_when_the_record_is_gone(sessions, capsys):
    make(sessions, "sales", "connected")
    with supervised(sessions, lambda name, wanted: None):
        assert main(["delete", "sales", "--yes", "--json"]) == 0
    assert row(capsys) == {"session": "sales", "state": "deleted"}


def test_delete_asks_first(sessions, capsys):
    make(sessions, "sales", "connected")
    assert main(["delete", "sales", "--json"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert sessions.wanted("sales").run == "run"


def test_all_concerns_every_session_and_the_worst_code_counts(sessions, capsys):
    for name in ("one", "two", "three"):
        make(sessions, name, "stopped")

    def answer(name: str, wanted: Wanted) -> StateRecord:
        return answering("banned" if name == "two" else "connected")(name, wanted)

    with supervised(sessions, answer):
        assert main(["start", "--all", "--json"]) == 1
    told = capsys.readouterr()
    states = {line["session"]: line["state"] for line in map(json.loads, told.out.splitlines())}
    assert states == {"one": "connected", "two": "banned", "three": "connected"}
    assert "two" in told.err


def test_link_of_a_connected_session_says_linked_at_once_and_changes_nothing(sessions, capsys):
    wanted = make(sessions, "sales", "connected", phone="5511999990001", jid="j")
    with supervised(sessions, answering("connected")):
        assert main(["link", "sales", "--json"]) == 0
    assert row(capsys) == {"event": "linked", "phone": "5511999990001", "jid": "j"}
    assert sessions.wanted("sales").generation == wanted.generation


@pytest.mark.parametrize("number", ["+55 11 99999-0001", "551199990001"])
def test_link_of_the_number_that_is_linked_says_so(sessions, capsys, number):
    make(sessions, "sales", "connected", phone="5511999990001")
    with supervised(sessions, answering("connected")):
        assert main(["link", "sales", "--phone", number]) == 0
    assert "Already linked +5511999990001" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["connected", "stopped"])
def test_link_of_another_number_than_the_linked_one_is_refused(sessions, capsys, state):
    make(sessions, "sales", state, phone="5511999990001")

    def answer(name: str, wanted: Wanted) -> StateRecord:
        link = {"request": (wanted.link or {}).get("request"), "result": "linked"}
        return answering("connected", phone="5511999990001", link=link)(name, wanted)

    with supervised(sessions, answer):
        assert main(["link", "sales", "--phone", "+5511999990009", "--json"]) == 1
    told = row(capsys)
    assert (told["event"], told["reason"]) == ("failed", "already-linked")
    assert "linked to +5511999990001" in told["sentence"]
    assert told["sentence"].endswith("link sales --again --phone +5511999990009")


def lose_record(sessions: Sessions, name: str) -> None:
    """With a state that was true when its supervisor was killed."""
    make(sessions, name, "connected", phone="5511999990001", generation=7)
    known = {"network": "sandbox"}
    sessions.put_state(name, dataclasses.replace(sessions.state(name), fields=known))
    (sessions.folder(name) / "wanted.json").unlink()


def test_a_session_without_its_record_is_told_as_such(sessions, capsys):
    lose_record(sessions, "sales")
    with supervised(sessions, answering("connected")):
        assert main(["status", "--json"]) == 0
        [told] = row(capsys)["sessions"]
        assert told["state"] == "failed" and "whatsapp-worker start sales" in told["sentence"]
        for words in ("status sales", "stop sales", "queue sales pause", "messages list sales"):
            assert main(words.split()) == 1
            said = capsys.readouterr().err
            assert "there is no session" not in said
            assert "whatsapp-worker start sales" in said


@pytest.mark.parametrize("verb", ["start", "link"])
def test_start_and_link_make_a_lost_record_anew(sessions, capsys, verb):
    lose_record(sessions, "sales")

    def answer(name: str, wanted: Wanted) -> StateRecord:
        link = {"request": (wanted.link or {}).get("request"), "result": "linked"}
        return answering("connected" if wanted.run == "run" else "stopped", link=link)(name, wanted)

    with supervised(sessions, answer):
        assert main([verb, "sales", "--json"]) == 0
    wanted = sessions.wanted("sales")
    assert (wanted.run, wanted.network, wanted.why) == ("run", "sandbox", verb)
    assert wanted.generation > 7, "no state from before answers for it"


def test_link_that_fails_tells_reason_and_sentence(sessions, capsys):
    def answer(name: str, wanted: Wanted) -> StateRecord:
        link = {"request": (wanted.link or {}).get("request"), "result": "failed"}
        link |= {"reason": "qr-expired", "sentence": "Nobody scanned."}
        return answering("unlinked", link=link)(name, wanted)

    with supervised(sessions, answer):
        assert main(["link", "new", "--json"]) == 1
    expected = {"event": "failed", "reason": "qr-expired", "sentence": "Nobody scanned."}
    assert row(capsys) == expected


def test_link_beyond_max_sessions_is_refused(sessions, capsys, monkeypatch):
    monkeypatch.setenv("MAX_SESSIONS", "1")
    make(sessions, "one", "connected")
    assert main(["link", "two", "--json"]) == 4
    assert row(capsys)["reason"] == "capacity"
    assert sessions.ids() == ["one"]


def test_link_of_a_session_that_has_no_room_to_run_is_refused_the_same(sessions, capsys):
    def answer(name: str, wanted: Wanted) -> StateRecord:
        link = {"request": (wanted.link or {}).get("request"), "result": "failed"}
        link |= {"reason": "capacity", "sentence": "Stop one."}
        return answering("stopped", link=link)(name, wanted)

    make(sessions, "sales", "stopped")
    with supervised(sessions, answer):
        assert main(["link", "sales", "--json"]) == 4
    assert row(capsys) == {"event": "failed", "reason": "capacity", "sentence": "Stop one."}


@pytest.mark.parametrize("verb", ["start", "restart"])
@pytest.mark.parametrize("reason, code", [("capacity", 4), ("wrong-network", 1)])
def test_start_says_at_once_that_it_cannot_be(sessions, capsys, verb, reason, code):
    make(sessions, "sales", "stopped", reason=reason)
    before = sessions.state("sales")

    def answer(name: str, wanted: Wanted) -> StateRecord:
        return dataclasses.replace(before, generation=wanted.generation, sentence="Do this.")

    with supervised(sessions, answer):
        assert main([verb, "sales"]) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("Do this.") == 1


def test_restart_of_a_session_without_a_process_does_not_wait_for_another(sessions, capsys):
    make(sessions, "sales", "unlinked")
    with supervised(sessions, answering("unlinked", sentence="Link it.")):
        assert main(["restart", "sales", "--json"]) == 1
    assert row(capsys) == {"session": "sales", "state": "unlinked"}


def test_a_command_on_an_unknown_session_says_where_it_looked_and_how_to_make_one(sessions, capsys):
    assert main(["stop", "sales"]) == 3
    told = capsys.readouterr().err
    assert str(sessions.data_dir.absolute()) in told and "whatsapp-worker link sales" in told


def test_logs_end_quietly_when_nobody_reads_on_and_say_when_there_is_nothing(sessions, capsys):
    path = telemetry.log_file(sessions.data_dir)
    path.parent.mkdir()
    line = json.dumps({"time": "t", "level": "INFO", "event": "e", "session": "sales"})
    path.write_text(f"{line}\n" * 1000)
    command = f"{sys.executable} -m whatsapp_worker.cli logs --lines 1000 | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert main(["logs", "support"]) == 0
    assert "No such line yet" in capsys.readouterr().err


def test_a_data_folder_that_is_a_file_is_said_in_one_sentence(sessions, monkeypatch, capsys):
    path = sessions.data_dir / "file"
    path.write_text("")
    monkeypatch.setenv("DATA_DIR", str(path))
    for words in (["status"], ["run"], ["link", "sales"], ["health"]):
        assert main(words) == 1
        assert "set DATA_DIR to a folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["link", "No/pe"], ["link", "x", "--phone", "12"]])
def test_link_refuses_what_is_no_session_id_or_number(sessions, words):
    assert main(words) == 2
    assert sessions.ids() == []
