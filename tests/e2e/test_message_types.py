"""Every message type on the real path: a CRM's job, a device process with real neonize, the
sandbox, a contact that decrypts it."""

import base64
import contextlib
import itertools
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from leashed import Leashed, Stable
from media_files import BIG, FILES, PDF, Web, big, ogg, web
from published import SCHEMA
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from world import World, eventually

from storage.sessions import Sessions
from whatsapp_worker import device_store
from whatsapp_worker.keys import message_secret

ME = "5511970001111"
ANA = "5521988887777"
BOB = "5521988886666"
_ids = itertools.count()


class Bench:
    """A sandbox, a Redis, a web server, and one session whose device process a test starts."""

    def __init__(self, folder: Path, web: Web) -> None:
        self.web = web
        self.media_dir = folder / "offers"
        (self.media_dir / "may").mkdir(parents=True)
        for name, data in FILES.items():
            (self.media_dir / "may" / name.removeprefix("/")).write_bytes(data)
        self.world = World(
            folder,
            MEDIA_DIR=str(self.media_dir),
            MEDIA_ALLOW_PRIVATE="1",
            MEDIA_TIMEOUT_S="5",
        )
        self.world.start_sandbox()
        self.control = self.world.control
        self.sessions = Sessions(self.world.data)
        self.sessions.prepare()
        self.stable = Stable(self.world.environ)
        self.device: Leashed | None = None
        self.session = "sales"
        self._link()
        self.group = self.control.group("Team", [ME, ANA, BOB])

    def _link(self) -> None:
        self.sessions.create(self.session, network="sandbox", now=time.time())
        folder = self.sessions.folder(self.session)
        pairing = self.stable.start("pairing", self.session, {}, method="qr")
        self.control.scan(pairing.expect("qr")["code"], phone=ME)
        pairing.ended()
        device_store.adopt(folder / "pairing.db", folder / "device.db")

    def connect(self, stable: Stable | None = None, **settings: str) -> Leashed:
        """A device process that has logged in, with other settings, from another environment's
        fork helper; the one before ends."""
        self.disconnect()
        self.device = (stable or self.stable).start("device", self.session, settings)
        self.device.expect("connected")
        return self.device

    @contextlib.contextmanager
    def with_path(self, path: str) -> Iterator[None]:
        """A device process that finds its programs there."""
        stable = Stable(self.world.environ | {"PATH": path})
        try:
            self.connect(stable)
            yield
        finally:
            self.disconnect()
            stable.close()

    def disconnect(self) -> None:
        if self.device is not None:
            self.device.close()
            self.device = None

    def enqueue(
        self, message: dict[str, Any], *, to: str = ANA, id: str | None = None, **options: Any
    ) -> Job:
        queue = Queue(
            f"wa:out:{self.session}", connection=self.world.redis, serializer=JSONSerializer
        )
        return queue.enqueue(
            "jobs.outbound.send_message",
            description="send_message",
            kwargs={
                "session": self.session,
                "to": to,
                "message_id": id or f"crm-{next(_ids)}",
                "message": message,
                **options,
            },
        )

    def outcome(self, message: dict[str, Any], *, to: str = ANA) -> dict[str, Any]:
        """What becomes of a message."""
        return self.world.await_outcomes([self.enqueue(message, to=to)])[0]

    def arrived(self, message: dict[str, Any], *, to: str = ANA) -> dict[str, Any]:
        """A message as its contact reads it."""
        job = {"session": self.session, "to": to, "message_id": "1", "message": message}
        SCHEMA.validate(job)
        outcome = self.outcome(message, to=to)
        assert outcome["status"] == "sent", outcome

        def row() -> dict[str, Any] | None:
            rows = self.control.messages(id=outcome["wa_message_id"])
            return dict(rows[0]) if rows and rows[0]["type"] else None

        found: dict[str, Any] = eventually(row, what="it arrives")
        assert found["undecryptable"] is None and found["times"] == 1
        return found

    def error(self, message: dict[str, Any]) -> str:
        """Why a message failed; nothing arrived."""
        before = self.control.messages()
        outcome = self.outcome(message)
        assert outcome["status"] == "failed", outcome
        assert len(self.control.messages()) == len(before)
        return str(outcome["error"])

    def close(self) -> None:
        self.disconnect()
        self.stable.close()
        self.world.close()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with web() as server:
        bench = Bench(tmp_path_factory.mktemp("types"), server)
        try:
            yield bench
        finally:
            bench.close()
            print(bench.world.logs())


@pytest.fixture(scope="module")
def connected(started: Bench) -> Bench:
    started.connect()
    return started


@pytest.fixture
def bench(connected: Bench) -> Bench:
    if connected.device is None:
        connected.connect()
    return connected


def text(body: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": {"body": body, **more}}


# Words


def test_formatting_goes_as_it_is(bench: Bench) -> None:
    body = "*bold* _italic_ ~gone~ ```code```\n> quoted\n- item\n👋"
    row = bench.arrived(text(body))
    assert (row["type"], row["text"]) == ("text", body)


def test_a_preview_is_made_on_request_only(bench: Bench) -> None:
    url = f"{bench.web.url}/page"
    assert bench.arrived(text(f"look: {url}."))["type"] == "text"
    asked = len(bench.web.asked)
    row = bench.arrived(text(f"look: {url}.", preview_url=True))
    shown = row["message"]["extendedTextMessage"]
    assert shown["text"] == f"look: {url}."
    assert shown["matchedText"] == url
    assert (shown["title"], shown["description"]) == ("Offers & more", "All of May")
    assert base64.b64decode(shown["JPEGThumbnail"]).startswith(b"\xff\xd8")
    assert bench.web.asked[asked:] == ["/page", "/a.jpg"]


def test_a_preview_that_cannot_be_made_is_left_out(bench: Bench) -> None:
    body = f"look: {bench.web.url}/nothing"
    row = bench.arrived(text(body, preview_url=True))
    assert (row["type"], row["text"]) == ("text", body)


def test_a_reply_names_what_it_answers(bench: Bench) -> None:
    reply = {**text("yes"), "context": {"message_id": "3EB0AA", "text": "really?"}}
    info = bench.arrived(reply)["message"]["extendedTextMessage"]["contextInfo"]
    assert info["stanzaID"] == "3EB0AA"
    assert info["participant"] == f"{ANA}@s.whatsapp.net"
    assert info["quotedMessage"] == {"conversation": "really?"}
    picture = {"type": "image", "image": {"file": "may/a.jpg"}, "context": {"message_id": "3EB0"}}
    assert bench.arrived(picture)["message"]["imageMessage"]["contextInfo"]["stanzaID"] == "3EB0"


def test_mentions_name_their_people(bench: Bench) -> None:
    message = text(f"hello @{BOB}", mentions=[f"+{BOB}", "123456@lid"])
    row = bench.arrived(message, to=bench.group)
    info = row["message"]["extendedTextMessage"]["contextInfo"]
    assert info["mentionedJID"] == [f"{BOB}@s.whatsapp.net", "123456@lid"]


def test_a_group_is_a_recipient(bench: Bench) -> None:
    outcome = bench.outcome(text("to all"), to=bench.group)
    assert (outcome["status"], outcome["wa_id"]) == ("sent", bench.group)
    assert bench.control.messages(id=outcome["wa_message_id"])[0]["to"] == bench.group
    row = bench.arrived({"type": "image", "image": {"file": "may/a.png"}}, to=bench.group)
    assert bench.control.media(row["id"]) == FILES["/a.png"]


# Files


@pytest.mark.parametrize("source", ["link", "file"])
@pytest.mark.parametrize(
    ("kind", "name", "fields"),
    [
        ("image", "a.jpg", {"mimetype": "image/jpeg", "width": 320, "height": 200}),
        ("image", "a.png", {"mimetype": "image/png"}),
        ("video", "a.mp4", {"mimetype": "video/mp4", "seconds": 7}),
        ("audio", "a.mp3", {"mimetype": "audio/mpeg"}),
        ("audio", "a.ogg", {"mimetype": "audio/ogg; codecs=opus", "seconds": 3}),
        ("sticker", "a.webp", {"mimetype": "image/webp"}),
        ("document", "offer.pdf", {"mimetype": "application/pdf", "fileName": "offer.pdf"}),
    ],
)
def test_a_file_arrives_as_the_same_bytes(
    bench: Bench, source: str, kind: str, name: str, fields: dict[str, Any]
) -> None:
    given = f"{bench.web.url}/{name}" if source == "link" else f"may/{name}"
    row = bench.arrived({"type": kind, kind: {source: given}})
    assert row["type"] == kind
    assert fields.items() <= row["message"][f"{kind}Message"].items()
    assert bench.control.media(row["id"]) == FILES[f"/{name}"]
    folder = bench.sessions.folder(bench.session) / "media"
    assert list(folder.iterdir()) == []


def test_a_picture_has_a_thumbnail_and_a_caption(bench: Bench) -> None:
    given = {"file": "may/a.jpg", "caption": f"for @{BOB}", "mentions": [BOB]}
    message = bench.arrived({"type": "image", "image": given})["message"]["imageMessage"]
    assert message["caption"] == f"for @{BOB}"
    assert message["contextInfo"]["mentionedJID"] == [f"{BOB}@s.whatsapp.net"]
    assert base64.b64decode(message["JPEGThumbnail"]).startswith(b"\xff\xd8")


def test_a_document_has_a_name_and_a_caption(bench: Bench) -> None:
    given = {"link": f"{bench.web.url}/offer.pdf?v=2", "caption": "May", "filename": "May 25.pdf"}
    row = bench.arrived({"type": "document", "document": given})
    assert (row["type"], row["text"]) == ("document", "May")
    assert row["message"]["documentMessage"]["fileName"] == "May 25.pdf"
    assert bench.control.media(row["id"]) == PDF


def test_a_voice_note_is_shown_as_one(bench: Bench) -> None:
    row = bench.arrived({"type": "audio", "audio": {"file": "may/a.ogg", "voice": True}})
    assert row["message"]["audioMessage"]["PTT"] is True
    assert bench.control.media(row["id"]) == ogg(3)


def test_without_ffmpeg_only_what_needs_it_fails_and_says_so(bench: Bench, tmp_path: Path) -> None:
    voice = {"type": "audio", "audio": {"file": "may/a.mp3", "voice": True}}
    sound = {"type": "audio", "audio": {"file": "may/a.mp3"}}
    film = {"type": "video", "video": {"file": "may/a.mp4"}}
    with bench.with_path(str(tmp_path)):
        assert "ffmpeg is not installed" in bench.error(voice)
        assert bench.arrived(sound)["type"] == "audio"
        assert "JPEGThumbnail" not in bench.arrived(film)["message"]["videoMessage"]


def test_with_ffmpeg_any_sound_becomes_a_voice_note(bench: Bench, tmp_path: Path) -> None:
    """A stand-in for ffmpeg: it is handed the file and the name of the file to write."""
    tool = tmp_path / "ffmpeg"
    (tmp_path / "made.ogg").write_bytes(ogg(2))
    tool.write_text(
        "#!/bin/sh\n"
        'for last; do :; done; out="${last#file:}"\n'
        f'env > {tmp_path}/environ; echo "$*" > {tmp_path}/arguments\n'
        f'cat {tmp_path}/made.ogg > "$out"\n'
    )
    tool.chmod(0o700)
    with bench.with_path(f"{tmp_path}:{os.environ['PATH']}"):
        row = bench.arrived({"type": "audio", "audio": {"file": "may/a.wav", "voice": True}})
        assert bench.control.media(row["id"]) == ogg(2)
        assert row["message"]["audioMessage"]["seconds"] == 2
        assert "-f wav -i file:" in (tmp_path / "arguments").read_text()
        assert "REDIS_URL" not in (tmp_path / "environ").read_text()


def peak(pid: int) -> int:
    """The most memory that a process ever held, in bytes."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def test_a_large_file_is_on_disk_and_not_in_memory_until_it_is_encrypted(bench: Bench) -> None:
    """As docs/messages.md says: fetching costs no memory, neonize's upload three times the file."""
    device = bench.connect(MEDIA_TIMEOUT_S="120")
    folder = bench.sessions.folder(bench.session) / "media"
    bench.arrived({"type": "document", "document": {"file": "may/offer.pdf"}})
    before = peak(device.pid)
    bench.web.finishing.clear()
    job = bench.enqueue({"type": "document", "document": {"link": f"{bench.web.url}/held"}})
    eventually(lambda: sum(f.stat().st_size for f in folder.iterdir()) >= BIG - 65_536)
    fetched = peak(device.pid)
    bench.web.finishing.set()
    outcome = bench.world.await_outcomes([job], within_s=120)[0]
    assert outcome["status"] == "sent", outcome
    assert fetched - before < BIG / 8
    assert peak(device.pid) - before < 4 * BIG
    assert bench.control.media(outcome["wa_message_id"]) == big()
    assert list(folder.iterdir()) == []
    bench.connect()


# Refusals: each fails alone, says why, and nothing arrives


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("image", {"link": "{web}/nothing"}, "message.image.link: the server answered 404"),
        ("image", {"link": "{web}/offer.pdf"}, "is application/pdf; image takes image/jpeg"),
        ("image", {"link": "{web}/empty"}, "of no known type"),
        ("document", {"link": "{web}/empty"}, "is empty"),
        ("sticker", {"file": "may/a.jpg"}, "message.sticker.file: is image/jpeg"),
        ("document", {"link": "{web}/endless"}, "is longer than the 67108864 bytes"),
        ("document", {"link": "{web}/short"}, "sent 19 of 1000 bytes"),
        ("document", {"link": "{web}/gzip"}, "compressed"),
        ("document", {"link": "{web}/redirect?file:///etc/passwd"}, "nobody may follow"),
        ("document", {"link": "{web}/redirect?/redirect"}, "redirects more than 5 times"),
        ("document", {"link": "{web}/redirect?/nothing"}, "answered 404"),
        ("document", {"link": "http://nowhere.invalid/x"}, "has no address"),
        ("document", {"link": "http://127.0.0.1:1/x"}, "could not be asked: ConnectionRefused"),
        ("document", {"file": "may/none.pdf"}, "inside MEDIA_DIR: No such file"),
        ("document", {"file": "may"}, "is not a regular file"),
        ("document", {"file": "link/passwd"}, "cannot be opened inside MEDIA_DIR"),
        ("document", {"file": "passwd"}, "cannot be opened inside MEDIA_DIR"),
        ("document", {"file": "../passwd"}, "message.document.file: must be a path inside"),
        ("document", {"file": "/etc/passwd"}, "message.document.file: must be a path inside"),
    ],
)
def test_a_file_that_cannot_be_had_fails_its_message_alone(
    bench: Bench, kind: str, source: dict[str, str], reason: str
) -> None:
    for name, target in (("link", "/etc"), ("passwd", "/etc/passwd")):
        if not (bench.media_dir / name).is_symlink():
            (bench.media_dir / name).symlink_to(target)
    given = {name: value.format(web=bench.web.url) for name, value in source.items()}
    assert reason in bench.error({"type": kind, kind: given})


def test_a_slow_server_is_given_up_and_the_next_message_goes_out(bench: Bench) -> None:
    began = time.monotonic()
    slow = bench.enqueue({"type": "document", "document": {"link": f"{bench.web.url}/slow"}})
    after = bench.enqueue(text("right after"))
    outcomes = bench.world.await_outcomes([slow, after])
    assert [outcome["status"] for outcome in outcomes] == ["failed", "sent"]
    assert "took too long" in outcomes[0]["error"]
    assert 4.5 < time.monotonic() - began < 30


def test_an_upload_that_is_refused_for_the_moment_is_tried_again(bench: Bench) -> None:
    bench.connect()  # a new connection asks anew where files go
    bench.control.query_fault(ME, code=503, count=2)
    assert bench.arrived({"type": "image", "image": {"file": "may/a.jpg"}})
    bench.connect()
    bench.control.query_fault(ME, code=503, count=100)
    try:
        refused = bench.outcome({"type": "image", "image": {"file": "may/a.jpg"}})
    finally:
        bench.control.remove_fault()
    assert refused["status"] == "failed" and "503" in refused["error"]


def test_an_upload_that_hangs_fails_its_message_alone(bench: Bench) -> None:
    assert bench.device is not None
    pid = bench.device.pid
    bench.control.stall()
    try:
        hung = bench.outcome({"type": "image", "image": {"file": "may/a.jpg"}})
    finally:
        bench.control.unstall()
    assert hung["status"] == "failed"
    assert "not ready within MEDIA_TIMEOUT_S" in hung["error"]
    assert bench.arrived(text("after the upload"))
    assert bench.device.pid == pid
    assert bench.control.messages(to=ANA)[-1]["text"] == "after the upload"


def test_a_private_address_is_refused_unless_allowed(bench: Bench) -> None:
    bench.connect(MEDIA_ALLOW_PRIVATE="0")
    asked = len(bench.web.asked)
    try:
        for host in ("127.0.0.1", "localhost", "0x7f.1", "[::1]", "10.0.0.1", "169.254.169.254"):
            link = f"http://{host}:{bench.web.server_address[1]}/a.jpg"
            error = bench.error({"type": "image", "image": {"link": link}})
            assert "has a private address" in error, host
        url = f"{bench.web.url}/page"
        assert bench.arrived(text(f"see {url}", preview_url=True))["type"] == "text"
        assert len(bench.web.asked) == asked
    finally:
        bench.disconnect()


def test_the_largest_file_is_a_setting_and_files_need_a_folder(bench: Bench) -> None:
    big = bench.media_dir / "big.pdf"
    big.write_bytes(b"%PDF" + bytes(2 * 1024 * 1024))
    bench.connect(MEDIA_MAX_MIB="1", MEDIA_DIR=" ")
    try:
        file = {"type": "document", "document": {"file": "big.pdf"}}
        assert "MEDIA_DIR is not set" in bench.error(file)
        bench.connect(MEDIA_MAX_MIB="1")
        assert "is longer than the 1048576 bytes" in bench.error(file)
        bench.connect()
        assert bench.control.media(bench.arrived(file)["id"]) == big.read_bytes()
    finally:
        big.unlink()


def test_a_message_that_expires_while_its_file_is_fetched_is_not_sent(bench: Bench) -> None:
    dripping = {"document": {"link": f"{bench.web.url}/hesitant"}, "type": "document"}
    job = bench.enqueue(dripping, ttl_s=0.5)
    assert bench.world.await_outcomes([job])[0]["status"] == "expired"
    assert bench.arrived(dripping)["type"] == "document"


# Stopping


def test_a_stop_during_a_download_is_quick_and_the_message_goes_out_later(bench: Bench) -> None:
    device = bench.connect(MEDIA_TIMEOUT_S="60")
    asked = len(bench.web.asked)
    slow = {"type": "document", "document": {"link": f"{bench.web.url}/slow"}}
    first = bench.enqueue(slow)
    second = bench.enqueue(text("behind the download"))
    eventually(lambda: "/slow" in bench.web.asked[asked:], what="the download begins")
    began = time.monotonic()
    device.signal(signal.SIGTERM)
    assert device.wait(30) == 0
    bench.device = None
    assert time.monotonic() - began < 3
    assert bench.world.outcome(first) == {} and bench.world.outcome(second) == {}
    folder = bench.sessions.folder(bench.session) / "media"
    assert len(list(folder.iterdir())) == 1
    bench.connect(MEDIA_TIMEOUT_S="1")
    outcomes = bench.world.await_outcomes([first, second])
    assert [outcome["status"] for outcome in outcomes] == ["failed", "sent"]
    assert list(folder.iterdir()) == []


# Places, people, polls


def test_a_location_arrives(bench: Bench) -> None:
    place = {"latitude": "-23.5505", "longitude": -46.6333, "name": "Sé", "address": "São Paulo"}
    shown = bench.arrived({"type": "location", "location": place})["message"]["locationMessage"]
    assert (shown["degreesLatitude"], shown["degreesLongitude"]) == (-23.5505, -46.6333)
    assert (shown["name"], shown["address"]) == ("Sé", "São Paulo")


def test_contacts_arrive_as_vcards(bench: Bench) -> None:
    ana = {"name": {"formatted_name": "Ana; Silva"}, "phones": [{"phone": "+55 21 98888-7777"}]}
    row = bench.arrived({"type": "contacts", "contacts": [ana]})
    assert row["type"] == "contact"
    card = row["message"]["contactMessage"]
    assert card["displayName"] == "Ana; Silva"
    assert "TEL;type=CELL;waid=5521988887777:+55 21 98888-7777" in card["vcard"].splitlines()
    assert "FN:Ana\\; Silva" in card["vcard"].splitlines()
    row = bench.arrived({"type": "contacts", "contacts": [ana, ana]})
    assert row["type"] == "contacts"
    assert len(row["message"]["contactsArrayMessage"]["contacts"]) == 2


def test_a_poll_arrives(bench: Bench) -> None:
    poll = {"question": "Lunch?", "options": ["yes", "no"], "selectable_count": 1}
    row = bench.arrived({"type": "poll", "poll": poll})
    made = row["message"]["pollCreationMessage"]
    assert (row["type"], made["name"]) == ("poll", "Lunch?")
    assert [option["optionName"] for option in made["options"]] == ["yes", "no"]
    assert made["selectableOptionsCount"] == 1


# Messages about messages


def test_a_reaction_arrives_and_is_taken_back(bench: Bench) -> None:
    for emoji in ("👍", ""):
        reaction = {"type": "reaction", "reaction": {"message_id": "3EB0AA", "emoji": emoji}}
        row = bench.arrived(reaction)
        assert row["type"] == "reaction"
        made = row["message"]["reactionMessage"]
        assert made["text"] == emoji
        assert made["key"] == {
            "remoteJID": f"{ANA}@s.whatsapp.net",
            "fromMe": False,
            "ID": "3EB0AA",
        }


def test_a_reaction_in_a_group_names_the_author(bench: Bench) -> None:
    def key(author: str) -> dict[str, Any]:
        given = {"message_id": "3EB0AA", "emoji": "👍", "from": author}
        row = bench.arrived({"type": "reaction", "reaction": given}, to=bench.group)
        found: dict[str, Any] = row["message"]["reactionMessage"]["key"]
        return found

    theirs = key(BOB)
    assert (theirs["fromMe"], theirs["participant"]) == (False, f"{BOB}@s.whatsapp.net")
    ours = key(ME)
    assert ours["fromMe"] is True and "participant" not in ours


def test_a_text_is_edited_and_revoked(bench: Bench) -> None:
    sent = bench.arrived(text("old"))["id"]
    row = bench.arrived({"type": "edit", "edit": {"message_id": sent, "text": {"body": "new"}}})
    assert (row["type"], row["text"]) == ("edit", "new")
    assert row["message"]["protocolMessage"]["key"]["ID"] == sent
    assert row["message"]["protocolMessage"]["key"]["fromMe"] is True
    row = bench.arrived({"type": "revoke", "revoke": {"message_id": sent}})
    assert row["type"] == "revoke"
    assert row["message"]["protocolMessage"]["key"]["ID"] == sent


def test_an_administrator_revokes_what_others_wrote_in_a_group(bench: Bench) -> None:
    revoke = {"type": "revoke", "revoke": {"message_id": "3EB0AA", "from": BOB}}
    row = bench.arrived(revoke, to=bench.group)
    key = row["message"]["protocolMessage"]["key"]
    assert row["type"] == "revoke"
    assert (key["ID"], key["fromMe"]) == ("3EB0AA", False)
    assert key["participant"] == f"{BOB}@s.whatsapp.net"


def test_a_message_in_a_group_is_marked_as_read_for_its_author(bench: Bench) -> None:
    read = {"type": "read", "read": {"message_id": "3EB0AB", "from": BOB}}
    assert bench.outcome(read, to=bench.group)["status"] == "sent"

    def told() -> list[dict[str, Any]]:
        return [dict(r) for r in bench.control.client_receipts() if "3EB0AB" in r["ids"]]

    [receipt] = eventually(told, what="the group is told")
    assert (receipt["type"], receipt["to"], receipt["author"]) == ("read", bench.group, BOB)


@pytest.mark.parametrize("recipient", [ANA, "lid"])
def test_a_received_message_is_marked_as_read(bench: Bench, recipient: str) -> None:
    id = bench.control.inbound(sender=ANA, to=ME, text="are you there?")
    to = "2" + ANA[::-1] + "@lid" if recipient == "lid" else ANA
    outcome = bench.outcome({"status": "read", "message_id": id}, to=to)
    assert (outcome["status"], outcome["wa_message_id"]) == ("sent", None)

    def is_read() -> bool:
        return any(r["type"] == "read" and id in r["ids"] for r in bench.control.client_receipts())

    eventually(is_read, what="the sender is told")


# The claim


def test_every_type_leaves_its_secret_where_recovery_looks(bench: Bench) -> None:
    sent = bench.arrived(text("base"))["id"]
    messages = {
        "text": text("x"),
        "image": {"type": "image", "image": {"file": "may/a.jpg"}},
        "document": {"type": "document", "document": {"file": "may/offer.pdf", "caption": "c"}},
        "location": {"type": "location", "location": {"latitude": 1, "longitude": 2}},
        "contacts": {"type": "contacts", "contacts": [{"name": {"formatted_name": "Ana"}}]},
        "poll": {"type": "poll", "poll": {"question": "?", "options": ["a", "b"]}},
        "reaction": {"type": "reaction", "reaction": {"message_id": sent, "emoji": "👍"}},
        "edit": {"type": "edit", "edit": {"message_id": sent, "text": {"body": "new"}}},
        "revoke": {"type": "revoke", "revoke": {"message_id": sent}},
        "audio": {"type": "audio", "audio": {"file": "may/a.mp3"}},
        "video": {"type": "video", "video": {"file": "may/a.mp4"}},
        "sticker": {"type": "sticker", "sticker": {"file": "may/a.webp"}},
    }
    jobs = {kind: bench.enqueue(m, id=f"secret-{kind}") for kind, m in messages.items()}
    outcomes = dict(zip(jobs, bench.world.await_outcomes(list(jobs.values())), strict=True))
    bench.disconnect()
    key = bench.sessions.install_key()
    secrets = {kind: message_secret(key, bench.session, f"secret-{kind}", 1) for kind in jobs}
    database = bench.sessions.folder(bench.session) / "device.db"
    found = device_store.handed_over(database, secrets.values())
    ids = {kind: found.get(secret) for kind, secret in secrets.items()}
    assert ids == {kind: outcome["wa_message_id"] for kind, outcome in outcomes.items()}
