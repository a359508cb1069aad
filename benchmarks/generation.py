"""Tokens a second of generation on transformers: our loop against `generate` and transformers' continuous batching.

    python benchmarks/generation.py [--shape small] [--prompts 96] [--samples 1] [--batch 16] [--rounds 3]

The model has random weights and writes at temperature 1, so which texts come is chance; a share of the vocabulary ends
one, so lengths are geometric, with the mean `--mean`, cut at `--longest`. Texts differ between the arms that draw by
themselves: what counts is tokens a second, of many texts. Prompts are log-normal, mean 129 and median 101 tokens (the
mix of the SFT data over four), and each is asked `--samples` times. Arms take turns; the fastest round counts, which
the machine's other work disturbed least.

    refill      tasks/generation: rows that ended are refilled, equal prompts are read once
    batches     the same loop, a batch at a time, as it was before it refilled
    generate    transformers' `generate`, batches of similar length: what TRL and lm-eval call
    continuous  transformers' `generate_batch`: paged cache, its own scheduler
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.training_rows import MIX_MEAN, MIX_MEDIAN, SHAPES, mixed_lengths, write_model
from benchmarks.training_tools import table

PAD = 1
#: Writes all texts; returns the ids of each.
Arm = Callable[[], list[list[int]]]


def arms(
    model: Any, prompts: list[list[int]], options: argparse.Namespace, stop_ids: tuple[int, ...]
) -> dict[str, Arm]:
    """Name -> what it wrote."""
    import torch
    from transformers import GenerationConfig

    from smoltulu.tasks.generation.engines import TransformersEngine
    from smoltulu.tasks.generation.interface import Request, Sampling
    from smoltulu.tasks.models.batches import longest_first, padded

    sampling = Sampling(options.longest, 1.0, stop_ids, seed=1)
    requests = [
        Request(ids, 0, place, sample) for place, ids in enumerate(prompts) for sample in range(options.samples)
    ]
    batches = list(longest_first([len(one.prompt_ids) for one in requests], options.batch))
    engine = TransformersEngine(model, pad_id=PAD, batch_size=options.batch)
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=options.longest,
        eos_token_id=list(stop_ids), pad_token_id=PAD,
    )  # fmt: skip

    def refill() -> list[list[int]]:
        return [one.ids for one in engine.generate(requests, sampling)]

    def by_batch() -> list[list[int]]:
        return [one.ids for batch in batches for one in engine.generate([requests[at] for at in batch], sampling)]

    def generate() -> list[list[int]]:
        made = []
        for batch in batches:
            ids, mask = padded([requests[at].prompt_ids for at in batch], "left", PAD, model.device)
            with torch.inference_mode():
                rows = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
            made += [_until(row, stop_ids) for row in rows]
        return made

    def continuous() -> list[list[int]]:
        from transformers import ContinuousBatchingConfig

        how = ContinuousBatchingConfig(
            max_requests_per_batch=options.batch, max_batch_tokens=2048, num_blocks=options.blocks, seed=1,
            use_cuda_graph=None if model.device.type == "cuda" else False,
        )  # fmt: skip
        made = model.generate_batch(
            [list(one.prompt_ids) for one in requests], generation_config=config, continuous_batching_config=how
        )
        assert len(made) == len(requests), "not all texts came back"
        return [one.generated_tokens for one in made.values()]

    every: dict[str, Arm] = {"refill": refill, "batches": by_batch, "generate": generate, "continuous": continuous}
    return {name: arm for name, arm in every.items() if name in options.arms}


def _until(ids: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """Up to the first stop id, which is kept."""
    return ids[: next((place + 1 for place, one in enumerate(ids) if one in stop_ids), len(ids))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--mean", type=float, default=48, help="tokens of an answer, before the cut")
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=64, help="of the paged cache, 256 tokens each")
    parser.add_argument("--arms", nargs="+", default=["refill", "batches", "generate", "continuous"])
    options = parser.parse_args()

    import torch

    from smoltulu.tasks.models.folders import load_language_model

    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_model(SHAPES[options.shape], Path(folder))
        model = load_language_model(Path(folder)).eval().to(options.device)
    vocabulary = model.config.vocab_size
    stop_ids = tuple(range(0, vocabulary, round(options.mean)))
    lengths = mixed_lengths(options.prompts, MIX_MEAN / 4, MIX_MEDIAN / 4, 1024, seed=1)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    found: dict[str, list[tuple[float, int]]] = {}
    for _ in range(options.rounds):
        for name, arm in arms(model, prompts, options, stop_ids).items():
            if options.device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            texts = arm()
            found.setdefault(name, []).append((time.perf_counter() - start, sum(map(len, texts))))
    speeds = {name: max(tokens / seconds for seconds, tokens in rounds) for name, rounds in found.items()}
    print(f"{options.shape}, {options.prompts} prompts x {options.samples}, batch {options.batch}, {torch.__version__}")
    table(
        ["arm", "tokens", "s, fastest", "tokens/s", "against generate"],
        [
            [
                name,
                f"{rounds[-1][1]:,}",
                f"{min(seconds for seconds, _ in rounds):.2f}",
                f"{speeds[name]:,.0f}",
                f"{speeds[name] / speeds['generate']:.2f}" if "generate" in speeds else "",
            ]
            for name, rounds in found.items()
        ],
    )


if __name__ == "__main__":
    main()
