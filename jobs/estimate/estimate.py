"""`capfilt plan`: what a run will take, reckoned from rates and checked by a simulated run.

The reckoning gives the band; the simulation, at the likeliest rates, tells how much longer and
dearer it is that nodes start, actors wait for each other and spot nodes are taken back.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jobs.board import Board, Key, StageBoard
from jobs.chain import limits_of
from jobs.cluster_file import ClusterFile, Pool
from jobs.estimate.measure import Draws
from jobs.estimate.rates import Rates
from jobs.estimate.reckoning import DOWNLOAD, NUM_DRAWS, SCORE, SELECT, Reckoning, reckon
from jobs.estimate.simulator import Luck, SimNodes, SimResult, SimStage, Simulation
from jobs.estimate.work import Work
from jobs.pools import bounds_of
from jobs.stages.stage import Task

_FETCHED = "fetched from the web"
_FOLDERS = {DOWNLOAD: "raw", SCORE: "captions", SELECT: "clean"}
_OBJECTS_PER_SHARD = {DOWNLOAD: 3, SCORE: 2, SELECT: 3}
_START_SECONDS = {DOWNLOAD: 10.0, SCORE: 60.0, SELECT: 10.0}  # imports; models
# Of nodes' time that is neither waited nor started away, where nothing was simulated.
_ASSUMED_OVERHEAD = 1.2


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run takes on a cluster: time, machines, money."""

    reckoning: Reckoning
    simulated: SimResult | None
    seconds: Draws
    node_seconds: Mapping[str, Draws]
    """By pool."""
    usd: Mapping[str, Draws]
    """By pool, the head and storage's requests."""

    @property
    def total_usd(self) -> Draws:
        """Machines and requests; what is stored costs by the month."""
        return sum(self.usd.values(), start=np.zeros(NUM_DRAWS))

    @property
    def storage_usd_per_month(self) -> Draws:
        """Of what the corpus keeps in its bucket."""
        kept = [size for name, size in self.reckoning.bytes.items() if name != _FETCHED]
        price = self.reckoning.cluster.prices.storage_usd_per_tb_month
        return sum(kept, start=np.zeros(NUM_DRAWS)) * 1e-12 * price


def estimate(
    work: Work, cluster: ClusterFile, rates: Rates, *, seed: int = 0, is_simulated: bool = True
) -> Estimate:
    """Return what the work takes on a cluster; the same seed gives the same answer.

    Raises UserError when the cluster lacks what a stage needs.
    """
    reckoning = reckon(work, cluster, rates, seed=seed)
    result = simulate(reckoning, seed=seed) if is_simulated else None
    longer = 1.0 if result is None else result.seconds / float(np.median(reckoning.seconds))
    seconds = reckoning.seconds * longer
    node_seconds = _node_seconds(reckoning, result)
    usd = {
        f"{pool.name} ({pool.machine})": node_seconds[pool.name] / 3600 * pool.usd_per_node_hour
        for pool in cluster.pools
        if pool.name in node_seconds
    }
    usd[f"head ({cluster.head.machine})"] = seconds / 3600 * cluster.head.usd_per_node_hour
    usd["writing objects"] = np.full(NUM_DRAWS, _num_objects(reckoning) * 1e-6) * (
        cluster.prices.usd_per_million_puts
    )
    return Estimate(reckoning, result, seconds, node_seconds, usd)


def simulate(reckoning: Reckoning, *, seed: int = 0, luck: Luck | None = None) -> SimResult:
    """Run the plan with the likeliest rates and drawn misfortunes; the dispatching is the real."""
    work, cluster = reckoning.work, reckoning.cluster
    boards = [
        StageBoard(stage.name, _FOLDERS[stage.name], _tasks(work, _FOLDERS[stage.name]))
        for stage in reckoning.stages
    ]
    names = [stage.name for stage in reckoning.stages]
    stages = [
        SimStage(
            name=stage.name,
            nodes=stage.pool.name,
            bounds=bounds_of(work.run, stage.name),
            num_cpus=stage.num_cpus,
            num_gpus=stage.num_gpus,
            row_seconds=stage.row_seconds,
            start_seconds=_START_SECONDS[stage.name],
        )
        for stage in reckoning.stages
    ]
    pools = {stage.pool.name: stage.pool for stage in reckoning.stages}
    nodes = [_sim_nodes(pool, cluster) for pool in pools.values()]
    board = Board(boards, limits_of(work.run, names))
    luck = luck or Luck(idle_seconds=work.run.idle_seconds)
    return Simulation(board, stages, nodes, luck=luck, seed=seed).run()


def _sim_nodes(pool: Pool, cluster: ClusterFile) -> SimNodes:
    rate = cluster.prices.spot_preemptions_per_node_hour if pool.is_spot else 0.0
    return SimNodes(
        pool.name, pool.max_nodes, pool.num_cpus, pool.num_gpus, preemptions_per_hour=rate
    )


def _tasks(work: Work, folder: str) -> dict[Key, Task]:
    tasks: dict[Key, Task] = {}
    for source in work.sources:
        left = source.num_rows
        for index in range(work.num_shards(source)):
            rows = min(work.rows_per_shard, left)
            tasks[source.name, index] = Task(folder, source.name, index, rows)
            left -= rows
    return tasks


def _node_seconds(reckoning: Reckoning, result: SimResult | None) -> dict[str, Draws]:
    full: dict[str, Draws] = {}
    for stage in reckoning.stages:
        so_far = full.get(stage.pool.name, np.zeros(NUM_DRAWS))
        full[stage.pool.name] = so_far + stage.node_seconds
    if result is None:
        return {name: draws * _ASSUMED_OVERHEAD for name, draws in full.items()}
    return {
        name: draws * (result.node_seconds[name] / float(np.median(draws)))
        for name, draws in full.items()
    }


def _num_objects(reckoning: Reckoning) -> int:
    work = reckoning.work
    shards = sum(work.num_shards(source) for source in work.sources)
    return sum(shards * _OBJECTS_PER_SHARD[stage.name] for stage in reckoning.stages)
