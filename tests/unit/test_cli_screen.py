"""What commands draw: QR codes, columns, durations, one line a cause."""

import itertools
import re
import stat

import hypothesis.strategies as st
import pytest
import segno
from hypothesis import given

from whatsapp_worker.cli import main, qr, terminal
from whatsapp_worker.cli.terminal import columns, duration, printable

CODE = "https://wa.me/settings/linked_devices#2@AbC,noise,identity,adv,1"


@pytest.mark.parametrize("colours", [True, False])
def test_the_drawn_code_has_the_same_modules_as_the_code(colours):
    drawn = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in qr.lines(CODE, colours=colours)]
    dark = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}
    rows = [[], []]
    for line in drawn:
        for half in (0, 1):
            rows[half].append([bool(dark[c][half]) ^ (not colours) for c in line])
    read = list(itertools.chain.from_iterable(zip(*rows, strict=True)))
    matrix = segno.make_qr(CODE, error="l").matrix_iter(border=2)
    expected = [[bool(module) for module in row] for row in matrix]
    assert read[: len(expected)] == expected
    assert not any(map(any, read[len(expected) :]))


def test_the_picture_of_a_code_is_for_this_user_only(tmp_path):
    path = tmp_path / "code.png"
    qr.write_png(CODE, path)
    qr.write_png(CODE + "2", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 s"),
        (59.6, "60 s"),
        (3599, "59 min"),
        (7200, "2 h"),
        (12_000, "3 h 20 min"),
        (183_600, "2 d 3 h"),
    ],
)
def test_durations_are_said_in_two_units_at_most(seconds, words):
    assert duration(seconds) == words


@given(st.floats(0, 1e9))
def test_every_duration_can_be_said(seconds):
    assert re.fullmatch(r"\d+ (s|min|h|d)( \d+ (min|h))?", duration(seconds))


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1))
def test_columns_line_up_whatever_is_in_them(rows):
    clean = [(printable(a), "x" + printable(b).strip()) for a, b in rows]
    lines = columns(clean)
    start = max(len(a) for a, _ in clean) + 2
    assert all(line[start - 2 : start] == "  " and line[start] == "x" for line in lines)


def test_colours_do_not_move_columns(monkeypatch):
    monkeypatch.setattr(terminal, "has_colours", lambda _: True)
    painted = columns([(terminal.paint("a", "red"), "x"), ("bbb", "y")])
    assert painted == ["\x1b[31ma\x1b[0m    x", "bbb  y"]


def test_an_unknown_session_is_named_with_those_that_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert main(["status", "sales"]) == 3
    told = capsys.readouterr()
    assert told.out == "" and "there is no session sales" in told.err
    assert "Traceback" not in told.err
