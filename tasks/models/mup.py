"""muP: a learning rate that fits one width fits all (arXiv 2203.03466; MiniCPM 2404.06395, table 7).

With k = width / base width: embedding output x embedding_multiplier, residual branch x residual_scale / sqrt(layers),
attention / sqrt(head width), logits / k; initial weights of matrices / sqrt(k); Adam's rate of matrices / k. Matrices
are what maps width to width: embeddings and the output head count as vectors. Granite has the multipliers, so that
other programs can run the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, Trainer

    from smoltulu.schemas.base_model import MupSettings


def multipliers(mup: MupSettings, hidden_size: int, num_layers: int, num_heads: int) -> dict[str, float]:
    """Fields of Granite's config. `logits_scaling` is a divisor; attention has no default that could be left."""
    return {
        "embedding_multiplier": mup.embedding_multiplier,
        "residual_multiplier": mup.residual_scale / math.sqrt(num_layers),
        "attention_multiplier": 1 / math.sqrt(hidden_size / num_heads),
        "logits_scaling": hidden_size / mup.base_width,
    }


def scale_initial_weights(model: PreTrainedModel, base_width: int) -> None:
    """Divide the matrices' initial weights by sqrt(k), in place."""
    import torch

    with torch.no_grad():
        for _, weight in matrices(model):
            weight.div_(math.sqrt(model.config.hidden_size / base_width))


def matrices(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Weights whose both sides grow with the width: all of two dimensions, but embeddings and output head."""
    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    yield from (
        (name, weight) for name, weight in model.named_parameters() if weight.ndim == 2 and id(weight) not in ends
    )


def scale_rates(optimizer: torch.optim.Optimizer, model: PreTrainedModel, base_width: int) -> None:
    """Divide Adam's rate of matrices by k. The rest comes first: its rate is the one that logs show.

    Weight decay is multiplied by k there, as AdamW multiplies it by the rate:
    weights forget equally fast at any width.
    """
    k = model.config.hidden_size / base_width
    wide = {id(weight) for _, weight in matrices(model)}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        own = [weight for weight in group["params"] if id(weight) in wide]
        rest = [weight for weight in group["params"] if id(weight) not in wide]
        if rest:
            groups.append({**group, "params": rest})
        if own:
            scaled = {"lr": group["lr"] / k, "weight_decay": group["weight_decay"] * k}
            groups.append({**group, **scaled, "params": own})
    optimizer.param_groups[:] = sorted(groups, key=lambda group: id(group["params"][0]) in wide)


def follow(trainer: Trainer, base_width: int) -> None:
    """Have a trainer make its optimizer by muP, before it makes its schedule.

    ValueError: its model was not made with muP, or with another base width.
    """
    model = trainer.model
    scaling = float(getattr(model.config, "logits_scaling", 1.0))
    if model.config.model_type != "granite" or abs(scaling * base_width - model.config.hidden_size) > 1e-6:
        wanted = model.config.hidden_size / base_width
        raise ValueError(
            f"mup_base_width {base_width} needs a model that was made with it: Granite whose logits are divided by "
            f"{wanted:g}; this is {model.config.model_type} with {scaling:g}. Give base_model.scratch.mup the same "
            "base_width, or remove mup_base_width"
        )
    create = trainer.create_optimizer

    def create_optimizer(*given: Any) -> Any:
        is_new = trainer.optimizer is None
        optimizer = create(*given)
        if is_new:
            scale_rates(optimizer, model, base_width)
        return optimizer

    trainer.create_optimizer = create_optimizer
