"""The client for CRMs and the doctor beside a running worker."""

import os

from world import World

from whatsapp_worker import client, doctor
from whatsapp_worker.client import Outbox
from whatsapp_worker.settings import Settings

CONTACT = "5521988880001"


def test_a_crm_sends_a_batch_and_hears_of_each_message(world: World, monkeypatch) -> None:
    world.link("sales")
    out = Outbox(world.redis)
    names = [f"crm-{n}" for n in range(50)]
    drafts = [client.text(CONTACT, f"Hello {name}", message_id=name) for name in names]
    outcomes = out.wait_many(out.send_many("sales", drafts), timeout_s=60)
    assert {outcome.status.value for outcome in outcomes} == {"sent"}
    assert [row["text"] for row in world.arrived(to=CONTACT)] == [f"Hello {n}" for n in names]
    heard = [event for event in out.events("crm", timeout_s=2) if event.event == "message.sent"]
    assert [event.payload["message_id"] for event in heard] == names

    for variable, value in world.environ.items():
        monkeypatch.setenv(variable, value)
    findings = doctor.run(Settings.read(os.environ), fix=True)
    problems = [finding.sentence for finding in findings if finding.verdict == "problem"]
    assert problems == []
    assert world.state("sales")["state"] == "connected"
