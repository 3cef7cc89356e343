"""Sources whose images are here already: a folder of files, WebDataset tars."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec

from pipeline.sources.cells import clean_captions, clean_text, row_of_cells
from pipeline.sources.config import SourceConfig
from pipeline.sources.files import find_files, opened
from pipeline.sources.reader import Piece, chosen, cut_by_count
from pipeline.sources.rows import (
    LocalImage,
    MalformedReason,
    MalformedRow,
    RecordError,
    SourceError,
    SourceRow,
    TarMember,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_BLOCK_BYTES = 512  # of a tar


class FolderReader:
    """Reads images under folders or globs in sorted order, each with the caption in its .txt."""

    def __init__(self, config: SourceConfig) -> None:
        """Lists nothing yet."""
        self._config = config

    def files(self) -> list[str]:
        """Return the paths as configured: the images of each are numbered by themselves."""
        return list(self._config.paths)

    def cut(self, file: str, first: int, then: int) -> Iterator[Piece]:
        """List the images once and yield pieces of the list."""
        yield from cut_by_count(file, len(find_files((file,), IMAGE_SUFFIXES)), first, then)

    def read(self, piece: Piece) -> Iterator[SourceRow | MalformedRow]:
        """Yield the rows of a piece; its lines are the images' numbers in the sorted list."""
        images = find_files((piece.file,), IMAGE_SUFFIXES)
        here = enumerate(images[piece.first_record :], start=piece.first_record)
        for number, image in chosen(here, piece):
            yield self._row(piece.file, number, image)

    def _row(self, folder: str, number: int, image: str) -> SourceRow | MalformedRow:
        config = self._config
        try:
            clean_text(image, "path", config.max_url_chars)
            caption = _text_beside(image, 4 * config.max_caption_chars + 1)
            return SourceRow(
                source=config.name,
                location=LocalImage(image),
                captions=clean_captions(caption, config.max_caption_chars),
                origin=config.origin,
            )
        except RecordError as error:
            return MalformedRow(
                source=config.name,
                file=folder,
                line=number + 1,
                reason=error.reason,
                detail=f"{image!r}: {error.detail}",
            )


def _text_beside(image: str, max_bytes: int) -> bytes | None:
    fs, path = fsspec.url_to_fs(image)
    try:
        with fs.open(path.rpartition(".")[0] + ".txt", "rb") as stream:
            text: bytes = stream.read(max_bytes)
            return text
    except FileNotFoundError:
        return None


@dataclass(slots=True)
class _Sample:
    """The members of a tar that share a key and stand together."""

    key: str
    byte_offset: int
    image: tarfile.TarInfo | None = None
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Suffix to offset and size."""


class WebDatasetReader:
    """Reads WebDataset tars: a key's image, its caption in .txt or .json, columns from .json."""

    def __init__(self, config: SourceConfig) -> None:
        """Lists nothing yet."""
        self._config = config

    def files(self) -> list[str]:
        """Return the tars in reading order; raises SourceError for compressed ones."""
        files = find_files(self._config.paths, (".tar",))
        for file in files:
            if not file.endswith(".tar"):
                raise SourceError(f"{file}: decompress it first; images are read by their offset")
        return files

    def cut(self, file: str, first: int, then: int) -> Iterator[Piece]:
        """Walk the tar's headers once and yield its pieces."""
        first_record, num_records, offset, size = 0, 0, 0, first
        with opened(file) as stream:
            for sample in _samples(file, stream, 0):
                if not num_records:
                    offset = sample.byte_offset
                num_records += 1
                if num_records == size:
                    yield Piece(file, first_record, size, offset)
                    first_record, num_records, size = first_record + size, 0, then
        if num_records:
            yield Piece(file, first_record, num_records, offset)

    def read(self, piece: Piece) -> Iterator[SourceRow | MalformedRow]:
        """Yield the rows of a piece; a malformed row's line is the number of its sample."""
        with opened(piece.file) as stream, opened(piece.file) as texts:
            samples = _samples(piece.file, stream, piece.byte_offset)
            numbered = enumerate(samples, start=piece.first_record + 1)
            for number, sample in chosen(numbered, piece):
                yield self._row(piece.file, number, sample, texts)

    def _row(
        self, file: str, number: int, sample: _Sample, texts: BinaryIO
    ) -> SourceRow | MalformedRow:
        config = self._config
        try:
            if sample.image is None:
                raise RecordError(MalformedReason.MISSING_URL, "no image")
            table = self._json(sample, texts)
            caption: object = self._text(sample, ".txt", texts)
            if caption is None and config.caption_column is not None:
                caption = table.get(config.caption_column)
            extra = {name: table.get(name) for name in config.extra_columns}
            image = sample.image
            row = row_of_cells(config, image.name, caption, extra)
            return SourceRow(
                source=row.source,
                location=TarMember(file, image.name, image.offset_data, image.size),
                captions=row.captions,
                origin=row.origin,
                extra=row.extra,
            )
        except RecordError as error:
            return MalformedRow(
                source=config.name,
                file=file,
                line=number,
                reason=error.reason,
                detail=f"{sample.key[:80]!r}: {error.detail}",
            )

    def _json(self, sample: _Sample, texts: BinaryIO) -> Mapping[str, object]:
        text = self._text(sample, ".json", texts)
        if text is None:
            return {}
        try:
            value = json.loads(text.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise RecordError(MalformedReason.BROKEN_RECORD, "its .json is no JSON") from error
        return value if isinstance(value, dict) else {}

    def _text(self, sample: _Sample, suffix: str, texts: BinaryIO) -> bytes | None:
        if suffix not in sample.texts:
            return None
        offset, num_bytes = sample.texts[suffix]
        if num_bytes > self._config.max_record_bytes:
            raise RecordError(
                MalformedReason.RECORD_TOO_LONG, f"its {suffix} has {num_bytes} bytes"
            )
        texts.seek(offset)
        return texts.read(num_bytes)


def _samples(file: str, stream: BinaryIO, byte_offset: int) -> Iterator[_Sample]:
    """Group neighbours by key, as WebDataset does: what precedes the first dot of the base name."""
    sample: _Sample | None = None
    for member in _members(file, stream, byte_offset):
        path = PurePosixPath(member.name)
        stem, dot, suffix = path.name.lower().partition(".")
        key = str(path.parent / path.name[: len(stem)])
        if sample is not None and sample.key != key:
            yield sample
            sample = None
        sample = sample or _Sample(key, member.offset)
        suffix = dot + suffix
        if suffix in IMAGE_SUFFIXES:
            sample.image = sample.image or member
        elif suffix in (".txt", ".json"):
            sample.texts[suffix] = (member.offset_data, member.size)
    if sample is not None:
        yield sample


def _members(file: str, stream: BinaryIO, byte_offset: int) -> Iterator[tarfile.TarInfo]:
    stream.seek(byte_offset)
    try:
        with tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                if member.isreg():
                    yield member
                cast("Any", tar).members = []  # it would remember every member of the tar
            stream.seek(tar.offset)
            if any(stream.read(_BLOCK_BYTES)):  # tarfile takes a broken header for the end
                raise SourceError(f"{file}: damaged at byte {tar.offset}; download it again")
    except tarfile.TarError as error:
        raise SourceError(f"{file}: damaged or cut off ({error}); download it again") from error
