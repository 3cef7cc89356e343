"""What kept a shard from being made, sorted by what is to be done about it."""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from jobs.errors import RunError, UserError
from pipeline.corpus import Corpus
from pipeline.sample import ShardError
from pipeline.sources.rows import SourceError

# What a disk or an account may refuse, through no fault of the code; waiting does not help.
MACHINE_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EISDIR,
        errno.EMFILE,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)
# Clients of object stores raise exceptions of their own beside OSError.
_STORAGE_MODULES = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google.api_core", "s3fs")


class Kind(StrEnum):
    """Why an attempt at a shard came to nothing."""

    SHARD = "shard"
    """Its data: tried again a few times, then set aside."""
    STORAGE = "storage"
    """A request that may succeed later: everything pauses."""
    MACHINE = "machine"
    """A full disk, a missing permission: tried again, on another machine with luck."""
    DEATH = "death"
    """The worker, or its node, died: tried again a few times, for it may be the shard's doing."""
    PREEMPTED = "preempted"
    """The node was taken back, with notice: tried again."""
    USER = "user"
    """A mistake in the recipe or its surroundings, which every shard would meet: ends the run."""
    BUG = "bug"
    """Anything else: never tried again, and shown whole."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One failed attempt, as it travels from the worker to the driver."""

    kind: Kind
    message: str
    trace: str = ""
    """Of a bug."""

    @property
    def where(self) -> str:
        """The last line of our code that a bug passed through; what tells one bug from another."""
        lines = [line.strip() for line in self.trace.splitlines()]
        places = [line for line in lines if line.startswith('File "')]
        return places[-1] if places else ""


def problem_of(error: Exception) -> Problem:
    """Return what an exception that a maker raised means for its shard."""
    message = str(error) or type(error).__name__
    if isinstance(error, UserError):
        return Problem(Kind.USER, message)
    if isinstance(error, (ShardError, SourceError)):
        cause = error.__cause__
        if cause is not None and _is_storage(cause):
            return Problem(Kind.STORAGE, message)
        if cause is None or isinstance(cause, (SourceError, ShardError, ValueError, OSError)):
            return Problem(Kind.SHARD, message)
    if isinstance(error, PermissionError) or _is_refusal(error):
        return Problem(Kind.MACHINE, message)
    if _is_storage(error):
        return Problem(Kind.STORAGE, f"{type(error).__name__}: {message}")
    message = message if isinstance(error, ShardError) else f"{type(error).__name__}: {message}"
    return Problem(Kind.BUG, message, "".join(traceback.format_exception(error)))


@contextmanager
def storage_explained(corpus: Corpus) -> Iterator[None]:
    """Turn what a corpus's storage refuses, outside of any shard, into a line for people.

    Raises RunError in its place; a local disk's own errors say enough.
    """
    try:
        yield
    except Exception as error:
        is_storages = isinstance(error, OSError) or problem_of(error).kind is Kind.STORAGE
        if corpus.store.is_local or not is_storages:
            raise
        raise RunError(f"{corpus.root}: storage refuses: {error}") from error


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in MACHINE_ERRNOS


def _is_storage(error: BaseException) -> bool:
    if isinstance(error, (FileNotFoundError, UserError)):
        return False
    is_clients = type(error).__module__.startswith(_STORAGE_MODULES)
    return is_clients or isinstance(error, (OSError, TimeoutError))


@dataclass
class BugTally:
    """Bugs by where they are: each is shown once, however many shards it fails."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, problem: Problem) -> bool:
        """Count a bug; returns whether it is new and to be shown."""
        kind = f"{problem.message.partition(':')[0]} at {problem.where or 'an unknown line'}"
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return self.counts[kind] == 1
