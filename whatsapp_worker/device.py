"""One neonize client: the only file that calls neonize.

neonize's library is loaded by `Device.load`, never at import of this file: the fork helper imports
this file, and a process forked from one that has loaded the library has no Go runtime.

neonize keeps its clients in Go maps without a lock. One process builds one client, connects it
once, never stops it and ends by `os._exit`, so nothing ever writes those maps beside a reader:
until the first event came through, `is_connected` does not ask.
"""

import contextlib
import ctypes
import logging
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from whatsapp_worker import compose, facts, neonize_loader
from whatsapp_worker.content import preview_url
from whatsapp_worker.errors import SendError
from whatsapp_worker.facts import Fact, ReceiptKind
from whatsapp_worker.media import File, Media
from whatsapp_worker.recipient import parse
from whatsapp_worker.settings import Network

log = logging.getLogger(__name__)

LINKED_DEVICE_NAME = "whatsapp-worker"  # what the phone's list of linked devices shows

_MAX_NUMBERS = 1000  # remembered; looking one up takes 0.2 ms
_NUMBERS = re.compile(r"\d{6,}")
_LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.DEBUG, "WARN": logging.WARNING}

# neonize's receipt types; `inactive` (9) is a delivery to a device whose user is elsewhere.
_RECEIPTS = {
    1: ReceiptKind.DELIVERED,
    9: ReceiptKind.DELIVERED,
    4: ReceiptKind.READ,
    6: ReceiptKind.PLAYED,
}
# Field of WhatsApp's Message to the Cloud API's word for it.
_INBOUND_TYPES = {
    "conversation": "text",
    "extendedTextMessage": "text",
    "imageMessage": "image",
    "videoMessage": "video",
    "audioMessage": "audio",
    "documentMessage": "document",
    "stickerMessage": "sticker",
    "locationMessage": "location",
    "contactMessage": "contacts",
    "contactsArrayMessage": "contacts",
    "reactionMessage": "reaction",
}


def prepare(network: Network) -> None:
    """For the fork helper: what children of this network would otherwise do, each."""
    _set_log_levels()
    if network == "sandbox":
        from whatsapp_worker.sandbox import patch

        patch.prepare()


class SendFailed(SendError):
    """neonize raised; the text is neonize's, `send_errors.py` says what it means for a send."""


@dataclass(frozen=True, slots=True)
class SendAck:
    """WhatsApp's server accepted a message. `wa_id` is the digits that it resolved, or the JID of
    a group; `at` is WhatsApp's UTC time in seconds. What is no message, a read mark, has an empty
    `wa_message_id`."""

    wa_message_id: str
    wa_id: str
    at: float


class Device:
    """A WhatsApp client over one database file; one per process, never collected."""

    def __init__(
        self,
        database: Path,
        *,
        session: str,
        network: Network,
        on_fact: Callable[[Fact], None],
        jid: str | None = None,
        media: Media | None = None,
    ) -> None:
        """Prepare; nothing is loaded or opened.

        Args:
            database: neonize's SQLite file.
            session: Session id, for log lines.
            network: `sandbox` loads the sandbox's guards before any client exists.
            on_fact: Called on neonize's event thread with every fact; must return at once.
            jid: Whose credentials to resume; None pairs a new device.
            media: Where files of messages come from; `prepare` needs it.
        """
        self._database = database
        self._session = session
        self._network = network
        self._on_fact = on_fact
        self._jid = jid
        self._media = media
        self._mine: frozenset[str] = frozenset()  # our own number and hidden id
        self._numbers: dict[str, str] = {}  # by hidden id
        self._addresses: dict[str, Any] = {}  # where a number's messages go
        self._client: Any = None
        self._jid_class: Any = None
        self._is_live = False
        self._handling_since: float | None = None

    def load(self) -> None:
        """Import neonize and build the client.

        Raises:
            SandboxUnsafe: Sandbox mode, and this process could reach WhatsApp; nothing dialled.
        """
        if self._network == "sandbox":
            from whatsapp_worker.sandbox import patch

            patch.check_environment(os.environ)
        library: Any = neonize_loader.load()
        self._pages = neonize_loader.library_pages()
        if self._network == "sandbox":
            patch.trust_sandbox()
        _set_log_levels()
        library.log_whatsmeow = _log_writer(self._session)
        self._jid_class = library.JID
        self._client = library.NewClient(
            _data_source(self._database),
            jid=self._parse_jid(self._jid) if self._jid else None,
            props=library.DeviceProps(
                os=LINKED_DEVICE_NAME, platformType=library.DeviceProps.DESKTOP
            ),
            uuid=self._session,
            new_device=self._jid is None,
        )
        self._subscribe()

    def connect_in_thread(self) -> None:
        """Dial and log in (or show codes) on a thread of its own; facts tell the rest."""
        threading.Thread(target=self._connect, name="neonize-connect", daemon=True).start()

    def is_connected(self) -> bool:
        """Whether the socket is up; safe at any time, true for a deaf connection too."""
        return self._is_live and bool(self._client.is_connected)

    def handling_s(self) -> float:
        """For how long the event thread has been in the handler of one event; 0 when it is not."""
        since = self._handling_since
        return 0.0 if since is None else time.monotonic() - since

    def rest(self) -> None:
        """There is nothing to do for now: hold on to no more of the library than that needs."""
        self._pages.let_go()

    def prepare(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fetch what a content points at and upload it; what `send` takes in its place.

        Nothing is sent. Blocks for MEDIA_TIMEOUT_S and as long as an upload takes, and holds up no
        send meanwhile.

        Raises:
            MediaFailed: The file cannot be had or sent; concerns this message alone.
            SendFailed: neonize could not upload it; its text.
        """
        assert self._media is not None, "given where messages are sent"
        url = preview_url(content)
        if url is not None:
            return {**content, compose.PREPARED: self._media.preview(url)}
        with self._media.file(content) as file:
            return {**content, compose.PREPARED: self._upload(content["type"], file)}

    def _upload(self, kind: str, file: File) -> dict[str, Any]:
        """The fields of a message that lead to a file.

        neonize takes bytes, not a file. It gets the pages of the file itself, so that they are
        never all in Python's memory; Go holds the file three times while it encrypts it (measured).
        """
        from neonize.utils.enum import MediaType

        as_type = "Image" if kind == "sticker" else kind.capitalize()
        with file.path.open("rb") as source:
            pages = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            data = (ctypes.c_char * file.size).from_buffer(pages)
            done = self._client.upload(data, MediaType["Media" + as_type])
        except Exception as error:
            raise SendFailed(str(error)) from error
        names = {"fileName": file.name} if kind == "document" else {}
        return {
            **file.details,
            **names,
            "mimetype": file.mimetype,
            "URL": done.url,
            "directPath": done.DirectPath,
            "mediaKey": done.MediaKey,
            "mediaKeyTimestamp": int(time.time()),
            "fileSHA256": done.FileSHA256,
            "fileEncSHA256": done.FileEncSHA256,
            "fileLength": done.FileLength,
        }

    def send(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> SendAck:
        """Send one message and wait for the server's acknowledgement (blocks up to 75 s).

        Args:
            recipient: A JID (`5511999990001@s.whatsapp.net`, `...@lid`, `...@g.us`).
            content: A validated message object (`type` and its object), or what `prepare` made
                of it where `content.needs_preparing`.
            secret: 32 bytes for messageContextInfo.messageSecret.

        Raises:
            SendFailed: neonize's text, for `send_errors.py`.
        """
        if content["type"] == "read":
            return self._mark_read(recipient, content["read"])
        from neonize.proto.waE2E import WAWebProtobufsE2E_pb2 as e2e

        message = compose.compose(
            content, chat=recipient, mine=self._mine, now=time.time(), e2e=e2e
        )
        message.messageContextInfo.messageSecret = secret
        try:
            answer = self._client.send_message(self._address(recipient), message)
        except Exception as error:
            raise SendFailed(str(error)) from error
        return SendAck(answer.ID, self._resolved(answer.Chat, recipient), float(answer.Timestamp))

    def probe(self) -> None:
        """Ask WhatsApp whether our own number exists: sends nothing, and a path that answers this
        carries messages, too. Blocks for up to 75 s.

        Raises:
            SendFailed: No answer, or an error; neonize's text.
        """
        number = (self._jid or "").partition("@")[0].partition(":")[0]
        try:
            self._client.is_on_whatsapp(f"+{number}")
        except Exception as error:
            raise SendFailed(str(error)) from error

    def _address(self, recipient: str) -> Any:
        """Where the messages of a chat go: for a number, to the hidden id behind it.

        WhatsApp knows some numbers by another than is dialled (Brazil's ninth digit), and says so
        to who asks whether they are a contact. whatsmeow would ask for the number as an address,
        which finds nobody then; asked here first, it needs not ask: no round trip more.

        Raises:
            Exception: neonize's; nothing was sent.
        """
        if recipient in self._addresses:
            return self._addresses[recipient]
        jid = self._parse_jid(recipient)
        if jid.Server != "s.whatsapp.net" or not self.is_connected():
            return jid
        found = self._client.get_lid_from_pn(jid)  # what the device database remembers
        if not found.User:
            answers = self._client.is_on_whatsapp(f"+{jid.User}")
            found = next((answer.JID for answer in answers if answer.IsIn), None)
            if found is None:
                return jid  # whatsmeow has the words for it
        if len(self._addresses) >= _MAX_NUMBERS:
            self._addresses.clear()
        self._addresses[recipient] = found
        return found

    def _resolved(self, chat: Any, recipient: str) -> str:
        """The number that a message went to: WhatsApp knows some by another than was dialled
        (Brazil's ninth digit), and answers with a hidden id that stands for it."""
        if chat.Server == "s.whatsapp.net" and chat.User:
            return str(chat.User)
        if chat.Server != "lid":
            return _wa_id(recipient)
        # Without a live client neonize aborts the process.
        if chat.User not in self._numbers and self.is_connected():
            with contextlib.suppress(Exception):  # not known: what was asked for has to do
                number = self._client.get_pn_from_lid(chat)
                if len(self._numbers) >= _MAX_NUMBERS:
                    self._numbers.clear()
                self._numbers[chat.User] = str(number.User)
        return self._numbers.get(chat.User) or _wa_id(recipient)

    def show_typing(self, recipient: str) -> None:
        """Show a person that something is being typed, until the message arrives.

        Raises:
            SendFailed: neonize's text; a message can be sent all the same.
        """
        from neonize.utils.enum import ChatPresence, ChatPresenceMedia

        try:
            self._client.send_chat_presence(
                self._address(recipient),
                ChatPresence.CHAT_PRESENCE_COMPOSING,
                ChatPresenceMedia.CHAT_PRESENCE_MEDIA_TEXT,
            )
        except Exception as error:
            raise SendFailed(str(error)) from error

    def _mark_read(self, chat: str, read: Mapping[str, Any]) -> SendAck:
        from neonize.utils.enum import ReceiptType

        try:
            where = self._address(parse(chat).jid)
            sender = self._address(parse(read.get("from", chat)).jid)
            self._client.mark_read(
                read["message_id"], chat=where, sender=sender, receipt=ReceiptType.READ
            )
        except Exception as error:
            raise SendFailed(str(error)) from error
        return SendAck("", _wa_id(chat), time.time())

    def pair_phone(self, phone: str) -> str:
        """Ask for a pairing code (ABCD-EFGH) for this phone's digits; after the first QrCode.

        Raises:
            SendFailed: WhatsApp gave none.
        """
        from neonize.utils.enum import ClientType

        try:
            return str(self._client.PairPhone(phone, True, client_type=ClientType.CHROME))
        except Exception as error:
            raise SendFailed(str(error)) from error

    def logout(self) -> None:
        """Tell WhatsApp to forget this device and delete the credentials. Blocks.

        Raises:
            SendFailed: WhatsApp did not confirm it.
        """
        try:
            self._client.logout()
        except Exception as error:
            raise SendFailed(str(error)) from error

    def disconnect(self) -> None:
        """Close the socket politely; whatsmeow does not dial again. May block."""
        self._client.disconnect()

    def _connect(self) -> None:
        error = ""
        try:
            self._client.connect()
        except BaseException as raised:  # this thread has nobody else to tell
            error = str(raised) or type(raised).__name__
        self._on_fact(facts.ConnectReturned(error))

    def _subscribe(self) -> None:
        """Translate and hand over: handlers run one after another on one thread, and a slow one
        stalls every event behind it. neonize holds functions strongly, bound methods weakly."""
        import neonize.events as events

        translations: dict[Any, Callable[[Any], Fact | None]] = {
            events.PairStatusEv: _pair_status,
            events.ConnectedEv: self._logged_in,
            events.KeepAliveTimeoutEv: _keep_alive_timeout,
            events.KeepAliveRestoredEv: lambda event: facts.KeepAliveRestored(),
            events.LoggedOutEv: _logged_out,
            events.StreamReplacedEv: lambda event: facts.StreamReplaced(),
            events.TemporaryBanEv: _temporary_ban,
            events.ConnectFailureEv: _connect_failure,
            events.ClientOutdatedEv: lambda event: facts.ClientOutdated(),
            events.StreamErrorEv: lambda event: facts.StreamError(event.Code),
            events.DisconnectedEv: lambda event: facts.Disconnected(),
            events.ReceiptEv: _receipt,
            events.MessageEv: _inbound,
        }
        for kind, translate in translations.items():
            self._client.event(kind)(self._handler(translate))
        self._client.qr(self._handler(lambda code: facts.QrCode(code.decode())))
        status = self._handler(lambda text: facts.LinkStatus(text.decode()))
        # neonize prints the address of this string and offers no hook: why a link attempt ended
        # (timeout, error, outdated) is said here and nowhere else.
        self._client._NewClient__onLoginStatus = lambda _, at: status(None, ctypes.string_at(at))

    def _handler(self, translate: Callable[[Any], Fact | None]) -> Callable[[Any, Any], None]:
        def handle(_client: Any, event: Any) -> None:
            self._is_live = True
            self._handling_since = time.monotonic()
            try:
                fact = translate(event)
                if fact is not None:
                    self._on_fact(fact)
            except Exception:  # ctypes would swallow it
                log.exception("device.event_failed", extra={"session": self._session})
            finally:
                self._handling_since = None

        return handle

    def _logged_in(self, _event: Any) -> Fact:
        if (me := self._client.me) is not None:
            self._mine = frozenset({me.JID.User, me.LID.User} - {""})
            who = facts.Identity(_jid_text(me.JID), _jid_text(me.LID), me.PushName, me.Platform)
            self._on_fact(who)
        return facts.Connected()

    def _parse_jid(self, text: str) -> Any:
        """neonize's JID of `user[.agent][:device]@server`."""
        user, _, server = text.partition("@")
        user, _, device = user.partition(":")
        agent = "0"
        if device:
            user, _, agent = user.partition(".")
        return self._jid_class(
            User=user,
            Server=server,
            Device=int(device or 0),
            RawAgent=int(agent or 0),
            Integrator=0,
            IsEmpty=False,
        )


def _set_log_levels() -> None:
    """No talk of ffmpeg; and neonize hands the level of its own log on to whatsmeow."""
    is_debug = logging.getLogger().isEnabledFor(logging.DEBUG)
    for name, level in (
        ("neonize.utils.ffmpeg", logging.ERROR),
        ("neonize.utils.log", logging.DEBUG if is_debug else logging.WARNING),
    ):
        logger = logging.getLogger(name)
        if logger.level != level:  # else every logger would forget what it knows
            logger.setLevel(level)


def _data_source(database: Path) -> str:
    """The file's name, and how SQLite shall keep it, for neonize's `file:NAME?_foreign_keys=on`.

    neonize asks for no journal mode: SQLite then makes, syncs and deletes a journal for each of
    the several commits of a send. A write-ahead log that is synced at every commit is as durable
    (recovery relies on it) and was measured 3 times as fast. 512 KiB of its pages in our memory do
    as well as 2 MiB: the system has the file in its own. The last name takes neonize's tail.
    """
    how = "_foreign_keys=on&_journal_mode=WAL&_synchronous=FULL&_cache_size=-512"
    return f"{quote(str(database))}?{how}&_tail="


def _log_writer(session: str) -> Callable[[int, int], None]:
    """A callback for whatsmeow's log lines; runs on its threads."""
    from neonize.proto.Neonize_pb2 import LogEntry

    def write(address: int, size: int) -> None:
        with contextlib.suppress(Exception):
            entry = LogEntry.FromString(ctypes.string_at(address, size))
            facts = {"session": session, "part": entry.Name, "text": redacted(entry.Message)}
            log.log(_LEVELS.get(entry.Level, logging.WARNING), "device.client_log", extra=facts)

    return write


def redacted(text: str) -> str:
    """neonize's words without phone numbers; for logs and people."""
    return _NUMBERS.sub("...", text)


def _wa_id(jid: str) -> str:
    """A number's digits; of a group or a hidden id all of it, since its digits are no number."""
    return jid.removesuffix("@s.whatsapp.net")


def _jid_text(jid: Any) -> str:
    agent = f".{jid.RawAgent}" if jid.RawAgent else ""
    device = f":{jid.Device}" if jid.Device or agent else ""
    return f"{jid.User}{agent}{device}@{jid.Server}" if jid.User else str(jid.Server)


def _enum_name(event: Any, field: str) -> str:
    """The word of an enum field; `unknown` when it is not set."""
    if not event.HasField(field):
        return "unknown"
    kind = event.DESCRIPTOR.fields_by_name[field].enum_type
    return str(kind.values_by_number[getattr(event, field)].name)


def _pair_status(event: Any) -> Fact:
    if event.Error:
        return facts.PairFailed(event.Error)
    return facts.Paired(_jid_text(event.ID), event.Platform)


def _keep_alive_timeout(event: Any) -> Fact:
    return facts.KeepAliveTimeout(int(event.ErrorCount), float(event.LastSuccess))


def _logged_out(event: Any) -> Fact:
    return facts.LoggedOut(bool(event.OnConnect), _enum_name(event, "Reason"))


def _temporary_ban(event: Any) -> Fact:
    return facts.TemporaryBan(_enum_name(event, "Code"), float(event.Expire))


def _connect_failure(event: Any) -> Fact:
    return facts.ConnectFailure(_enum_name(event, "Reason"), event.Message)


def _receipt(event: Any) -> Fact | None:
    kind = _RECEIPTS.get(event.Type)
    source = event.MessageSource
    if kind is None or source.IsFromMe:
        return None
    return facts.Receipt(
        kind=kind,
        wa_message_ids=tuple(event.MessageIDs),
        chat=_jid_text(source.Chat),
        sender=_jid_text(source.Sender),
        phone=_phone(source),
        at=_seconds(event.Timestamp),
    )


def _inbound(event: Any) -> Fact | None:
    source = event.Info.MessageSource
    if source.IsFromMe:
        return None
    fields = {field.name for field, _ in event.Message.ListFields()}
    types = [word for field, word in _INBOUND_TYPES.items() if field in fields]
    if not types and not fields - {"messageContextInfo", "senderKeyDistributionMessage"}:
        return None  # keys for a group, no message
    if "protocolMessage" in fields:
        return None
    return facts.Inbound(
        wa_message_id=event.Info.ID,
        chat=_jid_text(source.Chat),
        sender=_jid_text(source.Sender),
        phone=_phone(source),
        push_name=event.Info.Pushname,
        type=types[0] if types else "unsupported",
        text=event.Message.conversation or event.Message.extendedTextMessage.text,
        at=_seconds(event.Info.Timestamp),
    )


def _phone(source: Any) -> str:
    """The sender's digits: Sender is usually a LID and SenderAlt the number."""
    for jid in (source.SenderAlt, source.Sender):
        if jid.Server == "s.whatsapp.net":
            return str(jid.User)
    return ""


def _seconds(timestamp: int) -> float:
    """neonize gives seconds for some events and milliseconds for others."""
    return timestamp / 1000 if timestamp > 100_000_000_000 else float(timestamp)
