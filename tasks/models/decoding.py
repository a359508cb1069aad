"""Writes text with a model, token by token: batched by length, with a key-value cache that finished rows leave.

A token is drawn by inverting the cumulative distribution with a uniform random number that the caller gives. So what is
written depends on neither the batch that a prompt was in nor on what was written before it, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Called after each batch with the number of texts that are done, and of all.
OnBatch = Callable[[int, int], None]

# Finished rows leave the batch when at most this share goes on: each removal copies the whole key-value cache.
_COMPACT_BELOW = 0.8


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt.

    ids      token ids, the one that ended it included
    stopped  whether the last of them ends an answer
    logps    log-probability of each id under the distribution that it was drawn from; none where decoding was greedy
    """

    ids: list[int]
    stopped: bool
    logps: list[float]


def longest_first(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Positions of texts in batches of similar length. What does not fit into memory fails in the first batch."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def padded(
    texts: Sequence[Sequence[int]], side: Literal["left", "right"], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of texts, both (number of texts, tokens of the longest)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(text) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    draws: torch.Tensor | None,
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float,
    stop_ids: Sequence[int],
    pad_id: int,
    top_p: float = 1.0,
    on_batch: OnBatch = lambda num_done, num_texts: None,
) -> list[Written]:
    """What the model writes after each prompt (token ids), up to the first of `stop_ids` or `max_new_tokens` tokens.

    Equal prompts should be neighbours: those of one batch are read once.

    Args:
        draws: (prompts, max_new_tokens), uniform in [0, 1), on the CPU; None: greedy.
        top_p: below 1, tokens come from the nucleus of this mass (arXiv 1904.09751). No rollout of a training does:
            its update would not know.
    """
    made: dict[int, Written] = {}
    for places in longest_first([len(prompt) for prompt in prompts], batch_size):
        written = _write_batch(
            model,
            [prompts[place] for place in places],
            None if draws is None else draws[places],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_ids=set(stop_ids),
            pad_id=pad_id,
            top_p=top_p,
        )
        made |= zip(places, written, strict=True)
        on_batch(len(made), len(prompts))
    return [made[place] for place in range(len(prompts))]


def _write_batch(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    draws: torch.Tensor | None,
    *,
    max_new_tokens: int,
    temperature: float,
    stop_ids: set[int],
    pad_id: int,
    top_p: float,
) -> list[Written]:
    """One batch. draws: (batch, max_new_tokens)."""
    import torch
    from transformers import DynamicCache

    # The samples of one prompt share the work of reading it: read each prompt once, then copy what was read.
    unique = list(dict.fromkeys(tuple(ids) for ids in prompts))
    places = {ids: place for place, ids in enumerate(unique)}
    copies = torch.tensor([places[tuple(ids)] for ids in prompts], device=model.device)
    input_ids, mask = padded(unique, "left", pad_id, model.device)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = list(range(len(prompts)))  # which prompt each row of the shrinking batch belongs to
    written = [Written([], False, []) for _ in prompts]
    stopped: set[int] = set()
    cache = DynamicCache(config=model.config)
    draws = None if draws is None else draws.to(model.device)
    with torch.inference_mode():
        for step in range(max_new_tokens):
            logits = model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            if step == 0 and len(unique) < len(prompts):
                cache.batch_select_indices(copies)
                logits, mask, position_ids = logits[copies], mask[copies], position_ids[copies]
            tokens, logps = _next(logits, temperature, None if draws is None else draws[:, step : step + 1], top_p)
            for row, token, logp in zip(rows, tokens.tolist(), logps, strict=True):
                if row in stopped:
                    continue  # a row that is over and still in the batch
                written[row].ids.append(token)
                written[row].logps.extend(logp)
                if token in stop_ids:
                    stopped.add(row)
            keep = [place for place, row in enumerate(rows) if row not in stopped]
            if not keep:
                break
            if len(keep) <= _COMPACT_BELOW * len(rows):
                kept = torch.tensor(keep, device=model.device)
                cache.batch_select_indices(kept)
                rows = [rows[place] for place in keep]
                tokens, mask, position_ids = tokens[kept], mask[kept], position_ids[kept]
                draws = None if draws is None else draws[kept]
            input_ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            position_ids = position_ids[:, -1:] + 1
    return [Written(one.ids, row in stopped, one.logps) for row, one in enumerate(written)]


def _next(
    logits: torch.Tensor, temperature: float, draws: torch.Tensor | None, top_p: float = 1.0
) -> tuple[torch.Tensor, list[list[float]]]:
    """Next tokens (batch,), and the log-probability of each in a list of its own, which is empty where greedy.

    logits: (batch, vocabulary); draws: (batch, 1).
    """
    import torch

    if draws is None:
        return logits.argmax(-1), [[] for _ in logits]
    probabilities = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(-1)
    # Scaled by the last entry: rounding can leave the sum a little under 1.
    wanted = draws * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, wanted, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], probabilities.gather(1, tokens).log().tolist()


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The likeliest tokens whose probabilities add up to `top_p`, the one that reaches it included; the others are 0.

    Of equal ones the first. probabilities: (batch, vocabulary), each row with the sum 1; the result too.
    """
    import torch

    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    kept = torch.where(before < top_p, ranked, 0.0)
    cut = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return cut / cut.sum(-1, keepdim=True)
