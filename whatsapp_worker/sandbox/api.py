"""The control API: HTTP and JSON on loopback, a key on every route but /health.

`control.py` is its client and says what each route does.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from whatsapp_worker.sandbox.faults import (
    FOREVER,
    MAX_RULES,
    Failure,
    How,
    QueryFault,
    Rule,
    SendFault,
)
from whatsapp_worker.sandbox.media import Media, MediaUnavailable
from whatsapp_worker.sandbox.model import Attempt, Device, Rows, UnknownTarget
from whatsapp_worker.sandbox.network import Network
from whatsapp_worker.sandbox.pairing import QR_CODES, InvalidCode, PairingSession
from whatsapp_worker.sandbox.post import MAX_CONFIGURED, RECEIPT_STEPS, Manners
from whatsapp_worker.sandbox.signal import SignalError

SCAN_WAIT_S = 20.0
MAX_TEXT = 65_536
_HALVES = re.compile("[\ud800-\udfff]")  # surrogates: JSON can hold them, UTF-8 cannot


class BadRequest(Exception):
    """A field is missing or wrong; the text names it."""


class Fields:
    """The fields of one request, taken out one by one and checked."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def text(self, name: str) -> str:
        """A text that must be there."""
        value = self.text_or_none(name)
        if not value:
            raise BadRequest(f"{name}: missing")
        return value

    def text_or_none(self, name: str) -> str | None:
        """A text that may be missing."""
        value = self._values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, str) or len(value) > MAX_TEXT or _HALVES.search(value):
            raise BadRequest(f"{name}: not a text of at most {MAX_TEXT} characters")
        return value

    def phone(self, name: str = "phone") -> str:
        """A phone number that must be there."""
        phone = self.phone_or_none(name)
        if phone is None:
            raise BadRequest(f"{name}: missing")
        return phone

    def phones(self, name: str) -> list[str]:
        """A list of phone numbers that must be there."""
        values = self._values.pop(name, None)
        if not isinstance(values, list):
            raise BadRequest(f"{name}: not a list of phone numbers")
        return [Fields({name: value}).phone(name) for value in values]

    def phone_or_none(self, name: str = "phone") -> str | None:
        """7 to 15 digits, with or without `+`."""
        value = self.text_or_none(name)
        if value is None:
            return None
        digits = value.removeprefix("+")
        if not (digits.isascii() and digits.isdigit() and 7 <= len(digits) <= 15):
            raise BadRequest(f"{name}: 7 to 15 digits")
        return digits

    def number(self, name: str, default: float | None = None, *, low: float = 0) -> float | None:
        """A number of at least `low` and at most a billion."""
        value = self._values.pop(name, None)
        if value is None:
            return default
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise BadRequest(f"{name}: not a number") from None
        if isinstance(value, bool) or not low <= number <= 1e9:
            raise BadRequest(f"{name}: not a number from {low:g} to a billion")
        return number

    def choice(self, name: str, choices: list[str], default: str | None = None) -> str:
        """One of several words."""
        value = self._values.pop(name, default)
        if value not in choices:
            raise BadRequest(f"{name}: one of {', '.join(choices)}")
        return str(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._values.pop(name, default)
        if value in ("true", "false"):
            return bool(value == "true")
        if not isinstance(value, bool):
            raise BadRequest(f"{name}: true or false")
        return value

    def end(self) -> None:
        """Refuse what nobody asked about: it is a misspelled field."""
        if self._values:
            raise BadRequest(f"{next(iter(self._values))}: no such field")


Handler = Callable[[Fields], Any | Awaitable[Any]]


class Api:
    """What each route does; every method takes the request's fields and returns JSON."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def routes(self) -> dict[tuple[str, str], Handler]:
        """Method and path of each route."""
        return {
            ("POST", "/scan"): self.scan,
            ("POST", "/enter-code"): self.enter_code,
            ("POST", "/expire-qr"): self.expire_qr,
            ("GET", "/devices"): self.devices,
            ("GET", "/connections"): self.connections,
            ("POST", "/drop"): self.drop,
            ("POST", "/refuse"): self.refuse,
            ("POST", "/stall"): self.stall,
            ("POST", "/unstall"): self.unstall,
            ("POST", "/stream-error"): self.stream_error,
            ("POST", "/connect-failure"): self.connect_failure,
            ("POST", "/send-fault"): self.send_fault,
            ("POST", "/query-fault"): self.query_fault,
            ("POST", "/remove-fault"): self.remove_fault,
            ("POST", "/unknown-number"): self.add_unknown,
            ("DELETE", "/unknown-number"): self.remove_unknown,
            ("POST", "/number-alias"): self.add_alias,
            ("POST", "/contacts"): self.contacts,
            ("POST", "/groups"): self.groups,
            ("POST", "/inbound"): self.inbound,
            ("GET", "/messages"): self.messages,
            ("POST", "/receipts"): self.send_receipt,
            ("GET", "/receipts"): self._list(self._network.post.receipts),
            ("GET", "/chat-states"): self._list(self._network.post.chat_states),
            ("GET", "/lookups"): self._list(self._network.post.lookups),
            ("POST", "/logout-device"): self.logout_device,
            ("POST", "/reset"): self.reset,
        }

    async def scan(self, fields: Fields) -> Any:
        code, phone = fields.text("code"), fields.phone_or_none()
        wrong = fields.choice("hmac", ["right", "wrong"], "right") == "wrong"
        fields.end()
        return await self._linked(self._network.pairing.scan(code, phone, wrong_hmac=wrong))

    async def enter_code(self, fields: Fields) -> Any:
        code, phone = fields.text("code"), fields.phone()
        fields.end()
        return await self._linked(self._network.pairing.enter(code, phone))

    def expire_qr(self, fields: Fields) -> Any:
        codes = fields.number("codes", None, low=1)
        close = fields.flag("close", True)
        fields.end()
        if codes is not None:
            self._network.pairing.codes = min(int(codes), QR_CODES)
        return {"expired": self._network.pairing.expire(close=close)}

    def devices(self, fields: Fields) -> Any:
        phone = fields.phone_or_none()
        fields.end()
        devices = self._network.all_devices()
        return _rows(
            [self._device(device) for device in devices if phone in (None, device.phone)], 0
        )

    def connections(self, fields: Fields) -> Any:
        phone = fields.phone_or_none()
        since = fields.number("since", 0) or 0
        fields.end()
        attempts = self._network.attempts
        found = [
            _attempt(attempt)
            for attempt in attempts
            if phone in (None, attempt.phone) and attempt.seq > since
        ]
        return _rows(found, attempts.dropped)

    def drop(self, fields: Fields) -> Any:
        phone, how = fields.phone_or_none(), fields.choice("how", ["reset", "close"], "reset")
        fields.end()
        return {"dropped": self._network.drop(phone, reset=how == "reset")}

    def refuse(self, fields: Fields) -> Any:
        rule = Rule(fields.phone_or_none(), *_limits(fields, count=None))
        fields.end()
        return self._add(self._network.faults.refusals, rule)

    def stall(self, fields: Fields) -> Any:
        phone, seconds = fields.phone_or_none(), fields.number("seconds")
        fields.end()
        _bounded(self._network.faults.stalls, MAX_RULES)
        self._network.stall(phone, seconds)
        return {}

    def unstall(self, fields: Fields) -> Any:
        phone = fields.phone_or_none()
        fields.end()
        stalls = self._network.faults.stalls
        stalls[:] = [rule for rule in stalls if phone not in (None, rule.phone)]
        self._network.apply_stalls()
        return {}

    def stream_error(self, fields: Fields) -> Any:
        phone, code = fields.phone(), fields.text_or_none("code")
        conflict = fields.text_or_none("conflict")
        fields.end()
        if not code and not conflict:
            raise BadRequest("code: missing")
        devices = self._devices(phone)
        for device in devices:
            if device.link is not None:
                self._network.stream_error(device, code or "401", conflict=conflict)
        return {"ended": len(devices)}

    def connect_failure(self, fields: Fields) -> Any:
        phone, expire = fields.phone_or_none(), fields.number("expire")
        reason = fields.number("reason", low=100)
        until, left = _limits(fields, count=1)
        fields.end()
        if reason is None:
            raise BadRequest("reason: missing")
        rule = Failure(phone, until, left, int(reason), None if expire is None else int(expire))
        return self._add(self._network.faults.failures, rule)

    def send_fault(self, fields: Fields) -> Any:
        rule = SendFault(
            phone=fields.phone_or_none(),
            to=fields.phone_or_none("to"),
            how=How(fields.choice("how", [how.value for how in How])),
            code=int(fields.number("code", 479, low=1) or 479),
            delay_s=fields.number("delay_s", 1.0) or 0.0,
            after=int(fields.number("after", 0) or 0),
        )
        rule.until, rule.left = _limits(fields, count=1)
        fields.end()
        return self._add(self._network.faults.sends, rule)

    def query_fault(self, fields: Fields) -> Any:
        phone, code = fields.phone_or_none(), fields.number("code", 429, low=1)
        rule = QueryFault(phone, *_limits(fields, count=1), code=int(code or 429))
        fields.end()
        return self._add(self._network.faults.queries, rule)

    def remove_fault(self, fields: Fields) -> Any:
        fields.end()
        self._network.faults.clear()
        self._network.apply_stalls()
        self._network.pairing.codes = QR_CODES
        return {}

    def add_unknown(self, fields: Fields) -> Any:
        phone = fields.phone()
        fields.end()
        _bounded(self._network.unknown_numbers, MAX_CONFIGURED)
        self._network.unknown_numbers.add(phone)
        return {}

    def remove_unknown(self, fields: Fields) -> Any:
        phone = fields.phone()
        fields.end()
        self._network.unknown_numbers.discard(phone)
        return {}

    def add_alias(self, fields: Fields) -> Any:
        dialled, phone = fields.phone("dialled"), fields.phone()
        fields.end()
        _bounded(self._network.aliases, MAX_CONFIGURED)
        self._network.aliases[dialled] = phone
        return {}

    def contacts(self, fields: Fields) -> Any:
        phone = fields.phone()
        steps = RECEIPT_STEPS[fields.choice("receipts", list(RECEIPT_STEPS), "delivered")]
        delay_s = fields.number("receipt_delay_s", 0.0) or 0.0
        fields.end()
        _bounded(self._network.post.manners, MAX_CONFIGURED)
        self._network.post.manners[phone] = Manners(steps, delay_s)
        return {}

    def groups(self, fields: Fields) -> Any:
        subject, members = fields.text("subject"), fields.phones("members")
        fields.end()
        try:
            return {"jid": str(self._network.groups.create(subject, members).jid)}
        except ValueError as error:
            raise BadRequest(str(error)) from None

    def inbound(self, fields: Fields) -> Any:
        sender, to, text = fields.phone("from"), fields.phone("to"), fields.text("text")
        fields.end()
        return {"id": self._network.post.write(sender, to, text)}

    def messages(self, fields: Fields) -> Any:
        sender, to = fields.phone_or_none("from"), fields.phone_or_none("to")
        message_id = fields.text_or_none("id")
        since = fields.number("since", 0) or 0
        decode, refused = fields.flag("decode", True), fields.flag("refused", False)
        fields.end()
        rows = self._network.post.messages
        found = [
            row.facts(decode=decode)
            for row in rows
            if row.seq > since
            and (refused or row.refused is None)
            and sender in (None, row.sender.phone)
            and to in (None, row.to)
            and message_id in (None, row.id)
        ]
        return _rows(found, rows.dropped)

    def send_receipt(self, fields: Fields) -> Any:
        message_id = fields.text("wa_message_id")
        step = fields.choice("type", list(RECEIPT_STEPS["played"]), "delivered")
        fields.end()
        return {"sent": self._network.post.receipt(message_id, step)}

    def logout_device(self, fields: Fields) -> Any:
        phone = fields.phone()
        fields.end()
        devices = self._devices(phone)
        for device in devices:
            if device.link is not None:
                self._network.stream_error(device, "401", conflict="device_removed")
            self._network.remove_device(device)
        return {"removed": len(devices)}

    def reset(self, fields: Fields) -> Any:
        self.remove_fault(fields)
        self._network.unknown_numbers.clear()
        self._network.aliases.clear()
        self._network.attempts.clear()
        self._network.post.clear()
        return {}

    async def _linked(self, session: PairingSession) -> Any:
        """Wait until it is known what the client thinks of its new credentials."""
        try:
            outcome = await asyncio.wait_for(asyncio.shield(session.outcome), SCAN_WAIT_S)
        except TimeoutError:
            outcome = "no answer"
        device = session.device
        return {
            "phone": device.phone if device else session.code_phone,
            "jid": str(device.jid) if device else "",
            "lid": str(self._network.lid(device.phone, device.number)) if device else "",
            "outcome": outcome,
        }

    def _list(self, rows: Rows[dict[str, Any]]) -> Handler:
        """Tells the rows after a number, `since`."""

        def listed(fields: Fields) -> Any:
            since = fields.number("since", 0) or 0
            fields.end()
            return _rows([row for row in rows if row["seq"] > since], rows.dropped)

        return listed

    def _devices(self, phone: str) -> list[Device]:
        devices = self._network.devices_of(phone)
        if not devices:
            raise UnknownTarget(f"{phone} has no linked device")
        return devices

    def _device(self, device: Device) -> dict[str, Any]:
        return {
            "jid": str(device.jid),
            "lid": str(self._network.lid(device.phone, device.number)),
            "phone": device.phone,
            "device": device.number,
            "online": device.link is not None,
            "logins": device.logins,
            "connected_since": device.connected_at,
            "prekeys": self._network.store.count_prekeys(device),
            "waiting": self._network.store.count_waiting(device) + len(device.in_flight),
        }

    def _add(self, rules: list[Any], rule: Rule) -> Any:
        _bounded(rules, MAX_RULES)
        rules.append(rule)
        return {}


def make_app(network: Network, media: Media, api_key: str) -> web.Application:
    """The web application."""
    app = web.Application(client_max_size=1 << 20)
    app.router.add_get("/health", _health)
    for (method, path), handler in Api(network).routes().items():
        app.router.add_route(method, path, _guarded(handler, api_key))

    async def file(request: web.Request) -> web.Response:
        _check_key(request, api_key)
        content = _content(network, request.match_info["message_id"])
        try:
            return web.Response(body=media.open(content))
        except MediaUnavailable as error:
            return web.json_response({"error": str(error)}, status=404)

    app.router.add_get("/media/{message_id}", file)
    return app


def _content(network: Network, message_id: str) -> bytes:
    """What a contact decrypted under that message id; empty if there is no such message."""
    received = (row.received for row in network.post.messages if row.id == message_id)
    return next((message.content for message in received if message), b"")


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


def _guarded(
    handler: Handler, api_key: str
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.Response:
        _check_key(request, api_key)
        try:
            outcome = handler(Fields(await _values(request)))
            if asyncio.iscoroutine(outcome):
                outcome = await outcome
        except (BadRequest, InvalidCode, SignalError) as error:
            return web.json_response({"error": str(error)}, status=400)
        except UnknownTarget as error:
            return web.json_response({"error": str(error)}, status=404)
        return web.json_response(outcome)

    return answer


def _check_key(request: web.Request, api_key: str) -> None:
    given = request.headers.get("X-Api-Key", "")
    if not hmac.compare_digest(given.encode(), api_key.encode()):
        raise web.HTTPUnauthorized(
            text=json.dumps({"error": "X-Api-Key is missing or wrong"}),
            content_type="application/json",
        )


async def _values(request: web.Request) -> dict[str, Any]:
    if request.method == "GET":
        return dict(request.query)
    body = await request.read()
    try:
        values = json.loads(body) if body else {}
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadRequest("the body is no JSON object")
    return values


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "seq": attempt.seq,
        "at": attempt.at,
        "monotonic": attempt.monotonic,
        "phone": attempt.phone,
        "reached": attempt.reached,
        "ended": attempt.ended,
        "ended_at": attempt.ended_at,
    }


def _rows(rows: list[dict[str, Any]], dropped: int) -> dict[str, Any]:
    return {"rows": rows, "dropped": dropped}


def _limits(fields: Fields, *, count: int | None) -> tuple[float, float]:
    """Until when, and how often; without either, once for `count` 1 and for ever for None."""
    seconds, times = fields.number("seconds"), fields.number("count", low=1)
    until = FOREVER if seconds is None else time.monotonic() + seconds
    if times is None:
        times = FOREVER if count is None or seconds is not None else count
    return until, times


def _bounded(what: Any, limit: int) -> None:
    if len(what) >= limit:
        raise BadRequest(f"there are {limit} of these already")
