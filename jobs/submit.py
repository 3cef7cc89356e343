"""`capfilt submit`, `logs`, `stop`, `list`: a run as a Ray job, where submitting is resuming.

A run is known by its name. Submitting one that runs attaches to it; submitting one that ended or
died, with its head or without, starts the next attempt, which continues from what is committed.
"""

import asyncio
import hashlib
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jobs
import model
import pipeline
from jobs.errors import UserError
from jobs.job_server import (
    CONTENT_KEY,
    RECIPE_KEY,
    ROOT_KEY,
    RUN_KEY,
    AlreadySubmittedError,
    Attempt,
    JobServer,
)
from jobs.places import refuse_relative
from jobs.recipe import Recipe, dump_recipe
from pipeline.sample import canonical_json

RECIPE_FILE = "recipe.yaml"
DRAIN_SECONDS = 600
"""How long a run that is stopped may take to finish what it holds before it is killed."""
# The shipped packages stand before installed ones, because Python looks into its folder first.
_CAPFILT = ("python", "-c", "from jobs.cli import main; main()")
_PACKAGES = (model, pipeline, jobs)
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Submitted:
    """The attempt that a submission came to, and whether it is one that ran already."""

    attempt: Attempt
    is_new: bool
    note: str = ""
    """What to know about it, if anything."""


def submit_run(server: JobServer, recipe: Recipe, again: str) -> Submitted:
    """Start the next attempt of a run, or return the one that is running.

    `again` is what was typed, for the run to say how it is continued.

    Raises UserError when the run's name or its corpus is in use by another recipe, or when the
    recipe names files that only this machine can see.
    """
    refuse_relative(recipe)
    attempts = server.attempts()
    mine = [each for each in attempts if each.run == recipe.name]
    active = next((each for each in reversed(mine) if each.is_active), None)
    if active is not None:
        return Submitted(active, False, _compare(active, recipe))
    _refuse_shared_root(attempts, recipe)
    number = max((each.number for each in mine), default=0) + 1
    id_ = f"capfilt-{recipe.name}-{number}"
    with shipped(recipe) as folder:
        environment = {
            "working_dir": folder,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(DRAIN_SECONDS)},
        }
        try:
            entrypoint = shlex.join([*_CAPFILT, "run-submitted", RECIPE_FILE, "--again", again])
            server.submit(id_, entrypoint, environment, **_metadata(recipe))
        except AlreadySubmittedError:
            attempt = server.attempt(id_)
            return Submitted(attempt, False, _compare(attempt, recipe))
    return Submitted(server.attempt(id_), True, _about_root(recipe))


@contextmanager
def shipped(recipe: Recipe) -> Iterator[str]:
    """Give a folder that holds our three packages and the resolved recipe, and nothing else.

    Neither data nor a virtual environment nor what lies about in a checkout is ever uploaded.
    """
    with tempfile.TemporaryDirectory(prefix="capfilt-code-") as folder:
        for package in _PACKAGES:
            origin = Path(str(package.__file__)).parent
            shutil.copytree(origin, Path(folder, origin.name), ignore=_LEFT_OUT)
        Path(folder, RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
        yield folder


def follow_run(server: JobServer, attempt: Attempt) -> int:
    """Print an attempt's log as it grows; return its exit code once it has ended.

    Raises UserError when the head goes away meanwhile.
    """
    asyncio.run(server.follow(attempt.id))
    ended = _wait_for_end(server, attempt.id, timeout_seconds=60)
    if ended.status == "SUCCEEDED":
        return 0
    return ended.exit_code or 1


def last_attempt(server: JobServer, run: str) -> Attempt:
    """Return a run's latest attempt on this head. Raises UserError if there is none."""
    attempts = server.attempts()
    mine = [each for each in attempts if each.run == run]
    if not mine:
        known = ", ".join(sorted({each.run for each in attempts})) or "none"
        raise UserError(
            f"{server.address}: no run {run!r} on this head (its runs: {known}); logs live and die "
            "with a head, progress does not: capfilt status ROOT"
        )
    return mine[-1]


def stop_run(server: JobServer, run: str) -> Attempt:
    """Have a run finish what it holds and end; return how it ended.

    Raises UserError when it does not run, or does not end in the time that it is given.
    """
    attempt = last_attempt(server, run)
    if not attempt.is_active:
        raise UserError(f"run {run!r} does not run: attempt {attempt.number} {attempt.status}")
    server.stop(attempt.id)
    return _wait_for_end(server, attempt.id, timeout_seconds=DRAIN_SECONDS + 30)


def list_text(server: JobServer) -> str:
    """Return a table of the runs that a head knows of, for people."""
    attempts = server.attempts()
    if not attempts:
        return f"no run of capfilt on {server.address} yet"
    rows = [("run", "attempt", "status", "started", "took", "root")]
    rows += [
        (
            each.run,
            str(each.number),
            each.status,
            f"{each.started:%Y-%m-%d %H:%M:%S}" if each.started else "-",
            _took(each),
            each.root,
        )
        for each in attempts
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _took(attempt: Attempt) -> str:
    if attempt.started is None:
        return "-"
    seconds = ((attempt.ended or datetime.now(UTC)) - attempt.started).total_seconds()
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _wait_for_end(server: JobServer, id_: str, timeout_seconds: float) -> Attempt:
    end = time.monotonic() + timeout_seconds
    while (attempt := server.attempt(id_)).is_active:
        if time.monotonic() > end:
            raise UserError(
                f"{id_} is still {attempt.status} after {timeout_seconds:.0f} s; look again: "
                f"capfilt list --address {server.address}"
            )
        time.sleep(_POLL_SECONDS)  # the job server has no call that waits
    return attempt


def _metadata(recipe: Recipe) -> dict[str, str]:
    return {
        RUN_KEY: recipe.name,
        ROOT_KEY: recipe.root,
        CONTENT_KEY: _digest(canonical_json(_content(recipe))),
        RECIPE_KEY: _digest(dump_recipe(recipe)),
    }


def _content(recipe: Recipe) -> dict[str, Any]:
    """Return what decides the bytes of every stage, without name, place and pace."""
    parts = {
        "captioner": recipe.captioner,
        "scorer": recipe.scorer,
        "score": recipe.score,
        "select": recipe.select,
    }
    contents = {key: part.content() if part is not None else None for key, part in parts.items()}
    return {"raw": recipe.content(), **contents}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _about_root(recipe: Recipe) -> str:
    if "://" in recipe.root:
        return ""
    return f"{recipe.root} is a folder: every node has to mount it, or each writes to its own disk"


def _compare(active: Attempt, recipe: Recipe) -> str:
    """Return what to know before attaching. Raises UserError if it is another run of that name."""
    now = _metadata(recipe)
    if active.root != recipe.root or active.content != now[CONTENT_KEY]:
        raise UserError(
            f"run {recipe.name!r} is {active.status} with another recipe, into {active.root}; stop "
            f"it first (capfilt stop {recipe.name}) or give this recipe another name"
        )
    if active.recipe != now[RECIPE_KEY]:
        return (
            "it goes on at the pace it was submitted with; to change that: "
            f"capfilt stop {recipe.name}, then submit again"
        )
    return ""


def _refuse_shared_root(attempts: list[Attempt], recipe: Recipe) -> None:
    for each in attempts:
        if each.is_active and each.root == recipe.root:
            raise UserError(
                f"{recipe.root} is being written by run {each.run!r} ({each.status}); give this "
                "recipe that name to attach, or another root"
            )
