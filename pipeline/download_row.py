"""One row visited: its image fetched or read, judged, made ready to store; or why it is not.

The columns of a raw shard's ledger are img2dataset's (caption, url, key, status, error_message,
width, height, original_width, original_height, sha256) and ours.
"""

import hashlib
import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.fetch import FetchResult
from pipeline.image_header import ImageReason
from pipeline.images import ImageConfig, ProcessedImage, process_image
from pipeline.ledger import ledger_schema
from pipeline.local_images import UNREADABLE, LocalImages
from pipeline.sample import Caption, Origin, Sample, SampleError, Verdict, canonical_json
from pipeline.sources.rows import (
    ElsewhereReason,
    HttpUrl,
    MalformedRow,
    NotDownloaded,
    SourceRow,
)
from pipeline.web.failures import FailureReason

BLOCKED_IMAGE = "blocked_image"
RAW_SCHEMA = ledger_schema(
    [
        pa.field("caption", pa.string()),  # the first
        pa.field("num_captions", pa.int32()),
        pa.field("origin", pa.string()),
        pa.field("status", pa.string()),  # img2dataset's word for the verdict
        pa.field("error_message", pa.string()),
        pa.field("http_status", pa.int32()),
        pa.field("attempts", pa.int32()),
        pa.field("final_url", pa.string()),  # None where no redirect led elsewhere
        pa.field("num_bytes", pa.int64()),  # as downloaded, as is sha256
        pa.field("sha256", pa.string()),
        pa.field("phash", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("original_width", pa.int32()),
        pa.field("original_height", pa.int32()),
        pa.field("extra", pa.string()),  # the source's own columns, a JSON object
    ]
)
_MAX_DETAIL_CHARS = 300

# Our own rules, and the page's: such rows are left out on purpose and never retried.
_RULES = frozenset(
    {
        FailureReason.SCHEME_REFUSED,
        FailureReason.HOST_REFUSED,
        FailureReason.PORT_REFUSED,
        FailureReason.ADDRESS_REFUSED,
        FailureReason.BLOCKED_DOMAIN,
        FailureReason.BLOCKED_URL,
        FailureReason.ROBOTS_TXT,
        FailureReason.ROBOTS_HEADER,
        BLOCKED_IMAGE,
        *(reason for reason in ImageReason if reason.is_rule),
    }
)
# What is seen of a broken connection depends on the moment, and the ledger must not.
_MOMENTARY = frozenset(
    {
        FailureReason.CONNECT_FAILURE,
        FailureReason.CONNECTION_RESET,
        FailureReason.DNS_FAILURE,
        FailureReason.HOST_BUSY,
        FailureReason.TIMEOUT,
        FailureReason.TOO_SLOW,
        FailureReason.TRUNCATED_BODY,
    }
)
_TRANSIENT = frozenset({UNREADABLE, *(reason for reason in FailureReason if reason.is_transient)})


def is_transient(reason: str) -> bool:
    """Say whether a row that failed for this reason may succeed on another day."""
    return reason in _TRANSIENT


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What became of one row, ready to be written."""

    key: str
    verdict: Verdict
    reason: str  # empty when kept
    url: str | None
    ledger: Mapping[str, Any]  # the row's columns
    members: Mapping[str, bytes] | None = None  # the sample's files by extension, when kept
    is_copied: bool = False  # from the shard that is replaced; its files are there
    detail: str = ""  # what was seen when it was not kept, in words
    num_bytes: int = 0  # downloaded
    elapsed_seconds: float = 0.0  # of the fetch, pauses and queueing included


@dataclass(frozen=True, slots=True)
class _Visit:
    """What is known of a row while it is visited."""

    fetched: FetchResult | None = None
    body: bytes | None = None
    sha256: str | None = None


class RowVisitor:
    """Visits rows under one configuration; any number of threads may share it."""

    def __init__(
        self,
        config: ImageConfig,
        fetch: Callable[[str], FetchResult],
        local_images: LocalImages,
        *,
        num_decoders: int,
        blocked_sha256: frozenset[str],
    ) -> None:
        """At most `num_decoders` images are decoded at a time, for each takes memory."""
        self._config = config
        self._fetch = fetch
        self._local_images = local_images
        # Tokens in a queue: a semaphore of threading costs as much as reading a small image.
        self._may_decode: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(num_decoders):
            self._may_decode.put(None)
        self._blocked_sha256 = blocked_sha256

    def visit(self, key: str, row: SourceRow | MalformedRow) -> RowResult:
        """Return what became of the row; never raises for what the web or an image does."""
        if isinstance(row, MalformedRow):
            where = f"{row.file}, line {row.line}: {row.detail}"
            return _lost(key, row, _Visit(), SampleError(row.reason, where))
        visit = _Visit()
        try:
            visit = self._get(row)
            if visit.fetched is not None and visit.fetched.reason is not None:
                raise SampleError(visit.fetched.reason, visit.fetched.detail)
            assert visit.body is not None, "without a reason there is a body"
            if visit.sha256 in self._blocked_sha256:
                raise SampleError(BLOCKED_IMAGE, "its bytes are on the blocklist")
            image = self._process(visit.body)
            return self._kept(key, row, visit, image)
        except SampleError as error:
            return _lost(key, row, visit, error)

    def _process(self, body: bytes) -> ProcessedImage:
        self._may_decode.get()
        try:
            return process_image(body, self._config)
        finally:
            self._may_decode.put(None)

    def _get(self, row: SourceRow) -> _Visit:
        if isinstance(row.location, HttpUrl):
            fetched = self._fetch(row.location.url)
            body = fetched.body
        elif isinstance(row.location, NotDownloaded):
            raise SampleError(row.location.reason, row.location.detail)
        else:
            fetched, body = None, self._local_images.read(row.location)
        return _Visit(fetched, body, None if body is None else hashlib.sha256(body).hexdigest())

    def _kept(self, key: str, row: SourceRow, visit: _Visit, image: ProcessedImage) -> RowResult:
        size = {
            "width": image.width,
            "height": image.height,
            "original_width": image.original_width,
            "original_height": image.original_height,
            "phash": image.phash,
        }
        sample = Sample(
            key=key,
            image=image.data,
            extension=self._config.encode_format,
            captions=_captions(row),
            metadata={
                "key": key,
                "source": row.source,
                "url": row.url,
                "caption": row.captions[0] if row.captions else None,
                "status": "success",
                "error_message": None,
                "sha256": visit.sha256,
                **size,
                "extra": dict(row.extra),
            },
        )
        ledger = {**_ledger_row(key, row, visit), **size, "status": "success"}
        return RowResult(
            key=key,
            verdict=Verdict.KEPT,
            reason="",
            url=row.url,
            ledger=ledger,
            members=sample.to_members(),
            num_bytes=len(visit.body or b""),
            elapsed_seconds=visit.fetched.elapsed_seconds if visit.fetched else 0.0,
        )


def _captions(row: SourceRow) -> tuple[Caption, ...]:
    origin = Origin(row.origin)
    return tuple(
        Caption(text=text, origin=origin, index=index) for index, text in enumerate(row.captions)
    )


def _lost(key: str, row: SourceRow | MalformedRow, visit: _Visit, error: SampleError) -> RowResult:
    verdict = Verdict.DROPPED if error.reason in _RULES else Verdict.FAILED
    reason = str(error.reason)
    detail = _storable(error.message[:_MAX_DETAIL_CHARS])
    has_image = visit.body is not None or reason == ElsewhereReason.FAILED_TO_RESIZE
    ledger = {
        **_ledger_row(key, row, visit),
        "verdict": verdict.value,
        "reason": reason,
        "status": "failed_to_resize" if has_image else "failed_to_download",
        "error_message": reason if reason in _MOMENTARY or not detail else f"{reason}: {detail}",
    }
    return RowResult(
        key=key,
        verdict=verdict,
        reason=reason,
        url=row.url if isinstance(row, SourceRow) else None,
        ledger=ledger,
        detail=detail,
        num_bytes=len(visit.body or b""),
        elapsed_seconds=visit.fetched.elapsed_seconds if visit.fetched else 0.0,
    )


def _ledger_row(key: str, row: SourceRow | MalformedRow, visit: _Visit) -> dict[str, Any]:
    """Return every column, those of a kept row that is not known any further as None."""
    columns: dict[str, Any] = dict.fromkeys(RAW_SCHEMA.names)
    columns |= {"key": key, "source": row.source, "verdict": Verdict.KEPT.value, "reason": ""}
    if isinstance(row, SourceRow):
        columns["url"] = row.url
        columns["caption"] = row.captions[0] if row.captions else None
        columns["num_captions"] = len(row.captions)
        columns["origin"] = row.origin.value
        columns["extra"] = canonical_json(dict(row.extra)) if row.extra else None
    if (fetched := visit.fetched) is not None:
        is_elsewhere = fetched.final_url not in (None, fetched.url)
        columns["http_status"] = fetched.http_status
        columns["attempts"] = fetched.attempts
        columns["final_url"] = _storable(fetched.final_url or "") if is_elsewhere else None
    if visit.body is not None:
        columns |= {"num_bytes": len(visit.body), "sha256": visit.sha256}
    return columns


def _storable(text: str) -> str:
    """Return the text as UTF-8 can hold it; servers send what they like."""
    return text.encode("utf-8", "replace").decode()
