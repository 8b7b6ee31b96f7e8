"""The files that messages point at: fetched to disk, checked, described; never held in memory."""

import contextlib
import math
import mimetypes
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from whatsapp_worker import media_types
from whatsapp_worker.content import is_inside
from whatsapp_worker.errors import MediaFailed
from whatsapp_worker.media_types import MIB, OPUS
from whatsapp_worker.settings import Settings

FOLDER = "media"  # below the session's folder
_CHUNK = 65_536
_THUMBNAIL = (100, 100)
_MAX_PIXELS = 24_000_000  # decoded for a thumbnail; a baseline JPEG is decoded smaller
_TOOL_KIB = 1024 * 1024  # address space of ffmpeg
_TOOL_BLOCKS = 65_536  # of 512 bytes, some shells say 1024: what it writes is told to end sooner
_PREVIEW_S = 10.0
_MAX_PAGE = 512 * 1024
_MAX_PICTURE = 2 * MIB


@dataclass(frozen=True, slots=True)
class File:
    """A file on our disk, fit to be sent; `name` is what its source called it."""

    path: Path
    size: int
    mimetype: str
    name: str
    details: Mapping[str, Any]  # fields of the protobuf message: seconds, width, JPEGThumbnail ...


class Media:
    """Where one session's files lie while they are being sent."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Prepare; nothing is touched.

        Args:
            folder: The session's; files lie in `media/` below it.
            settings: MEDIA_DIR, MEDIA_MAX_MIB, MEDIA_TIMEOUT_S, MEDIA_ALLOW_PRIVATE.
        """
        self._folder = folder / FOLDER
        self._settings = settings

    def clean(self) -> None:
        """Remove what a killed process left. Under the session's lock."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def file(self, content: Mapping[str, Any]) -> Iterator[File]:
        """The file of an image, video, audio, document or sticker message, until the block ends.

        Blocks up to MEDIA_TIMEOUT_S.

        Raises:
            MediaFailed: It cannot be had or WhatsApp would not take it; names the field.
        """
        kind = content["type"]
        deadline = time.monotonic() + self._settings.media_timeout_s
        with self._place() as place:
            field = "link" if "link" in content[kind] else "file"
            try:
                yield self._get(place, kind, content[kind], deadline)
            except (MediaFailed, OSError) as problem:
                raise MediaFailed(f"message.{kind}.{field}: {problem}") from problem

    def preview(self, url: str) -> dict[str, Any]:
        """What a page says of itself, as fields of a text message; empty when it says nothing.

        Blocks up to 10 s. A preview is an ornament: no failure is worth not sending the text.
        """
        from whatsapp_worker import page

        deadline = time.monotonic() + min(_PREVIEW_S, self._settings.media_timeout_s)
        with self._place() as place, contextlib.suppress(MediaFailed, OSError):
            found = page.read(self._download(place, url, _MAX_PAGE, deadline), url)
            fields = {"matchedText": url, **found.fields}
            if found.picture is not None:
                with contextlib.suppress(MediaFailed, OSError):
                    self._download(place, found.picture, _MAX_PICTURE, deadline)
                    fields |= {"JPEGThumbnail": picture(place)["JPEGThumbnail"]}
            return fields
        return {}

    @contextlib.contextmanager
    def _place(self) -> Iterator[Path]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self._folder)
        os.close(descriptor)
        made = Path(name)
        try:
            yield made
        finally:
            made.unlink(missing_ok=True)
            _converted(made).unlink(missing_ok=True)

    def _get(self, place: Path, kind: str, given: Mapping[str, Any], deadline: float) -> File:
        limit = min(self._settings.media_max_mib, media_types.LIMITS_MIB[kind]) * MIB
        if "link" in given:
            said = self._download_to(place, given["link"], limit, deadline)
            name = _name_of(given["link"])
        else:
            said, name = "", PurePosixPath(given["file"]).name
            with place.open("wb") as into:
                self._copy(given["file"], into, limit, deadline)
        if kind == "document":
            name = given.get("filename", name)
            return _described(place, _document_type(place, name, said), name, {})
        return self._checked(place, kind, bool(given.get("voice")), name, deadline)

    def _checked(self, place: Path, kind: str, is_voice: bool, name: str, deadline: float) -> File:
        """A file of a kind whose types are limited; a voice note is made what it must be."""
        sniffed = media_types.sniff(_head(place))
        if is_voice and sniffed != OPUS:
            place = _to_voice(place, sniffed, deadline)
            sniffed = OPUS
        mimetype = media_types.taken_as(kind, sniffed)
        if mimetype is None:
            takes = ", ".join(media_types.TAKEN[kind])
            raise MediaFailed(f"is {sniffed or 'of no known type'}; {kind} takes {takes}")
        return _described(place, mimetype, name, _details(place, kind, mimetype, deadline))

    def _download(self, place: Path, url: str, limit: int, deadline: float) -> bytes:
        """A small answer, whole."""
        self._download_to(place, url, limit, deadline)
        return place.read_bytes()

    def _download_to(self, place: Path, url: str, limit: int, deadline: float) -> str:
        from whatsapp_worker.download import download

        with place.open("wb") as into:
            return download(
                url,
                into,
                limit=limit,
                deadline=deadline,
                allow_private=self._settings.media_allow_private,
            )

    def _copy(self, path: str, into: BinaryIO, limit: int, deadline: float) -> None:
        """Copy a file of MEDIA_DIR: whoever owns it may change it while it is being sent."""
        if self._settings.media_dir is None:
            raise MediaFailed("files are not allowed: MEDIA_DIR is not set")
        with _opened(self._settings.media_dir, path) as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise MediaFailed(f"is longer than the {limit} bytes that are allowed")
            copied = 0
            while chunk := file.read(_CHUNK):
                copied += len(chunk)
                if copied > limit:
                    raise MediaFailed(f"is longer than the {limit} bytes that are allowed")
                if time.monotonic() > deadline:
                    raise MediaFailed("took too long to read")
                into.write(chunk)


def _opened(folder: Path, path: str) -> BinaryIO:
    """Open a regular file below a folder. No step of the path may be a symbolic link, so nothing
    that is renamed meanwhile leads outside."""
    if not is_inside(path):
        raise MediaFailed("is not inside MEDIA_DIR")
    *folders, name = path.split("/")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    where = -1
    try:
        where = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for step in folders:
            inner = os.open(step, flags | os.O_DIRECTORY, dir_fd=where)
            os.close(where)
            where = inner
        found = os.open(name, flags, dir_fd=where)
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or "no such file"
        raise MediaFailed(f"cannot be opened inside MEDIA_DIR: {words}") from error
    finally:
        if where >= 0:
            os.close(where)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise MediaFailed("is not a regular file")
    return os.fdopen(found, "rb")


def _described(path: Path, mimetype: str, name: str, details: Mapping[str, Any]) -> File:
    size = path.stat().st_size
    if size == 0:
        raise MediaFailed("is empty")
    return File(path, size, mimetype, name, details)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(media_types.HEAD)


def _name_of(url: str) -> str:
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    fit = "".join(char for char in name if char.isprintable() and char not in "/\\")
    return fit[:240] or "file"


def _document_type(path: Path, name: str, said: str) -> str:
    """By its bytes, its name, what the server said; the recipient's phone opens it by this."""
    guessed, _ = mimetypes.guess_type(name)
    return media_types.sniff(_head(path)) or guessed or said or "application/octet-stream"


def _details(path: Path, kind: str, mimetype: str, deadline: float) -> dict[str, Any]:
    match kind:
        case "image":
            return picture(path)
        case "sticker":
            return {"isAnimated": media_types.is_animated(_head(path))}
        case "video":
            return _seconds(path, media_types.mp4_seconds) | _still(path, mimetype, deadline)
        case _ if mimetype == OPUS:
            return _seconds(path, media_types.opus_seconds)
    return {}


def _seconds(path: Path, read: Any) -> dict[str, Any]:
    with path.open("rb") as file:
        seconds = read(file, path.stat().st_size)
    return {} if seconds is None else {"seconds": seconds}


def picture(path: Path) -> dict[str, Any]:
    """Size and thumbnail of a picture.

    Raises:
        MediaFailed: It cannot be decoded, or is too large to.
    """
    from io import BytesIO

    from PIL import Image

    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            width, height = image.size
            if not image.info.get("progressive"):  # of those the decoder holds every pixel
                image.draft("RGB", _THUMBNAIL)
            if image.size[0] * image.size[1] > _MAX_PIXELS:
                raise MediaFailed(f"has {width} x {height} pixels, which is too many")
            image.thumbnail(_THUMBNAIL)
            small = BytesIO()
            image.convert("RGB").save(small, "JPEG", quality=60)
    except MediaFailed:
        raise
    except Exception as error:  # decoders raise whatever the bytes lead them to
        raise MediaFailed("is not a picture that can be decoded") from error
    return {"width": width, "height": height, "JPEGThumbnail": small.getvalue()}


# ffmpeg: voice notes need it, videos get a still picture when it is there


def _converted(path: Path) -> Path:
    return path.with_name(path.name + ".out")


def _to_voice(path: Path, sniffed: str | None, deadline: float) -> Path:
    """An OGG with Opus of any sound."""
    demuxer = media_types.DEMUXERS.get((sniffed or "").partition(";")[0])
    if demuxer is None:
        raise MediaFailed(f"is {sniffed or 'of no known type'}, which is no sound")
    if shutil.which("ffmpeg") is None:
        raise MediaFailed(
            f"is {sniffed}, which only ffmpeg can make a voice note, and ffmpeg is not installed;"
            " install it or send OGG with Opus"
        )
    options = "-vn -map_metadata -1 -ac 1 -ar 48000 -c:a libopus -b:a 32k -f ogg"
    target, limit = _converted(path), media_types.LIMITS_MIB["audio"] * MIB
    if not _ffmpeg(path, demuxer, f"{options} -fs {limit}", target, deadline):
        raise MediaFailed("ffmpeg could not make a voice note of it")
    if target.stat().st_size >= limit:  # ffmpeg stopped there, and the rest is missing
        raise MediaFailed(f"is longer than the {limit} bytes that are allowed, as a voice note")
    return target


def _still(path: Path, mimetype: str, deadline: float) -> dict[str, Any]:
    """A film's first picture; nothing without ffmpeg."""
    target = _converted(path)
    fit = "scale=100:100:force_original_aspect_ratio=decrease"
    options = f"-an -frames:v 1 -vf {fit} -c:v mjpeg -f image2 -update 1"
    demuxer = media_types.DEMUXERS[mimetype]
    if not shutil.which("ffmpeg") or not _ffmpeg(path, demuxer, options, target, deadline):
        return {}
    return {"JPEGThumbnail": target.read_bytes()} if target.stat().st_size < _CHUNK else {}


def _ffmpeg(source: Path, demuxer: str, options: str, target: Path, deadline: float) -> bool:
    """Run it on a file from strangers: it reads that file alone, as what its bytes say, has
    nothing of our environment, and its memory, output and time are bounded, also where this
    process is killed meanwhile."""
    left_s = max(0.1, deadline - time.monotonic())
    limits = f"ulimit -v {_TOOL_KIB}; ulimit -f {_TOOL_BLOCKS}; ulimit -t {math.ceil(left_s)}"
    quiet = "ffmpeg -nostdin -v quiet -y -threads 1 -filter_threads 1 -protocol_whitelist file"
    given = f"-max_pixels {_MAX_PIXELS} -f {demuxer} -i"
    command = [*quiet.split(), *given.split(), f"file:{source}"]
    command += [*options.split(), "-threads", "1", f"file:{target}"]
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", f'{limits}; exec "$@"', "sh", *command],
            env={"PATH": os.environ.get("PATH", os.defpath)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=left_s,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and target.exists() and target.stat().st_size > 0
