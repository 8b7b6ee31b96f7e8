"""The supervisor with real processes, real neonize and real signals."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from world import COMMAND, World, eventually

CONTACT = "5521988880001"


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def helper_of(world: World) -> psutil.Process:
    assert world.supervisor is not None
    for child in psutil.Process(world.supervisor.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just been reaped
            if child.name() == "wa-forker" and alive(child.pid):
                return child
    return psutil.Process()


def family(world: World) -> list[psutil.Process]:
    assert world.supervisor is not None
    return psutil.Process(world.supervisor.pid).children(recursive=True)


def zombies(world: World) -> list[psutil.Process]:
    return [process for process in family(world) if not alive(process.pid)]


def connections(world: World, phone: str | None = None) -> list[dict[str, Any]]:
    return list(world.control.connections(phone))


def test_linking_passes_through_the_states_and_the_process_is_named(world: World) -> None:
    phone = world.link("sales")
    state = world.state("sales")
    assert (state["state"], state["phone"]) == ("connected", phone)
    states = ["linking", "connecting", "connected"]
    # A thread tells them, once they are so.
    eventually(lambda: world.states_told()[2:], what="the last is told")
    assert world.states_told() == states
    process = psutil.Process(state["pid"])
    assert "sales" in " ".join(process.cmdline())
    folder = world.data / "sessions" / "sales"
    assert not (folder / "link.json").exists() and not (folder / "pairing.db").exists()
    assert (folder / "device.db").stat().st_mode & 0o777 == 0o600


def test_a_killed_device_process_comes_back_after_the_wait_without_a_new_qr(world: World) -> None:
    phone = world.link("sales")
    before = len(connections(world, phone))
    pid = world.state("sales")["pid"]
    os.kill(pid, signal.SIGKILL)
    states = ["linking", "connecting", "connected", "reconnecting", "connecting", "connected"]
    eventually(lambda: world.states_told() == states, what="it comes back after the wait")
    assert world.state("sales")["pid"] not in (None, pid)
    assert len(connections(world, phone)) == before + 1
    job = world.enqueue("sales", CONTACT, "back", "m1")
    assert world.await_outcomes([job])[0]["status"] == "sent"


def test_a_killed_supervisor_leaves_no_orphan_and_the_next_takes_over(world: World) -> None:
    world.link("one")
    world.link("two")
    orphans = world.kill_supervisor()
    assert len(orphans) >= 3  # the helper and two device processes
    eventually(lambda: not any(map(alive, orphans)), within_s=5, what="no orphan is left")
    world.start_supervisor()
    for session in ("one", "two"):
        world.await_state(session, "connected")


def test_device_processes_outlive_the_fork_helper_and_a_new_one_serves(world: World) -> None:
    world.link("sales")
    pid = world.state("sales")["pid"]
    helper = helper_of(world)
    helper.kill()
    ours = (helper.pid, os.getpid())
    eventually(lambda: helper_of(world).pid not in ours, what="a new helper")
    assert alive(pid) and world.state("sales")["pid"] == pid
    job = world.enqueue("sales", CONTACT, "still here", "m1")
    assert world.await_outcomes([job])[0]["status"] == "sent"
    world.replace_process("sales")  # an orphan, adopted by the supervisor
    world.await_state("sales", "connected")
    eventually(lambda: not zombies(world), what="no zombie is left")


def test_a_stopped_fork_helper_is_replaced(world: World) -> None:
    world.link("sales")
    helper = helper_of(world)
    helper.suspend()
    os.kill(world.state("sales")["pid"], signal.SIGKILL)
    eventually(lambda: not alive(helper.pid), within_s=90, what="the helper is replaced")
    world.await_state("sales", "connected")


def operate(world: World, verb: str, *words: str) -> dict[str, Any]:
    done = world.run(verb, "sales", "--json", *words)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_stop_start_restart_and_delete_do_what_they_say(world: World) -> None:
    phone = world.link("sales")
    first = world.state("sales")["pid"]
    assert operate(world, "stop") == {"session": "sales", "state": "stopped"}
    assert not alive(first)
    dials = len(connections(world, phone))
    time.sleep(1)
    assert len(connections(world, phone)) == dials
    assert operate(world, "start")["state"] == "connected"
    second = world.state("sales")["pid"]
    assert operate(world, "restart")["state"] == "connected"
    assert world.state("sales")["pid"] != second and not alive(second)
    waiting = world.enqueue("sales", CONTACT, "x", "before")
    world.await_outcomes([waiting])
    assert operate(world, "delete", "--yes")["state"] == "deleted"
    assert not (world.data / "sessions" / "sales").exists()
    assert world.control.devices(phone) == []
    [stone] = json.loads((world.data / "tombstones.json").read_text())["tombstones"]
    assert (stone["id"], stone["why"]) == ("sales", "delete")


def test_logout_takes_the_device_off_the_phones_list_and_a_link_brings_it_back(
    world: World,
) -> None:
    phone = world.link("sales")
    assert operate(world, "logout")["state"] == "logged_out"
    assert world.control.devices(phone) == []
    assert world.state("sales")["pid"] is None
    dials = len(connections(world))
    world.link("sales")
    assert world.state("sales")["state"] == "connected"
    assert len(connections(world)) == dials + 3  # pairing, its own login, ours


def wanted(world: World) -> dict[str, Any]:
    return dict(json.loads((world.data / "sessions" / "sales" / "wanted.json").read_text()))


def test_a_logout_that_a_start_took_back_is_not_done_later(world: World) -> None:
    phone = world.link("sales")
    assert world.supervisor is not None
    world.supervisor.send_signal(signal.SIGSTOP)  # so that it finds both at one look
    asked = []
    for verb in ("logout", "start"):
        asked.append(world.spawn(verb, "sales"))
        eventually(lambda: wanted(world)["why"] == verb, what="it is recorded")  # noqa: B023
    world.supervisor.send_signal(signal.SIGCONT)
    assert [process.wait(60) for process in asked] == [1, 0]
    assert operate(world, "restart")["state"] == "connected"
    assert len(world.control.devices(phone)) == 1


def test_a_session_whose_credentials_are_gone_is_not_called_connected_after_a_restart(
    world: World,
) -> None:
    world.link("sales")
    for path in (world.data / "sessions" / "sales").glob("device.db*"):
        path.unlink()
    done = world.run("restart", "sales", "--json")
    assert json.loads(done.stdout) == {"session": "sales", "state": "unlinked"}
    assert done.returncode == 1 and "whatsapp-worker link sales" in done.stderr
    row = world.session("sales")
    assert (row["state"], row["pid"]) == ("unlinked", None)
    world.link("sales")


def test_delete_offline_tries_thirty_seconds_and_says_that_the_phone_still_lists_it(
    world: World,
) -> None:
    world.link("sales")
    world.control.refuse()
    world.control.drop()
    begun_at = time.monotonic()
    done = world.run("delete", "sales", "--yes", timeout_s=90)
    took_s = time.monotonic() - begun_at
    assert done.returncode == 0, done.stderr
    assert 28 <= took_s <= 40
    [stone] = json.loads((world.data / "tombstones.json").read_text())["tombstones"]
    assert "phone still lists" in stone["why"] and "phone still lists" in done.stdout


def test_an_id_that_is_used_again_can_be_deleted_again(world: World) -> None:
    for _ in range(2):
        world.link("sales")
        assert operate(world, "delete", "--yes")["state"] == "deleted"
        assert not (world.data / "sessions" / "sales").exists()


def test_jobs_of_unknown_and_deleted_sessions_fail_within_seconds(world: World) -> None:
    unknown = world.enqueue("nobody", CONTACT, "x", "m1")
    world.link("sales")
    operate(world, "delete", "--yes")
    deleted = world.enqueue("sales", CONTACT, "x", "m2")
    outcomes = world.await_outcomes([unknown, deleted], within_s=6)
    assert [outcome["error"] for outcome in outcomes] == ["unknown session", "session deleted"]


def test_jobs_that_wait_when_their_session_is_deleted_fail_with_it(world: World) -> None:
    world.link("sales")
    operate(world, "stop")
    jobs = [world.enqueue("sales", CONTACT, "x", f"m{n}") for n in range(5)]
    begun_at = time.monotonic()
    operate(world, "delete", "--yes")
    assert time.monotonic() - begun_at < 10
    assert {o["error"] for o in world.await_outcomes(jobs, within_s=6)} == {"session deleted"}
    assert world.control.messages(to=CONTACT) == []


def test_a_second_supervisor_is_refused_and_says_who_holds_the_folder(world: World) -> None:
    world.link("sales")
    assert world.supervisor is not None
    second = world.run("run", timeout_s=20)
    assert second.returncode == 5
    assert f"process {world.supervisor.pid}" in second.stderr
    assert world.state("sales")["state"] == "connected"


def test_sigterm_drains_everything_and_leaves_nothing_behind(world: World) -> None:
    world.link("one")
    world.link("two")
    for n in range(50):
        world.enqueue("one", CONTACT, f"{n}", f"m{n}")
    children = [process.pid for process in family(world)]
    assert world.supervisor is not None
    begun_at = time.monotonic()
    world.supervisor.send_signal(signal.SIGTERM)
    assert world.supervisor.wait(25) == 0
    assert time.monotonic() - begun_at < 10
    assert not any(map(alive, children))
    assert world.limbo("one")["intermediate"] == 0
    state = world.state("one")
    assert (state["state"], state["pid"]) == ("stopped", None)
    leftovers = [path.name for path in (world.data / "sessions").rglob("*.tmp*")]
    assert leftovers == []


STATES = [
    "unlinked",
    "linking",
    "connecting",
    "connected",
    "reconnecting",
    "failed",
    "stopped",
    "logged_out",
    "replaced",
    "banned",
    "outdated",
]


@pytest.mark.parametrize("when", STATES)
def test_sigterm_in_every_state_ends_quickly_with_exit_code_0(world: World, when: str) -> None:
    if when in ("unlinked", "linking"):
        link = subprocess.Popen(
            [*COMMAND, "link", "sales", "--json"],
            env=world.environ,
            cwd=world.folder,
            stdout=subprocess.DEVNULL,
        )
        eventually((world.data / "sessions/sales/link.json").exists, what="a QR waits")
        if when == "unlinked":
            world.control.expire_qr()
            world.await_state("sales", "unlinked")
        link.kill()
        link.wait()
    else:
        world.link("sales")
        bring_into(world, when)
    children = [process.pid for process in family(world)]
    assert world.supervisor is not None
    world.supervisor.send_signal(signal.SIGINT)
    assert world.supervisor.wait(15) == 0
    assert not any(map(alive, children))


def bring_into(world: World, state: str) -> None:
    """Let the linked session come into this state."""
    if state == "stopped":
        operate(world, "stop")
    elif state == "logged_out":
        operate(world, "logout")
    elif state == "connecting":
        world.control.stall()  # the next dial hangs
        world.control.drop()
    elif state == "replaced":
        world.control.stream_error(world.state("sales")["phone"], conflict="replaced")
    elif state in ("banned", "outdated"):
        world.control.connect_failure(402 if state == "banned" else 405, expire=60)
        world.control.drop()
    elif state in ("reconnecting", "failed"):
        world.control.refuse()
        world.control.drop()
    world.await_state("sales", state)


def test_a_second_signal_insists_though_a_process_is_stuck(world: World) -> None:
    world.link("sales")
    pid = world.state("sales")["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert world.supervisor is not None
    world.supervisor.send_signal(signal.SIGTERM)
    eventually(lambda: "supervisor.stopping" in world.logs(), what="it is asked")
    time.sleep(0.5)
    assert world.supervisor.poll() is None
    world.supervisor.send_signal(signal.SIGTERM)
    assert world.supervisor.wait(5) == 9
    eventually(lambda: not alive(pid), within_s=5)


def test_a_redis_that_fell_silent_does_not_force_the_end(world: World) -> None:
    world.link("sales")
    redis = world.redis.info("server")["process_id"]
    os.kill(redis, signal.SIGSTOP)
    try:
        assert world.supervisor is not None
        world.supervisor.send_signal(signal.SIGTERM)
        assert world.supervisor.wait(15) == 0
    finally:
        os.kill(redis, signal.SIGCONT)


def test_a_stuck_process_is_killed_within_the_shutdown_time(tmp_path: Path) -> None:
    with World.running(tmp_path, SHUTDOWN_TIMEOUT_S="6") as world:
        world.link("sales")
        os.kill(world.state("sales")["pid"], signal.SIGSTOP)
        assert world.supervisor is not None
        begun_at = time.monotonic()
        world.supervisor.send_signal(signal.SIGTERM)
        assert world.supervisor.wait(10) == 9
        assert time.monotonic() - begun_at < 7


def test_a_stopped_fork_helper_does_not_hold_up_the_end(world: World) -> None:
    world.link("sales")
    helper = helper_of(world)
    helper.suspend()
    assert world.supervisor is not None
    begun_at = time.monotonic()
    world.supervisor.send_signal(signal.SIGTERM)
    assert world.supervisor.wait(30) == 0
    assert time.monotonic() - begun_at < 8
    assert not alive(helper.pid)


def test_nohup_is_obeyed(world: World) -> None:
    world.kill_supervisor()
    supervisor = subprocess.Popen(
        ["nohup", *COMMAND, "run"],
        env=world.environ,
        cwd=world.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: world.status()["supervisor"]["alive"])
        supervisor.send_signal(signal.SIGHUP)
        world.link("sales")
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(15) == 0
    finally:
        supervisor.kill()
        supervisor.wait()


def test_a_fork_helper_that_dies_during_the_end_does_not_make_the_loop_spin(
    tmp_path: Path,
) -> None:
    with World.running(tmp_path, SHUTDOWN_TIMEOUT_S="6") as world:
        world.link("sales")
        os.kill(world.state("sales")["pid"], signal.SIGSTOP)  # so that the end takes its time
        assert world.supervisor is not None
        supervisor = psutil.Process(world.supervisor.pid)
        helper = helper_of(world)
        world.supervisor.send_signal(signal.SIGTERM)
        helper.kill()
        time.sleep(1)
        before = supervisor.cpu_times().user
        time.sleep(2)
        assert supervisor.cpu_times().user - before < 0.5
        assert world.supervisor.wait(10) == 9


@pytest.fixture
def hanging_world(tmp_path: Path) -> Iterator[World]:
    with World.running(tmp_path, HANG_TIMEOUT_S="8", HEALTH_CHECK_INTERVAL_S="1") as world:
        yield world


def test_a_stopped_device_process_is_found_and_killed_and_sends_nothing(
    hanging_world: World,
) -> None:
    world = hanging_world
    phone = world.link("sales")
    pid = world.state("sales")["pid"]
    os.kill(pid, signal.SIGSTOP)
    jobs = [world.enqueue("sales", CONTACT, f"{n}", f"m{n}") for n in range(5)]
    eventually(lambda: not alive(pid), what="the hung process is killed")
    assert {o["status"] for o in world.await_outcomes(jobs)} == {"sent"}
    arrived = world.arrived(sender=phone)
    assert [row["times"] for row in arrived] == [1] * 5
    reasons = [
        json.loads(line).get("reason")
        for line in (world.data / "sessions/sales/history.jsonl").read_text().splitlines()
    ]
    assert "process-hung" in reasons


def test_a_leftover_of_an_earlier_supervisor_is_ended_before_its_session_runs(
    world: World,
) -> None:
    phone = world.link("sales")
    pid = world.state("sales")["pid"]
    os.kill(pid, signal.SIGSTOP)
    world.kill_supervisor()
    time.sleep(1)
    assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
    jobs = [world.enqueue("sales", CONTACT, f"{n}", f"m{n}") for n in range(3)]
    world.start_supervisor()
    eventually(lambda: world.state("sales")["pid"] not in (None, pid))
    assert not alive(pid)
    assert {o["status"] for o in world.await_outcomes(jobs)} == {"sent"}
    assert [row["times"] for row in world.arrived(sender=phone)] == [1] * 3


def test_beyond_max_sessions_a_session_waits_with_reason_capacity(tmp_path: Path) -> None:
    with World.running(tmp_path, MAX_SESSIONS="2") as world:
        world.link("one")
        world.link("two")
        assert world.supervisor is not None
        world.supervisor.send_signal(signal.SIGTERM)
        world.supervisor.wait(15)
        world.environ["MAX_SESSIONS"] = "1"
        world.start_supervisor()
        states = eventually(lambda: _settled(world), what="one connected, one waiting")
        waiting = next(name for name, state in states.items() if state == "stopped")
        assert world.state(waiting)["reason"] == "capacity"
        running = "one" if waiting == "two" else "two"
        assert world.run("stop", running, "--json").returncode == 0
        world.await_state(waiting, "connected")


def _settled(world: World) -> dict[str, str] | None:
    states = {name: world.state(name).get("state") for name in ("one", "two")}
    reasons = [world.state(name).get("reason") for name in states]
    done = sorted(map(str, states.values())) == ["connected", "stopped"] and "capacity" in reasons
    return {name: str(state) for name, state in states.items()} if done else None


def test_a_record_of_the_other_network_refuses_to_run(world: World) -> None:
    world.link("sales")
    operate(world, "stop")
    path = world.data / "sessions" / "sales" / "wanted.json"
    wanted = json.loads(path.read_text())
    other = {**wanted, "network": "whatsapp", "run": "run", "generation": 99}
    path.with_name("other").write_text(json.dumps(other))
    path.with_name("other").replace(path)  # the supervisor reads it at any moment
    state = eventually(lambda: _of_reason(world, "wrong-network"))
    assert state["state"] == "stopped" and state["pid"] is None


def _of_reason(world: World, reason: str) -> dict[str, Any] | None:
    state = world.state("sales")
    return state if state.get("reason") == reason else None


def test_sessions_run_though_redis_is_down_at_the_start_and_goes_away_later(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    try:
        world.start_sandbox()
        world.redis_server.kill()
        world.start_supervisor()
        with world.linking("sales") as lines:
            world.control.scan(next(lines)["code"])
            world.await_state("sales", "connecting")
            world.redis_server.start()
            assert next(lines)["event"] == "linked"
        world.await_state("sales", "connected")
        world.redis_server.kill()
        assert operate(world, "stop")["state"] == "stopped"
        world.redis_server.start()
        assert operate(world, "start")["state"] == "connected"
        told = eventually(world.states_told, what="events that waited for Redis")
        assert told[0] == "linking"
    finally:
        world.close()


def test_the_embedded_redis_comes_back_when_it_is_killed(tmp_path: Path) -> None:
    world = World(tmp_path)
    try:
        del world.environ["REDIS_URL"]
        world.start_sandbox()
        world.start_supervisor()
        announced = world.data / "redis.json"
        eventually(announced.exists)
        pid = json.loads(announced.read_text())["pid"]
        world.link("sales")
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: json.loads(announced.read_text())["pid"] != pid)
        done = world.run("send", "sales", CONTACT, "hello", "--wait", "--json")
        assert json.loads(done.stdout)["status"] in ("sent", "delivered"), done.stderr
    finally:
        world.close()
    assert not any(name.startswith("redis-server") for name in _commands_in(tmp_path))


def _commands_in(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if str(folder) in " ".join(process.info["cmdline"] or []):
            found.append(process.info["name"])
    return found
