"""What docs/ publishes for programs."""

import json
from pathlib import Path

from jsonschema import Draft202012Validator

DOCS = Path(__file__).parents[1] / "docs"
PUBLISHED = json.loads((DOCS / "message.schema.json").read_text())
SCHEMA = Draft202012Validator(PUBLISHED)  # of a job's keyword arguments
