"""Warnings that matter: what a person should look at before the run has wasted a night.

Pure: each rule looks at counts and says one sentence, or nothing.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from pipeline.download_outcome import DownloadOutcome

_WINDOW_ROWS = 500  # the least that a share of rows kept is judged by
_COLLAPSED = 0.25  # of the share before
_HOPELESS_SHARE = 0.05


@dataclass
class SuccessRate:
    """Watches the share of rows that a download keeps, shard by shard."""

    window: deque[tuple[int, int, Counter[str]]] = field(default_factory=deque)
    rows_before: int = 0
    kept_before: int = 0

    def add(self, outcome: DownloadOutcome) -> str | None:
        """Count in a shard; return a warning when the share has collapsed."""
        total = outcome.total
        if not total.num_rows:
            return None
        reasons = Counter({reason: n for (_, reason), n in total.causes.items()})
        self.window.append((total.num_rows, total.num_kept, reasons))
        while sum(rows for rows, _, _ in self.window) - self.window[0][0] >= _WINDOW_ROWS:
            rows, kept, _ = self.window.popleft()
            self.rows_before += rows
            self.kept_before += kept
        return self._judge()

    def _judge(self) -> str | None:
        rows = sum(rows for rows, _, _ in self.window)
        if rows < _WINDOW_ROWS:
            return None
        share = sum(kept for _, kept, _ in self.window) / rows
        before = self.kept_before / self.rows_before if self.rows_before else None
        has_collapsed = before is not None and share < _COLLAPSED * before
        if not has_collapsed and share >= _HOPELESS_SHARE:
            return None
        reasons: Counter[str] = Counter()
        for _, _, each in self.window:
            reasons.update(each)
        reason, count = reasons.most_common(1)[0] if reasons else ("none", 0)
        was = "" if before is None else f", {before:.0%} before"
        return (
            f"download: {share:.0%} of the last {rows:,} rows kept{was}; {count:,} ended as "
            f'"{reason}". Is the resolver overloaded, or are we blocked? Stop, mend it, '
            "and `capfilt retry` visits those rows again"
        )


def starved(stage: str, above: str, *, num_ready: int, busy: float, wait: float) -> str | None:
    """Warn of a stage with GPUs that mostly waits for shards; times are seconds of a while."""
    total = busy + wait
    if num_ready or total < 60 or wait < 0.5 * total:
        return None
    return (
        f"{stage}: its GPUs waited {wait / total:.0%} of the time for shards of {above}; give "
        f"{above} more CPU actors (run.{above}.max_actors)"
    )


def decoding(stage: str, *, waits: float, busy: float) -> str | None:
    """Warn of GPUs that wait for images to be decoded; `waits` is within `busy`, in seconds."""
    if busy < 60 or waits < 0.3 * busy:
        return None
    return (
        f"{stage}: its GPUs waited {waits / busy:.0%} of the time for decoded images; give each "
        f"actor more CPU (run.{stage}.num_cpus, {stage}.num_decoders)"
    )


def unplaced(stage: str, *, seconds: float, wants: str) -> str | None:
    """Warn of a stage that has had work but no place for an actor for a while."""
    if seconds < 60:
        return None
    return (
        f"{stage}: no actor has found a place for {seconds:,.0f} s; each wants {wants}. Does the "
        "cluster have such nodes, or is it still starting them?"
    )
