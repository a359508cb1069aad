"""The first steps of a training on its longest rows, for their memory and their time.

The trainer is the stage's own (`Stage.build`), so the figures include all that it does. They leave out two things. The
memory of RLVR's generation is computed (tasks/preflight/rollout_memory.py). The gradient buckets of several processes
take 4 bytes a trained parameter.
"""

from __future__ import annotations

import gc
import heapq
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.budget import rows_of_process
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.preflight import DryRun, PreflightInputs
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.schemas.training import TrainingInputs, TrainingSettings
from smoltulu.tasks.data.rows import is_rich, num_characters, stored_rows
from smoltulu.tasks.data.rows_writer import rows_table
from smoltulu.tasks.models.folders import device_of, load_tokenizer, use_bfloat16
from smoltulu.tasks.models.tokens import prompt_ids
from smoltulu.tasks.preflight.rollout_memory import TooLarge, require_memory, rollout_bytes, vllm_bytes
from smoltulu.tasks.process import is_out_of_memory
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.trainer.token_budget import batch_cost, budget_of, costliest, row_costs
from smoltulu.tasks.trainer.tracking import peak_memory_bytes

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase, TrainerCallback

logger = logging.getLogger("smoltulu")
#: Prompts that are tokenised to find the longest: those with the most text.
_NUM_CANDIDATES = 256
#: Optimizer steps: the first makes the optimizer's state, the second is timed.
_NUM_STEPS = 2


@dataclass(frozen=True)
class Step:
    """Figures of the steps: loss, gradient norm and tokens of the first, seconds of the last."""

    loss: float
    grad_norm: float
    num_tokens: int
    seconds: float


def dry_run(
    subject: Stage, training: TrainingSettings, inputs: PreflightInputs, file: Path, longest: int, context: StageContext
) -> DryRun:
    """Train on the longest rows of `file`, in as large a micro-batch as compute asks for, or as fits.

    Asked for are so many rows, or so many tokens (`auto`: those of so many rows).

    `longest`: tokens of the longest row, of a pair's longer side. TooLarge where not even one row fits.
    """
    import torch

    compute = context.compute.of(subject.name, training.effective_batch_size)
    device = device_of(compute)
    are_prompts = training.row_rules().kind == "prompts"
    if are_prompts:
        longest += getattr(training, "max_completion_length", 0)
        tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
        longest_prompt = _longest_prompt(file, tokenizer)
        rows = rows_table([longest_prompt], "rlvr", is_rich(longest_prompt))
        batch = asked = _MicroBatch(rows, compute.per_device_train_batch_size)
    else:
        batch = asked = _asked(file, training, compute)
    step, peak = None, 0
    while step is None and batch.num_rows:
        try:
            # The rows are one micro-batch, whatever will cut it.
            one = {"per_device_train_batch_size": batch.num_rows, "tokens_per_device": "none"}
            train = partial(_train, subject, training, inputs, batch.rows, compute.model_copy(update=one), context.work)
            step, peak = _measured(train, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("dry run of %s: out of memory with %d of the longest rows", subject.name, batch.num_rows)
            batch = _smaller(batch, compute)
        # Not in the except block: there the error's frames still hold the model.
        _free(device)
    lora = getattr(training, "lora", None)
    if step is None:
        lengths = "max_prompt_length or max_completion_length" if are_prompts else "max_length"
        adapters = f", add a {subject.name}.lora block" if hasattr(training, "lora") and lora is None else ""
        raise TooLarge(
            f"{subject.name}: out of memory with one of the longest rows alone ({longest:,} tokens); set "
            f"compute.activation_checkpointing, lower {lengths}{adapters}, or take a larger device "
            "(preflight.dry_run: false skips this check, not the failure)"
        )
    bfloat16 = use_bfloat16(training.precision, compute)
    generation = 0
    if isinstance(training, RLVRSettings):
        generation = rollout_bytes(training, Path(inputs.model), longest, compute, bfloat16)
        if device == "cuda":
            # vLLM's share of the device is taken while it writes, and for good where it does not sleep.
            share = vllm_bytes(training, compute, torch.cuda.get_device_properties(0).total_memory)
            generation += share
            require_memory(max(peak + (0 if compute.vllm_sleep else share), generation), training, longest)
    return DryRun(
        subject=subject.name,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        precision="bfloat16" if bfloat16 else "float32",
        per_device_train_batch_size=batch.num_rows,
        asked_batch_size=asked.num_rows,
        asked_tokens="none" if asked.num_tokens is None else compute.tokens_per_device,
        tokens_per_device=batch.num_tokens,
        activation_checkpointing=compute.activation_checkpointing,
        packing=compute.packing and not are_prompts,
        lora_r=lora and lora.r,
        num_tokens=step.num_tokens,
        seconds=step.seconds,
        peak_memory_bytes=peak,
        generation_bytes=generation,
    )


@dataclass(frozen=True)
class _MicroBatch:
    """The first `num_rows` of `rows` (of prompts: so many rollouts), and the budget of tokens that they stand for."""

    rows: pa.Table
    num_rows: int
    num_tokens: int | None = None


def _asked(file: Path, training: TrainingSettings, compute: ComputeSettings) -> _MicroBatch:
    """The costliest micro-batch that a training may make of a tokenised file."""
    if not isinstance(compute.tokens_per_device, int):
        rows = _longest(file, compute.per_device_train_batch_size, compute.packing)
        costs = row_costs(rows, compute.packing)
        return _MicroBatch(rows, len(rows), budget_of(compute, costs) if compute.by_tokens else None)
    most = rows_of_process(training.effective_batch_size, compute.num_processes)
    places = costliest(_costs(file, compute.packing), compute.tokens_per_device, most, compute.packing)
    return _MicroBatch(_taken(file, places), len(places), compute.tokens_per_device)


def _smaller(batch: _MicroBatch, compute: ComputeSettings) -> _MicroBatch:
    """What a training goes on with that has no memory for this: half the rows, or half the tokens."""
    num_rows = batch.num_rows // 2
    if batch.num_tokens is None or num_rows == 0:
        return replace(batch, num_rows=num_rows)
    costs = row_costs(batch.rows.slice(0, batch.num_rows), compute.packing)
    if isinstance(compute.tokens_per_device, int):
        half = min(batch.num_tokens, batch_cost(costs, compute.packing)) // 2
        places = costliest(costs, half, num_rows, compute.packing)
    else:
        places = list(range(num_rows))
    # Not more than is tried: the rows may leave some of the half empty.
    num_tokens = batch_cost([costs[place] for place in places], compute.packing)
    return _MicroBatch(batch.rows.take(places), len(places), num_tokens)


def _measured(train: Callable[[], Step], device: str) -> tuple[Step, int]:
    """The result of `train`, and its peak memory in bytes."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = 0 if device == "cuda" else _reset_resident_peak()
    step = train()
    return step, max(peak_memory_bytes(device) - before, 0)


def _free(device: str) -> None:
    """Free the memory of a dry run. Models are in reference cycles, so it takes a collection."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _train(
    subject: Stage,
    training: TrainingSettings,
    inputs: PreflightInputs,
    rows: pa.Table,
    compute: ComputeSettings,
    work: Path,
) -> Step:
    """Run the stage's own trainer on the first rows, one micro-batch of them; a step is one micro-batch here."""
    from pyarrow import parquet

    assert subject.build is not None
    size = compute.per_device_train_batch_size
    alone = compute.model_copy(update={"num_processes": 1, "dataloader_num_workers": 0, "logging_steps": 1})
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        file = folder / "rows.parquet"
        parquet.write_table(rows.slice(0, size), file)
        trainer = subject.build(
            training.model_copy(update={"effective_batch_size": size}),
            TrainingInputs(model=inputs.model, dataset=str(file), chat_template=inputs.chat_template),
            StageContext(folder, folder, alone, lambda *args, **kwargs: None),
        )
        trainer.args.max_steps, trainer.args.save_strategy = _NUM_STEPS, "no"
        seconds: list[float] = []
        trainer.add_callback(_clock(seconds))
        trainer.train()
        first = trainer.state.log_history[0]
    return Step(first["loss"], first["grad_norm"], int(first["num_tokens"]), seconds[-1])


def _clock(seconds: list[float]) -> TrainerCallback:
    """A callback that appends the seconds of every optimizer step."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - self.began)

    return Clock()


def _longest(file: Path, number: int, packing: bool) -> pa.Table:
    """The costliest rows of a tokenised file, costliest first."""
    costs = _costs(file, packing)
    return _taken(file, heapq.nlargest(number, range(len(costs)), key=costs.__getitem__))


def _taken(file: Path, places: list[int]) -> pa.Table:
    from pyarrow import dataset

    return dataset.dataset(file).take(places, batch_readahead=1, fragment_readahead=1, use_threads=False)


def _costs(file: Path, packing: bool) -> list[int]:
    """Tokens that the model computes for each row of a tokenised file. Holds only lengths, and one batch of rows."""
    from pyarrow import parquet

    return [cost for batch in parquet.ParquetFile(file).iter_batches(1024) for cost in row_costs(batch, packing)]


def _longest_prompt(file: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The row with the longest prompt."""
    rows = heapq.nlargest(_NUM_CANDIDATES, stored_rows(file), key=num_characters)
    lengths = map(len, prompt_ids(tokenizer, [row["prompt"] for row in rows], [row.get("tools") for row in rows]))
    return max(zip(lengths, rows, strict=True), key=lambda found: found[0])[1]


def _reset_resident_peak() -> int:
    """Reset the process's peak of resident memory, where the kernel can. Returns the bytes resident now."""
    import psutil

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_memory_bytes("cpu")
    return int(psutil.Process().memory_info().rss)
