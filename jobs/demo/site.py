"""The server's side of a web: the bytes of all pages in one file, and an index of them.

One file, because making thousands of small ones takes longer than drawing what they show.
"""

import json
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path

from jobs.demo.answers import Page
from jobs.demo.behaviours import Behaviour

_INDEX = "site.json"
_FILES = "files.bin"


def write_site(root: Path, pages: Iterable[tuple[str, bytes, str, Behaviour]]) -> None:
    """Write pages given as (path, bytes, content type, behaviour); the paths differ."""
    index, offset = {}, 0
    with (root / _FILES).open("wb") as files:
        for path, data, content_type, behaviour in pages:
            files.write(data)
            index[path] = astuple(Page(offset, len(data), content_type, behaviour))
            offset += len(data)
    (root / _INDEX).write_text(json.dumps(index, indent=0), encoding="utf-8")


def read_site(root: Path) -> dict[str, Page]:
    """Return the pages by path. Raises FileNotFoundError where no web was built."""
    file = root / _INDEX
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: {root} holds no web; make one with build_web")
    return {
        path: Page(offset, num_bytes, content_type, Behaviour(behaviour))
        for path, (offset, num_bytes, content_type, behaviour) in json.loads(
            file.read_text(encoding="utf-8")
        ).items()
    }


def files_of(root: Path) -> Path:
    """Return the file that `Page.offset` points into."""
    return root / _FILES
