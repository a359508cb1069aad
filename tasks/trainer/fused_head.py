"""TRL's fused head (`trl.trainer.utils.add_fused_lm_head`) for tokens that are named by their place.

    model(..., shift_labels=labels, places=places, fused_lm_head=True).log_probs    (B, T)

TRL finds the tokens whose prediction counts with a mask. On a GPU it chooses by it, and so waits for the device twice a
forward pass; elsewhere it computes logits of every token. With `places` (`tasks/trainer/waits.py`), made on the host
with the batch, the head gets these tokens only, on every device, and nobody waits. The kernels are TRL's.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.trainer.waits import look_for_no_packed_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PER_TOKEN = ("log_probs", "entropy", "is_top1")


def give_fused_head(
    model: PreTrainedModel, temperature: float = 1.0, outputs: tuple[str, ...] = ("log_probs",)
) -> None:
    """Give a causal language model TRL's head, and `places` for it. Before an adapter is put on it."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError as error:
        raise _other_version("add_fused_lm_head") from error
    add_fused_lm_head(model, temperature=temperature, outputs=outputs)
    take_places(model)


def take_places(model: PreTrainedModel) -> None:
    """Have a causal language model that has TRL's head take `places`."""
    import trl.trainer.utils as of_trl

    if not hasattr(of_trl, "_use_triton"):
        raise _other_version("_use_triton")
    look_for_no_packed_rows(model)
    by_mask = model.forward

    def forward(self: Any, *args: Any, places: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if places is None:
            return by_mask(*args, **kwargs)
        labels, uses_triton = kwargs.pop("shift_labels"), of_trl._use_triton

        def choose(module: Any, args: Any, output: Any) -> Any:
            """Hidden states (B, T, H) -> (1, N, H)."""
            hidden = output.last_hidden_state
            output.last_hidden_state = hidden.reshape(-1, hidden.shape[-1]).index_select(0, places)[None]
            return output

        hook = self.base_model.register_forward_hook(choose)
        # All tokens that the head gets are to be scored: no need to look for them by the mask.
        of_trl._use_triton = lambda device: False
        try:
            made = by_mask(*args, **kwargs, shift_labels=labels.reshape(-1).index_select(0, places)[None])
        finally:
            of_trl._use_triton = uses_triton
            hook.remove()
        for name in _PER_TOKEN:
            if (of_places := getattr(made, name)) is not None:
                everywhere = of_places.new_zeros(labels.numel()).index_copy(0, places, of_places[0])
                setattr(made, name, everywhere.view(labels.shape))
        return made

    model.forward = types.MethodType(forward, model)


def _other_version(name: str) -> RuntimeError:
    import trl

    return RuntimeError(
        f"trl {trl.__version__} has no {name} in trl.trainer.utils, which log-probabilities are computed with; install "
        "the version of constraints.txt"
    )
