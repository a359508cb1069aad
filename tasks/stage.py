"""A stage: a name, a version, three contracts, a function, and the traits that other modules read.

A stage knows neither store nor key nor Prefect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ValidationError

from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.common import artifact_paths, first_problem
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.preflight import PreflightOutputs
from smoltulu.schemas.training import SupervisedSettings, TrainingSettings

#: Folder of a stage's `work` for caches of its rows, marked complete like a checkpoint.
DATASETS_FOLDER = "datasets"
#: Exit status of a stage process that was asked to stop and did, its checkpoint written.
STOPPED = 143

BatchSetting = Literal["per_device_train_batch_size", "tokens_per_device", "per_device_eval_batch_size"]


class StageStopped(Exception):
    """The stage stopped on SIGTERM before it was done. A re-run resumes from what it wrote into `work`."""


class Diverged(ValueError):
    """The settings of a training led nowhere: loss, gradient or weights left all bounds. Of a sweep it is a result."""


class Report(Protocol):
    """Progress of a stage: shown to the user, never part of a result."""

    def __call__(self, step: int, num_steps: int, **metrics: float) -> None:
        """`step` of `num_steps` is done; metrics such as loss, reward, tokens_per_second."""


def part_of(report: Report, number: int, num_parts: int) -> Report:
    """Progress of one of several parts, told as progress of the whole."""

    def part(step: int, num_steps: int, **metrics: float) -> None:
        report(1000 * number + 1000 * step // (num_steps or 1), 1000 * num_parts, **metrics)

    return part


@dataclass(frozen=True)
class StageContext:
    """Where a stage function works, and how.

    folder     empty; what is in it when the function returns becomes the artifact
    work       survives failures: trainer checkpoints and logs, so that a re-run resumes
    compute    this stage's machinery (exceptions applied)
    report     progress callback; free to call often
    externals  name -> content digest, as the key has it, of what the stage reads from outside the store. What is read
               is compared with it: a file may have been edited since the key was made
    """

    folder: Path
    work: Path
    compute: ComputeSettings
    report: Report
    externals: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """`function(config, inputs, context)` writes files into `context.folder` and returns (outputs, metrics).

    Raise `version` when the meaning of the stage changes: it is part of every key. `ValueError` from the function
    is the user's to fix and is shown without a traceback.

    gate_failures(config, outputs, metrics)  which of today's thresholds a cached artifact fails. Thresholds are no part
                                             of the key
    build(config, inputs, context)           the trainer of a training, ready for its first step, from model, rows and
                                             template alone (`TrainingInputs`). A dry run trains it

    Some traits follow from the contracts: a stage whose config derives from `TrainingSettings` is a training, and one
    whose outputs are `ModelOutputs` makes a model. The others are fields:

    cells(job)         jobs of other stages that it is put together of, by name. Those that are missing are made in one
                       process; then `function` runs in the flow's own, with their folders as `inputs.cells`
    block              field of `Recipe` that asks for the stage, where the two names differ
    distributed        not a training, but runs in compute.num_processes processes
    eval_batch         not a training, but its memory grows with compute.per_device_eval_batch_size, which is halved
                       when memory runs out
    has_copies         a copy of its policy may write on compute.generation_device, a GPU beside those of its processes
    memory_advice      what to change when not even the smallest batch fits into memory
    flops(config)      FLOPs of a training per parameter and token: 2 forward, 4 backward (Kaplan et al., arXiv
                       2001.08361, section 2.1). Attention's own share, which grows with row length, is left out
    most_flops(config, num_rows)  FLOPs per parameter of a stage that is no training and has a model write, if every
                       answer is as long as allowed. num_rows: of its input `dataset`; None: unknown
    num_passes(config) passes of its input `model` over each token of `dataset`, for a stage that only has its rows
                       read; 0: it counts tokens alone
    keeps_rows         passes on nearly all rows of its input `dataset`
    kept_share(config) share of the rows of its input `dataset` that it passes on; None: not known before
    grows_with_model   takes longer the larger its input `model` is
    copies_model       its cost depends on the size of its input `model` only
    reencodes          the version before, where many of its rows are as today's: they are made again and compared
    same_externals     digest now -> digest before, of a text that was changed and means the same
                       (flows/planning/adoption.py takes finished work over by these two)
    """

    name: str
    version: int
    config: type[BaseModel]
    inputs: type[BaseModel]
    outputs: type[BaseModel]
    function: Callable[[Any, Any, StageContext], tuple[BaseModel, dict[str, float]]]
    gate_failures: Callable[[Any, Any, Mapping[str, float]], list[str]] | None = None
    build: Callable[[Any, Any, StageContext], Any] | None = None
    cells: Callable[[Any], Mapping[str, Any]] | None = None
    block: str | None = None
    distributed: bool = False
    eval_batch: bool = False
    has_copies: bool = False
    memory_advice: str | None = None
    flops: Callable[[Any], float] = lambda config: 6.0
    most_flops: Callable[[Any, int | None], float | None] | None = None
    num_passes: Callable[[Any], int] | None = None
    keeps_rows: bool = False
    kept_share: Callable[[Any], float | None] | None = None
    grows_with_model: bool = True
    copies_model: bool = False
    reencodes: int | None = None
    same_externals: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_training(self) -> bool:
        """Whether it takes optimizer steps, and so has an effective batch, checkpoints and a budget."""
        return issubclass(self.config, TrainingSettings)

    def makes(self, outputs: type[BaseModel]) -> bool:
        """Whether its artifacts are of this kind: `ModelOutputs`, `EvaluationOutputs`, ..."""
        return issubclass(self.outputs, outputs)

    def num_ranks(self, compute: ComputeSettings) -> int:
        """Number of processes that run it."""
        return compute.num_processes if self.is_training or self.distributed else 1

    @property
    def uses_device(self) -> bool:
        """Whether a model computes in it, on a GPU where there is one. The others read and write rows on CPUs."""
        runs_model = self.is_training or self.distributed or self.eval_batch or self.num_passes is not None
        return runs_model or self.makes(PreflightOutputs)  # its dry run

    def num_devices(self, compute: ComputeSettings) -> int:
        """Number of GPUs that it uses."""
        if not self.uses_device or compute.device == "cpu":
            return 0
        kind, _, number = (compute.generation_device or "").partition(":")
        # The copy's is named by its number among all.
        of_copy = int(number or 0) + 1 if self.has_copies and kind == "cuda" else 0
        return max(self.num_ranks(compute), of_copy)

    def halved_setting(self, compute: ComputeSettings) -> BatchSetting | None:
        """The setting that is halved when memory runs out: the batch setting, or a number of tokens in its place.

        A budget of tokens that is `auto` is made of the per-device batch, and so halved with it.
        """
        if issubclass(self.config, SupervisedSettings) and isinstance(compute.tokens_per_device, int):
            return "tokens_per_device"
        return self.batch_setting

    @property
    def batch_setting(self) -> BatchSetting | None:
        """The compute setting that its memory grows with; None where there is none."""
        if self.is_training:
            return "per_device_train_batch_size"
        return "per_device_eval_batch_size" if self.eval_batch else None

    def outputs_of(self, manifest: Manifest) -> BaseModel:
        """The outputs of an artifact. ValueError where they are not this stage's, or name what the artifact lacks."""
        try:
            outputs = self.outputs.model_validate(manifest.outputs)
        except ValidationError as error:
            raise ValueError(f"its outputs are refused: {first_problem(error)}") from None
        for field_name, path in artifact_paths(outputs):
            if path not in manifest.files and not any(name.startswith(f"{path}/") for name in manifest.files):
                raise ValueError(f"its outputs are refused: {field_name}: no file of it is called {path!r}")
        return outputs

    def gate_failures_of(self, manifest: Manifest, config: BaseModel) -> list[str]:
        """Which thresholds of `config` an artifact fails; none where another version wrote it."""
        if self.gate_failures is None:
            return []
        try:
            outputs = self.outputs.model_validate(manifest.outputs)
        except ValidationError:
            return []
        return self.gate_failures(config, outputs, manifest.metrics)
