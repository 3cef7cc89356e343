"""The server's own list of its pages, one JSON file: all that it knows of the plan."""

import json
from collections.abc import Mapping
from pathlib import Path

from jobs.demo.answers import Page
from jobs.demo.behaviours import Behaviour

_FILE_NAME = "site.json"


def write_site(root: Path, pages: Mapping[str, Page]) -> None:
    """Write which path serves which file how."""
    table = {path: [page.file, page.content_type, page.behaviour] for path, page in pages.items()}
    (root / _FILE_NAME).write_text(json.dumps(table, indent=0), encoding="utf-8")


def read_site(root: Path) -> dict[str, Page]:
    """Return the pages by path. Raises FileNotFoundError where no web was built."""
    file = root / _FILE_NAME
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: {root} holds no web; make one with build_web")
    table = json.loads(file.read_text(encoding="utf-8"))
    return {
        path: Page(name, content_type, Behaviour(behaviour))
        for path, (name, content_type, behaviour) in table.items()
    }
