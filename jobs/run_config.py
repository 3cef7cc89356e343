"""How a run goes about its work: workers, resources, patience. Pace only, never part of content.

One recipe runs on a laptop and on a cluster: what is asked of a cluster is capped to what a machine
has when the run starts its own Ray (`jobs.ray_start`).
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_FROZEN = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
_Count = Annotated[int, Field(ge=1, le=100_000)]
_Share = Annotated[float, Field(ge=0, le=4096, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Until = Literal["select", "stage1", "stage2"]


class PoolConfig(BaseModel):
    """The actors of one stage: how many, and what each of them holds."""

    model_config = _FROZEN

    min_actors: Annotated[int, Field(ge=0)] = 0
    """Actors that stay while the stage has work left, also when others need their place."""
    max_actors: _Count | None = None
    """The most there may be; None means `run.workers`."""
    num_cpus: _Share = 1.0
    """CPU cores that Ray sets aside for each."""
    num_gpus: _Share = 0.0
    """GPUs for each; 0.25 puts four on one GPU. Left out where a run's own machine has none."""
    resources: dict[str, _Share] = Field(default_factory=dict)
    """Custom resources for each, e.g. the name of a pool of nodes; a run's own machine has all."""

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.max_actors is not None and self.min_actors > self.max_actors:
            raise ValueError(
                f"min_actors ({self.min_actors}) is more than max_actors ({self.max_actors})"
            )
        if self.num_gpus > 1 and not self.num_gpus.is_integer():
            raise ValueError(f"num_gpus ({self.num_gpus}) is a share of one GPU, or whole GPUs")
        return self


class RunConfig(BaseModel):
    """Workers, attempts and patience of a run; none of it changes a byte of the corpus."""

    model_config = _FROZEN

    engine: Literal["auto", "local", "ray"] = "auto"
    """`local` works in the one process, `ray` in actors; `auto` takes Ray for several workers or a
    cluster's address, because starting it takes longer than many a small run."""
    until: Until = "stage2"
    """How far `capfilt run` goes: `select` ends with the clean corpus; the stages of BLIP-2 that
    `training` has a section for follow."""
    has_report: bool = True
    """Whether a run writes the report once the corpus is clean."""
    workers: _Count = 1
    """Actors that each stage may have, unless its own `max_actors` says otherwise."""
    download: PoolConfig = PoolConfig()
    """The actors that download; each has `download.num_threads` threads."""
    score: PoolConfig = PoolConfig(num_gpus=1.0)
    """The actors that caption and score."""
    select: PoolConfig = PoolConfig()
    """The actors that select."""
    attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """How often a shard may fail, or lose its worker, before it is set aside."""
    max_shards_ahead: _Count | None = None
    """Shards a stage may have begun that the next one has not finished; None: by the actors."""
    idle_seconds: _Seconds = 30.0
    """How long an actor without work keeps its place before another stage may have it."""
    straggler_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    """At a stage's end, a shard that takes this many times the median is begun a second time."""
    straggler_seconds: _Seconds = 60.0
    """But never before it has run so long."""
    storage_patience_seconds: _Seconds = 900.0
    """How long storage may fail every request before the run gives up."""
    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 600.0
    """How long shards in flight may take to finish when a run on Ray is asked to stop; asked a
    second time, it ends at once."""
    heartbeat_seconds: _Seconds = 10.0
    """How often the run's status is written to the corpus."""
    stale_seconds: _Seconds = 60.0
    """After how long without one another run may take over."""

    @model_validator(mode="after")
    def _beats_in_time(self) -> Self:
        if self.stale_seconds < 3 * self.heartbeat_seconds:
            raise ValueError(
                f"stale_seconds ({self.stale_seconds}) leaves no room for two late heartbeats of "
                f"{self.heartbeat_seconds} s"
            )
        return self

    def max_actors(self, pool: PoolConfig) -> int:
        """Return how many actors a pool may have."""
        return self.workers if pool.max_actors is None else pool.max_actors

    def wants_ray(self, address: str | None) -> bool:
        """Say whether a run is to work through Ray.

        Ray takes seconds and hundreds of megabytes to start, and one process downloads with as many
        threads as it likes: only several workers, or a cluster, are worth it.
        """
        if self.engine != "auto":
            return self.engine == "ray"
        pools = (self.download, self.score, self.select)
        return address is not None or max(map(self.max_actors, pools)) > 1
