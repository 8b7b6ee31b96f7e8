"""The channel between a device process and its supervisor."""

import socket
import time

import pytest

from whatsapp_worker.reports import MAX_LINE, Channel, ChannelGarbage


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    yield Channel(left, send_timeout_s=0.2), Channel(right, send_timeout_s=0.2)
    left.close()
    right.close()


def test_what_one_end_says_the_other_receives_in_order(pair):
    left, right = pair
    assert left.send(report="started", pid=1) and left.send(report="connecting")
    assert right.receive() == [{"report": "started", "pid": 1}, {"report": "connecting"}]


def test_receiving_nothing_does_not_wait_even_after_a_send():
    one, other = socket.socketpair()
    with one, other:
        left = Channel(one, send_timeout_s=5)
        left.send(report="x")
        started = time.monotonic()
        assert left.receive() == []
        other.close()
        assert left.receive() is None
        assert time.monotonic() - started < 2


def test_the_last_words_are_received_before_the_end(pair):
    left, right = pair
    left.send(report="ended")
    left.close()
    assert right.receive() == [{"report": "ended"}]
    assert right.receive() is None


def test_saying_something_to_nobody_is_false(pair):
    left, right = pair
    right.close()
    assert left.send(report="x") is False


def test_an_end_that_does_not_read_holds_the_other_up_for_the_time_out_only(pair):
    left, right = pair
    started = time.monotonic()
    while left.send(report="x" * 10_000):
        pass
    assert 0.1 < time.monotonic() - started < 2
    right.receive()
    assert left.send(report="after half a line") is False


@pytest.mark.parametrize("garbage", [b"no json\n", b"[1]\n", b"x" * (MAX_LINE + 70_000)])
def test_garbage_is_named_and_never_kept(garbage):
    left, right = socket.socketpair()
    with left, right:
        channel = Channel(right)
        left.setblocking(False)
        with pytest.raises(ChannelGarbage):
            while garbage:
                sent = left.send(garbage[:65536])
                garbage = garbage[sent:]
                channel.receive()
