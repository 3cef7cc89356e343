"""A clean shard in the making: a ledger with every row that came in, and a tar of what is kept.

N images of a block, M captions of all of them, K kept images.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.ledger import ledger_schema
from pipeline.sample import Caption, Origin, Sample, Verdict
from pipeline.selection.candidates import MODELS, ORIGINS, SCORES, Block
from pipeline.selection.checks import REASONS, Check, Codes
from pipeline.selection.images import Images
from pipeline.selection.policies import Chosen
from pipeline.tar import Span, TarWriter

_CAPTION = pa.struct(
    [
        pa.field("text", pa.string()),  # as it is kept, with what was masked
        pa.field("origin", pa.string()),
        pa.field("index", pa.int32()),
        pa.field("itm", pa.float32()),
        pa.field("itc", pa.float32()),
        pa.field("clip", pa.float32()),
        pa.field("verdict", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("masked", pa.string()),  # "", "email", "phone" or "email,phone"
    ]
)
CLEAN_SCHEMA = ledger_schema(
    [
        pa.field("sha256", pa.string()),  # of what was downloaded
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("original_width", pa.int32()),
        pa.field("original_height", pa.int32()),
        pa.field("num_captions", pa.int32()),  # to choose from
        pa.field("num_kept", pa.int32()),
        # Kept ones first, the best of them first; then the others, in the sidecar's order.
        pa.field("captions", pa.list_(_CAPTION), nullable=False),
        pa.field("image_offset", pa.int64()),  # in the tar; null where the row is not kept
        pa.field("image_bytes", pa.int64()),
        pa.field("json_offset", pa.int64()),
        pa.field("json_bytes", pa.int64()),
        pa.field("policy", pa.string()),
    ]
)
_PASSED_ON = (
    "key",
    "source",
    "url",
    "sha256",
    "width",
    "height",
    "original_width",
    "original_height",
)
_IMAGE_FIELDS = (*_PASSED_ON, "extra")
_ORIGIN = {origin.value: origin for origin in Origin}


@dataclass(frozen=True, slots=True)
class Judged:
    """A block with what was decided of each of its captions."""

    block: Block
    masked: pa.Array  # (M,) strings
    codes: Codes  # (M,)
    chosen: Chosen

    def caption_reasons(self) -> NDArray[np.object_]:
        """Return (M,) why each caption was dropped, empty where it was not."""
        reasons: NDArray[np.object_] = REASONS[self.codes]
        scored = np.flatnonzero(self.codes == Check.SCORED)
        if len(scored):
            reasons[scored] = self.block.captions.table["reason"].take(scored).to_pylist()
        return reasons

    def row_outcomes(self) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
        """Return (N,) verdicts and (N,) reasons of the rows.

        What has no caption left is dropped for the last check that any of its captions came to.
        """
        rows, captions = self.block.rows, self.block.captions
        verdicts = np.array(rows["verdict"].to_pylist(), dtype=object)
        reasons = np.array(rows["reason"].to_pylist(), dtype=object)
        # The last check, and of those captions the first: higher is later, ties go by position.
        weight = self.codes.astype(np.int64) * (len(captions) + 1) - np.arange(len(captions))
        furthest = np.full(rows.num_rows, -1)
        order = np.argsort(weight, kind="stable")
        furthest[captions.row[order]] = order  # of many writes to one place the last one stays
        dropped = np.flatnonzero((self.chosen.num_candidates > 0) & (self.chosen.num_kept == 0))
        verdicts[dropped] = Verdict.DROPPED.value
        reasons[dropped] = self.caption_reasons()[furthest[dropped]]
        return verdicts, reasons


def ledger_table(judged: Judged, spans: Mapping[int, "Spans"], policy: str) -> pa.Table:
    """Return (N,) rows of the clean ledger."""
    rows = judged.block.rows
    verdicts, reasons = judged.row_outcomes()
    columns: dict[str, Any] = {name: rows[name] for name in _PASSED_ON}
    columns |= {
        "verdict": pa.array(verdicts, pa.string()),
        "reason": pa.array(reasons, pa.string()),
        "num_captions": judged.chosen.num_candidates,
        "num_kept": judged.chosen.num_kept,
        "captions": _caption_lists(judged),
        "policy": pa.repeat(policy, rows.num_rows),
    }
    for name in ("image", "json"):
        found = {at: getattr(of_row, name) for at, of_row in spans.items()}
        for field, attribute in (("offset", "offset"), ("bytes", "size")):
            values = [getattr(found.get(at), attribute, None) for at in range(rows.num_rows)]
            columns[f"{name}_{field}"] = pa.array(values, pa.int64())
    return pa.table([columns[name] for name in CLEAN_SCHEMA.names], schema=CLEAN_SCHEMA)


def _caption_lists(judged: Judged) -> pa.Array:
    table, order = judged.block.captions.table, judged.chosen.order
    reasons = judged.caption_reasons()
    verdicts = np.where(reasons == "", Verdict.KEPT.value, Verdict.DROPPED.value)
    columns = {name: table[name] for name in ("text", "origin", "index", *SCORES)}
    columns["verdict"] = pa.array(verdicts, pa.string())
    columns["reason"] = pa.array(reasons, pa.string())
    columns["masked"] = judged.masked
    values = pa.table([columns[field.name] for field in _CAPTION], names=[f.name for f in _CAPTION])
    structs = values.take(order).to_struct_array()
    flat = pa.concat_arrays(structs.chunks) if structs.chunks else pa.array([], _CAPTION)
    offsets = np.concatenate([[0], np.cumsum(judged.chosen.num_candidates)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat.cast(_CAPTION))


def count_captions(judged: Judged) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Return how many captions were kept and dropped by origin and reason, and masked."""
    origins = np.array(ORIGINS, dtype=object)[judged.block.captions.origin]
    captions = Counter(zip(origins.tolist(), judged.caption_reasons().tolist(), strict=True))
    masked: Counter[str] = Counter()
    for found in pc.value_counts(judged.masked).to_pylist():
        for what in filter(None, found["values"].split(",")):
            masked[what] += found["counts"]
    return captions, masked


# The tar


@dataclass(frozen=True, slots=True)
class Spans:
    """Where a kept image and its metadata lie in the clean tar."""

    image: Span
    json: Span


def write_images(
    judged: Judged, images: Images, tar: TarWriter, provenance: Mapping[str, Any]
) -> dict[int, Spans]:
    """Write the kept images of a block with their captions; return where each row's files lie."""
    spans: dict[int, Spans] = {}
    for at, fields, captions in _kept(judged, provenance):
        key = fields["key"]
        extension, image = images.get(key)
        sample = Sample(
            key=key, image=image, extension=extension, captions=captions, metadata=fields
        )
        written = tar.write(key, sample.to_members())
        spans[at] = Spans(written[extension], written["json"])
    return spans


def _kept(
    judged: Judged, provenance: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, Any], tuple[Caption, ...]]]:
    """Yield of each kept row its place, its metadata and its captions, the best first."""
    num_kept, num_candidates = judged.chosen.num_kept, judged.chosen.num_candidates
    rows = np.flatnonzero(num_kept)
    begins = (np.cumsum(num_candidates) - num_candidates)[rows]
    counts = num_kept[rows]
    picked = np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    picked = pa.array(judged.chosen.order[picked])
    captions = _caption_objects(judged.block.captions.table.take(picked))
    made_by = {name: judged.block.captions.table[name].take(picked).to_pylist() for name in MODELS}
    masked = judged.masked.take(picked).to_pylist()
    images = judged.block.rows.select(list(_IMAGE_FIELDS)).take(pa.array(rows)).to_pylist()
    at = 0
    for row, fields, size in zip(rows.tolist(), images, counts.tolist(), strict=True):
        part = slice(at, at + size)
        at += size
        models = {name: next(filter(None, made_by[name][part]), None) for name in MODELS}
        fields["extra"] = json.loads(fields["extra"] or "{}")
        fields["provenance"] = {**provenance, **models}
        if any(masked[part]):
            fields["masked"] = _masks(captions[part], masked[part])
        yield row, fields, tuple(captions[part])


def _masks(captions: Sequence[Caption], masked: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"origin": caption.origin.value, "index": caption.index, "what": what.split(",")}
        for caption, what in zip(captions, masked, strict=True)
        if what
    ]


def _caption_objects(table: pa.Table) -> list[Caption]:
    """Return captions with their scores as short as float32 can be told apart."""
    columns = [table[name].to_pylist() for name in ("text", "origin", "index", "seed")]
    scores = [pc.cast(table[name], pa.string()).to_pylist() for name in SCORES]
    return [
        Caption(
            text=text,
            origin=_ORIGIN[origin],
            index=index,
            seed=seed,
            scores={
                name: float(value)
                for name, value in zip(SCORES, values, strict=True)
                if value is not None
            },
        )
        for text, origin, index, seed, *values in zip(*columns, *scores, strict=True)
    ]
