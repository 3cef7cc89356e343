"""Rates measured: the first rows of every source through the run's own stages, on this machine.

What is probed is thrown away. A machine without a GPU tells nothing of a GPU's rate, so that one
stays an assumption there.
"""

import os
import platform
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from jobs.errors import UserError
from jobs.estimate.measure import Measure, share_measured
from jobs.estimate.rates import Rates
from jobs.recipe import Recipe
from jobs.stages.stage import Live, Made, Stage, Task
from jobs.stages.stages import chain_of
from pipeline.sources.rows import Origin, SourceError
from pipeline.sources.shards import SourceShard, plan_shards

_CPU_SPREAD = 1.6  # machines differ, and a probe is short
_BYTES_SPREAD = 1.3


@dataclass
class _Tally:
    """What one stage did."""

    rows: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    fetch_seconds: float = 0.0
    """Summed over rows, most of which wait side by side."""
    fetched_bytes: int = 0
    stored_bytes: int = 0


def probe(recipe: Recipe, given: Rates, num_rows: int, say: Callable[[str], None]) -> Rates:
    """Return `given` with what was measured on up to `num_rows` rows of every source.

    Fetches from the web as the recipe says. Raises UserError when a list cannot be read or a stage
    makes nothing of it.
    """
    with tempfile.TemporaryDirectory(prefix="capfilt-probe-") as folder:
        download = recipe.download.model_copy(update={"rows_per_shard": num_rows})
        small = recipe.model_copy(update={"root": folder, "download": download})
        shards = {each.name: _first_shard(small, each.name) for each in recipe.sources}
        tallies: dict[str, _Tally] = {}
        for stage in chain_of(small):
            say(f"probing {stage.name} with {sum(s.num_records for s in shards.values()):,} rows")
            try:
                tallies[stage.name] = _make_all(stage, shards)
            except UserError as error:
                if not tallies:
                    raise
                say(f"{stage.name} cannot be probed here: {error}")
                break
    return _measured(recipe, given, tallies)


def _first_shard(recipe: Recipe, name: str) -> SourceShard:
    config = next(each for each in recipe.sources if each.name == name)
    try:
        shards = plan_shards(config, records_per_shard=recipe.download.rows_per_shard)
        first = list(islice(shards, 1))
    except (SourceError, OSError) as error:
        raise UserError(f"source {name}: {error}; a probe needs its lists") from error
    if not first:
        raise UserError(f"source {name} has no rows to probe")
    return first[0]


def _make_all(stage: Stage, shards: dict[str, SourceShard]) -> _Tally:
    tally = _Tally()
    live = Live(on_rows=lambda rows, kept: None, should_stop=lambda: False)
    with stage.open(live) as maker, _timed(tally):
        for name, shard in shards.items():
            task = Task(stage.folder, name, 0, shard.num_records, shard)
            _count(tally, name, maker.make(task))
    return tally


@contextmanager
def _timed(tally: _Tally) -> Iterator[None]:
    """Time what is inside, without the loading of models."""
    wall, cpu = time.monotonic(), time.process_time()
    yield
    tally.wall_seconds, tally.cpu_seconds = time.monotonic() - wall, time.process_time() - cpu


def _count(tally: _Tally, source: str, made: Made) -> None:
    tally.rows[source] += made.counts.total
    tally.kept[source] += made.counts.kept
    if made.download is not None:
        tally.fetched_bytes += made.download.total.num_bytes
        tally.fetch_seconds += made.download.total.fetch_seconds
        tally.stored_bytes += made.download.stored_bytes


def _measured(recipe: Recipe, given: Rates, tallies: dict[str, _Tally]) -> Rates:
    here = f"probed on {platform.machine()}, {os.cpu_count()} CPUs"
    changes = _downloaded(recipe, given, tallies["download"], here)
    if "score" in tallies and (gpu := _gpu_name()) is not None:
        score = tallies["score"]
        images = sum(score.rows.values())
        rate = _around(images / score.wall_seconds, _BYTES_SPREAD, f"{here} and one {gpu}")
        changes["score_images_per_gpu_second"] = given.score_images_per_gpu_second | {gpu: rate}
    if "select" in tallies:
        changes |= _selected(recipe, given, tallies, here)
    return given.model_copy(update=changes)


def _downloaded(recipe: Recipe, given: Rates, tally: _Tally, here: str) -> dict[str, object]:
    rows, kept = sum(tally.rows.values()), sum(tally.kept.values())
    if not kept:
        raise UserError("the probe got no image at all; is the web reached from here?")
    changes: dict[str, object] = {
        "download_rows_per_cpu_second": _download_rate(recipe, tally, here),
        "success_share": given.success_share
        | {
            name: share_measured(tally.kept[name], number, f"{here}: {number:,} rows")
            for name, number in tally.rows.items()
            if tally.kept[name]
        },
        "stored_bytes_per_image": _around(
            tally.stored_bytes / kept, _BYTES_SPREAD, f"{here}: {kept:,} images"
        ),
    }
    if tally.fetched_bytes:
        fetched = tally.fetched_bytes / rows
        changes["fetched_bytes_per_row"] = _around(fetched, _BYTES_SPREAD, f"{here}: {rows:,} rows")
    return changes


def _download_rate(recipe: Recipe, tally: _Tally, here: str) -> Measure:
    """Return rows a second and CPU: as many as the CPU can do, or as the web answers.

    A probe ends with its slowest row, an actor at work has others in flight meanwhile: so it is the
    mean time of a row that counts, and what the whole probe took is the lower bound.
    """
    rows, cpus = sum(tally.rows.values()), max(recipe.run.download.num_cpus, 0.01)
    by_cpu = rows / max(tally.cpu_seconds, 1e-6)
    by_wall = rows / max(tally.wall_seconds, 1e-6) / cpus
    by_web = recipe.download.num_threads * rows / max(tally.fetch_seconds, 1e-6) / cpus
    value = min(by_cpu, by_web)
    took = f"{tally.wall_seconds:.1f} s, {tally.cpu_seconds:.1f} of a CPU"
    return Measure(
        value=value,
        low=min(by_wall, value) / _CPU_SPREAD,
        high=value * _CPU_SPREAD,
        source=f"{here}: {rows:,} rows in {took}",
    )


def _selected(
    recipe: Recipe, given: Rates, tallies: dict[str, _Tally], here: str
) -> dict[str, object]:
    select, raw = tallies["select"], tallies["download"]
    images = sum(raw.kept.values())
    rate = images / max(select.cpu_seconds, 1e-6)
    changes: dict[str, object] = {
        "select_images_per_cpu_second": _around(rate, _CPU_SPREAD, f"{here}: {images:,} images")
    }
    web = [each.name for each in recipe.sources if each.origin is not Origin.HUMAN]
    kept, trials = sum(select.kept[name] for name in web), sum(raw.kept[name] for name in web)
    if kept and recipe.select is not None:
        share = share_measured(kept, trials, f"{here}: {trials:,} images")
        changes["kept_share"] = given.kept_share | {recipe.select.policy.value: share}
    return changes


def _gpu_name() -> str | None:
    """Return what clusters call this machine's GPU, e.g. L4; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0).removeprefix("NVIDIA ").removeprefix("Tesla ")
    return re.split(r"[ -]", name)[0]


def _around(value: float, spread: float, source: str) -> Measure:
    return Measure(value=value, low=value / spread, high=value * spread, source=source)
