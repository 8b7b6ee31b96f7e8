"""`make demo` as a new user runs it, and what is left of it afterwards: nothing."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from world import COMMAND, eventually

READY = "It goes on running."


class Running:
    """A demo in a folder of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        self.output = folder / "output"
        # What a user has set must not reach the demo.
        environ = {
            **os.environ,
            "REDIS_URL": "redis://127.0.0.1:1",
            "HTTPS_PROXY": "http://nowhere",
        }
        environ |= {"SEND_TIMEOUT_S": "1", "DATA_DIR": str(folder / "data")}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*COMMAND, "demo", *words], cwd=folder, env=environ, stdout=output, stderr=output
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

    def nothing_is_left(self) -> bool:
        alive = [child for child in self._family if child.is_running()]
        return all(child.status() == psutil.STATUS_ZOMBIE for child in alive)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(*words: str) -> Running:
        running.append(Running(tmp_path, *words))
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
    assert "▀" in text and "jobs.outbound.send_message" in text
    eventually(one.nothing_is_left, within_s=2)


def test_a_demo_that_is_kept_can_be_used_and_stops_on_ctrl_c_within_ten_seconds(demo):
    one = demo("--keep")
    eventually(one.is_ready, within_s=90)
    environ = {**os.environ, "DATA_DIR": "data/demo", "WHATSAPP_NETWORK": "sandbox"}
    words = ["send", "demo", "+5521988880002", "Hi", "--wait"]
    sent = subprocess.run([*COMMAND, *words], cwd=one.folder, env=environ, timeout=30)
    assert sent.returncode == 0
    assert len(one.family()) >= 5
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(10) == 0
    assert one.nothing_is_left()


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
    [supervisor] = [child for child in one.family() if child.cmdline()[-1] == "--all"]
    supervisor.kill()
    assert one.process.wait(20) == 1
    text = one.text()
    assert "The demo failed in step 2" in text and "supervisor" in text
    assert "supervisor.started" in text
    eventually(one.nothing_is_left, within_s=10)


def test_a_folder_that_is_not_the_demos_is_left_alone(demo, tmp_path: Path):
    precious = tmp_path / "data" / "demo" / "precious"
    precious.parent.mkdir(parents=True)
    precious.touch()
    one = demo()
    assert one.process.wait(30) == 5
    assert precious.exists() and "is not the demo's" in one.text()
