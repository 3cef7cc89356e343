"""Checks that a corpus holds what its markers say, and says how to mend what does not.

Every check reports and goes on: one damaged shard must not hide the next.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import commit
from pipeline.corpus import Corpus, Folder
from pipeline.layout import MARKER, RUN_FILE, STAGES, UPSTREAM, final_name, parse_name
from pipeline.record import Counts, ShardRecord
from pipeline.runfile import RunFileError
from pipeline.sample import ShardError, Verdict
from pipeline.store import hash_stream
from pipeline.tar import TarFault, read_samples

_BATCH_ROWS = 10_000


class Severity(StrEnum):
    """A fault means that data is not what it should be; a note, that something can be tidied."""

    FAULT = "fault"
    NOTE = "note"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is wrong, where it is, and what to do about it."""

    stage: str
    source: str
    index: int | None
    file: str  # path below the root
    problem: str
    mend: str
    severity: Severity = Severity.FAULT

    def __str__(self) -> str:
        return f"{self.severity} {self.file}: {self.problem}; {self.mend}"


_Folders = dict[tuple[str, str], Folder]


def verify(corpus: Corpus, *, quick: bool = False) -> Iterator[Fault]:
    """Yield every fault of a corpus, and notes on what crashes left over.

    `quick` checks markers, sizes and counts, and opens no data file. A corpus that is being written
    may show notes, and faults where a shard is replaced while it is read.
    """
    yield from _verify_run_file(corpus)
    folders = {
        (stage, source): corpus.scan(stage, source)
        for stage in STAGES
        for source in corpus.sources(stage)
    }
    for folder in folders.values():
        yield from _verify_markers(folder)
        for index in sorted(folder.records):
            record = folder.records[index]
            yield from _verify_lineage(record, folders)
            yield from _verify_files(corpus, folder, record, quick)
        yield from _verify_leftovers(folder)


def _fault(record: ShardRecord, suffix: str, problem: str, mend: str | None = None) -> Fault:
    return Fault(
        stage=record.stage,
        source=record.source,
        index=record.index,
        file=f"{record.name}.{suffix}",
        problem=problem,
        mend=mend or f"delete {record.name}.{MARKER} and run again",
    )


def _verify_run_file(corpus: Corpus) -> Iterator[Fault]:
    try:
        text = corpus.read_run()
    except (RunFileError, UnicodeDecodeError) as error:
        problem = str(error)
    else:
        if text is not None:
            return
        problem = "it is missing, so nothing says what this corpus was made with"
    mend = "put the original back, or delete it and resume with the same recipe"
    yield Fault(stage="", source="", index=None, file=RUN_FILE, problem=problem, mend=mend)


def _verify_markers(folder: Folder) -> Iterator[Fault]:
    stage, source = folder.path.split("/")
    for index, problem in sorted(folder.damaged.items()):
        file = f"{folder.path}/{final_name(index, MARKER)}"
        mend = f"delete {file} and run again"
        yield Fault(stage=stage, source=source, index=index, file=file, problem=problem, mend=mend)


def _verify_lineage(record: ShardRecord, folders: _Folders) -> Iterator[Fault]:
    """Check that a shard was made from the upstream shard that is there now, and from all of it."""
    if record.stage not in UPSTREAM:
        return
    above = _record(folders, UPSTREAM[record.stage], record)
    if above is None:
        name = f"{UPSTREAM[record.stage]}/{record.source}/{record.index:05d}"
        yield _fault(record, MARKER, f"it was made from {name}, which does not exist")
    elif record.inputs != above.sha256:
        yield _fault(record, MARKER, f"it is stale: {above.name} was replaced after it was made")
    raw = _record(folders, "raw", record)
    if record.stage == "clean" and raw is not None and raw.rows_in != record.rows_in:
        yield _fault(
            record, MARKER, f"it has {record.rows_in:,} rows, {raw.name} has {raw.rows_in:,}"
        )


def _record(folders: _Folders, stage: str, of: ShardRecord) -> ShardRecord | None:
    folder = folders.get((stage, of.source))
    return folder.records.get(of.index) if folder else None


def _verify_files(
    corpus: Corpus, folder: Folder, record: ShardRecord, quick: bool
) -> Iterator[Fault]:
    whole = set()
    for suffix, file in sorted(record.files.items()):
        names = [path.rsplit("/", 1)[-1] for path in commit.paths(record, suffix)]
        size = next((folder.sizes[name] for name in names if name in folder.sizes), None)
        if size is None:
            yield _fault(record, suffix, "it is missing")
        elif size != file.bytes:
            yield _fault(record, suffix, f"it has {size:,} bytes, {file.bytes:,} were committed")
        elif quick:
            continue
        elif problem := _hash_problem(corpus, record, suffix):
            yield _fault(record, suffix, problem)
        else:
            whole.add(suffix)  # only what was committed is worth parsing
    yield from _verify_contents(corpus, record, whole)


def _hash_problem(corpus: Corpus, record: ShardRecord, suffix: str) -> str | None:
    try:
        with corpus.open(record, suffix) as stream:
            found = hash_stream(stream)
    except (ShardError, OSError) as error:
        return f"it cannot be read ({error})"
    if found != record.files[suffix].sha256:
        return "its hash is not the committed one, so its bytes have changed"
    return None


def _verify_contents(corpus: Corpus, record: ShardRecord, whole: set[str]) -> Iterator[Fault]:
    kept: list[str] | None = None
    if "parquet" in whole:
        try:
            kept, counts = _read_ledger(corpus, record)
        except (ShardError, OSError, ValueError, KeyError, pa.ArrowException) as error:
            yield _fault(record, "parquet", f"it is no ledger: {error}")
        else:
            if counts != record.counts:
                problem = f"its rows say {_shown(counts)}, the marker says {_shown(record.counts)}"
                yield _fault(record, "parquet", problem)
    if "tar" in whole:
        yield from _verify_tar(corpus, record, kept)


def _shown(counts: Counts) -> str:
    return str(counts.model_dump())


def _read_ledger(corpus: Corpus, record: ShardRecord) -> tuple[list[str], Counts]:
    tally: Counter[tuple[str, str]] = Counter()
    kept: list[str] = []
    with corpus.open(record, "parquet") as stream, pq.ParquetFile(stream) as file:
        columns = ["key", "verdict", "reason"]
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            keys, verdicts, reasons = (batch[name].to_pylist() for name in columns)
            if None in keys:
                raise ValueError("a row has no key")
            tally.update(zip(verdicts, reasons, strict=True))
            kept += [key for key, v in zip(keys, verdicts, strict=True) if v == Verdict.KEPT]
    return kept, Counts.of(tally)


def _verify_tar(corpus: Corpus, record: ShardRecord, kept: list[str] | None) -> Iterator[Fault]:
    """Check that a tar can be read, its keys ascend, and they are those the ledger kept."""
    faults: list[TarFault] = []
    keys: list[str] = []
    try:
        with corpus.open(record, "tar") as stream:
            samples = read_samples(stream, shard=record.name, on_fault=faults.append, load=False)
            keys.extend(sample.key for sample in samples)
    except (ShardError, OSError) as error:
        yield _fault(record, "tar", str(error))
        return
    for fault in faults:
        yield _fault(record, "tar", fault.message)
    if any(later <= earlier for earlier, later in zip(keys, keys[1:], strict=False)):
        yield _fault(record, "tar", "its keys do not strictly ascend")
    if kept is not None and sorted(keys) != sorted(kept):
        problem = f"it holds {len(keys):,} samples, the ledger kept {len(kept):,}"
        odd = sorted(set(keys) ^ set(kept))[:3]
        yield _fault(record, "tar", f"{problem}; they differ in {odd}")


def _verify_leftovers(folder: Folder) -> Iterator[Fault]:
    stage, source = folder.path.split("/")

    def note(name: str, problem: str, mend: str) -> Fault:
        parsed = parse_name(name)
        return Fault(
            stage=stage,
            source=source,
            index=parsed.index if parsed else None,
            file=f"{folder.path}/{name}",
            problem=problem,
            mend=mend,
            severity=Severity.NOTE,
        )

    sweeping = "the next `capfilt run` on this root {}"
    for name in [*folder.leftovers(), *folder.temporaries]:
        yield note(
            name, "left over from an attempt that did not finish", sweeping.format("removes it")
        )
    for record in folder.unsettled():
        yield note(
            f"{record.index:05d}.{MARKER}",
            "committed, but its files have not got their final names",
            sweeping.format("gives them"),
        )
    for name in folder.strangers():
        yield note(name, "not a file of a corpus", "move it elsewhere if it is not wanted here")
