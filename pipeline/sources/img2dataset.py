"""A folder that img2dataset made: its Parquet files are the list, its tars hold the images.

Every row of theirs is a row of ours: what they could not fetch is failed with their reason, and so
is an image that they count as fetched and that is not there. Nothing is fetched again, and the tars
are trusted no further than any other file from elsewhere.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO, cast

import fsspec

from pipeline.sources.config import SourceConfig
from pipeline.sources.files import BLOCK_BYTES, find_files
from pipeline.sources.parquet import ParquetReader
from pipeline.sources.reader import Piece
from pipeline.sources.rows import (
    DownloadedImage,
    ElsewhereReason,
    HttpUrl,
    Location,
    MalformedReason,
    MalformedRow,
    NotDownloaded,
    SourceError,
    SourceRow,
    TarMember,
)
from pipeline.tar_walk import Kind, TarError, TarLimits, TarWalk

_KEY, _STATUS, _MESSAGE = "key", "status", "error_message"
_SUCCESS = "success"
_FAILURES = {
    "failed_to_download": ElsewhereReason.FAILED_TO_DOWNLOAD,
    "failed_to_resize": ElsewhereReason.FAILED_TO_RESIZE,
}
_IMAGES = ("jpg", "png", "webp")  # what img2dataset encodes to


class Img2DatasetReader:
    """Reads img2dataset's output of `--output_format webdataset`; rows keep its order."""

    def __init__(self, config: SourceConfig) -> None:
        """Opens nothing yet."""
        self._config = config
        added = tuple(
            name for name in (_KEY, _STATUS, _MESSAGE) if name not in config.extra_columns
        )
        asked = config.model_copy(update={"extra_columns": (*config.extra_columns, *added)})
        self._table = ParquetReader(asked, find_files(config.paths, (".parquet",)))

    def files(self) -> list[str]:
        """Return the Parquet files; raises SourceError for shards that were never finished."""
        files = self._table.files()
        unfinished = [file for file in files if not _exists(_beside(file, "_stats.json"))]
        if unfinished:
            raise SourceError(
                f"{unfinished[0]}: there is no _stats.json beside it, which img2dataset writes "
                f"last: give its command again to finish {len(unfinished)} shards, or move them "
                "out of the folder"
            )
        return files

    def cut(self, file: str, first: int, then: int) -> Iterator[Piece]:
        """Yield the file's pieces by the row count in its footer."""
        return self._table.cut(file, first, then)

    def read(self, piece: Piece) -> Iterator[SourceRow | MalformedRow]:
        """Yield the rows of a piece; the tar's headers are walked once."""
        rows = list(self._table.read(piece))
        wanted = {
            str(row.extra[_KEY])
            for row in rows
            if isinstance(row, SourceRow) and row.extra[_STATUS] == _SUCCESS
        }
        images = _Images(_beside(piece.file, ".tar"), wanted)
        for number, row in zip(_numbers(piece), rows, strict=False):
            yield self._row(piece.file, number, row, images)

    def _row(
        self, file: str, number: int, row: SourceRow | MalformedRow, images: "_Images"
    ) -> SourceRow | MalformedRow:
        if isinstance(row, MalformedRow):
            return row
        assert isinstance(row.location, HttpUrl), "a table without image_root holds URLs"
        url, status = row.location.url, row.extra[_STATUS]
        location: Location
        if status == _SUCCESS:
            location = images.location(url, str(row.extra[_KEY]))
        elif (reason := _FAILURES.get(str(status))) is not None:
            location = NotDownloaded(url, reason, str(row.extra[_MESSAGE] or ""))
        else:
            return MalformedRow(
                source=self._config.name,
                file=file,
                line=number,
                reason=MalformedReason.BROKEN_RECORD,
                detail=f"status is {str(status)[:40]!r}, none of img2dataset's",
            )
        kept = {name: row.extra[name] for name in self._config.extra_columns}
        return replace(row, location=location, extra=kept)


class _Images:
    """Where the images of some keys lie in a tar, as far as it can be read."""

    def __init__(self, tar: str, keys: set[str]) -> None:
        self._tar = tar
        self._members: dict[str, TarMember] = {}
        self._twice: set[str] = set()
        self._damage: str | None = None
        self._is_there = _exists(tar)
        if self._is_there and keys:
            self._walk(keys)

    def location(self, url: str, key: str) -> DownloadedImage | NotDownloaded:
        """Return where a row's image lies, or why it does not."""
        member = self._members.get(key)
        if key in self._twice:
            return NotDownloaded(url, ElsewhereReason.MISSING_IMAGE, f"{self._tar} has it twice")
        if member is not None:
            return DownloadedImage(url, member)
        if self._damage is not None:
            return NotDownloaded(url, ElsewhereReason.DAMAGED_TAR, self._damage)
        what = "has no image of it" if self._is_there else "is not there"
        return NotDownloaded(url, ElsewhereReason.MISSING_IMAGE, f"{self._tar} {what}")

    def _walk(self, keys: set[str]) -> None:
        with fsspec.open(self._tar, "rb", block_size=BLOCK_BYTES) as stream:
            try:
                for member in TarWalk(cast(BinaryIO, stream), self._tar, TarLimits()):
                    key, _, suffix = member.name.rpartition(".")
                    if member.kind is Kind.FILE and suffix in _IMAGES and key in keys:
                        self._note(key, member.name, member.offset, member.size)
            except TarError as error:  # what stands before the damage is still what it says
                self._damage = f"byte {error.offset:,}: {error.problem}"

    def _note(self, key: str, name: str, offset: int, size: int) -> None:
        if key in self._members:
            self._twice.add(key)
        self._members[key] = TarMember(self._tar, name, offset, size)


def _numbers(piece: Piece) -> Iterator[int]:
    """Yield the 1-based numbers of the rows that are read of a piece."""
    first, end = piece.first_record + 1, piece.first_record + piece.num_records + 1
    return iter(range(first + piece.num_passed, end, piece.one_in))


def _beside(parquet: str, ending: str) -> str:
    return parquet.removesuffix(".parquet") + ending


def _exists(path: str) -> bool:
    fs, name = fsspec.url_to_fs(path)
    return bool(fs.exists(name))
