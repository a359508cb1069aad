"""LoRA (arXiv 2106.09685): a low-rank adapter beside every linear layer but the output head, trained instead of it.

With W a layer's weights, which stay as they are, x its input, and A (r, in) and B (out, r) the adapter:
y = W x + (lora_alpha / r) B A x. B starts at zero, so training starts at the base model. At the end the product is
added to W, so later stages load a model without adapters.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.schemas.training import LoraSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger("smoltulu")

ADAPTER_FOLDER = "adapter"


def with_adapter(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """The model with an adapter in float32. Only the adapter is trained. torch's global generator draws A.

    Call it after anything that replaces the model's forward (TRL's fused head): the adapter stays outside of that.

    Raises:
        ValueError: peft is not installed, or the model has no linear layers besides its head.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(
            "LoRA needs peft, which is not installed: pip install 'smoltulu[lora]', or remove the lora block"
        ) from error

    if not _has_linear_layers(model):
        raise ValueError(
            f"{type(model).__name__} has no linear layers besides its output head, so there is nothing that a LoRA "
            "adapter could stand beside; remove the lora block"
        )
    adapter = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    # peft would write the path into the adapter, whose bytes would then differ between machines. Where a pad token was
    # added, it would also find other embeddings at the path, and save ours in every checkpoint.
    model.name_or_path = ""
    adapted = get_peft_model(model, adapter)
    trained, every = adapted.get_nb_trainable_parameters()
    logger.info("LoRA of rank %d: trains %s of %s parameters (%.2f %%)", settings.r, f"{trained:,}", f"{every:,}",
                100 * trained / every)  # fmt: skip
    return adapted


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json; `PeftModel.from_pretrained(base, folder)` reads them."""
    model.save_pretrained(str(folder), safe_serialization=True)
    (folder / "README.md").unlink()  # an empty model card
    # A set, whose order differs between processes: the same training should give the same bytes.
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _has_linear_layers(model: PreTrainedModel) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return any(isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head for module in model.modules())
