"""What selecting came to: images, captions and reasons, for people to read and for markers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.record import Counts
from pipeline.sample import Verdict

_NUM_CAUSES_SHOWN = 8


@dataclass(slots=True)
class SelectionOutcome:
    """What a shard, or any number of them, came to."""

    num_rows: int = 0
    num_kept: int = 0  # with a caption, in the clean shard
    causes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows that were not kept, by verdict and reason; those of earlier stages too."""
    captions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Captions by origin and reason; the reason of kept ones is empty."""
    masked: Counter[str] = field(default_factory=Counter)
    """Captions in which something was masked, by what it was."""
    image_bytes: int = 0  # of kept images
    elapsed_seconds: float = 0.0

    def add_rows(self, counts: Counts) -> None:
        """Count in what became of a shard's rows."""
        self.num_rows += counts.total
        self.num_kept += counts.kept
        for verdict in (Verdict.DROPPED, Verdict.FAILED):
            for reason, number in getattr(counts, verdict.value).items():
                self.causes[verdict.value, reason] += number

    def add_captions(self, captions: Counter[tuple[str, str]], masked: Counter[str]) -> None:
        """Count in some captions by origin and reason, and what was masked in them."""
        self.captions.update(captions)
        self.masked.update(masked)

    def merge(self, other: "SelectionOutcome", *, is_parallel: bool = False) -> None:
        """Count in another outcome.

        `is_parallel` says that both ran at the same time, so that their times do not add up.
        """
        self.num_rows += other.num_rows
        self.num_kept += other.num_kept
        self.causes.update(other.causes)
        self.captions.update(other.captions)
        self.masked.update(other.masked)
        self.image_bytes += other.image_bytes
        times = (self.elapsed_seconds, other.elapsed_seconds)
        self.elapsed_seconds = max(times) if is_parallel else sum(times)

    def stats(self) -> dict[str, Any]:
        """Return the counts of captions as a shard's marker holds them: the same for its bytes."""
        kept: dict[str, int] = {}
        dropped: dict[str, dict[str, int]] = {}
        for (origin, reason), count in self.captions.items():
            if reason:
                dropped.setdefault(reason, {})[origin] = count
            else:
                kept[origin] = count
        return {"kept": kept, "dropped": dropped, "masked": dict(self.masked)}

    def lines(self) -> Iterator[str]:
        """Yield a summary for people: images, then captions, then why others were dropped."""
        rate = self.num_rows / self.elapsed_seconds if self.elapsed_seconds else 0.0
        yield (
            f"{self.num_rows:,} rows, {self.num_kept:,} kept with "
            f"{sum(n for (_, reason), n in self.captions.items() if not reason):,} captions in "
            f"{self.elapsed_seconds:.1f} s ({rate:,.0f} rows a second), "
            f"{self.image_bytes / 2**20:.1f} MiB of images"
        )
        for (verdict, reason), count in self.causes.most_common(_NUM_CAUSES_SHOWN):
            yield f"  {count:,} {verdict}: {reason}"
        for (origin, reason), count in sorted(self.captions.items()):
            yield f"  {count:,} {origin} captions {reason or 'kept'}"
        for what, count in sorted(self.masked.items()):
            yield f"  {count:,} captions had {what} masked"
