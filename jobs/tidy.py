"""One look at every folder of a corpus: what crashes left over is swept, what exists is returned.

A sweep reads every marker; most runs begin and end on a corpus where there is nothing to sweep,
which listings alone show.
"""

from typing import Any

from pipeline.corpus import Corpus
from pipeline.layout import MARKER, STAGES, is_temporary, parse_name
from pipeline.store import Listing

Tags = dict[tuple[str, str], dict[int, str]]


def tidy(corpus: Corpus) -> Tags:
    """Sweep the stages in which something may be left over.

    Returns the markers that are there, by stage and source: for each index the store's own tag of
    its content (ETag), empty where it has none.
    """
    tags: Tags = {}
    for stage in STAGES:
        is_swept = True
        for source in corpus.sources(stage):
            listing, tags[stage, source] = look(corpus, stage, source)
            is_swept = is_swept and not has_leftovers(listing)
        if not is_swept:
            corpus.sweep(stage)
    for name in filter(is_temporary, corpus.store.list("").sizes):
        corpus.store.remove(name)
    return tags


def look(corpus: Corpus, stage: str, source: str) -> tuple[Listing, dict[int, str]]:
    """Return what a source's folder holds, and the store's tag of each marker by index."""
    store, path = corpus.store, corpus.store.full(f"{stage}/{source}")
    listing, tags = Listing({}, []), dict[int, str]()
    store.fs.invalidate_cache(path)
    try:
        infos: list[dict[str, Any]] = store.fs.ls(path, detail=True)
    except FileNotFoundError:
        return listing, tags
    for info in infos:
        name = str(info["name"]).rstrip("/").rsplit("/", 1)[-1]
        if info["type"] == "directory":
            listing.folders.append(name)
            continue
        listing.sizes[name] = info["size"]
        parsed = parse_name(name)
        if parsed is not None and parsed.suffix == MARKER and not parsed.digest:
            tags[parsed.index] = str(info.get("ETag", "")).strip('"')
    return listing, tags


def has_leftovers(folder: Listing) -> bool:
    """Say whether a source's folder holds anything but whole shards under their final names."""
    if any(map(is_temporary, [*folder.folders, *folder.sizes])):
        return True
    names = [name for name in map(parse_name, folder.sizes) if name is not None]
    if any(name.digest for name in names):
        return True
    committed = {name.index for name in names if name.suffix == MARKER}
    return any(name.index not in committed for name in names)
