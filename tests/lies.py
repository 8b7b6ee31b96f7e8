"""Lies about what became of a thousand messages: a judge that does not notice each is none."""

import dataclasses
from typing import Any

import mixture
from judging import FINAL_EVENTS, Facts, Verdict
from mixture import Order


def _some(verdict: Verdict, fate: str) -> Order:
    return next(order for order in verdict.orders.values() if order.fate_name == fate)


def _arrival(facts: Facts, order: Order) -> int:
    return [arrival.mark for arrival in facts.arrivals].index(order.mark)


def _final_events(facts: Facts, order: Order) -> list[dict[str, Any]]:
    mine = (e for e in facts.events if e["payload"].get("job_id") == order.job_id)
    return [event for event in mine if event["event"] in FINAL_EVENTS]


def it_was_sent_twice(facts: Facts, verdict: Verdict) -> None:
    first = facts.arrivals[_arrival(facts, _some(verdict, mixture.EVERYDAY))]
    facts.arrivals.append(dataclasses.replace(first, wa_message_id="3EB0"))


def it_never_arrived(facts: Facts, verdict: Verdict) -> None:
    del facts.arrivals[_arrival(facts, _some(verdict, mixture.EVERYDAY))]


def it_arrived_though_it_failed(facts: Facts, verdict: Verdict) -> None:
    mark = _some(verdict, "not on WhatsApp").mark
    facts.arrivals.append(dataclasses.replace(facts.arrivals[0], mark=mark))


def it_arrived_though_it_was_cancelled(facts: Facts, verdict: Verdict) -> None:
    mark = _some(verdict, "cancelled long before").mark
    facts.arrivals.append(dataclasses.replace(facts.arrivals[0], mark=mark))


def it_was_overtaken(facts: Facts, verdict: Verdict) -> None:
    at = _arrival(facts, _some(verdict, mixture.EVERYDAY))
    facts.arrivals.append(facts.arrivals.pop(at))


def it_came_before_its_time(facts: Facts, verdict: Verdict) -> None:
    facts.due[_some(verdict, "soon").job_id] += 3600


def nobody_was_told(facts: Facts, verdict: Verdict) -> None:
    for event in _final_events(facts, _some(verdict, mixture.EVERYDAY)):
        facts.events.remove(event)


def it_was_told_twice(facts: Facts, verdict: Verdict) -> None:
    event = _final_events(facts, _some(verdict, mixture.EVERYDAY))[0]
    facts.events.append({**event, "id": "another"})


def it_was_told_otherwise(facts: Facts, verdict: Verdict) -> None:
    _final_events(facts, _some(verdict, mixture.EVERYDAY))[0]["event"] = "message.failed"


def its_metadata_was_lost(facts: Facts, verdict: Verdict) -> None:
    del _final_events(facts, _some(verdict, "refused"))[0]["payload"]["metadata"]


def its_receipt_lost_the_metadata(facts: Facts, verdict: Verdict) -> None:
    receipts = (e for e in facts.events if e["event"] == "message.delivered")
    del next(e for e in receipts if "metadata" in e["payload"])["payload"]["metadata"]


def a_process_crashed(facts: Facts, verdict: Verdict) -> None:
    changed = next(e for e in facts.events if e["event"] == "session.state_changed")
    changed["payload"]["reason"] = "process-crashed"


def the_ledger_says_otherwise(facts: Facts, verdict: Verdict) -> None:
    id = _some(verdict, mixture.EVERYDAY).message_id
    facts.rows[id] = facts.rows[id]._replace(status="unknown")


def the_ledger_forgot_it(facts: Facts, verdict: Verdict) -> None:
    del facts.rows[_some(verdict, "expires").message_id]


def its_job_says_otherwise(facts: Facts, verdict: Verdict) -> None:
    facts.jobs[_some(verdict, "expires").job_id] = ("failed", {"status": "failed"})


def its_job_names_another(facts: Facts, verdict: Verdict) -> None:
    facts.jobs[_some(verdict, mixture.EVERYDAY).job_id][1]["wa_message_id"] = "3EB0"


def its_job_has_not_ended(facts: Facts, verdict: Verdict) -> None:
    id = _some(verdict, mixture.EVERYDAY).job_id
    facts.jobs[id] = ("queued", facts.jobs[id][1])


def the_answer_was_that_it_is_cancelled(facts: Facts, verdict: Verdict) -> None:
    facts.answers[_some(verdict, mixture.EVERYDAY).message_id] = "cancelled"


LIES = (
    it_was_sent_twice,
    it_never_arrived,
    it_arrived_though_it_failed,
    it_arrived_though_it_was_cancelled,
    it_was_overtaken,
    it_came_before_its_time,
    nobody_was_told,
    it_was_told_twice,
    it_was_told_otherwise,
    its_metadata_was_lost,
    its_receipt_lost_the_metadata,
    a_process_crashed,
    the_ledger_says_otherwise,
    the_ledger_forgot_it,
    its_job_says_otherwise,
    its_job_names_another,
    its_job_has_not_ended,
    the_answer_was_that_it_is_cancelled,
)
