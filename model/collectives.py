"""What `model/` knows of other processes: a contrastive batch is made of all ranks' pairs.

Everything here also works where no process group was started, or one of a single rank: the batch is
then whole already. Dims: B rows of this rank, W ranks, N = W B rows of all ranks, rank-major.
"""

from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Keep what talks to other ranks out of torch.compile's graphs: its sizes are known late."""
    outside: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return outside


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
    if world_size() > 1:
        _require_equal_sizes(sizes, device)


@_uncompiled
def _require_equal_sizes(sizes: Mapping[str, int], device: torch.device) -> None:
    mine = torch.tensor([list(sizes.values())], dtype=torch.int64, device=device)
    everyone = _gather(mine).tolist()
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
    return rows if world_size() == 1 else _gather(rows)


@_uncompiled
def _gather(rows: Tensor) -> Tensor:
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather(list(gathered.chunk(world_size())), rows.contiguous())
    return gathered


def gather_with_grad(rows: Tensor) -> Tensor:
    """Return every rank's rows, (N, ...); backward sums over ranks what each asks of these rows.

    With the average over ranks that data-parallel training takes afterwards, gradients equal those
    of one process that holds the joined batch and averages the ranks' losses.
    """
    return rows if world_size() == 1 else _gather_with_grad(rows)


@_uncompiled
def _gather_with_grad(rows: Tensor) -> Tensor:
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
    return _exchange_rows(rows, wanted)


@_uncompiled
def _exchange_rows(rows: Tensor, wanted: Tensor) -> Tensor:
    size, me = rows.shape[0], rank()
    ranks = torch.arange(world_size(), device=wanted.device)
    requests = _gather(wanted).view(world_size(), -1)  # (W, n): what each rank wants
    owners = requests.div(size, rounding_mode="floor")
    asked_of_me = owners == me
    from_each = (owners[me] == ranks[:, None]).sum(dim=1)  # (W,)
    receive, send = torch.stack((from_each, asked_of_me.sum(dim=1))).tolist()
    # Stable sorts keep the order of asking: rows leave by asker and arrive by owner.
    leaving = (~asked_of_me).flatten().long().argsort(stable=True)[: sum(send)]
    sent = rows.index_select(0, requests.flatten()[leaving] - me * size)
    arrived: Tensor = _AllToAll.apply(sent, receive, send)  # type: ignore[no-untyped-call]
    return arrived.index_select(0, owners[me].argsort(stable=True).argsort())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # noqa: ANN401 -- torch leaves its type open
        ctx.num_rows = rows.shape[0]
        return _gather(rows)

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
