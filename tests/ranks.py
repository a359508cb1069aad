"""Real trainings by several ranks over gloo: one set of ranks takes many of them, as a process group costs seconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.trainer_callback import CallbackHandler

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.engine.ranks import fork_ranks
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.even_rows import is_blank
from smoltulu.tasks.trainer.loop import save_and_check
from smoltulu.tasks.trainer.sharded import full_weights, put_weights
from smoltulu.tasks.training.rlvr import train_rlvr
from tests.small_runs import FUNCTIONS, MODULES


@dataclass(frozen=True)
class Case:
    """A training, and the machinery that it has on any number of ranks.

    only_saves  its model before any step
    attempt     a later one goes on in the folder of the first, which has another number of ranks
    fails_after steps of the whole training, so that a later attempt can go on
    """

    name: str
    stage: str
    config: Any
    inputs: Any
    compute: dict[str, Any] = field(default_factory=dict)
    only_saves: bool = False
    attempt: int | None = None
    fails_after: int | None = None

    def folder(self, root: Path, num_ranks: int) -> Path:
        if self.attempt is not None:
            return root / f"{self.name}-resumed"
        return root / f"{self.name}-{num_ranks}-{self.compute.get('parallel', 'ddp')}"


@dataclass(frozen=True)
class Ran:
    """What a training left."""

    folder: Path

    @property
    def history(self) -> list[dict[str, float]]:
        return self.log("history")

    def log(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "out" / "logs" / f"{name}.jsonl").open()]

    def weights(self, model: str = "model") -> dict[str, torch.Tensor]:
        return load_file(self.folder / "out" / model / "model.safetensors")

    @property
    def rows(self) -> dict[int, Counter[int]]:
        return rows_of_steps(self.folder)


def rows_of_steps(folder: Path) -> dict[int, Counter[int]]:
    """Rows of every step, of all ranks of the attempt that took it last; `rows-ATTEMPT-RANK.jsonl` have them."""
    found: dict[int, Counter[int]] = {}
    for attempt in sorted({int(file.name.split("-")[1]) for file in folder.glob("rows-*-*.jsonl")}):
        of_attempt: dict[int, Counter[int]] = defaultdict(Counter)
        for file in folder.glob(f"rows-{attempt}-*.jsonl"):
            for line in file.read_text().splitlines():
                step, rows = json.loads(line)
                of_attempt[step].update(rows)
        found |= of_attempt
    return found


def run_in_ranks(root: Path, num_ranks: int, cases: Sequence[Case], timeout_s: float = 300) -> dict[str, Ran]:
    """Run every case by so many ranks, one after the other. Their logs are in the message where one fails."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "trl.trainer.sft_trainer", "smoltulu.tasks.training.ppo_trainer"])
    process = server.Process(target=_run, args=(root, num_ranks, cases))
    process.start()
    process.join(timeout=timeout_s)
    if process.exitcode != 0:
        process.kill()
        logs = "\n".join(file.read_text()[-4000:] for file in sorted(root.glob(f"log-{num_ranks}-*")))
        raise AssertionError(f"ranks ended with {process.exitcode}:\n{logs}")
    return {case.name: Ran(case.folder(root, num_ranks)) for case in cases}


def _run(root: Path, num_ranks: int, cases: Sequence[Case]) -> None:
    """In a process of its own: fork the ranks, each of which takes all cases."""
    status = fork_ranks(num_ranks) if num_ranks > 1 else None
    if status is not None:
        os._exit(status)
    rank = int(os.environ.get("RANK", "0"))
    log = (root / f"log-{num_ranks}-{rank}").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        for case in cases:
            print(f"--- {case.name}", flush=True)
            with _failing_after(case.fails_after):
                _train(case, case.folder(root, num_ranks), num_ranks, rank)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


class _Failed(Exception):
    """What ends a training that is to be gone on with."""


@contextmanager
def _failing_after(num_steps: int | None) -> Iterator[None]:
    """A training fails at the beginning of the step behind so many, on all ranks."""
    if num_steps is None:
        yield
        return
    real = CallbackHandler.on_step_begin

    def on_step_begin(handler: Any, args: Any, state: Any, control: Any) -> Any:
        if state.global_step == num_steps:
            raise _Failed
        return real(handler, args, state, control)

    CallbackHandler.on_step_begin = on_step_begin  # type: ignore[method-assign]
    try:
        yield
        raise AssertionError(f"it did not fail after {num_steps} steps")
    except _Failed:
        pass
    finally:
        CallbackHandler.on_step_begin = real  # type: ignore[method-assign]


def _put_and_take_weights(model: Any) -> None:
    """Weights that are put into a model, whole, are those that it has then; at the end its own again."""
    own = {name: one.clone() for name, one in full_weights(model, is_main=True, trained_only=True).items()}
    for weights in ({name: 2 * value for name, value in own.items()}, own):
        put_weights(model, weights)
        found = full_weights(model, is_main=True, trained_only=True)
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)


def _train(case: Case, folder: Path, num_ranks: int, rank: int) -> None:
    for name in ("out", "work/checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    given = {"device": "cpu", "num_threads": 1, "logging_steps": 1, "save_steps": 1000 if case.attempt is None else 1}
    compute = ComputeSettings(**given | {"per_device_train_batch_size": 1, "num_processes": num_ranks} | case.compute)
    context = StageContext(folder / "out", folder / "work", compute, lambda *args, **kwargs: None)
    if case.only_saves:
        trainer = MODULES[case.stage].build(case.config, case.inputs, context)
        model = trainer.accelerator.unwrap_model(trainer.model)
        _put_and_take_weights(model)
        save_and_check(trainer, model, folder / "out" / "model", None)
        return
    if case.stage == "rlvr":
        train_rlvr(case.config, case.inputs, context)
        return
    with (folder / f"rows-{case.attempt or 0}-{rank}.jsonl").open("w") as rows:
        module: Any = MODULES[case.stage]
        train = module.train
        module.train = lambda trainer, *args, **kwargs: train(noting(trainer, rows.write), *args, **kwargs)
        try:
            FUNCTIONS[case.stage](case.config, case.inputs, context)
        finally:
            module.train = train


def noting(trainer: Any, write: Callable[[str], Any]) -> Any:
    """Have a trainer note the rows of each of its micro-batches."""
    loss_of_trainer = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_blank(inputs):
            write(json.dumps([trainer.state.global_step + 1, inputs["row"].tolist()]) + "\n")
        return loss_of_trainer(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    return trainer
