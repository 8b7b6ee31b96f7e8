"""The fork helper has neonize's Python and never its Go library; a neonize that is not as we know
it costs memory, and nothing else."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from leashed import Stable
from world import World

LIBRARY = "neonize-linux-amd64.so"


@pytest.fixture
def surprising(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """An environment with a neonize that does something more when a file of it is imported."""

    def make(file: str, code: str) -> dict[str, str]:
        spec = importlib.util.find_spec("neonize")
        assert spec is not None and spec.submodule_search_locations
        copy = tmp_path / "packages" / "neonize"
        shutil.copytree(spec.submodule_search_locations[0], copy)
        with (copy / file).open("a") as module:
            module.write(f"\n{code}\n")
        return {"PYTHONPATH": str(copy.parent)}

    return make


@pytest.fixture
def helper() -> Iterator[Callable[[dict[str, str]], psutil.Process]]:
    """Starts a fork helper without a supervisor."""
    made: list[Stable] = []

    def start(environ: dict[str, str]) -> psutil.Process:
        before = {child.pid for child in psutil.Process().children()}
        made.append(Stable({**os.environ, **environ}))
        (found,) = (c for c in psutil.Process().children() if c.pid not in before)
        return found

    yield start
    for stable in made:
        stable.close()


def maps(process: psutil.Process) -> str:
    return Path(f"/proc/{process.pid}/maps").read_text()


def threads(process: psutil.Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/task"))


def is_fit(process: psutil.Process) -> bool:
    return LIBRARY not in maps(process) and threads(process) == 1


def is_plain(process: psutil.Process) -> bool:
    return process.cmdline()[-1] == "plain"


def helper_and_device(world: World, session: str) -> tuple[psutil.Process, psutil.Process]:
    device = psutil.Process(world.state(session)["pid"])
    parent = device.parent()
    assert parent is not None and parent.name() == "wa-forker"
    return parent, device


def sends(world: World, session: str) -> bool:
    job = world.enqueue(session, "+5511955554444", "forked", "m1")
    (outcome,) = world.await_outcomes([job])
    return outcome["wa_message_id"] in {row["id"] for row in world.arrived(to="5511955554444")}


def test_a_process_forked_from_a_helper_without_go_links_logs_in_and_sends(world: World) -> None:
    world.link("sales")
    world.await_state("sales", "connected")
    parent, device = helper_and_device(world, "sales")
    assert is_fit(parent) and not is_plain(parent)
    assert parent.children() == [device]  # what neonize ran at import is gone
    assert LIBRARY in maps(device) and threads(device) > 1
    assert sends(world, "sales")
    assert is_fit(parent)


THREAD = ("const.py", "import threading; threading.Thread(target=threading.Event().wait).start()")
SURPRISES = {
    "there are 2 threads": THREAD,
    "Go library is loaded": (
        "const.py",
        f"import ctypes; ctypes.cdll.LoadLibrary(__file__.replace('const.py', '{LIBRARY}'))",
    ),
    "log's handlers": (
        "const.py",
        "import logging; logging.getLogger().addHandler(logging.NullHandler())",
    ),
    "KeyError: 'new'": ("const.py", "{}['new']"),
    "did not ask ctypes": ("_binder.py", "gocode = object()"),
}


@pytest.mark.parametrize("said", SURPRISES)
def test_a_helper_that_is_surprised_begins_anew_with_the_protobuf_classes_alone(
    said: str,
    surprising: Callable[..., dict[str, str]],
    helper: Callable[[dict[str, str]], psutil.Process],
    capfd: pytest.CaptureFixture[str],
) -> None:
    started = helper(surprising(*SURPRISES[said]))
    assert is_fit(started) and is_plain(started)
    (line,) = (x for x in capfd.readouterr().err.splitlines() if "neonize_not_shared" in x)
    assert said in line


def test_the_environment_that_go_reads_is_the_same_after_beginning_anew(
    surprising: Callable[..., dict[str, str]],
    helper: Callable[[dict[str, str]], psutil.Process],
) -> None:
    code = "import os; os.environ['HTTPS_PROXY'] = 'http://elsewhere'; raise OSError('surprise')"
    started = helper({**surprising("const.py", code), "NO_PROXY": "example.org"})
    assert is_plain(started)
    assert "HTTPS_PROXY" not in started.environ()
    assert started.environ()["NO_PROXY"] == "example.org"
    assert started.environ()["NEONIZE_BOT_TAG"] == "off"


def test_go_is_frugal_unless_whoever_starts_us_wants_otherwise(
    helper: Callable[[dict[str, str]], psutil.Process],
) -> None:
    started = helper({"GOGC": "77"})
    assert started.environ()["GOGC"] == "77"
    assert started.environ()["MALLOC_ARENA_MAX"] == "1"


def test_sessions_of_a_surprised_helper_link_log_in_and_send(
    surprising: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    with World.running(tmp_path, **surprising(*THREAD)) as world:
        world.link("sales")
        world.await_state("sales", "connected")
        parent, device = helper_and_device(world, "sales")
        assert is_fit(parent) and is_plain(parent)
        assert str(tmp_path) in maps(device)  # its library is that of the surprising neonize
        assert sends(world, "sales")
