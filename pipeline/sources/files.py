"""Files of a source: found in a fixed order, opened through any compression, read line by line."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

import fsspec
import zstandard

from pipeline.sources.rows import SourceError

BLOCK_BYTES = 2**20
COMPRESSIONS = (".gz", ".zst")


def find_files(paths: tuple[str, ...], suffixes: tuple[str, ...]) -> list[str]:
    """Return the files that paths name: files as they are, folders and globs sorted.

    Of folders, files whose name ends in one of `suffixes` are taken, compressed or not. Raises
    SourceError when a path yields none.
    """
    found: list[str] = []
    for path in paths:
        fs, root = fsspec.url_to_fs(path)
        if fs.isdir(root):
            names = [name for name in fs.find(root) if _plain_name(name).endswith(suffixes)]
        elif fs.exists(root):  # first: the name of a file may look like a pattern
            names = [root]
        else:
            names = [name for name in fs.glob(root) if fs.isfile(name)]
        if not names:
            wanted = ", ".join(suffixes)
            raise SourceError(f"{path}: no such file, or nothing in it ends in {wanted}")
        found += [str(fs.unstrip_protocol(name)) for name in sorted(names)]
    return [name.removeprefix("file://") for name in found]


def _plain_name(name: str) -> str:
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return name.lower()


def plain_suffix(file: str) -> str:
    """Return a file's suffix in lower case, compression aside: `.tsv` of `a.TSV.gz`."""
    return "." + _plain_name(file).rpartition(".")[2]


@contextmanager
def opened(file: str, byte_offset: int = 0) -> Iterator[BinaryIO]:
    """Give the decompressed bytes of a file from an offset on; the name says the compression.

    Raises SourceError for a file that is missing or damaged, also while it is being read.
    """
    try:
        with fsspec.open(file, "rb") as raw:
            stream = _decompressed(file, raw)
            _skip(stream, byte_offset)
            yield stream
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise SourceError(f"{file}: damaged or cut off ({error}); download it again") from error
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error})") from error


def _decompressed(file: str, raw: BinaryIO) -> BinaryIO:
    if file.endswith(".gz"):
        return cast("BinaryIO", gzip.GzipFile(fileobj=raw))
    if file.endswith(".zst"):
        decompressor = zstandard.ZstdDecompressor()
        return cast("BinaryIO", decompressor.stream_reader(raw, read_across_frames=True))
    return raw


def _skip(stream: BinaryIO, num_bytes: int) -> None:
    if num_bytes and stream.seekable():  # which gzip does by decompressing
        stream.seek(num_bytes)
        return
    while num_bytes > 0:
        block = stream.read(min(num_bytes, BLOCK_BYTES))
        if not block:
            return
        num_bytes -= len(block)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file without its end, None in place of what is longer than allowed."""

    number: int
    byte_offset: int
    data: bytes | None


def lines(
    stream: BinaryIO, *, max_bytes: int, byte_offset: int = 0, first_number: int = 1
) -> Iterator[Line]:
    """Yield the lines of a stream; only b"\\n" ends a line, and a b"\\r" before it is dropped.

    Memory is bounded by `max_bytes` and one block, whatever the stream holds. `byte_offset` and
    `first_number` say where the stream stands already.
    """
    number, start = first_number, byte_offset
    held, num_held = bytearray(), 0  # num_held counts on when the line is too long to be kept
    while block := stream.read(BLOCK_BYTES):
        *ended, rest = block.split(b"\n")
        for part in ended:
            held += part if num_held + len(part) <= max_bytes else b""
            num_held += len(part)
            yield Line(number, start, _finished(held, num_held))
            number, start = number + 1, start + num_held + 1
            held, num_held = bytearray(), 0
        if num_held + len(rest) <= max_bytes:
            held += rest
        num_held += len(rest)
    if num_held:
        yield Line(number, start, _finished(held, num_held))


def _finished(held: bytearray, num_held: int) -> bytes | None:
    if len(held) < num_held:
        return None
    return bytes(held.removesuffix(b"\r"))
