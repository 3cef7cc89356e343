"""A report of a corpus, in order: snapshot, numbers, examples, page, JSON, dataset card."""

import json
import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime

import duckdb

from pipeline.corpus import Corpus
from pipeline.layout import TEMPORARY
from pipeline.report.card import croissant, dataset_card
from pipeline.report.compare import compare as compare_with
from pipeline.report.gallery import Example, examples
from pipeline.report.ledgers import CorpusChangedError, Ledgers, ReportError, Snapshot, SqlLimits
from pipeline.report.numbers import Json, numbers
from pipeline.report.page import render

_log = logging.getLogger(__name__)
FOLDER = "report"
_MAX_ROUNDS = 3  # a running job may replace shards while they are read


@dataclass(frozen=True, slots=True)
class ReportPaths:
    """Where a report is: the page, its numbers, the dataset card and its machine-readable twin."""

    page: str
    numbers: str
    card: str
    croissant: str


def build_report(
    corpus: Corpus, *, compare: Corpus | None = None, limits: SqlLimits | None = None
) -> ReportPaths:
    """Write the report of what is in a corpus now, and return where it is.

    Works on any state of a corpus, empty and running ones too, and changes nothing else. `compare`
    is another corpus to set it against. Each file is replaced at once. Raises OSError, ValueError
    for a file of results or a ledger that cannot be read, and where shards on storage without hard
    links are replaced all the time.
    """
    found, chosen = _gather(corpus, compare, limits or SqlLimits())
    found_compact = json.dumps(found, ensure_ascii=False, allow_nan=False, sort_keys=True)
    return ReportPaths(
        page=write_file(corpus, "index.html", render(found, chosen)),
        numbers=write_file(corpus, "report.json", found_compact + "\n"),
        card=write_file(corpus, "README.md", dataset_card(found)),
        croissant=write_file(corpus, "croissant.json", croissant(found)),
    )


def _gather(corpus: Corpus, other: Corpus | None, limits: SqlLimits) -> tuple[Json, list[Example]]:
    """Return numbers and examples of one moment, which a running job may make take some rounds."""
    store = corpus.store
    store.make_folder(FOLDER)
    for name in store.list(FOLDER).folders:
        if name.startswith(TEMPORARY):
            store.remove_folder(f"{FOLDER}/{name}")  # unless a living report has it
    for rounds_left in reversed(range(_MAX_ROUNDS)):
        snapshot = Snapshot.take(corpus)
        try:
            with store.scratch(FOLDER, "ledgers") as folder:
                pinned = snapshot.pinned(f"{folder}/own")
                with Ledgers.open(corpus, pinned, limits) as ledgers:
                    found = numbers(corpus, ledgers, datetime.now(UTC))
                    chosen = examples(corpus, ledgers)
                    if other is not None:
                        found["comparison"] = compare_with(ledgers, other, f"{folder}/other")
        except (duckdb.Error, OSError, CorpusChangedError) as error:
            # A commit that has just been settled renamed its files; the shard is still the same.
            may_be_renamed = isinstance(error, CorpusChangedError) and rounds_left > 0
            if not may_be_renamed and not snapshot.has_changed(corpus):
                if isinstance(error, duckdb.Error):
                    raise ReportError(
                        f"a ledger cannot be read: {error}; `capfilt verify` says what to do"
                    ) from error
                raise
            _log.info("the corpus changed while it was read (%s); looking again", error)
            continue
        if pinned.is_pinned or not snapshot.has_changed(corpus):
            return found, chosen
    raise CorpusChangedError(
        f"{corpus.root}: its shards keep being replaced; report again when the job is through"
    )


def write_file(corpus: Corpus, name: str, text: str) -> str:
    """Put a file of the report at once, and return where it is."""
    store = corpus.store
    store.make_folder(FOLDER)
    with store.scratch(FOLDER, name) as folder:
        path = f"{folder}/{name}"
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
        store.upload(path, f"{FOLDER}/{name}")
        if store.is_local:
            os.chmod(store.full(f"{FOLDER}/{name}"), 0o644)
    return f"{corpus.root}/{FOLDER}/{name}"
