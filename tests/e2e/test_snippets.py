"""The examples of README and docs/crm.md, run as they stand on a real worker."""

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from published import DOCS
from rq.job import Job
from rq.serializers import JSONSerializer
from sandboxed import Sandbox
from world import World

README = (DOCS.parent / "README.md").read_text()
CRM = (DOCS / "crm.md").read_text()
CONTACT = "+5511999990002"


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World.running(tmp_path_factory.mktemp("snippets")) as world:
        world.link("sales")
        yield world


def snippets(text: str) -> Iterator[str]:
    return iter(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def run(snippet: str, names: dict[str, Any], **replaced: str) -> None:
    """Run one with what the snippets before it named; the address is another here."""
    for old, new in replaced.items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    exec(compile(snippet, "snippet", "exec"), names)


def test_those_of_the_readme_send_and_tell(linked: World) -> None:
    enqueue, fetch, _ = snippets(README)
    here = {"Redis()": f"Redis.from_url({linked.redis_server.url!r})"}
    names: dict[str, Any] = {}
    run(enqueue, names, **here)
    linked.await_outcomes([names["job"]])
    run(fetch, names, **here)
    assert names["job"].get_status() == "finished"
    outcome = names["job"].meta["outcome"]
    assert outcome["status"] == "sent" and outcome["wa_id"] == CONTACT[1:]
    [row] = linked.arrived(id=outcome["wa_message_id"])
    assert (row["to"], row["text"]) == (CONTACT[1:], "Hello")


def test_the_raw_job_of_the_readme_is_one_that_rq_would_make(linked: World) -> None:
    """Its commands, field by field; `data` is to the byte what RQ writes."""
    kwargs = {
        "session": "sales",
        "to": CONTACT,
        "message_id": "crm-4712",
        "message": {"type": "text", "text": {"body": "Hello from afar"}},
    }
    block = re.search(r"^    HSET .*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert block is not None
    commands, fields = [], {}
    for line in block[0].replace("<id>", "6f1e7c0a-raw").splitlines():
        if line.startswith(" " * 8):
            name, value = line.split(maxsplit=1)
            fields[name] = value
        elif line:
            commands.append(line.split())
    inner = re.fullmatch(r"zlib\((.*)\)", fields["data"])
    assert inner is not None and '{"session": "sales", ...}' in inner[1]
    payload = inner[1].replace('{"session": "sales", ...}', json.dumps(kwargs)).encode()
    ours = Job.create(
        "jobs.outbound.send_message",
        kwargs=kwargs,
        description="send_message",
        connection=linked.redis,
        serializer=JSONSerializer,
    ).to_dict()
    assert payload == zlib.decompress(ours["data"])
    assert fields["description"] == ours["description"]
    assert len(fields["created_at"]) == len(ours["created_at"])

    pairs = [part for pair in (fields | {"data": zlib.compress(payload)}).items() for part in pair]
    pipeline = linked.redis.pipeline(transaction=True)
    for command in commands:
        pipeline.execute_command(*command, *(pairs if command[0] == "HSET" else ()))
    pipeline.execute()
    job = Job.fetch("6f1e7c0a-raw", connection=linked.redis, serializer=JSONSerializer)
    [outcome] = linked.await_outcomes([job])
    assert outcome["status"] == "sent"
    [row] = linked.arrived(id=outcome["wa_message_id"])
    assert row["text"] == "Hello from afar"


def test_those_for_crms_send_cancel_and_tell(
    linked: World, capsys: pytest.CaptureFixture[str]
) -> None:
    one, many, cancel, told = snippets(CRM)
    names: dict[str, Any] = {"rows": [("c1", CONTACT), ("c2", CONTACT)]}
    run(one, names, **{'"redis://..."': repr(linked.redis_server.url)})
    run(many, names)
    outcomes = linked.await_outcomes([names["job"], *names["jobs"]])
    words = ("sent", "delivered")  # of a message id that was sent before: what became of it
    assert all(outcome["status"] in words for outcome in outcomes), outcomes
    run(cancel, names)
    assert names["outcome"].status in words
    run(told, names, **{'out.events("crm")': 'out.events("crm", timeout_s=2)'})
    lines = capsys.readouterr().out.splitlines()
    assert {"message.sent crm-4711", "message.sent c1", "message.sent c2"} <= set(lines)


def test_a_cancel_request_of_another_language_is_answered(linked: World) -> None:
    shown = re.search(r'`(\{"id": "<your random id>".*?\})`', CRM)
    assert shown is not None
    request = shown[1].replace("<your random id>", "r4nd0m").replace("crm-4711", "nobody-knows")
    linked.redis.rpush("wa:cancel", request)
    answer = linked.redis.blpop(["wa:cancel:r4nd0m"], timeout=20)
    assert answer and json.loads(answer[1]) == {"outcome": None}


def test_those_for_the_sandbox_steer_it(tmp_path: Path) -> None:
    *_, steer = snippets(README)
    sandbox = Sandbox(tmp_path)
    try:
        code = sandbox.client("a").expect("qr")["code"]
        run(steer, {"code": code}, **{'Path("data/sandbox")': f"Path({str(sandbox.state_dir)!r})"})
        [attempt] = sandbox.control.connections("5511999990001")[:1]
        assert attempt["reached"] == "pairing"
        assert sandbox.control.devices("5511999990001") == []
    finally:
        sandbox.close()
