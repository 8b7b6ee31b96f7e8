"""What the processes make of the host that they find: its limits, its permissions, each other."""

import resource
from pathlib import Path

from support import eventually
from world import World

from whatsapp_worker.process import open_files_needed

SESSIONS = 100


def test_run_raises_its_limit_of_open_files_to_what_its_sessions_need(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = open_files_needed(SESSIONS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with World.running(tmp_path, MAX_SESSIONS=str(SESSIONS)) as world:
            assert world.supervisor is not None
            pid = world.supervisor.pid
            eventually(lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE) == (need, hard))
            world.link("sales")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_all_that_is_made_is_for_its_user_alone(tmp_path: Path) -> None:
    """Folders above DATA_DIR too, where they had to be made; whatever the umask."""
    with World.running(tmp_path, DATA_DIR=str(tmp_path / "new" / "data")) as world:
        world.link("sales")
        made = [tmp_path / "new", *(tmp_path / "new").rglob("*"), *world.state_dir.rglob("*")]
        readable = [path for path in made if path.stat().st_mode & 0o077]
        assert len(made) > 20 and readable == []


def test_a_second_sandbox_on_one_folder_says_so(tmp_path: Path) -> None:
    with World.running(tmp_path) as world:
        done = world.run("sandbox", "--state-dir", str(world.state_dir))
        assert (done.returncode, done.stdout) == (5, "")
        assert "a sandbox runs on" in done.stderr
