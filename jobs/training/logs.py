"""What is written about training: one JSON line a record, TensorBoard, and wandb if asked for."""

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from jobs.errors import UserError
from jobs.training.config import WatchConfig
from pipeline.sample import canonical_json
from pipeline.store import Store

_log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
Record = Mapping[str, Any]


class Sink(Protocol):
    """Takes the numbers of a step."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take a record's numbers."""

    def close(self) -> None:
        """Write what is left."""


class MetricsLog:
    """Writes records of one stage; the JSON lines are what a resumed run goes on with.

    On object storage, which cannot append, they are put again as a whole at `flush`.
    """

    def __init__(
        self, store: Store, folder: str, *, resumed_at: int, sinks: Sequence[Sink]
    ) -> None:
        """Forgets records after step `resumed_at`: those steps are done again."""
        self._store = store
        self._folder = folder
        self._sinks = sinks
        kept = [r for r in read_metrics(store, folder) if r["step"] <= resumed_at]
        self._lines = [canonical_json(record) + "\n" for record in kept]
        store.make_folder(folder)
        self._put()
        self._file: TextIO | None = None
        if store.is_local:
            path = Path(store.full(f"{folder}/{METRICS}"))
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Add a record, which has a `step`."""
        line = canonical_json(record) + "\n"
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line)
            self._file.flush()
        numbers = _numbers(record)
        for sink in self._sinks:
            sink.write(record["step"], numbers)

    def flush(self) -> None:
        """Make what was written visible to others."""
        if self._file is None:
            self._put()

    def _put(self) -> None:
        """Write all lines at once, replacing what is there."""
        beside = self._store.full(self._folder) if self._store.is_local else None
        descriptor, name = tempfile.mkstemp(prefix=".metrics.", dir=beside)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.writelines(self._lines)
        self._store.upload(name, f"{self._folder}/{METRICS}")
        Path(name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()


def read_metrics(store: Store, folder: str) -> list[dict[str, Any]]:
    """Return the records of a stage; a last line that a crash cut short is left out."""
    records = []
    for line in (store.read(f"{folder}/{METRICS}") or b"").decode(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # what follows was never whole
        records.append(record)
    return records


def _numbers(record: Record, prefix: str = "") -> dict[str, float]:
    """Return a record's numbers, those inside of others by a path."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found[prefix + name] = float(value)
    return found


def open_sinks(store: Store, folder: str, watch: WatchConfig, name: str) -> list[Sink]:
    """Return TensorBoard and wandb as far as asked for. Raises UserError when wandb is missing."""
    sinks: list[Sink] = []
    if watch.has_tensorboard:
        if store.is_local:
            sinks.append(_TensorBoard(store.full(f"{folder}/tensorboard")))
        else:
            _log.info("no TensorBoard files on object storage; %s has all records", METRICS)
    if watch.wandb_project is not None:
        sinks.append(_Wandb(watch.wandb_project, name))
    return sinks


class _TensorBoard:
    def __init__(self, folder: str) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(folder)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, project: str, name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "training.watch.wandb_project is set but wandb is not installed: pip install wandb"
            ) from error
        self._run = wandb.init(
            project=project, name=name, id=name.replace("/", "-"), resume="allow"
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
