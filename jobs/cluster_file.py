"""The cluster file as `capfilt plan` reads it: pools of machines and what they cost."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.errors import UserError
from jobs.yaml_lines import parse_yaml

ACCELERATOR_LABEL = "ray.io/accelerator-type"
_FROZEN = ConfigDict(frozen=True, extra="forbid")
_Usd = Annotated[float, Field(ge=0)]


class Prices(BaseModel):
    """What a cluster costs; `metadata.prices` of the cluster file, which Ray does not read."""

    model_config = _FROZEN

    source: Annotated[str, Field(min_length=1)] = Field(
        description="Where the prices come from and of when they are; printed with every plan."
    )
    usd_per_node_hour: dict[str, _Usd] = Field(
        description="Of one node of each type, by its name among `available_node_types`."
    )
    storage_usd_per_tb_month: _Usd = Field(description="Of the bucket that holds the corpus.")
    usd_per_million_puts: _Usd = Field(default=0.0, description="Of writing objects to it.")
    spot_preemptions_per_node_hour: Annotated[float, Field(ge=0, le=60)] = Field(
        default=0.0, description="How often a spot node is taken back; none are on demand."
    )


class Pool(BaseModel):
    """One type of node and how many of it there may be."""

    model_config = _FROZEN

    name: str
    machine: str
    """What the provider calls it, e.g. `c7i.4xlarge`."""
    min_nodes: int
    max_nodes: int
    num_cpus: int
    num_gpus: int
    accelerator: str | None
    is_spot: bool
    is_for_training: bool
    usd_per_node_hour: float


class ClusterFile(BaseModel):
    """A Ray cluster file, as far as a plan needs it."""

    model_config = _FROZEN

    path: str
    name: str
    place: str
    """Provider and region."""
    head: Pool
    pools: tuple[Pool, ...]
    """The worker pools, in the file's order."""
    prices: Prices

    def download_pool(self) -> Pool:
        """Return the pool that downloads and selects: the CPU pool with the most CPUs."""
        cpu_only = [pool for pool in self.pools if not pool.num_gpus and pool.num_cpus]
        return _largest(cpu_only or list(self.score_pools()), self.path, "a pool with CPUs")

    def score_pool(self) -> Pool:
        """Return the pool that captions and scores: the one with the most GPUs not for training."""
        return _largest(list(self.score_pools()), self.path, "a pool with GPUs for scoring")

    def score_pools(self) -> tuple[Pool, ...]:
        """Return the pools with GPUs that are not kept for training."""
        return tuple(pool for pool in self.pools if pool.num_gpus and not pool.is_for_training)


def load_cluster_file(path: str) -> ClusterFile:
    """Read a Ray cluster file with `metadata.prices`.

    Raises UserError that names the file and what is missing or wrong in it. Whether Ray itself
    accepts the file is Ray's to say, at `ray up`.
    """
    document = parse_yaml(_read(path), path).data
    try:
        return _parse(document, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a Ray cluster file: {error!r} is missing or wrong") from error
    except ValidationError as error:
        problems = [
            f"{path}: metadata.prices.{'.'.join(map(str, each['loc']))}: {each['msg']}"
            for each in error.errors(include_url=False)
        ]
        raise UserError("\n".join(problems)) from None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _parse(document: dict[str, Any], path: str) -> ClusterFile:
    prices = (document.get("metadata") or {}).get("prices")
    if prices is None:
        raise UserError(
            f"{path}: no metadata.prices, so nothing to reckon costs with; ray_cluster.yaml of "
            "capfilt shows the section"
        )
    checked = Prices.model_validate(prices)
    types = document["available_node_types"]
    head_name = document["head_node_type"]
    unpriced = sorted(set(types) - set(checked.usd_per_node_hour))
    if unpriced:
        raise UserError(f"{path}: metadata.prices.usd_per_node_hour: {unpriced[0]!r} is missing")
    if head_name not in types:
        raise UserError(f"{path}: head_node_type {head_name!r} is no available_node_types")
    pools = {name: _pool(name, node, checked) for name, node in types.items()}
    provider = document["provider"]
    return ClusterFile(
        path=path,
        name=document["cluster_name"],
        place=f"{provider['type']} {provider.get('region', '')}".strip(),
        head=pools.pop(head_name),
        pools=tuple(pools.values()),
        prices=checked,
    )


def _pool(name: str, node: dict[str, Any], prices: Prices) -> Pool:
    resources, config = node["resources"], node["node_config"]
    market = config.get("InstanceMarketOptions") or {}
    scheduling = config.get("scheduling") or [{}]
    return Pool(
        name=name,
        machine=str(config.get("InstanceType") or config.get("machineType") or name),
        min_nodes=int(node.get("min_workers", 0)),
        max_nodes=int(node.get("max_workers", 0)),
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        accelerator=(node.get("labels") or {}).get(ACCELERATOR_LABEL),
        is_spot=market.get("MarketType") == "spot" or bool(scheduling[0].get("preemptible")),
        is_for_training="train" in resources,
        usd_per_node_hour=prices.usd_per_node_hour[name],
    )


def _largest(pools: list[Pool], path: str, wanted: str) -> Pool:
    if not pools:
        raise UserError(f"{path}: {wanted} is missing among available_node_types")
    return max(pools, key=lambda pool: pool.max_nodes * (pool.num_gpus or pool.num_cpus))
