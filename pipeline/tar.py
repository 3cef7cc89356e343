"""Shards as tars: a writer whose bytes depend on the samples alone, and a reader for any archive.

The reader trusts nothing (see tar_walk) and never writes to disk. What is wrong with one sample is
counted and that sample dropped; damage to the archive's structure raises TarError.
"""

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from types import TracebackType
from typing import BinaryIO, Self

from pipeline.sample import SampleError
from pipeline.tar_walk import BLOCK, Kind, Member, TarError, TarLimits, TarWalk

__all__ = ["Span", "TarError", "TarFault", "TarLimits", "TarSample", "TarWriter", "read_samples"]

MAX_NAME_BYTES = 100  # what a ustar header holds without a prefix
MAX_MEMBER_BYTES = 8**11 - 1  # eleven octal digits
_MTIME = 315532800  # 1980-01-01, the customary date of archives that must not differ by their date
_RECORD = 20 * BLOCK  # tars are padded to this
# A ustar header: name, mode, uid and gid, size, mtime, checksum (blank while summed), type, format.
_IDS = struct.pack("8s8s8s", b"0000644", b"0000000", b"0000000")
_DATE = struct.pack("x12s", b"%011o" % _MTIME)
_HEADER_END = struct.pack("1s100s6s2s247x", b"0", b"", b"ustar", b"00")
_HEADER_SUM = sum(_IDS) + sum(_DATE) + sum(b" " * 8) + sum(_HEADER_END)
_EXTENSION = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class Span:
    """Where a file's bytes lie in its archive."""

    offset: int
    size: int


def check_key(key: str) -> None:
    """Return if the key can name a sample's files. Raises SampleError("bad_key")."""
    if not key or not key.isprintable() or set(key) & set("/\\."):
        raise SampleError(
            "bad_key", f"key {key!r} is empty or holds a slash, a dot or an unprintable character"
        )


class TarWriter:
    """Writes samples to a stream in key order; the same samples give the same bytes.

    Used as a context manager it ends the archive unless an exception passes through, so that half
    an archive is never taken for a whole one. The stream stays open.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._position = 0
        self._last_key: str | None = None

    def write(self, key: str, members: Mapping[str, bytes]) -> dict[str, Span]:
        """Write a sample's files, by extension, and return where each one lies.

        Raises SampleError("bad_key") for a key that cannot be a file name, before anything is
        written, and ValueError for keys out of order or an extension that is none.
        """
        check_key(key)
        if self._last_key is not None and key <= self._last_key:
            raise ValueError(f"key {key!r} after {self._last_key!r}: keys must strictly ascend")
        headers = {
            extension: _header(key, extension, len(members[extension]))
            for extension in sorted(members)
        }
        self._last_key = key
        return {
            extension: self._write_member(header, members[extension])
            for extension, header in headers.items()
        }

    def _write_member(self, header: bytes, data: bytes) -> Span:
        padding = bytes(-len(data) % BLOCK)
        for part in (header, data, padding):
            self._stream.write(part)
        span = Span(self._position + BLOCK, len(data))
        self._position = span.offset + len(data) + len(padding)
        return span

    def close(self) -> None:
        """Write the end-of-archive mark. Without it no reader takes the archive for whole."""
        end = 2 * BLOCK
        self._stream.write(bytes(end + -(self._position + end) % _RECORD))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()


def _header(key: str, extension: str, size: int) -> bytes:
    if not _EXTENSION.fullmatch(extension):
        raise ValueError(f"sample {key}: {extension!r} is not a file extension")
    name = f"{key}.{extension}".encode()
    if len(name) > MAX_NAME_BYTES:
        raise SampleError(
            "bad_key", f"{key}.{extension} has {len(name)} bytes, a name has {MAX_NAME_BYTES}"
        )
    if size > MAX_MEMBER_BYTES:
        raise SampleError("too_large", f"{key}.{extension} has {size:,} bytes, too many for a tar")
    digits = b"%011o" % size
    # Only name and size differ from header to header, so only they are summed.
    checksum = _HEADER_SUM + sum(name) + sum(digits)
    return b"".join(
        (name, bytes(100 - len(name)), _IDS, digits, _DATE, b"%06o\0 " % checksum, _HEADER_END)
    )


@dataclass(frozen=True, slots=True)
class TarFault:
    """Something in an archive that was left out, and why; `key` is the sample it cost, if known."""

    reason: str
    name: str
    offset: int
    key: str | None
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class TarSample:
    """One sample's files by extension: their bytes (none when only indexing), where they lie."""

    key: str
    members: dict[str, bytes]
    spans: dict[str, Span]


def read_samples(
    stream: BinaryIO,
    *,
    shard: str,
    on_fault: Callable[[TarFault], None],
    limits: TarLimits | None = None,
    load: bool = True,
) -> Iterator[TarSample]:
    """Yield the samples of an archive in its order, in memory for one sample at a time.

    Each sample that is left out is told to `on_fault` once. `load=False` skips the data and gives
    the spans alone, for an index. `shard` is what messages call the archive. Raises TarError.
    """
    limits = limits or TarLimits()
    walk = TarWalk(stream, shard, limits)
    groups = _Groups(shard, on_fault, limits)
    for member in walk:
        if member.kind is Kind.DIRECTORY:
            continue  # holds nothing
        if finished := groups.place(member):
            yield finished
        if groups.wants(member):
            groups.current.members[groups.extension] = walk.read(member) if load else b""
    if finished := groups.finish():
        yield finished


@dataclass(slots=True)
class _Group:
    """The sample being read."""

    key: str
    num_bytes: int = 0
    is_bad: bool = False
    members: dict[str, bytes] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)


class _Groups:
    """Gathers members into samples and judges both."""

    def __init__(self, shard: str, on_fault: Callable[[TarFault], None], limits: TarLimits) -> None:
        self._shard = shard
        self._on_fault = on_fault
        self._limits = limits
        self._seen: set[bytes] = set()  # digests, so that long keys cost no more than short ones
        self._placed: Member | None = None
        self.current = _Group(key="")
        self.extension = ""

    def place(self, member: Member) -> TarSample | None:
        """Add a member to its sample; return the sample before it, if this one ends it."""
        self._placed = None
        try:
            key, extension = _split_name(member.name)
        except SampleError as error:
            self._report(error.reason, member, None, error.message)
            return None
        finished = None
        if key != self.current.key:
            finished = self.finish()
            self._begin(key, member)
        if not self.current.is_bad and (bad := self._judge(extension, member)):
            self._spoil(bad[0], member, bad[1])
        if not self.current.is_bad:
            self._placed, self.extension = member, extension
            self.current.num_bytes += member.size
            self.current.spans[extension] = Span(member.offset, member.size)
        return finished

    def wants(self, member: Member) -> bool:
        """Say whether the member just placed belongs to a sample that is still good."""
        return self._placed is member

    def finish(self) -> TarSample | None:
        """Return the sample being read, if it is good, and be ready for the next."""
        group, self.current = self.current, _Group(key="")
        if group.is_bad or not group.spans:
            return None
        return TarSample(group.key, group.members, group.spans)

    def _begin(self, key: str, member: Member) -> None:
        self.current = _Group(key=key)
        digest = blake2b(key.encode("utf-8"), digest_size=16).digest()
        if digest in self._seen:
            self._spoil("repeated_key", member, "its key was used before, by another sample")
        elif len(self._seen) >= self._limits.max_samples:
            raise TarError(self._shard, member.offset, f"more than {len(self._seen):,} samples")
        self._seen.add(digest)

    def _judge(self, extension: str, member: Member) -> tuple[str, str] | None:
        group, limits = self.current, self._limits
        if member.kind is not Kind.FILE:
            return member.kind.value, "it is not a plain file"
        if extension in group.spans:
            return "duplicate_member", "it is in the archive twice"
        if len(group.spans) >= limits.max_members_per_sample:
            return "too_many_members", f"its sample has more than {len(group.spans)} files"
        if (
            member.size > limits.max_member_bytes
            or group.num_bytes + member.size > limits.max_sample_bytes
        ):
            return "too_large", f"it has {member.size:,} bytes"
        return None

    def _spoil(self, reason: str, member: Member, problem: str) -> None:
        self.current.is_bad = True
        self.current.members.clear()
        self._report(reason, member, self.current.key, problem)

    def _report(self, reason: str, member: Member, key: str | None, problem: str) -> None:
        what = "skipped" if key is None else "its sample is dropped"
        shown = repr(member.name[:MAX_NAME_BYTES])
        message = (
            f"shard {self._shard}, byte {member.offset:,}, member {shown}: {problem}; "
            f'{what} as "{reason}"'
        )
        self._on_fault(TarFault(reason, member.name, member.offset, key, message))


def _split_name(name: str) -> tuple[str, str]:
    """Split at the first dot, as webdataset does. Raises SampleError for a name to leave out."""
    if name.startswith(("/", "\\")) or _DRIVE.match(name):
        raise SampleError("absolute_name", "its name is an absolute path")
    parts = [part for part in name.split("/") if part != "."]
    if ".." in parts:
        raise SampleError("parent_in_name", "its name leads out of the archive")
    if len(parts) != 1:
        raise SampleError("nested_name", "its name has a folder in it")
    key, dot, extension = parts[0].partition(".")
    if not dot or not extension:
        raise SampleError("no_extension", "its name has no extension")
    try:
        check_key(key)
    except SampleError as error:
        raise SampleError("bad_name", "its name holds no usable key") from error
    if not extension.isprintable():
        raise SampleError("bad_name", "its extension is unprintable")
    return key, extension
