"""What every source is read into: one row per image, or one note per record that gives none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Scalar = str | int | float | bool | None


class Origin(StrEnum):
    """Who wrote a source's captions: the web's alt-texts are filtered, human captions never."""

    WEB = "web"
    HUMAN = "human"


@dataclass(frozen=True, slots=True)
class HttpUrl:
    """An image that has to be fetched, under the guard; whatever a list wrote in its URL column."""

    url: str


@dataclass(frozen=True, slots=True)
class LocalImage:
    """An image file of our own: a path or any fsspec URL, from the configuration, never a list."""

    path: str


@dataclass(frozen=True, slots=True)
class TarMember:
    """An image inside a plain tar of our own: its bytes are [byte_offset, +num_bytes)."""

    tar: str
    member: str
    byte_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ZipMember:
    """An image inside a zip of our own, as COCO is published."""

    zip: str
    member: str


class ElsewhereReason(StrEnum):
    """Why an image is not there that somebody else was to fetch."""

    FAILED_TO_DOWNLOAD = "failed_to_download"
    FAILED_TO_RESIZE = "failed_to_resize"
    MISSING_IMAGE = "missing_image"
    DAMAGED_TAR = "damaged_tar"


@dataclass(frozen=True, slots=True)
class DownloadedImage:
    """An image that somebody else has fetched: where it came from, and where it lies."""

    url: str
    member: TarMember


@dataclass(frozen=True, slots=True)
class NotDownloaded:
    """An image that somebody else could not fetch, with what they say of it; nobody tries again."""

    url: str
    reason: ElsewhereReason
    detail: str


Location = HttpUrl | LocalImage | TarMember | ZipMember | DownloadedImage | NotDownloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """One image of a source with the captions the source gives it."""

    source: str
    location: Location
    captions: tuple[str, ...]
    """Stripped, none of them empty; no caption at all is allowed. In the source's order."""
    origin: Origin
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    """The columns that the configuration keeps, under the source's names."""

    @property
    def url(self) -> str:
        """The image's address for the ledger; what is in an archive reads `archive#member`."""
        match self.location:
            case HttpUrl(url) | DownloadedImage(url=url) | NotDownloaded(url=url):
                return url
            case LocalImage(path):
                return path
            case TarMember(tar=archive, member=member) | ZipMember(zip=archive, member=member):
                return f"{archive}#{member}"


class MalformedReason(StrEnum):
    """Why a record of a source gives no row."""

    TOO_FEW_COLUMNS = "too_few_columns"
    TOO_MANY_COLUMNS = "too_many_columns"
    WRONG_TYPE = "wrong_type"
    MISSING_URL = "missing_url"
    URL_TOO_LONG = "url_too_long"
    CAPTION_TOO_LONG = "caption_too_long"
    RECORD_TOO_LONG = "record_too_long"
    NOT_UTF8 = "not_utf8"
    NUL_CHARACTER = "nul_character"
    BROKEN_RECORD = "broken_record"
    UNSAFE_PATH = "unsafe_path"
    UNMATCHED = "unmatched"


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedRow:
    """A record that gives no row: where it stands, and what is wrong with it."""

    source: str
    file: str
    line: int
    """1-based; of the record's first line, or the record's number where a format has no lines."""
    reason: MalformedReason
    detail: str


class SourceError(Exception):
    """A source cannot be read at all: the message names the file, what is wrong, and what to do."""


class RecordError(Exception):
    """One record gives no row; the reader adds file and line, and makes a MalformedRow of it."""

    def __init__(self, reason: MalformedReason, detail: str) -> None:
        """`detail` is shown to people; keep the record's own text out of it or cut it short."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
