"""What a web page says of itself, for the preview of a link: pure, over bytes from strangers."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from html.parser import HTMLParser
from urllib.parse import urljoin

from whatsapp_worker.content import is_link

_MAX_TITLE, _MAX_DESCRIPTION = 200, 500
_TITLES = ("og:title", "twitter:title", "<title>")
_DESCRIPTIONS = ("og:description", "twitter:description", "description")
_PICTURES = ("og:image", "og:image:url", "twitter:image")


@dataclass(frozen=True, slots=True)
class Page:
    """`fields` are `title` and `description`, those that there are; `picture` is a URL."""

    fields: Mapping[str, str]
    picture: str | None


def read(html: bytes, url: str) -> Page:
    """Read a page; empty when it is none. `url` is its own."""
    reader = _Reader()
    # The library's parser asserts where it is surprised; what it read before that stays.
    with suppress(AssertionError, ValueError):
        reader.feed(html.decode("utf-8", "replace"))
    fields = {
        "title": _first(reader.said, _TITLES)[:_MAX_TITLE],
        "description": _first(reader.said, _DESCRIPTIONS)[:_MAX_DESCRIPTION],
    }
    return Page(
        {name: text for name, text in fields.items() if text},
        _picture(_first(reader.said, _PICTURES), url),
    )


def _first(said: Mapping[str, str], names: tuple[str, ...]) -> str:
    texts = (" ".join(said.get(name, "").split()) for name in names)
    return next(filter(None, texts), "")


def _picture(given: str, url: str) -> str | None:
    if not given:
        return None
    try:
        joined = urljoin(url, given)
    except ValueError:
        return None
    return joined if is_link(joined) else None


class _Reader(HTMLParser):
    """Collects the first of each `<meta>` and the `<title>`."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, str] = {}
        self._is_in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_in_title = tag == "title"
        if tag == "meta":
            given = dict(attrs)
            name = given.get("property") or given.get("name") or ""
            self.said.setdefault(name.lower(), given.get("content") or "")

    def handle_endtag(self, tag: str) -> None:
        self._is_in_title = False

    def handle_data(self, data: str) -> None:
        if self._is_in_title:
            self.said.setdefault("<title>", data)
