"""Log lines: one event, its facts, one line."""

import json
import logging
import subprocess
import sys

import pytest

from whatsapp_worker.telemetry import EventFormatter, JsonFormatter


def record(name="session.connected", **facts):
    made = logging.makeLogRecord({"msg": name, "levelname": "INFO", "created": 0.25, "msecs": 250})
    vars(made).update(facts)
    return made


def test_a_line_is_time_level_event_and_facts():
    line = EventFormatter().format(record(session="sales", attempt=2, wait_s=6.0))
    expected = "1970-01-01T00:00:00.250Z INFO session.connected session=sales attempt=2 wait_s=6"
    assert line == expected


@pytest.mark.parametrize("value", ["two words", "a\nb", 'say "x"', "", "k=v", "\x1b[31m"])
def test_a_value_never_breaks_the_line_or_reaches_the_terminal_raw(value):
    line = EventFormatter().format(record(why=value))
    assert "\n" not in line and "\x1b" not in line
    assert json.loads(line.partition("why=")[2]) == value


def test_json_lines_carry_the_same_facts():
    facts = json.loads(JsonFormatter().format(record(session="sales", jid={"user": 1})))
    assert facts["event"] == "session.connected"
    assert facts["session"] == "sales" and facts["jid"] == {"user": 1}


def test_logs_go_to_stderr_once_even_when_a_library_configures_logging_too():
    code = (
        "import logging; from whatsapp_worker import settings, telemetry;"
        "telemetry.set_up(settings.Settings()); logging.basicConfig(level=logging.INFO);"
        "logging.getLogger('x').info('a.happened', extra={'n': 1})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.count("a.happened") == 1
