"""`make soak`: a fleet under random faults; nothing may be lost, doubled, leaked or left hanging.

Twenty sessions send to the sandbox for twenty minutes while connections are reset, stalled and
refused, answers get lost, processes are killed and stopped, and Redis and the supervisor die. Then
the faults end, every queue must run dry, and a table says what became of it all. Exit code 1 when
a message was lost or doubled. Loopback only; ends by itself.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rq.job import Job
from rq.serializers import JSONSerializer
from support import eventually
from world import World

CONTACT = "5521977{:06d}"  # one a session
ENDED = ("finished", "failed")


@dataclass
class Tally:
    """What was done and seen; the table is made of it."""

    faults: Counter[str] = field(default_factory=Counter)
    jobs: dict[str, Job] = field(default_factory=dict)  # by text
    arrived: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # text: ids
    logins: int = 0
    crashes: int = 0
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--minutes", type=float, default=20.0)
    words.add_argument("--sessions", type=int, default=20)
    words.add_argument("--rate", type=float, default=8.0, help="messages a second, all sessions")
    words.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="wa-soak-") as folder:
        world = World(Path(folder), SEND_TIMEOUT_S="5", MAX_SESSIONS="200", HANG_TIMEOUT_S="15")
        soak = Soak(world, args.sessions, random.Random(args.seed))
        print(f"{args.sessions} sessions, {args.minutes:g} min, seed {args.seed}", flush=True)
        try:
            world.start()
            soak.link()
            soak.run(args.minutes * 60, args.rate)
            soak.calm()
            return soak.report()
        except BaseException:
            print(world.logs(), file=sys.stderr)
            raise
        finally:
            world.close()


class Soak:
    """One run."""

    def __init__(self, world: World, sessions: int, dice: random.Random) -> None:
        self.world = world
        self.dice = dice
        self.sessions = [f"s{n}" for n in range(sessions)]
        self.phones: dict[str, str] = {}
        self.tally = Tally()
        self._seen = 0  # seq of the last message row read
        self._connections = 0

    def link(self) -> None:
        for name in self.sessions:
            self.phones[name] = self.world.link(name)
        self._count_logins()
        self.tally.logins = 0

    def run(self, seconds: float, rate: float) -> None:
        """Messages at `rate` a second and a fault every three seconds, until the time is over."""
        start = time.monotonic()
        next_fault, next_sample, number = start + 5, start, 0
        while (now := time.monotonic()) < start + seconds:
            if number < (now - start) * rate:
                self._enqueue(number)
                number += 1
                continue
            if now >= next_fault:
                next_fault = now + self.dice.uniform(2, 4)
                self._fault()
            if now >= next_sample:
                next_sample = now + 30
                self._sample()
                self._collect()
                left = (start + seconds - now) / 60
                print(f"  {left:4.1f} min left, {number} enqueued", flush=True)
            time.sleep(0.02)

    def _enqueue(self, number: int) -> None:
        at = number % len(self.sessions)
        text = f"soak {number}"
        with contextlib.suppress(Exception):  # Redis is away: the CRM tries the next one
            to = CONTACT.format(at)
            self.tally.jobs[text] = self.world.enqueue(self.sessions[at], to, text, f"m{number}")

    def _fault(self) -> None:
        name = self.dice.choice(self.sessions)
        weights = [fault[1] for fault in FAULTS]
        what, _, inflict = self.dice.choices(FAULTS, weights)[0]
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            inflict(self, name)
            self.tally.faults[what] += 1

    def _device(self, session: str) -> psutil.Process:
        return psutil.Process(self.world.state(session).get("pid") or 10**9)

    def _kill_device(self, session: str) -> None:
        self._device(session).kill()
        self.tally.crashes += 1

    def _stop_device(self, session: str) -> None:
        self._device(session).send_signal(signal.SIGSTOP)

    def _kill_supervisor(self, _: str) -> None:
        pids = self.world.kill_supervisor()
        eventually(lambda: not any(map(_lives, pids)), within_s=10, what="no orphan is left")
        self.world.start_supervisor()

    def _kill_redis(self, _: str) -> None:
        self.world.redis_server.kill()
        time.sleep(self.dice.uniform(0, 2))
        self.world.redis_server.start()

    def _collect(self) -> None:
        for row in self.world.control.messages(since=self._seen, decode=False):
            self._seen = max(self._seen, int(row["seq"]))
            self.tally.arrived[str(row["text"])].add(str(row["id"]))
        self._count_logins()

    def _count_logins(self) -> None:
        for row in self.world.control.connections(since=self._connections):
            if row["ended"] is None and row["reached"] != "connected":
                break  # still on its way: looked at next time
            self._connections = int(row["seq"])
            self.tally.logins += row["reached"] == "connected"

    def _sample(self) -> None:
        """Memory, threads and descriptors of what we run, a device process on average."""
        sample = {}
        assert self.world.supervisor is not None
        for name, process in self._ours():
            with contextlib.suppress(psutil.Error):
                private = process.memory_full_info().uss / 2**20
                sample[f"{name} MiB"] = sample.get(f"{name} MiB", 0.0) + private
                sample[f"{name} fds"] = sample.get(f"{name} fds", 0.0) + process.num_fds()
                threads = process.num_threads()
                sample[f"{name} threads"] = sample.get(f"{name} threads", 0.0) + threads
                sample[f"{name} count"] = sample.get(f"{name} count", 0.0) + 1
        for name in {key.rpartition(" ")[0] for key in sample}:
            count = sample.pop(f"{name} count")
            for unit in ("MiB", "fds", "threads"):
                sample[f"{name} {unit}"] /= count
        self.tally.samples.append((time.monotonic(), sample))

    def _ours(self) -> Iterator[tuple[str, psutil.Process]]:
        with contextlib.suppress(psutil.Error):
            supervisor = psutil.Process(self.world.supervisor.pid)
            yield "supervisor", supervisor
            for child in supervisor.children():
                if "fork_helper" in " ".join(child.cmdline()):
                    yield "fork helper", child
        for session in self.sessions:
            with contextlib.suppress(psutil.Error):
                yield "device process", self._device(session)
        yield "events", psutil.Process(self.world.events.pid)

    def calm(self) -> None:
        """No more faults: everybody connects again and every queue runs dry."""
        self.world.control.remove_fault()
        self.world.control.unstall()
        for name in self.sessions:
            self.world.await_state(name, "connected", within_s=300)
        eventually(lambda: not self._open_jobs(), within_s=300, what="every job ends")
        eventually(self._has_settled, within_s=60, what="receipts settle what they can")
        self._sample()
        self._collect()

    def _has_settled(self) -> bool:
        """Unknown messages that arrived have their receipts, or it has been long enough."""
        self._collect()
        self._quiet_polls = getattr(self, "_quiet_polls", 0) + 1
        unknown = [text for text, status in self._statuses().items() if status == "unknown"]
        return not any(self.tally.arrived.get(text) for text in unknown) or self._quiet_polls > 50

    def _open_jobs(self) -> list[str]:
        return [t for t, (status, _) in self._looked_up().items() if status not in ENDED]

    def _statuses(self) -> dict[str, str]:
        return {text: word for text, (_, word) in self._looked_up().items()}

    def _looked_up(self) -> dict[str, tuple[str, str]]:
        """RQ's status and the outcome's word of every message, in one round trip."""
        jobs = Job.fetch_many(
            [job.id for job in self.tally.jobs.values()],
            connection=self.world.redis,
            serializer=JSONSerializer,
        )
        found = {}
        for text, job in zip(self.tally.jobs, jobs, strict=True):
            outcome = (job.meta.get("outcome") or {}) if job else {}
            status = str(job.get_status(refresh=False).value) if job else "gone"
            found[text] = (status, str(outcome.get("status", "none")))
        return found

    def report(self) -> int:
        """Print the table; the exit code."""
        tally, statuses = self.tally, self._statuses()
        words = Counter(statuses.values())
        proven = ("sent", "delivered", "read", "played")
        lost = [t for t, s in statuses.items() if s in proven and not tally.arrived.get(t)]
        lost += [t for t, s in statuses.items() if s == "none"]
        doubled = [t for t, ids in tally.arrived.items() if len(ids) > 1]
        denied = [t for t, s in statuses.items() if s == "failed" and tally.arrived.get(t)]
        unsettled = [t for t, s in statuses.items() if s == "unknown" and tally.arrived.get(t)]
        limbo = sum(sum(self.world.limbo(name).values()) for name in self.sessions)
        line("sessions", len(self.sessions))
        line("faults injected", sum(tally.faults.values()))
        for what, count in sorted(tally.faults.items()):
            line(f"  {what}", count)
        line("reconnects", tally.logins)
        line("crashes (SIGKILL)", tally.crashes)
        line("messages enqueued", len(statuses))
        line("sent", sum(words[word] for word in proven))
        line("failed", words["failed"])
        line("unknown", words["unknown"])
        line("lost", len(lost))
        line("duplicated", len(doubled))
        line("called failed, and arrived", len(denied))
        line("unknown that arrived and no receipt settled", len(unsettled))
        line("left in queues and limbo lists", limbo)
        self._print_slopes()
        for what, texts in (("lost", lost), ("duplicated", doubled), ("denied", denied)):
            if texts:
                print(f"{what}: {texts[:20]}", file=sys.stderr)
        return 1 if lost or doubled or denied or limbo else 0

    def _print_slopes(self) -> None:
        """Start, end and slope an hour, by least squares over all samples."""
        print(f"\n{'':<28}{'start':>10}{'end':>10}{'an hour':>10}")
        samples = self.tally.samples[1:]
        for name in sorted({name for _, sample in samples for name in sample}):
            # Right after a supervisor was killed there are no device processes.
            points = [(at, sample[name]) for at, sample in samples if name in sample]
            slope = _slope(points) * 3600
            print(f"{name:<28}{points[0][1]:>10.1f}{points[-1][1]:>10.1f}{slope:>+10.1f}")


def _slope(points: list[tuple[float, float]]) -> float:
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def line(what: str, value: Any) -> None:
    print(f"{what:<48}{value:>8}")


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _phone(inflict: Callable[[Any, str], Any]) -> Callable[[Soak, str], None]:
    """A fault that the sandbox inflicts on one session's number."""

    def on_session(soak: Soak, session: str) -> None:
        inflict(soak.world.control, soak.phones[session])

    return on_session


# Name, weight, what it does.
FAULTS: list[tuple[str, int, Callable[[Soak, str], None]]] = [
    ("connection reset", 8, _phone(lambda control, phone: control.drop(phone, "reset"))),
    ("connection closed", 8, _phone(lambda control, phone: control.drop(phone, "close"))),
    ("stall 20 s", 4, _phone(lambda control, phone: control.stall(phone, seconds=20))),
    ("connections refused 5 s", 4, _phone(lambda c, phone: c.refuse(phone, seconds=5))),
    ("stream error 503", 4, _phone(lambda control, phone: control.stream_error(phone, "503"))),
    ("stream error 515", 4, _phone(lambda control, phone: control.stream_error(phone, "515"))),
    ("login refused 503", 4, _phone(lambda c, phone: c.connect_failure(503, phone, count=1))),
    ("message refused", 4, _phone(lambda c, phone: c.send_fault("refuse", phone, count=1))),
    ("acknowledgement lost", 6, _phone(lambda c, phone: c.send_fault("no_ack", phone, count=1))),
    ("drop after a message", 8, _phone(lambda c, p: c.send_fault("drop_after", p, count=1))),
    ("drop before a message", 8, _phone(lambda c, p: c.send_fault("drop_before", p, count=1))),
    ("device process killed", 12, Soak._kill_device),
    ("device process stopped", 2, Soak._stop_device),
    ("supervisor killed", 1, Soak._kill_supervisor),
    ("Redis killed", 2, Soak._kill_redis),
]

if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
