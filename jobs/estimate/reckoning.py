"""From rates to hours, survivors, bytes and money, each with a band.

Stages overlap, so the slowest of them sets the pace. Every quantity that is not exact is drawn many
times; a result is what nine in ten of the draws say.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from jobs.cluster_file import ClusterFile, Pool
from jobs.errors import UserError
from jobs.estimate.flops import PEAK_TFLOPS
from jobs.estimate.measure import Band, Draws, Measure
from jobs.estimate.rates import Rates
from jobs.estimate.work import SourceWork, Work
from jobs.pools import bounds_of, pool_of

DOWNLOAD, SCORE, SELECT = "download", "score", "select"
NUM_DRAWS = 4000
_REFERENCE_PX = 256.0  # at which `stored_bytes_per_image` is given
_BYTES_BY_SIDE = 1.5  # JPEGs grow less than their area


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: where its actors are, how many, and how long they are at it."""

    name: str
    item: str
    """What it counts: rows or images."""
    pool: Pool
    num_actors: int
    num_wanted: int
    """What the recipe allows; more than `num_actors` where the cluster has no place for them."""
    actors_per_node: int
    num_cpus: float
    num_gpus: float
    items: Draws
    busy_seconds: Draws
    """Of all its actors together."""
    row_seconds: Mapping[str, float]
    """What one row of each source's lists takes one actor, at the likeliest rates."""

    @property
    def seconds(self) -> Draws:
        """How long the stage would take on its own."""
        return self.busy_seconds / self.num_actors

    @property
    def node_seconds(self) -> Draws:
        """Nodes' time if every node were full of actors at work."""
        return self.busy_seconds / self.actors_per_node

    @property
    def unit(self) -> str:
        """What its actors are made of."""
        return "GPU" if self.num_gpus else "CPU"


@dataclass(frozen=True, slots=True)
class Reckoning:
    """What a run takes, before anybody has looked at how its parts wait for each other."""

    work: Work
    cluster: ClusterFile
    stages: tuple[StagePlan, ...]
    survivors: Mapping[str, Draws]
    """Samples after each step, in order."""
    bytes: Mapping[str, Draws]
    used: Mapping[str, Measure]
    """The rates that it rests on, by name."""

    @property
    def bottleneck(self) -> StagePlan:
        """The stage that sets the pace, at the likeliest rates."""
        return max(self.stages, key=lambda each: float(np.median(each.seconds)))

    @property
    def seconds(self) -> Draws:
        """How long the slowest stage takes."""
        seconds: Draws = np.max([each.seconds for each in self.stages], axis=0)
        return seconds

    @property
    def gpu_seconds(self) -> Draws:
        """GPUs' time at work."""
        zero = np.zeros(NUM_DRAWS)
        return sum((each.busy_seconds * each.num_gpus for each in self.stages), start=zero)


def reckon(work: Work, cluster: ClusterFile, rates: Rates, *, seed: int = 0) -> Reckoning:
    """Return what the work takes on a cluster.

    Raises UserError when the cluster lacks what a stage needs.
    """
    return _Reckoner(work, cluster, rates, np.random.default_rng(seed)).reckoning()


class _Reckoner:
    """Draws every rate once, so that all results rest on the same draws."""

    def __init__(
        self, work: Work, cluster: ClusterFile, rates: Rates, random: np.random.Generator
    ) -> None:
        self._work, self._cluster, self._rates, self._random = work, cluster, rates, random
        self._used: dict[str, Measure] = {}
        self._drawn: dict[str, Draws] = {}

    def reckoning(self) -> Reckoning:
        work = self._work
        images = {each.name: each.num_rows * self._success(each) for each in work.sources}
        kept = {
            each.name: images[each.name] * (1.0 if each.is_human else self._kept())
            for each in work.sources
        }
        stages = [self._download()]
        if work.flops_per_web_image or work.flops_per_human_image:
            stages.append(self._score(images))
        if work.policy:
            stages.append(self._select(images))
        zero = np.zeros(NUM_DRAWS)
        survivors = {
            "rows in the lists": zero + work.num_rows,
            "images downloaded": sum(images.values(), zero),
        }
        if work.policy:
            survivors["images with a kept caption"] = sum(kept.values(), zero)
        return Reckoning(
            work=work,
            cluster=self._cluster,
            stages=tuple(stages),
            survivors=survivors,
            bytes=self._bytes(survivors),
            used=self._used,
        )

    # --- rates --------------------------------------------------------------------------------

    def _draw(self, name: str, measure: Measure, *, is_share: bool = False) -> Draws:
        if name not in self._drawn:
            drawn = measure.draws(self._random, NUM_DRAWS)
            self._used[name] = measure
            self._drawn[name] = np.minimum(drawn, 1.0) if is_share else drawn
        return self._drawn[name]

    def _success(self, source: SourceWork) -> Draws:
        measure = self._rates.success_of(source.name, source.form)
        return self._draw(f"success share, {source.name}", measure, is_share=True)

    def _kept(self) -> Draws:
        measure = self._rates.kept_under(self._work.policy)
        return self._draw(f"kept share, {self._work.policy}", measure, is_share=True)

    def _gpu_seconds_per_image(self, pool: Pool, *, is_human: bool) -> Draws:
        """Return how long one whole GPU of a pool takes for an image with all its captions."""
        work, kind = self._work, pool.accelerator or ""
        flops = work.flops_per_human_image if is_human else work.flops_per_web_image
        given = self._rates.score_images_per_gpu_second.get(kind)
        if given is not None:
            # The rate was given for images of the web; what gets no synthetic captions is faster.
            rate = self._draw(f"score, images a second and {kind}", given)
            most = work.flops_per_web_image or flops
            return np.asarray(flops / most / rate)
        peak = PEAK_TFLOPS.get(kind, {}).get(work.dtype)
        if peak is None:
            raise UserError(
                f"{self._cluster.path}: {pool.name}: nobody knows how fast {kind or 'its GPU'} is; "
                f"label it (ray.io/accelerator-type: {', '.join(PEAK_TFLOPS)}) or give "
                "score_images_per_gpu_second in --rates"
            )
        share = self._draw("GPU, share of its peak", self._rates.gpu_utilisation)
        return np.asarray(flops / (peak * 1e12 * share))

    # --- stages -------------------------------------------------------------------------------

    def _download(self) -> StagePlan:
        per_cpu = self._draw(
            "download, rows a second and CPU", self._rates.download_rows_per_cpu_second
        )
        cpus = max(pool_of(self._work.run, DOWNLOAD).num_cpus, 0.01)
        rows = {each.name: np.zeros(NUM_DRAWS) + each.num_rows for each in self._work.sources}
        return self._stage(
            DOWNLOAD,
            "rows",
            self._cluster.download_pool(),
            rows,
            lambda source: 1 / (per_cpu * cpus),
        )

    def _score(self, images: Mapping[str, Draws]) -> StagePlan:
        pool = self._cluster.score_pool()
        gpus = pool_of(self._work.run, SCORE).num_gpus or 1.0
        return self._stage(
            SCORE,
            "images",
            pool,
            images,
            lambda source: self._gpu_seconds_per_image(pool, is_human=source.is_human) / gpus,
        )

    def _select(self, images: Mapping[str, Draws]) -> StagePlan:
        per_cpu = self._draw(
            "select, images a second and CPU", self._rates.select_images_per_cpu_second
        )
        cpus = max(pool_of(self._work.run, SELECT).num_cpus, 0.01)
        return self._stage(
            SELECT,
            "images",
            self._cluster.download_pool(),
            images,
            lambda source: 1 / (per_cpu * cpus),
        )

    def _stage(
        self,
        name: str,
        item: str,
        pool: Pool,
        items: Mapping[str, Draws],
        seconds_each: Callable[[SourceWork], Draws],
    ) -> StagePlan:
        config = pool_of(self._work.run, name)
        gpus = (config.num_gpus or 1.0) if name == SCORE else config.num_gpus
        places = self._places(pool, config.num_cpus, gpus, name)
        wanted = bounds_of(self._work.run, name).maximum
        num_shards = sum(self._work.num_shards(each) for each in self._work.sources)
        busy, row_seconds = np.zeros(NUM_DRAWS), {}
        for source in self._work.sources:
            seconds = items[source.name] * seconds_each(source)
            busy = busy + seconds
            row_seconds[source.name] = float(np.median(seconds)) / source.num_rows
        return StagePlan(
            name=name,
            item=item,
            pool=pool,
            num_actors=max(1, min(wanted, places * pool.max_nodes, num_shards)),
            num_wanted=wanted,
            actors_per_node=places,
            num_cpus=config.num_cpus,
            num_gpus=gpus,
            items=sum(items.values(), np.zeros(NUM_DRAWS)),
            busy_seconds=busy,
            row_seconds=row_seconds,
        )

    def _places(self, pool: Pool, cpus: float, gpus: float, stage: str) -> int:
        by_cpu = pool.num_cpus / cpus if cpus else math.inf
        by_gpu = pool.num_gpus / gpus if gpus else math.inf
        places = min(by_cpu, by_gpu, 10_000.0)
        if places < 1 or not pool.max_nodes:
            raise UserError(
                f"{self._cluster.path}: pool {pool.name} has no place for an actor of {stage}, "
                f"which wants {cpus:g} CPUs and {gpus:g} GPUs"
            )
        return int(places)

    # --- bytes --------------------------------------------------------------------------------

    def _bytes(self, survivors: Mapping[str, Draws]) -> dict[str, Draws]:
        work, rates = self._work, self._rates
        growth = (work.image_px / _REFERENCE_PX) ** _BYTES_BY_SIDE
        stored = rates.stored_bytes_per_image
        if growth != 1.0 and stored.is_assumed:
            stored = stored.scaled(growth, f"scaled to {work.image_px} px")
        image = self._draw("stored bytes an image", stored)
        ledger = self._draw("ledger bytes a row", rates.ledger_bytes_per_row)
        rows, images = survivors["rows in the lists"], survivors["images downloaded"]
        fetched = self._draw("fetched bytes a row", rates.fetched_bytes_per_row)
        sizes = {"fetched from the web": rows * fetched, "raw": images * image + rows * ledger}
        if work.flops_per_web_image:
            caption = self._draw("sidecar bytes a caption", rates.sidecar_bytes_per_caption)
            sizes["captions"] = images * work.captions_per_web_image * caption
        if work.policy:
            sizes["clean"] = survivors["images with a kept caption"] * image + rows * ledger
        return sizes


def band(draws: Draws, scale: float = 1.0) -> Band:
    """Return the band of a result, in other units."""
    return Band.of(draws * scale)
