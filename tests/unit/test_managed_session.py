"""One session under supervision, with a host and processes that only pretend."""

import json
import resource
import socket
import sqlite3
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storage.sessions import Sessions, Wanted
from whatsapp_worker import session_status
from whatsapp_worker.endings import Ending, EndingKind, refused
from whatsapp_worker.event_names import Event
from whatsapp_worker.managed_session import ManagedSession
from whatsapp_worker.reconnect import Policy
from whatsapp_worker.reports import Channel
from whatsapp_worker.session import Reason, State
from whatsapp_worker.session_process import SessionProcess, socket_pair
from whatsapp_worker.settings import Settings

START = 1_000_000.0
LOST = Ending(EndingKind.LOST, Reason.CONNECTION_FAILED)


class FakeHost:
    """Grants everything; `now` moves by hand."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = Settings(data_dir=folder, network="sandbox", **settings)
        self.policy = Policy(waits_s=(3, 6, 12), jitter_s=0, cooldown_s=60)
        self.sessions = Sessions(folder)
        self.now = 0.0
        self.spawned: list[tuple[str, Mapping[str, Any]]] = []
        self.events: list[tuple[Event, Mapping[str, Any]]] = []
        self.logins = 0
        self.room = True
        self.gate = True
        self.deleted: list[str] = []
        self.freed: list[str] = []
        self.far: Channel | None = None

    def wall(self) -> float:
        return START + self.now

    def spawn(self, session: str, kind: str, arguments: Mapping[str, Any]) -> SessionProcess | None:
        self.spawned.append((kind, dict(arguments)))
        ours, theirs = socket_pair()
        self.far = Channel(theirs)
        return SessionProcess(len(self.spawned), kind, session, ours, self.now)

    def has_room(self, session: str) -> bool:
        return self.room

    def admits_dial(self, session: str) -> bool:
        return self.gate

    def told(self, event: Event, session: str, payload: Mapping[str, Any]) -> None:
        self.events.append((event, payload))

    def logged_in(self, session: str) -> None:
        self.logins += 1

    def finish_deletion(self, session: str, *, why: str) -> bool:
        self.deleted.append(why)
        return True

    def end_leftover(self, session: str) -> bool:
        self.freed.append(session)
        return True


class Play:
    """A session and its fake world, moved step by step."""

    def __init__(self, host: FakeHost, *, linked: bool = True) -> None:
        self.host = host
        self.wanted = host.sessions.create("sales", network="sandbox", now=START)
        self.folder = host.sessions.folder("sales")
        if linked:
            make_credentials(self.folder / "device.db")
        self.session = self.resume()

    def resume(self) -> ManagedSession:
        record = self.host.sessions.state("sales")
        self.session = ManagedSession(
            "sales", host=self.host, wanted=self.wanted, record=record, now=self.host.now
        )
        return self.session

    def want(self, **changes: Any) -> None:
        change: Callable[[Wanted], Wanted] = lambda wanted: replace(wanted, **changes)  # noqa: E731
        self.wanted = self.host.sessions.want("sales", change, now=self.host.wall())
        self.session.want(self.wanted, self.host.now)
        self.tick()

    def tick(self, after_s: float = 0.0) -> State:
        self.host.now += after_s
        self.session.hear(self.host.now)
        self.session.tick(self.host.now)
        return self.session.state

    def start(self) -> None:
        """From a stored state to connected."""
        self.want(why="start")
        self.say("started", pid=0)
        self.say("connecting")
        self.say("connected", jid="1:2@s", lid="3@lid", phone="1", push_name="Sales")

    def say(self, report: str, **facts: Any) -> State:
        assert self.host.far is not None
        self.host.far.send(report=report, **facts)
        return self.tick()

    def exit(self, ending: Ending | None, status: int = 0, *, was_locked: bool = False) -> State:
        process = self.session.process
        assert process is not None
        if ending is not None:
            self.say("ended", ending=ending.report())
        verdict = process.ending(status)
        self.session.on_exit(verdict, was_locked=was_locked, now=self.host.now)
        process.close()
        return self.tick()

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.host.spawned]

    @property
    def saved(self) -> Any:
        return self.host.sessions.state("sales")


def make_credentials(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE whatsmeow_device (jid TEXT, lid TEXT, push_name TEXT, platform TEXT)"
        )
        database.execute("INSERT INTO whatsmeow_device VALUES ('1:2@s', '3@lid', 'Sales', 'x')")
    database.close()


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(FakeHost(tmp_path))


def test_a_linked_session_dials_connects_and_names_the_generation(play: Play) -> None:
    play.start()
    assert play.session.state is State.CONNECTED
    assert play.saved.state == "connected"
    assert play.saved.generation == play.wanted.generation
    assert play.saved.phone == "1"
    assert play.host.logins == 1
    assert [payload["state"] for _, payload in play.host.events] == ["connecting", "connected"]


def test_a_session_never_linked_stays_unlinked_when_started(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    play.want(why="start")
    assert play.session.state is State.UNLINKED
    assert play.saved.generation == play.wanted.generation
    assert play.kinds == []


def test_a_loss_is_followed_by_attempts_after_3_6_12_s_then_failed_then_the_cool_down(
    play: Play,
) -> None:
    play.start()
    for wait_s in (3, 6, 12):
        assert play.exit(LOST) is State.RECONNECTING
        lost_at, dials = play.host.now, len(play.kinds)
        play.tick(wait_s - 1)
        assert len(play.kinds) == dials
        assert play.tick(0.99) is State.RECONNECTING
        assert play.host.spawned[dials:] == [("device", {"dial_at": lost_at + wait_s})]
        assert play.tick(0.02) is State.CONNECTING
    assert play.exit(LOST) is State.FAILED
    assert play.saved.reason == "wa-connection-failed"
    dials = len(play.kinds)
    play.tick(59)
    assert len(play.kinds) == dials
    play.tick(8)
    assert play.session.state is State.CONNECTING


def test_a_process_that_gets_ready_early_and_dies_counts_as_an_attempt(play: Play) -> None:
    play.start()
    play.exit(LOST)
    play.tick(2.9)
    assert play.exit(None, status=9) is State.RECONNECTING
    assert play.session.record.attempt == 2


def test_an_operators_command_ends_the_wait(play: Play) -> None:
    play.start()
    play.exit(LOST)
    play.want(why="start")
    assert play.session.state is State.CONNECTING


def test_stop_during_backoff_ends_the_wait_and_nothing_is_dialled(play: Play) -> None:
    play.start()
    play.exit(LOST)
    play.want(run="stop")
    assert play.session.state is State.STOPPED
    dials = len(play.kinds)
    play.tick(100)
    assert len(play.kinds) == dials


def test_stop_names_its_generation_when_the_process_is_gone(play: Play) -> None:
    play.start()
    play.want(run="stop")
    assert play.saved.generation < play.wanted.generation
    assert play.session.state is State.CONNECTED
    play.exit(Ending(EndingKind.STOPPED))
    assert play.saved.state == "stopped"
    assert play.saved.generation == play.wanted.generation


@pytest.mark.parametrize(
    "kind, reason, state",
    [
        (EndingKind.LOGGED_OUT, Reason.LOGGED_OUT, State.LOGGED_OUT),
        (EndingKind.LOGGED_OUT, Reason.MAIN_DEVICE_GONE, State.LOGGED_OUT),
        (EndingKind.REPLACED, Reason.STREAM_REPLACED, State.REPLACED),
        (EndingKind.OUTDATED, Reason.CLIENT_OUTDATED, State.OUTDATED),
    ],
)
def test_permanent_ends_are_never_dialled_again_nor_after_a_restart_of_the_supervisor(
    play: Play, kind: EndingKind, reason: Reason, state: State
) -> None:
    play.start()
    assert play.exit(Ending(kind, reason)) is state
    assert play.saved.reason == reason
    dials = len(play.kinds)
    play.tick(100_000)
    play.resume()
    assert play.tick(100_000) is state
    assert len(play.kinds) == dials


def test_a_ban_ends_by_itself_also_over_a_restart(play: Play) -> None:
    play.start()
    until = play.host.wall() + 600
    play.exit(Ending(EndingKind.BANNED, Reason.TEMPORARY_BAN, until=until))
    play.tick(300)
    assert play.resume().state is State.BANNED
    assert play.tick(299) is State.BANNED
    assert play.tick(2) is State.CONNECTING


def test_an_operator_may_start_a_replaced_session(play: Play) -> None:
    play.start()
    play.exit(Ending(EndingKind.REPLACED, Reason.STREAM_REPLACED))
    play.want(why="start")
    assert play.session.state is State.CONNECTING


def test_a_crash_counts_as_a_loss_with_its_own_reason(play: Play) -> None:
    play.start()
    assert play.exit(None, status=9) is State.RECONNECTING
    assert play.saved.reason == "process-crashed"


def test_another_process_on_the_session_is_ended_and_no_attempt_is_counted(play: Play) -> None:
    play.want(why="start")
    assert play.exit(Ending(EndingKind.CRASHED), was_locked=True) is State.CONNECTING
    assert play.host.freed == ["sales"]
    play.tick(1)
    assert play.kinds == ["device", "device"]
    assert play.session.record.attempt == 0


def test_beyond_max_sessions_it_waits_with_reason_capacity(play: Play) -> None:
    play.host.room = False
    play.want(why="start")
    assert (play.session.state, play.saved.reason) == (State.STOPPED, "capacity")
    assert play.saved.generation == play.wanted.generation
    play.host.room = True
    assert play.tick(1) is State.CONNECTING


def test_a_session_never_linked_asks_for_no_room(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    play.host.room = False
    play.want(why="start")
    assert play.session.state is State.UNLINKED
    assert play.saved.generation == play.wanted.generation


def test_a_link_of_a_session_that_has_no_room_is_answered_at_once(play: Play) -> None:
    play.want(run="stop")
    play.host.room = False
    link(play)
    assert play.saved.link["reason"] == "capacity"
    assert play.kinds == []


def test_a_start_is_not_refused_for_room_that_has_come_meanwhile(play: Play) -> None:
    play.host.room = False
    play.want(why="start")
    play.host.room, play.host.gate = True, False
    play.want(why="start")
    assert play.saved.generation < play.wanted.generation
    play.host.gate = True
    assert play.tick() is State.CONNECTING
    assert play.saved.generation == play.wanted.generation


def test_a_session_of_the_other_network_refuses_to_run(play: Play) -> None:
    play.wanted = replace(play.wanted, network="whatsapp")
    play.resume()
    play.tick(1)
    assert (play.session.state, play.saved.reason) == (State.STOPPED, "wrong-network")
    assert play.kinds == []


def link(play: Play, request: str = "r1", *, again: bool = False) -> None:
    asked = {"request": request, "method": "qr", "phone": None, "again": again}
    play.want(run="run", link=asked)


def test_linking_shows_codes_in_a_private_file_adopts_and_connects(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    link(play)
    assert play.session.state is State.LINKING
    assert play.host.spawned == [("pairing", {"method": "qr", "phone": None})]
    play.say("qr", code="first", expires_in_s=60, number=1)
    play.say("qr", code="second", expires_in_s=20, number=2)
    shown = json.loads((play.folder / "link.json").read_text())
    assert (shown["request"], shown["code"]) == ("r1", "second")
    assert shown["expires_at"] == play.host.wall() + 20
    assert (play.folder / "link.json").stat().st_mode & 0o777 == 0o600
    assert [payload for event, payload in play.host.events if event is Event.QR] == [
        {"number": 1},
        {"number": 2},
    ], "a code must never leave the host"
    play.say("paired", jid="1:2@s")
    make_credentials(play.folder / "pairing.db")
    assert play.exit(Ending(EndingKind.LINKED)) is State.CONNECTING
    assert not (play.folder / "link.json").exists()
    assert not (play.folder / "pairing.db").exists()
    play.say("connected", jid="1:2@s", phone="1")
    assert play.saved.link == {"request": "r1", "result": "linked", "reason": None, "sentence": ""}


def test_a_link_that_nobody_scans_ends_at_its_deadline_and_another_may_start(
    tmp_path: Path,
) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    link(play)
    play.tick(181)
    process = play.session.process
    assert process is not None and process.is_ending
    assert play.exit(None, status=9) is State.UNLINKED
    assert play.saved.link["reason"] == "qr-expired"
    assert play.saved.reason == "qr-expired"
    link(play, "r2")
    assert play.session.state is State.LINKING


def test_a_pairing_code_that_nobody_types_is_not_called_a_qr_code(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    asked = {"request": "r1", "method": "phone", "phone": "5511999990009", "again": False}
    play.want(run="run", link=asked)
    play.tick(181)
    assert play.exit(None, status=9) is State.UNLINKED
    assert play.saved.link["reason"] == play.saved.reason == "qr-expired"
    said = play.saved.link["sentence"]
    assert "QR" not in said and said.endswith("link sales --phone +5511999990009")
    assert play.saved.sentence == said


def test_a_new_link_request_replaces_the_one_under_way(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    link(play)
    link(play, "r2")
    assert play.saved.link["request"] == "r1"
    play.exit(None, status=9)
    play.tick()
    assert play.kinds == ["pairing", "pairing"]
    assert play.saved.link["request"] == "r1", "the second is under way still"


def test_a_connected_session_is_linked_at_once_unless_again(play: Play) -> None:
    play.start()
    link(play)
    assert play.saved.link["result"] == "linked"
    assert play.kinds == ["device"]
    link(play, "r2", again=True)
    play.exit(Ending(EndingKind.STOPPED))
    assert play.kinds == ["device", "pairing"]
    assert play.session.state is State.LINKING


def test_a_failed_relink_leaves_the_old_credentials_in_service(play: Play) -> None:
    play.start()
    link(play, again=True)
    play.exit(Ending(EndingKind.STOPPED))
    play.exit(Ending(EndingKind.LINK_FAILED, Reason.QR_EXPIRED))
    play.tick()
    assert play.session.state is State.CONNECTING
    assert play.kinds == ["device", "pairing", "device"]


def test_a_link_whose_logins_all_fail_is_answered_when_the_attempts_are_spent(play: Play) -> None:
    link(play)
    for _ in range(4):
        play.exit(LOST)
        play.tick(12.1)
    assert play.saved.link["reason"] == "wa-connection-failed"


def test_a_session_that_cannot_run_says_why_and_what_helps(play: Play) -> None:
    remedy = "the credentials are damaged; link it again: whatsapp-worker link sales --again"
    link(play)
    for _ in range(4):
        play.exit(refused(remedy))
        assert play.saved.sentence == f"This host cannot run the session: {remedy}"
        play.tick(12.1)
    assert play.saved.link["reason"] == "cannot-run"
    assert play.saved.link["sentence"].endswith(remedy)


def test_a_failed_relink_of_a_logged_out_session_leaves_it_logged_out(play: Play) -> None:
    play.start()
    play.exit(Ending(EndingKind.LOGGED_OUT, Reason.LOGGED_OUT))
    link(play)
    play.exit(Ending(EndingKind.LINK_FAILED, Reason.QR_EXPIRED))
    assert (play.session.state, play.saved.reason) == (State.LOGGED_OUT, "wa-logged-out")


def test_a_link_of_a_session_whose_credentials_turn_out_dead_pairs_anew(play: Play) -> None:
    link(play)
    assert play.kinds == ["device"]
    play.exit(Ending(EndingKind.LOGGED_OUT, Reason.LOGGED_OUT))
    assert play.kinds == ["device", "pairing"]
    assert play.session.state is State.LINKING


def test_a_link_request_that_waited_longer_than_an_attempt_is_answered_not_served(
    tmp_path: Path,
) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    change: Callable[[Wanted], Wanted] = lambda wanted: replace(  # noqa: E731
        wanted, link={"request": "old", "method": "qr"}
    )
    play.wanted = play.host.sessions.want("sales", change, now=play.host.wall())
    play.host.now += 1000
    play.resume()
    play.tick()
    assert play.kinds == []
    assert play.saved.link["result"] == "failed"


def test_a_link_under_way_is_taken_up_by_the_next_supervisor(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    link(play)
    play.host.now += 5
    play.resume()
    play.tick()
    assert play.session.state is State.LINKING
    assert play.kinds == ["pairing", "pairing"]


def test_logout_of_a_connected_session_orders_it_and_ends_logged_out(play: Play) -> None:
    play.start()
    play.want(logout="l1")
    assert orders(play) == [{"order": "logout"}]
    play.exit(Ending(EndingKind.LOGGED_OUT, Reason.LOGGED_OUT))
    assert play.saved.state == "logged_out"
    assert play.saved.generation == play.wanted.generation


def test_logout_of_a_failed_session_dials_for_it(play: Play) -> None:
    play.start()
    for _ in range(4):
        play.exit(LOST)
        play.tick(20)
    play.want(logout="l1")
    play.tick()
    assert orders(play) == [{"order": "logout"}]


def ask(play: Play, **changes: Any) -> None:
    """What a command writes, before the supervisor looks."""
    play.wanted = play.host.sessions.want(
        "sales", lambda wanted: replace(wanted, **changes), now=play.host.wall()
    )


LINK = {"request": "r1", "method": "qr", "phone": None, "again": False}


def test_a_logout_that_was_asked_for_after_a_link_is_done_instead(play: Play) -> None:
    play.start()
    ask(play, link=LINK)
    play.want(logout="l1")
    assert (play.saved.link["result"], play.saved.link["reason"]) == ("failed", "operator")
    assert orders(play) == [{"order": "logout"}]
    play.exit(Ending(EndingKind.LOGGED_OUT, Reason.LOGGED_OUT))
    assert play.saved.generation == play.wanted.generation


def test_a_link_and_a_restart_at_one_look_are_both_done(play: Play) -> None:
    play.start()
    ask(play, link=LINK)
    play.want(restart="x1")
    assert play.saved.link["result"] == "linked"
    assert orders(play)[-1]["order"] == "stop"
    play.exit(Ending(EndingKind.STOPPED))
    play.say("connected")
    play.want(why="start")
    assert orders(play) == [], "once"
    assert play.kinds == ["device", "device"]


@pytest.mark.parametrize("is_running", [True, False])
def test_what_a_stop_superseded_is_not_done_when_the_session_starts_again(
    tmp_path: Path, is_running: bool
) -> None:
    play = Play(FakeHost(tmp_path))
    if is_running:
        play.start()
    ask(play, link={**LINK, "again": True}, logout="l1", restart="x1")
    if is_running:
        play.want(run="stop")
        play.exit(Ending(EndingKind.STOPPED))
    else:
        ask(play, run="stop")
        play.resume()
        play.tick()
    assert (play.saved.link["result"], play.saved.link["reason"]) == ("failed", "operator")
    play.want(run="run")
    assert play.kinds[-1] == "device"
    assert orders(play) == []
    play.say("connected")
    assert not play.session.is_logging_out


def test_what_was_asked_for_on_the_other_network_is_not_done_later(play: Play) -> None:
    play.want(network="whatsapp")
    play.want(logout="l1")
    play.want(network="sandbox", why="start")
    assert play.tick() is State.CONNECTING
    assert orders(play) == []


def test_a_logout_ends_a_link_under_way(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    link(play)
    play.want(logout="l1")
    assert play.saved.link["reason"] == "operator"
    assert play.exit(None, status=9) is State.UNLINKED
    assert play.saved.generation == play.wanted.generation
    assert not play.session.is_logging_out


def orders(play: Play) -> list[dict[str, Any]]:
    assert play.host.far is not None
    return play.host.far.receive() or []


def test_delete_of_a_connected_session_logs_out_first(play: Play) -> None:
    play.start()
    play.want(run="delete", why="delete")
    assert play.session.state is State.DELETED
    assert orders(play) == [{"order": "logout"}]
    assert not play.host.deleted
    play.exit(Ending(EndingKind.LOGGED_OUT, Reason.LOGGED_OUT))
    assert play.host.deleted == ["delete"]
    assert play.session.is_gone


def test_delete_offline_tries_for_thirty_seconds_then_says_that_the_phone_still_lists_it(
    play: Play,
) -> None:
    play.start()
    play.exit(LOST)
    play.want(run="delete", why="delete")
    while play.host.now < 30:
        assert not play.host.deleted
        if play.session.process is not None:
            play.exit(LOST)
        play.tick(1)
    assert 2 <= len(play.kinds) <= 12
    if play.session.process is not None:
        play.exit(LOST)
    play.tick(1)
    assert "phone still lists" in play.host.deleted[0]


def test_delete_of_a_session_never_linked_takes_no_time(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    play.want(run="delete", why="delete")
    assert play.host.deleted == ["delete"]
    assert play.kinds == []


def test_a_phone_that_accepts_in_the_last_second_has_time_to_log_in(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    link(play)
    play.tick(179)
    play.say("paired", jid="1:2@s")
    make_credentials(play.folder / "pairing.db")
    play.tick(2)
    assert play.exit(Ending(EndingKind.LINKED)) is State.CONNECTING
    assert play.saved.link is None
    play.tick(2)
    play.say("connected", jid="1:2@s", phone="1")
    assert play.saved.link["result"] == "linked"


def test_a_look_at_the_lock_does_not_spoil_a_link(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    link(play)
    play.say("paired", jid="1:2@s")
    make_credentials(play.folder / "pairing.db")
    lock = play.host.sessions.session_lock("sales")
    lock.acquire()
    threading.Timer(0.2, lock.release).start()
    assert play.exit(Ending(EndingKind.LINKED)) is State.CONNECTING


def test_a_link_given_up_by_its_operator_says_how_to_link(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    link(play)
    play.want(link=None)
    play.exit(None, status=9)
    assert (play.session.state, play.saved.reason) == (State.UNLINKED, "operator")
    assert play.saved.sentence.endswith("whatsapp-worker link sales")


def test_a_session_without_credentials_says_how_to_link(tmp_path: Path) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    play.want(run="stop")
    assert play.session.state is State.STOPPED
    play.want(run="run")
    assert play.session.state is State.UNLINKED
    assert play.saved.sentence.endswith("whatsapp-worker link sales")


def test_a_link_of_a_session_of_the_other_network_is_answered_at_once(play: Play) -> None:
    play.want(network="whatsapp")
    link(play, again=True)
    assert play.saved.link["reason"] == "wrong-network"
    assert play.kinds == []


def test_a_code_that_cannot_be_written_does_not_cost_what_is_said_after_it(
    tmp_path: Path,
) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    link(play)
    assert play.host.far is not None and play.session.process is not None
    (play.folder / "link.json.tmp").mkdir()  # neither removed nor written
    play.host.far.send(report="qr", code="first", expires_in_s=60, number=1)
    play.host.far.send(report="paired", jid="1:2@s")
    make_credentials(play.folder / "pairing.db")
    play.tick()
    assert play.exit(None, status=9) is State.CONNECTING, "it was paired"


def test_a_session_of_the_other_network_is_deleted_without_a_dial(play: Play) -> None:
    play.want(network="whatsapp")
    play.want(run="delete", why="delete")
    assert play.kinds == []
    assert "phone still lists" in play.host.deleted[0]


def test_start_is_not_answered_by_the_connection_that_a_stop_is_ending(play: Play) -> None:
    play.start()
    play.want(run="stop")
    play.want(run="run")
    assert play.session.state is State.CONNECTED
    assert play.saved.generation < play.wanted.generation
    play.exit(Ending(EndingKind.STOPPED))
    play.say("connected")
    assert play.saved.generation == play.wanted.generation


def test_a_session_that_waits_for_room_tells_of_no_attempt(play: Play) -> None:
    play.start()
    play.exit(LOST)
    play.host.room = False
    play.tick(3)
    assert (play.saved.reason, play.saved.attempt) == ("capacity", 0)
    assert play.saved.next_attempt_at is None


def test_a_held_session_is_told_once_not_all_the_time(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    with play.host.sessions.session_lock("sales"):
        play.want(why="start")
        for _ in range(20):
            play.tick(1)
    assert [record.message for record in caplog.records].count("session.held") == 1
    assert len(play.host.freed) > 10
    assert play.tick(1) is State.CONNECTING


def test_silence_is_a_hang_and_ends_in_sigterm_then_a_new_attempt(play: Play) -> None:
    play.start()
    play.tick(121)
    process = play.session.process
    assert process is not None and process.is_ending
    play.exit(None, status=15)
    assert play.saved.reason == "process-hung"


def test_a_heartbeat_whose_loop_stands_still_is_a_hang(play: Play) -> None:
    play.start()
    play.say("heartbeat", loop_age_s=1, consumer_age_s=121)
    process = play.session.process
    assert process is not None and process.is_ending


def test_a_deaf_connection_is_degraded_then_recycled(play: Play) -> None:
    play.start()
    play.say("heartbeat", degraded=True, proof_of_life_age_s=45)
    play.tick(5)
    assert play.saved.degraded
    play.say("heartbeat", degraded=True, proof_of_life_age_s=125)
    play.exit(None, status=15)
    assert play.saved.reason == "wa-keepalive-timeout"


def test_a_big_process_is_recycled_when_idle_and_forced_at_one_and_a_half(play: Play) -> None:
    play.start()
    play.tick(11)
    play.say("heartbeat", rss_mib=600, idle=False)
    process = play.session.process
    assert process is not None and not process.is_ending
    play.say("heartbeat", rss_mib=600, idle=True)
    assert process.is_ending
    assert orders(play)[-1]["order"] == "stop"
    assert play.exit(Ending(EndingKind.STOPPED)) is State.CONNECTING
    play.say("started", pid=0)
    play.say("connected")
    play.say("heartbeat", rss_mib=760, idle=False)
    assert play.exit(None, status=15) is State.RECONNECTING
    assert play.saved.reason == "memory-limit"


def test_one_that_is_too_big_from_the_start_is_recycled_less_and_less_often(play: Play) -> None:
    play.start()
    ages = []
    for _ in range(4):
        process = play.session.process
        assert process is not None
        born_at = play.host.now
        while not process.is_ending:
            play.tick(1)
            play.say("heartbeat", rss_mib=600, idle=True)
        ages.append(play.host.now - born_at)
        play.exit(Ending(EndingKind.STOPPED))
        play.say("connected")
    assert ages == [11, 21, 41, 81]


def test_a_process_that_runs_out_of_open_files_is_recycled_when_idle(play: Play) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    play.start()
    play.tick(11)
    play.say("heartbeat", fds=int(limit * 0.79), idle=True)
    process = play.session.process
    assert process is not None and not process.is_ending
    play.say("heartbeat", fds=int(limit * 0.81), idle=True)
    assert process.is_ending


def test_a_process_that_ran_longer_than_a_day_is_recycled_in_a_quiet_moment_and_dials_at_once(
    play: Play,
) -> None:
    play.start()
    for _ in range(30 * 60 + 1):
        play.tick(60)
        play.say("heartbeat", idle=False)
    process = play.session.process
    assert process is not None and not process.is_ending
    play.say("heartbeat", idle=True)
    assert process.is_ending
    assert play.exit(Ending(EndingKind.STOPPED)) is State.CONNECTING
    assert play.kinds == ["device", "device"]


def test_restart_replaces_the_process_and_then_names_its_generation(play: Play) -> None:
    play.start()
    play.want(restart="x1")
    assert play.saved.generation < play.wanted.generation
    play.exit(Ending(EndingKind.STOPPED))
    assert play.kinds == ["device", "device"]
    assert play.saved.generation == play.wanted.generation


def test_a_canarys_failure_counts_nothing(play: Play) -> None:
    play.start()
    for _ in range(4):
        play.exit(LOST)
        if play.session.state is not State.FAILED:
            play.tick(20)
    assert play.session.state is State.FAILED
    due_at = play.session.due_at
    assert play.session.dial(play.host.now, as_canary=True)
    play.exit(LOST)
    assert play.session.state is State.FAILED
    assert play.session.due_at == due_at


def test_a_full_disk_costs_the_record_and_not_the_session(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage.errors import DocumentUnwritable

    def refuse(*_: object) -> None:
        raise DocumentUnwritable(Path("x"), "disk full")

    play.start()
    with monkeypatch.context() as patch:
        patch.setattr(Sessions, "put_state", refuse)
        assert play.exit(LOST) is State.RECONNECTING
    play.tick(6)
    assert play.saved.state == "connecting"


def test_what_changes_all_the_time_is_written_at_most_every_few_seconds(play: Play) -> None:
    play.start()
    path = play.folder / "state.json"
    written = path.stat().st_ino
    for age_s in range(4):
        play.say("heartbeat", rss_mib=50 + age_s, proof_of_life_age_s=0)
        play.tick(1)
    assert path.stat().st_ino == written
    play.tick(5)
    assert path.stat().st_ino != written
    assert play.saved.rss_mib == 53


def test_a_slow_disk_is_written_to_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = Play(FakeHost(tmp_path, max_sessions=100))
    play.start()
    write, written_at, seconds = Sessions.put_state, [], 0.0
    clock = SimpleNamespace(monotonic=lambda: seconds)
    monkeypatch.setattr(session_status, "time", clock)

    def slowly(*args: Any) -> None:
        nonlocal seconds
        seconds += 0.03
        written_at.append(play.host.now)
        write(*args)

    monkeypatch.setattr(Sessions, "put_state", slowly)
    for second in range(100):
        play.say("heartbeat", rss_mib=second, proof_of_life_age_s=0)
        play.tick(1)
    assert 2 <= len(written_at) <= 4, "each takes 30 ms, and a hundred sessions may do so"
    play.exit(LOST)
    assert play.saved.state == "reconnecting", "a state is written at once"


def test_a_connected_session_whose_credentials_are_gone_is_unlinked_once_its_process_ends(
    play: Play,
) -> None:
    play.start()
    play.want(restart="x1")
    (play.folder / "device.db").unlink()
    assert play.exit(Ending(EndingKind.STOPPED)) is State.UNLINKED
    assert (play.saved.state, play.saved.pid) == ("unlinked", None)
    assert play.saved.generation == play.wanted.generation
    link(play)
    assert play.session.state is State.LINKING


def test_a_logout_that_nobody_confirmed_though_the_credentials_are_gone_ends_unlinked(
    play: Play,
) -> None:
    play.start()
    play.want(logout="l1")
    with sqlite3.connect(play.folder / "device.db") as database:
        database.execute("DELETE FROM whatsmeow_device")
    database.close()
    assert play.exit(Ending(EndingKind.STOPPED)) is State.UNLINKED
    assert play.saved.generation == play.wanted.generation


@pytest.mark.parametrize("state", sorted(set(State) - {State.DELETED}))
def test_a_session_without_credentials_comes_to_rest_whatever_it_was(
    tmp_path: Path, state: State
) -> None:
    play = Play(FakeHost(tmp_path), linked=False)
    play.host.sessions.put_state("sales", replace(play.session.record, state=state))
    play.resume()
    play.want(why="start")
    rests_in = state if state is State.LOGGED_OUT else State.UNLINKED
    assert play.tick(1) is rests_in
    assert play.saved.generation == play.wanted.generation
    assert play.kinds == []


def test_a_session_without_a_process_is_not_called_connected_while_it_waits_for_the_next(
    play: Play,
) -> None:
    play.start()
    play.host.gate = False
    play.want(restart="x1")
    assert play.exit(Ending(EndingKind.STOPPED)) is State.CONNECTING
    assert (play.saved.state, play.saved.pid) == ("connecting", None)
    play.host.gate = True
    play.tick(1)
    assert play.say("connected") is State.CONNECTED
    states = [payload["state"] for _, payload in play.host.events]
    assert states == ["connecting", "connected"] * 2, "each is told once"


def test_the_login_after_a_logout_that_was_refused_is_noticed(play: Play) -> None:
    play.start()
    play.want(logout="l1")
    play.exit(Ending(EndingKind.STOPPED))
    play.tick(2.5)  # the process is there, early
    play.tick(1)
    assert play.say("connected") is State.CONNECTED
    assert play.host.logins == 2
    assert play.session.due_at is None


def test_a_session_that_could_not_pair_in_time_goes_on_with_its_old_credentials(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    play.start()
    with monkeypatch.context() as patch:
        patch.setattr(play.host, "spawn", lambda *_: None)
        link(play, again=True)
        assert play.exit(Ending(EndingKind.STOPPED)) is State.CONNECTING
        play.tick(181)
        assert play.saved.link["result"] == "failed"
    play.tick(1)
    assert play.kinds == ["device", "device"]


def test_a_link_is_not_answered_by_the_connection_of_an_earlier_supervisor(play: Play) -> None:
    play.start()
    asked = {"request": "r1", "method": "qr", "phone": None, "again": False}
    play.wanted = play.host.sessions.want(
        "sales", lambda wanted: replace(wanted, link=asked), now=play.host.wall()
    )
    play.resume()
    assert play.tick() is State.CONNECTING
    assert play.saved.link is None
    play.say("connected", phone="1")
    assert play.saved.link["result"] == "linked"


def test_a_supervisor_that_leaves_calls_nothing_connected(play: Play) -> None:
    play.start()
    play.session.leave(play.host.now, drain_s=8)
    play.exit(Ending(EndingKind.STOPPED))
    play.session.left(play.host.now)
    assert play.saved.state == "stopped"
    play.session = play.resume()
    assert play.tick() is State.CONNECTING


def test_garbage_on_the_channel_ends_the_process(play: Play) -> None:
    play.start()
    assert play.host.far is not None
    sock = socket.socket(fileno=play.host.far.fileno())
    sock.send(b"garbage\n")
    play.tick()
    process = play.session.process
    assert process is not None and process.is_ending
    sock.detach()
