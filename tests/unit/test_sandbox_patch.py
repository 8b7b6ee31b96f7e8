"""A process in sandbox mode refuses every environment that could reach the real network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from whatsapp_worker.errors import SandboxUnsafe
from whatsapp_worker.sandbox import patch
from whatsapp_worker.sandbox.endpoints import ENDPOINTS_FILE, Endpoints

PROXY = "http://127.0.0.1:4321"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """What `whatsapp-worker sandbox --env` would print."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    (folder / "ca.pem").write_text("a certificate")
    (folder / "root.pub").write_bytes(bytes(32))
    endpoints = Endpoints(PROXY, "http://127.0.0.1:4322", str(folder / "ca.pem"), "key", 1)
    (folder / ENDPOINTS_FILE).write_bytes(endpoints.to_json())
    return endpoints.environment()


def test_the_sandbox_s_own_environment_is_safe(environ: dict[str, str]) -> None:
    patch._check(environ)
    patch._check({**environ, "NO_PROXY": "localhost,127.0.0.1,.corp.example:443", "no_proxy": ""})
    patch._check({**environ, "https_proxy": PROXY + "/", "SSL_CERT_DIR": "/etc/ssl/certs"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", ""),
        ("HTTPS_PROXY", "http://127.0.0.1:4444"),
        ("HTTPS_PROXY", "http://proxy.example:4321"),
        ("HTTPS_PROXY", "http://127.0.0.1.example:4321"),
        ("HTTPS_PROXY", "socks5://127.0.0.1:4321"),
        ("HTTPS_PROXY", "127.0.0.1:4321"),
        ("HTTPS_PROXY", "http://127.0.0.1:port"),
        ("https_proxy", "http://proxy.example:4321"),
        ("https_proxy", ""),
        ("ALL_PROXY", "socks5://proxy.example:1080"),
        ("all_proxy", "http://10.0.0.1:3128"),
        ("NO_PROXY", "*"),
        ("NO_PROXY", "localhost, .whatsapp.com"),
        ("no_proxy", "web.whatsapp.com:443"),
        ("no_proxy", "whatsapp.net"),
        ("no_proxy", "com"),
        ("NO_PROXY", "*.whatsapp.net"),
        ("NO_PROXY", "[web.whatsapp.com]:443"),
        ("SSL_CERT_FILE", ""),
        ("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem"),
    ],
)
def test_what_could_reach_whatsapp_is_refused(
    environ: dict[str, str], name: str, value: str
) -> None:
    with pytest.raises(SandboxUnsafe, match=name):
        patch._check({**environ, name: value})


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "SSL_CERT_FILE"])
def test_a_missing_variable_is_refused(environ: dict[str, str], name: str) -> None:
    del environ[name]
    with pytest.raises(SandboxUnsafe, match=name):
        patch._check(environ)


def test_a_folder_that_others_write_to_is_refused(environ: dict[str, str]) -> None:
    Path(environ["SSL_CERT_FILE"]).parent.chmod(0o777)
    with pytest.raises(SandboxUnsafe, match="chmod"):
        patch._check(environ)


def test_only_the_environment_of_exec_counts(environ: dict[str, str]) -> None:
    """Go reads what the process was exec'd with: setting it later makes nothing safe."""
    code = (
        "import json, os, sys; from whatsapp_worker.sandbox import patch;"
        "os.environ.update(json.loads(sys.argv[1])); patch.check_environment(os.environ)"
    )

    command = [sys.executable, "-c", code, json.dumps(environ)]
    base = {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    late = subprocess.run(command, env=base, capture_output=True, text=True, timeout=60)
    assert late.returncode != 0 and "SandboxUnsafe: SSL_CERT_FILE" in late.stderr
    right = subprocess.run(command, env=base | environ, capture_output=True, timeout=60)
    assert right.returncode == 0, right.stderr


def test_nothing_is_overwritten_while_the_library_is_not_loaded() -> None:
    code = (
        "from whatsapp_worker.sandbox import patch;patch.trust_sandbox(root_public_key=bytes(32))"
    )
    base = {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", code], env=base, capture_output=True, text=True, timeout=60
    )
    assert "SandboxUnsafe: neonize's library is not loaded" in run.stderr
