"""What scoring came to: images, captions and where the time went, for people to read.

Times live here and in the log, not in the corpus, for no two runs agree on them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.sample import Verdict

_NUM_CAUSES_SHOWN = 5


@dataclass(slots=True)
class ScoreTimes:
    """Seconds by what was done; reading and decoding go on beside the rest, on other threads."""

    read: float = 0.0  # tar and ledger, on one thread
    decode: float = 0.0  # images made ready for the models, summed over threads
    wait: float = 0.0  # the models had nothing to do: the next image was not ready
    caption: float = 0.0  # images encoded and captions generated
    score: float = 0.0  # images and texts encoded and compared
    write: float = 0.0  # rows, hash and commit

    def add(self, other: "ScoreTimes") -> None:
        """Add the seconds of another."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(slots=True)
class ScoreOutcome:
    """What a shard, or any number of them, came to."""

    num_images: int = 0
    num_kept: int = 0  # with a caption that was scored
    causes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows that were not scored, by verdict and reason: images, and single captions."""
    captions: Counter[str] = field(default_factory=Counter)
    """Captions that were scored, by origin."""
    times: ScoreTimes = field(default_factory=ScoreTimes)
    elapsed_seconds: float = 0.0
    batch_size: int = 0  # in the end
    num_out_of_memory: int = 0  # how often the batch was halved

    @property
    def images_per_second(self) -> float:
        """Images per second of wall time, whatever became of them."""
        return self.num_images / self.elapsed_seconds if self.elapsed_seconds else 0.0

    @property
    def shares(self) -> dict[str, float]:
        """What each kind of work took of the wall time.

        Wait, caption, score and write do not overlap and come to nearly 1; read and decode overlap
        with them, and decode is divided by nothing: with two decoders it can reach 2.
        """
        wall = self.elapsed_seconds
        return {
            each.name: getattr(self.times, each.name) / wall if wall else 0.0
            for each in fields(self.times)
        }

    def add_image(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count in one image by its rows of the sidecar."""
        self.num_images += 1
        scored = [row["origin"] for row in rows if row["verdict"] == Verdict.KEPT]
        self.num_kept += bool(scored)
        self.captions.update(scored)
        self.causes.update(
            (str(row["verdict"]), row["reason"]) for row in rows if row["verdict"] != Verdict.KEPT
        )

    def merge(self, other: "ScoreOutcome", *, is_parallel: bool = False) -> None:
        """Count in another outcome.

        `is_parallel` says that both ran at the same time, so that their times do not add up.
        """
        self.num_images += other.num_images
        self.num_kept += other.num_kept
        self.causes.update(other.causes)
        self.captions.update(other.captions)
        self.times.add(other.times)
        times = (self.elapsed_seconds, other.elapsed_seconds)
        self.elapsed_seconds = max(times) if is_parallel else sum(times)
        self.batch_size = min(filter(None, (self.batch_size, other.batch_size)), default=0)
        self.num_out_of_memory += other.num_out_of_memory

    def lines(self) -> Iterator[str]:
        """Yield a summary for people: what came of the images, and where the time went."""
        scored = ", ".join(f"{n:,} {origin}" for origin, n in sorted(self.captions.items()))
        yield f"{self.num_images:,} images, {self.num_kept:,} with captions ({scored or 'none'})"
        for (verdict, reason), count in self.causes.most_common(_NUM_CAUSES_SHOWN):
            yield f"  {count:,} {verdict}: {reason}"
        halved = f", halved {self.num_out_of_memory} times" if self.num_out_of_memory else ""
        yield (
            f"{self.elapsed_seconds:.1f} s ({self.images_per_second:.2f} images a second), batch "
            f"of {self.batch_size}{halved}"
        )
        yield "  " + ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
