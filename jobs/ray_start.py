"""Ray for one run: its own on this machine, or a cluster's; quietly, and never without a token."""

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray._private.state import state

from jobs.errors import UserError
from jobs.pools import bounds_of, pool_of
from jobs.run_config import RunConfig

_log = logging.getLogger(__name__)
_SECONDS_TO_ANSWER = 10.0
_OBJECT_STORE_BYTES = 128 * 2**20  # shards go through storage; only tasks and counts go through Ray


@dataclass(frozen=True, slots=True)
class RayPlace:
    """The Ray that a run works on."""

    is_own: bool
    """Started by the run, on its own machine."""
    has_gpus: bool


@contextmanager
def ray_place(config: RunConfig, stages: list[str], address: str | None) -> Iterator[RayPlace]:
    """Connect to Ray until left; a Ray that this process is connected to already stays so.

    Raises UserError when there is no cluster at the address.
    """
    if ray.is_initialized():
        yield _place(is_own=False)
        return
    if address is None:
        _start(config, stages)
    else:
        _join(address)
    try:
        yield _place(is_own=address is None)
    finally:
        ray.shutdown()


def draining_nodes() -> frozenset[str]:
    """Return the nodes that have announced their end, as spot nodes do; Ray places nothing there.

    Ray has no public call for this; what its own libraries use is pinned with its version.
    """
    return frozenset(state.get_draining_nodes())


def _start(config: RunConfig, stages: list[str]) -> None:
    # Ray demands a token of its own accord, and left to itself writes one into the user's home;
    # this one lives as long as the run. (The mode was read when Ray was imported.)
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Every actor that was asked for has a place, so that no stage waits for another's to end;
    # more processes than cores only take turns.
    wanted = sum(
        bounds_of(config, stage).maximum * pool_of(config, stage).num_cpus for stage in stages
    )
    ray.init(
        address="local",  # whatever else runs on this machine
        num_cpus=max(os.cpu_count() or 1, int(wanted) + 1),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def _join(address: str) -> None:
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}). Is it up, and is its token here? With "
            "authentication on, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH must name it"
        ) from error


def _knock(address: str) -> None:
    """Raise OSError at once where nothing listens; Ray would try for five minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in address:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()


def _place(*, is_own: bool) -> RayPlace:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return RayPlace(is_own=is_own, has_gpus=resources.get("GPU", 0) > 0)
