"""Parts 2, 3 and 6 of `benchmarks/gpu_session.sh`: `gpu_session.py bfloat16|resume|ablations RESULT.json`.

bfloat16   50 steps of SFT in bfloat16 lie within a band of the same steps in float32
ablations  seconds of a step of SFT with each setting that is to make it faster, on the same rows; a gain under 3 % is
           marked
resume     SFT that was killed by SIGKILL between two checkpoints goes on, in another process as an unbroken one does

Random weights and tokens. Exit status 1 where it does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.training import environment
from benchmarks.training_rows import SHAPES, conversation_rows, mixed_lengths, write_rows
from benchmarks.training_tools import CHAT_TEMPLATE, ChildFailed, Run, our_environment

#: The band: how far the losses of the first step, which has the same weights on both sides, may be apart, those of any
#: step, and the means of the last ten; relative. Roundings of 2^-9 each mostly cancel in a mean over thousands of
#: tokens. On a CPU, 20 steps at the shape 135M were 3e-5, 3e-4 and 8e-5 apart, and 50 at `small` 1e-5, 1e-4 and 2e-5:
#: the band is 17 times the former. At `small`, outside it lie weights in bfloat16 (any step 8e-3, last ten 6e-3) and a
#: learning rate 10 % too high (1e-2, 9e-3).
FIRST_STEP, EVERY_STEP, LAST_TEN = 5e-4, 5e-3, 2e-3
#: The loss must fall by this share, or the comparison says nothing.
FALL = 0.05
#: Where two unbroken runs differ (kernels that add in any order), a resumed one may by three times as much, or by this.
NOISE = 1e-4
_NUM_STEPS = 50
#: Of the part `resume`: four trainings of the shape, of which three write their model.
_NUM_STEPS_RESUMED, _SAVE_STEPS, _KILLED_AT = 24, 8, 13


def outside_the_band(full: list[float], half: list[float]) -> list[str]:
    """What is wrong with losses in bfloat16, `half`, beside those in float32; nothing where they lie in the band."""
    assert len(full) == len(half) >= 20
    if not all(math.isfinite(loss) for loss in (*full, *half)):
        return ["a loss is not finite"]
    apart = [abs(b / a - 1) for a, b in zip(full, half, strict=True)]
    ends = [statistics.fmean(losses[-10:]) for losses in (full, half)]
    found = []
    if full == half:
        found.append("the losses are the same to the last bit: nothing was rounded to bfloat16")
    if ends[0] > (1 - FALL) * full[0]:
        found.append(f"in float32 the loss went from {full[0]:.4g} to {ends[0]:.4g}: too little to compare")
    if apart[0] > FIRST_STEP:
        found.append(f"the first losses are {apart[0]:.2e} apart, more than {FIRST_STEP:g}")
    if max(apart) > EVERY_STEP:
        found.append(f"at step {apart.index(max(apart)) + 1} they are {max(apart):.2e} apart, more than {EVERY_STEP:g}")
    if abs(ends[1] / ends[0] - 1) > LAST_TEN:
        found.append(f"the means of the last ten are {abs(ends[1] / ends[0] - 1):.2e} apart, more than {LAST_TEN:g}")
    return found


def not_as_unbroken(unbroken: list[list[float]], resumed: list[float]) -> list[str]:
    """What is wrong with the losses of a resumed training beside those of two unbroken ones."""
    one, other = unbroken
    if len(resumed) != len(one):
        return [f"the resumed training logged {len(resumed)} losses, the unbroken one {len(one)}"]
    noise = max(abs(b / a - 1) for a, b in zip(one, other, strict=True))
    allowed = max(3 * noise, NOISE) if noise else 0.0
    apart = [min(abs(value / loss - 1) for loss in both) for value, *both in zip(resumed, one, other, strict=True)]
    if max(apart) <= allowed:
        return []
    step = apart.index(max(apart)) + 1
    return [f"at step {step} the resumed loss is {max(apart):.2e} away; two unbroken runs are {noise:.2e} apart"]


def _job(run: Run, name: str, precision: str = "bfloat16", num_steps: int = _NUM_STEPS) -> dict[str, Any]:
    """A training for training_work.our_stages: epochs of 80 rows, eight a step in two passes."""
    shape, device = SHAPES[run.options.shape], run.options.device
    longest = 1024 if device == "cuda" else 48
    rows = run.folder / "rows.parquet"
    if not rows.exists():
        write_rows(conversation_rows(mixed_lengths(80, longest / 2, longest / 2.5, longest, seed=0), shape), rows)
    config = {
        "learning_rate": 1e-2 if shape.name == "minute" else 5e-4, "effective_batch_size": 8, "max_steps": num_steps,
        "max_length": longest, "warmup_ratio": 0.1, "precision": precision, "gate": {"num_prompts": 0},
    }  # fmt: skip
    compute = {
        "device": device, "per_device_train_batch_size": 4, "save_steps": _SAVE_STEPS, "logging_steps": 1,
        "min_free_disk_gb": 0, "save_total_limit": 1,
    }  # fmt: skip
    inputs = {"model": run.model(shape), "dataset": str(rows), "chat_template": CHAT_TEMPLATE}
    folder = str(run.folder / name)
    job = {"stage": "sft", "config": config, "inputs": inputs, "compute": compute, "folder": folder, "whole": True}
    # The stage would fall back to float32 on a CPU.
    return job | {"bfloat16": device == "cpu" and precision == "bfloat16"}


def bfloat16(run: Run) -> dict[str, Any]:
    """Both curves, and what is wrong with them."""
    jobs = [_job(run, precision, precision) for precision in ("float32", "bfloat16")]
    made = run.child("our_stages", jobs, our_environment())
    full, half = (training["losses"] for training in made)
    seconds = [training["ends"] for training in made]
    return {"float32": full, "bfloat16": half, "seconds": seconds, "wrong": outside_the_band(full, half)}


def resume(run: Run) -> dict[str, Any]:
    """The losses of two unbroken trainings and of one that was killed, and what is wrong with them."""
    broken, unbroken, again = (
        _job(run, name, num_steps=_NUM_STEPS_RESUMED) for name in ("broken", "unbroken", "again")
    )
    wrong = []
    try:
        run.child("our_stages", [broken | {"kill_at": _KILLED_AT}], our_environment())
        wrong.append("the training was not killed")
    except ChildFailed as error:
        if error.returncode != -signal.SIGKILL:
            raise
    made = run.child("our_stages", [broken, unbroken, again], our_environment())
    resumed, one, other = (training["losses"] for training in made)
    steps = Path(broken["folder"], "work", "resumed.jsonl").read_text().split()
    if steps != [str(_KILLED_AT // _SAVE_STEPS * _SAVE_STEPS)]:
        wrong.append(f"resumed at steps {steps}")
    result = {"unbroken": one, "unbroken again": other, "resumed": resumed, "resumed at": steps}
    result |= {"seconds": made[1]["ends"]}
    return result | {"bitwise": resumed == one, "wrong": wrong + not_as_unbroken([one, other], resumed)}


#: Ways to run the same steps, the first of them plain; then what each adds to the one before.
ABLATIONS: dict[str, dict[str, Any]] = {
    "padded rows": {"packing": False},
    "packed rows": {"packing": True},
    "budget of tokens": {"packing": True, "tokens_per_device": "auto"},
    "compiled layers": {"packing": True, "tokens_per_device": "auto", "compile": True},
    "with recomputed activations": {
        "packing": True, "tokens_per_device": "auto", "compile": True, "activation_checkpointing": True,
    },
}  # fmt: skip
#: What brings less than this share is not worth its code.
WORTH = 0.03
_NUM_STEPS_TIMED, _NUM_WARM = 12, 4


def gains(seconds: dict[str, float]) -> dict[str, float]:
    """Share by which each way is faster than the one before it; the last one, which trades time for memory, too."""
    return {name: seconds[before] / seconds[name] - 1 for before, name in pairwise(seconds)}


def ablations(run: Run) -> dict[str, Any]:
    """Seconds of a step each way, what each adds, and whether the losses are the same, as they must be."""
    jobs = []
    for name, compute in ABLATIONS.items():
        job = _job(run, name.replace(" ", "-"), num_steps=_NUM_STEPS_TIMED)
        jobs.append(job | {"compute": job["compute"] | compute})
    made = run.child("our_stages", jobs, our_environment())
    seconds = {
        name: (training["ends"][-1] - training["ends"][_NUM_WARM - 1]) / (_NUM_STEPS_TIMED - _NUM_WARM)
        for name, training in zip(ABLATIONS, made, strict=True)
    }
    first = made[0]["losses"]
    wrong = [
        f"{name}: the losses of the first step are {abs(training['losses'][0] / first[0] - 1):.1e} apart"
        for name, training in zip(ABLATIONS, made, strict=True)
        if abs(training["losses"][0] / first[0] - 1) > FIRST_STEP
    ]
    added = gains(seconds)
    for name, took in seconds.items():
        gain = f"{added[name]:+.1%}" if name in added else ""
        small = " (under 3 %)" if name in added and 0 <= added[name] < WORTH else ""
        print(f"{name:28} {1000 * took:9.1f} ms a step {gain}{small}")
    return {"seconds": seconds, "gains": added, "peak": [one.get("peak_bytes") for one in made], "wrong": wrong}


def main(arguments: list[str] | None = None) -> int:
    parts = {"bfloat16": bfloat16, "resume": resume, "ablations": ablations}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(parts))
    parser.add_argument("result", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: 135M; resume: small, for it writes so often")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    options.shape = options.shape or {"bfloat16": "135M", "resume": "small", "ablations": "135M"}[options.part]
    with tempfile.TemporaryDirectory(prefix="gpu-session-") as folder:
        try:
            result = parts[options.part](Run(Path(folder), options))
        except ChildFailed as error:
            result = {"wrong": [str(error)]}
        result |= {"environment": environment()}
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(result["wrong"]) or f"{options.part}: as it should be")
    return int(bool(result["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main())
