"""Who may do what, as the source shows it; what an import contract can say stands in pyproject."""

import ast
from pathlib import Path

import whatsapp_worker

ROOT = Path(whatsapp_worker.__file__).parents[1]
CODE = {
    str(path.relative_to(ROOT)): list(ast.walk(ast.parse(path.read_text())))
    for package in ("whatsapp_worker", "jobs", "storage")
    for path in (ROOT / package).rglob("*.py")
}

# Who looks at the environment, and what for. All else is handed what it needs.
ENVIRONMENT_READERS = {
    "whatsapp_worker/cli/__init__.py": "entry of every command: reads the settings",
    "whatsapp_worker/fork_helper.py": "entry of the fork helper: reads the settings",
    "whatsapp_worker/supervisor.py": "hands it on to its children, whole",
    "whatsapp_worker/redis_server.py": "hands it on to redis-server",
    "whatsapp_worker/cli/demo.py": "hands it on, without proxies",
    "whatsapp_worker/media.py": "hands PATH on to ffmpeg",
    "whatsapp_worker/device.py": "makes sure that a sandbox client cannot reach WhatsApp",
    "whatsapp_worker/sandbox/patch.py": "the same",
    "whatsapp_worker/device_process.py": "which port Go dials: HTTPS_PROXY",
    "whatsapp_worker/doctor/host.py": "whether HTTPS_PROXY answers",
    "whatsapp_worker/cli/settings.py": "shows where each value comes from",
    "whatsapp_worker/cli/terminal.py": "NO_COLOR, TERM",
    "whatsapp_worker/cli/upkeep.py": "the passphrase of an export, which is no setting",
}


def modules_using(*texts: str) -> set[str]:
    """The modules that have one of these in an attribute or an import."""
    return {
        name
        for name, nodes in CODE.items()
        for node in nodes
        if isinstance(node, ast.Attribute | ast.ImportFrom)
        if any(text in ast.unparse(node) for text in texts)
    }


def test_the_environment_is_read_by_those_who_must_and_by_nobody_else() -> None:
    assert modules_using("os.environ", "getenv", "from os ") == set(ENVIRONMENT_READERS)


def test_settings_are_read_once_at_the_entry_of_a_process() -> None:
    entries = {"whatsapp_worker/cli/__init__.py", "whatsapp_worker/fork_helper.py"}
    of_its_children = "whatsapp_worker/cli/demo.py"
    assert modules_using("Settings.read") == entries | {of_its_children}


def test_a_state_is_put_in_one_place_which_is_the_supervisor_s() -> None:
    """Whose it is, the import contract keeps. What `import` brings along is no exception: it is
    written before there is a session."""
    assert modules_using(".put_state") == {"whatsapp_worker/session_status.py"}


def test_nobody_else_so_much_as_names_the_state_file_but_the_doctor_who_reads_it() -> None:
    named = {
        name
        for name, nodes in CODE.items()
        for node in nodes
        if isinstance(node, ast.Constant) and str(node.value).endswith("state.json")
    }
    assert named == {"storage/sessions.py", "whatsapp_worker/doctor/data.py"}
