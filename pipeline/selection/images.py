"""The images of a raw tar, in its order, at a tenth of what reading just any archive costs.

A raw tar is what `pipeline.tar.TarWriter` wrote, to the byte: its hash is checked by whoever reads
it. So its headers hold nothing but a name and a size, and what looks different is refused.
"""

from collections.abc import Iterator
from typing import BinaryIO

from pipeline.sample import JSON_EXTENSION, TEXT_EXTENSION, ShardError
from pipeline.tar_walk import BLOCK, TarLimits

_NAME, _SIZE, _TYPE = slice(0, 100), slice(124, 135), slice(156, 157)
_FORMAT = slice(257, 265)
_USTAR, _FILE, _END = b"ustar\x0000", b"0", bytes(BLOCK)
_NO_IMAGES = (JSON_EXTENSION, TEXT_EXTENSION)


class Images:
    """One pass over a raw tar, from which images are asked for in the order of keys."""

    def __init__(self, stream: BinaryIO, shard: str) -> None:
        """`stream` is only read, never sought; `shard` is what messages call the archive."""
        self._stream = stream
        self._shard = shard
        self._max_bytes = TarLimits().max_member_bytes
        self._images = self._walk()

    def get(self, key: str) -> tuple[str, bytes]:
        """Return the extension and the bytes of a sample's image.

        Raises ShardError where there is none behind those that were asked for before.
        """
        for found, extension, data in self._images:
            if found == key:
                return extension, data
        raise self._error(f"has no image of sample {key}")

    def _walk(self) -> Iterator[tuple[str, str, bytes]]:
        read = self._stream.read
        while (header := read(BLOCK)) != _END:
            name, size = self._parse(header)
            key, _, extension = name.partition(".")
            data = read(size + -size % BLOCK)
            if len(data) < size:
                raise self._error(f"is cut off in {name!r}")
            if extension not in _NO_IMAGES:
                yield key, extension, data[:size]

    def _parse(self, header: bytes) -> tuple[str, int]:
        if len(header) < BLOCK:
            raise self._error("is cut off")
        if header[_FORMAT] != _USTAR or header[_TYPE] != _FILE:
            raise self._error("holds something that is no plain file")
        try:
            size = int(header[_SIZE], 8)
            name = header[_NAME].rstrip(b"\0").decode()
        except ValueError as error:
            raise self._error(f"has a header that cannot be read ({error})") from error
        if not 0 <= size <= self._max_bytes:
            raise self._error(f"claims {size:,} bytes for {name!r}")
        return name, size

    def _error(self, problem: str) -> ShardError:
        return ShardError(
            f"shard {self._shard}: its tar {problem}; delete {self._shard}.json and download it "
            "again"
        )
