"""RLVR against TRL's GRPO script, where a step's time goes, and what PPO costs. One run: `python benchmarks/rlvr.py`.

1. Our GRPO stage against TRL's GRPOTrainer, used as in its own script (`trl/scripts/grpo.py`: reward function in the
   same process, rollouts by transformers) at the same settings: prompts per second.
2. The share of a step in which rollouts are written, graded, looked at (log-probabilities of policy and reference,
   values) and trained on, for GRPO and PPO.
3. PPO with one epoch against GRPO at as many episodes and the same beta: seconds, and FLOPs as the plan counts them.

    python benchmarks/rlvr.py                # two CPU cores, float32: under eight minutes
    python benchmarks/rlvr.py --device cuda  # one GPU, 1.7B in bfloat16: 2 and 3, and the peak memory of each phase

Random weights and prompts; nearly no completion ends early, so both sides write and train on as many tokens. TRL's and
our trainings take turns, in fresh processes; of every step counts the median of the runs. Prints Markdown and every
goal, met or not; exit status 1 where one is not met.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.rlvr_work import PHASES
from benchmarks.training import environment
from benchmarks.training_rows import SHAPES, Shape
from benchmarks.training_tools import (
    CHAT_TEMPLATE,
    LEARNING_RATE,
    SEED,
    ChildFailed,
    Run,
    number,
    our_environment,
    spread,
    step_seconds,
    table,
)
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.tasks.data.rows import rows_schema
from smoltulu.tasks.training.rlvr import flops_per_token

BETA = 0.05
MIN_RATIO, MAX_SCORING, MAX_PPO = 0.98, 0.05, 2.0
#: Of the policy's float32 weights: what generation may leave in the device's memory, where no copy of them stays.
MAX_LEFT = 0.05
_TRAININGS = {"trl": "GRPO, TRL's script", "grpo": "GRPO, ours", "ppo": "PPO, ours"}


@dataclass(frozen=True)
class Setting:
    """What an optimizer step has, and how often it is measured.

    prompt_words   least and most words of a prompt; one word is one token
    num_warm_up    optimizer steps that do not count
    """

    num_prompts: int
    num_samples: int
    num_new_tokens: int
    per_device: int
    prompt_words: tuple[int, int]
    num_warm_up: int
    num_steps: int
    num_repeats: int

    @property
    def num_episodes(self) -> int:
        """Rollouts of a step."""
        return self.num_prompts * self.num_samples

    @property
    def logging_steps(self) -> int:
        """Few enough for a loss to be logged, as many as a training has where there is time."""
        return 5 if self.num_steps >= 10 else 1


SETTINGS = {
    "minute": Setting(2, 4, 8, 8, (4, 12), 1, 2, 1),
    "small": Setting(8, 8, 32, 64, (8, 40), 2, 15, 3),
    "135M": Setting(2, 4, 32, 8, (8, 40), 1, 3, 2),
    "1.7B": Setting(8, 8, 128, 8, (32, 96), 1, 2, 1),
}


def rlvr_rows(num_rows: int, words: tuple[int, int], shape: Shape, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of random words. Half ask for a number, half for two digits to be mentioned.

    The latter is right for a part of what random weights write, so that rewards differ within a group.
    """
    draw = random.Random(seed)
    rows = []
    for place in range(num_rows):
        said = " ".join(f"w{draw.randrange(3, shape.vocab_size)}" for _ in range(draw.randint(*words)))
        keywords = json.dumps({"func_name": "verify_keywords", "keyword_list": [str(11 * draw.randint(1, 9))]})
        asked = [{"role": "user", "content": said}]
        verifier, truth = ("gsm8k", str(place)) if place % 2 else ("ifeval", keywords)
        rows.append({"id": f"0:{place}", "prompt": asked, "verifier": verifier, "ground_truth": truth})
    return rows


@dataclass(frozen=True)
class Measured:
    """The runs of one training, as `rlvr_work.Phases.result` has them; steps of the warm-up are in no mean."""

    runs: list[dict[str, Any]]
    setting: Setting
    num_prompt_tokens: float  # of one prompt, in the mean

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        ends = [list(accumulate(sum(step.values()) for step in run["steps"])) for run in self.runs]
        return statistics.fmean(step_seconds(ends)[self.setting.num_warm_up :])

    @property
    def seconds_of_runs(self) -> list[float]:
        """Of an optimizer step, run by run."""
        counted = [run["steps"][self.setting.num_warm_up :] for run in self.runs]
        return [statistics.fmean(sum(step.values()) for step in steps) for steps in counted]

    def phase_seconds(self, phase: str) -> float:
        """Of an optimizer step."""
        ends = [list(accumulate(step[phase] for step in run["steps"])) for run in self.runs]
        return statistics.fmean(step_seconds(ends)[self.setting.num_warm_up :])

    def share(self, phase: str) -> float:
        return self.phase_seconds(phase) / sum(map(self.phase_seconds, PHASES))

    @property
    def prompts_per_second(self) -> float:
        return self.setting.num_prompts / self.seconds

    @property
    def num_written(self) -> float:
        """Tokens of a step's completions."""
        return statistics.fmean(n for run in self.runs for n in run["num_written"][self.setting.num_warm_up :])

    @property
    def num_trained(self) -> float:
        """Tokens of a step that go through the policy's update: prompts and completions."""
        return self.num_written + self.setting.num_episodes * self.num_prompt_tokens

    def peak(self, phase: str) -> int:
        """Bytes; 0 without a GPU."""
        return max(run["peaks"].get(phase, 0) for run in self.runs)

    @property
    def left_by_generation(self) -> int:
        """Bytes."""
        return max(run["left_by_generation"] for run in self.runs)

    @property
    def speeds(self) -> tuple[float, float]:
        """Tokens per second: written in generation, trained on in the update."""
        return self.num_written / self.phase_seconds("generation"), self.num_trained / self.phase_seconds("update")

    def as_json(self) -> dict[str, Any]:
        made: dict[str, Any] = {"seconds_per_step": self.seconds, "seconds_per_step_of_runs": self.seconds_of_runs}
        made["prompts_per_second"] = self.prompts_per_second
        made["share"] = {phase: self.share(phase) for phase in PHASES}
        made["tokens_written_per_second"], made["tokens_trained_per_second"] = self.speeds
        made["peak_bytes"] = {phase: self.peak(phase) for phase in PHASES}
        return made | {"bytes_left_by_generation": self.left_by_generation, "losses": self.runs[0]["losses"]}


class Comparison:
    """The trainings of one shape."""

    def __init__(self, run: Run, shape: Shape) -> None:
        self.run, self.shape, self.options = run, shape, run.options
        setting, given = SETTINGS[shape.name], run.options
        self.setting = Setting(
            **vars(setting)
            | {"num_steps": given.steps or setting.num_steps, "num_repeats": given.repeats or setting.num_repeats}
        )
        self.num_steps = self.setting.num_warm_up + self.setting.num_steps
        self.model = run.model(shape, given.device)
        # TRL takes the template from the model's folder.
        Path(self.model, "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
        self.rows = rlvr_rows(8 * self.setting.num_prompts, self.setting.prompt_words, shape)
        self.file = _written(self.rows, run.fresh("rows.parquet"))

    def config(self, algorithm: str) -> dict[str, Any]:
        """Settings of our stage."""
        setting = self.setting
        shared = {
            "algorithm": algorithm, "learning_rate": LEARNING_RATE, "effective_batch_size": setting.num_episodes,
            "max_prompt_length": 512, "max_completion_length": setting.num_new_tokens, "beta": BETA, "seed": SEED,
            "precision": self.options.precision, "gate": {"num_prompts": 0}, "max_rollouts_without_signal": 0,
        }  # fmt: skip
        if algorithm == "grpo":
            return shared | {"num_steps": self.num_steps, "num_generations": setting.num_samples}
        return shared | {
            "num_episodes": self.num_steps * setting.num_episodes, "num_samples_per_prompt": setting.num_samples,
            "num_ppo_epochs": 1, "critic": {"initial": "policy"}, "non_stop_reward": None,
        }  # fmt: skip

    def measure(self) -> dict[str, Measured]:
        """Training -> what was measured of it; the sides take turns."""
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(self.setting.num_repeats):
            if self.options.against_trl:
                runs.setdefault("trl", []).extend(self.run.child("plain_grpo", [self._plain_job()], our_environment()))
            jobs = [self._our_job(algorithm) for algorithm in self.options.algorithms]
            made = self.run.child("our_rlvr", jobs, our_environment())
            for algorithm, result in zip(self.options.algorithms, made, strict=True):
                runs.setdefault(algorithm, []).append(result)
        length = statistics.fmean(len(row["prompt"][0]["content"].split()) for row in self.rows) + 2  # its two headers
        return {name: Measured(results, self.setting, length) for name, results in runs.items()}

    def _our_job(self, algorithm: str) -> dict[str, Any]:
        compute = {
            "device": self.options.device, "per_device_train_batch_size": self.setting.per_device,
            "logging_steps": self.setting.logging_steps, "save_steps": 1_000_000, "min_free_disk_gb": 0,
            "report_to": ["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        }  # fmt: skip
        return {
            "config": self.config(algorithm),
            "inputs": {"model": self.model, "dataset": self.file, "chat_template": CHAT_TEMPLATE},
            "compute": compute,
            "folder": str(self.run.fresh(algorithm)),
            "num_warm_up_steps": self.setting.num_warm_up,
            "bfloat16": self.options.device == "cpu" and self.options.precision == "bfloat16",
        }

    def _plain_job(self) -> dict[str, Any]:
        setting, on_cpu = self.setting, self.options.device == "cpu"
        settings = {
            "learning_rate": LEARNING_RATE, "max_steps": self.num_steps, "seed": SEED, "data_seed": SEED,
            "per_device_train_batch_size": setting.per_device,
            "gradient_accumulation_steps": setting.num_episodes // setting.per_device,
            "num_generations": setting.num_samples, "max_completion_length": setting.num_new_tokens, "beta": BETA,
            "bf16": self.options.precision == "bfloat16", "use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu,
            "activation_checkpointing": False, "logging_steps": setting.logging_steps, "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip
        return {
            "model": self.model, "rows": self.file, "settings": settings, "folder": str(self.run.fresh("plain")),
            "num_warm_up_steps": setting.num_warm_up,
        }  # fmt: skip

    def step_flops(self, algorithm: str, measured: Measured) -> float:
        """As the plan forecasts them: so many a parameter of the policy and token of a rollout."""
        per_token = flops_per_token(RLVRSettings.model_validate(self.config(algorithm)))
        return per_token * self.shape.num_parameters * measured.num_trained


def _written(rows: list[dict[str, Any]], file: Path) -> str:
    """Parquet as the preflight leaves prompts."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows, rows_schema("rlvr")), file)
    return str(file)


def against_trl(run: Run, found: dict[str, dict[str, Measured]]) -> None:
    """The table of part 1."""
    rows = []
    for shape, of_shape in found.items():
        if not {"trl", "grpo"} <= of_shape.keys():
            continue
        trl, ours = of_shape["trl"], of_shape["grpo"]
        ratio = ours.prompts_per_second / trl.prompts_per_second
        cells = [
            f"{number(one.prompts_per_second)} "
            f"({spread([one.setting.num_prompts / seconds for seconds in one.seconds_of_runs])})"
            for one in (trl, ours)
        ]
        # Ours leaves before its last step is logged.
        losses = list(zip(trl.runs[0]["losses"], ours.runs[0]["losses"], strict=False))
        last = " / ".join(f"{loss:.3g}" for loss in losses[-1]) if losses else ""
        rows.append([shape, *cells, f"{ratio:.3f}", last])
        run.goal(f"GRPO {shape}: ours / TRL's script, prompts/s >= {MIN_RATIO}", f"{ratio:.3f}", ratio >= MIN_RATIO)
    if rows:
        table(["GRPO, same settings", "TRL's script, prompts/s", "ours, prompts/s", "ratio", "last loss of both"], rows)


def where_the_time_goes(run: Run, found: dict[str, dict[str, Measured]]) -> None:
    """The table of part 2."""
    rows = []
    for shape, of_shape in found.items():
        for name, one in of_shape.items():
            shares = [f"{one.share(phase):.1%}" for phase in PHASES]
            rows.append([f"{_TRAININGS[name]}, {shape}", f"{one.seconds:.3g}", *shares, *map(number, one.speeds)])
            if name != "trl":
                share = one.share("scoring")
                goal = f"{_TRAININGS[name]}, {shape}: scoring under {MAX_SCORING:.0%} of a step"
                run.goal(goal, f"{share:.2%}", share < MAX_SCORING)
    table(["training", "step, s", *PHASES, "tokens/s written", "tokens/s in the update"], rows)


def ppo_against_grpo(run: Run, found: dict[str, dict[str, Measured]], comparisons: dict[str, Comparison]) -> None:
    """The table of part 3."""
    rows = []
    for shape, of_shape in found.items():
        if not {"grpo", "ppo"} <= of_shape.keys():
            continue
        ratio = of_shape["ppo"].seconds / of_shape["grpo"].seconds
        flops = [comparisons[shape].step_flops(name, of_shape[name]) for name in ("grpo", "ppo")]
        seconds = [f"{of_shape[name].seconds:.3g}" for name in ("grpo", "ppo")]
        work = [f"{one / 1e12:.3g}" for one in flops]
        rows.append([shape, *seconds, f"{ratio:.2f}", *work, f"{flops[1] / flops[0]:.2f}"])
        goal = f"PPO with one epoch, {shape}: at most {MAX_PPO} times a GRPO step"
        run.goal(goal, f"{ratio:.2f}", ratio <= MAX_PPO)
    if rows:
        head = ["equal episodes and beta", "GRPO step, s", "PPO step, s", "ratio"]
        table([*head, "GRPO, TFLOP", "PPO, TFLOP", "ratio"], rows)


def memory(run: Run, found: dict[str, dict[str, Measured]]) -> None:
    """Peak memory of a GPU by phase."""
    rows = []
    for shape, of_shape in found.items():
        for name, one in of_shape.items():
            if not one.peak("update"):
                continue
            peaks = [f"{one.peak(phase) / 1e9:.1f}" for phase in PHASES]
            rows.append([f"{_TRAININGS[name]}, {shape}", *peaks, f"{one.left_by_generation / 1e9:.2f}"])
            allowed = MAX_LEFT * 4 * SHAPES[shape].num_parameters
            if name != "trl":
                goal = f"{_TRAININGS[name]}, {shape}: no copy of the policy outlives generation"
                run.goal(goal, f"{one.left_by_generation / 1e9:.2f} GB left", one.left_by_generation <= allowed)
    if rows:
        table(["peak memory, GB", *PHASES, "left by generation"], rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", "--shape", nargs="+", choices=sorted(SETTINGS), help="default: small 135M; cuda: 1.7B"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="default: float32; cuda: bfloat16")
    parser.add_argument("--against-trl", action=argparse.BooleanOptionalAction, help="default: on a CPU only")
    parser.add_argument("--algorithms", nargs="+", choices=("grpo", "ppo"), default=["grpo", "ppo"])
    parser.add_argument("--steps", type=int, help="optimizer steps that count (default: by shape)")
    parser.add_argument("--repeats", type=int, help="runs of every training, in turn (default: by shape)")
    parser.add_argument("--results", type=Path, help="JSON file, written anew after every shape")
    parser.add_argument("--folder", help="for models and rows; emptied at the end (default: temporary)")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.shapes = options.shapes or (["1.7B"] if on_gpu else ["small", "135M"])
    options.precision = options.precision or ("bfloat16" if on_gpu else "float32")
    if options.against_trl is None:
        options.against_trl = not on_gpu
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    machine = _machine(options.device)
    print(f"Machine: {machine}.", flush=True)
    found: dict[str, dict[str, Measured]] = {}
    comparisons: dict[str, Comparison] = {}
    with tempfile.TemporaryDirectory(prefix="rlvr-", dir=options.folder) as folder:
        run = Run(Path(folder), options, Path(__file__).with_name("rlvr_work.py"))
        for name in options.shapes:
            try:
                comparisons[name] = Comparison(run, SHAPES[name])
                found[name] = comparisons[name].measure()
            except ChildFailed as error:
                print(f"\n{name}: {error}", file=sys.stderr)
                run.goal(f"{name} runs", "failed", False)
                continue
            if options.results:
                made = {shape: {one: m.as_json() for one, m in of.items()} for shape, of in found.items()}
                options.results.write_text(json.dumps({"machine": machine, "shapes": made}, indent=1) + "\n")
    against_trl(run, found)
    if found:
        where_the_time_goes(run, found)
    ppo_against_grpo(run, found, comparisons)
    memory(run, found)
    for name in found:
        setting = comparisons[name].setting
        print(
            f"\n{name}: {setting.num_episodes} episodes a step ({setting.num_prompts} prompts x "
            f"{setting.num_samples}), {setting.num_new_tokens} new tokens, {setting.per_device} episodes a forward "
            f"pass, beta {BETA}, {options.precision}; {setting.num_steps} steps after {setting.num_warm_up}, every "
            f"step's median of {setting.num_repeats} runs (in brackets: whole runs)."
        )
    if run.goals:
        table(["goal", "measured", "met"], [[goal, value, "yes" if met else "NO"] for goal, value, met in run.goals])
    return int(not all(met for _, _, met in run.goals))


def _machine(device: str) -> str:
    """The card, where there is one, and all that `environment` says."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device; leave it out to measure on the CPU")
    return f"{torch.cuda.get_device_name()}; {environment()}" if device == "cuda" else environment()


if __name__ == "__main__":
    logging.getLogger("smoltulu").setLevel(logging.ERROR)
    raise SystemExit(main())
