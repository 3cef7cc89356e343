"""What is to be done next follows from what exists, and from nothing a crash could lose."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.board import Board, Limits, StageBoard
from jobs.pools import Bounds, wanted_actors
from jobs.problems import Kind, Problem
from jobs.stages.stage import Commit, Made, Task
from pipeline.record import Counts

SOURCE = "web"
CHAIN = (("download", "raw"), ("score", "captions"), ("select", "clean"))


def tasks(folder, num_shards):
    return {(SOURCE, n): Task(folder, SOURCE, n, num_rows=10) for n in range(num_shards)}


def commit(sha256, inputs=None):
    return Commit(sha256=sha256, inputs=inputs, fingerprint="f", num_rows=10)


def made(task, inputs=None, seconds=1.0):
    return Made(
        commit=commit(f"{task.folder}{task.index}", inputs),
        counts=Counts(kept=10),
        is_new=True,
        num_kept=10,
        seconds=seconds,
    )


def board(num_shards=3, done=None, num_stages=3, **limits):
    done = done or {}
    stages = [
        StageBoard(name, folder, tasks(folder, num_shards), done=dict(done.get(folder, {})))
        for name, folder in CHAIN[:num_stages]
    ]
    return Board(stages, Limits(**limits))


def ready(a_board):
    return [[task.index for task in stage.ready] for stage in a_board.stages]


def take_and_make(a_board, stage, now=0.0, seconds=1.0):
    task = a_board.take(stage, now)
    assert a_board.made(task, made(task, inputs=above(task), seconds=seconds))
    return task


def above(task):
    folders = [folder for _, folder in CHAIN]
    place = folders.index(task.folder)
    return f"{folders[place - 1]}{task.index}" if place else None


def test_a_shard_is_scored_as_soon_as_it_is_downloaded_and_not_before():
    a_board = board()
    assert ready(a_board) == [[0, 1, 2], [], []]
    take_and_make(a_board, a_board.stages[0])
    assert ready(a_board) == [[1, 2], [0], []]
    take_and_make(a_board, a_board.stages[1])
    assert ready(a_board) == [[1, 2], [], [0]]


def test_what_exists_is_not_made_again():
    done = {
        "raw": {(SOURCE, n): commit(f"raw{n}") for n in range(3)},
        "captions": {(SOURCE, n): commit(f"captions{n}", f"raw{n}") for n in range(2)},
        "clean": {(SOURCE, 0): commit("clean0", "captions0")},
    }
    assert ready(board(done=done)) == [[], [2], [1]]


def test_a_shard_of_a_replaced_one_is_made_anew_and_so_is_what_was_made_of_it():
    done = {
        "raw": {(SOURCE, 0): commit("newer")},
        "captions": {(SOURCE, 0): commit("captions0", "older")},
        "clean": {(SOURCE, 0): commit("clean0", "captions0")},
    }
    a_board = board(num_shards=1, done=done)
    assert ready(a_board) == [[], [0], []]
    task = a_board.take(a_board.stages[1], 0.0)
    a_board.made(task, replace(made(task), commit=commit("captions0b", "newer")))
    assert ready(a_board) == [[], [], [0]]


def test_a_given_stage_is_left_as_it_is():
    given_stage = StageBoard("given raw", "raw", tasks("raw", 3), is_given=True)
    given_stage.done = {(SOURCE, 1): commit("raw1")}
    a_board = Board([given_stage, StageBoard("score", "captions", tasks("captions", 3))], Limits())
    assert ready(a_board) == [[], [1]]


def test_a_stage_waits_while_the_next_one_has_too_many_waiting():
    a_board = board(num_shards=9, max_shards_ahead=3)
    download, score, _ = a_board.stages
    in_flight = [a_board.take(download, 0.0) for _ in range(3)]
    assert a_board.take(download, 0.0) is None
    for task in in_flight:
        a_board.made(task, made(task))
    assert a_board.take(download, 0.0) is None
    take_and_make(a_board, score)
    assert a_board.take(download, 0.0) is not None


def test_a_shard_that_fails_is_tried_again_and_then_set_aside_while_the_others_go_on():
    a_board = board(num_shards=2, num_stages=1, attempts=3)
    stage = a_board.stages[0]
    outcomes = []
    while not a_board.is_finished:
        task = a_board.take(stage, 0.0)
        if task.index == 0:
            outcomes.append(a_board.failed(task, Problem(Kind.DEATH, "died"), 0.0))
        else:
            a_board.made(task, made(task))
    assert outcomes == [False, False, True]
    assert stage.failures[SOURCE, 0].attempts == 3
    assert list(stage.done) == [(SOURCE, 1)]


def test_a_bug_is_never_tried_again():
    a_board = board(num_shards=1, num_stages=1)
    task = a_board.take(a_board.stages[0], 0.0)
    assert a_board.failed(task, Problem(Kind.BUG, "KeyError"), 0.0)
    assert a_board.is_finished


def test_a_node_that_is_taken_back_costs_no_attempt():
    a_board = board(num_shards=1, num_stages=1, attempts=1)
    for _ in range(5):
        task = a_board.take(a_board.stages[0], 0.0)
        assert not a_board.failed(task, Problem(Kind.PREEMPTED, "drained"), 0.0)


def test_while_storage_fails_everything_rests_longer_and_longer_and_no_shard_is_blamed():
    a_board = board(num_shards=1, num_stages=1, attempts=1, storage_patience_seconds=100)
    now, pauses = 0.0, []
    while a_board.hopeless(now) is None:
        task = a_board.take(a_board.stages[0], now)
        assert not a_board.failed(task, Problem(Kind.STORAGE, "503"), now)
        assert a_board.take(a_board.stages[0], now) is None
        pauses.append(a_board.pause_seconds(now))
        now += pauses[-1]
    assert pauses[:4] == [1, 2, 4, 8]
    assert max(pauses) == 60
    assert "storage has failed" in a_board.hopeless(now)


def test_a_shard_whose_storage_fails_while_others_succeed_is_blamed():
    a_board = board(num_shards=2, num_stages=1, attempts=1)
    bad, good = (a_board.take(a_board.stages[0], 0.0) for _ in range(2))
    a_board.made(good, made(good))
    assert a_board.failed(bad, Problem(Kind.STORAGE, "500 for this object"), 0.0)


def test_the_same_trouble_with_every_shard_ends_the_run():
    a_board = board(num_shards=30, num_stages=1)
    num_failed = 0
    while a_board.hopeless(0.0) is None:
        task = a_board.take(a_board.stages[0], 0.0)
        a_board.failed(task, Problem(Kind.BUG, "KeyError"), 0.0)
        num_failed += 1
    assert num_failed == 10


def test_shards_whose_data_are_bad_never_end_the_run():
    a_board = board(num_shards=30, num_stages=1, attempts=1)
    while not a_board.is_finished:
        task = a_board.take(a_board.stages[0], 0.0)
        a_board.failed(task, Problem(Kind.SHARD, "bad list"), 0.0)
        assert a_board.hopeless(0.0) is None
    assert len(a_board.stages[0].failures) == 30


def late_board():
    a_board = board(num_shards=5, num_stages=1, straggler_factor=4, straggler_seconds=20)
    stage = a_board.stages[0]
    for _ in range(4):
        take_and_make(a_board, stage, seconds=10.0)
    return a_board, stage, a_board.take(stage, 0.0)


def test_at_the_end_of_a_stage_a_straggler_is_begun_a_second_time_and_only_once():
    a_board, stage, slow = late_board()
    assert a_board.take_straggler(stage, 39.0) is None
    assert a_board.take_straggler(stage, 41.0) == slow
    assert a_board.take_straggler(stage, 99.0) is None


def test_whichever_copy_of_a_straggler_is_first_counts_and_the_other_does_not():
    a_board, stage, slow = late_board()
    a_board.take_straggler(stage, 41.0)
    assert not a_board.failed(slow, Problem(Kind.DEATH, "died"), 42.0)
    assert stage.failures == {}
    assert not stage.ready
    assert a_board.made(slow, made(slow))
    assert not a_board.made(slow, made(slow))
    assert (stage.num_new, a_board.is_finished) == (5, True)


def test_a_pool_grows_to_its_work_and_shrinks_when_the_next_stage_holds_it_back():
    a_board = board(num_shards=50, max_shards_ahead=4)
    download, score, select = a_board.stages
    bounds = Bounds(1, 8)
    assert wanted_actors(a_board, download, bounds, 0.0) == 4
    for _ in range(4):
        take_and_make(a_board, download)
    assert wanted_actors(a_board, download, bounds, 0.0) == 1  # the minimum
    assert wanted_actors(a_board, score, bounds, 0.0) == 4
    assert wanted_actors(a_board, select, Bounds(0, 8), 0.0) == 0


def test_a_stage_with_nothing_left_has_no_actors_not_even_the_minimum():
    a_board = board(num_shards=1)
    take_and_make(a_board, a_board.stages[0])
    assert wanted_actors(a_board, a_board.stages[0], Bounds(3, 8), 0.0) == 0
    assert wanted_actors(a_board, a_board.stages[2], Bounds(3, 8), 0.0) == 3


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_whatever_fails_every_shard_ends_made_or_set_aside(num_shards, ahead, workers, random):
    a_board = board(num_shards=num_shards, max_shards_ahead=ahead, attempts=2)
    in_flight, now = [], 0.0
    for _ in range(10_000):
        if a_board.is_finished:
            break
        now += 1.0
        for stage in reversed(a_board.stages):
            while len(in_flight) < workers and (task := a_board.take(stage, now)):
                in_flight.append(task)
        staged = a_board.stages[1].num_open + len(a_board.stages[0].in_flight)
        assert staged <= ahead
        if not in_flight:
            continue
        task = in_flight.pop(random.randrange(len(in_flight)))
        match random.choice(["made", "made", "death", "storage", "preempted", "returned"]):
            case "made":
                a_board.made(task, made(task, inputs=above(task)))
            case "returned":
                a_board.returned(task)
            case kind:
                a_board.failed(task, Problem(Kind(kind), "x"), now)
    assert a_board.is_finished
    lost = 0
    for stage in a_board.stages:
        lost += len(stage.failures)
        assert len(stage.done) + lost == num_shards


@pytest.mark.parametrize("kind", [Kind.SHARD, Kind.MACHINE, Kind.DEATH])
def test_an_attempt_that_fails_puts_its_shard_behind_the_others(kind):
    a_board = board(num_shards=3, num_stages=1)
    task = a_board.take(a_board.stages[0], 0.0)
    a_board.failed(task, Problem(kind, "x"), 0.0)
    assert ready(a_board) == [[1, 2, 0]]
