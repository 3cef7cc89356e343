"""The columns a table must have, and what to say when it has not."""

import difflib
from collections.abc import Sequence

from pipeline.sources.config import SourceConfig
from pipeline.sources.rows import SourceError


def wanted_columns(config: SourceConfig) -> list[str]:
    """Return the columns that are read: URL, caption when there is one, then the extra ones."""
    caption = [] if config.caption_column is None else [config.caption_column]
    return [config.url_column, *caption, *config.extra_columns]


def check_columns(config: SourceConfig, file: str, names: Sequence[str]) -> None:
    """Raise SourceError when a table lacks a column, with the name that comes nearest."""
    for wanted in wanted_columns(config):
        if wanted not in names:
            raise SourceError(f"{file}: no column {wanted!r}{column_hint(wanted, names)}")
        if list(names).count(wanted) > 1:
            raise SourceError(f"{file}: column {wanted!r} stands there more than once")


def column_hint(wanted: str, names: Sequence[str]) -> str:
    """Return "; did you mean ..." with the name that comes nearest, or what names there are."""
    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(wanted.lower(), folded, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {folded[near[0]]!r}?"
    shown = ", ".join(repr(name[:40]) for name in names[:20])
    return f"; the file has {shown or 'no columns'}"
