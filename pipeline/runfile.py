"""run.yaml: what a corpus was made with, written once and compared when a run is resumed.

The text is the caller's (YAML is for jobs/); here it is sealed with a hash in a last comment line,
so that a changed byte shows and the file stays YAML.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

_SEAL = "# sha256: "


class RunFileError(Exception):
    """run.yaml is damaged."""


class FingerprintError(Exception):
    """A corpus is to be resumed with a recipe other than the one that began it."""

    def __init__(self, differences: Mapping[str, tuple[Any, Any]]) -> None:
        lines = [
            f"  {key}: {_shown(old)} in run.yaml, {_shown(new)} now"
            for key, (old, new) in differences.items()
        ]
        super().__init__(
            "this corpus was begun with another recipe:\n" + "\n".join(lines) + "\n"
            "Set these back, or write to another root; a corpus never mixes recipes."
        )
        self.differences = dict(differences)


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def seal(text: str) -> bytes:
    """Return the file's bytes: the text and a comment with its hash."""
    body = (text if text.endswith("\n") else text + "\n").encode()
    return body + f"{_SEAL}{hashlib.sha256(body).hexdigest()}\n".encode()


def unseal(data: bytes) -> str:
    """Return the text that was sealed, with a line end. Raises RunFileError if a byte changed."""
    body = data[: data.rstrip(b"\n").rfind(b"\n") + 1]
    expected = f"{_SEAL}{hashlib.sha256(body).hexdigest()}\n".encode()
    if data[len(body) :] != expected:
        raise RunFileError(
            "run.yaml does not match the hash in its last line; it was changed after the run "
            "began. Put the original back, or delete it and resume with the same recipe"
        )
    return body.decode()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key; lists and empty mappings are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def check_same(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Return if two recipes are equal. Raises FingerprintError that names each differing key."""
    old, new = flatten(stored), flatten(current)
    differences = {
        key: (old.get(key, ABSENT), new.get(key, ABSENT))
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ABSENT) != new.get(key, ABSENT)
    }
    if differences:
        raise FingerprintError(differences)


def _shown(value: object) -> str:
    return repr(value)
