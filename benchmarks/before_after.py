"""Two versions of the project beside each other: `python benchmarks/before_after.py BEFORE AFTER`. Prints a table.

BEFORE and AFTER are checkouts, each run by this interpreter with its own modules first. Whole processes are timed,
alternating, medians of --repeats runs:

1. data sets, benchmark index and contamination check of `real-small` from an empty store (SMOLTULU_REAL_DATA), and the
   bytes of the rows files that come out,
2. `plan smoltulu-1130` with an empty store and no network,
3. importing the flow.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DATA_STAGES = """
import logging, pathlib, sys
from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.tasks.engine.runner import run_stage
compute = {"compute.store": sys.argv[1], "compute.device": "cpu"}
graph, store, made = Graph(load_recipe("real-small", compute)), Store(sys.argv[1]), {}
for name, node in graph.nodes.items():
    if node.stage.name in ("dataset", "benchmark_index", "contamination"):
        needed = {binding.node: made[binding.node] for binding in node.bindings().values()}
        made[name] = run_stage(graph.job(name, needed), store, logging.getLogger("quiet"))
files = [pathlib.Path(one.path) / one.outputs["file"] for one in made.values() if "file" in one.outputs]
print(sum(file.stat().st_size for file in files))
"""
PLAN = """
import sys
from smoltulu.flows.cli.main import app
sys.argv = ["smoltulu", "plan", "smoltulu-1130", "--override", f"compute.store={sys.argv[1]}"]
app()
"""
IMPORT = "import smoltulu.flows.pipeline"
#: What modules were called before there was a package.
OLD_NAMES = {
    "smoltulu.flows.graphs.recipe_graph": "flows.graph",
    "smoltulu.flows.cli.main": "flows.cli",
    "smoltulu.tasks.engine.runner": "tasks.runner",
    "smoltulu.": "",
}
PROGRAMS = {"data sets and contamination check": DATA_STAGES, "plan, cold": PLAN, "import of the flow": IMPORT}


def run(checkout: Path, program: str) -> tuple[float, str]:
    """Seconds of one process, and what it printed."""
    may_fail = program is PLAN  # a plan without the Hub ends with what it could not resolve
    if not (checkout / "src").exists():
        for new, old in OLD_NAMES.items():
            program = program.replace(new, old)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": f"{checkout / 'src'}:{checkout}", "HF_HUB_OFFLINE": "1"}
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program, folder], cwd=checkout, env=environment, capture_output=True, text=True
        )
        seconds = time.monotonic() - began
    if done.returncode != 0 and not may_fail:
        sys.exit(f"{checkout}: {done.stderr[-2000:]}")
    return seconds, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    print("| whole processes, seconds | before | after | after / before |\n|---|---:|---:|---:|")
    num_bytes: list[int] = []
    for what, program in PROGRAMS.items():
        seconds: list[list[float]] = [[], []]
        for repeat in range(-1, asked.repeats):  # the first one warms caches
            for side, checkout in enumerate(asked.checkouts):
                took, printed = run(checkout.absolute(), program)
                if repeat >= 0:
                    seconds[side].append(took)
                elif program is DATA_STAGES:
                    num_bytes.append(int(printed.split()[-1]))
        before, after = (statistics.median(one) for one in seconds)
        ranges = [f"{statistics.median(one):.2f} ({min(one):.2f}–{max(one):.2f})" for one in seconds]
        print(f"| {what} | {ranges[0]} | {ranges[1]} | {after / before:.2f} |", flush=True)
    before_bytes, after_bytes = num_bytes
    print(f"| rows files, MB | {before_bytes / 1e6:.1f} | {after_bytes / 1e6:.1f} | {after_bytes / before_bytes:.2f} |")


if __name__ == "__main__":
    main()
