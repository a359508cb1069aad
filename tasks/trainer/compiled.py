"""Decoder layers by torch.compile (`compute.compile`): norms, rotary embeddings and activations become fewer kernels.

A layer at a time, as torchtitan does: all layers share what is compiled, and it takes seconds. Attention over packed
rows stays a call of its own, since its segments are Python objects. Lengths are symbolic: a batch of another length
compiles nothing. Models in training mode are compiled; rollouts, held-out rows and checks of what was saved run as
before. Values are rounded to bfloat16 where they were, so that log-probabilities of both can be compared.

torch's caches of compiled graphs are pickles, and lie with other files where others may write. They are switched off;
what the compiler makes lies in a folder of this process, and is never used again: it may be for another CPU, or torn.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import logging
import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.packed_attention import PACKED, packed_attention

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("smoltulu")


def compile_layers(context: StageContext, *models: torch.nn.Module) -> None:
    """Compile the layers of these models, where compute asks for it; where torch cannot here, say so and go on.

    After models were divided (`sharded.shard`), which gives layers another class.
    """
    if not context.compute.compile:
        return
    import torch
    from transformers import AttentionInterface

    folder = tempfile.mkdtemp(prefix="compiler-", dir=context.work)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = folder, f"{folder}/triton"
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.cpp_cache_precompile_headers = False  # they lie in the machine's folder for temporary files
    torch._inductor.config.compile_threads = 1  # processes of its own would outlive the stage
    torch._inductor.config.emulate_precision_casts = True
    torch._dynamo.config.suppress_errors = False
    torch._dynamo.config.optimize_ddp = False  # it would cut graphs where DDP's buckets end, which layers do anyway
    try:
        _probe(next(models[0].parameters()).device)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        logger.warning("compute.compile is ignored: torch cannot compile here (%s)", said)
        return
    torch._dynamo.config.suppress_errors = True  # a layer that cannot be compiled runs as it is, with a warning
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    for model in models:
        names = set(getattr(model, "_no_split_modules", None) or ())
        layers = [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]
        if not layers:
            logger.warning("compute.compile is ignored for %s, which names no decoder layers", type(model).__name__)
        for layer in layers:
            _compile(layer)


def _probe(device: torch.device) -> None:
    """Forward and backward of something small."""
    import torch

    x = torch.ones(8, device=device, requires_grad=True)
    torch.compile(lambda x: x.sin() * torch.rsqrt(x.square().mean() + 1))(x).sum().backward()


def _compile(layer: torch.nn.Module) -> None:
    """Have a layer run compiled in training mode.

    transformers checkpoints activations within `forward`. That is done around what is compiled: dynamo compiles nothing
    of a checkpointed function with a call that it must leave alone.
    """
    import torch

    eager: Any = layer.forward
    compiled = torch.compile(inspect.unwrap(type(layer).forward).__get__(layer), dynamic=True)

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not layer.training or kwargs.get("past_key_values") is not None:
            return eager(*args, **kwargs)
        if getattr(layer, "gradient_checkpointing", False):
            return layer._gradient_checkpointing_func(functools.partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    layer.forward = forward
