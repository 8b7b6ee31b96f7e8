"""`make bench`: how fast and how small, each figure beside a raw neonize loop of the same run.

Prints a table; no figure passes or fails. Runs on loopback only, ends by itself in about five
minutes, and leaves nothing behind. `python tests/bench.py --quick` does a tenth of the work.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from raw_client import RawClient
from rq import Queue
from rq.serializers import JSONSerializer
from support import eventually
from world import World

from whatsapp_worker import heap
from whatsapp_worker.reports import Channel

CONTACT = "552198888{:04d}"
SETTLE_S, IDLE_S = 3, 20  # after a login of raw clients; of quiet
FRESH = """
import os, socket, sys
from whatsapp_worker import device_process, telemetry
from whatsapp_worker.reports import Channel
from whatsapp_worker.settings import Settings
settings = Settings.read(os.environ)
telemetry.set_up(settings)
channel = Channel(socket.socket(fileno=int(sys.argv[2])))
device_process.main(sys.argv[1], channel, settings)
"""
LOGGED_IN, LOADED = "logged in", "after its load"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--quick", action="store_true", help="a tenth of the messages and sessions")
    quick = words.parse_args().quick
    with tempfile.TemporaryDirectory(prefix="wa-bench-") as folder:
        world = World(Path(folder), RECONNECT_WAITS_S="0.1,0.2,0.4")
        try:
            Bench(world.start(), messages=200 if quick else 2000, many=4 if quick else 20).run()
        except BaseException:
            print(world.logs(), file=sys.stderr)
            raise
        finally:
            world.close()


class Bench:
    """One run. `many` is the size of the fleet; half of it sends at once."""

    def __init__(self, world: World, *, messages: int, many: int) -> None:
        self.world = world
        self.messages = messages
        self.fleet = [f"s{n}" for n in range(many)]
        self.raws = [world.folder / f"raw{n}.db" for n in range(many // 2)]

    def run(self) -> None:
        print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
        row("fsync of this disk", f"{_fsync_ms(self.world.folder):.2f} ms")
        for database in self.raws:
            self._pair_raw(database)
        self._raw_rate(self.raws[:1], 2)
        self._link(self.fleet[:1])
        self._memory(self.fleet[:1], LOGGED_IN)
        self._latency()
        self._throughput(self.raws[:1], self.fleet[:1], self.messages)
        self._memory(self.fleet[:1], LOADED)
        self._fork_to_connected_alone()
        self._fork_helper()
        self._link(self.fleet[1:])
        self._memory(self.fleet, LOGGED_IN)
        senders = self.fleet[: len(self.raws)]
        self._throughput(self.raws, senders, self.messages // 4)
        self._memory(senders, LOADED)
        self._idle_cpu()
        self._fork_to_connected_together()

    def _pair_raw(self, database: Path) -> None:
        client = RawClient(database, self.world.environ)
        self.world.control.scan(client.expect("qr")["code"])
        client.expect("paired")
        client.expect("connected")
        client.close()

    def _link(self, sessions: list[str]) -> None:
        for name in sessions:
            self.world.link(name)
            self.world.await_state(name, "connected")

    def _throughput(self, raws: list[Path], sessions: list[str], count: int) -> None:
        """Both sides send `count` messages each, to one contact a sender, after a warm-up."""
        raw = self._raw_rate(raws, count)
        warm = [job for name in sessions for job in self._enqueue(name, 20)]
        self.world.await_outcomes(warm)
        self.world.control.reset()
        pids = [self.world.state(name)["pid"] for name in sessions]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for name in sessions:
            self._enqueue(name, count)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: not any(map(self._depth, sessions)), within_s=300)
        rows = self.world.control.messages(decode=False)
        assert len(rows) == count * len(sessions), (len(rows), count * len(sessions))
        rate = (len(rows) - 1) / (max(r["at"] for r in rows) - min(r["at"] for r in rows))
        what = "one session" if len(sessions) == 1 else f"{len(sessions)} sessions at once"
        row(f"{what}, {count} queued each", f"{rate:.0f}/s", f"{raw:.0f}/s", rate / raw)

    def _set_running(self, session: str, running: bool) -> None:
        self.world.run("start" if running else "stop", session, "--json")
        self.world.await_state(session, "connected" if running else "stopped")

    def _depth(self, session: str) -> int:
        return sum(self.world.limbo(session).values())

    def _enqueue(self, session: str, count: int) -> list[Any]:
        queue = Queue(f"wa:out:{session}", connection=self.world.redis, serializer=JSONSerializer)
        to, stamp = CONTACT.format(self.fleet.index(session)), time.time_ns()
        text = {"type": "text", "text": {"body": "bench"}}
        data = [
            Queue.prepare_data(
                "jobs.outbound.send_message",
                description="send_message",
                kwargs={
                    "session": session,
                    "to": to,
                    "message_id": f"{stamp}-{n}",
                    "message": text,
                },
            )
            for n in range(count)
        ]
        return list(queue.enqueue_many(data))

    def _raw_rate(self, raws: list[Path], count: int) -> float:
        """Messages a second of raw loops at once, by the sandbox's clock, as for the worker."""
        self.world.control.reset()
        with ThreadPoolExecutor(len(raws)) as pool:
            list(pool.map(lambda at: self._raw_loop(at, raws, count), range(len(raws))))
        rows = [r for r in self.world.control.messages(decode=False)]
        return (len(rows) - 1) / (max(r["at"] for r in rows) - min(r["at"] for r in rows))

    def _raw_loop(self, at: int, raws: list[Path], count: int) -> None:
        words = [sys.executable, __file__.replace("bench.py", "raw_loop.py"), str(raws[at])]
        done = subprocess.run(
            [*words, CONTACT.format(5000 + at), str(count)],
            env=self.world.environ | {"NEONIZE_BOT_TAG": "off"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        told = json.loads(done.stderr.splitlines()[-1])
        self.raw_private_mib = told["private_mib"]
        self.raw_loaded_mib = told["loaded_mib"]
        self.raw_connect_s = told["connect_s"]
        self.raw_send_ms = told["send_ms"]

    def _latency(self) -> None:
        """Enqueue to acceptance by the server, one message at a time, on one machine's clock."""
        name = self.fleet[0]
        self.world.await_outcomes(self._enqueue(name, 20))
        self.world.control.reset()
        stamps = []
        for _ in range(min(self.messages // 5, 300)):
            stamps.append(time.time())
            self._enqueue(name, 1)
            time.sleep(0.05)
        eventually(lambda: len(self.world.control.messages(decode=False)) == len(stamps))
        rows = self.world.control.messages(decode=False)
        waits = [(r["at"] - s) * 1000 for r, s in zip(rows, stamps, strict=True)]
        self._raw_rate(self.raws[:1], 100)
        for name, value in (("p50", statistics.median(waits)), ("p99", _quantile(waits, 0.99))):
            raw = self.raw_send_ms
            row(f"idle latency, {name}", f"{value:.1f} ms", f"{raw:.1f} ms", value / raw)

    def _memory(self, sessions: list[str], when: str) -> None:
        """What a device process has to itself; alone on a host that is its libraries, too."""
        pids = [self.world.state(name)["pid"] for name in sessions]
        mean = statistics.mean(map(_private_mib, pids))
        raw = self.raw_private_mib if when == LOGGED_IN else self.raw_loaded_mib
        what = "1 session" if len(sessions) == 1 else f"{len(sessions)} sessions"
        row(f"private memory, {what}, {when}", f"{mean:.1f} MiB", f"{raw:.1f} MiB", mean / raw)

    def _fork_to_connected_alone(self) -> None:
        name = self.fleet[0]
        times = []
        for _ in range(5):
            self._set_running(name, False)
            self._set_running(name, True)
            times.append(self._fork_to_connected([name]))
        self._row_connected("alone", statistics.median(times))

    def _fork_helper(self) -> None:
        """What the fork helper saves: the same process, started as a fresh Python."""
        name = self.fleet[0]
        forked, fresh = [], []
        for _ in range(3):
            self._set_running(name, False)
            fresh.append(self._fresh(name))
            self._set_running(name, True)
            forked.append(self._started(name, self.world.state(name)["pid"]))
        print("from the fork helper, beside a fresh Python in the raw loop's place:", flush=True)
        (mib, took_s), (its_mib, its_s) = _medians(forked), _medians(fresh)
        row("  private memory, logged in", f"{mib:.1f} MiB", f"{its_mib:.1f} MiB", mib / its_mib)
        row("  start to connected", f"{took_s:.2f} s", f"{its_s:.2f} s", took_s / its_s)

    def _fresh(self, session: str) -> tuple[float, float]:
        """As `_started`, without fork helper and supervisor."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", FRESH, session, str(theirs.fileno())],
                env={**heap.FRUGAL, **self.world.environ, "NEONIZE_BOT_TAG": "off"},
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
            heard = Channel(ours)
            try:
                eventually(lambda: "connected" in {r["report"] for r in heard.receive() or ()})
                return self._started(session, process.pid)
            finally:
                process.kill()
                process.wait()

    def _started(self, session: str, pid: int) -> tuple[float, float]:
        """MiB that a process has to itself, seconds from its start to the login."""
        return _private_mib(pid), self._start_to_login([session], [pid])

    def _fork_to_connected_together(self) -> None:
        pids = self.world.kill_supervisor()
        eventually(lambda: not any(map(psutil.pid_exists, pids)))
        self.world.start_supervisor()
        eventually(lambda: all(self._is_back(name, pids) for name in self.fleet), within_s=60)
        self._row_connected(f"{len(self.fleet)} at once", self._fork_to_connected(self.fleet))

    def _is_back(self, session: str, old_pids: list[int]) -> bool:
        state = self.world.state(session)
        return state["state"] == "connected" and state["pid"] not in old_pids

    def _fork_to_connected(self, sessions: list[str]) -> float:
        return self._start_to_login(sessions, [self.world.state(name)["pid"] for name in sessions])

    def _start_to_login(self, sessions: list[str], pids: list[int]) -> float:
        """Seconds from the first start to the last login that the sandbox saw."""
        phones = {self.world.state(name)["phone"] for name in sessions}
        logins = [
            d["connected_since"] for d in self.world.control.devices() if d["phone"] in phones
        ]
        return float(max(logins) - min(_forked_at(pid) for pid in pids))

    def _row_connected(self, what: str, value: float) -> None:
        raw = self.raw_connect_s
        row(f"fork to connected, {what}", f"{value:.2f} s", f"{raw:.2f} s", value / raw)

    def _idle_cpu(self) -> None:
        """CPU of supervisor, helper and device processes over quiet seconds, and of raw clients
        in the same seconds."""
        assert self.world.supervisor is not None
        tree = [psutil.Process(self.world.supervisor.pid)]
        tree += tree[0].children(recursive=True)
        clients = [RawClient(database, self.world.environ) for database in self.raws]
        sizes = len(self.fleet), len(clients)
        for client in clients:
            client.expect("connected")
        time.sleep(SETTLE_S)
        groups = (tree, [psutil.Process(client.pid) for client in clients])
        before = [sum(map(_cpu_s, group)) for group in groups]
        time.sleep(IDLE_S)
        used_s = (sum(map(_cpu_s, group)) - was for group, was in zip(groups, before, strict=True))
        ours, raw = (s / IDLE_S * 100 / n for s, n in zip(used_s, sizes, strict=True))
        for client in clients:
            client.close()
        what = f"idle CPU a session, {len(self.fleet)} sessions, of a core"
        row(what, f"{ours:.2f} %", f"{raw:.2f} %", ours / raw if raw else None)


def row(what: str, value: str, raw: str = "", ratio: float | None = None) -> None:
    shown = f"{ratio:.2f}" if ratio is not None else ""
    print(f"{what:<44}{value:>18}{raw:>14}{shown:>8}", flush=True)


def _private_mib(pid: int) -> float:
    return float(psutil.Process(pid).memory_full_info().uss / 2**20)


def _medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second)


def _cpu_s(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _forked_at(pid: int) -> float:
    """Unix time, to a hundredth: psutil takes the time of the boot in whole seconds."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    booted_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted_at + ticks / os.sysconf("SC_CLK_TCK")


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def _fsync_ms(folder: Path) -> float:
    path = folder / "fsync"
    with path.open("wb", buffering=0) as file:
        start = time.monotonic()
        for _ in range(200):
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
    path.unlink()
    return (time.monotonic() - start) / 200 * 1000


if __name__ == "__main__":
    main()
