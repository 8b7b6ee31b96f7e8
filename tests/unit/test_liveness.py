"""Proofs of life: what the client tells, and what the kernel knows of its sockets."""

import socket
import time

import pytest

from whatsapp_worker.liveness import Liveness, client_ports, footprint


@pytest.fixture
def connection():
    """A connection of this process that got a byte a moment ago, and its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            with accepted:
                accepted.sendall(b"x")
                client.recv(1)
                yield port


def test_before_the_first_proof_there_is_no_age():
    liveness = Liveness(silence_limit_s=1, ports=[])
    assert liveness.age_s() is None
    assert not liveness.is_degraded
    assert liveness.deaf_for_s() is None


def test_a_proof_of_life_ends_the_suspicion():
    liveness = Liveness(silence_limit_s=5, ports=[])
    liveness.alive()
    liveness.suspect(time.time() - 30)
    assert liveness.is_degraded
    liveness.alive()
    assert not liveness.is_degraded
    assert liveness.age_s() < 1


def test_a_connection_is_deaf_only_when_it_is_suspected_and_silent_for_too_long():
    liveness = Liveness(silence_limit_s=20, ports=[])
    liveness.suspect(time.time() - 10)
    assert liveness.deaf_for_s() is None
    patient = Liveness(silence_limit_s=20, ports=[])
    patient.suspect(time.time() - 30)
    assert 29 < patient.deaf_for_s() < 31


def test_a_clock_that_jumped_is_no_proof_from_the_future():
    liveness = Liveness(silence_limit_s=20, ports=[])
    liveness.suspect(time.time() + 3600)
    assert 0 <= liveness.age_s() < 1


def test_data_on_the_clients_socket_is_a_proof_of_life(connection):
    liveness = Liveness(silence_limit_s=20, ports=[connection])
    liveness.suspect(time.time() - 100)
    assert liveness.age_s() < 5
    assert liveness.deaf_for_s() is None


def test_other_sockets_prove_nothing(connection):
    liveness = Liveness(silence_limit_s=20, ports=[connection + 1])
    liveness.suspect(time.time() - 100)
    assert liveness.age_s() > 99


def test_the_proxys_port_counts_as_whatsapps():
    assert client_ports({}) == {443, 5222}
    assert 8080 in client_ports({"HTTPS_PROXY": "http://proxy.example:8080"})
    assert 443 in client_ports({"https_proxy": "nonsense://[", "HTTPS_PROXY": ""})


def test_a_footprint_says_what_the_process_weighs():
    weight = footprint()
    assert weight["rss_mib"] > 1 and weight["fds"] >= 3 and weight["threads"] >= 1
