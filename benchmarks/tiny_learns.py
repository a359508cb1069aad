"""Does every stage of the recipe `tiny` do what it should, on held-out data, for several seeds?

    python benchmarks/tiny_learns.py --seeds 0 1 2
    python benchmarks/tiny_learns.py --seeds 0 1 2 --algorithms ppo grpo rloo --rewards verified constant random

Runs the stages through the store (finished ones are taken from it), prints the table, exits 1 unless every row holds.
With `--algorithms`, RLVR is trained from the same DPO model by each of them, under each reward: right answers must
raise the held-out accuracy, a reward that does not look at the answer must not.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.comparison.paired import PairedTest, paired_test
from smoltulu.tasks.data.sources import expand_path
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.evaluation.samples import read_samples

SEED_FIELDS = (
    "world.seed",
    "base_model.scratch.seed",
    "sft.seed",
    "reward_model.seed",
    "dpo.seed",
    "rlvr.seed",
    "evaluation.sampled.seed",
)


#: Blocks of RLVR in place of the recipe's: as many rollouts, as long, and no penalty for a missing end.
_GROUPS = {
    "learning_rate": 5e-5, "effective_batch_size": 256, "num_generations": 8, "num_steps": 24, "max_prompt_length": 64,
    "max_completion_length": 32, "precision": "float32",
}  # fmt: skip
BLOCKS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "grpo": {"algorithm": "grpo", "scale_rewards": "none", **_GROUPS},
    "rloo": {"algorithm": "rloo", "beta": 0.0, **_GROUPS},
}
REWARDS = ("verified", "constant", "random", "format_only")


def run(seed: int, overrides: dict[str, Any], log: logging.Logger) -> dict[str, ArtifactReference]:
    """Every stage of `tiny` with this seed, by node name."""
    seeds = {field: seed for field in SEED_FIELDS if "rlvr" not in overrides or not field.startswith("rlvr.")}
    recipe = load_recipe("tiny", seeds | overrides)
    graph = Graph(recipe, until="evaluation")
    store = Store(expand_path(recipe.compute.store))
    slots = threading.Semaphore(recipe.compute.max_parallel_stages)
    futures: dict[str, Future[ArtifactReference]] = {}

    def make(name: str) -> ArtifactReference:
        upstream = {binding.node: futures[binding.node].result() for binding in graph.nodes[name].bindings().values()}
        with slots:
            return run_stage(graph.job(name, upstream), store, log)

    with ThreadPoolExecutor(max_workers=len(graph.nodes)) as pool:
        for name in graph.nodes:
            futures[name] = pool.submit(make, name)
        return {name: future.result() for name, future in futures.items()}


def score(references: dict[str, ArtifactReference], node: str, task: str, metric: str) -> float:
    """A score of an evaluation."""
    values = {(s["task"], s["metric"]): s["value"] for s in references[node].outputs["scores"]}
    return values[task, metric]


def sampled(references: dict[str, ArtifactReference], node: str) -> dict[str, float]:
    """Prompt id -> verified share of its samples."""
    reference = references[node]
    rows = read_samples(Path(reference.path) / reference.outputs["samples_file"])
    return {row["id"]: row["mean"] for row in rows if row["task"] == "verified_sampled"}


def contamination_is_exact(references: dict[str, ArtifactReference]) -> tuple[bool, str]:
    """Whether the removed rows of each training set are the planted ones, all of them and no others."""
    world = Path(references["world"].path)
    planted = json.loads((world / "planted_leaks.json").read_text())
    exact, counts = True, []
    for name in ("sft", "preference", "rlvr"):
        reference = references[f"contamination-{name}"]
        lines = (Path(reference.path) / reference.outputs["removed_file"]).read_text().splitlines()
        removed = {json.loads(line)["id"] for line in lines}
        expected = {f"0:{row}" for row in planted[name]["rows"]}
        exact = exact and removed == expected
        counts.append(f"{len(removed & expected)}/{len(expected)} +{len(removed - expected)}")
    return exact, ", ".join(counts)


def checks(references: dict[str, ArtifactReference]) -> list[tuple[str, str, str, bool]]:
    """Rows (stage, what must hold, measured, whether it holds)."""

    def exact_match(model: str) -> float:
        return score(references, f"evaluation-{model}", "tiny_arithmetic", "exact_match,strict-match")

    def instructions(model: str) -> float:
        return score(references, f"evaluation-{model}", "tiny_instructions", "acc,none")

    base, sft, dpo, rlvr = (exact_match(model) for model in ("base-model", "sft", "dpo", "rlvr"))
    kept_sft, kept_dpo, kept_rlvr = (instructions(model) for model in ("sft", "dpo", "rlvr"))
    reward_accuracy = score(references, "evaluation-reward-model", "preference", "pair_accuracy")
    dpo_accuracy = score(references, "evaluation-dpo-implicit-reward", "implicit_reward", "pair_accuracy")
    before, after = sampled(references, "evaluation-dpo"), sampled(references, "evaluation-rlvr")
    test = paired_test(before, after)
    gain, stderr, p_value = test.difference, test.stderr, test.p_value
    exact, counts = contamination_is_exact(references)
    p_text = "p < 1e-15" if p_value < 1e-15 else f"p = {p_value:.1g}"
    mean_before, mean_after = (sum(values.values()) / len(values) for values in (before, after))
    return [
        ("contamination", "planted leaks found, nothing else", counts, exact),
        ("sft", "exact match >= base + 40 points", f"{base:.1%} -> {sft:.1%}", sft >= base + 0.40),
        ("sft", "instructions kept >= 60 %", f"{kept_sft:.1%}", kept_sft >= 0.60),
        ("reward model", "pair accuracy >= 0.80", f"{reward_accuracy:.3f}", reward_accuracy >= 0.80),
        ("dpo", "implicit reward's pair accuracy >= 0.80", f"{dpo_accuracy:.3f}", dpo_accuracy >= 0.80),
        ("dpo", "exact match >= SFT - 1 point", f"{sft:.1%} -> {dpo:.1%}", dpo >= sft - 0.01),
        (
            "rlvr",
            f"samples at T = 1 >= DPO + 5 points, p < 0.05 ({len(before):,} prompts)",
            f"{mean_before:.1%} -> {mean_after:.1%} (+{100 * gain:.1f} ± {100 * stderr:.1f}, {p_text})",
            gain >= 0.05 and p_value < 0.05 and len(before) >= 1000,
        ),
        ("rlvr", "exact match >= DPO - 1 point", f"{dpo:.1%} -> {rlvr:.1%}", rlvr >= dpo - 0.01),
        # 200 prompts: two standard errors of a paired difference are about three points.
        (
            "rlvr",
            "instructions kept >= DPO - 3 points",
            f"{kept_dpo:.1%} -> {kept_rlvr:.1%}",
            kept_rlvr >= kept_dpo - 0.03,
        ),
    ]


@dataclass(frozen=True)
class Arm:
    """What RLVR did to the DPO model: sampled accuracy, paired over prompts, and greedy exact match, both in shares."""

    sampled: PairedTest
    greedy: float

    def __str__(self) -> str:
        test = self.sampled
        return (
            f"samples {100 * test.difference:+.1f} ± {100 * test.stderr:.1f} (p = {test.p_value:.1g}), "
            f"greedy {100 * self.greedy:+.1f}"
        )


def arm(seed: int, algorithm: str, reward: str, overrides: dict[str, Any], log: logging.Logger) -> Arm:
    """RLVR by this algorithm under this reward."""
    changes: dict[str, Any] = {"rlvr.reward": reward, "rlvr.seed": seed}
    if BLOCKS[algorithm]:
        changes = {"rlvr": BLOCKS[algorithm] | {"reward": reward, "seed": seed}}
    references = run(seed, overrides | changes, log)
    dpo, rlvr = (
        score(references, f"evaluation-{model}", "tiny_arithmetic", "exact_match,strict-match")
        for model in ("dpo", "rlvr")
    )
    before, after = sampled(references, "evaluation-dpo"), sampled(references, "evaluation-rlvr")
    return Arm(paired_test(before, after), rlvr - dpo)


def judged(reward: str, arms: Sequence[Arm]) -> tuple[str, bool]:
    """The verdict over seeds, in words, and whether it is as it should be.

    Right answers: 5 points in the mean, in each seed beyond noise, and greedy loses at most a point. A reward that does
    not look at the answer must gain nothing; what it loses is shown, as drift costs accuracy. `format_only` is shown
    and not judged: the form is learned from right answers too.
    """
    gains = [one.sampled.difference for one in arms]
    mean = sum(gains) / len(gains)
    said = f"samples {100 * mean:+.1f} in the mean"
    if reward == "format_only":
        return said, True
    if reward == "verified":
        is_clear = all(one.sampled.p_value < 0.05 and one.sampled.difference > 0 for one in arms)
        holds = mean >= 0.05 and is_clear and all(one.greedy >= -0.01 for one in arms)
        return f"{said}: {'ok' if holds else 'FAILS'}", holds
    has_gained = any(one.sampled.p_value < 0.01 and one.sampled.difference > 0 for one in arms)
    has_lost = any(one.sampled.p_value < 0.01 and one.sampled.difference < 0 for one in arms)
    return f"{said}: {'GAINS' if has_gained else 'no gain, loses' if has_lost else 'within noise'}", not has_gained


def show_arms(arguments: argparse.Namespace) -> bool:
    """The table of algorithms and rewards; whether all of them did what they should."""
    seeds = (f"seed {seed}" for seed in arguments.seeds)
    table = Table("algorithm", "reward", *seeds, "verdict", title="RLVR from one DPO model")
    all_hold = True
    for algorithm in arguments.algorithms:
        for reward in arguments.rewards:
            arms = [
                arm(seed, algorithm, reward, arguments.overrides, logging.getLogger(f"seed {seed}"))
                for seed in arguments.seeds
            ]
            verdict, holds = judged(reward, arms)
            table.add_row(algorithm, reward, *map(str, arms), verdict)
            all_hold = all_hold and holds
    Console(width=260).print(table)
    return all_hold


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--overrides", type=json.loads, default={}, help="dotted recipe fields as JSON")
    parser.add_argument("--algorithms", nargs="+", choices=sorted(BLOCKS), help="RLVR by each of these instead")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=["verified"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if arguments.algorithms:
        return 0 if show_arms(arguments) else 1
    table = Table("stage", "must show", *(f"seed {seed}" for seed in arguments.seeds), title="tiny learns")
    columns, seconds = [], []
    for seed in arguments.seeds:
        began = time.monotonic()
        columns.append(checks(run(seed, arguments.overrides, logging.getLogger(f"seed {seed}"))))
        seconds.append(time.monotonic() - began)
    for row in zip(*columns, strict=True):
        cells = [f"{measured} {'ok' if holds else 'FAILS'}" for _, _, measured, holds in row]
        table.add_row(row[0][0], row[0][1], *cells)
    table.add_row("all", "seconds (cached stages cost none)", *(f"{value:.0f}" for value in seconds))
    Console(width=200).print(table)
    return 0 if all(holds for column in columns for *_, holds in column) else 1


if __name__ == "__main__":
    sys.exit(main())
