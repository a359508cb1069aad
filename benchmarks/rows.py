"""How fast rows become a data set, beside what reads the same file without checking it.

    python -m benchmarks.rows [--megabytes 64] [--detect-megabytes 1024] [--repeats 3] [--threads 1]

Ours: file -> rows.parquet, each row checked and counted. Beside it pyarrow's reader of JSON, and `datasets.map` with
the conversion that TRL applies to such rows (`trl.data_utils.maybe_convert_to_chatml`), as its trainers run it. Times
are the best of the repeats, taken in turn; the ratios are what to look at: megabytes a second are those of the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMS = ("messages", "messages and a column", "instruction")


def write_rows(file: Path, form: str, megabytes: float) -> int:
    """Rows of made-up prose, about as compressible as chats are. Returns bytes."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(3_000)]
    phrases = [" ".join(rng.choices(words, k=6)) for _ in range(2_000)]

    def text(number: int) -> str:
        return ". ".join(rng.choices(phrases, k=number)) + '.\n"Yes", she said.'

    size, number = 0, 0
    with file.open("w") as stream:
        while size < megabytes * 1e6:
            turns = [{"role": "user", "content": text(8)}, {"role": "assistant", "content": text(20)}]
            row: dict[str, Any] = {"messages": turns}
            if form == "messages and a column":
                row |= {"id": f"row {number}", "source": "made up"}
            elif form == "instruction":
                row = {"instruction": text(8), "input": "", "output": text(20)}
            size += stream.write(json.dumps(row) + "\n")
            number += 1
    return size


def best(repeats: int, **runs: Callable[[], Any]) -> dict[str, float]:
    """Seconds of each, the least of all repeats; they take turns, so that a slow minute is everybody's."""
    seconds = {name: float("inf") for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def adapt(file: Path, form: str, folder: Path, num_threads: int) -> None:
    """The stage `dataset`."""
    from smoltulu.schemas.compute import ComputeSettings
    from smoltulu.schemas.data import DataSet, DatasetInputs, DatasetStageConfig, DataSource
    from smoltulu.tasks.data.stage import build_dataset
    from smoltulu.tasks.stage import StageContext

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "work").mkdir(parents=True)
    source = DataSource(path=str(file), format="instruction" if form == "instruction" else "messages")
    config = DatasetStageConfig(kind="sft", data=DataSet(sources=(source,)))
    compute = ComputeSettings(device="cpu", num_threads=num_threads)
    context = StageContext(folder, folder / "work", compute, lambda *args, **kwargs: None)
    build_dataset(config, DatasetInputs(), context)


def read_with_pyarrow(file: Path, num_threads: int) -> None:
    """The table in memory, and no more."""
    import pyarrow.json

    pyarrow.json.read_json(file, read_options=pyarrow.json.ReadOptions(use_threads=num_threads > 1))


def convert_with_datasets(file: Path, form: str, folder: Path) -> None:
    """`datasets` reads the file and maps TRL's conversion over it."""
    import datasets
    from trl.data_utils import maybe_convert_to_chatml

    shutil.rmtree(folder, ignore_errors=True)
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder))
    if form == "instruction":
        rows.map(_as_turns, remove_columns=["instruction", "input", "output"])
    else:
        rows.map(maybe_convert_to_chatml, keep_in_memory=False, load_from_cache_file=False)


def _as_turns(row: dict[str, str]) -> dict[str, Any]:
    asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]}


_DETECT = """
import sys, time
from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.detect import detect_format
from smoltulu.tasks.data.sources import read_rows
def peak():  # of this process alone, which getrusage is not: it begins with its parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
base = peak()
started = time.perf_counter()
found = detect_format(read_rows(DataSource(path=sys.argv[1], format="text")))
seconds = time.perf_counter() - started
print(found.said, seconds, (peak() - base) / 1024)
"""


def detect(file: Path) -> str:
    """Seconds and memory of detection, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _DETECT, str(file)], capture_output=True, text=True, check=True)
    *said, seconds, megabytes = done.stdout.split()
    size = file.stat().st_size / 1e6
    more = f"{float(megabytes):.0f} MB more ({' '.join(said)})"
    return f"detection of {size:,.0f} MB ({file.suffix}): {float(seconds):.2f} s, {more}"


def main() -> None:
    """Print one line per form, then detection."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--detect-megabytes", type=float, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-datasets", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for form in FORMS:
            file = folder / "rows.jsonl"
            size = write_rows(file, form, given.megabytes) / 1e6
            seconds = best(
                given.repeats,
                ours=lambda file=file, form=form: adapt(file, form, folder / "ours", given.threads),
                pyarrow=lambda file=file: read_with_pyarrow(file, given.threads),
            )
            line = f"{form:<22} {size:.0f} MB: ours {size / seconds['ours']:.0f} MB/s, "
            line += f"{seconds['pyarrow'] / seconds['ours']:.2f} of the rate at which pyarrow reads it"
            if not given.without_datasets:
                theirs = best(1, theirs=lambda file=file, form=form: convert_with_datasets(file, form, folder / "hf"))
                line += f", {theirs['theirs'] / seconds['ours']:.1f} × datasets.map"
            print(line, flush=True)
        if given.detect_megabytes:
            lines = folder / "large.jsonl"
            write_rows(lines, "messages", given.detect_megabytes)
            print(detect(lines), flush=True)
            as_list = folder / "large.json"
            with lines.open() as rows, as_list.open("w") as stream:
                stream.write("[" + next(rows))
                stream.writelines("," + row for row in rows)
                stream.write("]")
            lines.unlink()
            print(detect(as_list), flush=True)
            as_list.unlink()
            wide = folder / "wide.jsonl"
            with wide.open("w") as stream:
                for _ in range(150):
                    stream.write(json.dumps({"prompt": "x " * 650_000, "completion": "y"}) + "\n")
            print(detect(wide), flush=True)
        print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
