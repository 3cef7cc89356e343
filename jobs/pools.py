"""How many actors a stage should have; pure, so that it can be tested and simulated.

A stage has an actor for every shard it could be making, between its bounds. A stage that is held
back by the next one can make few, so its actors fall idle and give up their places to whichever
stage is the bottleneck; one that starves does likewise.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jobs.board import Board, StageBoard
from jobs.run_config import PoolConfig, RunConfig


@dataclass(frozen=True, slots=True)
class Bounds:
    """How few and how many actors a stage may have."""

    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True)
class Resources:
    """What Ray sets aside for one actor."""

    num_cpus: float
    num_gpus: float
    custom: Mapping[str, float]


def pool_of(config: RunConfig, stage: str) -> PoolConfig:
    """Return the pool of a stage by its name; a stage without one has the plainest."""
    pools = {"download": config.download, "score": config.score, "select": config.select}
    return pools.get(stage, PoolConfig())


def bounds_of(config: RunConfig, stage: str) -> Bounds:
    """Return how many actors a stage may have."""
    pool = pool_of(config, stage)
    maximum = config.max_actors(pool)
    return Bounds(min(pool.min_actors, maximum), maximum)


def resources_of(config: RunConfig, stage: str, *, has_gpus: bool, is_own: bool) -> Resources:
    """Return what an actor of a stage asks for.

    On a run's own machine GPUs are asked for only where there are any, and custom resources, which
    name pools of nodes, not at all: so a recipe for a cluster runs there unchanged.
    """
    pool = pool_of(config, stage)
    return Resources(
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus if has_gpus or not is_own else 0.0,
        custom={} if is_own else pool.resources,
    )


def shards_ahead(config: RunConfig, stages: list[str]) -> int:
    """Return how many shards a stage may have begun that the next one has not finished."""
    if config.max_shards_ahead is not None:
        return config.max_shards_ahead
    # Enough that every actor of two neighbours is busy and finds the next shard waiting.
    return 2 * max(2 * bounds_of(config, stage).maximum for stage in stages)


def wanted_actors(board: Board, stage: StageBoard, bounds: Bounds, now: float) -> int:
    """Return how many actors a stage should have now."""
    if board.is_over(stage):
        return 0
    useful = len(stage.in_flight) + board.can_take(stage) + len(board.stragglers(stage, now))
    return max(bounds.minimum, min(bounds.maximum, useful))
