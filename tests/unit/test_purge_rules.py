"""Whom the purge removes."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whatsapp_worker.purge_rules import Facts, Keep, Kind, Limits, Record, Remove, judge
from whatsapp_worker.session import State

DAY = 86_400.0
LIMITS = Limits(link_timeout_s=300, stale_after_s=7 * DAY, purge_linked_after_s=None)
STRICT = dataclasses.replace(LIMITS, purge_linked_after_s=30 * DAY)
NOW = 1_000_000_000.0


def facts(**more: object) -> Facts:
    known: dict[str, object] = {
        "session": "sales",
        "record": Record.WHOLE,
        "state": State.UNLINKED,
        "is_wanted_deleted": False,
        "was_linked": False,
        "is_leased": False,
        "is_link_pending": False,
        "is_supervised": True,
        "touched_at": NOW,
        "alive_at": 0.0,
        "waiting": 0,
    }
    return Facts(**{**known, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "was_linked", "limit_s", "kind"),
    [
        (State.UNLINKED, False, 300, Kind.NEVER_LINKED),
        (None, False, 300, Kind.NEVER_LINKED),
        (State.STOPPED, False, 300, Kind.NEVER_LINKED),
        (State.LOGGED_OUT, True, 7 * DAY, Kind.LOGGED_OUT),
    ],
)
def test_what_is_worthless_goes_when_its_time_is_over(
    state: State | None, was_linked: bool, limit_s: float, kind: Kind
) -> None:
    young = facts(state=state, was_linked=was_linked, touched_at=NOW - limit_s + 1)
    assert judge(young, LIMITS, NOW) == Keep()
    old = facts(state=state, was_linked=was_linked, touched_at=NOW - limit_s)
    assert judge(old, LIMITS, NOW) == Remove(kind)


@pytest.mark.parametrize(
    "state", [State.FAILED, State.REPLACED, State.BANNED, State.OUTDATED, State.STOPPED]
)
def test_good_credentials_are_reported_as_stale_and_removed_only_where_that_is_set(
    state: State,
) -> None:
    old = facts(state=state, was_linked=True, touched_at=NOW - 20 * DAY)
    assert judge(old, LIMITS, NOW) == Keep("stale: linked, and not connected for 20 days")
    assert judge(old, STRICT, NOW) == Keep("stale: linked, and not connected for 20 days")
    older = dataclasses.replace(old, touched_at=NOW - 31 * DAY)
    assert judge(older, LIMITS, NOW) == Keep("stale: linked, and not connected for 31 days")
    assert judge(older, STRICT, NOW) == Remove(Kind.LINKED)
    alive = dataclasses.replace(older, alive_at=NOW - 1)
    assert judge(alive, STRICT, NOW) == Keep()


def test_a_session_with_messages_waiting_stays_and_says_so() -> None:
    old = facts(touched_at=0.0)
    assert judge(dataclasses.replace(old, waiting=1), LIMITS, NOW) == Keep("1 message waits for it")
    assert judge(dataclasses.replace(old, waiting=3), LIMITS, NOW) == Keep("3 messages wait for it")
    unknown = judge(dataclasses.replace(old, waiting=None), LIMITS, NOW)
    assert isinstance(unknown, Keep)
    assert unknown.why


@pytest.mark.parametrize(
    "state", [State.CONNECTED, State.LINKING, State.CONNECTING, State.RECONNECTING]
)
def test_an_active_session_stays_but_a_state_that_nobody_keeps_is_history(state: State) -> None:
    old = facts(state=state, touched_at=0.0)
    assert judge(old, STRICT, NOW) == Keep()
    history = dataclasses.replace(old, is_supervised=False)
    assert judge(history, STRICT, NOW) == Remove(Kind.NEVER_LINKED)


def test_a_link_request_that_the_supervisor_has_not_answered_keeps_the_session() -> None:
    asked = facts(touched_at=0.0, is_link_pending=True)
    assert judge(asked, STRICT, NOW) == Keep()
    history = dataclasses.replace(asked, is_supervised=False)
    assert judge(history, STRICT, NOW) == Remove(Kind.NEVER_LINKED)


def test_a_deletion_is_finished_whatever_else_is_known() -> None:
    for record in Record:
        deleted = facts(is_wanted_deleted=True, record=record, waiting=5, state=State.CONNECTED)
        assert judge(deleted, LIMITS, NOW) == Remove(Kind.DELETED)
        leased = dataclasses.replace(deleted, is_leased=True)
        assert judge(leased, LIMITS, NOW) == Keep("its process still runs")


def test_a_folder_without_a_record_goes_later_when_credentials_lie_in_it() -> None:
    bare = facts(record=Record.MISSING, state=None, touched_at=NOW - 301)
    assert judge(bare, LIMITS, NOW) == Remove(Kind.NO_RECORD)
    linked = dataclasses.replace(bare, was_linked=True)
    assert judge(linked, LIMITS, NOW) == Keep()
    old = dataclasses.replace(linked, touched_at=NOW - 8 * DAY)
    assert judge(old, LIMITS, NOW) == Remove(Kind.NO_RECORD)


def test_a_broken_record_stays_and_is_reported() -> None:
    assert judge(facts(record=Record.BROKEN, touched_at=0.0), LIMITS, NOW) == Keep(
        "its record cannot be read"
    )


TIMES = st.floats(-1e10, 1e10)
ANY_FACTS = st.builds(
    Facts,
    session=st.just("sales"),
    record=st.sampled_from(Record),
    state=st.sampled_from([*State, None]),
    is_wanted_deleted=st.booleans(),
    was_linked=st.booleans(),
    is_leased=st.booleans(),
    is_supervised=st.booleans(),
    touched_at=TIMES,
    alive_at=TIMES,
    waiting=st.none() | st.integers(0, 5),
)


@given(found=ANY_FACTS, now=TIMES)
def test_no_clock_removes_what_is_in_use_or_still_good(found: Facts, now: float) -> None:
    verdict = judge(found, LIMITS, now)
    if found.is_leased:
        assert isinstance(verdict, Keep)
    if isinstance(verdict, Remove) and verdict.kind is not Kind.DELETED:
        assert found.waiting == 0
        assert not found.is_wanted_deleted
        assert verdict.kind is not Kind.LINKED
        if found.was_linked:
            assert found.record is Record.MISSING or found.state is State.LOGGED_OUT


@given(found=ANY_FACTS, now=TIMES, back_s=st.floats(0, 1e9))
def test_a_clock_that_went_back_removes_nothing_more(
    found: Facts, now: float, back_s: float
) -> None:
    if isinstance(judge(found, STRICT, now - back_s), Remove):
        assert isinstance(judge(found, STRICT, now), Remove)
