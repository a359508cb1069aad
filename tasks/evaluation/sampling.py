"""Batched generation and verified accuracy.

All uniform random numbers are drawn first, one per prompt, sample and step; inverting the cumulative distribution turns
a number into a token. So a completion does not depend on which batch it was in (the batch size is machinery), and two
models are compared on the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.evaluation.kept import WRITTEN_BATCHES_PER_SHARD, Kept, in_shards
from smoltulu.tasks.generation.engines import TransformersEngine
from smoltulu.tasks.generation.interface import Request, Sampling
from smoltulu.tasks.models.batches import OnBatch
from smoltulu.tasks.models.tokens import prompt_ids, stop_token_ids
from smoltulu.tasks.models.turns import Messages, Tools
from smoltulu.tasks.verifiers import Graders

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """What a model wrote: text without eos, whether it stopped by itself, and its tokens, eos included."""

    text: str
    stopped: bool
    num_tokens: int | None = None


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


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_tokens: int,
    tools: Sequence[Tools | None] | None = None,
) -> tuple[list[list[int]], int]:
    """Token ids of chat prompts with the generation header; the beginning of over-long ones is cut off.

    Returns:
        ids per prompt, and how many were cut.
    """
    encoded = prompt_ids(tokenizer, prompts, tools)
    return [ids[-max_tokens:] for ids in encoded], sum(len(ids) > max_tokens for ids in encoded)


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
    kept: Kept | None = None,
) -> list[list[Completion]]:
    """`num_samples` completions of every prompt (token ids); temperature 0 is greedy.

    Prompts of similar length share a batch, and rows that reached eos leave it. `kept`: completions are kept there, and
    taken from there.
    """
    import torch

    draws = torch.rand(
        (len(prompts), num_samples, max_new_tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    flat, flat_draws = [list(prompt) for prompt in prompts for _ in range(num_samples)], draws.flatten(0, 1).numpy()
    engine = TransformersEngine(model, pad_id=tokenizer.pad_token_id, batch_size=batch_size)
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, stop_ids=tuple(stop_token_ids(tokenizer))
    )
    num_done = 0

    def answer(places: list[int]) -> list[tuple[list[int], bool]]:
        nonlocal num_done
        written = engine.generate(
            [Request(flat[one], 0, one // num_samples, one % num_samples, flat_draws[one]) for one in places],
            sampling,
            lambda num, _: on_batch(num_done + num, len(flat)),
        )
        num_done += len(places)
        return [(one.ids, one.stopped) for one in written]

    settings = [max_new_tokens, temperature, seed]
    requests = [(prompt, [*settings, place % num_samples]) for place, prompt in enumerate(flat)]
    of_prompt = [place // num_samples for place in range(len(flat))]
    written = in_shards(kept, requests, WRITTEN_BATCHES_PER_SHARD * batch_size, answer, of_prompt)
    texts = tokenizer.batch_decode([ids[:-1] if stopped else ids for ids, stopped in written], skip_special_tokens=True)
    made = [Completion(text, stopped, len(ids)) for text, (ids, stopped) in zip(texts, written, strict=True)]
    return [made[start : start + num_samples] for start in range(0, len(made), num_samples)]


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
                    # Of the first sample, for a reader.
                    "completion": samples[0].text,
                    "stop": "eos" if samples[0].stopped else "length",
                    "num_tokens": samples[0].num_tokens,
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
