"""`<root>/run/status.json`: who runs a corpus and how far, right even after its driver died.

One small file is both the lock and the status, replaced as a whole with each heartbeat, and only by
whoever wrote the version before (`Store.swap`). So two drivers never think that both have it, and
whoever reads it sees who has it, since when, when it was last heard of, and how far it was then.
Commits do not depend on it: a driver that lost the lock unaware harms nothing.
"""

import getpass
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.errors import UserError
from jobs.run_config import RunConfig
from pipeline.corpus import Corpus
from pipeline.layout import MARKER, parse_name
from pipeline.store import Store

_log = logging.getLogger(__name__)
FOLDER, FILE = "run", "run/status.json"
_FROZEN = ConfigDict(frozen=True, extra="ignore")  # a newer version may say more


class Condition(StrEnum):
    """What a run says of itself when it last wrote."""

    RUNNING = "running"
    DONE = "done"
    SOME_FAILED = "some shards failed"
    STOPPED = "stopped"
    BROKEN = "broken off"


class Driver(BaseModel):
    """The process that runs a corpus."""

    model_config = _FROZEN

    id: str
    who: str
    """User, host and process, for people."""
    machine: str
    """The host and its process table, so that another process there can look for this one."""
    pid: int

    @classmethod
    def here(cls) -> Self:
        """Return a driver that is this process."""
        host, pid = socket.gethostname(), os.getpid()
        return cls(
            id=uuid4().hex, who=f"{_user()}@{host}, process {pid}", machine=_machine(), pid=pid
        )

    @property
    def is_known_dead(self) -> bool:
        """Whether it was a process of this machine and is gone; False where that cannot be told."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


class StageStatus(BaseModel):
    """How far one stage is. Rows are the source lists'; times are seconds."""

    model_config = _FROZEN

    stage: str
    folder: str
    shards_total: int
    shards_done: int
    shards_new: int = 0
    shards_in_flight: int = 0
    shards_failed: int = 0
    rows_total: int = 0
    rows_done: int = 0
    """Of shards that are done, and of a shard that is being made in the driver's own process."""
    rows_per_second: float = 0.0
    """Of this run."""
    images_kept_per_second: float = 0.0
    """Rows kept in the shards that this run made."""
    kept_share: float | None = None
    """Of the rows in the shards that this run made."""
    eta_seconds: float | None = None
    shard_seconds: dict[str, float] = Field(default_factory=dict)
    """What one shard takes: the median, the slowest tenth, the slowest."""
    actors: int = 0
    busy_seconds: float = 0.0
    """Of all its workers, making shards."""
    wait_seconds: float = 0.0
    """Of all its workers: starting, and without work."""
    times: dict[str, float] = Field(default_factory=dict)
    """Seconds within shards by what they were spent on; `wait` is a GPU's for images."""


class FailedShard(BaseModel):
    """A shard that was set aside."""

    model_config = _FROZEN

    shard: str
    error: str
    attempts: int


class RunStatus(BaseModel):
    """What the file holds."""

    model_config = _FROZEN

    format: Annotated[int, Field(ge=1)] = 1
    name: str
    command: str = ""
    """What to type to continue."""
    driver: Driver
    condition: Condition = Condition.RUNNING
    engine: str = "local"
    started_at: datetime
    heartbeat_at: datetime
    heartbeat_seconds: float
    stale_seconds: float
    stages: tuple[StageStatus, ...] = ()
    num_failures: int = 0
    failures: tuple[FailedShard, ...] = ()
    """The first hundred."""
    bugs: dict[str, int] = Field(default_factory=dict)
    """How often each exception of our own code was met."""
    warnings: tuple[str, ...] = ()
    note: str = ""
    """Why it was broken off."""

    def is_alive(self, now: datetime) -> bool:
        """Whether its driver is at work, as far as can be told from here."""
        if self.condition is not Condition.RUNNING or self.driver.is_known_dead:
            return False
        return (now - self.heartbeat_at).total_seconds() < self.stale_seconds

    def state(self, now: datetime) -> str:
        """Return the condition in a word or two; a run that fell silent is said to have died."""
        if self.condition is Condition.RUNNING and not self.is_alive(now):
            return "died"
        return self.condition.value


class RunTakenError(UserError):
    """Another driver runs this corpus."""


class LostLockError(Exception):
    """Another driver took this corpus over, because this one was not heard of for too long."""


def read_status(corpus: Corpus) -> RunStatus | None:
    """Return the status of the corpus's run, or None before the first. Raises UserError."""
    data = corpus.store.read(FILE)
    if data is None:
        return None
    try:
        return RunStatus.model_validate_json(data)
    except ValidationError as error:
        raise UserError(
            f"{corpus.root}/{FILE} cannot be read ({error.error_count()} faults); it only tells "
            "of a run: delete it, and run again"
        ) from error


def count_shards(corpus: Corpus, folder: str) -> dict[str, int]:
    """Return how many shards of a stage exist now, by source; from listings, opening no marker."""
    counts = {}
    for source in corpus.sources(folder):
        names = map(parse_name, corpus.store.list(f"{folder}/{source}").sizes)
        counts[source] = sum(bool(n and n.suffix == MARKER and not n.digest) for n in names)
    return counts


@contextmanager
def driving(
    corpus: Corpus, config: RunConfig, *, name: str, command: str = ""
) -> Iterator["Heart"]:
    """Be the one driver of a corpus, with a heartbeat, until left.

    Raises RunTakenError while another driver is heard of, with who it is and since when.
    """
    now = _now()
    status = RunStatus(
        name=name,
        command=command,
        driver=Driver.here(),
        started_at=now,
        heartbeat_at=now,
        heartbeat_seconds=config.heartbeat_seconds,
        stale_seconds=config.stale_seconds,
    )
    heart = Heart(corpus.store, status, _take(corpus, status))
    heart.start()
    try:
        yield heart
    except BaseException as error:
        heart.stop(Condition.BROKEN, f"{type(error).__name__}: {error}"[:500])
        raise
    heart.stop()


def _take(corpus: Corpus, status: RunStatus) -> bytes:
    """Make the file ours and return its bytes."""
    store, data = corpus.store, _to_bytes(status)
    store.make_folder(FOLDER)
    _tidy(store)
    for _ in range(10):  # whoever comes between is looked at anew
        found = store.read(FILE)
        if found is None:
            if _create(store, data):
                return data
            continue
        _refuse_living(corpus, found)
        if _swap(store, found, data):
            return data
    raise RunTakenError(f"{corpus.root}: other runs keep taking {FILE}; stop them first")


def _refuse_living(corpus: Corpus, found: bytes) -> None:
    try:
        other = RunStatus.model_validate_json(found)
    except ValidationError:
        return  # says nothing of anybody
    now = _now()
    if other.is_alive(now):
        age = (now - other.heartbeat_at).total_seconds()
        left = other.stale_seconds - age
        raise RunTakenError(
            f"{corpus.root} is being run by {other.driver.who}, since "
            f"{other.started_at:%Y-%m-%d %H:%M:%S} UTC, last heard of {max(age, 0):.0f} s ago; wait"
            f" for it or stop it. If it is dead, give the command again in {left:.0f} s"
        )


def _tidy(store: Store) -> None:
    """Remove what drivers that died while writing left beside the file; not what lives."""
    with store.locked(FOLDER):
        for name in store.list(FOLDER).sizes:
            if name.startswith(".status.json."):
                store.remove(f"{FOLDER}/{name}")


class Heart:
    """Writes the status every few seconds from a thread of its own."""

    def __init__(self, store: Store, status: RunStatus, data: bytes) -> None:
        """`data` is what the file holds now, and it is ours."""
        self._store = store
        self._status = status
        self._data = data
        self._has_ended = threading.Event()
        self._is_lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def status(self) -> RunStatus:
        """What is written next."""
        return self._status

    @property
    def is_lost(self) -> bool:
        """Whether another driver has taken over; this one is to stop."""
        return self._is_lost.is_set()

    def tell(self, **changes: object) -> None:
        """Change what is written from the next heartbeat on; called by the driver alone."""
        self._status = self._status.model_copy(update=changes)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self, condition: Condition | None = None, note: str = "") -> None:
        """Write a last time and let go; without a condition it is the one that was told.

        A run that still says RUNNING ends as DONE.
        """
        self._has_ended.set()
        self._thread.join()
        if condition is None:
            told = self._status.condition
            condition = Condition.DONE if told is Condition.RUNNING else told
        self.tell(condition=condition, note=note or self._status.note)
        self._write()

    def _beat(self) -> None:
        while not self._has_ended.wait(self._status.heartbeat_seconds) and not self.is_lost:
            self._write()

    def _write(self) -> None:
        if self.is_lost:
            return
        data = _to_bytes(self._status.model_copy(update={"heartbeat_at": _now()}))
        try:
            self._put(data)
        # A heartbeat that cannot be written stops nothing: whoever reads sees its age.
        except Exception as error:
            _log.warning("%s/%s cannot be written: %s", self._store.url, FILE, error)

    def _put(self, data: bytes) -> None:
        if _swap(self._store, self._data, data):
            self._data = data
        elif self._store.read(FILE) is not None:
            _log.warning("%s: another driver has taken over this corpus", self._store.url)
            self._is_lost.set()
        elif _create(self._store, data):
            _log.warning("%s/%s was deleted; it was written anew", self._store.url, FILE)
            self._data = data


def _create(store: Store, data: bytes) -> bool:
    with store.locked(FOLDER):
        return store.create(FILE, data)


def _swap(store: Store, expected: bytes, data: bytes) -> bool:
    with store.locked(FOLDER):
        return store.swap(FILE, expected, data)


def _to_bytes(status: RunStatus) -> bytes:
    return (status.model_dump_json(indent=1) + "\n").encode()


def _now() -> datetime:
    return datetime.now(UTC)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        return str(os.getuid())


def _machine() -> str:
    """Name this host, its boot and its process table; processes compare by number within it."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
