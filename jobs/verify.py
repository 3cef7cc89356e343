"""`capfilt verify`: a line for each fault, and a last line that says whether all is well."""

import json

import typer

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from pipeline.corpus import Corpus
from pipeline.layout import RUN_FILE, STAGES
from pipeline.verify import Fault, Severity, verify


def verify_corpus(root: str, *, is_quick: bool, as_json: bool) -> bool:
    """Print what is wrong with a corpus and return whether nothing is; notes do not count.

    Raises UserError when there is no corpus.
    """
    corpus = open_corpus(root)
    has_sources = any(corpus.sources(stage) for stage in STAGES)
    if not has_sources and corpus.store.read(RUN_FILE) is None:
        raise UserError(f"{corpus.root}: no corpus here (neither run.yaml nor any shard)")
    faults = []
    for fault in verify(corpus, quick=is_quick):
        faults.append(fault)
        if not as_json:
            typer.echo(str(fault))
    is_well = not any(fault.severity is Severity.FAULT for fault in faults)
    typer.echo(_json(faults, is_well) if as_json else _last_line(corpus, faults, is_quick))
    return is_well


def _last_line(corpus: Corpus, faults: list[Fault], is_quick: bool) -> str:
    counts = {
        stage: sum(len(corpus.scan(stage, source).records) for source in corpus.sources(stage))
        for stage in STAGES
    }
    shards = ", ".join(f"{count:,} {stage}" for stage, count in counts.items() if count)
    num_faults = sum(fault.severity is Severity.FAULT for fault in faults)
    looked_at = "markers, sizes and counts" if is_quick else "every byte and row"
    return f"{num_faults:,} faults in {shards or 'no'} shards ({looked_at} checked)"


def _json(faults: list[Fault], is_well: bool) -> str:
    found = [
        {
            "severity": fault.severity.value,
            "file": fault.file,
            "problem": fault.problem,
            "mend": fault.mend,
        }
        for fault in faults
    ]
    return json.dumps({"is_well": is_well, "found": found}, indent=2)
