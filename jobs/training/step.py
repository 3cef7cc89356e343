"""One optimizer step: micro-batches forward and back, in mixed precision, on all ranks together.

Whatever is drawn at random inside the model is seeded by the step and by the place of the
micro-batch in the global batch. So there is no random state to save, and a resumed or resized run
draws what an undisturbed one would.
"""

import contextlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from jobs.training.context import TrainContext
from jobs.training.data import MicroBatches
from jobs.training.gates import FiniteGuard
from jobs.training.objectives import Batch, Moment, Objective
from jobs.training.plan import Plan
from model.optim import build_adamw, set_learning_rate, soft_label_weight
from pipeline.loading.draws import hash63

Losses = dict[str, Tensor]  # by name, scalars


@dataclass(frozen=True, slots=True)
class Precision:
    """How a forward pass computes; weights and optimizer are float32 in any case."""

    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, device: torch.device) -> "Precision":
        """Return what a recipe's word means on a device: `auto` is bfloat16 on a GPU."""
        if name == "auto":
            name = "bfloat16" if device.type == "cuda" else "float32"
        return cls(getattr(torch, name))

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOptions:
    """How a step is computed."""

    precision: Precision
    clip_norm: float | None = None  # None, as in the papers: the gradient is not clipped
    seed: int = 0  # of what is drawn inside the model: dropout, negatives
    is_compiled: bool = False


class Stepper:
    """A model, its optimizer and its place among the ranks; moves the weights step by step."""

    def __init__(
        self, objective: Objective, plan: Plan, context: TrainContext, options: StepOptions
    ) -> None:
        self._objective = objective
        self._plan = plan
        self._context = context
        self._options = options
        self.model = objective.model.to(context.device).train()
        self.optimizer = build_adamw(self.model, plan.adamw)
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._forward = _replicated(self.model, context, options.is_compiled)
        self.guard = FiniteGuard(context.device)

    def update(self, step: int, batches: Iterable[Batch], pieces: MicroBatches) -> Losses:
        """Move the weights by one step; return its losses, float32 scalars left on the device.

        `batches` are this rank's micro-batches, cut as `pieces` says. The losses are those of this
        rank, averaged over its micro-batches.
        """
        self.model.train()
        set_learning_rate(self.optimizer, self._plan.schedule(step))
        self.optimizer.zero_grad(set_to_none=True)
        sums: Losses = {}
        for number, batch in enumerate(batches):
            terms = self._forward_and_back(step, number, batch, pieces)
            sums = {name: sums.get(name, 0) + value for name, value in terms.items()}
        losses = {name: value / pieces.count for name, value in sums.items()}
        losses["grad_norm"] = self._clip()
        self.guard.see(step, losses["loss"], losses["grad_norm"])
        self.optimizer.step()
        return losses

    def _forward_and_back(
        self, step: int, number: int, batch: Batch, pieces: MicroBatches
    ) -> Losses:
        seed = hash63("inside the model", self._options.seed, step, pieces.first + number)
        torch.manual_seed(seed)
        moment = Moment(
            alpha=soft_label_weight(step, ramp_steps=self._plan.alpha_ramp_steps),
            micro_batch=number,
            num_micro_batches=pieces.count,
        )
        with self._no_exchange(is_last=number == pieces.count - 1):
            with self._options.precision.autocast(self._context.device):
                terms = self._objective.losses(self._forward, batch, moment)
            torch.autograd.backward(terms["loss"] / pieces.count)
        return {name: value.detach().float() for name, value in terms.items()}

    def _no_exchange(self, *, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let only the last micro-batch average gradients over ranks."""
        if isinstance(self._forward, DistributedDataParallel) and not is_last:
            return self._forward.no_sync()
        return contextlib.nullcontext()

    def _clip(self) -> Tensor:
        """Return the gradient's norm over all parameters, before it is clipped."""
        norm = get_total_norm([p.grad for p in self._trainable if p.grad is not None])
        if self._options.clip_norm is not None:
            clip_grads_with_norm_(self._trainable, self._options.clip_norm, norm)
        return norm


def _replicated(model: nn.Module, context: TrainContext, is_compiled: bool) -> nn.Module:
    """Return the model as it is called: compiled if asked, and data-parallel over the ranks."""
    called: nn.Module = torch.compile(model) if is_compiled else model  # type: ignore[assignment]
    if context.world_size == 1:
        return called
    with warnings.catch_warnings():
        # Newer versions of torch have another name for it, which older ones do not know.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(
            called,
            device_ids=[context.device] if context.device.type == "cuda" else None,
            broadcast_buffers=False,  # the queue is the same on all ranks by construction
            init_sync=False,  # all ranks build or load the same weights; a frozen LLM is not sent
            gradient_as_bucket_view=True,
        )


class Window:
    """The mean of each loss over the steps since the last record, kept on the device.

    A running sum in float64: stopped and restored between two steps, it ends at the same number.
    """

    def __init__(self, context: TrainContext) -> None:
        self._context = context
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count one more step."""
        for name, value in losses.items():
            wide = value.detach().double()
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide
        self._count += 1

    def means(self) -> dict[str, float]:
        """Return the means over steps and ranks, and begin anew; every rank has to call it."""
        names, count = list(self._sums), self._count
        sums = self._over_ranks()
        self._sums, self._count = {}, 0
        return {name: total / count for name, total in zip(names, sums, strict=True)}

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, as JSON values; every rank has to call it."""
        return {
            "count": self._count,
            "sums": dict(zip(self._sums, self._over_ranks(), strict=True)),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the window whose state this is."""
        device = self._context.device
        self._count = state["count"]
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in state["sums"].items()
        }

    def _over_ranks(self) -> list[float]:
        if not self._sums:
            return []
        sums: list[float] = self._context.mean(torch.stack(list(self._sums.values()))).tolist()
        return sums
