"""The breaker: counted by hand, and against a simple model."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from whatsapp_worker.breakers import Breaker, Phase


def failing(times: int, *, at: float = 100.0) -> Breaker:
    breaker = Breaker()
    for _ in range(times):
        breaker = breaker.failed(at, "timeout", threshold=5)
    return breaker


def test_it_opens_at_the_threshold_and_not_before() -> None:
    assert failing(4).phase(100, reset_s=60) is Phase.CLOSED
    assert failing(5).phase(100, reset_s=60) is Phase.OPEN


def test_a_success_in_between_starts_the_count_anew() -> None:
    breaker = failing(4).succeeded()
    assert breaker.failed(100, "timeout", threshold=5).phase(100, reset_s=60) is Phase.CLOSED


def test_it_is_half_open_after_its_time_and_one_failure_opens_it_again() -> None:
    breaker = failing(5)
    assert breaker.phase(159.9, reset_s=60) is Phase.OPEN
    assert breaker.phase(160, reset_s=60) is Phase.HALF_OPEN
    again = breaker.failed(161, "timeout", threshold=5)
    assert again.phase(161, reset_s=60) is Phase.OPEN
    assert again.phase(221, reset_s=60) is Phase.HALF_OPEN
    assert breaker.succeeded().phase(161, reset_s=60) is Phase.CLOSED


def test_a_clock_set_back_does_not_keep_it_open() -> None:
    assert failing(5, at=1e9).phase(100, reset_s=60) is Phase.HALF_OPEN


@given(st.lists(st.booleans(), max_size=30))
def test_it_is_closed_exactly_while_fewer_failures_in_a_row_than_the_threshold(
    outcomes: list[bool],
) -> None:
    breaker, row = Breaker(), 0
    for is_success in outcomes:
        breaker = breaker.succeeded() if is_success else breaker.failed(0, "x", threshold=3)
        row = 0 if is_success else row + 1
        assert (breaker.phase(0, reset_s=1) is Phase.CLOSED) == (row < 3)
        assert Breaker.read(breaker.as_dict()) == breaker


_STORED = (
    st.text() | st.none() | st.floats() | st.integers() | st.just(10**400) | st.lists(st.text())
)


@given(st.dictionaries(st.sampled_from(["failures", "opened_at", "last"]), _STORED))
def test_what_cannot_be_read_counts_as_closed_or_as_what_it_says(stored: dict[str, Any]) -> None:
    breaker = Breaker.read(stored)
    assert breaker.phase(0, reset_s=1) in Phase
    json.dumps(breaker.as_dict(), allow_nan=False)
