"""Part 3 of `benchmarks/training.py`: what a GPU makes of the shapes of SmolLM2, or, without one, the plan.

Model FLOPs are those that the result needs: 6 per weight of a linear layer and token (forward 2, backward 4; the output
head at trained tokens only), 12 x layers x hidden size per query-key pair that causal attention looks at. What
activation checkpointing computes again does not count, nor does the second copy of a pair's prompt (not computed).
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training_rows import (
    SHAPES,
    SUPERVISED_SHARE,
    Shape,
    conversation_rows,
    pair_rows,
    prompt_length,
    write_rows,
)
from benchmarks.training_tools import (
    CHAT_TEMPLATE,
    LEARNING_RATE,
    NAMES,
    SEED,
    ChildFailed,
    Run,
    our_environment,
    table,
)

#: FLOP per second, dense bfloat16, from NVIDIA's data sheets (SXM).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
#: Tokens that one forward pass holds, and forward passes per optimizer step.
TOKENS_PER_DEVICE, ACCUMULATION = 16_384, 4
_NUM_WARM_UP_STEPS, _NUM_PROFILED_STEPS = 3, 2
_GOAL = 0.5
#: Of the card that the plan is for: an H200.
_PLANNED_MEMORY, _PLANNED_PEAK = 141e9, 989e12
#: Share of the card's memory above which the plan asks for activation checkpointing.
_ROOM = 0.85


@dataclass(frozen=True)
class Case:
    """One training: full-length rows, so that nothing depends on a length mix."""

    stage: str
    shape: Shape
    length: int
    prompt_share: float
    tokens_per_device: int = TOKENS_PER_DEVICE

    @property
    def name(self) -> str:
        return f"{NAMES[self.stage]} {self.shape.name}, {self.length:,}"

    @property
    def num_sides(self) -> int:
        return 1 if self.stage == "sft" else 2

    @property
    def per_device(self) -> int:
        """Rows (pairs) of a forward pass."""
        return max(1, self.tokens_per_device // (self.num_sides * self.length))

    @property
    def effective(self) -> int:
        """Rows (pairs) of an optimizer step."""
        return ACCUMULATION * self.per_device

    @property
    def num_tokens(self) -> int:
        """Of an optimizer step, as the trainer counts them: both sides of a pair."""
        return self.effective * self.num_sides * self.length

    @property
    def num_prompt_tokens(self) -> int:
        """Of a row: without loss, and computed once for both sides of a pair."""
        if self.stage == "sft":
            return round((1 - SUPERVISED_SHARE) * self.length)
        return prompt_length(self.length, self.prompt_share)

    @property
    def num_computed_tokens(self) -> int:
        """Of a row: those that go through the model."""
        return self.num_sides * self.length - (self.num_sides - 1) * self.num_prompt_tokens

    def step_flops(self) -> float:
        """Model FLOPs of an optimizer step."""
        answer = self.length - self.num_prompt_tokens
        pairs = causal_pairs(self.length) + (self.num_sides - 1) * causal_pairs(answer, self.num_prompt_tokens)
        # The reward model's head is one row of weights.
        num_head_tokens = 0 if self.stage == "reward_model" else self.num_sides * answer
        return self.effective * training_flops(self.shape, self.num_computed_tokens, num_head_tokens, pairs)

    def memory_bytes(self, checkpointing: bool) -> float:
        """Estimate: weights, gradients and Adam's two moments in float32, bfloat16 copies of the weights, activations.

        Activations per token and layer under bfloat16 autocast: about 26 bytes x hidden size (norms' float32 inputs,
        queries, keys, values, attention's output) + 8 x intermediate size; with checkpointing the layers' inputs only.
        """
        shape, tokens = self.shape, self.per_device * self.num_computed_tokens
        layer = 26 * shape.hidden_size + 8 * shape.intermediate_size
        kept = shape.num_hidden_layers * 4 * shape.hidden_size + layer
        activations = tokens * (kept if checkpointing else shape.num_hidden_layers * layer)
        return 18 * shape.num_parameters + activations


def causal_pairs(num_queries: int, num_before: int = 0) -> float:
    """Query-key pairs of causal attention, where every query also sees `num_before` keys."""
    return num_queries * num_before + num_queries * (num_queries + 1) / 2


def training_flops(shape: Shape, num_tokens: float, num_head_tokens: float, num_pairs: float) -> float:
    """Forward and backward FLOPs of so many tokens, `num_head_tokens` of them with logits."""
    products = 6 * (shape.num_layer_parameters * num_tokens + shape.num_head_parameters * num_head_tokens)
    attention = 12 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * num_pairs
    return products + attention


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """Model-FLOPs utilisation."""
    return flops / seconds / peak


def peak_flops(device_name: str, given: float | None) -> float | None:
    """Of the card, `given` first; None where neither says it."""
    return given or next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def cases(shapes: list[Shape], lengths: list[int], stages: list[str], prompt_share: float) -> list[Case]:
    """All that part 3 measures, in the order of its table."""
    return [
        Case(stage, shape, length, prompt_share, 4 * length if shape.name == "minute" else TOKENS_PER_DEVICE)
        for shape in shapes
        for stage in stages
        for length in lengths
    ]


def needs_checkpointing(case: Case, memory_bytes: float) -> bool:
    """Whether the estimate without activation checkpointing is too much for this memory."""
    return case.memory_bytes(checkpointing=False) > _ROOM * memory_bytes


def plan_rows(planned: list[Case], memory_bytes: float, peak: float) -> list[list[str]]:
    """The plan as rows of a table; seconds at half the card's peak."""
    rows = []
    for case in planned:
        checkpointing = needs_checkpointing(case, memory_bytes)
        rows.append(
            [
                case.name,
                f"{case.shape.num_parameters / 1e6:,.1f}",
                f"{case.per_device} × {ACCUMULATION}",
                f"{case.num_tokens:,}",
                f"{case.step_flops() / 1e12:,.3g}",
                f"{case.memory_bytes(checkpointing) / 1e9:,.3g}",
                "yes" if checkpointing else "no",
                f"{case.step_flops() / peak / 0.5:.3g}",
            ]
        )
    return rows


_PLAN_HEAD = [
    "stage, shape, length", "million parameters", "rows × passes a step", "tokens a step", "TFLOP a step",
    "memory, GB (estimate)", "activation checkpointing", "seconds a step at 50 %",
]  # fmt: skip
_MEASURED_HEAD = ["stage, shape, length", "tokens/s", "step, s", "MFU", "peak memory, GB", "checkpointing", "time by"]


def shares(kinds: dict[str, float], wall: float) -> dict[str, float]:
    """Kind of work -> its share of `wall` seconds; what no kernel ran in is idle.

    (Operators on a CPU that is watched can add up to more than the unwatched wall time: then of their sum.)
    """
    whole = max(wall, sum(kinds.values()))
    return {kind: seconds / whole for kind, seconds in kinds.items()} | {"idle": 1 - sum(kinds.values()) / whole}


def measured_row(case: Case, seconds: float, measured: dict[str, Any], peak: float | None, again: bool) -> list[str]:
    """One case as a row of the table of measurements. `seconds`: median of an optimizer step."""
    kinds = shares(measured["kinds"], _NUM_PROFILED_STEPS * seconds)
    return [
        case.name,
        f"{case.num_tokens / seconds:,.0f}",
        f"{seconds:.3g}",
        f"{utilisation(case.step_flops(), seconds, peak):.1%}" if peak else "–",
        f"{measured['peak_bytes'] / 1e9:.3g}",
        "yes" if again else "no",
        ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items() if share >= 0.005),
    ]


def on_a_gpu(run: Run) -> None:
    """The table of part 3; without a GPU the plan."""
    import torch

    options = run.options
    planned = cases(
        [SHAPES[name] for name in options.gpu_shapes], options.lengths, options.stages, options.prompt_share
    )
    if options.device == "cuda" and not torch.cuda.is_available():
        print("\nSkipped: torch finds no CUDA device. The plan, for one H200:")
        table(_PLAN_HEAD, plan_rows(planned, _PLANNED_MEMORY, options.peak_flops or _PLANNED_PEAK))
        return
    name, memory = "CPU", float("inf")
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(0).total_memory
    peak = peak_flops(name, options.peak_flops)
    rows = []
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "peak_flops": peak, "cases": {}}
    for case in planned:
        checkpointing = needs_checkpointing(case, memory)
        try:
            [measured] = run.child("our_stages", [_job(run, case, checkpointing)], our_environment())
        except ChildFailed as error:
            rows.append([case.name, *["failed"] * (len(_MEASURED_HEAD) - 1)])
            print(f"\n{case.name}: {error}", file=sys.stderr)
            run.goal(f"{case.name} runs", "failed", False)
            continue
        ends = measured["ends"][_NUM_WARM_UP_STEPS - 1 :]
        seconds = statistics.median(end - begin for begin, end in itertools.pairwise(ends))
        rows.append(measured_row(case, seconds, measured, peak, checkpointing))
        print(" | ".join(rows[-1]), flush=True)
        results["cases"][case.name] = {
            "tokens_per_second": case.num_tokens / seconds,
            "seconds_per_step": seconds,
            "model_flops_utilisation": utilisation(case.step_flops(), seconds, peak) if peak else None,
            "peak_bytes": measured["peak_bytes"],
            "activation_checkpointing": checkpointing,
        }
        if options.results:
            options.results.write_text(json.dumps(results, indent=1) + "\n")
        if peak and case.stage == "sft" and case.shape.name == "1.7B":
            share = utilisation(case.step_flops(), seconds, peak)
            goal = f"SFT of 1.7B at length {case.length:,} on one {name}: MFU >= {_GOAL:.0%}"
            run.goal(goal, f"{share:.1%}", share >= _GOAL)
    table(_MEASURED_HEAD, rows)
    print(
        f"\n{name}, peak {f'{peak / 1e12:,.3g} TFLOP/s' if peak else 'unknown (--peak-flops)'}. bfloat16 autocast over "
        f"float32 weights where the device has it, packing, full-length rows, {ACCUMULATION} forward passes "
        f"a step; median of {options.steps} steps after {_NUM_WARM_UP_STEPS}; tokens of both sides of a pair counted, "
        f"a pair's prompt ({options.prompt_share:.0%} of its tokens) computed once. Last column: where the time "
        f"goes, by the kernels of {_NUM_PROFILED_STEPS} further steps."
    )


def _job(run: Run, case: Case, checkpointing: bool) -> dict[str, Any]:
    """A case as a job for training_work.our_stages."""
    num_rows = case.effective
    lengths = [case.length] * num_rows
    if case.stage == "sft":
        made = conversation_rows(lengths, case.shape)
    else:
        made = pair_rows(lengths, run.options.prompt_share, case.shape, 0.0, SEED)
    num_steps = _NUM_WARM_UP_STEPS + run.options.steps + _NUM_PROFILED_STEPS
    config = {
        "learning_rate": LEARNING_RATE, "effective_batch_size": case.effective, "max_steps": num_steps, "seed": SEED,
        "max_length": case.length, "precision": "bfloat16",
    }  # fmt: skip
    inputs = {
        "model": run.model(case.shape, run.options.device),
        "dataset": str(write_rows(made, run.fresh("rows.parquet"))),
        "chat_template": CHAT_TEMPLATE,
    }
    if case.stage == "dpo":
        inputs["reference_logps"] = str(_no_reference(num_rows, run.fresh("reference_logps.parquet")))
    compute = {
        "device": run.options.device, "per_device_train_batch_size": case.per_device, "save_steps": 1_000_000,
        "activation_checkpointing": checkpointing, "min_free_disk_gb": 0,
    }  # fmt: skip
    return {
        "stage": case.stage, "config": config, "inputs": inputs, "compute": compute, "folder": str(run.fresh("ours")),
        "profile": _NUM_PROFILED_STEPS,
    }  # fmt: skip


def _no_reference(num_rows: int, file: Path) -> Path:
    """Log-probabilities of 0: the arithmetic is the same whatever they are."""
    import pyarrow as pa
    from pyarrow import parquet

    zeros = pa.array([0.0] * num_rows, pa.float32())
    parquet.write_table(pa.table({"chosen": zeros, "rejected": zeros}), file)
    return file
