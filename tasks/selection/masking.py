"""Heads switched off, and on again. Kinds:

uniform               the heads attend equally to every visible position: weight 1/(i + 1) in row i (2505.07293, app. C)
reference_checkpoint  the same, made in the weights: rows of q_proj are zero. What is saved then works in any engine
zero_output           the heads say nothing: another operation, for ablations

Use: `with masked(model, heads, kind): model(...)`, or `plain_and_masked` for the hidden states of both passes, of which
the layers below the lowest masked one are computed once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.selection import MaskKind
from smoltulu.tasks.selection.attention import HeadPlace, attend_with_heads, attention_modules

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def check_heads(model: PreTrainedModel, heads: Sequence[HeadPlace]) -> None:
    """ValueError where a head is not of this model, or named twice."""
    config = model.config.get_text_config()
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    wrong = [place for place in heads if not (0 <= place[0] < num_layers and 0 <= place[1] < num_heads)]
    if wrong:
        raise ValueError(
            f"heads {wrong[:5]} (layer, head) are not of this model, which has layers 0 to {num_layers - 1} of heads 0 "
            f"to {num_heads - 1}; heads.json is of another model: make it again for this one"
        )
    if len(set(heads)) != len(heads):
        raise ValueError(f"heads are named twice: {sorted(heads)}")


@contextmanager
def masked(model: PreTrainedModel, heads: Sequence[HeadPlace], kind: MaskKind = "uniform") -> Iterator[None]:
    """`heads` of the model are masked. On exit, after an error too, the model is as it was, bit for bit.

    Works with padding on either side and with packed rows (`segments`). Weights stay where they are, so no copy of the
    model is made. Contexts do not nest.

    Raises:
        ValueError: heads of another model, or attention whose heads cannot be masked (`attention_modules`).
    """
    check_heads(model, heads)
    if kind == "uniform":
        with attend_with_heads(model, heads):
            yield
    elif kind == "zero_output":
        with _zero_outputs(model, heads):
            yield
    else:
        with _zero_query_rows(model, heads):
            yield


@contextmanager
def _zero_outputs(model: PreTrainedModel, heads: Sequence[HeadPlace]) -> Iterator[None]:
    """What a head gives to o_proj is zero."""
    modules = attention_modules(model)
    hooks = []
    try:
        for layer, numbers in _by_layer(heads).items():
            head_dim = modules[layer].head_dim

            def zero(
                module: torch.nn.Module, args: tuple[torch.Tensor], numbers: list[int] = numbers, dim: int = head_dim
            ) -> tuple[torch.Tensor]:
                (hidden,) = args  # (B, L, H * D)
                apart = hidden.unflatten(-1, (-1, dim)).clone()
                apart[..., numbers, :] = 0
                return (apart.flatten(-2),)

            hooks.append(modules[layer].o_proj.register_forward_pre_hook(zero))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _zero_query_rows(model: PreTrainedModel, heads: Sequence[HeadPlace]) -> Iterator[None]:
    """Rows of q_proj, and their bias, are zero: so are the queries, as rotation and a norm of each head keep zeros."""
    import torch

    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for tensor, rows in _query_rows(model, heads):
                kept.append((tensor, rows, tensor[rows].clone()))
                tensor[rows] = 0
        yield
    finally:
        with torch.no_grad():
            for tensor, rows, values in kept:
                tensor[rows] = values


def reference_checkpoint(model: PreTrainedModel, heads: Sequence[HeadPlace]) -> dict[str, torch.Tensor]:
    """The model's state dict with these heads masked in it: for `save_pretrained(folder, state_dict=...)`.

    Only the tensors that change are copies. ValueError as `masked`.
    """
    check_heads(model, heads)
    state = model.state_dict()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for tensor, rows in _query_rows(model, heads):
        changed = tensor.detach().clone()
        changed[rows] = 0
        state[names[id(tensor)]] = changed
    return state


def _query_rows(
    model: PreTrainedModel, heads: Sequence[HeadPlace]
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each weight and bias of q_proj, with the numbers of its rows that belong to `heads`."""
    import torch

    modules = attention_modules(model)
    for layer, numbers in _by_layer(heads).items():
        module = modules[layer]
        norm = getattr(module, "q_norm", None)
        if norm is not None and (norm.weight.shape[-1] != module.head_dim or getattr(norm, "bias", None) is not None):
            raise ValueError(
                f"{type(model).__name__} normalises the queries of all heads together, or with a bias, so that zero "
                "rows of q_proj change other heads; set selection.mask to uniform"
            )
        rows = torch.cat([torch.arange(number * module.head_dim, (number + 1) * module.head_dim) for number in numbers])
        for tensor in (module.q_proj.weight, module.q_proj.bias):
            if tensor is not None:
                yield tensor, rows.to(tensor.device)


def _by_layer(heads: Sequence[HeadPlace]) -> dict[int, list[int]]:
    layers = defaultdict(list)
    for layer, head in heads:
        layers[layer].append(head)
    return dict(layers)


def lowest_layer(heads: Sequence[HeadPlace]) -> int:
    """The lowest layer in which a head is masked: below it both passes are the same."""
    return min(layer for layer, _ in heads)


def plain_and_masked(
    model: PreTrainedModel, heads: Sequence[HeadPlace], kind: MaskKind, batch: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head of the model reads, (B, L, hidden) each: without a mask, and with `heads` masked."""
    plain, other = masked_passes(model, [heads], kind, batch)
    return plain, other


def masked_passes(
    model: PreTrainedModel, head_sets: Sequence[Sequence[HeadPlace]], kind: MaskKind, batch: Mapping[str, Any]
) -> Iterator[torch.Tensor]:
    """What the head of the model reads, (B, L, hidden) each: without a mask, then with each of the sets masked.

    Layers below the lowest masked one of a set are those of the pass without a mask, computed once. All passes attend
    with the same kernel and mask, so that an empty set gives the plain pass bit for bit. One pass is alive at a time.

    Args:
        batch: arguments of forward: input_ids, attention_mask, position_ids, segments. No labels.

    Raises:
        ValueError: as `masked`, and a model whose layers or last norm are not where Llama has them.
    """
    body = model.base_model
    layers, norm = getattr(body, "layers", None), getattr(body, "norm", None)
    if layers is None or norm is None:
        raise ValueError(
            f"{type(model).__name__} has no `layers` and `norm`, so its passes cannot be shared; give another selector "
            "model (Llama, Qwen, Granite, SmolLM2)"
        )
    for heads in head_sets:
        check_heads(model, heads)
    starts = {lowest_layer(heads) for heads in head_sets if heads}
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Inputs of other layers are made again: kept, they would be as much memory as training takes.
            seen[number] = (args if number in starts else (None, *args[1:]), kwargs)

        return hook

    with ExitStack() as stack:
        for number in range(min(starts, default=len(layers)), len(layers)):
            hook = layers[number].register_forward_pre_hook(keep(number), with_kwargs=True)
            stack.callback(hook.remove)
        with attend_with_heads(model):
            plain: torch.Tensor = body(**batch, use_cache=False).last_hidden_state
    yield plain
    for heads in head_sets:
        if not heads:
            yield plain
            continue
        with ExitStack() as stack:
            if kind != "uniform":  # the masks that were made are this attention's
                stack.enter_context(attend_with_heads(model))
            stack.enter_context(masked(model, heads, kind))
            lowest = lowest_layer(heads)
            hidden = seen[lowest][0][0]
            for number in range(lowest, len(layers)):
                args, kwargs = seen[number]
                made = layers[number](hidden, *args[1:], **kwargs)
                hidden = made[0] if isinstance(made, tuple) else made
            other: torch.Tensor = norm(hidden)
        yield other
