"""A frozen language model in shards, for one that fits no single device (FSDP).

Every rank keeps its part of each layer; a layer is put together where it is computed and taken
apart again, going forward and going back. All that learns stays whole on every rank, under DDP:
what is frozen has no gradient that would have to be shared.
"""

import logging

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from jobs.errors import UserError
from jobs.training.context import TrainContext
from jobs.training.job import TrainingJob
from model.llm import FrozenLlm
from model.stage2 import Stage2

_log = logging.getLogger(__name__)
_ENTRANCES = ("causal_logits", "suffix_logits", "generate")  # by which a FrozenLlm is called


def check_sharding(job: TrainingJob) -> None:
    """Raise UserError where the recipe asks for shards of what cannot be sharded."""
    if not job.section.shards_llm:
        return
    where = f"training.{job.stage}.shards_llm"
    if job.stage != "stage2":
        raise UserError(f"{where}: only stage2 has a language model; leave it out")
    if job.config.is_compiled:
        raise UserError(
            f"{where}: a model in shards is not compiled; set training.is_compiled=false, or leave "
            "the language model whole"
        )


def shard_llm(model: nn.Module, context: TrainContext) -> bool:
    """Leave on each rank its part of the language model of a stage 2; say whether there are parts.

    Alone, a rank has all of it. Every rank has to call it, with equal weights, before any of them
    is on the device: so no device ever holds more than its parts and a layer. Raises UserError for
    a language model that does not tell its layers.
    """
    assert isinstance(model, Stage2), "only a stage 2 has a language model"
    if context.world_size == 1:
        _log.info("shards_llm has no effect on one worker: it holds the whole language model")
        return False
    mesh = init_device_mesh(context.device.type, (context.world_size,))
    for layer in _layers(model.llm):
        fully_shard(layer, mesh=mesh)
    # What is left, embeddings and head, belongs to the whole: tied weights must not be parted.
    fully_shard(model.llm, mesh=mesh, reshard_after_forward=True)
    for name in _ENTRANCES:
        register_fsdp_forward_method(model.llm, name)
    return True


def gather_llm(model: nn.Module, context: TrainContext) -> None:
    """Put the language model together again on rank 0's CPU, to be written; others lose theirs.

    Nothing can be computed with it afterwards. Every rank has to call it.
    """
    assert isinstance(model, Stage2), "only a stage 2 has a language model"
    whole: dict[Tensor, nn.Parameter] = {}  # a tied weight stays one
    for module in model.llm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in whole:
                full = parameter.full_tensor()
                kept = full.cpu() if context.is_main else torch.empty(0)
                whole[parameter] = nn.Parameter(kept, requires_grad=False)
            module.register_parameter(name, whole[parameter])


def _layers(llm: FrozenLlm) -> list[nn.Module]:
    kinds = set(getattr(llm.model, "_no_split_modules", None) or ())
    found = [module for module in llm.model.modules() if type(module).__name__ in kinds]
    if not found:
        raise UserError(
            f"training.stage2.shards_llm: {type(llm.model).__name__} does not say what its layers "
            "are (_no_split_modules); leave it whole, with a smaller or half-precision model"
        )
    return found
