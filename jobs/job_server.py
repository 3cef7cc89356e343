"""The job server of a Ray head: reached with a token, asked about runs, missed when it is gone.

Runs are told from other jobs by their metadata. An attempt's id is the run's name and a number, so
that of two people who submit at once one submits and the other one finds it running.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs.errors import UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
RUN_KEY, ROOT_KEY, CONTENT_KEY, RECIPE_KEY = (
    "capfilt_run",
    "capfilt_root",
    "capfilt_content",
    "capfilt_recipe",
)
# Ray lets these override whatever address it is given.
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One submission of a run to one head."""

    id: str
    run: str
    number: int
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    root: str
    content: str
    """The fingerprint of what decides the corpus's bytes."""
    recipe: str
    """The fingerprint of the whole recipe, pace and patience included."""
    started: datetime | None
    ended: datetime | None
    message: str
    exit_code: int | None

    @property
    def is_active(self) -> bool:
        """Whether it still runs, or waits to."""
        return self.status not in ENDED


class AlreadySubmittedError(Exception):
    """Somebody else has just submitted this attempt."""


class JobServer:
    """What capfilt asks of a head's job server; every failure says where and what to do."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises UserError when nobody answers, or who answers asks for another token.
        """
        self.address = address.rstrip("/")
        _refuse_overriding(self.address)
        with _explained(self.address):
            from ray.job_submission import JobSubmissionClient

            logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of every upload
            self._client = JobSubmissionClient(self.address, headers=_token_header())

    def attempts(self, run: str | None = None) -> list[Attempt]:
        """Return the attempts of one run or of all that this head knows of, oldest first."""
        with _explained(self.address):
            jobs = self._client.list_jobs()
        found = [_attempt(job) for job in jobs if RUN_KEY in (job.metadata or {})]
        return sorted(
            (each for each in found if run is None or each.run == run),
            key=lambda each: (each.run, each.number),
        )

    def attempt(self, id_: str) -> Attempt:
        """Return the present state of one attempt."""
        with _explained(self.address):
            return _attempt(self._client.get_job_info(id_))

    def submit(self, id_: str, entrypoint: str, environment: dict[str, Any], **keys: str) -> None:
        """Submit an attempt under an id that was never used. Raises AlreadySubmittedError."""
        with _explained(self.address):
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=id_,
                    runtime_env=environment,
                    metadata=dict(keys),
                )
            except RuntimeError as error:
                if "already exists" not in str(error):  # Ray answers 500 to it, not 409
                    raise
                raise AlreadySubmittedError(id_) from error

    def stop(self, id_: str) -> None:
        """Ask an attempt to end; it drains first."""
        with _explained(self.address):
            self._client.stop_job(id_)

    def log(self, id_: str) -> str:
        """Return what an attempt has printed so far."""
        with _explained(self.address):
            return str(self._client.get_job_logs(id_))

    async def follow(self, id_: str) -> None:
        """Print what an attempt prints until it ends or the head is gone."""
        import aiohttp
        import typer

        try:
            async for lines in self._client.tail_job_logs(id_):
                typer.echo(lines, nl=False)
        except (aiohttp.ClientError, RuntimeError, OSError) as error:
            raise UserError(f"{self.address}: the head went away: {error}") from error


def _attempt(job: Any) -> Attempt:  # noqa: ANN401 (Ray's class is not there without its extra)
    metadata = job.metadata or {}
    number = str(job.submission_id).rpartition("-")[2]
    return Attempt(
        id=job.submission_id,
        run=metadata[RUN_KEY],
        number=int(number) if number.isdecimal() else 0,
        status=str(job.status.value),
        root=metadata.get(ROOT_KEY, ""),
        content=metadata.get(CONTENT_KEY, ""),
        recipe=metadata.get(RECIPE_KEY, ""),
        started=_time(job.start_time),
        ended=_time(job.end_time),
        message=job.message or "",
        exit_code=job.driver_exit_code,
    )


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _refuse_overriding(address: str) -> None:
    for name in _OVERRIDING:
        other = os.environ.get(name, "").rstrip("/")
        if other and other != address:
            raise UserError(
                f"{name} is set to {other}, and Ray goes there whatever it is told; unset it, or "
                f"leave --address away (it is {address})"
            )


def _token_header() -> dict[str, str]:
    """Return the header with the cluster's token, looked up where Ray itself does."""
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    if not token and os.environ.get("RAY_AUTH_MODE") != "disabled":
        try:
            token = Path(path).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            if "RAY_AUTH_TOKEN_PATH" in os.environ:
                raise UserError(f"RAY_AUTH_TOKEN_PATH: {path}: {error.strerror}") from error
    return {"Authorization": f"Bearer {token}"} if token else {}


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn what Ray raises into a line that says what to do."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            f"{address}: {str(error).splitlines()[0]}; this head wants its own token: put it in "
            "the file that RAY_AUTH_TOKEN_PATH names (mode 0600), or in ~/.ray/auth_token"
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        host = urlsplit(address).hostname
        tunnel = (
            "; for a cluster open the tunnel first: ray dashboard ray_cluster.yaml"
            if host in ("127.0.0.1", "localhost")
            else ""
        )
        raise UserError(
            f"{address}: no Ray head answers{tunnel}. What is committed is safe; how far a run is: "
            "capfilt status ROOT"
        ) from error
