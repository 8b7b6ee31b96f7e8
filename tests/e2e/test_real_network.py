"""A worker for the real network is that whatever else its environment says."""

from pathlib import Path

from world import World, eventually

# Python runs a module of this name in every process that is exec'd; forks inherit the hook.
_SPY = """
import sys
class Spy:
    def find_spec(name, path=None, target=None):
        if name.startswith("whatsapp_worker.sandbox"):
            with open({file!r}, "a") as file:
                print(sys.argv, name, file=file)
sys.meta_path.insert(0, Spy)
"""


def test_the_proxy_and_ca_of_a_sandbox_do_not_make_it_one_and_its_code_is_never_loaded(
    tmp_path: Path,
) -> None:
    imports = tmp_path / "imports"
    (tmp_path / "sitecustomize.py").write_text(_SPY.format(file=str(imports)))
    world = World(tmp_path)
    try:
        world.start_sandbox()
        world.environ["PYTHONPATH"] = str(tmp_path)
        world.run("sandbox", "--env", "--state-dir", str(world.state_dir))
        assert imports.exists(), "the spy works"
        imports.unlink()

        del world.environ["WHATSAPP_NETWORK"]
        world.spawn("run", "--all")
        with world.linking("sales") as lines:
            assert [line["event"] for line in lines] == ["failed"]
        assert (world.status()["network"], world.state("sales")["state"]) == (
            "whatsapp",
            "unlinked",
        )
        [attempt] = eventually(
            lambda: [row for row in world.control.connections() if row["ended"]],
            what="the sandbox sees that it hung up",
        )
        # It dialled, and did not take the sandbox's word for WhatsApp's.
        assert (attempt["reached"], attempt["ended"]) == ("encrypted", "closed by client")
        assert not imports.exists(), imports.read_text()
    finally:
        world.close()
        print(world.logs())
