"""What a run came to, for people, for machines, and as an exit code."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.download import ShardDownload
from pipeline.download_outcome import DownloadOutcome

DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130


@dataclass
class RunSummary:
    """Counts of shards and rows, and what went wrong."""

    num_done: int = 0
    """Shards that exist now, those of earlier runs included."""
    num_new: int = 0
    """Shards that this run made or replaced."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a shard could not be made, by its name."""
    outcome: DownloadOutcome = field(default_factory=DownloadOutcome)
    is_stopped: bool = False

    def add(self, done: ShardDownload) -> None:
        """Count in one shard."""
        self.num_done += 1
        self.num_new += done.is_new
        self.outcome.merge(done.outcome)

    @property
    def exit_code(self) -> int:
        """0 when all is done, 1 when shards failed, 130 when it was asked to stop."""
        if self.is_stopped:
            return INTERRUPTED
        return SOME_FAILED if self.failures else DONE

    def text(self, again: str) -> str:
        """Return the summary for people; `again` is the command line that continues."""
        return "\n".join(self._lines(again))

    def _lines(self, again: str) -> Iterator[str]:
        if self.num_new:
            yield from self.outcome.lines()
        for name, problem in self.failures.items():
            yield f"failed {name}: {problem}"
        yield f"{self.num_done:,} shards done, {self.num_new:,} of them now"
        if self.failures:
            yield f"{len(self.failures):,} shards failed; to try them again: {again}"
        if self.is_stopped:
            yield f"stopped between two rows; to continue: {again}"

    def to_json(self) -> dict[str, Any]:
        """Return the same for machines; times are seconds, sizes bytes."""
        total = self.outcome.total
        return {
            "shards_done": self.num_done,
            "shards_new": self.num_new,
            "shards_failed": self.failures,
            "is_stopped": self.is_stopped,
            "rows": total.num_rows,
            "kept": total.num_kept,
            "not_kept": {f"{v}: {r}": n for (v, r), n in sorted(total.causes.items())},
            "downloaded_bytes": total.num_bytes,
            "stored_bytes": self.outcome.stored_bytes,
            "elapsed_seconds": round(self.outcome.elapsed_seconds, 3),
        }
