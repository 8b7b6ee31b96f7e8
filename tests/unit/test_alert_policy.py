"""What is told, and how often."""

import json

from hypothesis import given
from hypothesis import strategies as st

from whatsapp_worker.alert_policy import (
    MAX_REMEMBERED,
    MAX_WAITING,
    RESEND_S,
    Alert,
    Memory,
    breaker_closed,
    breaker_opened,
    job_poisoned,
    message_unknown,
    purge_failed,
    scrub,
    session_changed,
    stream_filling,
)


def opened(breaker="message", session="sales"):
    return breaker_opened(
        breaker, session=session, failure="timeout", failures=[], retry_after_s=60
    )


def ended(session="sales", **changes):
    facts = {"state": "logged_out", "reason": "wa-logged-out", "sentence": "Link.", "heals": False}
    return session_changed(session, **{**facts, **changes})


def test_a_trip_is_told_once_and_again_after_the_repeat_time():
    memory = Memory(repeat_s=3600)
    assert memory.judge(opened(), 0) is not None
    assert memory.judge(opened(), 10) is None
    assert memory.judge(opened(), 3600) is not None


def test_a_trip_that_came_too_soon_is_told_later_if_it_lasts():
    memory = Memory(repeat_s=100)
    memory.judge(opened(), 0)
    memory.judge(breaker_closed("message", session="sales"), 10)
    assert memory.judge(opened(), 20) is None
    assert memory.due(99) == []
    assert memory.next_due() == 100
    assert [alert.event for alert in memory.due(100)] == ["breaker.opened"]
    assert memory.judge(breaker_closed("message", session="sales"), 110) is not None


def test_a_flapping_breaker_is_told_once_and_closed_once():
    memory = Memory(repeat_s=3600)
    told = []
    for second in range(0, 1000, 20):
        told.append(memory.judge(opened(), second))
        told.append(memory.judge(breaker_closed("message", session="sales"), second + 10))
    assert [alert.event for alert in told if alert] == ["breaker.opened", "breaker.closed"]
    assert memory.due(10_000) == []


def test_a_database_outage_is_one_alert_whoever_notices():
    memory = Memory(repeat_s=3600)
    told = [memory.judge(opened("database", f"s{n}"), n) for n in range(20)]
    told += [memory.judge(breaker_closed("database", session=f"s{n}"), 30 + n) for n in range(20)]
    assert [alert.event for alert in told if alert] == ["breaker.opened", "breaker.closed"]


def test_breakers_of_two_sessions_are_two_alerts():
    memory = Memory(repeat_s=3600)
    assert memory.judge(opened(session="sales"), 0)
    assert memory.judge(opened(session="help"), 0)


def test_recovery_from_what_was_never_told_is_not_told():
    memory = Memory(repeat_s=3600)
    assert memory.judge(breaker_closed("message", session="sales"), 0) is None


def test_what_heals_by_itself_never_alerts():
    assert ended(state="banned", reason="wa-temporary-ban", heals=True) is None
    assert ended(state="failed", reason="flapping", heals=True) is None
    for state in ("connecting", "reconnecting", "linking"):
        assert ended(state=state, reason="wa-connection-failed") is None


def test_what_an_operator_did_never_alerts():
    assert ended(reason="operator") is None


def test_every_permanent_end_alerts():
    for state in ("logged_out", "replaced", "outdated", "banned", "failed"):
        alert = ended(state=state)
        assert alert is not None and alert.event == "session.ended"


def test_a_session_that_came_back_takes_its_waiting_alert_away():
    memory = Memory(repeat_s=100)
    assert memory.judge(ended(), 0)
    assert memory.judge(ended(), 10) is None
    assert memory.judge(ended(state="connected", reason=None), 20) is None
    assert memory.due(1000) == []


def test_a_clock_set_back_does_not_silence_an_alert():
    memory = Memory(repeat_s=100)
    memory.judge(opened(), 1_000_000)
    assert memory.judge(opened(), 50)


def test_what_sentry_did_not_take_is_told_again_even_after_its_end():
    memory = Memory(repeat_s=3600)
    alert = memory.judge(opened(), 0)
    memory.give_back(alert, 5)
    assert memory.judge(breaker_closed("message", session="sales"), 10)
    assert memory.due(5 + RESEND_S) == [alert]


def test_memory_survives_a_restart():
    memory = Memory(repeat_s=100)
    memory.judge(opened(), 0)
    memory.judge(opened(), 10)
    fields = json.loads(json.dumps(memory.as_fields()))
    again = Memory(repeat_s=100, fields=fields)
    assert again.judge(opened(), 20) is None
    assert [alert.key for alert in again.due(100)] == [opened().key]
    assert again.as_fields()["open"] == [opened().key]


def test_memory_is_bounded():
    memory = Memory(repeat_s=10**9)
    for number in range(MAX_REMEMBERED + 500):
        memory.judge(opened(session=f"s{number}"), number)
        memory.judge(opened(session=f"s{number}"), number)
    fields = memory.as_fields()
    assert len(fields["told"]) == MAX_REMEMBERED
    assert len(fields["waiting"]) <= MAX_WAITING and len(fields["open"]) <= MAX_REMEMBERED


def test_every_alert_says_something():
    alerts = [
        message_unknown("sales", message_ids=["crm-1"], older_than_s=3600),
        job_poisoned("sales", job_id="j1", problem="data: not JSON"),
        stream_filling(full=0.97, slowest_group="ledger"),
        purge_failed(problem="disk full"),
    ]
    assert all(isinstance(alert, Alert) and alert.text and alert.level for alert in alerts)


@given(st.from_regex(r"\+?[1-9][0-9]{6,14}", fullmatch=True), st.text(), st.text())
def test_no_full_number_survives_scrubbing(number, before, after):
    text = f"{before} {number} {after}"
    assert number.lstrip("+") not in scrub(text)


def test_numbers_are_masked_however_they_are_written():
    for text in ("no LID found for 5511999990001@s.whatsapp.net", "+55 (11) 99999-0001"):
        assert (
            "99999" not in scrub(text) and scrub(text).replace("@s.whatsapp.net", "")[-2:] == "01"
        )
    assert scrub({"5511999990001": [5511999990001]}) == {"…01": ["…01"]}


def test_ids_dates_and_small_numbers_stay():
    for value in ("d1f2c3b4-1234-5678-9012-123456789012", "2026-03-01 12", 463, 1.5, True, None):
        assert scrub(value) == value


@given(
    st.recursive(
        st.none() | st.text() | st.integers(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_scrubbing_takes_any_json(value):
    json.dumps(scrub(value))
