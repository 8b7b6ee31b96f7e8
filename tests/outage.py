"""`make outage`: WhatsApp cannot be reached for three minutes; thirty sessions must come back.

The sandbox resets every connection and every dial for three minutes, with the real waits of 3, 6
and 12 s; with `--silent` it answers nobody instead, and closes nothing. Counted at the sandbox: who
dialled, when, and how long until all were connected again. Exit code 1 when that was not as
promised. Loopback only; ends by itself after about six minutes.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from world import World, eventually

from whatsapp_worker.reconnect import CANARY_EVERY_S, DIALS_AT_ONCE
from whatsapp_worker.settings import Settings

RECOVERY_S = 30.0
OWN_S = 2.0  # whatsmeow's own dial follows its loss within
ATTEMPTS = len(Settings.reconnect_waits_s)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--minutes", type=float, default=3.0)
    words.add_argument("--sessions", type=int, default=30)
    words.add_argument("--silent", action="store_true")
    args = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="wa-outage-") as folder:
        world = World(Path(folder))
        for name in ("RECONNECT_WAITS_S", "RECONNECT_JITTER_S", "FAILED_COOLDOWN_S"):
            del world.environ[name]  # the real ones
        try:
            world.start()
            return Outage(world, args.sessions, args.minutes * 60).run(args.silent)
        except BaseException:
            print(world.logs(), file=sys.stderr)
            raise
        finally:
            world.close()


class Outage:
    """One run."""

    def __init__(self, world: World, sessions: int, seconds: float) -> None:
        self.world = world
        self.sessions = [f"s{n}" for n in range(sessions)]
        self.seconds = seconds
        self.problems: list[str] = []

    def run(self, is_silent: bool) -> int:
        """Link, cut off, reconnect, print the table; the exit code."""
        for name in self.sessions:
            self.world.link(name)
        print(f"{len(self.sessions)} sessions are connected; the outage begins", flush=True)
        began_at = time.time()
        if is_silent:
            self.world.control.stall()
        else:
            self.world.control.refuse()
            self.world.control.drop()
        jobs = [
            self.world.enqueue(name, "5521988880001", f"waits {name}", "m1")
            for name in self.sessions
        ]
        time.sleep(self.seconds)
        ended_at = time.time()
        self.world.control.remove_fault()
        print("the outage ends", flush=True)
        for name in self.sessions:
            self.world.await_state(name, "connected", within_s=2 * RECOVERY_S)
        outcomes = self.world.await_outcomes(jobs, within_s=60)
        became = Counter(str(outcome["status"]) for outcome in outcomes)
        if not is_silent:
            self._judge_dials(began_at, ended_at, became)
        self._judge_recovery(began_at, ended_at, became)
        for problem in self.problems:
            print(f"NOT AS PROMISED: {problem}", file=sys.stderr)
        return 1 if self.problems else 0

    def _judge_dials(self, began_at: float, ended_at: float, became: Counter[str]) -> None:
        """During the outage: whatsmeow's own dial, three attempts each, then one canary for all."""
        count = len(self.sessions)
        dials = [at for at in self._dials(began_at) if at < ended_at]
        attempts, canaries = self._attempts(began_at, ended_at)
        own = len(dials) - attempts - len(canaries)
        gaps = [b - a for a, b in itertools.pairwise(canaries)]
        later = [at for at in dials if at > began_at + OWN_S]
        line("dials, counted at the server", len(dials))
        line("  by whatsmeow itself, at the loss", own)
        line(f"  the {ATTEMPTS} attempts of each session", attempts)
        line("  canaries", len(canaries))
        line("shortest time between two canaries, s", f"{min(gaps, default=0):.1f}")
        line("most dials within one second, after the loss", _densest(later, 1.0))
        self._expect(own <= count, "one dial of whatsmeow's own each")
        self._expect(attempts <= ATTEMPTS * count, "three attempts each")
        self._expect(len(canaries) <= self.seconds / CANARY_EVERY_S + 1, "a canary every 10 s")
        self._expect(became["sent"] == count, "what waited was sent")

    def _attempts(self, began_at: float, ended_at: float) -> tuple[int, list[float]]:
        """How many attempts the series had, and when canaries dialled: those are of sessions that
        had failed already."""
        attempts, canaries = 0, []
        for name in self.sessions:
            has_failed = False
            for event in self._changes(name, began_at):
                has_failed |= event["state"] == "failed"
                if event["state"] == "connecting" and event["at"] < ended_at:
                    attempts += not has_failed
                    canaries += [event["at"]] if has_failed else []
        return attempts, sorted(canaries)

    def _judge_recovery(self, began_at: float, ended_at: float, became: Counter[str]) -> None:
        """Afterwards: everybody back in time, and no rush."""
        count = len(self.sessions)
        at_once = self._most_at_once(ended_at)
        dials = [at for at in self._dials(began_at) if at >= ended_at]
        back_s = [at - ended_at for at in self._connected_at(ended_at)] or [0.0]
        line("sessions", count)
        line("outage, s", f"{ended_at - began_at:.0f}")
        line("its end to the first login, s", f"{min(back_s):.1f}")
        line("its end to all connected, s", f"{max(back_s):.1f}")
        line("most dialling at once then", at_once)
        line("dials then", len(dials))
        for status, number in sorted(became.items()):
            line(f"messages enqueued at its begin: {status}", number)
        self._expect(max(back_s) <= RECOVERY_S, f"all connected in {RECOVERY_S:g} s")
        self._expect(at_once <= DIALS_AT_ONCE, f"at most {DIALS_AT_ONCE} dial at once")
        self._expect(len(dials) <= count + 1, "one dial each after the outage")

    def _dials(self, since: float) -> list[float]:
        return [row["at"] for row in self.world.control.connections() if row["at"] >= since]

    def _expect(self, is_so: bool, promise: str) -> None:
        if not is_so:
            self.problems.append(promise)

    def _connected_at(self, since: float) -> list[float]:
        """When each session logged in that was not connected."""
        logins = (
            [e["at"] for e in self._changes(name, since) if e["state"] == "connected"]
            for name in self.sessions
        )
        return [at[0] for at in logins if at]

    def _most_at_once(self, since: float) -> int:
        """Sessions that were on their way from the dial to the login, at the worst moment."""
        steps: list[tuple[float, int]] = []
        for name in self.sessions:
            changes = self._changes(name, since)
            if changes and changes[0]["previous"] == "connecting":
                steps.append((since, 1))
            for event in changes:
                steps += [(event["at"], 1)] if event["state"] == "connecting" else []
                steps += [(event["at"], -1)] if event["previous"] == "connecting" else []
        return max(itertools.accumulate(change for _, change in sorted(steps)), default=0)

    def _changes(self, name: str, since: float) -> list[dict[str, Any]]:
        path = self.world.data / "sessions" / name / "history.jsonl"
        events = eventually(lambda: [json.loads(line) for line in path.open()])
        return [
            event
            for event in events
            if event["event"] == "session.state_changed" and event["at"] >= since
        ]


def _densest(times: list[float], within_s: float) -> int:
    return max((sum(at <= other < at + within_s for other in times) for at in times), default=0)


def line(what: str, value: Any) -> None:
    print(f"{what:<48}{value:>12}")


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
