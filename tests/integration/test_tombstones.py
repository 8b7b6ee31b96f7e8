"""What was deleted stays deleted, the oldest forgotten first."""

import json
from pathlib import Path

import faults
import pytest

from storage.errors import DocumentNewer
from storage.tombstones import Tombstone, Tombstones


def filled(path: Path, count: int, *, limit: int = 1000) -> Tombstones:
    """Written at once: adding a thousand one by one takes a second."""
    stones = [{"id": f"s{n}", "number_hash": None, "why": "", "at": n} for n in range(count)]
    path.write_text(json.dumps({"version": 1, "tombstones": stones}))
    return Tombstones(path, limit)


def test_a_tombstone_is_found_by_others_at_once(tmp_path: Path) -> None:
    one, other = (Tombstones(tmp_path / "tombstones.json", 1000) for _ in range(2))
    assert other.find("a") is None
    made = one.add("a", "hash", "operator", 5.0)
    assert made == Tombstone("a", "hash", "operator", 5.0) == other.find("a")
    assert other.unbury("a")
    assert one.find("a") is None
    other.forget("a")
    assert not one.unbury("a")


def test_adding_an_id_again_changes_nothing(tmp_path: Path) -> None:
    tombstones = Tombstones(tmp_path / "tombstones.json", 1000)
    first = tombstones.add("a", "hash", "operator", 5.0)
    assert tombstones.add("a", None, "purge", 9.0) == first
    assert tombstones.all() == [first]


def test_that_an_id_was_used_is_remembered_until_its_creation_is_done(tmp_path: Path) -> None:
    one, other = (Tombstones(tmp_path / "tombstones.json", 1000) for _ in range(2))
    assert not one.unbury("a")
    one.add("a", None, "", 1.0)
    for _ in range(2):
        assert other.unbury("a")
        assert one.find("a") is None
        one.add("b", None, "", 2.0)
        other.unbury("c")
    again = one.add("a", None, "purge", 3.0)
    one.forget("a")
    assert other.find("a") == again, "a deletion that came since is not forgotten"


@pytest.mark.parametrize("damage", [None, 7, "a", {"a": 1}, [7, None]])
def test_what_lies_in_the_place_of_unburied_ids_hurts_no_deletion(
    tmp_path: Path, damage: object
) -> None:
    path = tmp_path / "tombstones.json"
    filled(path, 1)
    path.write_text(json.dumps({**json.loads(path.read_text()), "unburied": damage}))
    tombstones = Tombstones(path, 1000)
    assert tombstones.find("s0") is not None
    assert not tombstones.unbury("a")
    tombstones.forget("a")
    assert tombstones.unbury("s0") and tombstones.unbury("s0")


@pytest.mark.parametrize(("count", "kept"), [(998, 999), (999, 1000), (1000, 1000)])
def test_the_thousand_and_first_drops_the_oldest(tmp_path: Path, count: int, kept: int) -> None:
    tombstones = filled(tmp_path / "tombstones.json", count)
    tombstones.add("new", None, "", 5000.0)
    assert len(tombstones.all()) == kept
    assert tombstones.all()[-1].id == "new"
    assert (tombstones.find("s0") is None) == (count == 1000)
    assert tombstones.find("s1") is not None


@pytest.mark.parametrize("now", [-1e9, 0.0, 1e12])
def test_oldest_is_by_order_of_deletion_whatever_the_clock_says(tmp_path: Path, now: float) -> None:
    tombstones = filled(tmp_path / "tombstones.json", 1000)
    tombstones.add("jumped", None, "", now)
    tombstones.add("after", None, "", 2000.0)
    assert tombstones.find("s0") is None
    assert tombstones.find("s1") is None
    assert tombstones.find("jumped") is not None
    assert [stone.id for stone in tombstones.all()[-2:]] == ["jumped", "after"]


def test_a_lower_limit_takes_effect_with_the_next_deletion(tmp_path: Path) -> None:
    tombstones = filled(tmp_path / "tombstones.json", 10, limit=3)
    tombstones.add("new", None, "", 50.0)
    assert [stone.id for stone in tombstones.all()] == ["s8", "s9", "new"]


def test_a_lost_file_is_set_aside_and_deletions_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tombstones.json"
    path.write_bytes(b"rubbish")
    tombstones = Tombstones(path, 1000)
    assert tombstones.find("a") is None
    tombstones.add("a", None, "", 1.0)
    assert tombstones.find("a") is not None
    assert list(tmp_path.glob("tombstones.json.corrupt-*"))
    assert any(record.levelname == "ERROR" for record in caplog.records)


def test_tombstones_of_a_newer_version_stop_everything(tmp_path: Path) -> None:
    path = tmp_path / "tombstones.json"
    path.write_text('{"version": 2}')
    with pytest.raises(DocumentNewer):
        Tombstones(path, 1000).find("a")
    with pytest.raises(DocumentNewer):
        Tombstones(path, 1000).add("a", None, "", 1.0)


def test_a_kill_while_adding_keeps_all_others(tmp_path: Path) -> None:
    step = 0
    while True:
        folder = tmp_path / str(step)
        folder.mkdir()
        tombstones = Tombstones(folder / "tombstones.json", 1000)
        tombstones.add("a", None, "", 1.0)
        was_killed = faults.killed_at(
            step, lambda stones=tombstones: stones.add("b", None, "", 2.0)
        )
        assert tombstones.find("a") is not None
        if not was_killed:
            break
        step += 1
    assert tombstones.find("b") is not None
