"""Commands as operators and CRMs call them, against a running world."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import time
import uuid
import zlib
from pathlib import Path

import pytest
from world import COMMAND, World, eventually

from whatsapp_worker.cli import qr

CONTACT = "5521988880001"


def ask(world: World, *words: str, code: int = 0) -> list[dict[str, object]]:
    """The JSON lines of a command that ends with this exit code."""
    done = world.run(*words, "--json")
    assert done.returncode == code, (words, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_session_is_linked_stopped_started_restarted_logged_out_and_deleted(world: World):
    phone = world.link("sales")
    linked = {"event": "linked", "phone": phone, "jid": world.session("sales")["jid"]}
    assert ask(world, "link", "sales") == [linked]
    assert ask(world, "stop", "sales") == [{"session": "sales", "state": "stopped"}]
    assert world.session("sales")["pid"] is None
    assert ask(world, "start", "sales") == [{"session": "sales", "state": "connected"}]
    before = world.session("sales")["pid"]
    assert ask(world, "restart", "sales") == [{"session": "sales", "state": "connected"}]
    assert world.session("sales")["pid"] not in (before, None)
    assert ask(world, "logout", "sales") == [{"session": "sales", "state": "logged_out"}]
    assert world.control.devices(phone) == []
    assert ask(world, "start", "sales", code=1) == [{"session": "sales", "state": "logged_out"}]
    world.link("sales")
    job = world.enqueue("sales", "unanswerable", "never", "m1", send_at=time.time() + 3600)
    assert ask(world, "delete", "sales", "--yes") == [{"session": "sales", "state": "deleted"}]
    assert world.control.devices() == [] and world.status()["sessions"] == []
    [outcome] = world.await_outcomes([job], within_s=15)
    assert outcome["status"] == "failed"
    assert world.run("status", "sales").returncode == 3


def test_messages_are_sent_and_looked_up_from_the_command_line(world: World):
    world.link("sales")
    world.control.unknown_number("5521900000000")
    words = ("send", "sales", f"+{CONTACT}", "Hello", "--id", "m1")
    [sent] = ask(world, *words, "--wait")
    assert sent["status"] in ("sent", "delivered") and sent["wa_message_id"] and not sent["error"]
    [again] = ask(world, *words, "--wait")
    assert again["wa_message_id"] == sent["wa_message_id"]
    assert [row["text"] for row in world.arrived(to=CONTACT)] == ["Hello"]
    [failed] = ask(world, "send", "sales", "5521900000000", "Hi", "--wait", "--id", "m2", code=1)
    assert failed["status"] == "failed" and failed["error"]
    [queued] = ask(world, "send", "sales", CONTACT, "Later", "--id", "m3")
    assert queued == {"message_id": "m3", "status": "queued", "wa_message_id": None, "error": None}
    ask(world, "send", "sales", "12", "Hi", code=2)
    ask(world, "send", "nobody", CONTACT, "Hi", code=3)
    eventually(lambda: ask(world, "messages", "show", "sales", "m1")[0]["status"] == "delivered")
    eventually(lambda: len(ask(world, "messages", "list", "sales")) == 3)
    ask(world, "stop", "sales")
    ask(world, "send", "sales", CONTACT, "Never", "--id", "m4")
    [cancelled] = ask(world, "messages", "cancel", "sales", "m4")
    assert cancelled["status"] == "cancelled"
    [too_late] = ask(world, "messages", "cancel", "sales", "m1", code=1)
    assert too_late["status"] == "delivered"
    ask(world, "messages", "cancel", "sales", "m9", code=1)
    ask(world, "messages", "resolve", "sales", "m1", "failed", code=1)
    assert "Never" not in [row["text"] for row in world.arrived(to=CONTACT)]
    [row] = ask(world, "messages", "list", "sales", "--status", "failed")
    assert row["message_id"] == "m2" and "secret" not in row
    ask(world, "messages", "show", "sales", "m9", code=1)


def test_a_send_that_is_not_done_in_time_says_so_and_may_still_be_done(world: World):
    world.link("sales")
    ask(world, "stop", "sales")
    words = ("send", "sales", CONTACT, "In a while", "--id", "m1", "--wait", "--timeout", "0.5")
    done = world.run(*words, "--json")
    assert done.returncode == 7, (done.stdout, done.stderr)
    queued = {"message_id": "m1", "status": "queued", "wa_message_id": None, "error": None}
    assert json.loads(done.stdout) == queued
    assert "within 0.5 s" in done.stderr and "status sales" in done.stderr
    ask(world, "start", "sales")
    eventually(lambda: [row["text"] for row in world.arrived(to=CONTACT)] == ["In a while"])


def test_an_operator_resolves_a_message_that_nobody_acknowledged(tmp_path: Path):
    with contextlib.closing(World(tmp_path, SEND_TIMEOUT_S="2").start()) as world:
        _resolve(world)


def _resolve(world: World) -> None:
    world.link("sales")
    world.control.contacts(CONTACT, receipts="none")
    world.control.send_fault(how="no_ack", count=1)
    [unknown] = ask(
        world, "send", "sales", CONTACT, "Hm", "--id", "u1", "--wait", "--timeout", "50", code=1
    )
    assert unknown["status"] == "unknown"
    [resolved] = ask(world, "messages", "resolve", "sales", "u1", "sent")
    assert resolved["status"] == "sent" and resolved["wa_message_id"] == unknown["wa_message_id"]
    assert ask(world, "messages", "show", "sales", "u1")[0]["status"] == "sent"
    names = [fields[b"event"] for _, fields in world.redis.xrange("wa:events")]
    assert names.count(b"message.sent") == 1
    assert ask(world, "messages", "resolve", "sales", "u1", "failed", code=1) == []


def test_the_raw_payload_of_the_readme_is_sent(world: World):
    world.link("sales")
    kwargs = {
        "session": "sales",
        "to": CONTACT,
        "message_id": "raw-1",
        "message": {"type": "text", "text": {"body": "from another language"}},
    }
    job_id = str(uuid.uuid4())
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
    call = ["jobs.outbound.send_message", None, [], kwargs]
    pipeline = world.redis.pipeline()
    fields = {
        "origin": "wa:out:sales",
        "status": "queued",
        "created_at": now,
        "enqueued_at": now,
        "description": "send_message",
        "data": zlib.compress(json.dumps(call).encode()),
    }
    pipeline.hset(f"rq:job:{job_id}", mapping=fields)
    pipeline.sadd("rq:queues", "rq:queue:wa:out:sales")
    pipeline.rpush("rq:queue:wa:out:sales", job_id)
    pipeline.execute()

    def meta() -> dict[str, object]:
        text = world.redis.hget(f"rq:job:{job_id}", "meta")
        return dict(json.loads(text)) if text else {}

    eventually(lambda: (meta().get("outcome") or {}).get("status") == "sent")
    assert [row["text"] for row in world.arrived(to=CONTACT)] == ["from another language"]


class Terminal:
    """A command on a terminal of its own, and what is on its screen."""

    def __init__(self, world: World, *words: str, rows: int = 60, columns: int = 100) -> None:
        self._end, theirs = pty.openpty()
        environ = {**world.environ, "TERM": "xterm-256color"}
        environ |= {"LINES": str(rows), "COLUMNS": str(columns)}
        self.process = subprocess.Popen(
            [*COMMAND, *words],
            env=environ,
            cwd=world.folder,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._seen = b""

    def text(self) -> str:
        """Everything written so far."""
        while select.select([self._end], [], [], 0)[0]:
            try:
                data = os.read(self._end, 65536)
            except OSError:
                break
            if not data:
                break
            self._seen += data
        return self._seen.decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


def test_link_on_a_terminal_draws_the_code_and_counts_down_until_it_is_scanned(world: World):
    with contextlib.closing(Terminal(world, "link", "sales", "--png", "code.png")) as terminal:
        eventually(lambda: "s left" in terminal.text(), what=terminal.text())
        path = world.data / "sessions" / "sales" / "link.json"
        code = json.loads(path.read_text())["code"]
        assert path.stat().st_mode & 0o777 == 0o600
        drawn = terminal.text().replace("\r\n", "\n")
        assert "\n".join(qr.lines(code, colours=True)) in drawn
        picture = Path(world.folder / "code.png")
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_mode & 0o777 == 0o600
        world.control.scan(code, phone="5511999990009")
        eventually(lambda: terminal.process.poll() == 0, what=terminal.text())
        assert "Linked +5511999990009" in terminal.text()
    assert not picture.exists() and not path.exists()


def test_status_on_a_terminal_names_what_matters(world: World):
    phone = world.link("sales")
    with contextlib.closing(Terminal(world, "status", "--watch")) as terminal:
        for words in ("supervisor", "ok", "sandbox", "SQLite", "sales", "connected", f"+{phone}"):
            eventually(lambda words=words: words in terminal.text(), what=words)
        world.run("stop", "sales")
        eventually(lambda: "stopped" in terminal.text().split("\x1b[H")[-1])


def test_link_works_while_the_supervisor_is_still_starting(tmp_path: Path):
    world = World(tmp_path)
    try:
        world.start_sandbox()
        with world.linking("early") as lines:
            eventually((world.data / "sessions" / "early" / "wanted.json").exists)
            world.start_supervisor()
            for line in lines:
                if line["event"] == "qr":
                    world.control.scan(line["code"], phone="5511999990010")
                last = line
        assert last["event"] == "linked" and last["phone"] == "5511999990010"
    finally:
        world.close()
        print(world.logs())


def test_link_by_pairing_code_and_again_with_a_qr_code(world: World):
    phone = "5511999990011"
    with world.linking("sales", "--phone", f"+{phone}") as lines:
        told = next(lines)
        assert told["event"] == "code" and len(str(told["code"])) == 9
        world.control.enter_code(str(told["code"]), phone)
        assert [line["event"] for line in lines] == ["linked"]
    with world.linking("sales", "--again") as lines:
        told = next(lines)
        assert told["event"] == "qr" and told["code"].startswith("https://")
        assert 0 < told["expires_in_s"] <= 60
        world.control.scan(told["code"], phone=phone)
        assert list(lines)[-1]["phone"] == phone
    eventually(lambda: world.session("sales")["state"] == "connected")


def test_a_command_needs_no_variables_of_the_sandbox_that_the_supervisor_runs_on(world: World):
    eventually(lambda: world.status()["supervisor"]["alive"])
    for name in ("WHATSAPP_NETWORK", "HTTPS_PROXY", "SSL_CERT_FILE"):
        del world.environ[name]
    assert world.status()["network"] == "sandbox"
    assert world.link("sales")
    assert world.session("sales")["network"] == "sandbox"


def test_link_that_is_interrupted_shows_no_code_any_more(world: World):
    with contextlib.closing(Terminal(world, "link", "sales")) as terminal:
        eventually(lambda: "s left" in terminal.text(), what=terminal.text())
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(30) == 130
        assert "Traceback" not in terminal.text()
    eventually(lambda: world.session("sales")["state"] == "unlinked")
    eventually(lambda: world.session("sales")["pid"] is None)
    assert not (world.data / "sessions" / "sales" / "link.json").exists()


def test_a_link_attempt_ends_at_its_deadline_and_another_can_start_at_once(tmp_path: Path):
    world = World(tmp_path, LINK_ATTEMPT_S="15")
    try:
        world.start()
        begun_at = time.monotonic()
        with world.linking("sales") as lines:
            told = list(lines)
        assert [line["event"] for line in told] == ["qr", "failed"]
        assert told[-1]["reason"] == "qr-expired"
        assert time.monotonic() - begun_at < 40
        begun_at = time.monotonic()
        world.link("sales")
        assert time.monotonic() - begun_at < 30
        assert world.state("sales")["state"] == "connected"
    finally:
        world.close()
        print(world.logs())


@pytest.mark.parametrize("words", [("run",), ("sandbox", "--state-dir", "sandbox")])
def test_a_second_one_on_the_same_folder_is_refused(world: World, words: tuple[str, ...]):
    eventually(lambda: world.status()["supervisor"]["alive"])
    done = world.run(*words)
    assert done.returncode == 5, done.stderr
    assert "already" in done.stderr and "Traceback" not in done.stderr


def test_run_refuses_an_environment_in_which_a_sandbox_session_could_reach_whatsapp(tmp_path: Path):
    with contextlib.closing(World(tmp_path)) as world:
        world.start_sandbox()
        safe = dict(world.environ)
        for name, value in (
            ("HTTPS_PROXY", "http://proxy.example:3128"),
            ("NO_PROXY", ".whatsapp.net"),
            ("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"),
        ):
            world.environ = {**safe, name: value}
            done = world.run("run", "--all")
            assert (done.returncode, done.stdout) == (8, ""), done.stderr
            assert name in done.stderr and "Traceback" not in done.stderr
            assert not (world.data / "supervisor.lock").exists()
        world.environ = safe
        world.start_supervisor()
