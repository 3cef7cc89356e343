"""A walk over the headers of a tar that trusts nothing it reads and writes nothing anywhere.

It reads ustar, GNU long names and PAX, from any stream, in memory that does not grow with what the
archive claims. Python's tarfile is not used because it holds every member for as long as the
archive is open, reads extended headers of any size, and skips over damage in silence.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO, NoReturn

from pipeline.sample import ShardError

BLOCK = 512
_CHUNK = 1 << 20
_END = bytes(BLOCK)


class TarError(ShardError):
    """The archive's structure is damaged: nothing after `offset` can be trusted."""

    def __init__(self, shard: str, offset: int, problem: str) -> None:
        super().__init__(
            f"shard {shard}, byte {offset:,}: {problem}; make the shard again or fetch it afresh"
        )
        self.shard = shard
        self.offset = offset
        self.problem = problem


@dataclass(frozen=True, kw_only=True, slots=True)
class TarLimits:
    """How much of an archive is believed; past these a member is dropped or the archive refused."""

    max_member_bytes: int = 64 << 20
    max_sample_bytes: int = 128 << 20
    max_members_per_sample: int = 64
    max_samples: int = 1_000_000
    max_extended_header_bytes: int = 64 << 10


class Kind(StrEnum):
    """What a member is; only files hold data that is read."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    DEVICE = "device"
    FIFO = "fifo"
    SPARSE = "sparse"
    UNKNOWN = "unknown_type"


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"1": Kind.LINK,
    b"2": Kind.LINK,
    b"3": Kind.DEVICE,
    b"4": Kind.DEVICE,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}
# Readers disagree on whether data follows these when they claim a size, so none may claim one.
_WITHOUT_DATA = {Kind.LINK, Kind.DEVICE, Kind.DIRECTORY, Kind.FIFO}


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of the archive: `offset` is where its data begins, in bytes from the start."""

    name: str
    kind: Kind
    offset: int
    size: int


@dataclass(slots=True)
class _Extended:
    """What extended headers said about the member that follows them."""

    name: str | None = None
    size: int | None = None
    is_sparse: bool = False
    is_pending: bool = False


class TarWalk:
    """The members of an archive in order; `read` fetches the data of the one just yielded."""

    def __init__(self, stream: BinaryIO, shard: str, limits: TarLimits) -> None:
        self._stream = stream
        self._shard = shard
        self._limits = limits
        self._position = 0
        self._base: int | None = None
        if stream.seekable():
            self._base = stream.tell()
            self._length = stream.seek(0, io.SEEK_END) - self._base
            stream.seek(self._base)

    def __iter__(self) -> Iterator[Member]:
        """Yield every member that is not itself a header. Raises TarError."""
        extended = _Extended()
        while (header := self._read_header()) is not None:
            at = self._position - BLOCK
            size = self._number(header[124:136], "size")
            typeflag = header[156:157]
            if typeflag in (b"L", b"K", b"x", b"g"):
                self._extend(extended, typeflag, self._read_extended(size, at))
                continue
            member = self._member(header, size, extended)
            extended = _Extended()
            yield member
            self._skip_to(member.offset + member.size + -member.size % BLOCK)
        if extended.is_pending:
            self._fail(self._position, "it ends after an extended header, before its member")

    def read(self, member: Member) -> bytes:
        """Return the data of the member that was yielded last; the caller has checked its size."""
        assert self._position == member.offset, "only the last member can be read, and only once"
        return self._read_exactly(member.size)

    def _fail(self, offset: int, problem: str) -> NoReturn:
        raise TarError(self._shard, offset, problem)

    def _read_header(self) -> bytes | None:
        at = self._position
        header = self._read_exactly(BLOCK)
        if header == _END:
            if self._read_exactly(BLOCK) != _END:
                self._fail(at, "an empty block stands where a member should")
            return None
        stored = self._number(header[148:156], "checksum")
        blanked = header[:148] + b" " * 8 + header[156:]
        unsigned = sum(blanked)
        # Old tars summed signed bytes; looking at each of them costs more than all the rest here.
        if stored != unsigned and stored != unsigned - 256 * sum(byte > 127 for byte in blanked):
            self._fail(at, "the header's checksum does not match")
        return header

    def _number(self, field: bytes, what: str) -> int:
        """Read octal digits, or GNU's base 256 for what octal cannot hold."""
        at = self._position - BLOCK
        if field[0] & 0x80:
            value = int.from_bytes(field, "big", signed=False) - (0x80 << 8 * (len(field) - 1))
            if field[0] & 0x40:
                self._fail(at, f"the header's {what} is negative")
            return value
        digits = field.split(b"\0", 1)[0].strip(b" ")
        if digits.strip(b"01234567"):
            self._fail(at, f"the header's {what} is not a number: {field!r}")
        return int(digits or b"0", 8)

    def _member(self, header: bytes, size: int, extended: _Extended) -> Member:
        at = self._position - BLOCK
        kind = _KINDS.get(header[156:157], Kind.UNKNOWN)
        if header[156:157] == b"S":
            self._fail(at, "it holds a sparse file in GNU's old format, which is not read")
        if extended.is_sparse:
            kind = Kind.SPARSE
        size = size if extended.size is None else extended.size
        if kind in _WITHOUT_DATA and size:
            self._fail(at, f"a {kind} claims {size:,} bytes of data")
        if self._base is not None and self._position + size > self._length:
            self._fail(
                at, f"a member claims {size:,} bytes, {self._length - self._position:,} are left"
            )
        name = _header_name(header) if extended.name is None else extended.name
        return Member(name=name, kind=kind, offset=self._position, size=size)

    def _read_extended(self, size: int, at: int) -> bytes:
        if size > self._limits.max_extended_header_bytes:
            self._fail(at, f"an extended header claims {size:,} bytes")
        data = self._read_exactly(size)
        self._skip_to(self._position + -size % BLOCK)
        return data

    def _extend(self, extended: _Extended, typeflag: bytes, data: bytes) -> None:
        if typeflag == b"K":  # the target of a link: none is followed
            return
        if typeflag == b"L":
            extended.name = _text(data.split(b"\0", 1)[0])
            extended.is_pending = True
            return
        records = self._pax_records(data)
        if typeflag == b"g":
            if "path" in records or "size" in records or _says_sparse(records):
                self._fail(self._position, "a global header names or sizes every member")
            return
        extended.is_pending = True
        extended.is_sparse = _says_sparse(records)
        if "path" in records:
            extended.name = _text(records["path"])
        if "size" in records:
            if not records["size"].isdigit() or len(records["size"]) > 19:
                self._fail(self._position, f"a PAX header's size is {records['size'][:40]!r}")
            extended.size = int(records["size"])

    def _pax_records(self, data: bytes) -> dict[str, bytes]:
        """Parse `length key=value newline` records."""
        records: dict[str, bytes] = {}
        start = 0
        while start < len(data):
            digits, space, _ = data[start : start + 8].partition(b" ")
            length = int(digits) if space and digits.isdigit() else 0
            record = data[start : start + length]
            key, equals, value = record[len(digits) + 1 :].partition(b"=")
            if len(record) != length or not equals or not value.endswith(b"\n"):
                self._fail(self._position, "a PAX header cannot be parsed")
            records[_text(key)] = value[:-1]
            start += length
        return records

    def _read_exactly(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            part = self._stream.read(min(missing, _CHUNK))
            if not part:
                self._fail(self._position, f"it is cut off, {missing:,} bytes are missing here")
            self._position += len(part)
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _skip_to(self, position: int) -> None:
        if self._base is not None:
            if position > self._length:
                self._fail(self._length, "it is cut off inside a member")
            if position != self._position:
                self._stream.seek(self._base + position)
            self._position = position
            return
        while self._position < position:
            self._read_exactly(min(position - self._position, _CHUNK))


def _text(raw: bytes) -> str:
    # What is not UTF-8 becomes surrogates, which no key may hold.
    return raw.decode("utf-8", "surrogateescape")


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    # In GNU's own format times stand where POSIX has the prefix.
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return _text(name)


def _says_sparse(records: dict[str, bytes]) -> bool:
    return any(key.startswith("GNU.sparse.") for key in records)
