"""A session id is a folder name, a part of Redis keys and a word of command lines: all or none."""

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage.sessions import Sessions
from whatsapp_worker import keys, message
from whatsapp_worker.errors import InvalidMessage, UsageError

FIRST = string.ascii_lowercase + string.digits
REST = FIRST + "-_"
SESSIONS = Sessions(Path("data"))  # nothing is made there

IDS = st.builds(
    str.__add__, st.sampled_from(FIRST), st.text(st.sampled_from(REST), min_size=0, max_size=63)
)
# Nearly an id: something odd at the start, in the middle or at the end (the last two are a digit
# and an "a" of Unicode's); and anything at all.
ODD = st.sampled_from("-_./\\:* \n\0A\u00e9\u0661\uff41")
TEXTS = st.text() | st.builds("{}{}{}".format, IDS | st.just(""), ODD | st.text(), IDS | ODD)


def is_id(text: str) -> bool:
    """The sentence of the design, without its pattern."""
    return 1 <= len(text) <= 64 and text[0] in FIRST and set(text) <= set(REST)


@given(id=IDS)
@example(id="a")
@example(id="0" * 64)
def test_an_id_is_one_folder_of_its_own(id: str) -> None:
    folder = SESSIONS.folder(keys.session_id(id))
    assert (folder.name, folder.parent) == (id, Path("data/sessions"))
    assert folder.resolve().parent == Path("data/sessions").resolve()


@given(id=IDS, other=IDS, high=st.booleans(), other_high=st.booleans())
def test_an_id_is_read_back_from_its_queues_and_no_two_share_one(
    id: str, other: str, high: bool, other_high: bool
) -> None:
    queue = keys.outbound_queue(keys.session_id(id), high=high)
    assert keys.session_of_queue(queue) == (id, high)
    another = keys.outbound_queue(keys.session_id(other), high=other_high)
    assert (queue == another) == ((id, high) == (other, other_high))


@given(text=TEXTS)
@example(text="")
@example(text="a" * 65)
@example(text="_a")
@example(text="-a")
@example(text="sales\n")
@example(text="..")
@example(text="a/b")
@example(text="half a \ud800 pair")
def test_whatever_is_no_id_is_refused_everywhere_with_one_clear_line(text: str) -> None:
    if is_id(text):
        assert keys.session_id(text) == text
        return
    with pytest.raises(UsageError) as refused:
        keys.session_id(text)
    assert_is_clear(str(refused.value))
    with pytest.raises(InvalidMessage, match=r"^session: "):
        message.validate({"session": text})
    with pytest.raises(ValueError, match="no session id"):
        SESSIONS.folder(text)
    if not text.endswith(keys.HIGH_SUFFIX):
        assert keys.session_of_queue(f"{keys.OUTBOUND_PREFIX}{text}") is None


@pytest.mark.parametrize("given", [None, 7, True, b"sales", ["sales"], {"sales": 1}, "x" * 10**6])
def test_what_is_no_text_and_what_is_far_too_long_is_refused_in_one_short_line(given: Any) -> None:
    with pytest.raises(UsageError) as refused:
        keys.session_id(given)
    assert_is_clear(str(refused.value))


def assert_is_clear(sentence: str) -> None:
    assert sentence.startswith("session: ")
    assert "1 to 64 characters of a-z, 0-9, - and _" in sentence
    assert sentence.isprintable() and len(sentence) < 250
