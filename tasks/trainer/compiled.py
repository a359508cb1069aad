"""Decoder layers by torch.compile (`compute.compile`): norms, rotary embeddings and activations become fewer kernels.

A layer at a time, as torchtitan does: all layers share what is compiled, and it takes seconds. Attention over packed
rows stays a call of its own, since its segments are Python objects. Lengths are symbolic: a batch of another length
compiles nothing. Only training steps are compiled; rollouts, held-out rows and checks of what was saved run as before.

torch's caches of compiled graphs are pickles in a folder that others may write. They are switched off, and what the
compiler leaves behind lies in the stage's own folder.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.packed_attention import PACKED, packed_attention

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("smoltulu")


def compile_layers(context: StageContext, *models: torch.nn.Module) -> None:
    """Compile the layers of these models, where compute asks for it; where torch cannot here, say so and go on."""
    if not context.compute.compile:
        return
    import torch
    from transformers import AttentionInterface

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(context.work / "compiler")
    os.environ["TRITON_CACHE_DIR"] = str(context.work / "compiler" / "triton")
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.compile_threads = 1  # processes of its own would outlive the stage
    try:
        one = next(models[0].parameters())
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=one.device))
    except Exception as error:
        logger.warning(
            "compute.compile is ignored: torch cannot compile here (%s)",
            f"{type(error).__name__}: {error}".partition("\n")[0][:200],
        )
        return
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    for model in models:
        names = set(getattr(model, "_no_split_modules", None) or ())
        layers = [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]
        if not layers:
            logger.warning("compute.compile is ignored for %s, which names no decoder layers", type(model).__name__)
        for layer in layers:
            _compile(layer)


def _compile(layer: torch.nn.Module) -> None:
    import torch

    eager: Any = layer.forward
    compiled = torch.compile(eager, dynamic=True)

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training and torch.is_grad_enabled() else eager)(*args, **kwargs)

    layer.forward = forward
