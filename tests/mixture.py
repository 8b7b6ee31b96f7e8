"""A thousand messages of every kind, and for each what is done to it and what may become of it.

Pure: the same seed gives the same mixture. Every message carries its mark somewhere in what its
recipient reads, so that arrivals are counted by what was decrypted and by nothing of ours.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SESSIONS = 5
WAVES = 5
WAVE = 40  # messages of one session in one wave
SENT = frozenset({"sent", "delivered", "read", "played"})
EVERYDAY = "plain"  # the fate of most

Message = dict[str, Any]


@dataclass(frozen=True)
class Fate:
    """What happens to a message on its way.

    Attributes:
        ends: The words that its job may end with.
        faults: What the sandbox does to messages for its recipient, one after another.
        receipts: What its recipient answers.
        options: More arguments of the job.
        later_s: Its `send_at` lies so long ahead, at least and at most.
        resends: How often it may be sent again.
    """

    ends: frozenset[str]
    faults: tuple[Mapping[str, Any], ...] = ()
    receipts: str = "delivered"
    options: Mapping[str, Any] = field(default_factory=dict)
    later_s: tuple[float, float] | None = None
    resends: int = 0

    @property
    def is_unanswered(self) -> bool:
        """Whether its sender may never learn what became of it."""
        return any(fault["how"] != "refuse" for fault in self.faults)


def _fault(how: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"how": how, "count": count, **more}


_RESEND = {"on_unknown": "resend"}
_LOST, _REFUSED = _fault("no_ack"), _fault("refuse", code=479)
_FAILED, _UNKNOWN = frozenset({"failed"}), frozenset({"unknown"})

FATES = {
    EVERYDAY: Fate(SENT),
    "high": Fate(SENT, options={"priority": "high"}),
    "read": Fate(SENT, receipts="played"),
    "refused": Fate(_FAILED, (_fault("refuse", code=404),)),
    "refused for a moment": Fate(SENT, (_fault("refuse", 2, code=503),)),
    "refused for ever": Fate(_FAILED, (_fault("refuse", 1000, code=500),)),
    "not on WhatsApp": Fate(_FAILED),
    "invalid": Fate(_FAILED),
    # Taken and delivered, never acknowledged.
    "answer lost": Fate(_UNKNOWN, (_LOST,), "none"),
    "answer lost, receipt": Fate(SENT | _UNKNOWN, (_LOST,)),
    "answer lost, resent": Fate(SENT, (_LOST,), "none", _RESEND, resends=2),
    "answer lost, resent, refused": Fate(_UNKNOWN, (_LOST, _REFUSED), "none", _RESEND, resends=2),
    "answers lost, resent": Fate(_UNKNOWN, (_fault("no_ack", 10),), "none", _RESEND, resends=2),
    "dropped after": Fate(SENT | _UNKNOWN, (_fault("drop_after"),)),
    "dropped after, silence": Fate(SENT | _UNKNOWN, (_fault("drop_after"),), "none"),
    "dropped before": Fate(SENT | _UNKNOWN, (_fault("drop_before"),)),
    # Behind at least twenty others, which take longer than that.
    "expires": Fate(frozenset({"expired"}), options={"ttl_s": 0.02}),
    "soon": Fate(SENT, later_s=(1.0, 6.0)),
    "soon, by RQ": Fate(SENT, later_s=(1.0, 6.0)),
    "cancelled": Fate(SENT | {"cancelled"}),
    "cancelled long before": Fate(frozenset({"cancelled"}), later_s=(3600.0, 3600.0)),
    "cancelled by RQ": Fate(SENT | {"cancelled"}),
    # Jobs of a message id that another job has used.
    "again": Fate(SENT),
    "again, after a failure": Fate(SENT),
    "again, other content": Fate(_FAILED),
}
CANCELLED = ("cancelled", "cancelled long before")

# Where the same fate would hit one session too often in ten minutes, it counts as flapping.
_ROTATING = (
    "answer lost",
    "answer lost, receipt",
    "answer lost, resent",
    "answer lost, resent, refused",
    "answers lost, resent",
)
_ALWAYS = (
    *("refused", "refused for a moment", "not on WhatsApp", "invalid", "expires", "soon"),
    *("high", "high", "high", "read", "again", "again, after a failure", "again, other content"),
    *("soon, by RQ", "cancelled", "cancelled long before", "cancelled by RQ"),
)
_OF_WAVE = (
    ("refused for ever",),
    ("dropped after",),
    ("dropped before",),
    ("dropped after, silence",),
    (),
)
_LATE = ("expires", "again", "again, other content")


@dataclass(frozen=True)
class Order:
    """One job.

    Attributes:
        number: Its place among all; within a session and lane, the order of enqueueing.
        mark: Stands in its message.
        send_in_s: Not to be sent before so many seconds after enqueueing.
    """

    number: int
    session: str
    fate_name: str
    mark: str
    message_id: str
    to: str
    message: Message
    send_in_s: float | None

    @property
    def fate(self) -> Fate:
        return FATES[self.fate_name]

    @property
    def job_id(self) -> str:
        return f"job-{self.number:04d}"

    @property
    def metadata(self) -> dict[str, Any]:
        return {"order": self.number, "fate": self.fate_name}

    @property
    def is_high(self) -> bool:
        return self.fate.options.get("priority") == "high"

    @property
    def is_by_rq(self) -> bool:
        """Whether RQ itself lays it aside, by `enqueue_at`."""
        return self.fate_name == "soon, by RQ"

    def arguments(self, now: float) -> dict[str, Any]:
        """The job's, when it is enqueued at these UTC seconds."""
        arguments = {
            "session": self.session,
            "to": self.to,
            "message_id": self.message_id,
            "message": self.message,
            "metadata": self.metadata,
            **self.fate.options,
        }
        if self.send_in_s is not None and not self.is_by_rq:
            arguments["send_at"] = now + self.send_in_s
        return arguments


class Mixture:
    """The waves of all sessions.

    Args:
        groups: The JID of a group, by session.
    """

    def __init__(self, seed: int, groups: Mapping[str, str]) -> None:
        self._dice = random.Random(seed)
        self._groups = groups
        self._count = 0
        sessions = list(enumerate(groups))
        self.waves = [
            {name: self._wave(wave, index, name) for index, name in sessions}
            for wave in range(WAVES)
        ]

    def __iter__(self) -> Iterator[Order]:
        return (order for wave in self.waves for orders in wave.values() for order in orders)

    def _wave(self, wave: int, index: int, session: str) -> list[Order]:
        orders: list[Order] = []
        for name in self._fates(wave, index):
            orders.append(self._order(session, name, orders))
        return orders

    def _fates(self, wave: int, index: int) -> list[str]:
        """In the order of enqueueing."""
        fixed = [*_ALWAYS, *_OF_WAVE[wave], _ROTATING[(wave + index) % len(_ROTATING)]]
        plain = [EVERYDAY] * (WAVE - len(fixed))
        late = [name for name in fixed if name in _LATE]
        early = [*plain, *(name for name in fixed if name not in _LATE)]
        self._dice.shuffle(early)
        self._dice.shuffle(late)
        # It follows one that is refused, whose message id it has.
        early.remove("again, after a failure")
        first = early.index("refused")
        early.insert(self._dice.randint(first + 1, len(early)), "again, after a failure")
        return early + late

    def _order(self, session: str, fate_name: str, before: Sequence[Order]) -> Order:
        number, self._count = self._count, self._count + 1
        mark, fate, dice = f"mark-{number:04d}", FATES[fate_name], self._dice
        message_id = f"crm-{number}"
        to = dice.choice([f"55317{session[1:]}{n:06d}" for n in range(6)])
        kind = dice.choice(KINDS)
        if fate_name == EVERYDAY and dice.random() < 0.15:
            to, kind = self._groups[session], dice.choice(FOR_GROUPS)
        elif fate.faults or fate.receipts != "delivered" or fate_name == "not on WhatsApp":
            to = f"55318{number:08d}"
        message = kind(mark)
        if fate_name == "invalid":
            message = dice.choice(INVALID)(mark)
        elif fate_name.startswith("again"):
            wanted = "refused" if fate_name == "again, after a failure" else EVERYDAY
            first = dice.choice([order for order in before if order.fate_name == wanted])
            message_id = first.message_id
            if fate_name != "again, other content":
                mark, to, message = first.mark, first.to, first.message
        later = dice.uniform(*fate.later_s) if fate.later_s else None
        return Order(number, session, fate_name, mark, message_id, to, message, later)


# What a message can be; each says its mark.


def _text(mark: str) -> Message:
    return {"type": "text", "text": {"body": f"{mark}: hello"}}


def _reply(mark: str) -> Message:
    return {**_text(mark), "context": {"message_id": "3EB0AA", "text": "really?"}}


def _mention(mark: str) -> Message:
    someone = "5521988886666"
    return {"type": "text", "text": {"body": f"{mark}: @{someone}", "mentions": [someone]}}


def _image(mark: str) -> Message:
    return {"type": "image", "image": {"file": "a.jpg", "caption": mark}}


def _video(mark: str) -> Message:
    return {"type": "video", "video": {"file": "a.mp4", "caption": mark}}


def _document(mark: str) -> Message:
    return {"type": "document", "document": {"file": "offer.pdf", "filename": f"{mark}.pdf"}}


# These have no words of their own: what they answer says which they are.


def _audio(mark: str) -> Message:
    return {"type": "audio", "audio": {"file": "a.mp3"}, "context": {"message_id": mark}}


def _voice(mark: str) -> Message:
    voice = {"file": "a.ogg", "voice": True}
    return {"type": "audio", "audio": voice, "context": {"message_id": mark}}


def _sticker(mark: str) -> Message:
    return {"type": "sticker", "sticker": {"file": "a.webp"}, "context": {"message_id": mark}}


def _location(mark: str) -> Message:
    return {"type": "location", "location": {"latitude": -23.5, "longitude": -46.6, "name": mark}}


def _contact(mark: str) -> Message:
    card = {"name": {"formatted_name": mark}, "phones": [{"phone": "+5511999990002"}]}
    return {"type": "contacts", "contacts": [card]}


def _reaction(mark: str) -> Message:
    return {"type": "reaction", "reaction": {"message_id": mark, "emoji": "👍"}}


def _poll(mark: str) -> Message:
    return {"type": "poll", "poll": {"question": mark, "options": ["yes", "no"]}}


def _edit(mark: str) -> Message:
    return {"type": "edit", "edit": {"message_id": "3EB0BB", "text": {"body": mark}}}


def _revoke(mark: str) -> Message:
    return {"type": "revoke", "revoke": {"message_id": mark}}


Kind = Callable[[str], Message]

FILES: tuple[Kind, ...] = (_image, _video, _document, _audio, _voice, _sticker)
FOR_GROUPS: tuple[Kind, ...] = (_text, _mention, _image, _location, _poll)
KINDS: tuple[Kind, ...] = (
    *(_text, _reply, _mention, _location, _contact, _reaction, _poll, _edit, _revoke),
    *(_text, _text, _text),
    *FILES,
)
INVALID: tuple[Kind, ...] = (
    lambda mark: {"type": "text", "text": {"body": ""}},
    lambda mark: {**_text(mark), "colour": "red"},
    lambda mark: {"type": "telegram", "telegram": {"body": mark}},
    lambda mark: {"type": "image", "image": {"caption": mark}},
    lambda mark: {"type": "document", "document": {"file": f"../{mark}"}},
)
