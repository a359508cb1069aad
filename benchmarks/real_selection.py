"""Which heads of a real small model copy, with gates, and what they say of real rows. See docs/selection.md.

    python benchmarks/real_selection.py --model WORK/model --folder RESULTS --parts heads scores --data DATA/train

WORK is made by real_model.py. The same command goes on where it was stopped. Exit status: 0 all gates passed, 1 one
failed (which is a finding, printed like any other).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real_selection_scores import run_scores
from benchmarks.training_tools import table
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.selection import HeadSettings, ProbeSettings, SelectionHeadsConfig, SelectionHeadsInputs
from smoltulu.tasks.selection.heads_stage import find_heads
from smoltulu.tasks.stage import StageContext


def run_heads(arguments: argparse.Namespace) -> bool:
    """Find the heads and print them. Returns whether all gates passed."""
    for name in ("out", "work"):
        (arguments.folder / name).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def report(step: int, num_steps: int, **metrics: float) -> None:
        print(f"{step} of {num_steps} probes, {(time.monotonic() - started) / 60:.1f} min", flush=True)

    compute = ComputeSettings(
        device=arguments.device, num_threads=arguments.threads, per_device_eval_batch_size=arguments.batch
    )
    probes = ProbeSettings(num_probes=arguments.probes, max_tokens=arguments.tokens)
    config = SelectionHeadsConfig(probes=probes, heads=HeadSettings(), mask="uniform", gate="warn")
    inputs = SelectionHeadsInputs(model=str(arguments.model))
    outputs, _ = find_heads(
        config, inputs, StageContext(arguments.folder / "out", arguments.folder / "work", compute, report)
    )
    minutes = (time.monotonic() - started) / 60

    made = json.loads((arguments.folder / "out" / outputs.heads_file).read_text())
    scores, control = made["scores"], made["control"]
    print(f"\n{arguments.model.name}: {minutes:.1f} min with {arguments.threads} threads, rule {made['rule']}")
    print(json.dumps(made["probes"], indent=1))
    rows = [[f"{layer}.{head}", f"{scores[layer][head]:.3f}"] for layer, head in made["chosen"]]
    table(["head (layer.head)", "retrieval score"], rows)
    effects = [("chosen", control["chosen"]), *((f"random {n}", one) for n, one in enumerate(control["random"], 1))]
    cells = [["none", f"{control['plain']['accuracy']:.2f}", ""]]
    cells += [[name, f"{one['accuracy']:.2f}", f"{one['correlation']:.2f}"] for name, one in effects]
    table(["masked", "probe accuracy", "rank correlation with lookups"], cells)
    table(["gate", "passed", ""], [[g["name"], "yes" if g["passed"] else "NO", g["sentence"]] for g in made["gates"]])
    return not outputs.failed_gates


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--folder", type=Path, required=True, help="results, and what a stopped run goes on from")
    parser.add_argument("--parts", nargs="+", choices=["heads", "scores"], default=["heads"])
    parser.add_argument("--data", type=Path, help="scores: folder of real training rows (SMOLTULU_REAL_DATA/train)")
    parser.add_argument("--rows", type=int, default=500, help="scores: real rows")
    parser.add_argument("--row-tokens", type=int, default=400, help="scores: longer real rows are not taken")
    parser.add_argument("--probes", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=450, help="of a probe")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="probes at a time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if "scores" in arguments.parts and arguments.data is None:
        parser.error("the part scores needs --data")
    passed = "heads" not in arguments.parts or run_heads(arguments)
    if "scores" in arguments.parts:
        compute = ComputeSettings(
            device=arguments.device, num_threads=arguments.threads, per_device_eval_batch_size=arguments.batch
        )
        run_scores(
            arguments.model, arguments.folder / "out" / "heads.json", arguments.data, arguments.folder / "scores",
            arguments.rows, arguments.row_tokens, compute,
        )  # fmt: skip
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
