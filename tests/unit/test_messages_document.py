"""docs/messages.md, docs/message.schema.json and docs/crm.md show what is so."""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from published import DOCS, SCHEMA

from whatsapp_worker.client import Options, Outbox
from whatsapp_worker.content import TYPES
from whatsapp_worker.errors import InvalidMessage
from whatsapp_worker.event_names import Event
from whatsapp_worker.media_types import LIMITS_MIB
from whatsapp_worker.message import validate

TEXT = (DOCS / "messages.md").read_text()
EXAMPLES = [json.loads(block) for block in re.findall(r"```json\n(.*?)\n```\n", TEXT, re.DOTALL)]


every_example = pytest.mark.parametrize(
    "message", EXAMPLES, ids=lambda message: message.get("type", "status")
)


def job_of(message: dict[str, Any]) -> dict[str, Any]:
    return {"session": "sales", "to": "5511999990001", "message_id": "1", "message": message}


@every_example
def test_every_example_is_accepted(message: dict[str, Any]) -> None:
    validate(job_of(message))
    SCHEMA.validate(job_of(message))


ODD = (
    *(None, True, -1, 1.5, 10**400, "", " ", "\u2028", "a\0b", "x" * 70_000, "+5511999990001"),
    *([], {}, [""], ["x"] * 2000),
)


def spoilt(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Copies in which one value is another or absent, or an object has a field too many."""
    for *path, last in places(job):
        for value in ODD:
            changed = copy.deepcopy(job)
            at(changed, path)[last] = value
            yield changed
        changed = copy.deepcopy(job)
        del at(changed, path)[last]
        yield changed
        if isinstance(at(job, path), dict):
            changed = copy.deepcopy(job)
            at(changed, path)["extra"] = 1
            yield changed


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        yield (key,)
        if isinstance(item, dict | list):
            yield from ((key, *rest) for rest in places(item))


def at(value: Any, path: list[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def is_taken(job: dict[str, Any]) -> bool:
    try:
        validate(job)
    except InvalidMessage:
        return False
    return True


@every_example
def test_the_schema_refuses_what_the_worker_refuses_and_nothing_else(
    message: dict[str, Any],
) -> None:
    jobs = list(spoilt(job_of(message)))
    assert [job for job in jobs if is_taken(job) != SCHEMA.is_valid(job)] == []
    assert any(is_taken(job) for job in jobs) and not all(is_taken(job) for job in jobs)


def test_every_type_has_an_example() -> None:
    assert set(TYPES) == {message["type"] for message in EXAMPLES if "type" in message}


def test_the_limits_of_files_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) MiB \|$", TEXT, re.MULTILINE)
    assert {kind: int(limit) for kind, limit in rows} == LIMITS_MIB


@pytest.mark.parametrize("event", Event)
def test_every_event_is_explained_to_crms(event: Event) -> None:
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "crm.md").read_text(), re.MULTILINE)
    assert sum(f"`{event}`" in row for row in rows) == 1


def test_every_method_and_option_of_the_client_is_explained() -> None:
    crm = (DOCS / "crm.md").read_text()
    methods = {name for name in vars(Outbox) if re.match("send_|mark_", name)}
    assert methods <= set(re.findall(r"\b(send_\w+|mark_read)\b", crm))
    rows = re.findall(r"^\| (`\w+.*?) \| .* \|$", crm.partition("## Many")[0], re.MULTILINE)
    shown = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert set(Options.__annotations__) <= shown
