"""The rows of a captions sidecar: one for every (image, caption), or one for an image without any.

An image's rows stand in the order: what its source gave, by index, then what was generated, by
index. Nothing is thrown away here: a row that is not kept is one that could not be scored.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.image_header import ImageReason
from pipeline.ledger import ledger_schema
from pipeline.sample import Caption, Origin, SampleError, Verdict
from pipeline.score_input import RawRow

NO_CAPTION, EMPTY_CAPTION, CAPTION_TOO_LONG = "no_caption", "empty_caption", "caption_too_long"
SCORES = {"itm": "filter", "itc": "filter", "clip": "clip"}  # by which model each is given
CAPTIONS_SCHEMA = ledger_schema(
    [
        pa.field("origin", pa.string()),  # web, synthetic or human; null where there is no caption
        pa.field("index", pa.int32()),  # which of the image's captions of this origin
        pa.field("text", pa.string()),
        pa.field("num_tokens", pa.int32()),  # of synthetic captions, as generated
        pa.field("seed", pa.int64()),  # of synthetic captions
        pa.field("itm", pa.float32()),  # P(match), in [0, 1]
        pa.field("itc", pa.float32()),  # cosine
        pa.field("clip", pa.float32()),  # cosine
        pa.field("captioner", pa.string()),  # fingerprints of the weights that made the row
        pa.field("filter", pa.string()),
        pa.field("clip_model", pa.string()),
    ]
)
_RULES = frozenset(reason for reason in ImageReason if reason.is_rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A caption that an image may get."""

    text: str
    origin: Origin
    index: int
    reason: str = ""  # why it is not scored
    num_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The fingerprints of the weights in use."""

    captioner: str | None
    filter: str | None
    clip: str | None


def source_candidates(
    captions: Sequence[Caption], key: str, max_chars: int
) -> tuple[Candidate, ...]:
    """Return what the source wrote, in the order of the sidecar. Raises SampleError."""
    if any(caption.origin is Origin.SYNTHETIC for caption in captions):
        raise SampleError("bad_metadata", f"sample {key}: a raw shard holds synthetic captions")
    ordered = sorted(captions, key=lambda caption: caption.index)
    return tuple(
        Candidate(
            text=caption.text[:max_chars],
            origin=caption.origin,
            index=caption.index,
            reason=CAPTION_TOO_LONG if len(caption.text) > max_chars else _emptiness(caption.text),
        )
        for caption in ordered
    )


def synthetic_candidate(text: str, *, index: int, num_tokens: int, seed: int) -> Candidate:
    """Return what the captioner wrote; it, too, may be empty."""
    return Candidate(
        text=text,
        origin=Origin.SYNTHETIC,
        index=index,
        reason=_emptiness(text),
        num_tokens=num_tokens,
        seed=seed,
    )


def caption_rows(
    row: RawRow,
    candidates: Sequence[Candidate],
    scores: Iterator[Mapping[str, float | None]],
    models: Models,
) -> list[dict[str, Any]]:
    """Return the rows of an image; `scores` has one entry for each candidate without a reason."""
    rows = [
        {
            **_blank(row),
            "verdict": (Verdict.DROPPED if each.reason else Verdict.KEPT).value,
            "reason": each.reason,
            "origin": each.origin.value,
            "index": each.index,
            "text": each.text,
            "num_tokens": each.num_tokens,
            "seed": each.seed,
            "captioner": models.captioner if each.origin is Origin.SYNTHETIC else None,
            **({} if each.reason else _scored(next(scores), models)),
        }
        for each in candidates
    ]
    if not rows:
        rows = [{**_blank(row), "verdict": Verdict.DROPPED.value, "reason": NO_CAPTION}]
    return rows


def lost_row(row: RawRow, error: SampleError) -> dict[str, Any]:
    """Return the one row of an image that could not be shown to the models."""
    verdict = Verdict.DROPPED if error.reason in _RULES else Verdict.FAILED
    return {**_blank(row), "verdict": verdict.value, "reason": str(error.reason)}


def bad_score(scores: Mapping[str, float | None]) -> str | None:
    """Return the name of the first score that is not a finite number, if one is."""
    for name, value in scores.items():
        if value is not None and not math.isfinite(value):
            return name
    return None


def _emptiness(text: str) -> str:
    return "" if text.strip() else EMPTY_CAPTION


def _blank(row: RawRow) -> dict[str, Any]:
    columns: dict[str, Any] = dict.fromkeys(CAPTIONS_SCHEMA.names)
    return columns | {"key": row.key, "source": row.source, "url": row.url}


def _scored(scores: Mapping[str, float | None], models: Models) -> dict[str, Any]:
    return {**scores, "filter": models.filter, "clip_model": models.clip}
