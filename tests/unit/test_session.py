"""The state machine: one table, one step."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whatsapp_worker.session import (
    SURPRISES,
    TABLE,
    ImpossibleStep,
    Reason,
    State,
    Trigger,
    document,
    sentence,
    state_sentence,
    step,
)

STATES_PAGE = Path(__file__).parents[2] / "docs" / "states.md"


@given(st.sampled_from(State), st.lists(st.sampled_from(Trigger)))
def test_any_sequence_of_triggers_steps_through_the_table_alone(
    state: State, triggers: list[Trigger]
) -> None:
    for trigger in triggers:
        try:
            following = step(state, trigger)
        except ImpossibleStep:
            assert trigger not in SURPRISES
            assert trigger not in TABLE[state]
            continue
        if following is None:
            assert trigger in SURPRISES
        else:
            assert TABLE[state][trigger] is following
            state = following


@pytest.mark.parametrize("state", State)
def test_every_state_can_be_deleted_and_none_comes_back(state: State) -> None:
    assert step(state, Trigger.DELETE) is State.DELETED
    assert set(TABLE[State.DELETED].values()) == {State.DELETED}


def test_every_state_but_those_that_say_so_already_can_turn_out_to_have_no_credentials() -> None:
    for state in set(State) - {State.UNLINKED, State.LOGGED_OUT, State.DELETED}:
        assert step(state, Trigger.UNPAIRED) is State.UNLINKED


def test_every_state_can_be_reached_from_unlinked() -> None:
    reached, frontier = {State.UNLINKED}, [State.UNLINKED]
    while frontier:
        for following in TABLE[frontier.pop()].values():
            if following not in reached:
                reached.add(following)
                frontier.append(following)
    assert reached == set(State)


def test_what_whatsapp_says_of_a_session_that_runs_no_more_is_ignored() -> None:
    for trigger in SURPRISES:
        assert step(State.STOPPED, trigger) is None


def test_our_own_mistake_raises() -> None:
    with pytest.raises(ImpossibleStep):
        step(State.UNLINKED, Trigger.SPENT)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_sentence_that_says_something(reason: Reason) -> None:
    text = sentence(reason, "sales")
    assert text.endswith((".", "sales"))
    assert "{" not in text


def test_the_diagram_in_the_docs_is_the_table() -> None:
    assert STATES_PAGE.read_text() == document(), (
        "stale: python -m whatsapp_worker.session > docs/states.md"
    )


_NOT_BY_LINKING = {Reason.CAPACITY, Reason.WRONG_NETWORK, Reason.CANNOT_RUN}


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason not in _NOT_BY_LINKING])
def test_a_failed_link_says_how_to_try_again(reason: Reason) -> None:
    text = sentence(reason, "sales", linking=True)
    assert text.endswith("whatsapp-worker link sales") and "by itself" not in text


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason not in _NOT_BY_LINKING])
def test_a_link_by_code_that_failed_says_how_to_ask_for_another_code(reason: Reason) -> None:
    text = sentence(reason, "sales", linking=True, phone="5511999990009")
    assert text.endswith("whatsapp-worker link sales --phone +5511999990009")
    assert "QR" not in text and text.count("--phone") == 1


@pytest.mark.parametrize("reason", [None, *Reason])
def test_a_session_without_credentials_is_not_told_to_start(reason: Reason | None) -> None:
    text = state_sentence(State.UNLINKED, reason, "sales")
    assert text and "start sales" not in text and "by itself" not in text
