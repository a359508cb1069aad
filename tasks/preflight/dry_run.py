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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.preflight import DryRun, PreflightInputs
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.schemas.training import TrainingInputs, TrainingSettings
from smoltulu.tasks.data.rows import is_rich, num_characters, rows_table, stored_rows
from smoltulu.tasks.models.folders import device_of, load_tokenizer, use_bfloat16
from smoltulu.tasks.models.tokens import prompt_ids
from smoltulu.tasks.preflight.rollout_memory import require_memory, rollout_bytes
from smoltulu.tasks.process import is_out_of_memory
from smoltulu.tasks.stage import Stage, StageContext
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

    `longest`: tokens of the longest row, of a pair's longer side. ValueError where not even one row fits.
    """
    import torch

    compute = context.compute.of(subject.name, training.effective_batch_size)
    device = device_of(compute)
    size = asked = compute.per_device_train_batch_size
    are_prompts = training.row_rules().kind == "prompts"
    if are_prompts:
        longest += getattr(training, "max_completion_length", 0)
        tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
        longest_prompt = _longest_prompt(file, tokenizer)
        rows = rows_table([longest_prompt], "rlvr", is_rich(longest_prompt))
    else:
        rows = _longest(file, asked, compute.packing)
        size = asked = min(asked, len(rows))
    step, peak = None, 0
    while step is None and size:
        try:
            machinery = compute.model_copy(update={"per_device_train_batch_size": size})
            train = partial(_train, subject, training, inputs, rows, machinery, context.work)
            step, peak = _measured(train, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("dry run of %s: out of memory with %d of the longest rows", subject.name, size)
            size //= 2
        # Not in the except block: there the error's frames still hold the model.
        _free(device)
    lora = getattr(training, "lora", None)
    if step is None:
        lengths = "max_prompt_length or max_completion_length" if are_prompts else "max_length"
        adapters = f", add a {subject.name}.lora block" if hasattr(training, "lora") and lora is None else ""
        raise ValueError(
            f"{subject.name}: out of memory with one of the longest rows alone ({longest:,} tokens); set "
            f"compute.activation_checkpointing, lower {lengths}{adapters}, or take a larger device "
            "(preflight.dry_run: false skips this check, not the failure)"
        )
    bfloat16 = use_bfloat16(training.precision, compute)
    generation = 0
    if isinstance(training, RLVRSettings):
        generation = rollout_bytes(training, Path(inputs.model), longest, compute, bfloat16)
        if device == "cuda":
            require_memory(max(peak, generation), training, longest)
    return DryRun(
        subject=subject.name,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        precision="bfloat16" if bfloat16 else "float32",
        per_device_train_batch_size=size,
        asked_batch_size=asked,
        activation_checkpointing=compute.activation_checkpointing,
        packing=compute.packing and not are_prompts,
        lora_r=lora and lora.r,
        num_tokens=step.num_tokens,
        seconds=step.seconds,
        peak_memory_bytes=peak,
        generation_bytes=generation,
    )


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


def _longest(file: Path, number: int, packed: bool) -> pa.Table:
    """The costliest rows of a tokenised file, costliest first. Holds only lengths, and one batch of rows at a time."""
    from pyarrow import dataset, parquet

    costs = [cost for batch in parquet.ParquetFile(file).iter_batches(1024) for cost in _costs(batch, packed)]
    places = heapq.nlargest(number, range(len(costs)), key=costs.__getitem__)
    return dataset.dataset(file).take(places, batch_readahead=1, fragment_readahead=1, use_threads=False)


def _costs(batch: Any, packed: bool) -> list[int]:
    """Tokens that the model computes for each row of an Arrow batch.

    A packed pair costs its prompt once, a padded one twice its longer side.
    """
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
