"""A checked message object as WhatsApp's own protobuf message: pure, neonize is handed in."""

import re
from collections.abc import Mapping, Set
from typing import Any

from whatsapp_worker import recipient

Content = Mapping[str, Any]  # see `content.Message.content`
PREPARED = "prepared"  # key of a content's fields that `Device.prepare` found out

_FIELDS = {
    "image": "imageMessage",
    "video": "videoMessage",
    "audio": "audioMessage",
    "document": "documentMessage",
    "sticker": "stickerMessage",
}


def compose(content: Content, *, chat: str, mine: Set[str], now: float, e2e: Any) -> Any:
    """The `waE2E.Message` of a content.

    Args:
        content: Of every type but `read`; with what it points at under `PREPARED`.
        chat: JID of the recipient.
        mine: Our own number and hidden id, in digits.
        now: UTC seconds.
        e2e: The module of neonize that has the classes.
    """
    return _Composer(e2e, chat, mine, int(now * 1000)).compose(content)


class _Composer:
    def __init__(self, e2e: Any, chat: str, mine: Set[str], now_ms: int) -> None:
        self._e2e = e2e
        self._chat = chat
        self._mine = mine
        self._now_ms = now_ms

    def compose(self, content: Content) -> Any:
        kind = content["type"]
        make = self._media if kind in _FIELDS else getattr(self, f"_{kind}")
        return make(content)

    def _text(self, content: Content) -> Any:
        text, info = content["text"], self._info(content, content["text"])
        preview = content.get(PREPARED, {})
        if not info and not preview:
            return self._e2e.Message(conversation=text["body"])
        extended = {"text": text["body"], **info, **preview}
        return self._e2e.Message(extendedTextMessage=extended)

    def _media(self, content: Content) -> Any:
        kind = content["type"]
        given, fields = content[kind], dict(content[PREPARED])
        if "caption" in given:
            fields["caption"] = given["caption"]
        if given.get("voice"):
            fields["PTT"] = True
        message = self._e2e.Message(**{_FIELDS[kind]: {**fields, **self._info(content, given)}})
        if kind == "document" and "caption" in given:
            # Phones show the caption of a document in this wrapper only.
            return self._e2e.Message(documentWithCaptionMessage={"message": message})
        return message

    def _location(self, content: Content) -> Any:
        place = content["location"]
        fields = {name: place[name] for name in ("name", "address") if name in place}
        return self._e2e.Message(
            locationMessage={
                "degreesLatitude": place["latitude"],
                "degreesLongitude": place["longitude"],
                **fields,
                **self._info(content),
            }
        )

    def _contacts(self, content: Content) -> Any:
        cards = [
            {"displayName": card["name"]["formatted_name"], "vcard": vcard(card)}
            for card in content["contacts"]
        ]
        if len(cards) == 1:
            return self._e2e.Message(contactMessage={**cards[0], **self._info(content)})
        shown = f"{len(cards)} contacts"
        fields = {"displayName": shown, "contacts": cards, **self._info(content)}
        return self._e2e.Message(contactsArrayMessage=fields)

    def _reaction(self, content: Content) -> Any:
        given = content["reaction"]
        return self._e2e.Message(
            reactionMessage={
                "key": self._key(given),
                "text": given["emoji"],
                "senderTimestampMS": self._now_ms,
            }
        )

    def _poll(self, content: Content) -> Any:
        poll = content["poll"]
        return self._e2e.Message(
            pollCreationMessage={
                "name": poll["question"],
                "options": [{"optionName": option} for option in poll["options"]],
                "selectableOptionsCount": poll["selectable_count"],
                **self._info(content),
            }
        )

    def _edit(self, content: Content) -> Any:
        given = content["edit"]
        edit = self._e2e.ProtocolMessage(
            key=self._own_key(given["message_id"]),
            type=self._e2e.ProtocolMessage.MESSAGE_EDIT,
            editedMessage=self._text({"text": given["text"]}),
            timestampMS=self._now_ms,
        )
        return self._e2e.Message(editedMessage={"message": {"protocolMessage": edit}})

    def _revoke(self, content: Content) -> Any:
        given = content["revoke"]
        key = self._key(given) if "from" in given else self._own_key(given["message_id"])
        kind = self._e2e.ProtocolMessage.REVOKE
        return self._e2e.Message(protocolMessage={"type": kind, "key": key})

    def _own_key(self, message_id: str) -> dict[str, Any]:
        return {"remoteJID": self._chat, "fromMe": True, "ID": message_id}

    def _key(self, reference: Content) -> dict[str, Any]:
        """How WhatsApp names a message of somebody."""
        author = self._author(reference)
        if author.user in self._mine:
            return self._own_key(reference["message_id"])
        key = {"remoteJID": self._chat, "fromMe": False, "ID": reference["message_id"]}
        return {**key, "participant": author.jid} if self._chat.endswith("@g.us") else key

    def _info(self, content: Content, body: Content | None = None) -> dict[str, Any]:
        """`contextInfo` of what a message answers and whom it mentions; empty without either."""
        info: dict[str, Any] = {}
        if quoted := content.get("context"):
            info["stanzaID"] = quoted["message_id"]
            info["participant"] = self._author(quoted).jid
            # Phones draw the quotation from this alone, and none without it.
            info["quotedMessage"] = self._e2e.Message(conversation=quoted.get("text", ""))
        if mentions := (body or {}).get("mentions"):
            info["mentionedJID"] = [recipient.parse(mention).jid for mention in mentions]
        return {"contextInfo": info} if info else {}

    def _author(self, reference: Content) -> recipient.Recipient:
        return recipient.parse(reference.get("from", self._chat))


def vcard(card: Content) -> str:
    """A contact of Meta's shape as vCard 3.0, which is what phones exchange."""
    name = card["name"]
    parts = ("last_name", "first_name", "middle_name", "prefix", "suffix")
    lines = ["BEGIN:VCARD", "VERSION:3.0"]
    lines.append("N:" + ";".join(_escaped(name.get(part, "")) for part in parts))
    lines.append("FN:" + _escaped(name["formatted_name"]))
    if org := card.get("org"):
        units = [org[part] for part in ("company", "department") if part in org]
        if units:
            lines.append("ORG:" + ";".join(map(_escaped, units)))
        if "title" in org:
            lines.append("TITLE:" + _escaped(org["title"]))
    lines += [_phone_line(phone) for phone in card.get("phones", ())]
    lines += [_line("EMAIL", item, item["email"]) for item in card.get("emails", ())]
    lines += [_line("URL", item, item["url"]) for item in card.get("urls", ())]
    lines += [_address_line(address) for address in card.get("addresses", ())]
    if "birthday" in card:
        lines.append("BDAY:" + card["birthday"])
    return "\n".join([*lines, "END:VCARD"])


def _phone_line(phone: Content) -> str:
    digits = re.sub(r"[^0-9]", "", phone["phone"])
    wa_id = phone.get("wa_id") or (digits if 7 <= len(digits) <= 15 else None)
    waid = f";waid={wa_id}" if wa_id else ""
    return f"TEL;type={_type(phone, 'CELL')}{waid}:{phone['phone']}"


def _address_line(address: Content) -> str:
    country = address.get("country") or address.get("country_code", "")
    parts = [address.get(part, "") for part in ("street", "city", "state", "zip")]
    return _written("ADR", address, ";".join(["", "", *map(_escaped, parts), _escaped(country)]))


def _line(name: str, item: Content, value: str) -> str:
    return _written(name, item, _escaped(value))


def _written(name: str, item: Content, value: str) -> str:
    return f"{name};type={_type(item, 'HOME')}:{value}"


def _type(item: Content, otherwise: str) -> str:
    return str(item.get("type", otherwise)).upper().replace(" ", "-")


def _escaped(text: str) -> str:
    return re.sub(r"([\\;,])", r"\\\1", text)
