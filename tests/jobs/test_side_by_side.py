"""Work in several processes that stop together, fail together, and never outlive their parent."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from jobs.errors import RunError, UserError
from jobs.training.side_by_side import side_by_side

PATIENCE_SECONDS = 60
PARENT = """\
import sys
from functools import partial
from test_side_by_side import never, waits_to_be_stopped
from jobs.training.side_by_side import side_by_side

if __name__ == "__main__":
    tasks = {name: partial(waits_to_be_stopped, sys.argv[1]) for name in ("one", "two")}
    side_by_side(tasks, 2, never)
"""


def never():
    return False


# Tasks


def tells_who(number, should_stop):
    return number, os.getpid(), torch.get_num_threads(), os.nice(0)


def says(text, should_stop):
    sys.stderr.write(text)
    sys.stderr.write(" and more\n")
    return True


def fails(should_stop):
    raise UserError("the shelf is empty; fill it")


def has_a_bug(should_stop):
    return {}["nobody"]


def dies(should_stop):
    os.kill(os.getpid(), signal.SIGKILL)


def waits_to_be_stopped(folder, should_stop):
    """Say in `folder` that it began, and that it was stopped in order."""
    begun = Path(folder) / f"{os.getpid()}"
    begun.with_suffix(".writing").write_text("begun")
    begun.with_suffix(".writing").rename(begun)
    until = time.monotonic() + PATIENCE_SECONDS
    while not should_stop():
        assert time.monotonic() < until
        time.sleep(0.01)  # polls, as a training does between two steps
    begun.write_text("stopped")


def found(folder, number):
    """Return the processes that have begun, once there are so many."""
    until = time.monotonic() + PATIENCE_SECONDS
    while len(begun := [path for path in folder.iterdir() if not path.suffix]) < number:
        assert time.monotonic() < until
        time.sleep(0.01)
    return begun


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Tests


@pytest.mark.parametrize("num_at_once", [1, 2])
def test_results_come_in_order_from_so_many_processes(num_at_once):
    torch.set_num_threads(1)
    tasks = {str(number): partial(tells_who, number) for number in range(4)}
    numbers, pids, threads, nice = zip(*side_by_side(tasks, num_at_once, never), strict=True)
    assert numbers == (0, 1, 2, 3)
    assert set(threads) == {1}
    own = os.nice(0)
    assert list(nice) == ([own] * 4 if num_at_once == 1 else [own, own + 2, own + 4, own + 6])
    assert (set(pids) == {os.getpid()}) == (num_at_once == 1)
    assert len(set(pids)) == (1 if num_at_once == 1 else 4)


def test_one_task_needs_no_other_process():
    ((_, pid, *_),) = side_by_side({"it": partial(tells_who, 0)}, 8, never)
    assert pid == os.getpid()


def test_whoever_writes_is_named_line_by_line(capfd):
    assert side_by_side({"left": partial(says, "a"), "right": partial(says, "b")}, 2, never)
    lines = capfd.readouterr().err.splitlines()
    assert {"left: a and more", "right: b and more"} <= set(lines)


def test_where_one_fails_the_others_stop_in_order(tmp_path):
    tasks = {"waits": partial(waits_to_be_stopped, str(tmp_path)), "fails": fails}
    with pytest.raises(UserError, match="the shelf is empty; fill it"):
        side_by_side(tasks, 2, never)
    assert {path.read_text() for path in tmp_path.iterdir()} <= {"stopped"}


@pytest.mark.parametrize("num_at_once", [1, 2])
def test_asked_to_stop_all_stop_and_what_waits_does_not_begin(tmp_path, num_at_once):
    tasks = {str(n): partial(waits_to_be_stopped, str(tmp_path)) for n in range(4)}
    asked = []

    def should_stop():  # asked by one task that runs here, or by the parent of several
        if not asked and len(list(tmp_path.glob("[0-9]*"))) >= num_at_once:
            found(tmp_path, num_at_once)
            asked.append(True)
        return bool(asked)

    assert side_by_side(tasks, num_at_once, should_stop) is None
    assert [path.read_text() for path in tmp_path.iterdir()] == ["stopped"] * num_at_once


def test_a_killed_process_is_told_and_leaves_nobody_at_work(tmp_path):
    tasks = {"waits": partial(waits_to_be_stopped, str(tmp_path)), "dies": dies}
    with pytest.raises(RunError, match=r"trained dies was killed.*num_at_once=1"):
        side_by_side(tasks, 2, never)
    assert {path.read_text() for path in tmp_path.iterdir()} <= {"stopped"}
    assert not any(is_alive(path.name) for path in tmp_path.iterdir())


def test_a_bug_is_shown_with_its_trace():
    with pytest.raises(RuntimeError, match=r"has_a_bug(.|\n)*KeyError: 'nobody'"):
        side_by_side({"buggy": has_a_bug, "one": partial(tells_who, 1)}, 2, never)


def test_no_process_outlives_a_killed_parent(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "begun").mkdir()
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "parent.py", "begun"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}
    )
    pids = [path.name for path in found(tmp_path / "begun", 2)]
    parent.kill()
    parent.wait()
    until = time.monotonic() + PATIENCE_SECONDS
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert {path.read_text() for path in (tmp_path / "begun").iterdir()} == {"begun"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_all_and_only_the_parent_decides(tmp_path, number):
    """Ctrl-C goes to the whole group; trainings end when asked, not in the middle of a step."""
    tasks = {str(n): partial(waits_to_be_stopped, str(tmp_path)) for n in range(2)}
    asked = []

    def should_stop():
        if not asked and len(list(tmp_path.glob("[0-9]*"))) == 2:
            for path in found(tmp_path, 2):
                os.kill(int(path.name), number)
            asked.append(True)
        return bool(asked)

    assert side_by_side(tasks, 2, should_stop) is None
    assert [path.read_text() for path in tmp_path.iterdir()] == ["stopped"] * 2
