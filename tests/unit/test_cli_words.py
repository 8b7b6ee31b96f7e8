"""The command line's words: help, exit codes, and what is imported for them."""

import json
import re
import subprocess
import sys

import pytest

from whatsapp_worker.cli import arguments, main

COMMANDS = ["run", "events", "sandbox", "demo", "link", "status", "start", "stop", "restart"]
COMMANDS += ["logout", "delete", "send", "messages", "settings", "health", "logs"]
COMMANDS += ["maintenance", "purge", "doctor", "session", "queue"]


def test_help_names_every_command_exit_code_and_the_main_variables(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    for word in [*COMMANDS, "DATA_DIR", "REDIS_URL", *map(str, arguments.EXIT_CODES)]:
        assert re.search(rf"^ +{word}\b", told, re.MULTILINE), word


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert command in told and "exit codes" in told


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_served_by_a_function_that_exists(command):
    words = {
        "messages": ["list", "s"],
        "queue": ["s"],
        "session": ["import", "f"],
        "send": ["s", "1", "t"],
        "link": ["s"],
    }.get(command, [])
    operations = ("start", "stop", "restart", "logout", "delete")
    options = arguments.parser().parse_args(
        [command, *words, *(["--all"] if command in operations else [])]
    )
    assert callable(arguments.command(options))


def test_help_loads_none_of_the_heavy_packages():
    code = (
        "import sys, contextlib\n"
        "from whatsapp_worker.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "heavy = {'redis', 'rq', 'pydantic', 'sqlalchemy', 'neonize', 'aiohttp', 'segno'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("package", ["aiohttp", "xeddsa"])
def test_a_sandbox_without_its_packages_says_what_to_install(package, tmp_path):
    code = (
        "import sys; from whatsapp_worker.cli import main\n"
        f"sys.modules['{package}'] = None\n"
        "sys.exit(main(['sandbox', '--state-dir', 'state']))"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert ".[sandbox]" in done.stderr and package in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words", [[], ["nonsense"], ["stop"], ["send", "s"], ["status", "--port", "1"]]
)
def test_wrong_usage_ends_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["send", "s", "1", "x", "--timeout", "soon"], "--timeout: must be from 0.001 to 86400"),
        (["send", "s", "1", "x", "--timeout", "nan"], "--timeout: must be from 0.001 to 86400"),
        (["logs", "--lines", "x"], "--lines: must be from 1 to 100000"),
        (["sandbox", "--proxy-port", "70000"], "--proxy-port: must be from 0 to 65535"),
    ],
)
def test_a_number_that_is_none_is_refused_with_its_range(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_refused_before_a_code_is_asked_for(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    for png in (tmp_path / "none" / "qr.png", tmp_path):
        assert main(["link", "sales", "--json", "--png", str(png)]) == 2
        told = json.loads(capsys.readouterr().out)
        assert told["event"] == "failed" and "--png" in told["sentence"]
    assert not (tmp_path / "data" / "sessions").exists()


def test_bad_settings_are_listed_all_at_once(monkeypatch, capsys):
    monkeypatch.setenv("SEND_TIMEOUT_S", "never")
    monkeypatch.setenv("MAX_SESSIONS", "0")
    assert main(["settings"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "SEND_TIMEOUT_S" in told.err and "MAX_SESSIONS" in told.err


def test_a_setting_whose_name_is_misspelt_is_told_beside_the_table(monkeypatch, capsys):
    monkeypatch.setenv("MAX_SESION", "5")
    assert main(["settings", "--json"]) == 0
    told = capsys.readouterr()
    assert "MAX_SESION is not read; is MAX_SESSIONS meant?" in told.err
    assert "MAX_SESION" not in told.out.replace("MAX_SESSIONS", "")


def test_settings_tell_value_origin_and_unit_and_hide_passwords(monkeypatch, capsys):
    monkeypatch.setenv("REDIS_URL", "redis://user:hunter2@redis.example/0")
    assert main(["settings", "--json"]) == 0
    told = capsys.readouterr().out
    rows = {row["variable"]: row for row in map(json.loads, told.splitlines())}
    assert rows["REDIS_URL"]["origin"] == "environment"
    assert rows["SEND_TIMEOUT_S"]["value"] == "30" and rows["SEND_TIMEOUT_S"]["unit"] == "s"
    assert "hunter2" not in told
