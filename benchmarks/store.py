"""The artifact store against its peers, everything in one run: `python benchmarks/store.py`. Prints Markdown tables.

1. A fully cached run of a seven-stage recipe against a plain Prefect flow of seven no-op tasks, same server.
2. Seven no-op steps in a row, cold and cached: this store, ai2-tango, redun (both in a virtual environment of their
   own, named by --peers; made there on the first call; left out, and said, where they cannot be installed).
3. Digests of a folder of 3.4 GB against sha256sum and against just reading it.
4. A store of 1,000 and of 10,000 artifacts: plan, runs, one hit.

Whole processes are timed, alternating, medians of --repeats runs. About eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PEERS = PROJECT / "benchmarks" / "store_peers"

#: Seven stages of `tiny`, cut down: world, three data sets, base model, preflight, SFT.
SEVEN_STAGES = """
extends: tiny
name: seven
world: {num_sft: 64, num_preference: 64, num_pretrain: 64, num_rlvr: 16, planted_sft: 1, planted_preference: 1,
  planted_rlvr: 1, num_eval_arithmetic: 10, num_eval_instructions: 10, num_eval_verified: 10, num_preference_eval: 10}
data: {preference_eval: null, verified_eval: null}
contamination: null
reward_model: null
dpo: null
rlvr: null
evaluation: null
publish: null
"""


def seconds(command: list[str], environment: dict[str, str] | None = None, folder: Path = PROJECT) -> float:
    """Wall time of a process that must succeed."""
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    took = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return took


def alternate(measures: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every measure in turn, `repeats` times, so that a change of the machine's load meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeats):
        for name, measure in measures.items():
            times[name].append(measure())
    return times


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def cached_flow(folder: Path, repeats: int) -> None:
    sys.path.insert(0, str(PROJECT))
    from smoltulu.flows.graphs.recipe_graph import Graph
    from smoltulu.flows.machine import machine, prefect_api
    from smoltulu.flows.recipe import load_recipe

    recipe = folder / "seven.yaml"
    recipe.write_text(SEVEN_STAGES)
    assert len(Graph(load_recipe(str(recipe))).nodes) == 7, "as many as the plain flow has tasks"
    home = folder / "home"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = machine.up(home, port=port, limit=None, say=lambda line: None)
    environment = {**prefect_api.client_environment(running.url), "SMOLTULU_STORE": str(folder / "store")}
    ours = [sys.executable, "-c", f"from smoltulu.flows.pipeline import smoltulu; smoltulu({str(recipe)!r})"]
    plain = [sys.executable, str(PEERS / "plain_flow.py")]
    try:
        seconds(ours, environment)  # makes the seven artifacts
        times = alternate(
            {"ours": lambda: seconds(ours, environment), "plain": lambda: seconds(plain, environment)}, repeats
        )
    finally:
        machine.down(home, say=lambda line: None)
    ratio = statistics.median(times["ours"]) / statistics.median(times["plain"])
    print("\n| flow, as a process against a running server | seconds, median (range) |\n|---|---:|")
    print(f"| plain Prefect, seven no-op tasks | {shown(times['plain'])} |")
    print(f"| smoltulu, seven stages, all cached | {shown(times['ours'])} |")
    print(f"\nRatio {ratio:.2f}; goal at most 1.15: {'met' if ratio <= 1.15 else 'NOT met'}.")


def no_op_chain(folder: Path, peers: Path, repeats: int) -> None:
    python = peers / "bin" / "python"
    if not python.exists():
        print(f"\nmaking {peers} with ai2-tango and redun", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(peers)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "ai2-tango==1.3.2", "redun==0.44.1"], check=False
        )
    folder.mkdir()
    commands = {"smoltulu": [sys.executable, str(PEERS / "smoltulu_dag.py")]}
    for name in ("tango", "redun"):
        if subprocess.run([str(python), "-c", f"import {name}"], capture_output=True).returncode:
            print(f"\n{name} is not installed in {peers}: left out of the table")
            continue
        commands[name] = [str(python), str(PEERS / f"{name}_dag.py")]

    def cold(name: str) -> float:
        shutil.rmtree(folder / name, ignore_errors=True)
        return cached(name)

    def cached(name: str) -> float:
        # Not in the checkout: tango looks for a git remote where it is started.
        return seconds([*commands[name], str(folder / name)], folder=folder)

    measures: dict[str, Callable[[], float]] = {}
    for name in commands:
        measures[f"{name} cold"] = lambda name=name: cold(name)  # type: ignore[misc]
        measures[f"{name} cached"] = lambda name=name: cached(name)  # type: ignore[misc]
    times = alternate(measures, repeats)
    print(
        "\n| seven no-op steps, whole process | cold, seconds | cached, seconds | cached / ours |\n|---|---:|---:|---:|"
    )
    own = statistics.median(times["smoltulu cached"])
    for name in commands:
        ratio = statistics.median(times[f"{name} cached"]) / own
        print(f"| {name} | {shown(times[f'{name} cold'])} | {shown(times[f'{name} cached'])} | {ratio:.2f} |")


def digest_speed(folder: Path, gigabytes: float) -> None:
    sys.path.insert(0, str(PROJECT))
    from smoltulu.artifacts.keys import folder_records

    data = folder / "model"
    data.mkdir()
    num_bytes = int(gigabytes * 1e9)
    block = os.urandom(1 << 24)
    for number in range(2):  # two shards, as a 1.7B model in bfloat16 may have, and some small files
        with (data / f"model-{number}.safetensors").open("wb") as file:
            for _ in range(num_bytes // 2 // len(block)):
                file.write(block)
    for number in range(10):
        (data / f"small-{number}.json").write_text("x" * 1000)
    total = sum(path.stat().st_size for path in data.iterdir())
    files = [str(path) for path in sorted(data.iterdir())]

    def forget() -> None:
        os.sync()
        for name in files:
            with open(name, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read() -> float:
        begin = time.perf_counter()
        buffer = bytearray(1 << 22)
        for name in files:
            with open(name, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return time.perf_counter() - begin

    def ours() -> float:
        begin = time.perf_counter()
        folder_records(data)
        return time.perf_counter() - begin

    measures = {"reading only": read, "sha256sum": lambda: seconds(["sha256sum", *files]), "smoltulu (BLAKE3)": ours}
    print(f"\n| {total / 1e9:.1f} GB in {len(files)} files | from memory, GB/s | from disk, GB/s |\n|---|---:|---:|")
    for name, measure in measures.items():
        measure()
        warm = min(measure() for _ in range(3))
        colds = []
        for _ in range(2):
            forget()
            colds.append(measure())
        print(f"| {name} | {total / warm / 1e9:.2f} | {total / min(colds) / 1e9:.2f} |")


def large_store(folder: Path, repeats: int) -> None:
    sys.path.insert(0, str(PROJECT / "benchmarks"))
    sys.path.insert(0, str(PROJECT))
    from store_fixture import make_store

    from smoltulu.artifacts.store import Found, Store

    smoltulu = [sys.executable, "-m", "smoltulu.flows.cli.main"]
    rows = []
    for num_artifacts in (1_000, 10_000):
        root = folder / str(num_artifacts)
        specs = make_store(root, num_artifacts)
        environment = {**os.environ, "SMOLTULU_STORE": str(root)}
        plan = [seconds([*smoltulu, "plan", "tiny"], environment) for _ in range(repeats)]
        runs = [seconds([*smoltulu, "runs"], environment) for _ in range(repeats)]
        store, hits = Store(root), []
        for spec in specs[:: max(1, len(specs) // 100)]:
            begin = time.perf_counter()
            assert isinstance(store.find(spec), Found)
            hits.append(time.perf_counter() - begin)
        rows.append((num_artifacts, shown(plan), shown(runs), f"{1e3 * statistics.median(hits):.2f} ms"))
    print("\n| artifacts | `plan tiny`, seconds | `runs`, seconds | one hit |\n|---:|---:|---:|---:|")
    for row in rows:
        print(f"| {row[0]:,} | {row[1]} | {row[2]} | {row[3]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "smoltulu-store-peers")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gigabytes", type=float, default=3.4, help="size of the folder that is hashed")
    parser.add_argument("--only", type=int, choices=(1, 2, 3, 4), help="one of the four tables")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smoltulu-benchmark-") as name:
        folder = Path(name)
        tables: dict[int, Callable[[], None]] = {
            1: lambda: cached_flow(folder, arguments.repeats),
            2: lambda: no_op_chain(folder / "chain", arguments.peers, arguments.repeats),
            3: lambda: digest_speed(folder, arguments.gigabytes),
            4: lambda: large_store(folder / "large", arguments.repeats),
        }
        for number, table in tables.items():
            if arguments.only in (None, number):
                print(f"\n### {number}", flush=True)
                table()


if __name__ == "__main__":
    main()
