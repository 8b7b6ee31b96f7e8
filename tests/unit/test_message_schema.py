"""The published JSON Schema."""

import json
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from whatsapp_worker import recipient
from whatsapp_worker.content import MODELS
from whatsapp_worker.errors import InvalidMessage
from whatsapp_worker.message_schema import schema

PUBLISHED = Path(__file__).parents[2] / "docs" / "message.schema.json"


def test_the_published_schema_is_not_stale():
    assert json.loads(PUBLISHED.read_text()) == schema(), (
        "run: python -m whatsapp_worker.message_schema > docs/message.schema.json"
    )


def test_every_type_and_every_reference_is_in_it():
    whole = schema()
    text = json.dumps(whole)
    names = set(re.findall(r'"#/\$defs/(\w+)"', text))
    assert names <= set(whole["$defs"])
    assert len(whole["properties"]["message"]["oneOf"]) == len(MODELS)


@settings(deadline=None)
@given(st.from_regex(schema()["properties"]["to"]["pattern"].replace("$", r"\Z")))
def test_every_recipient_that_it_allows_is_accepted(to):
    recipient.parse(to)


@settings(deadline=None)
@given(st.text(alphabet="0123456789+@-s.whatpnelidgcu", max_size=30))
def test_every_recipient_that_it_refuses_is_refused(to):
    if not re.search(schema()["properties"]["to"]["pattern"], to):
        try:
            recipient.parse(to)
        except InvalidMessage:
            return
        raise AssertionError(to)
