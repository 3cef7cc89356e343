"""Checkpoints of training: each exists once its manifest does, which is written last.

`<folder>/<step>/model.<digest>.safetensors`, `optimizer.<digest>.safetensors`, `manifest.json`, on
any fsspec filesystem. Tensors are safetensors and the rest is JSON: no code is ever loaded. Files
are named by their content, so two writers of one step never mix. What is frozen is not stored but
known by its fingerprint.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from model.weight_files import (
    CheckpointError,
    Reasons,
    load_strictly,
    matches,
    read_weights,
    write_weights,
)
from pipeline.layout import TEMPORARY
from pipeline.sample import canonical_json
from pipeline.store import Store, hash_stream

_log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_PARTS = ("model", "optimizer")
_SLOT = ":"  # between a parameter's name and the optimizer's name for what it keeps of it


class StoredFile(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z]+\.[0-9a-f]{16}\.safetensors$")]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """What a checkpoint is: how far training was, what it was, and which files hold it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    step: Annotated[int, Field(ge=0)]  # optimizer updates done
    content: dict[str, Any]  # what decides the weights; another content never resumes from this
    frozen: dict[str, str]  # fingerprint of each part that is not stored
    state: dict[str, Any]  # of the loop: windows of the log, what the alarms remember, the order
    score: float | None = None  # of the last probe; the highest is kept
    files: dict[str, StoredFile]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A moment of training, copied so that training may go on while it is written."""

    step: int
    content: Mapping[str, Any]
    frozen: Mapping[str, str]
    state: Mapping[str, Any]
    score: float | None
    tensors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)  # by part


def take_snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    left_out: Reasons,
    **facts: Any,  # noqa: ANN401 -- the other fields of Snapshot, named at the call
) -> Snapshot:
    """Copy a model without its frozen parts and its optimizer to the CPU.

    `left_out` describes the names of what is frozen, each with its reason.
    """
    weights = {n: t for n, t in model.state_dict().items() if not matches(n, left_out)}
    parts = {"model": weights, "optimizer": optimizer_tensors(model, optimizer)}
    copied = {
        part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        for part, tensors in parts.items()
    }
    return Snapshot(tensors=copied, **facts)


class Checkpoints:
    """The checkpoints of one training stage in a folder of a store; rank 0 alone writes.

    As a context manager it waits for the last write. Keeps the newest `keep` and the best.
    """

    def __init__(self, store: Store, folder: str, *, keep: int = 2) -> None:
        self._store = store
        self._folder = folder
        self._keep = keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def list(self) -> list[Manifest]:
        """Return the checkpoints that exist, the newest last; a damaged one is passed over."""
        steps = sorted(int(n) for n in self._store.list(self._folder).folders if n.isdecimal())
        found = [self._read(step) for step in steps]
        return [manifest for manifest in found if manifest is not None]

    def latest(self) -> Manifest | None:
        """Return the newest checkpoint whose files are all there, or None before the first."""
        for manifest in reversed(self.list()):
            problem = self._damage(manifest)
            if problem is None:
                return manifest
            _log.warning("%s is passed over: %s", self.path(manifest.step), problem)
        return None

    def load(
        self,
        manifest: Manifest,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        frozen: Mapping[str, str],
        may_lack: Reasons,
    ) -> None:
        """Put model and optimizer where they were; nothing is loaded unless everything fits.

        `frozen` are the fingerprints of the parts that the model has and the checkpoint has not;
        `may_lack` describes their names. Raises CheckpointError.
        """
        where = self.path(manifest.step)
        for part, expected in manifest.frozen.items():
            if frozen.get(part) != expected:
                raise CheckpointError(
                    f"{where} was trained with a frozen {part} of fingerprint {expected}, this one "
                    f"has {frozen.get(part)}; give back the weights it was, or delete "
                    f"{self._store.full(self._folder)} to begin anew"
                )
        weights, kept = (self._tensors(manifest, part) for part in _PARTS)
        load_strictly(model, weights, may_lack=may_lack, source=where)
        load_optimizer(model, optimizer, kept, source=where)

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot in the background; waits for the one before, and raises what it met."""
        self.wait()
        self._pending = self._pool.submit(self._write, snapshot)

    def wait(self) -> None:
        """Return once all is written. Raises what the writer met."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def discard_after(self, step: int) -> None:
        """Remove newer checkpoints, which are damaged or another run's, and unfinished files."""
        for name in self._store.list(self._folder).folders:
            if name.startswith(TEMPORARY) or (name.isdecimal() and int(name) > step):
                self._store.remove(f"{self._folder}/{name}/{_MANIFEST}")
                self._store.remove_folder(f"{self._folder}/{name}")

    def path(self, step: int) -> str:
        """Return where the checkpoint of a step is, for messages."""
        return self._store.full(f"{self._folder}/{step:08d}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _read(self, step: int) -> Manifest | None:
        data = self._store.read(f"{self._folder}/{step:08d}/{_MANIFEST}")
        if data is None:
            return None
        try:
            manifest = Manifest.model_validate(json.loads(data))
        except (ValueError, ValidationError) as error:
            _log.warning("%s is passed over: its manifest is damaged: %s", self.path(step), error)
            return None
        return manifest if manifest.step == step and set(manifest.files) == set(_PARTS) else None

    def _damage(self, manifest: Manifest) -> str | None:
        for file in manifest.files.values():
            if self._store.sha256(self._file_path(manifest, file)) != file.sha256:
                return f"{file.name} is missing or does not have the hash that was committed"
        return None

    def _tensors(self, manifest: Manifest, part: str) -> dict[str, Tensor]:
        path = self._file_path(manifest, manifest.files[part])
        if self._store.is_local:
            # Copies, for what is read is mapped: it would keep the file, and lie at any address.
            found = read_weights(Path(self._store.full(path)))
            return {name: tensor.clone() for name, tensor in found.items()}
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / manifest.files[part].name
            with self._store.open(path) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            return {name: tensor.clone() for name, tensor in read_weights(copy).items()}

    def _file_path(self, manifest: Manifest, file: StoredFile) -> str:
        return f"{self._folder}/{manifest.step:08d}/{file.name}"

    def _write(self, snapshot: Snapshot) -> None:
        folder = f"{self._folder}/{snapshot.step:08d}"
        self._store.make_folder(folder)
        files = {}
        with self._store.scratch(self._folder, f"{snapshot.step:05d}") as scratch:
            for part, tensors in snapshot.tensors.items():
                path = Path(scratch) / f"{part}.safetensors"
                write_weights(tensors, path)
                with path.open("rb") as stream:
                    digest = hash_stream(stream)
                name = f"{part}.{digest[:16]}.safetensors"
                files[part] = StoredFile(name=name, bytes=path.stat().st_size, sha256=digest)
                self._store.upload(str(path), f"{folder}/{name}")
        manifest = Manifest(
            step=snapshot.step,
            content=dict(snapshot.content),
            frozen=dict(snapshot.frozen),
            state=dict(snapshot.state),
            score=snapshot.score,
            files=files,
        )
        text = canonical_json(manifest.model_dump(), indent=1) + "\n"
        self._store.create(f"{folder}/{_MANIFEST}", text.encode())  # the commit
        self._prune()

    def _prune(self) -> None:
        manifests = self.list()
        scored = [manifest for manifest in manifests if manifest.score is not None]
        kept = {manifest.step for manifest in manifests[-self._keep :]}
        if scored:
            kept.add(max(scored, key=lambda manifest: (manifest.score, manifest.step)).step)
        for manifest in manifests:
            if manifest.step not in kept:
                folder = f"{self._folder}/{manifest.step:08d}"
                self._store.remove(f"{folder}/{_MANIFEST}")  # first: without it there is none
                self._store.remove_folder(folder)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all that an optimizer remembers, as `parameter:slot`; nothing before a step."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}{_SLOT}{slot}": tensor
        for parameter, slots in optimizer.state.items()
        for slot, tensor in slots.items()
    }


def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
) -> None:
    """Give an optimizer back what `optimizer_tensors` returned. Raises CheckpointError."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition(_SLOT)
        slots.setdefault(name, {})[slot] = tensor
    if odd := sorted(slots.keys() ^ (set(ordered) if slots else set())):
        shown = ", ".join(odd[:5])
        raise CheckpointError(f"{source}: optimizer and model differ in {len(odd)}: {shown}")
    state = {index: slots[name] for index, name in enumerate(ordered) if name in slots}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def fingerprint_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return 16 hexadecimal digits that name tensors by name, dtype, shape and every byte."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()[:16]


def fingerprint_folder(folder: Path, names: Callable[[str], bool] = lambda name: True) -> str:
    """Return 16 hexadecimal digits that name a folder's files by path and content."""
    digest = hashlib.sha256()
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and names(p.name))
    for path in paths:
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        with path.open("rb") as stream:
            digest.update(hash_stream(stream).encode())
    if not paths:
        raise CheckpointError(f"{os.fspath(folder)} holds no file to fingerprint")
    return digest.hexdigest()[:16]
