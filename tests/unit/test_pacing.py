"""The pace of a session: gaps, new contacts, and the cap of a day."""

from hypothesis import given
from hypothesis import strategies as st

from whatsapp_worker.pacing import DAY_S, Pace, Paced

NOON = 20_000 * DAY_S + DAY_S / 2
TEN_A_MINUTE = Pace(per_minute=10)


def test_the_first_message_goes_at_once():
    assert Paced().due_at(NOON, TEN_A_MINUTE, is_new_contact=True) == NOON


def test_the_next_waits_for_its_gap_and_a_new_contact_for_a_longer_one():
    pace = Pace(per_minute=10, new_contact_factor=3)
    paced = Paced().after(NOON, 0.0)
    assert paced.due_at(NOON, pace, is_new_contact=False) == NOON + 6
    assert paced.due_at(NOON, pace, is_new_contact=True) == NOON + 18


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0.1, 6000))
def test_a_gap_stays_within_its_jitter(lot, jitter, per_minute):
    gap_s = Pace(per_minute, jitter).gap_s(lot, is_new_contact=False)
    mean_s = 60 / per_minute
    assert mean_s * (1 - jitter) * 0.999 <= gap_s <= mean_s * (1 + jitter) * 1.001


def test_a_day_that_is_full_ends_at_midnight():
    pace = Pace(per_minute=6000, per_day=2)
    paced = Paced().after(NOON, 0.0).after(NOON + 1, 0.0)
    midnight = 20_001 * DAY_S
    assert paced.due_at(NOON + 60, pace, is_new_contact=False) == midnight
    assert paced.due_at(midnight, pace, is_new_contact=False) <= midnight
    assert paced.after(midnight, 0.0).sent_today(midnight) == 1


def test_a_clock_that_was_set_back_makes_nobody_wait():
    paced = Paced().after(NOON, 0.0)
    assert paced.due_at(NOON - 3600, TEN_A_MINUTE, is_new_contact=True) == NOON - 3600


@given(
    st.dictionaries(
        st.sampled_from(["last_at", "lot", "day", "sent"]),
        st.none() | st.text() | st.sampled_from([10**400, float("inf"), float("nan"), [], {}]),
    )
)
def test_what_cannot_be_read_counts_as_nothing_sent(stored):
    assert Paced.read(stored).due_at(NOON, TEN_A_MINUTE, is_new_contact=False) <= NOON


def test_it_is_read_as_it_was_written():
    paced = Paced().after(NOON, 0.25)
    assert Paced.read(paced.as_dict()) == paced
