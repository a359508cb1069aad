"""One training step on the longest rows, for its memory and its time.

Not a trainer: the model, the batch, the loss's shape, gradients, clipping and AdamW, which is what memory goes to. What
RLVR holds besides is computed (tasks/preflight/rollout_memory.py). Not in it: the gradient buckets of several
processes, which are 4 bytes a trained parameter.
"""

from __future__ import annotations

import gc
import heapq
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.preflight import DryRun, PreflightConfig, PreflightInputs
from smoltulu.schemas.training import LoraSettings
from smoltulu.tasks.data.rows import stored_rows
from smoltulu.tasks.models.folders import device_of, fit_embeddings, load_language_model, load_tokenizer, use_bfloat16
from smoltulu.tasks.models.lora import with_adapter
from smoltulu.tasks.models.tokens import IGNORED, prompt_ids
from smoltulu.tasks.preflight.rollout_memory import require_memory, rlvr_bytes
from smoltulu.tasks.process import is_out_of_memory
from smoltulu.tasks.stage import StageContext

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("smoltulu")
#: Columns of a tokenised row: `row`, its number, and lists of token ids or masks.
Row = dict[str, Any]

_SUBJECTS = {"conversations": "sft", "pairs": "dpo", "prompts": "rlvr"}
#: Prompts that are tokenised to find the longest: those with the most text.
_NUM_CANDIDATES = 256


def dry_run(config: PreflightConfig, inputs: PreflightInputs, file: Path, context: StageContext) -> DryRun | None:
    """The longest rows of `file`, in as large a micro-batch as compute asks for, or as fits.

    The first of two steps makes the optimizer's state and is not timed. ValueError where not even one row fits.
    """
    from smoltulu.tasks.trainer.loop import prepare_torch

    prepare_torch(context)
    subject = config.subject or _SUBJECTS[config.kind]
    compute = context.compute.of(subject)
    device = device_of(compute)
    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    asked = compute.per_device_train_batch_size
    if config.kind == "prompts":
        rows = _longest_prompts(file, asked, tokenizer, config)
    else:
        rows = _longest(file, asked, _packs(subject, compute))
    size = asked = min(asked, len(rows))
    while size:
        try:
            num_tokens, seconds, peak = _measured(
                lambda batch: _train(subject, inputs, tokenizer, batch, compute, config), rows[:size], device
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("dry run of %s: out of memory with %d of the longest rows", subject, size)
            size //= 2
            num_tokens = 0
        # Not where the error is caught: its frames still hold the model then.
        _free(device)
        if not num_tokens:
            continue
        bfloat16 = use_bfloat16(config.precision, compute)
        reference, generation = rlvr_bytes(config, Path(inputs.model), _length(rows[0]), compute, bfloat16)
        if generation and device == "cuda":
            require_memory(max(reference + peak, generation), config, _length(rows[0]))
        return DryRun(
            subject=subject,
            device=_device_name(device),
            precision="bfloat16" if bfloat16 else "float32",
            per_device_train_batch_size=size,
            asked_batch_size=asked,
            activation_checkpointing=compute.activation_checkpointing,
            packing=_packs(subject, compute),
            lora_r=_lora_r(config),
            num_tokens=num_tokens,
            seconds=seconds,
            peak_memory_bytes=reference + peak,
            generation_bytes=generation,
        )
    lengths = "max_prompt_length or max_completion_length" if config.kind == "prompts" else "max_length"
    adapters = f", add a {subject}.lora block" if subject in ("sft", "dpo") and _lora_r(config) is None else ""
    raise ValueError(
        f"{subject}: out of memory with one of the longest rows alone ({_length(rows[0]):,} tokens); set "
        f"compute.activation_checkpointing, lower {lengths}{adapters}, or take a larger device "
        "(preflight.dry_run: false skips this check, not the failure)"
    )


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _packs(subject: str, compute: ComputeSettings) -> bool:
    return compute.packing and subject != "rlvr"


def _lora_r(config: PreflightConfig) -> int | None:
    return config.training.lora_r if config.training else None


def _measured(train: Callable[[list[Row]], tuple[int, float]], rows: list[Row], device: str) -> tuple[int, float, int]:
    """Tokens, seconds and peak bytes of `train`."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _reset_resident_peak()
    num_tokens, seconds = train(rows)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else max(_resident_peak() - before, 0)
    return num_tokens, seconds, peak


def _free(device: str) -> None:
    """Give the memory of a dry run back; models hold themselves by cycles."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _train(
    subject: str,
    inputs: PreflightInputs,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    compute: ComputeSettings,
    config: PreflightConfig,
) -> tuple[int, float]:
    """Load the model and train two steps on the same rows; tokens of a step, seconds of the second."""
    import torch

    device = device_of(compute)
    model = _model(subject, Path(inputs.model), tokenizer, compute, _lora_r(config)).to(device)
    if compute.activation_checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    loss_of, batch, num_tokens = _batch(subject, model, rows, tokenizer, compute)
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        with torch.autocast(device, torch.bfloat16, enabled=use_bfloat16(config.precision, compute)):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    return num_tokens, seconds


def _model(
    subject: str, folder: Path, tokenizer: PreTrainedTokenizerBase, compute: ComputeSettings, lora_r: int | None
) -> PreTrainedModel | PeftModel:
    """The base model as the stage would hold it: with a score head, or with the head that holds no logits."""
    import torch

    if subject == "reward_model":
        from transformers import AutoModelForSequenceClassification

        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            str(folder), num_labels=1, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        fit_embeddings(model, tokenizer)
        if _packs(subject, compute):
            from smoltulu.tasks.trainer.packed_attention import pack

            pack(model)
        return model
    from smoltulu.tasks.trainer.packed_attention import pack
    from smoltulu.tasks.training.preference_batch import give_fused_head

    model = load_language_model(folder)
    fit_embeddings(model, tokenizer)
    if _packs(subject, compute):
        pack(model)
    give_fused_head(model)
    return model if lora_r is None else with_adapter(model, LoraSettings(r=lora_r))


def _batch(
    subject: str,
    model: PreTrainedModel | PeftModel,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    compute: ComputeSettings,
) -> tuple[Callable[[dict[str, Any]], torch.Tensor], dict[str, Any], int]:
    """Loss of a batch, the batch as the stage lays it out, and its tokens, padding not counted."""
    import torch

    pad = tokenizer.pad_token_id
    if subject == "dpo":
        from smoltulu.tasks.training.preference_batch import PairCollator, completion_logps

        def preference_loss(batch: dict[str, Any]) -> torch.Tensor:
            chosen, rejected = completion_logps(model, batch)
            return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

        return preference_loss, PairCollator(pad, compute.packing)(rows), sum(map(_length, rows))
    if subject == "reward_model":
        from smoltulu.tasks.training import reward_batch

        def ranking_loss(batch: dict[str, Any]) -> torch.Tensor:
            names = ("input_ids", "attention_mask", "position_ids", "segments")
            arguments = {name: batch[name] for name in names if name in batch}
            if "last_tokens" in batch:
                hidden = model.base_model(**arguments, use_cache=False).last_hidden_state
                scores = model.score(hidden)[0, batch["last_tokens"]]
            else:
                scores = model(**arguments, use_cache=False).logits
            chosen, rejected = scores.squeeze(-1).chunk(2)
            return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

        return ranking_loss, reward_batch.PairCollator(pad, compute.packing)(rows), sum(map(_length, rows))

    def token_loss(batch: dict[str, Any]) -> torch.Tensor:
        return model(**batch, use_cache=False, fused_lm_head=True).loss

    if _packs(subject, compute):
        from smoltulu.tasks.training.sft import collate_packed

        return token_loss, collate_packed(rows), sum(map(_length, rows))

    def padded(name: str, value: int) -> torch.Tensor:
        tensors = [torch.tensor(row[name]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    attention_mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    batch = {
        "input_ids": padded("input_ids", pad),
        "labels": padded("labels", IGNORED),
        "attention_mask": attention_mask,
    }
    return token_loss, batch, sum(map(_length, rows))


def _length(row: Row) -> int:
    """Tokens of a row as the trainers count them: both sides of a pair, each with its prompt."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def _longest(file: Path, number: int, packed: bool) -> list[Row]:
    """The rows of a tokenised file that cost most, most first. Holds one batch of the file at a time."""
    from pyarrow import parquet

    longest: list[tuple[int, int, Row]] = []
    count = 0
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
        costs = _costs(batch, packed)
        for place in heapq.nlargest(number, range(len(costs)), key=costs.__getitem__):
            entry = (costs[place], -count - place)
            if len(longest) < number or entry > longest[0][:2]:
                row = batch.slice(place, 1).to_pylist()[0]
                (heapq.heappushpop if len(longest) == number else heapq.heappush)(longest, (*entry, row))
        count += len(costs)
    return [row for _, _, row in sorted(longest, key=lambda entry: entry[:2], reverse=True)]


def _costs(batch: Any, packed: bool) -> list[int]:
    """Tokens that the rows of an Arrow batch are computed with: packed pairs their prompt once, padded ones twice the
    longer side."""
    import pyarrow.compute as pc

    def lengths(name: str) -> list[int]:
        values: list[int] = pc.list_value_length(batch.column(name)).to_pylist()
        return values

    if "input_ids" in batch.schema.names:
        return lengths("input_ids")
    sides = zip(lengths("prompt_ids"), lengths("chosen_ids"), lengths("rejected_ids"), strict=True)
    return [
        prompt + chosen + rejected if packed else 2 * (prompt + max(chosen, rejected))
        for prompt, chosen, rejected in sides
    ]


def _longest_prompts(file: Path, number: int, tokenizer: PreTrainedTokenizerBase, config: PreflightConfig) -> list[Row]:
    """The longest prompts, each with an answer of max_completion_length tokens, which all carry a loss."""
    rows = (row["prompt"] for row in stored_rows(file))
    candidates = heapq.nlargest(
        max(number, _NUM_CANDIDATES), rows, key=lambda turns: sum(len(turn["content"]) for turn in turns)
    )
    prompts = prompt_ids(tokenizer, candidates)
    num_answered = config.training.max_completion_length if config.training else 0
    answer = [tokenizer.eos_token_id] * max(num_answered, 1)
    longest = sorted(prompts, key=len, reverse=True)[:number]
    return [{"input_ids": ids + answer, "labels": [IGNORED] * len(ids) + answer} for ids in longest]


def _reset_resident_peak() -> int:
    """Forget the process's peak of resident memory, where the kernel can; bytes that are resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return _resident_peak()


def _resident_peak() -> int:
    """Highest resident memory of the process since `_reset_resident_peak`, in bytes."""
    import resource

    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
