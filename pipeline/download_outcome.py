"""What a download came to: rows, causes, bytes and time, per host and in total, for people to read.

Times live here and in the log, not in the corpus: they differ from run to run, and the same answers
from the web must give the same bytes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pipeline.download_row import RowResult
from pipeline.sample import Verdict

NO_HOST = "(no host)"  # images on disk, and rows without a usable URL
OTHER_HOSTS = "(other hosts)"
_MAX_HOSTS = 10_000
_NUM_CAUSES_SHOWN = 3


@dataclass(slots=True)
class HostOutcome:
    """What the rows of one host came to."""

    num_kept: int = 0
    causes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows that were not kept, by verdict and reason."""
    num_bytes: int = 0  # downloaded
    fetch_seconds: float = 0.0  # summed over rows, pauses and queueing included

    @property
    def num_rows(self) -> int:
        """All rows, whatever became of them."""
        return self.num_kept + self.causes.total()

    @property
    def success_rate(self) -> float:
        """Rows kept of all rows; 0 where there are none."""
        return self.num_kept / self.num_rows if self.num_rows else 0.0

    def add(self, other: "HostOutcome") -> None:
        """Count in the rows of another outcome."""
        self.num_kept += other.num_kept
        self.causes.update(other.causes)
        self.num_bytes += other.num_bytes
        self.fetch_seconds += other.fetch_seconds

    def describe(self) -> str:
        """Return rows, success rate, mean time and the commonest causes, on one line."""
        parts = [f"{self.num_rows:,} rows", f"{self.success_rate:.1%} kept"]
        if self.num_rows:
            parts.append(f"{self.fetch_seconds / self.num_rows:.2f} s each")
        for (verdict, reason), count in self.causes.most_common(_NUM_CAUSES_SHOWN):
            parts.append(f"{count:,} {verdict}: {reason}")
        return ", ".join(parts)


@dataclass(slots=True)
class DownloadOutcome:
    """What a shard, or any number of them, came to."""

    hosts: dict[str, HostOutcome] = field(default_factory=dict)
    stored_bytes: int = 0  # of images
    elapsed_seconds: float = 0.0

    @property
    def total(self) -> HostOutcome:
        """All hosts together."""
        total = HostOutcome()
        for host in self.hosts.values():
            total.add(host)
        return total

    @property
    def images_per_second(self) -> float:
        """Images kept per second of wall time."""
        return self.total.num_kept / self.elapsed_seconds if self.elapsed_seconds else 0.0

    def add_row(self, result: RowResult, num_stored_bytes: int) -> None:
        """Count in one row that was visited."""
        row = HostOutcome(num_bytes=result.num_bytes, fetch_seconds=result.elapsed_seconds)
        if result.verdict is Verdict.KEPT:
            row.num_kept = 1
            self.stored_bytes += num_stored_bytes
        else:
            row.causes[result.verdict.value, result.reason] = 1
        self.hosts.setdefault(host_of(result.url), HostOutcome()).add(row)

    def merge(self, other: "DownloadOutcome", *, is_parallel: bool = False) -> None:
        """Count in another outcome; the hosts of fewest rows are lumped where there are too many.

        `is_parallel` says that both ran at the same time, so that their times do not add up.
        """
        for name, host in other.hosts.items():
            self.hosts.setdefault(name, HostOutcome()).add(host)
        self.stored_bytes += other.stored_bytes
        times = (self.elapsed_seconds, other.elapsed_seconds)
        self.elapsed_seconds = max(times) if is_parallel else sum(times)
        if len(self.hosts) > 2 * _MAX_HOSTS:
            self._lump()

    def _lump(self) -> None:
        lumped = self.hosts.pop(OTHER_HOSTS, HostOutcome())
        by_size = sorted(self.hosts.items(), key=lambda item: (-item[1].num_rows, item[0]))
        for _, host in by_size[_MAX_HOSTS:]:
            lumped.add(host)
        self.hosts = {**dict(by_size[:_MAX_HOSTS]), OTHER_HOSTS: lumped}

    def lines(self, num_hosts: int = 10) -> Iterator[str]:
        """Yield a summary for people: the total, then the hosts that lost the most rows."""
        total = self.total
        yield f"{total.describe()}"
        yield (
            f"{total.num_kept:,} images in {self.elapsed_seconds:.1f} s "
            f"({self.images_per_second:.1f} a second), {total.num_bytes / 2**20:.1f} MiB "
            f"downloaded, {self.stored_bytes / 2**20:.1f} MiB stored"
        )
        worst = sorted(self.hosts.items(), key=lambda item: (-item[1].causes.total(), item[0]))
        for name, host in worst[:num_hosts]:
            yield f"  {name}: {host.describe()}"


def host_of(url: str | None) -> str:
    """Return the host that a URL is counted under."""
    try:
        parts = urlsplit(url or "")
        is_web = parts.scheme.lower() in ("http", "https")
        return (parts.hostname or NO_HOST) if is_web else NO_HOST
    except ValueError:
        return NO_HOST
