"""Pacing, as it is once PACE_PER_MINUTE is set and nothing else: what the receiver sees."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from world import World, eventually

CONTACT, STRANGER = "5521988880001", "5521988880002"
GAP_S = 60 / 60


def test_one_setting_keeps_messages_apart_and_ends_the_day_early(tmp_path: Path) -> None:
    with World.running(tmp_path, PACE_PER_MINUTE="60") as world:

        def look() -> dict[str, Any]:
            return dict(json.loads(world.run("queue", "sales", "--json").stdout))

        def rests(depth: int) -> dict[str, Any] | None:
            found = look()
            return found if (found["state"], found["depth"]) == ("pacing", depth) else None

        world.link("sales")
        jobs = [world.enqueue("sales", CONTACT, f"text {n}", f"m{n}") for n in range(12)]
        jobs.append(world.enqueue("sales", STRANGER, "hello", "stranger"))
        eventually(lambda: (found := look())["state"] == "pacing" and found["until"])
        outcomes = world.await_outcomes(jobs)
        rows = world.arrived()
        assert [row["text"] for row in rows] == [*(f"text {n}" for n in range(12)), "hello"]

        # From the claim of the one before, so that its way to the receiver shortens nothing.
        waits = [
            row["at"] - before["claimed_at"]
            for before, row in zip(outcomes, rows[1:], strict=False)
        ]
        assert min(waits[:-1]) >= 0.5 * GAP_S
        assert waits[-1] >= 3 * 0.5 * GAP_S, "somebody never written to"
        gaps = [later["at"] - row["at"] for row, later in pairwise(rows[:12])]
        mean = sum(gaps) / len(gaps)
        assert 0.55 * GAP_S < mean < 1.45 * GAP_S, "five standard deviations"
        assert max(gaps) - min(gaps) > 0.2 * GAP_S, "jitter"
        pace = look()["pace"]
        assert (pace["per_minute"], pace["per_day"], pace["sent_today"]) == (60, 1000, 13)

        assert world.run("stop", "sales").returncode == 0
        file = world.data / "sessions" / "sales" / "pacing.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"sent": 999}))
        assert world.run("start", "sales").returncode == 0
        last, too_many = (world.enqueue("sales", CONTACT, text, text) for text in ("last", "more"))
        assert world.await_outcomes([last])[0]["status"] == "sent"
        found = eventually(lambda: rests(1), what="the day is over for this session")
        assert found["pace"]["sent_today"] == 1000
        assert found["until"] % 86_400 == 0 and 0 <= found["until"] - time.time() <= 86_400
        assert world.outcome(too_many) == {}
