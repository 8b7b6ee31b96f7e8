"""`make demo` as a new user runs it, and what is left of it afterwards: nothing."""

import ast
import contextlib
import inspect
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from support import events, eventually
from world import COMMAND

from whatsapp_worker import redis_client, redis_server
from whatsapp_worker.cli import demo as demo_module
from whatsapp_worker.cli import demo_crm
from whatsapp_worker.sandbox.control import Control
from whatsapp_worker.settings import Settings

ROOT = Path(__file__).parents[2]
READY = "It goes on running."


class Running:
    """A demo in a folder of its own, in the foreground of a terminal of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        self.data = folder / "my data" / "demo"
        self.output = folder / "output"
        # What a user has set must not reach the demo.
        environ = {
            **os.environ,
            "REDIS_URL": "redis://127.0.0.1:1",
            "HTTPS_PROXY": "http://nowhere",
        }
        environ |= {"SEND_TIMEOUT_S": "1", "DATA_DIR": str(self.data.parent)}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                words,
                cwd=folder,
                env=environ,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._family: set[psutil.Process] = set()

    def text(self) -> str:
        return self.output.read_text()

    def family(self) -> set[psutil.Process]:
        """Every process that the demo has started so far, its descendants too."""
        if self.process.poll() is None:
            self._family |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self._family

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.text()
        return READY in self.text()

    def press_ctrl_c(self) -> None:
        """A terminal tells the whole foreground, `make` too."""
        self.family()
        os.killpg(self.process.pid, signal.SIGINT)

    def nothing_is_left(self) -> bool:
        return not any(map(_lives, self._family))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def _lives(process: psutil.Process) -> bool:
    """A zombie has ended; whoever adopted it has not looked yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(*words: str, command: Sequence[str] = (*COMMAND, "demo")) -> Running:
        running.append(Running(tmp_path, *command, *words))
        return running[-1]

    yield start
    for one in running:
        one.close()
        print(one.text())


def test_the_demo_shows_the_five_steps_and_leaves_nothing_running(demo):
    one = demo()
    eventually(lambda: one.family() and one.process.poll() is not None, within_s=90)
    text = one.text()
    assert one.process.returncode == 0, text
    steps = re.findall(r"^(\d) ", text, re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5"]
    assert "linking → connecting → connected" in text
    assert "reconnecting → connecting → connected" in text
    assert len(re.findall(r"queued .* → sent .* → delivered", text)) == 4
    assert text.count("the contact decrypted:") == 4
    assert "▀" in text and "Now a simulated phone scans it" in text
    assert "jobs.outbound.send_message" in text
    assert int(re.findall(r"^5 All of it worked, in (\d+) s", text, re.MULTILINE)[0]) < 60
    onwards = text.partition("\n5 ")[2]
    for words in ("whatsapp-worker status", "make run", "whatsapp-worker link sales"):
        assert words in onwards
    assert "export DATA_DIR='my data/demo' WHATSAPP_NETWORK=sandbox" in onwards
    sandbox_log = one.data / "logs" / "sandbox.log"
    assert f"--state-dir '{one.data / 'sandbox'}')" in sandbox_log.read_text()
    eventually(one.nothing_is_left, within_s=10)


def test_what_the_demo_enqueues_with_is_none_of_our_code():
    nodes = ast.walk(ast.parse(inspect.getsource(demo_crm)))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(one, "module", None) for one in imports} == {
        "redis",
        "rq",
        "rq.job",
        "rq.serializers",
    }


@pytest.mark.skipif(shutil.which("make") is None, reason="apt install make")
def test_make_demo_that_is_kept_can_be_used_and_stops_on_ctrl_c_within_ten_seconds(
    demo, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of a make that runs these tests
        monkeypatch.delenv(name, raising=False)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(installed)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup.sh").symlink_to(shutil.which("true") or "")
    one = demo("KEEP=1", command=["make", "demo"])
    eventually(one.is_ready, within_s=90)
    environ = {**os.environ, "DATA_DIR": "my data/demo", "WHATSAPP_NETWORK": "sandbox"}
    words = ["send", "demo", "+5521988880002", "Hi", "--wait"]
    sent = subprocess.run([*COMMAND, *words], cwd=one.folder, env=environ, timeout=30)
    assert sent.returncode == 0
    url = redis_server.resolve_url(Settings(data_dir=one.data))
    with contextlib.closing(redis_client.connect(url)) as redis:
        codes = [event["session"] for event in events(redis) if event["event"] == "session.qr"]
    assert codes == ["demo"], "one code before the kill, and none after it"
    assert len(one.family()) >= 6
    one.press_ctrl_c()
    assert one.process.wait(10) == -signal.SIGINT  # make's own end; 130 in a shell
    assert one.text().endswith("\nStopping.\n") and one.nothing_is_left()


def test_a_demo_that_is_interrupted_midway_says_so_by_its_exit_code(demo):
    one = demo()
    eventually(lambda: "2 Linking" in one.text(), within_s=90)
    one.press_ctrl_c()
    assert one.process.wait(10) == 130
    assert one.nothing_is_left() and "Traceback" not in one.text()


def test_a_demo_that_is_killed_takes_everything_with_it(demo):
    one = demo("--keep")
    eventually(one.is_ready, within_s=90)
    assert len(one.family()) >= 5
    one.process.kill()
    one.process.wait()
    eventually(one.nothing_is_left, within_s=10)


def test_a_step_that_fails_is_named_with_its_log_lines(demo):
    one = demo("--keep")
    eventually(lambda: "2 Linking" in one.text(), within_s=60)
    log = one.folder / "my data" / "demo" / "logs" / "run.log"
    eventually(lambda: "supervisor.started" in log.read_text())
    assert one.family()
    children = psutil.Process(one.process.pid).children()
    [supervisor] = [child for child in children if child.cmdline()[-1:] == ["--all"]]
    supervisor.kill()
    assert one.process.wait(60) == 1
    text = one.text()
    assert "The demo failed in step 2" in text and "supervisor" in text
    assert "supervisor.started" in text
    eventually(one.nothing_is_left, within_s=10)


@pytest.mark.parametrize(("number", "step"), [(1, 3), (4, 4)])
def test_a_message_that_is_refused_fails_its_step(demo, number: int, step: int):
    one = demo()
    eventually(lambda: "2 Linking" in one.text(), within_s=90)
    Control.from_state_dir(one.data / "sandbox").send_fault("refuse", after=number - 1)
    eventually(lambda: one.family() and one.process.poll() is not None, within_s=90)
    text = one.text()
    assert one.process.returncode == 1, text
    assert f"The demo failed in step {step}" in text and f": demo-{number}: " in text
    eventually(one.nothing_is_left, within_s=10)


def test_a_session_that_does_not_come_back_fails_the_fourth_step(demo):
    one = demo()
    eventually(lambda: "2 Linking" in one.text(), within_s=90)
    control = Control.from_state_dir(one.data / "sandbox")
    control.contacts(demo_module.CONTACT, receipt_delay_s=1)  # what follows comes before the kill
    eventually(lambda: "3 Sending" in one.text(), within_s=60)
    control.connect_failure(503, count=1000)
    eventually(lambda: one.family() and one.process.poll() is not None, within_s=180)
    text = one.text()
    assert one.process.returncode == 1, text
    assert "reconnecting" in text.partition("\n4 ")[2] and "\n5 " not in text
    assert "The demo failed in step 4" in text and "for the session to come back" in text
    assert "session=demo" in text.partition("run.log, last lines:")[2]
    eventually(one.nothing_is_left, within_s=10)


def test_a_folder_that_is_not_the_demos_is_left_alone(demo, tmp_path: Path):
    precious = tmp_path / "my data" / "demo" / "precious"
    precious.parent.mkdir(parents=True)
    precious.touch()
    one = demo()
    assert one.process.wait(60) == 5
    assert precious.exists() and "is not the demo's" in one.text()
