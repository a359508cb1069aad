"""Batched generation and verified accuracy.

All uniform random numbers are drawn first, one per prompt, sample and step; inverting the cumulative distribution turns
a number into a token. So a completion does not depend on which batch it was in (the batch size is machinery), and two
models are compared on the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from smoltulu.tasks.models.tokens import prompt_ids, stop_token_ids
from smoltulu.tasks.verifiers import Graders

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Called after each batch with the number of texts that are done, and of all.
OnBatch = Callable[[int, int], None]

# Finished rows leave the batch when at most this share goes on: each removal copies the whole key-value cache.
_COMPACT_BELOW = 0.8


@dataclass(frozen=True)
class Completion:
    """What a model wrote: text without eos, and whether it stopped by itself."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class VerifiedAccuracy:
    """Mean over prompts of the share of samples accepted, and one record per prompt.

    The standard error is clustered by prompt.
    """

    value: float
    stderr: float | None
    records: tuple[dict[str, Any], ...]
    num_ungradable: int


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error sd/sqrt(n) with the n - 1 variance; None for fewer than two values."""
    assert values
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[float, float, float]:
    """Two-sided paired test of b against a over prompts with the same ids (normal approximation of the t-test).

    Args:
        a, b: prompt id -> score; the ids must be the same.

    Returns:
        mean of b - a, its standard error, and the p-value. Equal everywhere: (0, 0, 1).

    Raises:
        ValueError: different ids, or fewer than two.
    """
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise ValueError(f"a paired test needs the same ids on both sides; {len(odd)} are on one only, e.g. {odd[:3]}")
    if len(a) < 2:
        raise ValueError(f"a paired test needs at least two ids, got {len(a)}")
    mean, stderr = mean_and_stderr([b[key] - a[key] for key in a])
    assert stderr is not None
    if stderr == 0:
        return mean, 0.0, 1.0 if mean == 0 else 0.0
    return mean, stderr, 2 * NormalDist().cdf(-abs(mean / stderr))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[dict[str, str]]], max_tokens: int
) -> tuple[list[list[int]], int]:
    """Token ids of chat prompts with the generation header; the beginning of over-long ones is cut off.

    Returns:
        ids per prompt, and how many were cut.
    """
    encoded = prompt_ids(tokenizer, prompts)
    return [ids[-max_tokens:] for ids in encoded], sum(len(ids) > max_tokens for ids in encoded)


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


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    on_batch: OnBatch = lambda num_done, num_texts: None,
) -> list[list[Completion]]:
    """`num_samples` completions of every prompt (token ids); temperature 0 is greedy.

    Prompts of similar length share a batch, and rows that reached eos leave it.
    """
    import torch

    draws = torch.rand(
        (len(prompts), num_samples, max_new_tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    jobs = [(index, sample) for index in range(len(prompts)) for sample in range(num_samples)]
    completions: dict[tuple[int, int], Completion] = {}
    eos_ids = set(stop_token_ids(tokenizer))
    for places in longest_first([len(prompts[index]) for index, _ in jobs], batch_size):
        batch = [jobs[place] for place in places]
        written = _generate_batch(
            model,
            [prompts[index] for index, _ in batch],
            torch.stack([draws[index, sample] for index, sample in batch]) if temperature > 0 else None,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_ids=eos_ids,
            pad_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode([ids for ids, _ in written], skip_special_tokens=True)
        for job, (_, stopped), text in zip(batch, written, texts, strict=True):
            completions[job] = Completion(text, stopped)
        on_batch(len(completions), len(jobs))
    return [[completions[index, sample] for sample in range(num_samples)] for index in range(len(prompts))]


def verified_accuracy(
    rows: Sequence[Mapping[str, Any]], completions: Sequence[Sequence[Completion]]
) -> VerifiedAccuracy:
    """Score completions of rlvr rows ({"id", "verifier", "ground_truth"}) with their verifiers.

    A row with a sample that could not be graded is left out and counted.

    Raises:
        ValueError: no row can be graded.
    """
    jobs = [
        (row["verifier"], sample.text, row["ground_truth"])
        for row, samples in zip(rows, completions, strict=True)
        for sample in samples
    ]
    with Graders() as graders:
        verdicts = iter(graders.grade_all(jobs))
    records: list[dict[str, Any]] = []
    for row, samples in zip(rows, completions, strict=True):
        ours = list(islice(verdicts, len(samples)))
        scores = [verdict.score for verdict in ours if verdict.score is not None]
        if len(scores) == len(samples):
            records.append(
                {
                    "id": str(row["id"]),
                    "scores": scores,
                    "mean": sum(scores) / len(scores),
                    "num_stopped": sum(sample.stopped for sample in samples),
                    "completion": samples[0].text,  # of the first sample, for a reader
                    "reason": ours[0].reason,
                }
            )
    if not records:
        raise ValueError(
            f"none of the {len(rows)} verified_eval rows has a ground truth that its verifier can read; "
            "check data.verified_eval (verifier names and ground_truth)"
        )
    value, stderr = mean_and_stderr([record["mean"] for record in records])
    return VerifiedAccuracy(value, stderr, tuple(records), len(rows) - len(records))


def _generate_batch(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    draws: torch.Tensor | None,
    *,
    max_new_tokens: int,
    temperature: float,
    eos_ids: set[int],
    pad_id: int,
) -> list[tuple[list[int], bool]]:
    """Token ids (eos left out) and whether eos came, per prompt. draws: (batch, max_new_tokens) uniform in [0, 1)."""
    import torch
    from transformers import DynamicCache

    # The samples of one prompt share the work of reading it: read each prompt once, then copy what was read.
    unique = list(dict.fromkeys(tuple(ids) for ids in prompts))
    places = {ids: place for place, ids in enumerate(unique)}
    copies = torch.tensor([places[tuple(ids)] for ids in prompts], device=model.device)
    input_ids, mask = padded(unique, "left", pad_id, model.device)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = list(range(len(prompts)))  # which prompt each row of the shrinking batch belongs to
    written: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
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
            if draws is None:
                tokens = logits.argmax(-1)
            else:
                cumulative = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
                # Scaled by the last entry: rounding can leave the sum a little under 1.
                wanted = draws[:, step : step + 1] * cumulative[:, -1:]
                tokens = torch.searchsorted(cumulative, wanted, right=True).clamp(max=logits.shape[-1] - 1)[:, 0]
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if stopped[row]:
                    continue  # a row that is over and still in the batch
                if token in eos_ids:
                    stopped[row] = True
                else:
                    written[row].append(token)
            keep = [place for place, row in enumerate(rows) if not stopped[row]]
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
    return list(zip(written, stopped, strict=True))
