"""The message breaker's file: what it knew outlives the process."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from whatsapp_worker import redis_client
from whatsapp_worker.event_names import Event
from whatsapp_worker.stored_breakers import MessageBreaker
from whatsapp_worker.stream import EventStream

Told = list[tuple[Event, Mapping[str, Any]]]


def make(folder: Path, told: Told | None = None, *, reset_s: float = 60.0) -> MessageBreaker:
    told = [] if told is None else told
    path = folder / "breaker.json"
    return MessageBreaker(
        "message",
        path,
        session="s1",
        threshold=2,
        reset_s=reset_s,
        stream=EventStream(redis_client.connect("redis://127.0.0.1:1/0")),  # nobody is there
        tell=lambda event, facts: told.append((event, facts)),
    )


def test_a_trip_is_told_once_and_a_failed_try_is_told_as_a_repetition(tmp_path: Path) -> None:
    told: Told = []
    for _ in range(3):
        make(tmp_path, told, reset_s=0.0).failed("transient")
    assert [(event, facts["again"]) for event, facts in told] == [
        (Event.BREAKER_OPENED, False),
        (Event.BREAKER_OPENED, True),
    ]
    make(tmp_path, told).succeeded()
    assert told[-1][0] is Event.BREAKER_CLOSED
    assert make(tmp_path).as_dict() == {}


def test_pauses_outlive_the_process_grow_and_end_with_a_message_that_was_sent(
    tmp_path: Path,
) -> None:
    first = make(tmp_path).pause()
    assert first == pytest.approx(time.time() + 60, abs=5)
    again = make(tmp_path)
    assert again.paused_until == first
    assert again.pause() == pytest.approx(time.time() + 120, abs=5)
    make(tmp_path).succeeded()
    assert make(tmp_path).pause() == pytest.approx(time.time() + 60, abs=5)


@pytest.mark.parametrize("stored", ["soon", None, [], 1e12, 10**400, float("inf")])
def test_a_pause_that_makes_no_sense_ends_within_a_quarter_of_an_hour(
    tmp_path: Path, stored: object
) -> None:
    fields = {"version": 1, "paused_until": stored, "pause_s": stored}
    (tmp_path / "breaker.json").write_text(json.dumps(fields))
    assert make(tmp_path).paused_until <= time.time() + 900
