"""Lost connections, counted where they count: at the server that is dialled."""

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from ingest import Ingest
from world import World, eventually

from storage.sessions import Sessions

# What is done to each session of the story, all at the same moment.
FATES: dict[str, dict[str, Any]] = {
    "refused": {"refuse": True},
    "replaced": {"conflict": "replaced"},
    "removed": {"conflict": "device_removed"},
    "gone": {"failure": 403},
    "barred": {"failure": 406},  # a ban for good
    "outdated": {"failure": 405},
    "banned": {"failure": 402, "expire": 8},
    "crashed": {"failure": 413, "count": 1},
    "busy": {"failure": 503, "count": 1},
    "dropped": {},
}
WATCHED_S = 34.0
GAP_S = 2.0  # between two attempts at the least; whatsmeow's own second dial comes after 0.3 s
LATE_S = 1.5  # of a busy machine, and less than what one wait has more than another


@dataclass
class Story:
    """What happened to every session within WATCHED_S of its fate."""

    world: World
    began_at: float
    dials: dict[str, list[float]] = field(default_factory=dict)  # seconds after the loss
    tries: dict[str, list[float]] = field(default_factory=dict)  # when the supervisor began each
    states: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)
    alerts: list[tuple[str, str, str, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    ingest = Ingest().start()
    folder = tmp_path_factory.mktemp("story")
    world = World(folder, FAILED_COOLDOWN_S="4", SENTRY_DSN=ingest.dsn)
    for name in ("RECONNECT_WAITS_S", "RECONNECT_JITTER_S"):
        del world.environ[name]  # the real ones: 3, 6, 12 s and at most 0.25 s more
    try:
        world.start()
        phones = {name: world.link(name) for name in FATES}
        found = Story(world, time.time())
        for name, fate in FATES.items():
            befall(world, phones[name], **fate)
        time.sleep(max(0.0, found.began_at + WATCHED_S - time.time()))
        for name, phone in phones.items():
            note(found, name, phone)
        eventually(
            lambda: (
                note(found, "refused", phones["refused"])
                or (len(series_of(found)) > 5 and len(found.tries["refused"]) > 4)
            ),
            what="the second attempt of the second series",
        )
        found.alerts = alerts_of(ingest)
        yield found
    finally:
        world.close()
        ingest.close()
        print(world.logs())


def alerts_of(ingest: Ingest) -> list[tuple[str, str, str, str]]:
    """Of every event that Sentry got: level, event, session and state."""
    return sorted(
        (event["level"], tags["event"], tags.get("session", ""), tags.get("state", ""))
        for event in ingest.events
        for tags in [event["tags"]]
    )


def befall(
    world: World,
    phone: str,
    *,
    refuse: bool = False,
    conflict: Any = None,
    failure: int | None = None,
    expire: int | None = None,
    count: int | None = None,
) -> None:
    if refuse:
        world.control.refuse(phone)
    if failure is not None:
        world.control.connect_failure(failure, phone, expire=expire, count=count)
    if conflict is not None:
        world.control.stream_error(phone, conflict=conflict)
    else:
        world.control.drop(phone)


def note(story: Story, name: str, phone: str) -> None:
    attempts = list(story.world.control.connections(phone))
    lost = [a["ended_at"] for a in attempts if a["reached"] == "connected" and a["ended_at"]]
    lost_at = next(at for at in lost if at >= story.began_at - 0.1)
    story.dials[name] = [a["at"] - lost_at for a in attempts if a["at"] > lost_at]
    events = map(json.loads, (_folder(story, name) / "history.jsonl").read_text().splitlines())
    changes = [
        event
        for event in events
        if event["event"] == "session.state_changed" and event["at"] >= story.began_at
    ]
    story.states[name] = [(event["state"], event["reason"]) for event in changes]
    story.tries[name] = [e["at"] - lost_at for e in changes if e["state"] == "connecting"]
    story.sentences[name] = story.world.state(name)["sentence"]


def _folder(story: Story, name: str) -> Path:
    return story.world.data / "sessions" / name


def test_the_waits_are_3_6_and_12_seconds_with_no_dial_but_whatsmeows_own_first(
    story: Story,
) -> None:
    first, *attempts = series_of(story)
    assert 0 < len(first) <= 2 and first[0] < 2.0  # whatsmeow's own, at once after the loss
    ends = [0.0, *(attempt[-1] for attempt in attempts)]
    for number, (end, wait_s) in enumerate(zip(ends, (3, 6, 12), strict=False)):
        assert wait_s - 0.1 <= attempts[number][0] - end, story.dials["refused"]
        assert begun(story, number) - end <= wait_s + 0.25 + LATE_S, (story.tries, story.dials)


def series_of(story: Story) -> list[list[float]]:
    """The dials of the refused session, whatsmeow's own first, then one list an attempt: after a
    login that is cut off whatsmeow dials once more by itself, before its process can end."""
    series: list[list[float]] = []
    for at in story.dials["refused"]:
        if series and at - series[-1][-1] < GAP_S:
            series[-1].append(at)
        else:
            series.append([at])
    assert all(len(attempt) <= 2 for attempt in series), series
    return series


def begun(story: Story, number: int) -> float:
    """When an attempt began: its dial, or the supervisor's word for it where that came sooner. Each
    may be late on a busy machine: neonize has to be loaded, and the supervisor's turn to come."""
    return min(series_of(story)[1 + number][0], story.tries["refused"][number])


def test_after_three_attempts_it_failed_and_the_cool_down_begins_the_next_series(
    story: Story,
) -> None:
    words = story.states["refused"]
    assert [word for word, _ in words[:7]] == ["reconnecting", "connecting"] * 3 + ["failed"]
    _, _, second, third, fourth, fifth = series_of(story)[:6]
    assert third[0] - second[-1] > 11
    assert fourth[0] - third[-1] >= 4 - 0.1
    assert begun(story, 3) - third[-1] <= 4.4 + LATE_S
    # The cool-down stood in the place of the first wait: 6 s come next.
    assert fifth[0] - fourth[-1] >= 6 - 0.1
    assert begun(story, 4) - fourth[-1] <= 6.25 + LATE_S


@pytest.mark.parametrize(
    "name, state, reason, words",
    [
        ("replaced", "replaced", "wa-stream-replaced", "Stop the other one"),
        ("removed", "logged_out", "wa-logged-out", "whatsapp-worker link removed"),
        ("gone", "logged_out", "wa-main-device-gone", "whatsapp-worker link gone"),
        ("barred", "logged_out", "wa-logged-out", "whatsapp-worker link barred"),
        ("outdated", "outdated", "wa-client-outdated", "Upgrade neonize"),
    ],
)
def test_what_only_a_person_can_mend_is_said_and_never_dialled_again(
    story: Story, name: str, state: str, reason: str, words: str
) -> None:
    assert story.states[name][-1] == (state, reason)
    assert words in story.sentences[name]
    assert story.world.state(name)["pid"] is None
    # One dial: whatsmeow's own after the loss, or ours, which got the refusal.
    assert len(story.dials[name]) <= (0 if name in ("replaced", "removed") else 1)


def test_a_temporary_ban_is_told_and_ends_by_itself(story: Story) -> None:
    states = story.states["banned"]
    assert ("banned", "wa-temporary-ban") in states
    assert states[-1] == ("connected", None)
    first, *later = story.dials["banned"]
    assert len(later) == 1
    assert later[0] - first >= 7 and story.tries["banned"][-1] - first <= 11, "it lasted 8 s"


@pytest.mark.parametrize("name", ["crashed", "busy", "dropped"])
def test_what_heals_by_itself_is_connected_again(story: Story, name: str) -> None:
    assert story.states[name][-1] == ("connected", None)
    assert story.world.state(name)["attempt"] == 0


def test_whoever_ended_for_good_is_one_alert_and_what_heals_is_none(story: Story) -> None:
    assert story.alerts == [
        ("error", "session.ended", "barred", "logged_out"),
        ("error", "session.ended", "gone", "logged_out"),
        ("error", "session.ended", "outdated", "outdated"),
        ("error", "session.ended", "removed", "logged_out"),
        ("error", "session.ended", "replaced", "replaced"),
    ]


def test_a_crash_is_told_as_a_crash_and_costs_no_other_session(story: Story) -> None:
    assert ("reconnecting", "process-crashed") in story.states["crashed"]
    assert "process-crashed" not in {reason for _, reason in story.states["dropped"]}
    said = story.world.run("logs", "crashed", "--errors").stdout
    assert "process.crashed" in said and "\npanic: " in said


def test_whom_the_server_takes_back_gets_its_queue_done(story: Story) -> None:
    story.world.control.remove_fault()
    job = story.world.enqueue("refused", "5521988880001", "at last", "m1")
    done = story.world.run("start", "refused", "--json")
    assert json.loads(done.stdout)["state"] == "connected", done.stderr
    assert story.world.await_outcomes([job])[0]["status"] == "sent"


def test_with_no_cool_down_failed_is_final_and_alerts_even_after_a_ban(tmp_path: Path) -> None:
    environ = {"FAILED_COOLDOWN_S": "0", "RECONNECT_WAITS_S": "0.1,0.1,0.1"}
    with (
        closing(Ingest().start()) as ingest,
        World.running(tmp_path, SENTRY_DSN=ingest.dsn, **environ) as world,
    ):
        phone = world.link("sales")
        world.control.connect_failure(402, phone, expire=3)
        world.control.drop(phone)
        world.await_state("sales", "banned")
        world.control.refuse(phone)
        world.await_state("sales", "failed")
        dials = len(world.control.connections(phone))
        ingest.await_events(1)
        time.sleep(4)
        assert len(world.control.connections(phone)) == dials
        assert world.state("sales")["next_attempt_at"] is None
        assert alerts_of(ingest) == [("error", "session.ended", "sales", "failed")]
        world.control.remove_fault()
        assert json.loads(world.run("start", "sales", "--json").stdout)["state"] == "connected"


SESSIONS = 8
OUTAGE_S = 30.0


def test_an_outage_of_the_host_is_one_canarys_business_and_ends_within_seconds(
    tmp_path: Path,
) -> None:
    names = [f"s{n}" for n in range(SESSIONS)]
    with World.running(tmp_path, FAILED_COOLDOWN_S="300") as world:
        for name in names:
            world.link(name)
        world.control.refuse()
        world.control.drop()
        for name in names:
            world.await_state(name, "failed", within_s=30)
        began_at, since = time.monotonic(), _last_seq(world)
        time.sleep(OUTAGE_S)
        dials = len(world.control.connections(since=since))
        # Every canary's process dials once itself; whatsmeow may add one of its own.
        assert 2 <= dials <= 2 * (OUTAGE_S / 10 + 1), "a storm, or no canary"
        world.control.remove_fault()
        ended_at = time.monotonic()
        for name in names:
            world.await_state(name, "connected", within_s=25)
        print(f"outage {ended_at - began_at:.0f} s, back in {time.monotonic() - ended_at:.1f} s")
        assert _most_at_once(world, _last_seq(world, before=ended_at)) <= 8


def _last_seq(world: World, *, before: float = float("inf")) -> int:
    rows = [row for row in world.control.connections() if row["monotonic"] < before]
    return int(rows[-1]["seq"])


def _most_at_once(world: World, since: int) -> int:
    """Attempts that began within the same 300 ms, which is what a login takes."""
    starts = sorted(row["monotonic"] for row in world.control.connections(since=since))
    return max(sum(at <= other < at + 0.3 for other in starts) for at in starts)


def test_a_process_that_grows_is_recycled_and_the_queue_does_not_notice(tmp_path: Path) -> None:
    with World.running(tmp_path, HEALTH_CHECK_INTERVAL_S="0.5") as world:
        phone = world.link("sales")
        pid = world.await_state("sales", "connected")["pid"]
        rss_mib = eventually(lambda: _told_truly(world, pid), what="its size is told")
        assert world.supervisor is not None
        world.supervisor.terminate()
        world.supervisor.wait(15)
        world.environ["MEMORY_LIMIT_MIB"] = str(int(rss_mib * 0.85))
        world.start_supervisor()
        pid = eventually(lambda: world.state("sales")["pid"])
        eventually(lambda: world.state("sales")["pid"] not in (None, pid), within_s=30)
        jobs = [world.enqueue("sales", "5521988880001", f"{n}", f"m{n}") for n in range(20)]
        assert {o["status"] for o in world.await_outcomes(jobs)} == {"sent"}
        assert [row["text"] for row in world.arrived(sender=phone)] == [f"{n}" for n in range(20)]
        reasons = (world.data / "sessions/sales/history.jsonl").read_text()
        assert "memory-limit" in reasons
        # It goes on growing and being recycled: the first that nothing else on the machine slows.
        eventually(lambda: _last_gap_s(world, phone) < 2, what="a recycling costs under 2 s")


def _told_truly(world: World, pid: int) -> float | None:
    """What its state says of the process's memory, once that is what it has."""
    told: float = world.state("sales")["rss_mib"] or 0.0
    return told if abs(told - psutil.Process(pid).memory_info().rss / 2**20) < 5 else None


def _last_gap_s(world: World, phone: str) -> float:
    """How long nobody was connected before the last login."""
    rows = [row for row in world.control.connections(phone) if row["reached"] == "connected"]
    return float(rows[-1]["at"] - (rows[-2]["ended_at"] or 0))


def test_ten_quick_losses_are_flapping_and_end_in_a_cool_down(tmp_path: Path) -> None:
    with World.running(tmp_path, FAILED_COOLDOWN_S="4", RECONNECT_WAITS_S="0.1,0.1,0.1") as world:
        phone = world.link("sales")
        for _ in range(9):
            _lose(world, phone)
            world.await_state("sales", "connected")
        _lose(world, phone)
        state = world.await_state("sales", "failed")
        assert state["reason"] == "flapping" and "again and again" in state["sentence"]
        dials = len(world.control.connections(phone))
        failed_at = time.time()
        world.await_state("sales", "connected")
        assert time.time() - failed_at > 3
        assert len(world.control.connections(phone)) == dials + 1


def _lose(world: World, phone: str) -> None:
    """Cut the connection; returns when the supervisor knows."""
    since = world.state("sales")["since"]
    world.control.drop(phone)
    eventually(lambda: world.state("sales")["since"] != since, what="the loss is seen")


def test_two_clients_with_the_same_credentials_never_fight(tmp_path: Path) -> None:
    with World.running(tmp_path, FAILED_COOLDOWN_S="1") as world:
        phone = world.link("sales")
        since = _last_seq(world)
        _run_copy(world, "sales", "twin")
        time.sleep(WATCHED_REPLACED_S)
        states = {name: world.state(name) for name in ("sales", "twin")}
        replaced = [name for name, state in states.items() if state["state"] == "replaced"]
        connected = [name for name, state in states.items() if state["state"] == "connected"]
        assert (replaced, connected) == (["sales"], ["twin"])
        assert "Stop the other one" in states["sales"]["sentence"]
        assert states["sales"]["pid"] is None
        assert world.states_told().count("replaced") == 1
        dials = world.control.connections(since=since)
        assert [dial["phone"] for dial in dials] == [phone], "the twin's one login, and no answer"
        [device] = world.control.devices(phone)
        assert device["online"]


WATCHED_REPLACED_S = 10.0


def _run_copy(world: World, session: str, twin: str) -> None:
    """Run the same credentials under another name, as a restored backup would."""
    sessions = Sessions(world.data)
    sessions.create(twin, network="sandbox", now=time.time())
    folder, copy = sessions.folder(session), sessions.folder(twin)
    with (
        closing(sqlite3.connect(folder / "device.db")) as source,
        closing(sqlite3.connect(copy / "device.db")) as target,
    ):
        source.backup(target)
    done = world.run("start", twin, "--json")
    assert json.loads(done.stdout)["state"] == "connected", done.stderr


def test_a_long_wait_ends_at_once_by_an_operators_command_and_by_a_shutdown(
    tmp_path: Path,
) -> None:
    with World.running(tmp_path, RECONNECT_WAITS_S="300,300,300") as world:
        phone = world.link("sales")
        for _ in range(2):
            _lose(world, phone)
            state = world.await_state("sales", "reconnecting")
            assert state["next_attempt_at"] > time.time() + 200
            begun_at = time.monotonic()
            done = world.run("start", "sales", "--json")
            assert json.loads(done.stdout)["state"] == "connected", done.stderr
            assert time.monotonic() - begun_at < 10
        _lose(world, phone)
        world.await_state("sales", "reconnecting")
        assert world.supervisor is not None
        begun_at = time.monotonic()
        world.supervisor.terminate()
        assert world.supervisor.wait(10) == 0
        assert time.monotonic() - begun_at < 5
