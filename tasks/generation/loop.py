"""Writes text with a transformers model, token by token, in a batch whose finished rows are refilled.

A token is drawn by inverting the cumulative distribution with a uniform random number that belongs to its request. So
what is written depends on neither the batch that a prompt was in nor on what was written before it, but for rounding.

Prompts go longest first. Rows that ended leave the batch, and prompts of similar length take their places, so the batch
stays full. Rows are padded on the left; columns that pad all rows are cut off. Where a cache is more than keys and
values of all tokens (sliding windows, recurrent layers), a batch is finished before the next begins.

transformers' own continuous batching draws from one generator for all requests, so a text would depend on what else is
in the batch; and see RESULTS.md for its speed on a CPU (benchmarks/generation.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smoltulu.tasks.generation.interface import Request, Sampling, Written, draws_of, no_report
from smoltulu.tasks.models.batches import OnBatch, padded

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PreTrainedModel

# Finished rows leave the batch when at most this share goes on: each removal copies the whole key-value cache.
_COMPACT_BELOW = 0.8
# Rows are refilled where the next prompt is at least this share of the batch's width: a shorter one would be padded to
# it for as long as the widest row goes on, and a step costs what its widest row costs. Ours.
_REFILL_ABOVE = 0.5


@dataclass
class _Rows:
    """The batch: B requests that are being written, T columns of the cache and the token that it lacks.

    places     of the requests
    cache      keys and values, (B, heads, T, head size) for each layer
    mask       (B, T + 1), 0 where a row is padded
    positions  (B, 1) of the newest token
    steps      (B,) tokens written so far
    ids        (B, max_new_tokens) written so far
    logps      (B, max_new_tokens) of these
    draws      (B, max_new_tokens); None: greedy
    going      (B,) whether a row goes on; `is_over` says the contrary to the CPU
    """

    places: list[int]
    cache: DynamicCache
    mask: torch.Tensor
    positions: torch.Tensor
    steps: torch.Tensor
    ids: torch.Tensor
    logps: torch.Tensor
    draws: torch.Tensor | None
    going: torch.Tensor
    is_over: list[bool]

    def select(self, keep: Sequence[int]) -> None:
        """Only these rows, and no column that pads all of them."""
        import torch

        kept = torch.tensor(keep, device=self.mask.device)
        self.cache.batch_select_indices(kept)
        self.places = [self.places[row] for row in keep]
        self.is_over = [self.is_over[row] for row in keep]
        for name in ("mask", "positions", "steps", "ids", "logps", "draws", "going"):
            if (of_rows := getattr(self, name)) is not None:
                setattr(self, name, of_rows[kept])
        if _is_plain(self.cache) and (num_empty := int((self.mask.cumsum(-1) == 0).all(dim=0).sum())):
            self.mask = self.mask[:, num_empty:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., num_empty:, :], layer.values[..., num_empty:, :]

    def add(self, other: _Rows) -> None:
        """The rows of `other` behind these."""
        import torch
        from torch.nn.functional import pad

        width = max(self.mask.shape[1], other.mask.shape[1])
        own, new = width - self.mask.shape[1], width - other.mask.shape[1]
        self.mask = torch.cat([pad(self.mask, (own, 0)), pad(other.mask, (new, 0))])
        for layer, added in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                before, after = getattr(layer, name), getattr(added, name)
                setattr(layer, name, torch.cat([pad(before, (0, 0, own, 0)), pad(after, (0, 0, new, 0))]))
                setattr(added, name, None)
        for name in ("positions", "steps", "ids", "logps", "draws", "going"):
            if (of_rows := getattr(self, name)) is not None:
                setattr(self, name, torch.cat([of_rows, getattr(other, name)]))
        self.places += other.places
        self.is_over += other.is_over


def write(
    model: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    batch_size: int,
    pad_id: int,
    decode: Callable[[Sequence[int]], str] | None = None,
    on_batch: OnBatch = no_report,
) -> list[Written]:
    """What the model writes after each prompt, up to the first stop id or `max_new_tokens` tokens.

    Equal prompts should be neighbours: those that are read together are read once.

    batch_size: rows at once. decode: text of token ids, where there are stop strings.
    """
    import torch

    made: dict[int, Written] = {}
    waiting = deque(sorted(range(len(requests)), key=lambda place: -len(requests[place].prompt_ids)))
    stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=model.device)
    # Tokens of the longest text that can be asked for: so many positions are there, and memory.
    longest = max((len(one.prompt_ids) for one in requests), default=0) + sampling.max_new_tokens
    rows: _Rows | None = None
    # Not inference_mode, in which autocast casts all weights anew for each token.
    with torch.no_grad():
        while waiting or rows is not None:
            num_going = 0 if rows is None else rows.is_over.count(False)
            if waiting and (
                rows is None
                or (num_going <= _COMPACT_BELOW * batch_size and _takes(rows, requests[waiting[0]].prompt_ids))
            ):
                if rows is not None:
                    rows.select([row for row, is_over in enumerate(rows.is_over) if not is_over])
                read = [waiting.popleft() for _ in range(min(batch_size - num_going, len(waiting)))]
                new = _read(model, [requests[place] for place in read], read, sampling, pad_id, stop_ids)
                if rows is None:
                    rows = new
                else:
                    rows.add(new)
                ended = [row for row in range(len(rows.places) - len(read), len(rows.places)) if rows.is_over[row]]
            else:
                assert rows is not None
                if rows.mask.shape[1] >= longest:  # a row that is over grew with the others
                    rows.select([row for row, is_over in enumerate(rows.is_over) if not is_over])
                ended = _step(model, rows, sampling, stop_ids)
            if sampling.stop_strings:
                assert decode is not None, "an engine that knows the tokenizer"
                ended += _ended_by_text(rows, sampling.stop_strings, decode)
            if not ended:
                continue
            made |= zip((rows.places[row] for row in ended), _written(rows, ended, stop_ids), strict=True)
            on_batch(len(made), len(requests))
            keep = [row for row, is_over in enumerate(rows.is_over) if not is_over]
            if not keep:
                rows = None
            elif len(keep) <= _COMPACT_BELOW * len(rows.places) and not (
                waiting and _takes(rows, requests[waiting[0]].prompt_ids)
            ):
                rows.select(keep)
    return [made[place] for place in range(len(requests))]


def _read(
    model: PreTrainedModel,
    requests: Sequence[Request],
    places: list[int],
    sampling: Sampling,
    pad_id: int,
    stop_ids: torch.Tensor,
) -> _Rows:
    """New rows, with the first token of each. The samples of one prompt share the work of reading it."""
    import numpy as np
    import torch
    from transformers import DynamicCache

    unique = list(dict.fromkeys(tuple(one.prompt_ids) for one in requests))
    input_ids, mask = padded(unique, "left", pad_id, model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = _logits(model, input_ids, mask, positions, cache)
    if len(unique) < len(requests):
        numbers = {ids: number for number, ids in enumerate(unique)}
        copies = torch.tensor([numbers[tuple(one.prompt_ids)] for one in requests], device=model.device)
        cache.batch_select_indices(copies)
        logits, mask, positions = logits[copies], mask[copies], positions[copies]
    shape = (len(requests), sampling.max_new_tokens)
    draws = None
    if sampling.temperature > 0:
        draws = torch.from_numpy(np.stack([draws_of(one, sampling) for one in requests])).to(model.device)
    rows = _Rows(
        places=places,
        cache=cache,
        mask=mask,
        positions=positions[:, -1:],
        steps=mask.new_zeros(len(requests)),
        ids=mask.new_zeros(shape),
        logps=torch.zeros(shape, device=model.device),
        draws=draws,
        going=torch.ones(len(requests), dtype=torch.bool, device=model.device),
        is_over=[False] * len(requests),
    )
    _append(rows, logits, sampling, stop_ids)
    return rows


def _step(model: PreTrainedModel, rows: _Rows, sampling: Sampling, stop_ids: torch.Tensor) -> list[int]:
    """One more token for each row. Returns the rows that ended with it."""
    newest = rows.ids.gather(1, (rows.steps - 1)[:, None])
    return _append(rows, _logits(model, newest, rows.mask, rows.positions, rows.cache), sampling, stop_ids)


def _logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: DynamicCache,
) -> torch.Tensor:
    """(B, vocabulary) behind the last of input_ids (B, tokens), which the cache then has."""
    logits: torch.Tensor = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits


def _append(rows: _Rows, logits: torch.Tensor, sampling: Sampling, stop_ids: torch.Tensor) -> list[int]:
    """Draw a token for each row that goes on, and note it. Returns the rows that ended with it."""
    import torch

    last = sampling.max_new_tokens - 1
    place = rows.steps.clamp(max=last)[:, None]  # rows that are over stay as they are
    draws = None if rows.draws is None else rows.draws.gather(1, place)
    tokens, logps = _next(logits, sampling.temperature, draws, sampling.top_p)
    rows.ids.scatter_(1, place, torch.where(rows.going, tokens, rows.ids.gather(1, place)[:, 0])[:, None])
    if logps is not None:
        rows.logps.scatter_(1, place, torch.where(rows.going, logps, rows.logps.gather(1, place)[:, 0])[:, None])
    rows.steps = rows.steps + rows.going
    rows.positions = rows.positions + 1
    rows.mask = torch.cat([rows.mask, rows.mask.new_ones(len(rows.places), 1)], dim=1)
    rows.going = rows.going & ~torch.isin(tokens, stop_ids) & (rows.steps <= last)
    is_over = (~rows.going).tolist()  # the one wait of a token
    ended = [row for row, (before, now) in enumerate(zip(rows.is_over, is_over, strict=True)) if now and not before]
    rows.is_over = is_over
    return ended


def _ended_by_text(rows: _Rows, stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """Rows whose newest token completed a stop string: they are over. A token has a byte at least, but may be cut."""
    num_tokens = max(len(stop.encode()) for stop in stops) + 1
    going = [row for row, is_over in enumerate(rows.is_over) if not is_over]
    ended = []
    for row, ids, num in zip(going, rows.ids[going].tolist(), rows.steps[going].tolist(), strict=True):
        text = decode(ids[max(num - num_tokens, 0) : num])
        if any(stop in text for stop in stops):
            rows.is_over[row] = True
            rows.going[row] = False
            ended.append(row)
    return ended


def _written(rows: _Rows, ended: Sequence[int], stop_ids: torch.Tensor) -> list[Written]:
    """What these rows have."""
    ids, logps, steps = rows.ids[ended].tolist(), rows.logps[ended].tolist(), rows.steps[ended].tolist()
    stops = set(stop_ids.tolist())
    return [
        Written(own[:num], own[num - 1] in stops, logps_of[:num] if rows.draws is not None else [])
        for own, logps_of, num in zip(ids, logps, steps, strict=True)
    ]


def _takes(rows: _Rows, prompt: Sequence[int]) -> bool:
    """Whether this prompt, the longest of those that wait, may join the batch."""
    return _is_plain(rows.cache) and len(prompt) >= _REFILL_ABOVE * rows.mask.shape[1]


def _is_plain(cache: DynamicCache) -> bool:
    """Whether it holds keys and values of all tokens, in every layer, and nothing else."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _next(
    logits: torch.Tensor, temperature: float, draws: torch.Tensor | None, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Next tokens and the log-probability of each, both (B,); none where greedy.

    logits: (B, vocabulary); draws: (B, 1).
    """
    import torch

    if draws is None:
        return logits.argmax(-1), None
    probabilities = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(-1)
    # Scaled by the last entry: rounding can leave the sum a little under 1.
    wanted = draws * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, wanted, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], probabilities.gather(1, tokens)[:, 0].log()


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The likeliest tokens whose probabilities add up to `top_p`, the one that reaches it included; the others are 0.

    Of equal ones the first. probabilities: (B, vocabulary), each row with the sum 1; the result too.
    """
    import torch

    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    kept = torch.where(before < top_p, ranked, 0.0)
    cut = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return cut / cut.sum(-1, keepdim=True)
