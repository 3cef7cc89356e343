"""Turns a page's planned behaviour into the bytes of an HTTP answer: pure functions, no sockets."""

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from http import HTTPStatus
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from jobs.demo.behaviours import Behaviour

ROBOTS_FOLDER = "/disallowed"  # where pages lie that robots.txt keeps robots from
ROBOTS_TXT = f"User-agent: *\nDisallow: {ROBOTS_FOLDER}/\n".encode()
_MOVED = "/moved"  # put before a path: the page itself, whatever its behaviour
_MOVING = "/moving"  # put before a path: redirects to /moved
_LOOP = "/loop"  # put before a path: redirects back to the path
_CHUNK_BYTES = 1500
_REFUSALS = {
    Behaviour.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Behaviour.FORBIDDEN: HTTPStatus.FORBIDDEN,
    Behaviour.GONE: HTTPStatus.GONE,
}


class ServerConfig(BaseModel):
    """How the server answers where the plan leaves it open."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Which requests for an error-then-ok page fail. "once": the first one that this server sees.
    # "alternate": every odd one, so that any two attempts in a row hold one success whatever came
    # before: a client or a server that is killed and started again ends with the same picture.
    recovery: Literal["once", "alternate"] = "alternate"
    retry_after_seconds: int = Field(default=1, ge=0)  # what 429 asks for
    silence_seconds: float = Field(default=30.0, gt=0)  # then a silent page resets the connection


@dataclass(frozen=True, slots=True)
class Page:
    """One URL of the web: what it does, and which bytes of the web's files it serves as what."""

    offset: int
    num_bytes: int
    content_type: str
    behaviour: Behaviour = Behaviour.OK


class Ending(StrEnum):
    """What the server does with the connection after an answer."""

    KEEP = auto()
    CLOSE = auto()
    RESET = auto()
    SILENCE = auto()  # sends nothing for `silence_seconds`, then resets


@dataclass(frozen=True, slots=True)
class Answer:
    """The bytes to send, and what then becomes of the connection."""

    head: bytes = b""
    body: bytes = b""
    ending: Ending = Ending.KEEP


@dataclass(frozen=True, slots=True)
class Request:
    """What an answer depends on. `count` is 1 for the first request of `path`, then 2 ..."""

    path: str
    host: str
    count: int = 1


def find_page(path: str, pages: Mapping[str, Page]) -> tuple[str, Page] | None:
    """Return a page's own path and the page, for that path or a stop of its redirects."""
    for prefix in ("", _MOVED, _MOVING, _LOOP):
        own_path = path.removeprefix(prefix)
        if path.startswith(prefix) and own_path in pages:
            return own_path, pages[own_path]
    return None


def answer(
    request: Request, own_path: str, page: Page, data: bytes, config: ServerConfig
) -> Answer:
    """Return what the server says for a page whose bytes are `data`."""
    behaviour = page.behaviour
    if behaviour in _REFUSALS:
        return error(_REFUSALS[behaviour])
    if behaviour is Behaviour.SILENT:
        return Answer(ending=Ending.SILENCE)
    if behaviour is Behaviour.RESET:
        return Answer(ending=Ending.RESET)
    if moved := _redirect(request, own_path, behaviour):
        status, location = moved
        return _reply(status, b"", {"Location": location})
    is_early = request.count == 1 if config.recovery == "once" else request.count % 2 == 1
    if is_early and behaviour is Behaviour.ERROR_THEN_OK:
        return error(HTTPStatus.INTERNAL_SERVER_ERROR)
    if is_early and behaviour is Behaviour.THROTTLED:
        wait = {"Retry-After": str(config.retry_after_seconds)}
        return _reply(HTTPStatus.TOO_MANY_REQUESTS, b"", wait)
    return _serve(page, data)


def error(status: HTTPStatus) -> Answer:
    """Return a short plain-text answer with this status."""
    text = f"{status.value} {status.phrase}\n".encode()
    return _reply(status, text, {"Content-Type": "text/plain"})


def plain_text(text: bytes) -> Answer:
    """Return 200 with a text."""
    return _reply(HTTPStatus.OK, text, {"Content-Type": "text/plain"})


def _redirect(
    request: Request, own_path: str, behaviour: Behaviour
) -> tuple[HTTPStatus, str] | None:
    """Return status and Location while the request is not yet where the page is."""
    if request.path.startswith(_LOOP + "/"):
        return HTTPStatus.FOUND, own_path
    if request.path.startswith(_MOVING + "/"):
        return HTTPStatus.FOUND, _MOVED + own_path
    if request.path != own_path:
        return None
    return {
        Behaviour.MOVED_ABSOLUTE: (
            HTTPStatus.MOVED_PERMANENTLY,
            f"http://{request.host}{_MOVED}{own_path}",
        ),
        Behaviour.MOVED_RELATIVE: (HTTPStatus.FOUND, _MOVED + own_path),
        Behaviour.MOVED_TWICE: (HTTPStatus.TEMPORARY_REDIRECT, _MOVING + own_path),
        Behaviour.LOOP: (HTTPStatus.FOUND, _LOOP + own_path),
        Behaviour.TO_PRIVATE: (HTTPStatus.FOUND, f"http://10.0.0.1{own_path}"),
        Behaviour.TO_METADATA: (
            HTTPStatus.FOUND,
            "http://169.254.169.254/latest/meta-data/",
        ),
    }.get(behaviour)


def _serve(page: Page, data: bytes) -> Answer:
    kind = {"Content-Type": page.content_type}
    match page.behaviour:
        case Behaviour.WRONG_TYPE:
            return _reply(HTTPStatus.OK, data, {"Content-Type": "text/plain; charset=utf-8"})
        case Behaviour.NOAI:
            return _reply(HTTPStatus.OK, data, kind | {"X-Robots-Tag": "noai"})
        case Behaviour.GZIP:
            packed = gzip.compress(data, mtime=0)
            return _reply(HTTPStatus.OK, packed, kind | {"Content-Encoding": "gzip"})
        case Behaviour.NO_LENGTH:
            return Answer(_head(HTTPStatus.OK, kind | {"Connection": "close"}), data, Ending.CLOSE)
        case Behaviour.CHUNKED:
            return Answer(
                _head(HTTPStatus.OK, kind | {"Transfer-Encoding": "chunked"}), _chunks(data)
            )
        case Behaviour.TRUNCATED:
            whole = _reply(HTTPStatus.OK, data, kind)
            return Answer(whole.head, data[: len(data) // 2], Ending.CLOSE)
        case _:
            return _reply(HTTPStatus.OK, data, kind)


def _chunks(data: bytes) -> bytes:
    pieces = [data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


def _reply(status: HTTPStatus, body: bytes, fields: Mapping[str, str]) -> Answer:
    return Answer(_head(status, {**fields, "Content-Length": str(len(body))}), body)


def _head(status: HTTPStatus, fields: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
