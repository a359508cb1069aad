"""Attention over rows laid end to end in one row, each of which attends to itself only. See docs/packing.md.

A batch is one row (1, T) of T tokens. `Segments` says which queries see which keys; it travels with the batch as an
argument of the model's forward (`model(input_ids, position_ids, segments=segments)`), so that a recomputation in
backward gets the one it was made with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from smoltulu.tasks.trainer.waits import put

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Name under which transformers knows this attention.
PACKED = "smoltulu_packed"
#: Query-key products per head: wasting fewer than these on padding is cheaper than another call.
_WORTH_A_CALL = 96**2

Piece = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """The query tokens [start, end) of a row, and the pieces of the row that hold their keys, in order.

    Causal, aligned at the end: the queries are the last keys.
    """

    query: Piece
    keys: tuple[Piece, ...]

    def __post_init__(self) -> None:
        assert self.query[0] < self.query[1] and self.keys, self
        start, end = self.keys[-1]
        assert start <= self.query[0] and end == self.query[1], self

    @property
    def num_queries(self) -> int:
        return self.query[1] - self.query[0]

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.keys)

    def key_indices(self) -> list[int]:
        return [token for piece in self.keys for token in range(*piece)]


@dataclass(frozen=True)
class Segments:
    """The segments of one packed row. Their queries lie end to end and cover it."""

    parts: tuple[Segment, ...]

    def __post_init__(self) -> None:
        edges = [0, *(part.query[1] for part in self.parts)]
        assert [part.query for part in self.parts] == list(pairwise(edges)), "queries must lie end to end"

    @property
    def num_tokens(self) -> int:
        return self.parts[-1].query[1] if self.parts else 0

    @property
    def position_ids(self) -> list[int]:
        """For each token the number of keys before it: its position in a row of its own."""
        return [position for part in self.parts for position in range(part.num_keys - part.num_queries, part.num_keys)]


def segments_of_lengths(lengths: Sequence[int]) -> Segments:
    """Rows of these lengths end to end."""
    return Segments(tuple(Segment(piece, (piece,)) for piece in pairwise(accumulate(lengths, initial=0))))


def segments_of_pairs(
    prompt_lengths: Sequence[int], chosen_lengths: Sequence[int], rejected_lengths: Sequence[int]
) -> Segments:
    """Pairs end to end, each as prompt, chosen, rejected: the rejected tokens see the prompt and themselves."""
    parts: list[Segment] = []
    start = 0
    for prompt, chosen, rejected in zip(prompt_lengths, chosen_lengths, rejected_lengths, strict=True):
        first, last = (start, start + prompt + chosen), (start + prompt + chosen, start + prompt + chosen + rejected)
        shared = ((start, start + prompt),) if prompt else ()
        parts += [Segment(first, (first,)), Segment(last, (*shared, last))]
        start = last[1]
    return Segments(tuple(parts))


class AttentionDropout(ValueError):
    """Attention is to drop weights, which packed attention cannot."""


def pack(model: PreTrainedModel) -> None:
    """Make a model attend by `segments`, and check on two short rows that they do not see each other.

    Without `segments` it attends as before. ValueError where the model cannot: sliding windows, dropout, no way down
    to its attention for an argument of forward.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    name, remedy = type(model).__name__, "set compute.packing to false"
    config = model.config.get_text_config()
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _mask)
    if model._supports_attention_backend:
        model.set_attn_implementation(PACKED)
    if config._attn_implementation != PACKED:
        raise ValueError(f"{name} does not take attention functions from outside; {remedy}")

    segments = segments_of_pairs([2], [1], [2])
    positions = torch.tensor([segments.position_ids], device=model.device)
    training = model.training
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # it raises where attention has dropout
            model(input_ids=torch.zeros_like(positions), position_ids=positions, segments=segments, use_cache=False)
    except AttentionDropout:
        rates = [f"{field} {rate}" for field, rate in vars(config).items() if "drop" in field and rate]
        raise ValueError(
            f"{name} has dropout in its attention ({', '.join(rates)}), packing has none; {remedy}"
        ) from None
    finally:
        model.train(training)
    model.eval()
    with torch.no_grad():
        hidden = [
            model(
                input_ids=torch.tensor([[0, 1, chosen, 1, 0]], device=model.device),
                position_ids=positions,
                segments=segments,
                use_cache=False,
                output_hidden_states=True,  # a classifier has no logits of every token
            ).hidden_states[-1][0, 3:]
            for chosen in (0, 1)
        ]
    model.train(training)
    # NaN counts as equal: a model of NaNs is refused elsewhere.
    if not torch.allclose(*hidden, rtol=0, atol=0, equal_nan=True):
        raise ValueError(f"{name} does not pass `segments` on to its attention, so packed rows would mix; {remedy}")


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H, D). Without segments: transformers' own SDPA."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    for unsupported in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(unsupported) is not None:
            raise ValueError(f"packing cannot do attention with {unsupported}; set compute.packing to false")
    if dropout:
        raise AttentionDropout(f"packing cannot do attention with dropout ({dropout:g}); set compute.packing to false")
    assert attention_mask is None
    assert query.shape[0] == 1 and query.shape[2] == segments.num_tokens, (query.shape, segments.num_tokens)
    if len(segments.parts) == 1:  # one row alone is plain causal attention
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)

    # RoPE leaves queries and keys in float32 under autocast. SDPA would cast them, the varlen kernel does not.
    device = query.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else query.dtype
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    attend = _by_varlen if _has_varlen(q) else _by_sdpa
    return attend(q, k, v, segments, scaling)[None], None


def _mask(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """No mask for packed rows, which come without one of their own; for padded and cached ones that of SDPA."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


# --- torch.nn.functional.scaled_dot_product_attention: CPU, and CUDA in float32 -------------------------------------


class _Grouped(NamedTuple):
    """Segments as padded batches. order (M,): token at each padded place; back (T,): place of each token."""

    shapes: list[tuple[int, int]]
    order: torch.Tensor
    back: torch.Tensor


def groups_of(lengths: Sequence[int]) -> list[list[int]]:
    """Which segments share a call, padded to the longest of it: indices, longest first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest**2 - lengths[index] ** 2 <= _WORTH_A_CALL:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@lru_cache(maxsize=4)
def _grouped(segments: Segments, device: torch.device) -> _Grouped:
    """Computed once a batch, not once a layer."""

    shapes: list[tuple[int, int]] = []
    order: list[int] = []
    back = [0] * segments.num_tokens
    for group in groups_of([part.num_keys for part in segments.parts]):
        longest = segments.parts[group[0]].num_keys
        shapes.append((len(group), longest))
        for index in group:
            part = segments.parts[index]
            for place, token in enumerate(range(*part.query), start=len(order) + part.num_keys - part.num_queries):
                back[token] = place
            # Padding comes last, so that no token sees it, and repeats a token of the segment itself, so that not
            # even a NaN goes from one row to another.
            keys = part.key_indices()
            order += keys + keys[-1:] * (longest - len(keys))
    return _Grouped(shapes, put(order, device), put(back, device))


def _by_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float | None
) -> torch.Tensor:
    """query (T, H, D), key and value (T, H_kv, D) -> (T, H, D).

    Every segment as the square causal attention of its keys, whose last rows are its queries: what SDPA's fast kernels
    can do. So the prompt of a pair is attended twice (its projections and its MLP are not).
    """
    import torch

    shapes, order, back = _grouped(segments, query.device)
    sizes = [number * length for number, length in shapes]
    parts = [tensor.index_select(0, order).split(sizes) for tensor in (query, key, value)]
    outputs = []
    for (number, length), *tensors in zip(shapes, *parts, strict=True):
        q, k, v = (tensor.unflatten(0, (number, length)).transpose(1, 2) for tensor in tensors)
        if q.is_cuda and q.dtype == torch.float32:
            # The fast float32 kernel has no grouped queries; SDPA would fall back to the one that stores all scores.
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, back)


# --- torch.nn.attention.varlen: CUDA in half precision --------------------------------------------------------------


class _Varlen(NamedTuple):
    """Segments for the varlen kernel. keys: token of each key, end to end; None where that is the row itself."""

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int
    keys: torch.Tensor | None


@lru_cache(maxsize=4)
def _varlen(segments: Segments, device: torch.device) -> _Varlen:
    """Computed once a batch, not once a layer."""
    import torch

    num_queries = [part.num_queries for part in segments.parts]
    num_keys = [part.num_keys for part in segments.parts]
    keys = [token for part in segments.parts for token in part.key_indices()]

    def cumulated(numbers: list[int]) -> torch.Tensor:
        return put(list(accumulate(numbers, initial=0)), device, torch.int32)

    return _Varlen(
        cumulated(num_queries),
        cumulated(num_keys),
        max(num_queries),
        max(num_keys),
        None if num_keys == num_queries else put(keys, device),
    )


def _has_varlen(query: torch.Tensor) -> bool:
    """Whether FlashAttention's kernel takes queries of this device, dtype and head dimension."""
    import torch

    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_dim = query.shape[-1]
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


@lru_cache
def _takes_gqa(kernel: Callable) -> bool:
    return "enable_gqa" in signature(kernel).parameters


def _by_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float | None
) -> torch.Tensor:
    """query (T, H, D), key and value (T, H_kv, D) -> (T, H, D). Causal windows are aligned at the end of the keys."""
    from torch.nn.attention.varlen import varlen_attn

    cu_queries, cu_keys, max_queries, max_keys, keys = _varlen(segments, query.device)
    if keys is not None:
        key, value = key.index_select(0, keys), value.index_select(0, keys)
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if (group := query.shape[1] // key.shape[1]) > 1:
        if _takes_gqa(varlen_attn):
            options["enable_gqa"] = True
        else:  # torch 2.11 wants equally many heads for queries and keys
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return varlen_attn(query, key, value, cu_queries, cu_keys, max_queries, max_keys, **options)
