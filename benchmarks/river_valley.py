"""Schedules on a training so small that its loss is known exactly: the river valley of WSD-S (arXiv 2410.05192).

    OMP_NUM_THREADS=1 python benchmarks/river_valley.py --seeds 0 1 2 3 4

A two-layer Llama (139,584 parameters) learns a chain of 1,024 words in which half of the words have one certain
successor and half have 32 of uneven odds. Plain AdamW over `tasks.trainer.schedules.learning_rate_factor`; the model,
the data and their order are the same for every schedule of a seed. Measured is the excess loss KL(true || model), in
nats, averaged over fixed positions: exact, but for the choice of positions. Prints tables in Markdown and draws the
figure.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from river_valley_figure import draw
from transformers import LlamaConfig, LlamaForCausalLM

from smoltulu.schemas.schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    ScheduleSettings,
    WSDSchedule,
    WSDSSchedule,
)
from smoltulu.tasks.trainer.schedules import learning_rate_factor

FIGURE = Path("docs/figures/river_valley.svg")
NUM_WORDS, NUM_SUCCESSORS, RESTART = 1024, 32, 0.02
BATCH, LENGTH = 8, 64
NUM_MEASURED, MEASURE_EVERY = 64, 10
WARMUP, FLOOR = 25, 0.1
RATIOS = (0.1, 0.25)

#: Loss: over all positions, over those of words with a certain successor, over those of the others.
Loss = tuple[float, float, float]
#: (step, loss), rising steps.
Curve = list[tuple[int, Loss]]


class Chain:
    """Next word: with probability 0.02 any word, by Zipf's law; else a successor of this one."""

    def __init__(self, seed: int) -> None:
        draw_ = np.random.default_rng(seed)
        zipf = 1 / np.arange(1, NUM_WORDS + 1)
        zipf /= zipf.sum()
        self.zipf = np.cumsum(zipf)
        self.certain = draw_.permutation(NUM_WORDS) < NUM_WORDS // 2
        self.successors = np.stack(
            [draw_.choice(NUM_WORDS, NUM_SUCCESSORS, replace=False, p=zipf) for _ in range(NUM_WORDS)]
        )
        odds = draw_.dirichlet(np.ones(NUM_SUCCESSORS), NUM_WORDS)
        odds[self.certain] = np.eye(NUM_SUCCESSORS)[0]
        self.odds = np.cumsum(odds, axis=1)
        self.true = np.tile(RESTART * zipf, (NUM_WORDS, 1))
        np.add.at(self.true, (np.arange(NUM_WORDS)[:, None], self.successors), (1 - RESTART) * odds)

    def sample(self, count: int, seed: int) -> torch.Tensor:
        """Sequences, (count, LENGTH)."""
        draw_ = np.random.default_rng(seed)
        words = np.empty((count, LENGTH), dtype=np.int64)
        words[:, 0] = np.searchsorted(self.zipf, draw_.random(count))
        for position in range(1, LENGTH):
            before = words[:, position - 1]
            which = (self.odds[before] < draw_.random((count, 1))).sum(axis=1).clip(max=NUM_SUCCESSORS - 1)
            anywhere = np.searchsorted(self.zipf, draw_.random(count)).clip(max=NUM_WORDS - 1)
            stays = draw_.random(count) >= RESTART
            words[:, position] = np.where(stays, self.successors[before, which], anywhere)
        return torch.from_numpy(words)


@dataclass
class Training:
    """One training, stopped after any step: model, optimizer, number of steps done."""

    model: LlamaForCausalLM
    optimizer: torch.optim.AdamW
    step: int = 0
    curve: Curve = field(default_factory=list)

    def branch(self) -> Training:
        """A copy that goes its own way."""
        model = deepcopy(self.model)
        optimizer = _adamw(model)
        # A copy: load_state_dict takes the very tensors, and the two would train each other.
        optimizer.load_state_dict(deepcopy(self.optimizer.state_dict()))
        return Training(model, optimizer, self.step)


def _adamw(model: LlamaForCausalLM) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, foreach=True)


class Runs:
    """The trainings of one seed and peak learning rate."""

    def __init__(self, seed: int, peak: float, budgets: tuple[int, ...]) -> None:
        self.peak, self.budgets = peak, budgets
        chain = Chain(seed)
        # One row more than steps: no schedule looks at it, and no step is without data.
        self.batches = chain.sample((budgets[-1] + 1) * BATCH, seed + 1000).view(-1, BATCH, LENGTH)
        self.measured = chain.sample(NUM_MEASURED, seed + 2000)
        self.true = torch.from_numpy(chain.true).float()[self.measured[:, :-1]]
        self.is_certain = torch.from_numpy(chain.certain)[self.measured[:, :-1]]
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=NUM_WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=True, use_cache=False,
        ))  # fmt: skip
        assert sum(parameter.numel() for parameter in model.parameters()) == 139_584
        self.first = Training(model, _adamw(model))

    def go_on(self, training: Training, schedule: ScheduleSettings, num_steps: int, until: int) -> Training:
        """Train up to `until` of `num_steps`, measuring every few steps and at the end."""
        while training.step < until:
            factor = learning_rate_factor(schedule, training.step, num_steps)
            for group in training.optimizer.param_groups:
                group["lr"] = self.peak * factor
            words = self.batches[training.step]
            training.model(input_ids=words, labels=words).loss.backward()
            torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
            training.optimizer.step()
            training.optimizer.zero_grad()
            training.step += 1
            if training.step % MEASURE_EVERY == 0 or training.step == until:
                training.curve.append((training.step, self.measure(training.model)))
        return training

    @torch.no_grad()
    def measure(self, model: LlamaForCausalLM) -> Loss:
        """Excess loss KL(true || model) in nats: all positions, certain ones, uncertain ones."""
        log_probs = model(input_ids=self.measured[:, :-1]).logits.log_softmax(dim=-1)
        excess = (self.true * (self.true.clamp_min(1e-30).log() - log_probs)).sum(dim=-1)
        return excess.mean().item(), excess[self.is_certain].mean().item(), excess[~self.is_certain].mean().item()

    def all(self) -> dict[str, Curve]:
        """Name of a schedule and where it ends -> its curve, from where it leaves the stable phase."""
        budgets, curves = self.budgets, {}
        constant = ConstantSchedule(warmup_steps=WARMUP)
        leaves: dict[int, list[tuple[str, int]]] = {}  # step at which decays begin -> (name, length)
        for ratio in RATIOS:
            spent = 0
            for budget in budgets:
                length = math.ceil(ratio * budget)
                spent += length
                leaves.setdefault(budget - length, []).append((f"wsd {ratio} {budget}", length))
                leaves.setdefault(budget - spent, []).append((f"wsd-equal {ratio} {budget}", length))
        trunk = self.first.branch()
        for start in sorted(leaves):
            self.go_on(trunk, constant, budgets[-1], start)
            for name, length in leaves[start]:
                # The stable phase of every WSD is the constant schedule: one trunk serves them all.
                schedule = WSDSchedule(
                    warmup_steps=WARMUP, decay_steps=length, decay_shape="inverse", min_lr_ratio=FLOOR
                )
                curves[name] = self.go_on(trunk.branch(), schedule, start + length, start + length).curve
        curves["constant"] = self.go_on(trunk, constant, budgets[-1], budgets[-1]).curve
        for ratio in RATIOS:
            wsd_s = WSDSSchedule(budgets=budgets, warmup_steps=WARMUP, decay_ratio=ratio, min_lr_ratio=FLOOR)
            curves[f"wsd-s {ratio}"] = self.go_on(self.first.branch(), wsd_s, budgets[-1], budgets[-1]).curve
            first = curves[f"wsd {ratio} {budgets[0]}"][-1]
            assert first in curves[f"wsd-s {ratio}"], "up to the first budget WSD and WSD-S are one schedule"
        for budget in budgets:
            cosine = CosineSchedule(warmup_steps=WARMUP, min_lr_ratio=FLOOR)
            curves[f"cosine {budget}"] = self.go_on(self.first.branch(), cosine, budget, budget).curve
            linear = LinearSchedule(warmup_steps=WARMUP)
            curves[f"linear {budget}"] = self.go_on(self.first.branch(), linear, budget, budget).curve
        return curves


def run(seed: int, peak: float, budgets: tuple[int, ...]) -> dict[str, Curve]:
    """Every schedule for one seed, on one core."""
    torch.set_num_threads(1)
    return Runs(seed, peak, budgets).all()


# --- Tables -----------------------------------------------------------------------------------------------------------


def at(curve: Curve, step: int, kind: int = 0) -> float:
    """Excess loss after `step` steps."""
    return dict(curve)[step][kind]


def ends(curves: dict[str, Curve], budgets: tuple[int, ...]) -> dict[str, list[float]]:
    """Row of the table -> excess loss at each budget."""
    rows: dict[str, Callable[[int], float]] = {"constant": lambda t: at(curves["constant"], t)}
    for r in RATIOS:
        percent = f"{r:.0%}"
        rows |= {
            f"WSD {percent}, trunk not counted": lambda t, r=r: curves[f"wsd {r} {t}"][-1][1][0],
            f"WSD {percent}, equal compute": lambda t, r=r: curves[f"wsd-equal {r} {t}"][-1][1][0],
            f"WSD-S {percent}": lambda t, r=r: at(curves[f"wsd-s {r}"], t),
        }
    rows["cosine to 0.1, own run"] = lambda t: curves[f"cosine {t}"][-1][1][0]
    rows["linear to 0, own run"] = lambda t: curves[f"linear {t}"][-1][1][0]
    return {name: [value(budget) for budget in budgets] for name, value in rows.items()}


def spread(values: list[float], digits: int = 4) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def paired(values: list[float]) -> str:
    """Mean ± standard error of paired differences, and how many of them are below 0."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):+.4f} ± {error:.4f} ({sum(value < 0 for value in values)} of {len(values)} < 0)"


def tables(by_seed: list[dict[str, Curve]], budgets: tuple[int, ...]) -> str:
    """Final losses, paired differences at equal compute, and what the decay does to the loss, in Markdown."""
    per_seed = [ends(curves, budgets) for curves in by_seed]
    header = "| excess loss, nats | " + " | ".join(f"{budget:,} steps" for budget in budgets) + " |"
    lines = [header, "|---|" + "---:|" * len(budgets)]
    for name in per_seed[0]:
        cells = [spread([row[name][i] for row in per_seed]) for i in range(len(budgets))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", header.replace("excess loss, nats", "paired difference"), "|---|" + "---:|" * len(budgets)]
    percents = [f"{ratio:.0%}" for ratio in RATIOS]
    pairs = [(f"WSD-S {p}", f"WSD {p}, equal compute") for p in percents]
    pairs += [(f"WSD-S {p}", "cosine to 0.1, own run") for p in percents]
    pairs += [(f"WSD {p}, trunk not counted", "cosine to 0.1, own run") for p in percents]
    pairs += [(f"{name} {percents[1]}{rest}", f"{name} {percents[0]}{rest}") for name, rest in (
        ("WSD", ", trunk not counted"), ("WSD-S", ""))]  # fmt: skip
    for one, other in pairs:
        cells = [paired([row[one][i] - row[other][i] for row in per_seed]) for i in range(len(budgets))]
        lines.append(f"| {one} − {other} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *valley(by_seed, budgets)])


def valley(by_seed: list[dict[str, Curve]], budgets: tuple[int, ...]) -> list[str]:
    """What the picture of a river valley says, in numbers."""
    last, second = budgets[-1], budgets[-2]
    later = second + round(0.15 * second / MEASURE_EVERY) * MEASURE_EVERY
    rows: list[tuple[str, Callable[[dict[str, Curve]], float]]] = []
    for r in RATIOS:
        wsd, start = f"wsd {r} {last}", last - math.ceil(r * last)
        for kind, what in enumerate(("all", "certain successor", "uncertain successor")):
            rows.append((
                f"WSD {r:.0%}: loss at {last:,} / before its decay, {what}",
                lambda c, wsd=wsd, start=start, kind=kind: c[wsd][-1][1][kind] / at(c["constant"], start, kind),
            ))  # fmt: skip
        rows.append((
            f"WSD {r:.0%} / constant, both at {last:,}", lambda c, wsd=wsd: c[wsd][-1][1][0] / at(c["constant"], last)
        ))  # fmt: skip
        for step in (second + 2 * MEASURE_EVERY, later):
            rows.append((
                f"WSD-S {r:.0%} / constant, both at {step:,} ({step - second} steps after a decay)",
                lambda c, r=r, step=step: at(c[f"wsd-s {r}"], step) / at(c["constant"], step),
            ))  # fmt: skip
    lines = ["| ratio of excess losses | mean ± sd over seeds |", "|---|---:|"]
    return lines + [f"| {name} | {spread([value(curves) for curves in by_seed], 3)} |" for name, value in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budgets", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--peaks", type=float, nargs="+", default=[1e-2], help="learning rates; the figure: the first")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, help="JSON of the curves: read if it is there, else written")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args()
    budgets = tuple(arguments.budgets)
    jobs = [(seed, peak, budgets) for peak in arguments.peaks for seed in arguments.seeds]
    began = time.monotonic()
    if arguments.results and arguments.results.exists():
        results: list[Any] = json.loads(arguments.results.read_text())
    else:
        with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
            results = list(pool.map(run, *zip(*jobs, strict=True)))
        if arguments.results:
            arguments.results.write_text(json.dumps(results))
    for number, peak in enumerate(arguments.peaks):
        by_seed = results[number * len(arguments.seeds) : (number + 1) * len(arguments.seeds)]
        print(f"\npeak learning rate {peak:g}, seeds {arguments.seeds}\n\n{tables(by_seed, budgets)}")
        if number == 0:
            arguments.figure.parent.mkdir(parents=True, exist_ok=True)
            arguments.figure.write_text(draw(by_seed, budgets, RATIOS[-1]))
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
