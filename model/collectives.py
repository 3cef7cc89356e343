"""What `model/` knows of other processes: a contrastive batch is made of all ranks' pairs.

Everything here also works where no process group was started, or one of a single rank: the batch is
then whole already. Dims: B rows of this rank, W ranks, N = W B rows of all ranks, rank-major.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks; 1 where no process group was started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank; 0 where no process group was started."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def require_equal_sizes(sizes: Mapping[str, int], device: torch.device) -> None:
    """Raise on every rank unless all ranks hold the same sizes; call it before any other gather.

    A gather of unequal shapes would hang or garble instead. Costs one exchange of a few integers,
    on `device`. Raises ValueError that lists each rank's value.
    """
    if world_size() == 1:
        return
    mine = torch.tensor([list(sizes.values())], dtype=torch.int64, device=device)
    everyone = gather(mine).tolist()
    for name, values in zip(sizes, zip(*everyone, strict=True), strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"{name} differs between ranks: {list(values)} on ranks 0..{len(values) - 1}. "
                "Contrastive batches must be equal everywhere: pad texts to one length and replace "
                "samples that cannot be read instead of dropping them."
            )


def gather(rows: Tensor) -> Tensor:
    """Return every rank's rows, (N, ...), without gradient, not even for this rank's own.

    All ranks must pass the same shape and dtype.
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather(list(gathered.chunk(world_size())), rows.contiguous())
    return gathered


def gather_with_grad(rows: Tensor) -> Tensor:
    """Return every rank's rows, (N, ...); backward sums over ranks what each asks of these rows.

    With the average over ranks that data-parallel training takes afterwards, gradients equal those
    of one process that holds the joined batch and averages the ranks' losses.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def exchange_rows(rows: Tensor, wanted: Tensor) -> Tensor:
    """Return the rows of the global batch that this rank wants, and no other rank's traffic.

    `rows` is (B, ...); `wanted` (n,) int64 holds global row numbers, of the same n on every rank.
    Returns (n, ...), in order of `wanted`. Differentiable: the gradient travels back to the rank
    that owns a row and is summed over all who asked. It moves n rows to a rank, where gathering
    would move N; how many go where is read back once (one device synchronisation).
    """
    if world_size() == 1:
        return rows.index_select(0, wanted)
    size, me = rows.shape[0], rank()
    requests = gather(wanted).view(world_size(), -1)  # (W, n): what each rank wants
    owners = requests.div(size, rounding_mode="floor")
    asked_of_me = owners == me
    from_rank = torch.stack([(owners[me] == r).sum() for r in range(world_size())])
    receive, send = torch.stack((from_rank, asked_of_me.sum(dim=1))).tolist()
    leaving = rows.index_select(0, requests[asked_of_me] - me * size)  # by asker, in their order
    arrived: Tensor = _AllToAll.apply(leaving, receive, send)  # type: ignore[no-untyped-call]
    # Rows arrive sorted by owner; a stable sort tells where each request went.
    arrival = owners[me].argsort(stable=True)
    return arrived.index_select(0, arrival.argsort())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # noqa: ANN401 -- torch leaves its type open
        ctx.num_rows = rows.shape[0]
        return gather(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ANN401
        summed = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed.narrow(0, rank() * ctx.num_rows, ctx.num_rows)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, receive: list[int], send: list[int]) -> Tensor:  # noqa: ANN401
        ctx.splits = receive, send
        return _all_to_all(rows, receive, send)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        receive, send = ctx.splits
        return _all_to_all(grads[0], send, receive), None, None


def _all_to_all(rows: Tensor, receive: list[int], send: list[int]) -> Tensor:
    arrived = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows.contiguous(), receive, send)
    return arrived
