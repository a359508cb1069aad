"""FSDP2 (`compute.parallel: fsdp2`): each rank holds a part of a training's weights, gradients and optimizer.

torch's fully_shard (arXiv 2304.11277) makes a DTensor of every parameter. A decoder layer's weights are fetched from
all ranks before its forward and its backward, and freed after; embeddings, last norm and head are one group, so tied
weights stay one parameter. Gradients are summed over ranks after each micro-batch: to wait for the last, as DDP does,
every rank would hold the gradients of the whole model. Nothing is cast: weights and gradients travel in float32, and
autocast is that of DDP. So losses, clipping and rows are those of one process.

transformers' Trainer has two ways to take such a model. Its `fsdp` argument lets accelerate apply fully_shard: with
bfloat16 it would round gradients before they are summed, it knows one model only (PPO has four), and its checkpoints
are of one kind of parallelism. The other is for models that come divided (`is_distributed_loading_by_transformers`):
it prepares autocast alone and leaves the rest to the model. That is used here.

What runs outside of a step (rollouts, held-out rows, the check of what was saved) fetches the whole model first, see
`gathered`: ranks may then compute different numbers of batches. So a rank needs room for the weights once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel, Trainer

    from smoltulu.schemas.compute import ComputeSettings


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` was applied to a model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Divide a model among all ranks, in place; each part goes to `device`. Every rank must have the same weights.

    After this, run it by calling it: its submodules alone would find parts of their weights.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Names of the classes of its decoder layers, which every architecture of transformers has.
    names = set(model._no_split_modules or ())
    for module in reversed(list(model.modules())):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_trainer(trainer: Trainer, compute: ComputeSettings) -> None:
    """Divide a trainer's model, where compute asks for it, before its optimizer is made."""
    if not compute.is_sharded:
        return
    shard(trainer.model, trainer.args.device)
    trainer.is_distributed_loading_by_transformers = True
    # transformers would keep whole gradients until the last micro-batch of a step.
    trainer._defer_fsdp_gradient_reduction = nullcontext
    norm_of_trainer = trainer._get_grad_norm
    trainer._get_grad_norm = lambda *args, **kwargs: whole_tensor(norm_of_trainer(*args, **kwargs))


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A divided tensor put together; another as it is. All ranks must come here."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(*models: torch.nn.Module | None) -> Iterator[None]:
    """Every rank holds all weights of these models, to run them without gradients. All ranks must come here.

    Models that are not divided, and None, are left as they are.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [part for model in models if model is not None for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            # torch's own rule: the root's weights are needed again at once, in the backward.
            part.set_reshard_after_forward(part not in models, recurse=False)


def all_finite(model: torch.nn.Module, accelerator: Accelerator) -> bool:
    """Whether no weight is NaN or infinite. All ranks must come here, and hear the same."""
    import torch
    from torch.distributed.tensor import DTensor

    own = [one.to_local() if isinstance(one, DTensor) else one for one in model.parameters()]
    return bool(accelerator.gather(torch.stack([torch.isfinite(one).all() for one in own]).all()[None]).all())


def full_weights(model: torch.nn.Module, is_main: bool, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """Name -> whole weight in CPU memory for the main process, nothing for others. All ranks must come here.

    trained_only  without those that are not trained, and without buffers
    """
    named = model.named_parameters() if trained_only else model.state_dict().items()
    found = {}
    for name, value in named:
        if trained_only and not value.requires_grad:
            continue
        one = whole_tensor(value.detach())
        if is_main:
            found[name] = one.cpu().contiguous()
    return found


def put_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Set parameters to whole weights by name. Of a divided model each rank takes its part; all must have the whole."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for name, value in model.named_parameters():
            if name not in weights:
                continue
            new = weights[name].to(value.device)
            if isinstance(value, DTensor):
                new = distribute_tensor(new, value.device_mesh, value.placements, src_data_rank=None)
            value.copy_(new)


def whole(model: PreTrainedModel, is_main: bool) -> PreTrainedModel:
    """A model for the main process to save: of a divided one a plain copy in CPU memory. All ranks must come here."""
    if not is_sharded(model):
        return model
    weights = full_weights(model, is_main)
    if not is_main:
        return model
    own_class: Any = type(model).__bases__[1]  # fully_shard made a class of (FSDPModule, the model's own)
    copy: PreTrainedModel = own_class.from_pretrained(None, config=model.config, state_dict=weights, dtype=model.dtype)
    if copy.can_generate():
        copy.generation_config = model.generation_config
    return copy
