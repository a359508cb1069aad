"""One attention function that can be told, layer by layer, which heads to mask and who watches queries and keys.

It stands in for the model's own while a context is open (`attend_with_heads`), and computes what transformers' SDPA or
our packed attention computes. A registered attention function needs a registered mask function of the same name:
without one transformers hands over no mask at all (`masking_utils._preprocess_mask_arguments`), and a function that
trusts its mask then attends to the future. So this function refuses a missing mask, but for packed rows, whose
`segments` say who sees whom.

Heads are known where a logit is query times key and nothing else, and where every layer sees the whole row: no sliding
windows, no attention sinks, no linear biases, no soft caps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.trainer.packed_attention import PACKED, packed_attention

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: A query head: layer and number in it, both from 0.
HeadPlace = tuple[int, int]
#: Names under which transformers knows this attention: with a mask, and for packed rows.
HEADS, HEADS_PACKED = "smoltulu_heads", "smoltulu_heads_packed"
#: Attributes of an attention module: bool (num_heads,), true where masked; and who is called with each call's tensors.
_MASKED, _WATCHER = "_smoltulu_masked_heads", "_smoltulu_watcher"

#: layer, query (B, H, L, D), key (B, H_kv, L, D), attention_mask (B, 1, L, L) or None, scaling
Watcher = Callable[[int, "torch.Tensor", "torch.Tensor", "torch.Tensor | None", float], None]


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The attention of each layer, from the first. ValueError where its heads cannot be told or masked.

    Each has q_proj, o_proj and head_dim; q_proj makes the queries of all heads end to end and nothing besides.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    remedy = (
        "give a selector model with plain causal attention (Llama, Qwen, Granite, SmolLM2) as selection.model, or "
        "choose selection.method rds_plus, perplexity or length, which mask no heads"
    )
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not take attention functions from outside, so no head can be masked; {remedy}")
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{name} attends to the future (is_causal false), so it has no loss of a next token; {remedy}")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds or window is not None:
        seen = f"layers of kind {', '.join(sorted(kinds))}" if kinds else f"a sliding window of {window:,} tokens"
        raise ValueError(f"{name} has {seen}: a masked head there is not uniform over the whole row; {remedy}")
    found = {}
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "o_proj"):
            found[module.layer_idx] = module
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    missing = [str(layer) for layer in range(num_layers) if layer not in found]
    if missing or len(found) != num_layers:
        raise ValueError(f"{name} has no attention that is known here in layers {', '.join(missing[:8])}; {remedy}")
    modules = [found[layer] for layer in range(num_layers)]
    for layer, module in enumerate(modules):
        if getattr(module, "sinks", None) is not None:
            raise ValueError(f"{name} has attention sinks: a masked head would not be uniform over the row; {remedy}")
        query, head_dim = getattr(module, "q_proj", None), getattr(module, "head_dim", None)
        if query is None or head_dim is None or query.weight.shape[0] != num_heads * head_dim:
            raise ValueError(
                f"{name} makes its queries in layer {layer} in a way that is not known here (expected a q_proj of "
                f"{num_heads} heads and nothing else); {remedy}"
            )
    return modules


@contextmanager
def attend_with_heads(
    model: PreTrainedModel,
    heads: Sequence[HeadPlace] = (),
    watcher: Watcher | None = None,
) -> Iterator[None]:
    """The model attends by this function: queries of `heads` are zero, `watcher` is called in every layer.

    A packed model (`packed_attention.pack`) stays one, and then needs `segments`. On exit, after an error too, the
    model has its own attention again. ValueError: see `attention_modules`.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    modules = attention_modules(model)
    config = model.config.get_text_config()
    before = config._attn_implementation
    assert before not in (HEADS, HEADS_PACKED), "these contexts do not nest"
    name = HEADS_PACKED if before == PACKED else HEADS
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, _no_mask if name == HEADS_PACKED else _mask)
    try:
        model.set_attn_implementation(name)
        assert config._attn_implementation == name
        for layer, module in enumerate(modules):
            own = [head for place, head in heads if place == layer]
            if own:
                masked = torch.zeros(config.num_attention_heads, dtype=torch.bool, device=module.q_proj.weight.device)
                masked[own] = True
                setattr(module, _MASKED, masked)
            if watcher is not None:
                setattr(module, _WATCHER, watcher)
        yield
    finally:
        model.set_attn_implementation(before)
        for module in modules:
            for attribute in (_MASKED, _WATCHER):
                if hasattr(module, attribute):
                    delattr(module, attribute)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, H, L, D), key and value (B, H_kv, L, D) -> (B, L, H, D)."""
    for unsupported in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(unsupported) is not None:
            raise ValueError(
                f"attention with {unsupported}: a masked head would not be uniform over the row; give another selector "
                "model, or choose selection.method rds_plus, perplexity or length"
            )
    if attention_mask is None and segments is None:
        raise ValueError("no attention mask, and rows that are not packed: this attention would see the future")
    watcher: Watcher | None = getattr(module, _WATCHER, None)
    if watcher is not None:
        watcher(module.layer_idx, query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    masked = getattr(module, _MASKED, None)
    if masked is not None:
        # All logits 0, so all weights equal, whatever the kernel. Grouped heads share keys, never queries.
        query = query.masked_fill(masked[None, :, None, None], 0)
    return packed_attention(module, query, key, value, attention_mask, dropout, scaling, segments, **kwargs)


def _mask(*, allow_is_causal_skip: bool = True, **kwargs: Any) -> torch.Tensor | None:
    """That of SDPA, and always one."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(allow_is_causal_skip=False, **kwargs)


def _no_mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """None for packed rows; padded ones, which come with a mask of their own, get that of SDPA."""
    return None if attention_mask is None else _mask(attention_mask=attention_mask, **kwargs)
