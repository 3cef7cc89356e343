"""The few file operations that commits are made of, each of which happens wholly or not at all.

A local disk has renames, hard links and locks; an object store has whole-object puts and
conditional puts. Nothing else is relied on. No stream is ever opened for writing at a name that is
read, because fsspec publishes what was written so far when a writer fails.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.layout import TEMPORARY

_log = logging.getLogger(__name__)
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Listing:
    """What a folder holds: the size of each file by name, and the names of its folders."""

    sizes: dict[str, int]
    folders: list[str]


class Store:
    """A root folder of any fsspec filesystem. Paths are relative to it, with forward slashes."""

    def __init__(self, root: str, storage_options: Mapping[str, Any] | None = None) -> None:
        # Listings are never cached: other processes write here too.
        options = {"use_listings_cache": False, **(storage_options or {})}
        self.fs, path = fsspec.url_to_fs(root, **options)
        self._root = str(path).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    @property
    def url(self) -> str:
        """The root's absolute URL; for a local disk, its absolute path."""
        return self._root if self.is_local else str(self.fs.unstrip_protocol(self._root))

    def full(self, path: str) -> str:
        """Return the path as the filesystem knows it."""
        return f"{self._root}/{path}" if path else self._root

    def make_folder(self, path: str) -> None:
        """Create a folder where there are folders; object stores need none."""
        if self.is_local:
            self.fs.makedirs(self.full(path), exist_ok=True)

    def list(self, folder: str) -> Listing:
        """Return what is in a folder, in one request; nothing if there is no such folder."""
        self.fs.invalidate_cache(self.full(folder))
        try:
            infos = self.fs.ls(self.full(folder), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            infos = []
        listing = Listing({}, [])
        for info in infos:
            name = info["name"].rstrip("/").rsplit("/", 1)[-1]
            if info["type"] == "directory":
                listing.folders.append(name)
            else:
                listing.sizes[name] = info["size"]
        return listing

    def read(self, path: str) -> bytes | None:
        """Return a small file's content, or None where there is none."""
        try:
            return cast(bytes, self.fs.cat_file(self.full(path)))
        except FileNotFoundError:
            return None

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading, seekable. Raises FileNotFoundError."""
        return cast(BinaryIO, self.fs.open(self.full(path), "rb"))

    def sha256(self, path: str) -> str | None:
        """Return a file's hash, or None where there is none."""
        try:
            with self.open(path) as stream:
                return hash_stream(stream)
        except FileNotFoundError:
            return None

    def upload(self, local_path: str, path: str) -> None:
        """Put a finished local file at a name, replacing what is there.

        On a local disk the file is moved: make it in a `scratch` folder.
        """
        if not self.is_local:
            self.fs.put_file(local_path, self.full(path))
            return
        _sync(local_path)
        self.fs.mv(local_path, self.full(path))
        _sync(os.path.dirname(self.full(path)))

    def create(self, path: str, data: bytes) -> bool:
        """Put a small file where there is none; of any number of racing calls one returns True."""
        if self.is_local:
            return self._create_by_link(path, data)
        try:
            self.fs.pipe_file(self.full(path), data, mode="create")
        except FileExistsError:
            return False
        except OSError:
            # A conflict that the filesystem has no word for; what counts is what is there now.
            if self.read(path) is None:
                raise
            return False
        return True

    def swap(self, path: str, expected: bytes, data: bytes) -> bool:
        """Replace a small file if it still holds what is expected.

        Exact on local disks (under `locked`) and on S3; elsewhere what happens between looking and
        writing goes unseen, and the last writer wins.
        """
        if self.is_local:
            if self.read(path) != expected:
                return False
            with self._temporary(path, data) as temporary:
                self.fs.mv(temporary, self.full(path))
            _sync(os.path.dirname(self.full(path)))
            return True
        condition = self._condition(path)
        if self.read(path) != expected:
            return False
        try:
            self.fs.pipe_file(self.full(path), data, **condition)
        except OSError:
            if (now := self.read(path)) == expected:
                raise
            return now == data  # a put that was repeated finds its own first success
        return True

    def _condition(self, path: str) -> dict[str, str]:
        protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        if "s3" not in protocols:
            return {}
        try:
            return {"IfMatch": self.fs.info(self.full(path))["ETag"]}
        except FileNotFoundError:
            return {}

    def move(self, source: str, target: str) -> bool:
        """Give a file another name, replacing what has it; False if there is no such file.

        On object stores a crash may leave both names.
        """
        try:
            if self.is_local:
                self.fs.mv(self.full(source), self.full(target))
            else:
                self.fs.cp_file(self.full(source), self.full(target))
                self.remove(source)
        except FileNotFoundError:
            return False
        return True

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.full(path))

    def remove_folder(self, path: str) -> bool:
        """Remove a folder and all in it; False if it is gone or a living writer's `scratch`."""
        with suppress(FileNotFoundError), _held(self.full(path), self.is_local) as is_ours:
            if is_ours:
                self.fs.rm(self.full(path), recursive=True)
            return is_ours
        return False

    @contextmanager
    def locked(self, folder: str) -> Iterator[None]:
        """Keep other processes out of a folder for a moment, on disks that have locks.

        The lock dies with its process. Commits are safe without it; with it they also never redo
        each other's work.
        """
        if not self.is_local:
            yield
            return
        descriptor = os.open(self.full(folder), os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                _log.debug("%s cannot be locked (%s); going on without", folder, error)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def scratch(self, folder: str, prefix: str) -> Iterator[str]:
        """Give a local folder for files in the making, on the root's own disk if that is local.

        It is locked while its writer lives, so that no other run's sweep takes it away.
        """
        beside = self.full(folder) if self.is_local else None
        path = tempfile.mkdtemp(prefix=f"{TEMPORARY}{prefix}.", dir=beside)
        try:
            with _held(path, self.is_local):
                yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)  # what stays is swept

    def _create_by_link(self, path: str, data: bytes) -> bool:
        with self._temporary(path, data) as temporary:
            try:
                self.fs.link(temporary, self.full(path))
            except FileExistsError:
                return False
        _sync(os.path.dirname(self.full(path)))
        return True

    @contextmanager
    def _temporary(self, path: str, data: bytes) -> Iterator[str]:
        folder, _, name = self.full(path).rpartition("/")
        temporary = f"{folder}/{TEMPORARY}{name}.{uuid4().hex}"
        try:
            self.fs.pipe_file(temporary, data)
            _sync(temporary)
            yield temporary
        finally:
            with suppress(FileNotFoundError):
                self.fs.rm_file(temporary)


@contextmanager
def _held(folder: str, has_locks: bool) -> Iterator[bool]:
    """Hold a folder's lock, which dies with the process; give False if another has it."""
    if not has_locks:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _is_lock_taken(descriptor, folder)
    finally:
        os.close(descriptor)


def _is_lock_taken(descriptor: int, folder: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _log.debug("%s cannot be locked (%s); going on without", folder, error)
    return True


def hash_stream(stream: BinaryIO) -> str:
    """Return the SHA-256 of what is left of a stream, in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
