"""Fixtures for all tests."""

import signal
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from support import RedisServer

# A shell that starts the tests in the background has SIGINT ignored, and so would every child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_redis_server() -> Iterator[RedisServer]:
    """One Redis for all tests that only need an empty one; they must not kill it."""
    # Not under tmp_path: a Unix socket's path must stay short.
    with tempfile.TemporaryDirectory(prefix="wa-redis-") as folder:
        server = RedisServer(Path(folder)).start()
        yield server
        server.kill()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A Redis of the test's own, which it may kill, pause and start again."""
    with tempfile.TemporaryDirectory(prefix="wa-redis-") as folder:
        server = RedisServer(Path(folder)).start()
        yield server
        server.kill()


@pytest.fixture
def redis(shared_redis_server: RedisServer) -> Iterator[Redis]:
    """A client of an empty Redis."""
    client = shared_redis_server.client()
    client.flushall()
    yield client
    client.close()


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment into which pip has installed this project with its extras, not
    editable. It finds what they need where it is already, so nothing is downloaded."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder)
    [packages] = folder.glob("lib/python*/site-packages")
    # A path of its own only: the .pth file of an editable installation there is not followed.
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    offline = ["--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "install", *offline, f"{Path(__file__).parents[1]}[sandbox,dev]"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
