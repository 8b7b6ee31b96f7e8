"""Log lines: one event, its facts, one line."""

import fcntl
import json
import logging
import subprocess
import sys
import threading

import pytest

from whatsapp_worker import telemetry
from whatsapp_worker.settings import Settings
from whatsapp_worker.telemetry import EventFormatter, JsonFormatter, render


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


def test_a_line_of_a_file_reads_like_one_on_stderr():
    made = record(session="sales", why="two words", wait_s=6.0)
    assert render(json.loads(JsonFormatter().format(made))) == EventFormatter().format(made)


def test_many_processes_share_one_file_and_rotate_it(tmp_path):
    code = (
        "import logging, sys; from pathlib import Path; from whatsapp_worker import telemetry;"
        "from whatsapp_worker.settings import Settings;"
        "telemetry.SharedFileHandler._limit = property(lambda s: 20_000, lambda s, v: None);"
        "telemetry.set_up(Settings(data_dir=Path(sys.argv[1]), log_files=30));"
        "telemetry.bind(session=sys.argv[2]);"
        "[logging.getLogger('x').info('line.written', extra={'n': n}) for n in range(500)]"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, name], stderr=subprocess.DEVNULL)
        for name in ("one", "two", "three")
    ]
    assert [writer.wait(30) for writer in writers] == [0, 0, 0]
    files = list((tmp_path / "logs").glob("worker.jsonl*"))
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    expected = {(name, n) for name in ("one", "two", "three") for n in range(500)}
    assert len(files) > 5 and len(lines) == 1500
    assert {(line["session"], line["n"]) for line in lines} == expected
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)


def test_a_process_that_is_stopped_while_it_rotates_holds_up_nobody(tmp_path):
    settings = Settings(data_dir=tmp_path, log_file_mib=1)
    path = telemetry.log_file(tmp_path)
    handler = telemetry.SharedFileHandler(path, settings)
    path.write_bytes(b"x" * 1_048_576)
    with (path.parent / ".rotation").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=handler.emit, args=[record()], daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
    handler.emit(record())
    assert path.with_name("worker.jsonl.1").exists()
    assert path.with_name("worker.jsonl.1").read_bytes().count(b"session.connected") == 2
    handler.close()


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
