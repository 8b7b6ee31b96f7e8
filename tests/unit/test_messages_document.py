"""docs/messages.md and docs/crm.md show what is so."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from whatsapp_worker.content import TYPES
from whatsapp_worker.event_names import Event
from whatsapp_worker.media_types import LIMITS_MIB
from whatsapp_worker.message import validate

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "messages.md").read_text()
EXAMPLES = [json.loads(block) for block in re.findall(r"```json\n(.*?)\n```\n", TEXT, re.DOTALL)]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.get("type", "status"))
def test_every_example_is_accepted(message: dict[str, Any]) -> None:
    validate({"session": "sales", "to": "5511999990001", "message_id": "1", "message": message})


def test_every_type_has_an_example() -> None:
    assert set(TYPES) == {message["type"] for message in EXAMPLES if "type" in message}


def test_the_limits_of_files_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) MiB \|$", TEXT, re.MULTILINE)
    assert {kind: int(limit) for kind, limit in rows} == LIMITS_MIB


@pytest.mark.parametrize("event", Event)
def test_every_event_is_explained_to_crms(event: Event) -> None:
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "crm.md").read_text(), re.MULTILINE)
    assert sum(f"`{event}`" in row for row in rows) == 1
