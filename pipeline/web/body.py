"""The bytes of a response, read and decoded under a cap that no header can talk us out of."""

import http.client
import zlib
from collections.abc import Iterator

from pipeline.web.deadline import Deadline
from pipeline.web.failures import FailureReason, FetchError
from pipeline.web.transport import READ_BYTES, failures_of_the_way

# We ask for identity, but some servers compress regardless, and such images are worth having.
_PLAIN = frozenset({"", "identity", "none"})
_ZLIB_FAMILY = frozenset({"gzip", "x-gzip", "deflate"})
_DETECT_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32


def read_body(response: http.client.HTTPResponse, deadline: Deadline, *, max_bytes: int) -> bytes:
    """Return the whole decoded body.

    Raises FetchError when it is longer than `max_bytes`, shorter than declared, empty, or in an
    encoding other than gzip and deflate. What is held never exceeds the cap by more than one read.
    """
    if response.length is not None and response.length > max_bytes:
        raise _too_large(f"Content-Length is {response.length}", max_bytes)
    encoding = (response.getheader("Content-Encoding") or "").strip().lower()
    pieces = _wire_pieces(response, deadline)
    if encoding in _ZLIB_FAMILY:
        pieces = _inflated(pieces)
    elif encoding not in _PLAIN:
        raise FetchError(FailureReason.BAD_ENCODING, f"Content-Encoding {encoding[:80]!r}")
    held: list[bytes] = []
    num_held = 0
    for piece in pieces:
        held.append(piece)
        num_held += len(piece)
        if num_held > max_bytes:
            raise _too_large("read so far", max_bytes)
    if not num_held:
        raise FetchError(FailureReason.EMPTY_BODY, "zero bytes")
    return b"".join(held)


def _too_large(seen: str, max_bytes: int) -> FetchError:
    return FetchError(FailureReason.BODY_TOO_LARGE, f"{seen}, over {max_bytes} bytes")


def _wire_pieces(response: http.client.HTTPResponse, deadline: Deadline) -> Iterator[bytes]:
    declared, num_read = response.length, 0
    while True:
        with failures_of_the_way(deadline):
            piece = response.read(READ_BYTES)
        if not piece:
            break
        num_read += len(piece)
        yield piece
    if declared is not None and num_read < declared:
        raise FetchError(FailureReason.TRUNCATED_BODY, f"{num_read} of {declared} bytes came")


def _inflated(pieces: Iterator[bytes]) -> Iterator[bytes]:
    decoder = zlib.decompressobj(_DETECT_GZIP_OR_ZLIB)
    try:
        for piece in pieces:
            data = piece
            while data and not decoder.eof:
                yield decoder.decompress(data, READ_BYTES)  # a bomb comes out in small parts
                data = decoder.unconsumed_tail
        yield decoder.flush(READ_BYTES)
    except zlib.error as error:
        raise FetchError(FailureReason.BAD_ENCODING, str(error)) from error
    if not decoder.eof:
        raise FetchError(FailureReason.TRUNCATED_BODY, "the compressed body ends early")
