"""Whether crashes left anything in a corpus, seen from listings alone, and its removal if so.

A sweep reads every marker; most runs begin and end on a corpus where there is nothing to sweep.
"""

from pipeline.corpus import Corpus
from pipeline.layout import MARKER, STAGES, is_temporary, parse_name
from pipeline.store import Listing


def tidy(corpus: Corpus) -> None:
    """Sweep the stages in which something may be left over."""
    for stage in STAGES:
        folders = (corpus.store.list(f"{stage}/{source}") for source in corpus.sources(stage))
        if any(map(has_leftovers, folders)):
            corpus.sweep(stage)
    for name in filter(is_temporary, corpus.store.list("").sizes):
        corpus.store.remove(name)


def has_leftovers(folder: Listing) -> bool:
    """Say whether a source's folder holds anything but whole shards under their final names."""
    if any(map(is_temporary, [*folder.folders, *folder.sizes])):
        return True
    names = [name for name in map(parse_name, folder.sizes) if name is not None]
    if any(name.digest for name in names):
        return True
    committed = {name.index for name in names if name.suffix == MARKER}
    return any(name.index not in committed for name in names)
