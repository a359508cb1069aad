"""Which heads of a real small model copy: the artifact `heads` on a CPU, with its gates. See docs/selection.md.

    python benchmarks/real_selection.py --model WORK/model --folder RESULTS --parts heads

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
    print(table(["masked", "probe accuracy", "rank correlation with lookups"], cells))
    print(
        table(
            ["gate", "passed", ""], [[g["name"], "yes" if g["passed"] else "NO", g["sentence"]] for g in made["gates"]]
        )
    )
    return not outputs.failed_gates


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--folder", type=Path, required=True, help="results, and what a stopped run goes on from")
    parser.add_argument("--parts", nargs="+", choices=["heads"], default=["heads"])
    parser.add_argument("--probes", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=450, help="of a probe")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="probes at a time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(0 if run_heads(arguments) else 1)


if __name__ == "__main__":
    main()
