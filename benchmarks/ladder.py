"""How far a ladder can be trusted: intervals of planted ladders, and the transfer of a learning rate over widths.

    OMP_NUM_THREADS=1 python benchmarks/ladder.py intervals    # 500 planted ladders of every kind
    OMP_NUM_THREADS=1 python benchmarks/ladder.py transfer     # muP and the usual parametrisation

`intervals` plants optima on a line (with and without scatter about it) and counts how often the 95 % interval at the
target holds the truth. `transfer` trains models of two widths on the chain of words of river_valley.py, whose excess
loss KL(true || model) is known, at eight rates each, and says what the best rate of the narrow one costs the wide one.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from numpy.typing import NDArray
from river_valley import BATCH, LENGTH, NUM_MEASURED, NUM_WORDS, Chain

from smoltulu.schemas.base_model import BaseModelConfig, MupSettings
from smoltulu.schemas.schedules import WSDSchedule
from smoltulu.tasks.base_model.scratch import new_model
from smoltulu.tasks.models import mup
from smoltulu.tasks.surface.ladder import predict
from smoltulu.tasks.surface.optimum import Cells, find_optima
from smoltulu.tasks.trainer.schedules import learning_rate_factor

Floats = NDArray[np.float64]
#: Octaves of rate for an octave of batch and of size, in the planted ladders.
ALPHA, DELTA = 0.5, -0.4
NARROW, WIDE = 32, 128
RATES = range(-10, -2)


def _truth(batch: float, size: float) -> float:
    return ALPHA * batch + DELTA * size - 2


def planted(
    draws: np.random.Generator, sizes: tuple[float, ...], batches: tuple[float, ...], scatter: float, num_seeds: int
) -> Cells:
    """One octave off an optimum costs a seed's standard deviation; five rates around every optimum."""
    rows = []
    for size in sizes:
        for batch in batches:
            best = _truth(batch, size) + scatter * draws.normal()
            rates = np.arange(-2, 3) + np.round(best + draws.normal(0, 0.3))
            rows += [(u, batch, size, best, seed) for u in rates for seed in range(num_seeds)]
    u, batch, size, best, seed = np.array(rows).T
    levels = draws.normal(0, 3, (40, 400, 10))[batch.astype(int), (10 * size).astype(int), seed.astype(int)]
    score = levels - (u - best) ** 2 + draws.normal(size=len(u))
    items = score[:, None] + 0.5 * draws.normal(size=20) + 0.5 * draws.normal(size=(len(u), 20))
    return Cells(u, batch, np.full(len(u), 22.0), size, seed.astype(int), np.zeros(len(u), bool), items)


def intervals(num_worlds: int) -> None:
    """Print a row for every kind of ladder. Its target is 2.2 octaves of size above the largest proxy, as 1.7B is."""
    print("| sizes | batches | seeds | scatter | predicted | bias | median half-width, octaves | holds the truth |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    kinds: list[tuple[tuple[float, ...], tuple[float, ...]]] = [
        ((27.0, 28.4), (5.0,)),
        ((27.0, 28.4), (3.0, 5.0, 7.0)),
        ((25.0, 27.0, 28.4), (5.0,)),
        ((25.0, 27.0, 28.4), (3.0, 5.0, 7.0)),
    ]
    for number, (sizes, batches) in enumerate(kinds):
        for num_seeds in (3, 1):
            for scatter in (0.0, 0.3):
                draws = np.random.default_rng([14, number, num_seeds, round(10 * scatter)])
                errors, halves, held = [], [], []
                for _ in range(num_worlds):
                    cells = planted(draws, sizes, batches, scatter, num_seeds)
                    found = predict(find_optima(cells, 200), 5.0, 22.0, sizes[-1] + 2.2)
                    true = _truth(5.0, sizes[-1] + 2.2) + scatter * draws.normal()
                    if np.isfinite(found.log2_lr):
                        errors.append(found.log2_lr - true)
                    if np.isfinite(found.low):
                        halves.append(found.high - found.log2_lr)
                        held.append(found.low <= true <= found.high)
                width, share = (f"{np.median(halves):.2f}", f"{np.mean(held):.1%}") if held else ("-", "no interval")
                bias = f"{np.mean(errors):+.3f} ± {np.std(errors) / np.sqrt(len(errors)):.3f}" if errors else "-"
                print(
                    f"| {', '.join(f'{one:g}' for one in sizes)} | {', '.join(f'{one:g}' for one in batches)} "
                    f"| {num_seeds} | {scatter:g} | {len(errors) / num_worlds:.1%} | {bias} | {width} | {share} |",
                    flush=True,
                )


class _Words:
    """What a new model wants to know of a tokenizer."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self) -> int:
        return NUM_WORDS


def excess_loss(width: int, base_width: int | None, log2_lr: int, num_steps: int, seed: int) -> float:
    """Mean KL(true || model) after a training, nats; nan where it diverged."""
    settings = BaseModelConfig(
        seed=seed,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=LENGTH,
        sequence_length=LENGTH,
        initializer_range=0.02 if base_width is None else 0.1,
        mup=None if base_width is None else MupSettings(base_width=base_width),
    )
    model = new_model(settings, _Words())  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.0**log2_lr, betas=(0.9, 0.95), weight_decay=0.0)
    if base_width is not None:
        mup.scale_rates(optimizer, model, base_width)
    schedule = WSDSchedule(kind="wsd", warmup_ratio=0.1, decay_ratio=0.25, decay_shape="1-sqrt")
    factor = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(schedule, min(step, num_steps - 1), num_steps)
    )
    chain = Chain(seed)
    batches = chain.sample(num_steps * BATCH, seed + 1000).view(-1, BATCH, LENGTH)
    for words in batches:
        model(input_ids=words, labels=words).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        factor.step()
    measured = chain.sample(NUM_MEASURED, seed + 2000)
    true = torch.from_numpy(chain.true).float()[measured[:, :-1]]
    with torch.no_grad():
        log_probs = torch.log_softmax(model(input_ids=measured).logits[:, :-1].float(), dim=-1)
    return float((true * (true.clamp_min(1e-30).log() - log_probs)).sum(-1).mean())


def transfer(num_steps: int, seed: int) -> None:
    """Print the losses, and the regret of the narrow model's best rate at the wide one."""
    for name, base_width in (("usual", None), ("muP", NARROW)):
        began = time.process_time()
        found = {
            width: {rate: excess_loss(width, base_width, rate, num_steps, seed) for rate in RATES}
            for width in (NARROW, WIDE)
        }
        print(f"\n| {name} | {' | '.join(f'2^{rate}' for rate in RATES)} |")
        print(f"|---|{'---:|' * len(RATES)}")
        for width, losses in found.items():
            print(f"| width {width} | {' | '.join(f'{losses[rate]:.4f}' for rate in RATES)} |")
        best = {width: min(losses, key=lambda rate: losses[rate]) for width, losses in found.items()}
        used, least = found[WIDE][best[NARROW]], found[WIDE][best[WIDE]]
        edges = [str(width) for width, rate in best.items() if rate in (RATES[0], RATES[-1])]
        print(
            f"\n{name}: best at width {NARROW} 2^{best[NARROW]}, at width {WIDE} 2^{best[WIDE]}; the former costs "
            f"width {WIDE} {used / least - 1:+.1%} ({time.process_time() - began:.0f} s of CPU)"
            + (f"; at the edge of the rates: width {', '.join(edges)}" if edges else ""),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["intervals", "transfer"])
    parser.add_argument("--worlds", type=int, default=500, help="planted ladders of each kind")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a training")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.part == "intervals":
        intervals(given.worlds)
    else:
        torch.set_num_threads(1)
        transfer(given.steps, given.seed)


if __name__ == "__main__":
    main()
