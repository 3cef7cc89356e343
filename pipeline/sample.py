"""What flows: an image with its captions and metadata, how it was judged, and its files in a tar.

A sample is three members of a shard: `key.jpg` (the image's bytes, untouched), `key.json` (metadata
and every caption with its scores) and `key.txt` (the first caption, for readers of webdatasets).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn

JSON_EXTENSION, TEXT_EXTENSION = "json", "txt"
CAPTIONS_FIELD = "captions"


class SampleError(Exception):
    """Drops one sample: `reason` is the machine-readable word that the ledger counts it under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


class ShardError(Exception):
    """Fails one shard; the run goes on with the others."""


class Verdict(StrEnum):
    """What became of one row: in the output, left out on purpose, or lost to a fault."""

    KEPT = "kept"
    DROPPED = "dropped"
    FAILED = "failed"


class Origin(StrEnum):
    """Who wrote a caption: the page the image came from, a captioner, or an annotator."""

    WEB = "web"
    SYNTHETIC = "synthetic"
    HUMAN = "human"


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """One description of an image, with whatever scores it has been given."""

    text: str
    origin: Origin
    index: int = 0  # which of the image's captions of this origin
    seed: int | None = None  # what a synthetic caption was sampled with
    scores: Mapping[str, float] = field(default_factory=dict)  # by name: itm, itc, clip

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; absent ones are left out."""
        fields: dict[str, Any] = {"text": self.text, "origin": self.origin.value}
        if self.index:
            fields["index"] = self.index
        if self.seed is not None:
            fields["seed"] = self.seed
        if self.scores:
            fields["scores"] = dict(self.scores)
        return fields

    @classmethod
    def from_json(cls, fields: object) -> "Caption":
        """Return the caption these JSON values describe.

        Raises ValueError where they do not describe one.
        """
        if not isinstance(fields, dict):
            raise ValueError(f"a caption is an object, not {type(fields).__name__}")
        unknown = fields.keys() - {"text", "origin", "index", "seed", "scores"}
        text, origin = fields.get("text"), fields.get("origin")
        index, seed = fields.get("index", 0), fields.get("seed")
        scores = fields.get("scores", {})
        if unknown or not isinstance(text, str) or not isinstance(origin, str):
            raise ValueError("a caption has text and origin, and may have index, seed and scores")
        if not _are_scores(scores):
            raise ValueError("a caption's scores are numbers by name")
        if type(index) is not int or not (seed is None or type(seed) is int):
            raise ValueError("a caption's index and seed are integers")
        return cls(text=text, origin=Origin(origin), index=index, seed=seed, scores=scores)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image, its captions (the best first) and what else is known of it."""

    key: str
    image: bytes
    extension: str = "jpg"
    captions: tuple[Caption, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def to_members(self) -> dict[str, bytes]:
        """Return the bytes of each file by its extension, the same bytes for the same sample.

        Raises SampleError where a text or a value cannot be stored so that it is read back equal.
        """
        if self.extension in (JSON_EXTENSION, TEXT_EXTENSION):
            raise ValueError(
                f'"{self.extension}" is taken by the captions; name the image\'s format'
            )
        if CAPTIONS_FIELD in self.metadata:
            raise ValueError(f'"{CAPTIONS_FIELD}" in metadata would hide the captions; rename it')
        fields = {
            **self.metadata,
            CAPTIONS_FIELD: [caption.to_json() for caption in self.captions],
        }
        members = {self.extension: self.image, JSON_EXTENSION: self._encode_json(fields)}
        if self.captions:
            members[TEXT_EXTENSION] = self._encode(self.captions[0].text)
        return members

    def _encode_json(self, fields: Mapping[str, Any]) -> bytes:
        try:
            return self._encode(canonical_json(fields))
        except (TypeError, ValueError, RecursionError) as error:
            raise SampleError(
                "bad_metadata", f"sample {self.key}: metadata cannot be stored as JSON: {error}"
            ) from error

    def _encode(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise SampleError(
                "bad_text",
                f"sample {self.key}: character {error.start} of a text is half of a surrogate "
                "pair, which UTF-8 cannot hold",
            ) from error

    @classmethod
    def from_members(cls, key: str, members: Mapping[str, bytes]) -> "Sample":
        """Return the sample that these files, by extension, make up.

        Without a list of captions in the JSON (other people's webdatasets) the text file is taken
        as the web caption. Raises SampleError.
        """
        images = members.keys() - {JSON_EXTENSION, TEXT_EXTENSION}
        if len(images) != 1:
            _reject(key, "no_single_image", f"it has {len(images)} images ({sorted(images)})")
        extension = images.pop()
        metadata = _read_json(key, members.get(JSON_EXTENSION, b"{}"))
        text = members.get(TEXT_EXTENSION)
        stored = metadata.pop(CAPTIONS_FIELD, None)
        return cls(
            key=key,
            image=members[extension],
            extension=extension,
            captions=_read_captions(key, stored, text),
            metadata=metadata,
        )


def canonical_json(value: object, indent: int | None = None) -> str:
    """Return the one JSON text of a value: keys sorted, Unicode as it is, no NaN.

    Raises TypeError or ValueError for what JSON cannot hold.
    """
    return (_COMPACT if indent is None else _encoder(indent)).encode(value)


def _encoder(indent: int | None) -> json.JSONEncoder:
    return json.JSONEncoder(
        sort_keys=True,
        ensure_ascii=False,
        allow_nan=False,
        indent=indent,
        separators=(",", ":") if indent is None else (",", ": "),
    )


_COMPACT = _encoder(None)  # made once: every sample is encoded by it


def _are_scores(scores: object) -> bool:
    return isinstance(scores, dict) and all(type(s) in (int, float) for s in scores.values())


def _reject(key: str, reason: str, problem: str) -> NoReturn:
    raise SampleError(reason, f'sample {key}: {problem}; dropped as "{reason}"')


def _read_json(key: str, data: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _reject(key, "bad_metadata", f"its JSON cannot be read ({error})")
    if not isinstance(metadata, dict):
        _reject(key, "bad_metadata", f"its JSON is a {type(metadata).__name__}, not an object")
    return metadata


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read_captions(key: str, stored: object, text: bytes | None) -> tuple[Caption, ...]:
    if stored is None:
        if text is None:
            return ()
        try:
            return (Caption(text=text.decode(), origin=Origin.WEB),)
        except UnicodeDecodeError as error:
            _reject(key, "bad_text", f"its caption is not UTF-8 ({error})")
    if not isinstance(stored, list):
        _reject(key, "bad_metadata", f"its captions are a {type(stored).__name__}, not a list")
    try:
        captions = tuple(Caption.from_json(caption) for caption in stored)
        for caption in captions:
            caption.text.encode()  # JSON can spell half a surrogate pair; nothing could store it
        return captions
    except ValueError as error:
        _reject(key, "bad_metadata", f"one of its captions cannot be read ({error})")
