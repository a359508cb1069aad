"""Part 2 of `benchmarks/training.py`: TRL's defaults, step by step, to ours, on a realistic length mix.

Every row of a table changes one thing of the row above it. Compared are seconds per supervised token, because TRL's
default max_length of 1,024 cuts rows that ours keeps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.training_rows import (
    MIX_MEAN,
    MIX_MEDIAN,
    SUPERVISED_SHARE,
    conversation_rows,
    mixed_lengths,
    num_tokens,
    padding_factor,
    pair_rows,
    prompt_in_each_answer,
    share_above,
    write_plain_rows,
    write_rows,
)
from benchmarks.training_tools import (
    CHAT_TEMPLATE,
    LEARNING_RATE,
    SEED,
    Run,
    our_environment,
    plain_environment,
    spread,
    step_seconds,
    table,
)

#: TRL's per_device_train_batch_size and max_length where a script does not set them; ours where a recipe says nothing.
EFFECTIVE = TRL_PER_DEVICE = 8
TRL_MAX_LENGTH, SFT_MAX_LENGTH, DPO_MAX_LENGTH = 1024, 4096, 2048
#: Spread of the logarithm of rejected / chosen length, and other shares of the prompt that are tried. Assumptions.
_SPREAD, _OTHER_PROMPT_SHARES = 0.3, (0.1, 0.4)
_SFT_GOAL, _CACHE_GOAL, _DPO_GOAL = 2.0, 1.3, 1.7


@dataclass
class Variant:
    """One row of a table: how it is trained, and on how many supervised tokens."""

    name: str
    function: str
    job: dict[str, Any]
    num_supervised: int
    seconds: float = 0.0
    runs: tuple[float, ...] = ()

    @property
    def per_thousand(self) -> float:
        """Seconds per 1,000 supervised tokens."""
        return 1000 * self.seconds / self.num_supervised


def against_defaults(run: Run) -> None:
    """The tables of part 2."""
    print(
        f"\nLength mix: log-normal with mean {MIX_MEAN} and median {MIX_MEDIAN} tokens, which puts "
        f"{share_above(1024, MIX_MEAN, MIX_MEDIAN):.1%} of the rows over 1,024 (the SmolTulu SFT mix: 9.1 %). "
        f"{run.options.rows} rows (pairs) at evenly spaced quantiles of it, one epoch, {EFFECTIVE} a step; float32 on "
        f"both sides; {run.options.repeats} runs of each side in turn, every step's median. TRL's defaults: "
        "per_device_train_batch_size 8, max_length 1,024, activation checkpointing, padding, the reference computed at "
        "every step (DPO)."
    )
    if "sft" in run.options.stages:
        _sft(run)
    if "dpo" in run.options.stages:
        _dpo(run)


def _sft(run: Run) -> None:
    lengths = _lengths(run, SFT_MAX_LENGTH)
    rows = conversation_rows(lengths, run.shape, SEED)
    ours = {"dataset": str(write_rows(rows, run.fresh("sft.parquet")))}
    plain = str(write_plain_rows(rows, "sft", run.fresh("sft-plain.parquet")))
    cut, whole = num_tokens(rows, TRL_MAX_LENGTH)[1], num_tokens(rows, SFT_MAX_LENGTH)[1]
    kept = {"max_length": SFT_MAX_LENGTH}
    lean = kept | {"activation_checkpointing": False}
    variants = [
        _plain(run, "TRL's defaults", "sft", plain, {}, cut),
        _plain(run, f"rows kept whole: max_length {SFT_MAX_LENGTH:,}, as ours", "sft", plain, kept, whole),
        _plain(run, "no activation checkpointing", "sft", plain, lean, whole),
        _ours(run, "our process and loop, padded", "sft", ours, {"packing": False}, whole),
        _ours(run, "packing", "sft", ours, {}, whole),
    ]
    single = {"per_device_train_batch_size": 1}
    alone = _ours(run, "one row a forward pass (our default)", "sft", ours, single, whole)
    _measure(run, [*variants, alone])
    _ablation(f"SFT, {SUPERVISED_SHARE:.0%} of the tokens trained on", [*variants, alone])

    first, final = variants[0], variants[-1]
    factor = first.per_thousand / final.per_thousand
    both = variants[1].per_thousand / final.per_thousand
    print(
        f"\nOurs (packing) is {factor:.2f} times as fast per supervised token as TRL's defaults, which train on "
        f"{cut:,} of {whole:,} supervised tokens, and {both:.2f} times with the same max_length on both sides. A fused "
        "output head (no logits kept) is on both sides: TRL has one of its own by default. Padding alone makes "
        f"{padding_factor(lengths, TRL_PER_DEVICE, TRL_MAX_LENGTH):.2f} places of every token at TRL's max_length, "
        f"{padding_factor(lengths, TRL_PER_DEVICE, SFT_MAX_LENGTH):.2f} at ours: so much packing brings in a large "
        "model; in one as small as this, attention over padding costs more than that."
    )
    run.goal(f"SFT: ours / TRL's defaults >= {_SFT_GOAL}", f"{factor:.2f}", factor >= _SFT_GOAL)


def _dpo(run: Run) -> None:
    share = run.options.prompt_share
    rows = _pairs(run, share)
    plain = str(write_plain_rows(rows, "dpo", run.fresh("dpo-plain.parquet")))
    cut, whole = num_tokens(rows, TRL_MAX_LENGTH)[1], num_tokens(rows, DPO_MAX_LENGTH)[1]
    cached = {"precompute_ref_log_probs": True}
    kept = {"max_length": DPO_MAX_LENGTH}
    lean = kept | {"activation_checkpointing": False}
    shared, pass_seconds = _with_reference(run, rows)
    apart = {**shared, "dataset": str(write_rows(prompt_in_each_answer(rows), run.fresh("apart.parquet")))}
    variants = [
        _plain(run, "TRL's defaults", "dpo", plain, {}, cut),
        _plain(run, f"pairs kept whole: max_length {DPO_MAX_LENGTH:,}, as ours", "dpo", plain, kept, whole),
        _plain(run, "no activation checkpointing", "dpo", plain, lean, whole),
        _plain(run, "reference cached, its pass not paid", "dpo", plain, lean | cached, whole),
        _ours(run, "our process and loop, padded", "dpo", shared, {"packing": False}, whole),
        _ours(run, "packing, a prompt with each answer", "dpo", apart, {}, whole),
        _ours(run, "the prompt once a pair", "dpo", shared, {}, whole),
    ]
    checkpointed = _plain(run, "TRL's defaults, reference cached", "dpo", plain, cached, cut)
    others = [variant for other in _OTHER_PROMPT_SHARES for variant in _apart_and_once(run, other, shared)]
    _measure(run, [*variants, checkpointed, *others])
    _ablation(f"DPO, prompt {share:.0%} of a pair's unique tokens (an assumption)", variants)

    first, whole_pairs, uncached, cache, final = (variants[i] for i in (0, 1, 2, 3, -1))
    factor = first.per_thousand / final.per_thousand
    both = whole_pairs.per_thousand / final.per_thousand
    paid = first.per_thousand / (final.per_thousand + 1000 * pass_seconds / whole)
    alone = uncached.per_thousand / cache.per_thousand
    print(
        f"\nOurs is {factor:.2f} times as fast per supervised token as TRL's defaults ({both:.2f} times with the same "
        f"max_length), {paid:.2f} times where the reference's pass ({pass_seconds:.1f} s for these pairs) is paid for "
        f"one epoch of one training. The cached reference alone: {alone:.2f} times (without it, a step is two forward "
        f"passes and a backward pass of two: 4/3 at most), and {first.per_thousand / checkpointed.per_thousand:.2f} "
        "times under TRL's default activation checkpointing (5/4 at most)."
    )
    brought = ", ".join(
        f"{other:.0%}: {apart_.per_thousand / once.per_thousand:.2f} (in tokens {1 + other:.2f})"
        for other, apart_, once in zip(_OTHER_PROMPT_SHARES, others[::2], others[1::2], strict=True)
    )
    print(f"\nWhat computing the prompt once brings at other shares of the prompt: {brought}.")
    run.goal(f"DPO: cached reference alone >= {_CACHE_GOAL}", f"{alone:.2f}", alone >= _CACHE_GOAL)
    run.goal(f"DPO: ours / TRL's defaults >= {_DPO_GOAL}", f"{factor:.2f}", factor >= _DPO_GOAL)


def _apart_and_once(run: Run, prompt_share: float, reference: dict[str, str]) -> list[Variant]:
    """The last two steps at another share. The values of the reference do not matter for the time."""
    rows = _pairs(run, prompt_share)
    num_supervised = num_tokens(rows, DPO_MAX_LENGTH)[1]
    files = [str(write_rows(those, run.fresh("dpo.parquet"))) for those in (prompt_in_each_answer(rows), rows)]
    return [_ours(run, "", "dpo", reference | {"dataset": file}, {}, num_supervised) for file in files]


def _lengths(run: Run, longest: int) -> list[int]:
    if run.shape.name == "minute":
        return mixed_lengths(run.options.rows, 24, 20, 64, SEED)
    return mixed_lengths(run.options.rows, MIX_MEAN, MIX_MEDIAN, longest, SEED)


def _pairs(run: Run, prompt_share: float) -> list[dict[str, Any]]:
    return pair_rows(_lengths(run, DPO_MAX_LENGTH), prompt_share, run.shape, _SPREAD, SEED)


def _plain(run: Run, name: str, stage: str, rows: str, settings: dict[str, Any], num_supervised: int) -> Variant:
    # What is not named here is TRL's default; bf16 would be emulated on most CPUs.
    fixed = {
        "learning_rate": LEARNING_RATE, "num_train_epochs": 1, "seed": SEED, "bf16": False, "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    job = {"stage": stage, "model": run.model(run.shape), "rows": rows, "settings": fixed | settings}
    return Variant(name, "plain_trl", job, num_supervised)


def _ours(
    run: Run, name: str, stage: str, files: dict[str, str], compute: dict[str, Any], num_supervised: int
) -> Variant:
    config = {
        "learning_rate": LEARNING_RATE, "effective_batch_size": EFFECTIVE, "seed": SEED, "precision": "float32",
        "max_length": SFT_MAX_LENGTH if stage == "sft" else DPO_MAX_LENGTH,
    }  # fmt: skip
    inputs = {"model": run.model(run.shape), "chat_template": CHAT_TEMPLATE} | files
    machinery = {"device": "cpu", "per_device_train_batch_size": TRL_PER_DEVICE, "save_steps": 1_000_000}
    job = {"stage": stage, "config": config, "inputs": inputs, "compute": machinery | compute}
    return Variant(name, "our_stages", job, num_supervised)


def _with_reference(run: Run, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, str], float]:
    """(files of pairs and of the log-probabilities that the reference gives them by our own stage, its seconds).

    The stage runs several times in one process; the first time, in which everything is imported, does not count.
    """
    file = str(write_rows(rows, run.fresh("dpo.parquet")))
    folders = [run.fresh("reference") for _ in range(1 + run.options.repeats)]
    job = {
        "stage": "reference_logps",
        "config": {"precision": "float32"},
        "inputs": {"model": run.model(run.shape), "dataset": file, "chat_template": CHAT_TEMPLATE},
        "compute": {"device": "cpu"},
        "whole": True,
    }
    results = run.child("our_stages", [job | {"folder": str(folder)} for folder in folders], our_environment())
    made = {"dataset": file, "reference_logps": str(folders[0] / "out" / "reference_logps.parquet")}
    return made, statistics.median(result["ends"][-1] for result in results[1:])


def _measure(run: Run, variants: list[Variant]) -> None:
    """Time all variants: TRL's in one process, ours in another, in turn; each begins with a step of warm-up."""
    sides = {
        function: [variant for variant in variants if variant.function == function]
        for function in ("plain_trl", "our_stages")
    }
    environments = {"plain_trl": plain_environment(), "our_stages": our_environment()}
    ends: dict[str, list[list[list[float]]]] = {function: [] for function in sides}
    for _ in range(run.options.repeats):
        for function, those in sides.items():
            settings = "settings" if function == "plain_trl" else "config"
            warm_up = those[0].job | {settings: those[0].job[settings] | {"max_steps": 1}}
            jobs = [job | {"folder": str(run.fresh(function))} for job in (warm_up, *(each.job for each in those))]
            results = run.child(function, jobs, environments[function])[1:]
            ends[function].append([result["ends"] for result in results])
    for function, those in sides.items():
        for variant, *runs in zip(those, *ends[function], strict=True):
            variant.seconds = sum(step_seconds(runs))
            variant.runs = tuple(run_[-1] for run_ in runs)


def _ablation(title: str, variants: list[Variant]) -> None:
    rows = []
    for before, variant in zip([variants[0], *variants], variants, strict=False):
        rows.append(
            [
                variant.name,
                f"{variant.per_thousand:.3f}",
                spread([1000 * seconds / variant.num_supervised for seconds in variant.runs]),
                "–" if variant is variants[0] else f"{before.per_thousand / variant.per_thousand:.2f}",
                f"{variants[0].per_thousand / variant.per_thousand:.2f}",
            ]
        )
    head = [title, "seconds per 1,000 supervised tokens", "range of runs", "× the row above", "× TRL's defaults"]
    table(head, rows)
