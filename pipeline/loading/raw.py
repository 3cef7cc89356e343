"""A raw shard in the form of a clean one: MED trains on the web as it came (BLIP, Sec. 3.3).

A raw ledger tells how many captions an image has and the first of them; where the image lies and
what its other captions are, its tar tells.
"""

import json
import os
from collections.abc import Mapping
from typing import BinaryIO

import pyarrow as pa

from pipeline.loading.config import LoaderError
from pipeline.record import ShardRecord
from pipeline.sample import CAPTIONS_FIELD, JSON_EXTENSION, TEXT_EXTENSION, Verdict
from pipeline.tar import Span, TarError, TarFault, read_samples

RAW_COLUMNS = ("key", "sha256", "verdict", "caption", "num_captions", "origin")
_CAPTION = pa.struct([("text", pa.string()), ("origin", pa.string()), ("verdict", pa.string())])


def raw_table(record: ShardRecord, ledger: pa.Table, tar: BinaryIO | None) -> pa.Table:
    """Return a raw ledger's rows with the columns that training reads of a clean one.

    Without `tar` for counting only: images then lie nowhere, and all captions are the first. Raises
    LoaderError for a tar that does not hold what its ledger says.
    """
    spans = {} if tar is None else _spans(record, tar)
    captions, offsets, sizes = [], [], []
    for row in ledger.to_pylist():
        is_kept = row["verdict"] == Verdict.KEPT
        members = spans.get(row["key"]) if tar is not None and is_kept else None
        texts = [row["caption"]] * (row["num_captions"] or 0) if is_kept else []
        if tar is not None and is_kept:
            image = _image(record, row["key"], members)
            offsets.append(image.offset)
            sizes.append(image.size)
            if len(texts) > 1:
                texts = _texts(record, row["key"], members or {}, tar, len(texts))
        else:
            offsets.append(0)
            sizes.append(int(is_kept))
        kind = {"origin": row["origin"], "verdict": Verdict.KEPT.value}
        captions.append([{"text": text, **kind} for text in texts])
    columns = {name: ledger[name] for name in ("key", "sha256", "verdict")}
    return pa.table(
        columns
        | {
            "captions": pa.chunked_array([pa.array(captions, pa.list_(_CAPTION))]),
            "image_offset": pa.array(offsets, pa.int64()),
            "image_bytes": pa.array(sizes, pa.int64()),
        }
    )


def _spans(record: ShardRecord, tar: BinaryIO) -> dict[str, Mapping[str, Span]]:
    def refuse(fault: TarFault) -> None:
        raise LoaderError(_damaged(record, str(fault)))

    try:
        samples = read_samples(tar, shard=record.name, on_fault=refuse, load=False)
        return {sample.key: sample.spans for sample in samples}
    except TarError as error:
        raise LoaderError(_damaged(record, str(error))) from error


def _image(record: ShardRecord, key: str, members: Mapping[str, Span] | None) -> Span:
    names = (members or {}).keys() - {JSON_EXTENSION, TEXT_EXTENSION}
    if members is None or len(names) != 1:
        raise LoaderError(_damaged(record, f"sample {key} has {len(names)} images in the tar"))
    return members[names.pop()]


def _texts(
    record: ShardRecord, key: str, members: Mapping[str, Span], tar: BinaryIO, expected: int
) -> list[str]:
    """Return all captions of a sample that has more than the ledger tells."""
    span = members.get(JSON_EXTENSION)
    data = b"" if span is None else os.pread(tar.fileno(), span.size, span.offset)
    try:
        texts = [str(caption["text"]) for caption in json.loads(data)[CAPTIONS_FIELD]]
    except (ValueError, KeyError, TypeError) as error:
        raise LoaderError(_damaged(record, f"captions of {key} cannot be read: {error}")) from error
    if len(texts) != expected:
        raise LoaderError(
            _damaged(record, f"sample {key} has {len(texts)} captions, its ledger says {expected}")
        )
    return texts


def _damaged(record: ShardRecord, problem: str) -> str:
    return f"shard {record.name}: {problem}; `capfilt verify` says how to make it again"
