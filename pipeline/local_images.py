"""Reads images that are here already: files, and members of tars and zips, local or any fsspec URL.

They come from the configuration, never from a list, so the guard has no say; the cap on bytes has.
"""

import threading
import zipfile
import zlib
from types import TracebackType
from typing import Self

import fsspec

from pipeline.sample import SampleError
from pipeline.sources.rows import DownloadedImage, LocalImage, TarMember, ZipMember

UNREADABLE = "unreadable_file"
TOO_LARGE = "file_too_large"


class LocalImages:
    """Opens zips once and keeps them open; a context manager that any number of threads share."""

    def __init__(self, max_bytes: int) -> None:
        """Opens nothing yet. No image of more than `max_bytes` is read."""
        self._max_bytes = max_bytes
        self._zips: dict[str, zipfile.ZipFile] = {}
        self._opening = threading.Lock()

    def read(self, location: LocalImage | TarMember | ZipMember | DownloadedImage) -> bytes:
        """Return the image's bytes; raises SampleError("unreadable_file" or "file_too_large")."""
        try:
            match location:
                case LocalImage(path):
                    data = self._read_file(path)
                case (
                    TarMember(tar=tar, byte_offset=offset, num_bytes=num_bytes)
                    | DownloadedImage(
                        member=TarMember(tar=tar, byte_offset=offset, num_bytes=num_bytes)
                    )
                ):
                    data = self._read_span(tar, offset, num_bytes)
                case ZipMember(zip=archive, member=member):
                    data = self._read_zip_member(archive, member)
        except (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            # RuntimeError is what zipfile has for encrypted members
            raise SampleError(UNREADABLE, f"{type(error).__name__}: {error}") from error
        if len(data) > self._max_bytes:
            raise SampleError(TOO_LARGE, f"over {self._max_bytes:,} bytes")
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for archive in self._zips.values():
            archive.close()

    def _read_file(self, path: str) -> bytes:
        with fsspec.open(path, "rb") as stream:
            data: bytes = stream.read(self._max_bytes + 1)
            return data

    def _read_span(self, tar: str, offset: int, num_bytes: int) -> bytes:
        wanted = min(num_bytes, self._max_bytes + 1)
        with fsspec.open(tar, "rb") as stream:
            stream.seek(offset)
            data: bytes = stream.read(wanted)
        if len(data) < wanted:
            raise EOFError(f"{tar} ends {wanted - len(data)} bytes early; it changed since")
        return data

    def _read_zip_member(self, archive: str, member: str) -> bytes:
        with self._opening:  # its index alone may take a second to read
            if archive not in self._zips:
                self._zips[archive] = zipfile.ZipFile(fsspec.open(archive, "rb").open())
            opened = self._zips[archive]
        with opened.open(member) as stream:
            return stream.read(self._max_bytes + 1)
