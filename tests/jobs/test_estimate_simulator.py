"""A simulated run: every shard once, resources kept, nodes paid for, misfortune from the seed."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.board import Board, Limits, StageBoard
from jobs.estimate.simulator import Luck, SimNodes, SimStage, Simulation
from jobs.pools import Bounds
from jobs.stages.stage import Task

FAIR = Luck(spread=0.0, straggler_share=0.0, failure_share=0.0)
FOLDERS = {"download": "raw", "score": "captions", "select": "clean"}
CPU = SimNodes("cpu", max_nodes=4, num_cpus=8, num_gpus=0)
GPU = SimNodes("gpu", max_nodes=3, num_cpus=16, num_gpus=2)
STAGES = (
    SimStage("download", "cpu", Bounds(0, 24), 1, 0, {"web": 0.12}),
    SimStage("score", "gpu", Bounds(0, 6), 4, 1, {"web": 0.20}, start_seconds=60),
    SimStage("select", "cpu", Bounds(0, 4), 1, 0, {"web": 0.01}),
)
ROWS = 1000


def board(num_shards, **limits):
    stages = [
        StageBoard(
            name,
            folder,
            {("web", number): Task(folder, "web", number, ROWS) for number in range(num_shards)},
        )
        for name, folder in FOLDERS.items()
    ]
    return Board(stages, Limits(**{"max_shards_ahead": 48} | limits))


def simulated(num_shards=60, *, nodes=(CPU, GPU), luck=FAIR, seed=0, **limits):
    return Simulation(board(num_shards, **limits), STAGES, nodes, luck=luck, seed=seed).run()


class WatchedSimulation(Simulation):
    """Looks, after each event, at what is placed where."""

    def _hand_out(self):
        super()._hand_out()
        for name, nodes in self._nodes.items():
            assert len(nodes) <= self._pools[name].max_nodes
            for node in nodes:
                assert node.cpus >= 0
                assert node.gpus >= 0
                used = sum(actor.stage.num_gpus for actor in node.actors)
                assert not node.is_up or used + node.gpus == node.pool.num_gpus
        for actors in self._actors.values():
            assert all(actor.node is not None for actor in actors if actor.task is not None)


def test_every_shard_is_made_once_in_every_stage():
    result = simulated()
    assert result.shards_made == {"download": 60, "score": 60, "select": 60}
    assert result.num_set_aside == 0


def test_a_fair_run_takes_what_its_bottleneck_takes_and_little_more():
    result = simulated(600)
    slowest = 600 * ROWS * 0.20 / 6
    assert slowest < result.seconds < slowest * 1.1 + 900  # nodes start, first and last shards


def test_the_same_seed_has_the_same_run_and_another_has_another():
    unlucky = Luck(failure_share=0.05, straggler_share=0.05)
    spot = (replace(CPU, preemptions_per_hour=2.0), GPU)
    results = [simulated(luck=unlucky, nodes=spot, seed=seed) for seed in (7, 7, 8)]
    assert results[0] == results[1]
    assert results[0].seconds != results[2].seconds


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    failures=st.floats(0, 0.3),
    preemptions=st.floats(0, 30),
    stragglers=st.floats(0, 0.2),
    ahead=st.integers(1, 40),
)
def test_whatever_goes_wrong_no_shard_is_lost_and_no_place_is_used_twice(
    seed, failures, preemptions, stragglers, ahead
):
    nodes = tuple(replace(each, preemptions_per_hour=preemptions) for each in (CPU, GPU))
    luck = Luck(failure_share=failures, straggler_share=stragglers)
    laid_out = board(40, max_shards_ahead=ahead, attempts=50)
    result = WatchedSimulation(laid_out, STAGES, nodes, luck=luck, seed=seed).run()
    assert result.shards_made == {"download": 40, "score": 40, "select": 40}
    assert result.num_set_aside == 0


def test_preempted_nodes_cost_time_and_their_shards_are_made_again():
    spot = (CPU, replace(GPU, preemptions_per_hour=4.0))
    taken, kept = simulated(200, nodes=spot), simulated(200)
    assert taken.num_preemptions > 0
    assert taken.num_lost > 0
    assert taken.shards_made == kept.shards_made
    assert taken.busy_seconds["score"] > kept.busy_seconds["score"]
    assert taken.seconds > kept.seconds


def test_a_shard_that_fails_every_time_is_set_aside_and_the_run_ends():
    result = simulated(luck=replace(FAIR, failure_share=1.0))
    assert result.shards_made == {}
    assert 0 < result.num_set_aside <= 60


def test_a_straggler_at_the_end_is_begun_a_second_time():
    luck = replace(FAIR, straggler_share=0.05, straggler_factor=40.0)
    result = simulated(200, luck=luck)
    assert result.num_second_copies > 0
    assert result.shards_made["score"] == 200


def test_nodes_are_paid_for_from_when_they_are_asked_for_and_let_go_when_idle():
    result = simulated(300)
    assert 0 < result.peak_nodes["cpu"] <= 4
    busy = result.busy_seconds["download"] + result.busy_seconds["select"]
    assert result.node_seconds["cpu"] * 8 > busy
    # Back-pressure leaves the CPU pool idle while the GPUs are at it: not all of it stays.
    assert result.node_seconds["cpu"] < 4 * result.seconds
    assert result.node_seconds["gpu"] <= 3 * result.seconds


def test_more_gpus_help_until_the_download_is_the_bottleneck():
    hours = []
    for max_nodes in (1, 2, 4, 64):
        stages = (STAGES[0], replace(STAGES[1], bounds=Bounds(0, 2 * max_nodes)), STAGES[2])
        nodes = (CPU, replace(GPU, max_nodes=max_nodes))
        hours.append(Simulation(board(400), stages, nodes, luck=FAIR).run().seconds)
    assert hours[0] > 1.7 * hours[1] > hours[2] > hours[3]
    assert hours[3] > 400 * ROWS * 0.12 / 24


def test_a_run_without_any_node_is_an_error_and_no_endless_loop():
    nodes = (CPU, replace(GPU, max_nodes=0))
    with pytest.raises(RuntimeError, match="not done after 1 days"):
        Simulation(board(3), STAGES, nodes, luck=FAIR).run(max_days=1)
