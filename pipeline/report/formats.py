"""Numbers as people read them; a number that is not there is a dash."""

from collections.abc import Callable, Iterable
from typing import Any

ABSENT = "–"
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def count(value: float | None) -> str:
    """Return a whole number with thousands apart."""
    return ABSENT if value is None else f"{value:,.0f}"


def share(part: float | None, whole: float | None) -> str:
    """Return part of whole in percent; a share that is not all or nothing never looks like it."""
    if part is None or not whole:
        return ABSENT
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "<0.1%"
    if 99.9 < percent < 100:
        return ">99.9%"
    return f"{percent:.1f}%"


def score(value: float | None) -> str:
    """Return a score to three digits."""
    return ABSENT if value is None else f"{value:.3f}"


def size(num_bytes: float | None) -> str:
    """Return bytes in the unit that fits."""
    if num_bytes is None:
        return ABSENT
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"


def duration(seconds: float | None) -> str:
    """Return a length of time in its two largest units."""
    if seconds is None:
        return ABSENT
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def moment(text: str | None) -> str:
    """Return an ISO time to the minute."""
    return ABSENT if text is None else text[:16].replace("T", " ") + " UTC"


def words(name: str) -> str:
    """Return a machine's word as people write it."""
    return name.replace("_", " ")


def total(values: Iterable[float]) -> float:
    """Return the sum."""
    return sum(values)


def figure(value: object) -> str:
    """Return any value of a table of results: numbers short, the rest as it is."""
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list) and all(isinstance(v, int | float) for v in value):
        return ", ".join(figure(v) for v in value)
    return str(value)


FILTERS: dict[str, Callable[..., Any]] = {
    "count": count,
    "share": share,
    "score": score,
    "size": size,
    "duration": duration,
    "moment": moment,
    "words": words,
    "total": total,
    "figure": figure,
}
