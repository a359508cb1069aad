"""The training stages against plain TRL, and on a GPU against its peak. One run: `python benchmarks/training.py`.

1. Ours, as the runner runs it, against the plain TRL script with the same settings: is there a tax in the loop?
2. Ours against TRL's defaults on a realistic length mix at equal supervised tokens, and what each difference brings.
3. With a GPU: the shapes of SmolLM2, tokens/s, model-FLOPs utilisation, peak memory. Without one: the plan.

Random weights, synthetic token ids. All cores for both sides alike, or OMP_NUM_THREADS. Prints Markdown, and at the end
every goal, met or not; exit status 1 where one is not met. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.training_defaults import against_defaults
from benchmarks.training_gpu import on_a_gpu
from benchmarks.training_parity import same_settings
from benchmarks.training_rows import SHAPES
from benchmarks.training_tools import NAMES, Run, table

_PARTS = {1: same_settings, 2: against_defaults, 3: on_a_gpu}


def environment() -> str:
    """The machine and the versions, in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "trl", "transformers")]
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return (
        f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores (threads: {threads}), "
        f"load {os.getloadavg()[0]:.1f} at the start; {', '.join(versions)}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", choices=sorted(_PARTS), default=sorted(_PARTS))
    parser.add_argument("--stages", nargs="+", choices=sorted(NAMES), default=list(NAMES))
    parser.add_argument("--repeats", type=int, default=3, help="parts 1 and 2: runs of each side, in turn")
    parser.add_argument("--steps", type=int, default=15, help="parts 1 and 3: optimizer steps that count")
    parser.add_argument("--rows", type=int, default=24, help="part 2: rows (pairs), a multiple of 8; one epoch")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="parts 1 and 2: model")
    parser.add_argument("--prompt-share", type=float, default=0.25, help="of a pair's unique tokens (an assumption)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="part 3; cpu: for a try")
    parser.add_argument("--gpu-shapes", nargs="+", choices=sorted(SHAPES), default=["1.7B", "135M"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096], help="part 3: tokens a row")
    parser.add_argument("--peak-flops", type=float, help="part 3: dense bf16 FLOP/s, where the card is not known")
    parser.add_argument("--results", type=Path, help="part 3: JSON file, written anew after every training")
    parser.add_argument("--folder", help="for models, rows and stores; emptied at the end (default: temporary)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.rows % 8:
        raise SystemExit(f"--rows {options.rows} is not a multiple of 8, the rows of an optimizer step")
    logging.getLogger("smoltulu.benchmark").setLevel(logging.ERROR)
    print(f"Machine: {environment()}.")
    with tempfile.TemporaryDirectory(prefix="training-", dir=options.folder) as folder:
        run = Run(Path(folder), options)
        for part in options.parts:
            print(f"\n### Part {part}", flush=True)
            _PARTS[part](run)
    print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}.")
    if run.goals:
        table(["goal", "measured", "met"], [[goal, value, "yes" if met else "NO"] for goal, value, met in run.goals])
    return int(not all(met for _, _, met in run.goals))


if __name__ == "__main__":
    raise SystemExit(main())
