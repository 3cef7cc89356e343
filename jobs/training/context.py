"""Which rank this process is, where it computes, and what it agrees on with the others."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TrainContext:
    """One process among those that train; alone, rank 0 of 1.

    With more than one a default process group must have been started.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over ranks, on every rank."""
        if self.world_size == 1:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed / self.world_size

    def agree(self, value: bool) -> bool:
        """Return whether any rank says yes, on every rank."""
        if self.world_size == 1:
            return value
        votes = torch.tensor([int(value)], device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def wait_for_all(self) -> None:
        """Return once every rank is here."""
        if self.world_size > 1:
            dist.barrier()


def this_process(device: str | None = None) -> TrainContext:
    """Return the context of this process, in the process group if one was started."""
    has_group = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank() if has_group else 0
    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    return TrainContext(torch.device(device), rank, dist.get_world_size() if has_group else 1)
