"""Cells of any table or document made into a row, or refused with a reason."""

import math
from collections.abc import Mapping, Sequence
from urllib.parse import urljoin, urlsplit

from pipeline.sources.config import SourceConfig
from pipeline.sources.rows import (
    HttpUrl,
    LocalImage,
    Location,
    MalformedReason,
    RecordError,
    Scalar,
    SourceRow,
    ZipMember,
)

_MAX_EXTRA_CHARS = 10_000
_MAX_CAPTIONS = 1000


def row_of_cells(
    config: SourceConfig, url: object, captions: object, extra: Mapping[str, object]
) -> SourceRow:
    """Return the row that a record's cells make; raises RecordError when they make none."""
    return SourceRow(
        source=config.name,
        location=_location(config, clean_text(url, "url", config.max_url_chars)),
        captions=clean_captions(captions, config.max_caption_chars),
        origin=config.origin,
        extra={name: _scalar(name, value) for name, value in extra.items()},
    )


def clean_text(value: object, name: str, max_chars: int) -> str:
    """Return a text cell stripped; "" for a missing one. Raises RecordError.

    Bytes are UTF-8. Text that UTF-8 cannot carry, lone surrogates, never gets past here.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        if len(value) > 4 * max_chars:
            raise _too_long(name, len(value) // 4, max_chars)
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        raise RecordError(MalformedReason.WRONG_TYPE, f"{name} is {type(value).__name__}, not text")
    if len(value) > max_chars:
        raise _too_long(name, len(value), max_chars)
    if "\0" in value:
        raise RecordError(MalformedReason.NUL_CHARACTER, f"NUL in {name}")
    if not value.isascii() and not _is_utf8(value):
        raise RecordError(MalformedReason.NOT_UTF8, f"{name} is not UTF-8")
    return value.strip()


def clean_captions(value: object, max_chars: int) -> tuple[str, ...]:
    """Return the captions of a cell that holds one text, or a list of texts; empty ones go."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        value = (value,)
    if len(value) > _MAX_CAPTIONS:
        raise RecordError(
            MalformedReason.CAPTION_TOO_LONG, f"{len(value)} captions, at most {_MAX_CAPTIONS}"
        )
    texts = (clean_text(text, "caption", max_chars) for text in value)
    return tuple(text for text in texts if text)


def image_in_root(config: SourceConfig, name: str) -> Location:
    """Return where an image that a list names lies under `image_root`; raises RecordError.

    The name is the list's, the root is ours: a name that would leave the root is refused.
    """
    assert config.image_root is not None
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or name.startswith("/") or "::" in name or ":" in parts[0]:
        raise RecordError(MalformedReason.UNSAFE_PATH, f"{name[:80]!r} leaves image_root")
    if config.image_root.endswith(".zip"):
        return ZipMember(config.image_root, name)
    return LocalImage(f"{config.image_root.rstrip('/')}/{name}")


def _location(config: SourceConfig, url: str) -> Location:
    if not url:
        raise RecordError(MalformedReason.MISSING_URL, "no URL")
    if config.image_root is not None:
        return image_in_root(config, url)
    if config.base_url is not None:
        try:
            is_relative = not urlsplit(url).scheme
        except ValueError:
            is_relative = False  # the guard names what is wrong with it
        if is_relative:
            return HttpUrl(urljoin(config.base_url, url))
    return HttpUrl(url)


def _scalar(name: str, value: object) -> Scalar:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | bytes):
        return clean_text(value, name, _MAX_EXTRA_CHARS)
    if isinstance(value, Mapping | Sequence):
        raise RecordError(
            MalformedReason.WRONG_TYPE, f"{name} is {type(value).__name__}, not one value"
        )
    return str(value)  # dates and decimals, which Parquet has and JSON has not


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_long(name: str, num_chars: int, max_chars: int) -> RecordError:
    reason = {
        "url": MalformedReason.URL_TOO_LONG,
        "caption": MalformedReason.CAPTION_TOO_LONG,
    }.get(name, MalformedReason.RECORD_TOO_LONG)
    return RecordError(reason, f"{name} has {num_chars} characters, at most {max_chars}")
