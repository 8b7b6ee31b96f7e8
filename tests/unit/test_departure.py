"""Which of several endings counts, and how much time is left."""

import itertools

import pytest

from whatsapp_worker.child import Departure
from whatsapp_worker.endings import Ending, EndingKind
from whatsapp_worker.reports import Exit

LOST = Ending(EndingKind.LOST)
STOPPED = Ending(EndingKind.STOPPED)
LOGGED_OUT = Ending(EndingKind.LOGGED_OUT)
CODES = {LOST: Exit.CONNECTION_ENDED, STOPPED: Exit.OK, LOGGED_OUT: Exit.CONNECTION_ENDED}


def test_before_the_first_word_there_is_all_the_time_in_the_world():
    departure = Departure()
    assert departure.left_s() == float("inf")
    assert not departure.is_due.is_set()
    ending, code = departure.verdict()
    assert (ending.kind, code) == (EndingKind.CRASHED, Exit.CRASHED)


@pytest.mark.parametrize("order", list(itertools.permutations([LOST, STOPPED, LOGGED_OUT])))
def test_the_weightiest_ending_counts_in_whatever_order_they_come(order):
    departure = Departure()
    for ending in order:
        departure.announce(ending, CODES[ending], within_s=1)
    assert departure.verdict() == (LOGGED_OUT, Exit.CONNECTION_ENDED)
    assert departure.is_certain.is_set()


def test_of_two_like_endings_the_first_counts():
    departure = Departure()
    first, second = Ending(EndingKind.LOST, detail="1"), Ending(EndingKind.LOST, detail="2")
    departure.announce(first, 80, within_s=1)
    departure.announce(second, 83, within_s=1)
    assert departure.verdict() == (first, 80)
    assert not departure.is_certain.is_set()


def test_a_later_word_shortens_the_time_and_never_lengthens_it():
    departure = Departure()
    departure.announce(STOPPED, 0, within_s=10)
    departure.announce(LOST, 80, within_s=2)
    assert departure.left_s() <= 2
    departure.announce(STOPPED, 0, within_s=100)
    assert departure.left_s() <= 2
    departure.announce(STOPPED, 0, within_s=0)
    assert departure.left_s() == 0
