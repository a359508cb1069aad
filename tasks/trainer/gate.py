"""What a trained model must show before its artifact is committed: it is the model that was trained, and it can stop.

Saved, loaded again, and compared: tensors by name and value (`tasks.models.folders.save_model`), outputs on a probe
batch. A language model then answers prompts of its training rows greedily, and is asked whether it ends in eos, or in
the token that ends a turn in its chat template.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.training import GateSettings
from smoltulu.tasks.models.tokens import IGNORED, prompt_ids, stop_token_ids
from smoltulu.tasks.models.turns import tools_of
from smoltulu.tasks.process import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("smoltulu")
_NUM_PROBES = 4
_PROBE_LENGTH = 64
#: Relative. The weights are compared bit by bit; sums of them may be added in another order on another call, and on a
#: GPU by another kernel.
_TOLERANCES = {"cpu": 1e-5, "cuda": 1e-4}


@dataclass(frozen=True)
class Answer:
    """What a model wrote: token ids, the eos included where it stopped."""

    prompt_ids: list[int]
    ids: list[int]
    stopped: bool


@dataclass(frozen=True)
class Probes:
    """Rows of token ids, and what a model on `device` computed for each: (1, T, V), or a score (1, 1)."""

    device: torch.device
    rows: list[list[int]]
    outputs: list[torch.Tensor]


def check_saved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dataset: Dataset,
    gate: GateSettings | None,
    bfloat16: bool,
    probes: Probes | None = None,
) -> dict[str, float]:
    """Compare the trained model with the one saved in `folder`, let the saved one answer, and return metrics.

    dataset     tokenised rows of the training, or rows with a `prompt`
    gate        None: no language model
    probes      what the trained model computed, where `model` is a copy of it
    ValueError where fewer answers stop than the gate asks for. Leaves the trained model on the CPU.
    """
    probes = probes or probe(model, tokenizer, dataset)
    model.to("cpu")  # not two models on one GPU
    reloaded = type(model).from_pretrained(str(folder), dtype=model.dtype, use_safetensors=True).to(probes.device)
    for ids, before in zip(probes.rows, probes.outputs, strict=True):
        check_equal(before, _outputs(reloaded, ids).cpu(), _TOLERANCES[probes.device.type])
    if gate is None or not gate.num_prompts:
        return {}
    answers = greedy_answers(
        reloaded,
        prompts(dataset, tokenizer, gate.num_prompts),
        tokenizer.pad_token_id,
        stop_token_ids(tokenizer),
        gate.max_new_tokens,
        bfloat16,
    )
    return judge(answers, tokenizer, gate)


def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> Probes:
    """What a model computes for a few rows, one at a time: outputs at padding do not matter and may differ."""
    rows = [ids[:_PROBE_LENGTH] for ids in prompts(dataset, tokenizer, _NUM_PROBES) if ids]
    return Probes(model.device, rows, [_outputs(model, ids).cpu() for ids in rows])


def check_equal(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> None:
    """RuntimeError where a saved model computes something else than the trained one."""
    largest = expected.abs().max().item()
    difference = (expected - found).abs().max().item()
    if not difference <= tolerance * max(1.0, largest):  # NaN too
        raise RuntimeError(
            f"the saved model computes other outputs than the trained one: they differ by {difference:.3g} (largest "
            f"output {largest:.3g}); something the model was trained with is not in its config"
        )


def prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Token ids of up to `count` prompts, from rows at equal distances: sources often lie one after the other."""
    step = max(1, len(dataset) // max(1, count))
    return [prompt_of(dataset[line], tokenizer) for line in range(0, len(dataset), step)][:count]


def prompt_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that generation starts from. Of a conversation: those before the first trained token."""
    if "prompt_ids" in row:
        return list(row["prompt_ids"])
    if "labels" in row:
        trained = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
        return list(row["input_ids"][:trained])
    return prompt_ids(tokenizer, [row["prompt"]], [tools_of(row["prompt"])])[0]


def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    pad_token_id: int,
    eos_token_id: int | list[int],
    max_new_tokens: int,
    bfloat16: bool = False,
) -> list[Answer]:
    """Answers to all prompts in one batch (one by one, where memory wants it), each up to eos or the model's room.

    Prompts that leave no room for an answer are left out. `eos_token_id`: every token that ends an answer.
    """
    settings = (pad_token_id, eos_token_id, max_new_tokens, bfloat16)
    try:
        return _answers(model, prompts, *settings)
    except RuntimeError as error:
        # If this failed, the finished training would start again with smaller batches, which would not help here.
        if len(prompts) < 2 or not is_out_of_memory(error):
            raise
    logger.warning("gate: out of memory with %d answers at once: one after the other", len(prompts))
    return [answer for prompt in prompts for answer in _answers(model, [prompt], *settings)]


def _answers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    pad_token_id: int,
    eos_token_id: int | list[int],
    max_new_tokens: int,
    bfloat16: bool,
) -> list[Answer]:
    """One batch, padded on the left."""
    import torch
    from transformers import GenerationConfig

    room = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    kept = [ids for ids in prompts if 0 < len(ids) < room]
    if not kept:
        return []
    longest = max(map(len, kept))
    ids = torch.tensor([[pad_token_id] * (longest - len(row)) + row for row in kept], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in kept], device=model.device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(max_new_tokens, room - longest),
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    model.eval()
    # Not inference_mode, in which autocast casts all weights anew for each token.
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    answers = []
    for row, tokens in zip(kept, written, strict=True):
        end = next((place for place, token in enumerate(tokens, 1) if token in stops), None)
        answers.append(Answer(row, tokens[:end], end is not None))
    return answers


def judge(answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase, gate: GateSettings) -> dict[str, float]:
    """Metrics of the answers; ValueError where fewer of them stopped than `gate` asks for."""
    if not answers:
        logger.warning("gate: no prompt leaves room for an answer: nothing was generated")
        return {}
    num_stopped = sum(answer.stopped for answer in answers)
    share = num_stopped / len(answers)
    mean_length = sum(len(answer.ids) for answer in answers) / len(answers)
    example = answers[0]
    logger.info(
        "gate: %d of %d greedy answers end in eos, %.0f tokens in the mean; one of them: %r -> %r",
        num_stopped,
        len(answers),
        mean_length,
        tokenizer.decode(example.prompt_ids)[-200:],
        tokenizer.decode(example.ids)[:200],
    )
    if share < gate.min_stopped_share:
        raise ValueError(
            f"gate: {num_stopped} of {len(answers)} greedy answers end in eos within {gate.max_new_tokens:,} tokens, "
            f"gate.min_stopped_share asks for {gate.min_stopped_share:g}. Look at the chat template (does it close the "
            "assistant's turn with eos inside its generation markers?), at the preflight's count of rows that lost "
            "their eos to max_length, or train longer. With a lower gate.min_stopped_share the model passes as it is: "
            "run again, nothing is trained a second time"
        )
    return {"gate_stopped_share": share, "gate_mean_length": mean_length}


def gate_failures(config: Any, outputs: Any, metrics: Mapping[str, float]) -> list[str]:
    """Which thresholds of today's gate a finished model fails, by the answers counted when it was made."""
    share, allowed = metrics.get("gate_stopped_share"), config.gate.min_stopped_share
    if share is None or share >= allowed:
        return []
    return [
        f"gate: {share:.0%} of its greedy answers ended in eos, gate.min_stopped_share asks for {allowed:g}; lower it, "
        "or train with other settings"
    ]


def _outputs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Logits (1, T, V) of a language model, score (1, 1) of a reward model, for one row of T tokens."""
    import torch

    was_training = model.training
    model.eval()
    with torch.inference_mode():
        # The class's own forward: the trainer wraps that of its model in bfloat16 autocast and never unwraps it.
        computed = type(model).forward(model, input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        logits: torch.Tensor = computed.logits
    model.train(was_training)
    return logits.float()
