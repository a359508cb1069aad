"""The earlier toy result again: fine-tuning wants one rate for what it acquires, another for what it has to keep.

A Llama of 106,816 parameters learns a bigram chain (512 tokens; half of the rows have one successor, the other half a
Dirichlet over 32; 2 % of the steps start anew, by Zipf's law). A quarter of the rows is changed, and it is fine-tuned
on 131,072 tokens with a linear schedule. Measured is the exact KL(true || model): `acquire` on changed rows, `retain`
on the others. Found before (4 seeds, batch 4 to 32 sequences of 64): log2 of the best rate -4.9, -4.5, -4.4, -4.5 for
acquire (slope .14) and -8.2, -7.6, -7.1, -6.8 for retain (.47 to .52), 2.3 to 3.2 octaves apart.

Plain torch; every run is a line of a file, so that a second call goes on. Its optima come from `tasks/surface`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from smoltulu.tasks.surface.accounts import Slopes, fit_slopes
from smoltulu.tasks.surface.optimum import Cells, find_optima

VOCABULARY, LENGTH, NUM_TOKENS = 512, 64, 131_072
BATCHES = (4, 8, 16, 32)
RATES, EDGE_RATES = range(-12, -5), range(-5, -2)  # log2; the first grid ended too early
SEEDS, EDGE_SEEDS = range(4), range(2)
PRETRAINING_STEPS, PRETRAINING_RATE, PRETRAINING_BATCH = 1500, 4e-3, 32
#: What is to be within the new 95 % interval.
EARLIER = {"acquire": 0.14, "retain": 0.5}


class Run(NamedTuple):
    """One fine-tuning. `rate`: log2 of the peak learning rate."""

    rate: int
    batch: int
    seed: int


def runs() -> Iterator[Run]:
    """112 of the grid and 24 beyond its upper edge."""
    for rates, seeds in ((RATES, SEEDS), (EDGE_RATES, EDGE_SEEDS)):
        yield from (Run(rate, batch, seed) for batch in BATCHES for rate in rates for seed in seeds)


def chain(seed: int) -> torch.Tensor:
    """Transition probabilities (VOCABULARY, VOCABULARY), with the restarts in them."""
    draws = np.random.default_rng(seed)
    zipf = 1 / np.arange(1, VOCABULARY + 1)
    zipf /= zipf.sum()
    rows = np.zeros((VOCABULARY, VOCABULARY))
    for row in range(VOCABULARY):
        if row % 2:
            rows[row, draws.integers(VOCABULARY)] = 1
        else:
            rows[row, draws.choice(VOCABULARY, 32, replace=False)] = draws.dirichlet(np.ones(32))
    return torch.tensor(0.98 * rows + 0.02 * zipf, dtype=torch.float32)


def changed_rows() -> torch.Tensor:
    """Which rows differ after pre-training, (VOCABULARY,) bool: a quarter of each kind."""
    return torch.arange(VOCABULARY) % 8 < 2


def sample(rows: torch.Tensor, num: int, generator: torch.Generator) -> torch.Tensor:
    """Sequences (num, LENGTH + 1) of a chain."""
    states = [torch.multinomial(rows.mean(0), num, replacement=True, generator=generator)]
    for _ in range(LENGTH):
        states.append(torch.multinomial(rows[states[-1]], 1, generator=generator)[:, 0])
    return torch.stack(states, dim=1)


def train(model: LlamaForCausalLM, rows: torch.Tensor, rate: float, batch: int, num_steps: int, seed: int) -> None:
    """AdamW (.9, .95) without decay; linear to 0. Equal seeds see equal sequences in equal order at any batch."""
    generator = torch.Generator().manual_seed(seed)
    data = sample(rows, batch * num_steps, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step, sequences in enumerate(data.split(batch)):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / num_steps)
        logits = model(input_ids=sequences[:, :-1]).logits
        functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.inference_mode()
def kl_of_rows(model: LlamaForCausalLM, rows: torch.Tensor) -> list[float]:
    """Mean KL(true || model) in nats at each state of the chain, over 256 held-out sequences; nan where none came."""
    sequences = sample(rows, 256, torch.Generator().manual_seed(10_000))[:, :-1]
    logps = model(input_ids=sequences).logits.log_softmax(-1)
    truth = rows[sequences]
    values = (truth * (truth.clamp_min(1e-30).log() - logps)).sum(-1).flatten().double()
    states = sequences.flatten()
    sums = torch.zeros(VOCABULARY, dtype=torch.float64).index_add(0, states, values)
    return (sums / torch.bincount(states, minlength=VOCABULARY)).tolist()


def base_model(folder: Path) -> Path:
    """The pre-trained model, made where it is missing."""
    target = folder / "base"
    if not target.exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=LENGTH,
            )
        )  # fmt: skip
        train(model, chain(0), PRETRAINING_RATE, PRETRAINING_BATCH, PRETRAINING_STEPS, seed=1)
        model.save_pretrained(folder / "base.part")
        (folder / "base.part").rename(target)
    return target


def fine_tune(base: Path, run: Run) -> dict[str, Any]:
    """One line of the file."""
    torch.set_num_threads(1)
    began = time.monotonic()
    changed = changed_rows()
    rows = torch.where(changed[:, None], chain(1), chain(0))
    model = LlamaForCausalLM.from_pretrained(base)
    train(model, rows, 2.0**run.rate, run.batch, NUM_TOKENS // (run.batch * LENGTH), seed=100 + run.seed)
    kl = kl_of_rows(model.eval(), rows)
    made = run._asdict() | {"kl": [None if math.isnan(one) else round(one, 6) for one in kl]}
    return made | {"seconds": time.monotonic() - began}


def cells(lines: list[dict[str, Any]], which: torch.Tensor) -> Cells:
    """Lines as cells; an item is a state of the chain, larger is better."""
    kl = np.array([line["kl"] for line in lines], dtype=float)
    kl = kl[:, which.numpy() & np.isfinite(kl).all(axis=0)]
    return Cells(
        log2_lr=np.array([float(line["rate"]) for line in lines]),
        log2_batch=np.log2([line["batch"] for line in lines]),
        log2_tokens=np.full(len(lines), math.log2(NUM_TOKENS)),
        log2_size=np.full(len(lines), math.log2(106_816)),
        seed=np.array([line["seed"] for line in lines]),
        diverged=np.zeros(len(lines), bool),
        items=-kl,
    )


def toy(folder: Path, num_workers: int, minutes: float) -> None:
    """Run what is missing, for so many minutes, and print what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    file, deadline = folder / "runs.jsonl", time.monotonic() + 60 * minutes
    there = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {Run(line["rate"], line["batch"], line["seed"]) for line in there}
    missing = [run for run in runs() if run not in done]
    base = base_model(folder)
    with ProcessPoolExecutor(num_workers) as pool, file.open("a") as written:
        for start in range(0, len(missing), num_workers):
            if time.monotonic() > deadline:
                break
            for made in pool.map(fine_tune, [base] * num_workers, missing[start : start + num_workers]):
                there.append(made)
                written.write(json.dumps(made) + "\n")
                written.flush()
    print(f"{len(there)} of {len(list(runs()))} runs; {np.mean([line['seconds'] for line in there]):.1f} s a run\n")
    report(there)


def report(lines: list[dict[str, Any]]) -> None:
    """Optima per batch, and the slope beside the earlier one."""
    print("| what | best log2 rate at batch " + ", ".join(map(str, BATCHES)) + " | slope, 95 % | earlier | within |")
    print("|---|---|---|---:|---|")
    changed = changed_rows()
    best = {}
    for name, which in (("acquire", changed), ("retain", ~changed)):
        found = find_optima(cells(lines, which))
        best[name] = [one.log2_lr for one in found.optima]
        told = ", ".join(f"{one.log2_lr:.1f} ± {one.stderr:.1f}{' !' if one.flaw else ''}" for one in found.optima)
        slopes = fit_slopes(found)
        print(f"| {name} | {told} | {_interval(slopes, EARLIER[name])}")
    apart = ", ".join(f"{one - other:.1f}" for one, other in zip(best["acquire"], best["retain"], strict=True))
    print(f"\noctaves apart: {apart} (earlier: 2.3 to 3.2). `!`: an optimum that may not be used")


def _interval(slopes: Slopes, earlier: float) -> str:
    if "alpha" not in slopes.names or np.isnan(slopes.estimate[0]):
        return f"not told: {'; '.join(slopes.problems)} | {earlier} | - |"
    low, high = slopes.interval("alpha")
    return (
        f"{slopes.estimate[0]:.2f} [{low:.2f}, {high:.2f}] | {earlier} | {'yes' if low <= earlier <= high else 'no'} |"
    )
