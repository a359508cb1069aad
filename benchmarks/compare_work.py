"""How long `smoltulu compare` takes on two models: samples of evaluations, read and judged in a new process.

    python benchmarks/compare_work.py

`seconds()` is what another benchmark calls.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from smoltulu.schemas.evaluation import EvaluationOutputs, Score
from smoltulu.tasks.evaluation.samples import SAMPLES_FILE, write_samples

#: Items of the suite `paper`, and 4,169 more: 40,000.
NUM_ITEMS = {
    "paper_arc": 3548, "paper_bbh": 6511, "paper_gsm8k": 1319, "paper_hellaswag": 10042, "paper_ifeval": 541,
    "paper_mmlu_pro": 12032, "paper_piqa": 1838, "other": 4169,
}  # fmt: skip
_MEMBERS = {"paper_arc": 2, "paper_bbh": 27}
_WORK = """
import json, sys
from pathlib import Path
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.tasks.comparison.evaluations import compare, measured, verdicts
outputs = [EvaluationOutputs.model_validate_json((Path(one) / "outputs.json").read_text()) for one in sys.argv[1:]]
read = [measured(Path(folder), one, texts=False) for folder, one in zip(sys.argv[1:], outputs)]
judged = verdicts(compare("", *read), 0.05)
print(json.dumps({one.task: verdict for one, _, verdict in judged}))
"""


def write_evaluation(folder: Path, seed: int) -> None:
    """An evaluation of a model that is right on half of the items: prompts of 600 characters, answers of 300."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    scores, members_of = [], {}
    for entry, (task, num) in enumerate(NUM_ITEMS.items()):
        members = [f"{task}_{i}" for i in range(_MEMBERS.get(task, 0))] or [task]
        values: list[float] = []
        for number in range(num):
            values.append(float(draw.random() < 0.5))
            rows.append({
                "task": members[number % len(members)], "entry": entry, "id": number, "filter": "none",
                "doc_hash": f"{task}{number:08d}", "prompt_hash": "0123456789abcdef", "target_hash": "fedcba9876543210",
                "prompt": f"{number} question " * 40, "target": "A", "completion": f"{number} answer " * 22,
                "parsed": "A", "stop": "eos", "num_tokens": 60, "metrics": {"acc": values[-1]},
                "is_empty": False, "is_unparsed": False, "is_truncated": False, "is_left_cut": False,
            })  # fmt: skip
        members_of[task] = {"n-samples": {member: {} for member in members}}
        scores.append(
            Score(task=task, metric="acc,none", value=sum(values) / num, num_samples=num, num_fewshot=0,
                  harness="lm-eval 0.4.13", task_version="1.0", template_digest="t")
        )  # fmt: skip
    write_samples(folder / SAMPLES_FILE, rows)
    (folder / "results.json").write_text(json.dumps({"lm_eval": members_of}))
    outputs = EvaluationOutputs(
        subject="sft", scores=tuple(scores), samples_file=SAMPLES_FILE, results_file="results.json"
    )
    (folder / "outputs.json").write_text(outputs.model_dump_json())


def seconds(folder: Path | None = None) -> float:
    """Wall time of a new process that compares two models of 40,000 items each; the two are written before."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        sides = [Path(scratch) / name for name in ("before", "after")]
        for seed, side in enumerate(sides):
            write_evaluation(side, seed)
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _WORK, *map(str, sides)], capture_output=True, text=True, check=True
        )
        took = time.perf_counter() - began
    verdicts = json.loads(done.stdout)
    assert verdicts.keys() == NUM_ITEMS.keys() and "not comparable" not in verdicts.values(), verdicts
    return took


if __name__ == "__main__":
    runs = [seconds() for _ in range(3)]
    print(f"{sum(NUM_ITEMS.values()):,} items a model: " + ", ".join(f"{one:.2f}" for one in runs) + " s")
