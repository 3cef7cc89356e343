"""Where things stand in a corpus: stages, sources, and the names of a shard's files."""

import re
from dataclasses import dataclass

STAGES = ("raw", "captions", "clean")
UPSTREAM = {"captions": "raw", "clean": "captions"}  # whose marker a shard's `inputs` names
MARKER = "json"
RUN_FILE = "run.yaml"
TEMPORARY = "."  # what the names of unfinished files and folders begin with

_SOURCE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SUFFIX = re.compile(r"[a-z][a-z0-9]{0,15}")
_NAME = re.compile(r"(\d{5,})\.([a-z][a-z0-9]{0,15})(?:\.([0-9a-f]{16}))?")
_TEMPORARY = re.compile(r"\.\d{5,}\.[a-z0-9_.]+|\.run\.yaml\.[a-z0-9_.]+")


@dataclass(frozen=True, slots=True)
class FileName:
    """One of a shard's files; `digest` is there while the file has its staging name."""

    index: int
    suffix: str
    digest: str | None


def check_shard(stage: str, source: str, index: int = 0) -> None:
    """Return if a shard may be called so. Raises ValueError."""
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
    if not is_source(source):
        raise ValueError(f"source {source!r} is not of a-z, 0-9, _ and -, at most 64 of them")
    if index < 0:
        raise ValueError(f"shard {index} is negative")


def is_source(name: str) -> bool:
    """Say whether a source may be called so."""
    return _SOURCE.fullmatch(name) is not None


def check_suffix(suffix: str) -> None:
    """Return if a shard may have such a file. Raises ValueError."""
    if not _SUFFIX.fullmatch(suffix) or suffix == MARKER:
        raise ValueError(f"suffix {suffix!r} is not of a-z and 0-9, or is the marker's")


def final_name(index: int, suffix: str) -> str:
    """Return the name that a committed file ends up with."""
    return f"{index:05d}.{suffix}"


def staging_name(index: int, suffix: str, sha256: str) -> str:
    """Return the name a file has until its commit is settled; it names the content."""
    return f"{final_name(index, suffix)}.{sha256[:16]}"


def parse_name(name: str) -> FileName | None:
    """Return what a name in a source's folder stands for, or None if it is not ours."""
    found = _NAME.fullmatch(name)
    if not found or f"{int(found[1]):05d}" != found[1]:
        return None
    return FileName(int(found[1]), found[2], found[3])


def is_temporary(name: str) -> bool:
    """Say whether a name is that of a file or folder of ours that a writer had not finished."""
    return _TEMPORARY.fullmatch(name) is not None
