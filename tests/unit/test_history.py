"""A session's history is bounded in number and age."""

from pathlib import Path

from whatsapp_worker.history import KEPT_S, History


def test_the_last_events_are_kept_and_no_more(tmp_path: Path) -> None:
    history = History(tmp_path, limit=10)
    for number in range(95):
        history.add({"event": "tick", "number": number}, now=1000.0 + number)
    events = history.read(now=1100.0)
    assert [event["number"] for event in events] == list(range(85, 95))
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) <= 20


def test_events_older_than_four_hours_are_dropped(tmp_path: Path) -> None:
    history = History(tmp_path, limit=10)
    history.add({"event": "old"}, now=0.0)
    history.add({"event": "new"}, now=KEPT_S)
    assert [event["event"] for event in history.read(now=KEPT_S + 1)] == ["new"]


def test_torn_lines_are_skipped_and_a_new_process_counts_on(tmp_path: Path) -> None:
    History(tmp_path, limit=10).add({"event": "first"}, now=1.0)
    path = tmp_path / "history.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "to\xff\n[1]\n{"at":null}\n')
    again = History(tmp_path, limit=10)
    again.add({"event": "second"}, now=2.0)
    assert [event["event"] for event in again.read(now=3.0)] == ["first", "second"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_gone_costs_the_event_alone(tmp_path: Path) -> None:
    history = History(tmp_path / "gone", limit=10)
    history.add({"event": "lost"}, now=1.0)
    assert history.read(now=1.0) == []
