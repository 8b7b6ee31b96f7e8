"""Settings: parsed once, all problems at once, secrets masked."""

import os
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

import whatsapp_worker
from whatsapp_worker.errors import SettingsError
from whatsapp_worker.settings import Settings, declarations, mask, misspelt


def test_an_empty_environment_gives_the_documented_defaults():
    settings = Settings.read({})
    assert settings.reconnect_waits_s == (3.0, 6.0, 12.0)
    assert settings.network == "whatsapp"
    assert settings.max_tombstones == 1000


def test_defaults_that_the_documents_name_are_those_of_the_program():
    defaults = {row["variable"]: row["default"] for row in Settings().table({})}
    docs = Path(__file__).parents[2] / "docs"
    named = [
        (path.name, name, value)
        for path in docs.glob("*.md")
        for name, value in re.findall(r"`(\w+)` \((\d+)", path.read_text())
        if name in defaults
    ]
    assert [row for row in named if row[2] != defaults[row[1]]] == []
    assert len([row for row in named if row[0] == "breakers.md"]) == 4


def test_every_setting_is_read_by_something():
    package = Path(whatsapp_worker.__file__).parent
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    read = set(re.findall(r"settings\.(\w+)", source))
    assert {field.name for field in fields(Settings)} - read == set()


def test_settings_stay_as_they_were_read(monkeypatch):
    monkeypatch.setenv("SEND_TIMEOUT_S", "7")
    settings = Settings.read(os.environ)
    monkeypatch.setenv("SEND_TIMEOUT_S", "8")
    assert settings.send_timeout_s == 7
    for field in fields(Settings):
        with pytest.raises(FrozenInstanceError):
            setattr(settings, field.name, None)
    assert hash(settings), "no value of theirs can be changed in place either"


def test_all_problems_are_listed_at_once():
    with pytest.raises(SettingsError) as caught:
        Settings.read({"SEND_TIMEOUT_S": "0", "MAX_SESSIONS": "many", "REDIS_URL": "http://x"})
    assert len(caught.value.problems) == 3
    assert caught.value.exit_code == 2
    assert any("MAX_SESSIONS is no whole number" in p for p in caught.value.problems)


@pytest.mark.parametrize(
    "url",
    [
        "redis://cache:port/0",
        "redis://cache:99999/0",
        "redis://:seam#less@cache/0",
        "redis://:seam/less@cache:6379/0",
        "redis://:seam[less@cache:6379/0",
        "redis:cache",
    ],
)
def test_a_url_that_cannot_be_taken_apart_is_refused_without_its_password(url):
    with pytest.raises(SettingsError) as caught:
        Settings.read({"REDIS_URL": url})
    assert "REDIS_URL" in str(caught.value)
    assert "seam" not in str(caught.value) and "less" not in str(caught.value)


def test_urls_are_shown_as_they_are_written():
    for url in ("unix:///run/redis.sock", "redis://", "redis://cache", "redis://cache:6379/0"):
        assert mask(str(Settings.read({"REDIS_URL": url}).redis_url)) == url


def test_an_empty_variable_counts_as_absent():
    assert Settings.read({"REDIS_URL": " "}).redis_url is None


def test_names_that_are_nearly_ours_are_found_and_no_others():
    meant = {
        "PACE_PER_MIN": "PACE_PER_MINUTE",
        "MAX_SESION": "MAX_SESSIONS",
        "SEND_TIMEOUT": "SEND_TIMEOUT_S",
        "max_sessions": "MAX_SESSIONS",
    }
    ours = [declaration.variable for declaration in declarations().values()]
    others = "PATH HOME LOGNAME HOSTNAME LANG TERM SHELL XDG_DATA_DIRS HTTPS_PROXY REDIS_HOST"
    others += " SESSION_PASSPHRASE DB_HOST PGHOST SENTRY_RELEASE SENTRY_ENVIRONMENT LOGS S _"
    assert misspelt(dict.fromkeys([*meant, *ours, *others.split()], "1")) == meant


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e400"])
def test_numbers_that_are_no_durations_are_refused(text):
    with pytest.raises(SettingsError):
        Settings.read({"SEND_TIMEOUT_S": text})


def test_waits_are_read_as_a_list():
    assert Settings.read({"RECONNECT_WAITS_S": "0.1, 0.2"}).reconnect_waits_s == (0.1, 0.2)


def test_the_table_names_origins_and_masks_secrets():
    environ = {"REDIS_URL": "redis://user:hunter2@cache:6380/1?x=hunter3"}
    rows = {row["variable"]: row for row in Settings.read(environ).table(environ)}
    assert rows["REDIS_URL"]["value"] == "redis://***@cache:6380/1?***"
    assert rows["REDIS_URL"]["origin"] == "environment"
    assert rows["RECONNECT_WAITS_S"]["value"] == "3,6,12"
    assert "hunter" not in str(rows)


def test_every_variable_is_declared_once():
    variables = [declaration.variable for declaration in declarations().values()]
    assert len(set(variables)) == len(variables)
