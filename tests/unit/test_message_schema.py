"""The published JSON Schema."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from published import PUBLISHED

from whatsapp_worker import recipient
from whatsapp_worker.content import MODELS
from whatsapp_worker.errors import InvalidMessage
from whatsapp_worker.message_schema import schema


def test_the_published_schema_is_not_stale():
    assert schema() == PUBLISHED, (
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


# Of draft 2020-12, as far as it is used here; a validator ignores words that it does not know.
KEYWORDS = {
    *("$schema", "$defs", "$ref", "title", "description", "default", "type", "const", "enum"),
    *("properties", "required", "additionalProperties", "items", "uniqueItems", "pattern"),
    *("minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum"),
    *("anyOf", "oneOf"),
}


def words(part: Any) -> Iterator[str]:
    """Every keyword, wherever it stands."""
    for name, value in part.items():
        yield name
        if name in ("properties", "$defs"):
            inner = list(value.values())
        elif name in ("anyOf", "oneOf"):
            inner = value
        else:
            inner = [value] if name in ("items", "additionalProperties") else []
        for one in inner:
            yield from words(one) if isinstance(one, dict) else ()


def test_every_keyword_is_one_of_json_schema():
    Draft202012Validator.check_schema(schema())
    assert set(words(schema())) <= KEYWORDS


@pytest.mark.parametrize(
    ("definition", "name", "good", "bad"),
    [
        ("Location", "latitude", [90, -23.5, "-46.63"], [90.1, "north", "1e3"]),
        ("CaptionedMedia", "file", ["a.jpg", "..a/b..c/.d"], ["../a", "/a", "a/./b", "a//b", "a/"]),
        (
            "CaptionedMedia",
            "link",
            ["http://a.example/@b"],
            ["https://user:secret@a.example", "/"],
        ),
        ("TextMessage", "to", ["+5511999990001", "1@lid"], ["nobody", "12"]),
    ],
)
def test_a_field_of_the_schema_takes_what_the_worker_takes(definition, name, good, bad):
    reference = f"#/$defs/{definition}/properties/{name}"
    field = Draft202012Validator({"$ref": reference, "$defs": schema()["$defs"]})
    assert [value for value in [*good, *bad] if field.is_valid(value)] == good
