"""The JSON Schema of a job's keyword arguments, made from the models that check them.

`python -m whatsapp_worker.message_schema > docs/message.schema.json` publishes it.
"""

import json
from typing import Any

from whatsapp_worker import content, message

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_SESSION = "[a-z0-9][a-z0-9_-]{0,63}"


def schema() -> dict[str, Any]:
    """The whole schema. What it refuses the worker refuses, and what it accepts the worker accepts,
    but for what no schema says: a `message.to` unlike `to`, a `from` that a group needs, more
    votes than a poll has options, limits of what a text spells (a port, degrees), lengths in bytes
    (metadata, steps of a path), and a whole number written as 1.0.
    """
    definitions: dict[str, Any] = {}
    messages = [_define(model, definitions) for model in content.MODELS]
    options = message.Options.model_json_schema()
    definitions.update(options.pop("$defs", {}))
    return {
        "$schema": _DRAFT,
        "title": "Keyword arguments of jobs.outbound.send_message",
        "type": "object",
        "properties": {
            "session": {"type": "string", "pattern": f"^{_SESSION}$"},
            "to": {"type": "string", "pattern": f"^({content.ADDRESS})$"},
            "message": {"oneOf": messages},
            **_plain(options["properties"]),
        },
        "required": ["session", "to", "message", *options["required"]],
        "additionalProperties": False,
        "$defs": _plain(definitions),
    }


def _define(model: type[content.Message], definitions: dict[str, Any]) -> dict[str, str]:
    """Add a message type and what it refers to; the reference to it."""
    found = model.model_json_schema()
    definitions.update(found.pop("$defs", {}))
    definitions[model.__name__] = found
    return {"$ref": f"#/$defs/{model.__name__}"}


def _plain(value: Any) -> Any:
    """Without the titles that pydantic makes of every name."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _plain(item)
        for name, item in value.items()
        if not (name == "title" and isinstance(item, str))
    }


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
