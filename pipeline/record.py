"""The marker of a shard: what it commits, how many rows became what, and what made it.

A marker has one byte sequence for one content and carries its own hash, so any changed byte shows.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.layout import check_shard, check_suffix
from pipeline.sample import Verdict, canonical_json

_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class RecordError(ValueError):
    """A marker that is damaged or is not this shard's."""


class FileRecord(BaseModel):
    """What one committed file holds."""

    model_config = _STRICT

    bytes: _Count
    sha256: _Sha256


class Counts(BaseModel):
    """How many rows were kept, dropped and lost, by reason."""

    model_config = _STRICT

    kept: _Count = 0
    dropped: dict[str, _Positive] = Field(default_factory=dict)
    failed: dict[str, _Positive] = Field(default_factory=dict)

    @property
    def total(self) -> int:
        """Every row, whatever became of it."""
        return self.kept + sum(self.dropped.values()) + sum(self.failed.values())

    @classmethod
    def of(cls, tally: Mapping[tuple[str, str], int]) -> Self:
        """Sum a tally of (verdict, reason). Raises ValueError for a verdict that is none."""
        kept = 0
        reasons: dict[Verdict, Counter[str]] = {
            Verdict.DROPPED: Counter(),
            Verdict.FAILED: Counter(),
        }
        for (verdict, reason), count in tally.items():
            if Verdict(verdict) is Verdict.KEPT:
                kept += count
            else:
                reasons[Verdict(verdict)][reason] += count
        return cls(
            kept=kept, dropped=dict(reasons[Verdict.DROPPED]), failed=dict(reasons[Verdict.FAILED])
        )


class ShardRecord(BaseModel):
    """A committed shard. Holds no time and no host: the same shard has the same record."""

    model_config = _STRICT

    format: Literal[1] = 1
    stage: str
    source: str
    index: _Count
    rows_in: _Count
    counts: Counts
    stats: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str
    inputs: _Sha256 | None = None  # the sha256 of the upstream shard's record
    files: dict[str, FileRecord]
    sha256: str = ""  # of the marker's bytes as they are with this empty

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        check_shard(self.stage, self.source, self.index)
        for suffix in self.files:
            check_suffix(suffix)
        if self.rows_in != self.counts.total:
            raise ValueError(
                f"{self.rows_in} rows went in, {self.counts.total} were kept, dropped or failed"
            )
        return self

    @property
    def name(self) -> str:
        """What messages call the shard, and its path below the root without a suffix."""
        return f"{self.stage}/{self.source}/{self.index:05d}"

    def sealed(self) -> Self:
        """Return the record with its hash filled in."""
        unsealed = self.model_copy(update={"sha256": ""}).to_bytes()
        return self.model_copy(update={"sha256": hashlib.sha256(unsealed).hexdigest()})

    def to_bytes(self) -> bytes:
        """Return the content of the marker file."""
        return (canonical_json(self.model_dump(), indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the record a marker holds. Raises RecordError if a single byte is not right."""
        try:
            record = cls.model_validate(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not a marker: {' '.join(str(error).split())[:300]}") from error
        # Hashing what was read, rather than writing it again, halves the time of listing a corpus.
        unsealed = data.replace(record.sha256.encode(), b"")
        if record.sha256 != hashlib.sha256(unsealed).hexdigest():
            raise RecordError("its own hash does not match its content")
        return record
