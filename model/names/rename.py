"""Two-way renaming of weights by a table of patterns, so that a format is a list one can read."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rename:
    """One line of a table: `{}` stands for a layer number or a suffix and is kept as it is.

    `Rename("text.layers.{}.ffn.up.{}", "encoder.layer.{}.intermediate.dense.{}")`
    """

    ours: str
    theirs: str

    def __post_init__(self) -> None:
        if self.ours.count("{}") != self.theirs.count("{}"):
            raise ValueError(f"{self.ours!r} and {self.theirs!r} differ in their number of {{}}")


def to_theirs(name: str, table: Sequence[Rename]) -> str | None:
    """Return the other format's name for ours, or None when no line of the table matches."""
    return _translate(name, ((line.ours, line.theirs) for line in table))


def to_ours(name: str, table: Sequence[Rename]) -> str | None:
    """Return our name for the other format's, or None when no line of the table matches."""
    return _translate(name, ((line.theirs, line.ours) for line in table))


def _translate(name: str, lines: Iterable[tuple[str, str]]) -> str | None:
    for source, target in lines:
        pattern = "(.+)".join(re.escape(part) for part in source.split("{}"))
        if found := re.fullmatch(pattern, name):
            return target.format(*found.groups())
    return None
