"""Counts per bin, and the percentiles they hold: exact to the width of a bin, whatever the size."""

from collections.abc import Iterable, Mapping
from typing import Any

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def percentile(counts: Mapping[int, int], share: float) -> int | None:
    """Return the bin of the value at this rank: the first with `share` of all at or below it."""
    total = sum(counts.values())
    reached = 0
    for position in sorted(counts):
        reached += counts[position]
        if reached >= share * total:
            return position
    return None


def summary(counts: Mapping[int, int], width: float = 1) -> dict[str, Any]:
    """Return count and percentiles of binned values; a bin stands for its lower edge."""
    found = {p: percentile(counts, p / 100) for p in PERCENTILES}
    return {
        "count": sum(counts.values()),
        "percentiles": {
            f"p{p}": None if position is None else _rounded(position * width)
            for p, position in found.items()
        },
    }


def _rounded(value: float) -> float:
    return round(value, 6)


def coarser(counts: Mapping[int, int], factor: int) -> dict[int, int]:
    """Return the counts in bins that are `factor` times as wide."""
    merged: dict[int, int] = {}
    for position in sorted(counts):
        merged[position // factor] = merged.get(position // factor, 0) + counts[position]
    return merged


def as_pairs(counts: Mapping[int, int]) -> list[list[int]]:
    """Return [bin, count] in order of bins; the empty ones are left out."""
    return [[position, counts[position]] for position in sorted(counts)]


def collect(rows: Iterable[tuple[Any, ...]]) -> dict[tuple[Any, ...], dict[int, int]]:
    """Return histograms of (*group, bin, count) by group."""
    found: dict[tuple[Any, ...], dict[int, int]] = {}
    for *group, position, count in rows:
        counts = found.setdefault(tuple(group), {})
        counts[position] = counts.get(position, 0) + count
    return found


def merged(parts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """Return the sum of histograms."""
    total: dict[int, int] = {}
    for part in parts:
        for position, count in part.items():
            total[position] = total.get(position, 0) + count
    return total
