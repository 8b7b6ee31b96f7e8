"""The README tells what is so."""

import re
import shlex
from pathlib import Path

import pytest

from whatsapp_worker.cli import arguments
from whatsapp_worker.sandbox.api import make_app
from whatsapp_worker.sandbox.media import Media
from whatsapp_worker.sandbox.network import Network
from whatsapp_worker.settings import Settings

PATH = Path(__file__).parents[2] / "README.md"
README = PATH.read_text()
BEGIN, END = "<!-- settings -->", "<!-- /settings -->"
BLOCKS = re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)
COMMANDS = [
    line.strip().removeprefix(".venv/bin/").split("   ")[0]
    for block in BLOCKS
    for line in block.splitlines()
    if line.strip().removeprefix(".venv/bin/").startswith("whatsapp-worker ")
]


def settings_table() -> str:
    """What stands between the two marks."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for row in Settings().table({}):
        is_host = row["variable"] == "WORKER_HOST"
        default = "the host's name" if is_host else f"{row['default']} {row['unit']}".strip()
        default = "none" if row["default"] == "-" else default
        lines.append(f"| `{row['variable']}` | {default} | {row['sentence']} |")
    return "\n".join(lines)


def test_the_table_of_settings_is_that_of_the_program():
    shown = README.partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == settings_table(), "run: python tests/unit/test_readme.py"


@pytest.mark.parametrize(("code", "meaning"), arguments.EXIT_CODES.items())
def test_every_exit_code_is_explained_in_the_same_words(code, meaning):
    rows = re.findall(rf"^\| {code} \| (.*) \|$", README, re.MULTILINE)
    assert [row.replace("`", "") for row in rows] == [meaning.replace("`", "")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_is_one(command):
    words = shlex.split(command)[1:]
    assert arguments.parser().parse_args(words)


def test_every_route_of_the_sandbox_is_shown(tmp_path):
    network = Network(state_dir=tmp_path, later=lambda seconds, call: None)
    app = make_app(network, Media(tmp_path / "media"), "key")
    paths = {resource.canonical.partition("{")[0] for resource in app.router.resources()}
    rows = re.findall(r"^\| (`(?:GET|POST).*?) \|", README, re.MULTILINE)
    assert {path for row in rows for path in re.findall(r"/[a-z-]+/?", row)} == paths
    network.close()


def test_commands_were_found_in_the_readme():
    assert len(COMMANDS) > 10


if __name__ == "__main__":
    before, _, rest = README.partition(BEGIN)
    PATH.write_text(f"{before}{BEGIN}\n{settings_table()}\n{END}{rest.partition(END)[2]}")
