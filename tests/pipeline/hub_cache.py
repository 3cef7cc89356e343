"""A cache of the hub as `hf download` leaves it, so that names and revisions work without one."""

import shutil
from pathlib import Path


def put(cache, name, commits, *, main):
    """Lay snapshots of a repository out: `commits` are folders by commit, `main` one of them."""
    repository = Path(cache) / f"models--{name.replace('/', '--')}"
    for commit, folder in commits.items():
        shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(main)
