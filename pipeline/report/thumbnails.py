"""Small pictures for the gallery, from the tars of a few shards."""

import io
import logging
from collections.abc import Iterable

from PIL import Image

from pipeline.corpus import Corpus
from pipeline.image_decode import decode
from pipeline.image_header import read_header
from pipeline.record import ShardRecord
from pipeline.sample import JSON_EXTENSION, TEXT_EXTENSION, SampleError, ShardError
from pipeline.tar import TarError, TarFault, read_samples

_log = logging.getLogger(__name__)
SIDE = 176  # pixels of the longer side
_QUALITY = 62
_MAX_IMAGE_BYTES = 32 * 2**20
_MAX_PIXELS = 64_000_000


def thumbnail(data: bytes) -> bytes | None:
    """Return an image as a small WebP without any metadata, or None if it is none."""
    if len(data) > _MAX_IMAGE_BYTES:
        return None
    try:
        header = read_header(data)
        if header.width * header.height > _MAX_PIXELS:
            return None
        factor = min(1.0, SIDE / max(header.width, header.height))
        width, height = (max(1, round(s * factor)) for s in (header.width, header.height))
        decoded = decode(data, header, min_width=width, min_height=height)
    except SampleError as error:
        _log.info("no thumbnail: %s", error)
        return None
    image = Image.fromarray(decoded.pixels)
    image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=_QUALITY, method=4)
    return stream.getvalue()


def read_span(corpus: Corpus, record: ShardRecord, offset: int, size: int) -> bytes | None:
    """Return a part of a shard's tar, or None if it cannot be read."""
    if not 0 < size <= _MAX_IMAGE_BYTES or offset < 0 or "tar" not in record.files:
        return None
    try:
        with corpus.open(record, "tar") as stream:
            stream.seek(offset)
            return stream.read(size)
    except (OSError, ShardError) as error:
        _log.warning("shard %s: no thumbnail: %s", record.name, error)
        return None


def images_of(corpus: Corpus, record: ShardRecord, keys: Iterable[str]) -> dict[str, bytes]:
    """Return the images of some keys of a shard that has no index, by walking its headers."""
    wanted, found = set(keys), {}
    if "tar" not in record.files or not wanted:
        return {}
    try:
        with corpus.open(record, "tar") as stream:
            spans = {}
            for sample in read_samples(stream, shard=record.name, on_fault=_pass, load=False):
                images = sample.spans.keys() - {JSON_EXTENSION, TEXT_EXTENSION}
                if sample.key in wanted and len(images) == 1:
                    spans[sample.key] = sample.spans[images.pop()]
                if len(spans) == len(wanted):
                    break
            for key, span in sorted(spans.items(), key=lambda item: item[1].offset):
                if span.size <= _MAX_IMAGE_BYTES:
                    stream.seek(span.offset)
                    found[key] = stream.read(span.size)
    except (OSError, ShardError, TarError) as error:
        _log.warning("shard %s: some thumbnails are missing: %s", record.name, error)
    return found


def _pass(fault: TarFault) -> None:
    """Leave faults to those whose task they are."""
