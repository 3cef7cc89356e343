"""What went wrong decides what is done: wait, try again, set aside, stop, or show a bug."""

import errno

import pytest
from botocore.exceptions import EndpointConnectionError

from jobs.errors import RunError, UserError
from jobs.problems import BugTally, Kind, problem_of, storage_explained
from pipeline.corpus import Corpus
from pipeline.sample import ShardError
from pipeline.sources.rows import SourceError


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ShardError("no such row"), Kind.SHARD),
        (SourceError("the list changed"), Kind.SHARD),
        (caused(ShardError("bad tar"), ValueError("truncated")), Kind.SHARD),
        (caused(ShardError("sample 3: KeyError"), KeyError("x")), Kind.BUG),
        (caused(ShardError("cannot read"), ConnectionResetError()), Kind.STORAGE),
        (OSError(errno.ENOSPC, "No space left"), Kind.MACHINE),
        (PermissionError("Access Denied"), Kind.MACHINE),
        (OSError(errno.EIO, "Internal Server Error"), Kind.STORAGE),
        (TimeoutError(), Kind.STORAGE),
        (EndpointConnectionError(endpoint_url="http://s3"), Kind.STORAGE),
        (UserError("no such model"), Kind.USER),
        (KeyError("x"), Kind.BUG),
        (FileNotFoundError("model.json"), Kind.BUG),
        (ZeroDivisionError(), Kind.BUG),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_exception_is_sorted_by_what_is_to_be_done_about_it(error, kind):
    assert problem_of(error).kind is kind


def test_a_bug_brings_its_trace_and_is_told_apart_by_its_place():
    def one():
        raise KeyError("x")

    def other():
        raise KeyError("x")

    tally, seen = BugTally(), []
    for broken in (one, other, one, one):
        try:
            broken()
        except KeyError as error:
            problem = problem_of(error)
            assert "Traceback" in problem.trace
            seen.append(tally.add(problem))
    assert seen == [True, True, False, False]
    assert sorted(tally.counts.values()) == [1, 3]


def test_storage_that_refuses_is_told_in_a_line_and_a_local_disk_speaks_for_itself(tmp_path):
    remote = Corpus("memory://explained")
    with pytest.raises(RunError, match="explained: storage refuses"), storage_explained(remote):
        raise FileNotFoundError("no such bucket")
    with pytest.raises(KeyError), storage_explained(remote):
        raise KeyError("a bug stays one")
    with pytest.raises(OSError, match="No space"), storage_explained(Corpus(str(tmp_path))):
        raise OSError(errno.ENOSPC, "No space left")
