"""How long a training waits for its checkpoints: this project's, what it had before, and torch's own.

    python benchmarks/checkpoints.py [--repeats 5] [--folder FOLDER] [--small]

A Llama of the size of SmolLM2-135M (float32: 538 MB) with AdamW's moments, 1.6 GB a checkpoint, on this machine's CPUs.
Ways, in turns, on the same weights:

    before      transformers' trainer writes, then all is hashed and synced, then the marker
    waiting     today's format, the training waits until it is whole
    beside      today's: a thread copies while the next step is computed, then writes
    torch       torch.distributed.checkpoint.async_save as it comes (a pickle says where each tensor is)

Stall: seconds in which no step can be computed, with the wait of the next update for the copy. Whole: until a
resume may use it. Cost: what the training lost in all, the steps computed meanwhile not counted: a writer takes cores
and memory bandwidth from them. Wanted: a stall of at most a quarter of `waiting`.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from smoltulu.artifacts.checkpoints import mark_complete
from smoltulu.tasks.trainer.checkpoint_writer import CheckpointWriter

GOAL = 0.25
_SHAPES = {
    "135M": {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    "small": {"vocab_size": 4096, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2},
}
_NUM_TOKENS, _NUM_PLAIN_STEPS = 64, 3
#: Starts a checkpoint; returns a function that waits until it is whole.
Start = Callable[[Path], Callable[[], Any]]


def trainer_of(shape: str, folder: Path) -> Trainer:
    """A trainer that has done a step, so that there are moments to save."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **_SHAPES[shape], num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False
    )
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_total_limit=None, max_steps=1000
    )
    trainer = Trainer(LlamaForCausalLM(config), arguments)
    trainer.create_optimizer_and_scheduler(1000)
    trainer._tr_loss, trainer._globalstep_last_logged = torch.zeros(()), 0  # as in a training
    step(trainer)
    return trainer


def step(trainer: Trainer, before_update: Callable[[], Any] = lambda: None) -> float:
    """An optimizer step; returns the seconds that it waited before the update."""
    ids = torch.randint(4096, (1, _NUM_TOKENS))
    trainer.model(input_ids=ids, labels=ids).loss.backward()
    began = time.perf_counter()
    before_update()
    waited = time.perf_counter() - began
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return waited


def ways(shape: str, folder: Path) -> dict[str, tuple[Trainer, Start]]:
    """Each with a trainer; they share model and optimizer."""
    plain = trainer_of(shape, folder)
    ours = Trainer(plain.model, plain.args, optimizers=(plain.optimizer, plain.lr_scheduler))
    ours._tr_loss, ours._globalstep_last_logged = plain._tr_loss, 0
    writer, waiter = CheckpointWriter(ours, num_kept=1), CheckpointWriter(ours, num_kept=1)
    writer.attach()
    waiter._host.has_room = lambda pieces: False  # type: ignore[method-assign]

    def before(path: Path) -> Callable[[], Any]:
        plain._save_checkpoint(plain.model, None)
        mark_complete(path)
        return lambda: None

    def beside(path: Path) -> Callable[[], Any]:
        ours._save_checkpoint(ours.model, None)
        writer.write(path, None)
        return writer.wait

    beside.before_update = writer.before_update  # type: ignore[attr-defined]

    def waiting(path: Path) -> Callable[[], Any]:
        waiter.begin(path)
        waiter.take(path)
        waiter.write(path, None)
        waiter.wait()
        return lambda: None

    def by_torch(path: Path) -> Callable[[], Any]:
        from torch.distributed.checkpoint import async_save
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(ours.model, ours.optimizer)
        done: Any = async_save({"model": model, "optimizer": optimizer}, checkpoint_id=path)
        return done.result  # type: ignore[no-any-return]

    return {"before": (plain, before), "waiting": (ours, waiting), "beside": (ours, beside), "torch": (ours, by_torch)}


def measured(trainer: Trainer, start: Start, number: int) -> tuple[float, float, float]:
    """Stall, seconds until it is whole, cost: against steps just before."""
    step_seconds = plain_step_seconds(trainer)
    trainer.state.global_step = number
    path = Path(trainer.args.output_dir) / f"checkpoint-{number}"
    shutil.rmtree(path, ignore_errors=True)
    began = time.perf_counter()
    wait = start(path)
    stall, before_update = time.perf_counter() - began, getattr(start, "before_update", lambda: None)
    whole: list[float] = []

    def until_whole() -> None:
        wait()
        whole.append(time.perf_counter() - began)

    watch = threading.Thread(target=until_whole)
    watch.start()
    num_steps = 0
    while not whole:
        stall += step(trainer, before_update)
        num_steps += 1
    watch.join()
    cost = time.perf_counter() - began - num_steps * step_seconds
    shutil.rmtree(path)
    return stall, whole[0], cost


def plain_step_seconds(trainer: Trainer) -> float:
    step(trainer)
    times = []
    for _ in range(_NUM_PLAIN_STEPS):
        began = time.perf_counter()
        step(trainer)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: the temporary folder")
    parser.add_argument("--small", action="store_true", help="a model of two layers, to see that it runs")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("smoltulu").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        PartialState(cpu=True)
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        made = ways("small" if arguments.small else "135M", Path(folder) / "checkpoints")
        trainer = made["beside"][0]
        num_bytes = sum(weight.numel() * 4 for weight in trainer.model.parameters())
        step_seconds = plain_step_seconds(trainer)
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in made}
        for number in range(1, arguments.repeats + 2):
            for name, (its_trainer, start) in made.items():
                run = measured(its_trainer, start, number)
                if number > 1:  # the first touches new memory, and is told apart
                    runs[name].append(run)
                print(f"{name}, {number}: stall {run[0]:.2f} s, whole {run[1]:.2f} s, cost {run[2]:.2f} s", flush=True)
        torch.distributed.destroy_process_group()
    print(f"\nmodel {num_bytes / 1e6:.0f} MB, {torch.get_num_threads()} threads, step {step_seconds:.2f} s; medians\n")
    print("| way | stall, s | of `waiting` | until whole, s | cost, s |\n|---|---:|---:|---:|---:|")
    medians = {name: [statistics.median(column) for column in zip(*its, strict=True)] for name, its in runs.items()}
    for name, (stall, whole, cost) in medians.items():
        low, high = min(run[0] for run in runs[name]), max(run[0] for run in runs[name])
        share = stall / medians["waiting"][0]
        print(f"| {name} | {stall:.2f} ({low:.2f}–{high:.2f}) | {share:.0%} | {whole:.2f} | {cost:.2f} |")
    share = medians["beside"][0] / medians["waiting"][0]
    print(f"\nstall {share:.0%} of waiting; wanted: at most {GOAL:.0%}: {'met' if share <= GOAL else 'not met'}")


if __name__ == "__main__":
    main()
