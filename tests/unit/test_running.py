"""The unit file and the Procfile say what the program understands."""

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from whatsapp_worker.cli import arguments
from whatsapp_worker.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "docs" / "whatsapp-worker.service"
PROCFILE = (ROOT / "Procfile").read_text().splitlines()


def service() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, delimiters="=", strict=False)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read(UNIT)
    return parser["Service"]


def test_the_procfile_names_every_process_that_serves_and_no_other() -> None:
    named = {}
    for line in PROCFILE:
        name, _, command = line.partition(":")
        program, *words = shlex.split(command)
        assert program == "whatsapp-worker" and arguments.parser().parse_args(words).serves
        named[name] = words
    assert named == {"worker": ["run"], "events": ["events"], "maintenance": ["maintenance"]}
    [commands] = arguments.parser()._subparsers._group_actions
    serving = {name for name, made in commands.choices.items() if made.get_default("serves")}
    assert serving - {"sandbox"} == {words[0] for words in named.values()}


def test_the_unit_runs_a_command_and_gives_it_time_to_drain() -> None:
    program, *words = shlex.split(service()["ExecStart"])
    assert Path(program).name == "whatsapp-worker"
    assert arguments.parser().parse_args(words).all
    assert service()["Type"] == "notify"
    assert float(service()["TimeoutStopSec"]) > Settings.shutdown_timeout_s
    assert set(map(int, service()["RestartPreventExitStatus"].split())) <= set(arguments.EXIT_CODES)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/opt/whatsapp-worker/.venv/bin/whatsapp-worker", "/bin/true")
    unit = tmp_path / UNIT.name
    unit.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert UNIT.name not in done.stderr, done.stderr
