"""What a clone can do at once: the make targets, and pip, on each Python that we name."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PACKAGES = ("whatsapp_worker", "jobs", "storage")
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def test_every_pinned_version_takes_the_oldest_python_that_we_take():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=") + ".0"
    installed = {found.name: found for found in metadata.distributions() if found.name in PINS}
    needs = {
        name: found.metadata.get("Requires-Python")
        for name, found in installed.items()
        if found.version == PINS[name]
    }
    assert len(needs) > 50, "not installed with -c constraints.txt"
    refused = {n: need for n, need in needs.items() if need and oldest not in SpecifierSet(need)}
    assert refused == {}, f"make demo fails on Python {oldest}"


@pytest.mark.skipif(shutil.which("make") is None, reason="apt install make")
@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["demo"], "whatsapp-worker demo"),
        (["demo", "KEEP=1"], "whatsapp-worker demo --keep"),
        (["run"], "whatsapp-worker run --all"),
        (["test", "ARGS=-k name"], "pytest -k name"),
    ],
)
def test_make_sets_itself_up_and_calls_the_command(words, command):
    environ = {"PATH": os.environ["PATH"]}  # nothing of a make that runs these tests
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, env=environ, capture_output=True)
    first, *_, last = done.stdout.decode().splitlines()
    assert "scripts/setup.sh" in first
    assert last.strip().endswith(f".venv/bin/{command}")


def files(folder: Path) -> set[Path]:
    """All that is kept of our packages in a folder."""
    found = (path for name in PACKAGES for path in (folder / name).rglob("*") if path.is_file())
    return {path.relative_to(folder) for path in found if path.suffix != ".pyc"}


def test_pip_installs_every_file_and_the_command_runs_from_them(installed: Path, tmp_path: Path):
    [packages] = installed.glob("lib/python*/site-packages")
    assert files(packages) == files(ROOT)
    script = installed / "bin" / "whatsapp-worker"
    done = subprocess.run(
        [script, "status", "--json"],
        env={"PATH": os.environ["PATH"], "DATA_DIR": "data"},
        cwd=tmp_path,  # where no checkout lies
        capture_output=True,
    )
    assert json.loads(done.stdout)["sessions"] == [], done.stderr
