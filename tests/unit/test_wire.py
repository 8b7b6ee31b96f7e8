"""Commands packed by hand are what redis-py would have sent."""

from hypothesis import given
from hypothesis import strategies as st
from redis.connection import Connection

from whatsapp_worker.wire import pack

_WORD = st.binary(max_size=20) | st.text(max_size=20) | st.integers() | st.floats(allow_nan=False)


@given(st.lists(_WORD, min_size=1, max_size=8))
def test_a_packed_command_equals_that_of_redis_py(words: list[bytes | str | int | float]) -> None:
    command = ["EVAL", *words]
    assert pack(command) == b"".join(Connection().pack_command(*command))
