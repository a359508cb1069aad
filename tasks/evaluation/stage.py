"""Stage `evaluation`: all measurements of a model. Each is a cell (cell.py); here they are put together."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from smoltulu.artifacts.keys import records_digest, text_digest
from smoltulu.artifacts.layout import MANIFEST
from smoltulu.artifacts.store import read_manifest
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSource
from smoltulu.schemas.evaluation import (
    EvaluationCellConfig,
    EvaluationCellOutputs,
    EvaluationInputs,
    EvaluationOutputs,
    EvaluationSettings,
    EvaluationStageConfig,
    Score,
)
from smoltulu.tasks.evaluation.cell import RESULTS_FILE, TASK_VERSION, evaluation_cell, measure_cell
from smoltulu.tasks.evaluation.lm_eval import harness_name
from smoltulu.tasks.evaluation.samples import SAMPLES_FILE, join_samples
from smoltulu.tasks.job import Job
from smoltulu.tasks.stage import Stage, StageContext, part_of

#: Where a GPU shows itself before torch is imported.
_GPU_FILES = ("/proc/driver/nvidia/gpus", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")


def evaluate(
    config: EvaluationStageConfig, inputs: EvaluationInputs, context: StageContext
) -> tuple[EvaluationOutputs, dict[str, float]]:
    """Measure a model: lm-eval tasks and sampled accuracy, or pair accuracy and benchmarks of a reward (model).

    `inputs.cells` are the measurements, finished; without them all are made here and now, in this process.

    Raises:
        ValueError: nothing to measure; a cell that cannot be read; as `measure_cell`, where they are made here.
    """
    folders = inputs.cells
    if folders is None:
        folders = dict(_made_here(config, inputs, context))
    scores: list[Score] = []
    parts: list[tuple[Path, int | None]] = []
    raw: dict[str, Any] = {}
    for folder in map(Path, folders.values()):
        outputs = _outputs_of(folder)
        results = json.loads((folder / outputs.results_file).read_text(encoding="utf-8"))
        # A task may be asked for twice, with other shots or metrics, and be a member of a group as well.
        parts.append((folder / outputs.samples_file, len(scores) if results else None))
        scores += outputs.scores
        raw |= results
    join_samples(context.folder / SAMPLES_FILE, parts)
    document = {"subject": config.subject, "kind": config.kind, "scores": [score.model_dump() for score in scores]}
    text = json.dumps({**document, "lm_eval": raw}, indent=1, ensure_ascii=False, default=str)
    (context.folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
    made = EvaluationOutputs(
        subject=config.subject, scores=tuple(scores), samples_file=SAMPLES_FILE, results_file=RESULTS_FILE
    )
    return made, {f"{score.task}/{score.metric}": score.value for score in scores}


def _made_here(
    config: EvaluationStageConfig, inputs: EvaluationInputs, context: StageContext
) -> Iterator[tuple[str, str]]:
    cells = cell_configs(config, context.compute, has_pairs=inputs.preference_eval is not None)
    for number, (name, cell) in enumerate(cells.items()):
        work = context.work / "cells" / str(number)
        folder = work / "output"
        folder.mkdir(parents=True, exist_ok=True)
        report = part_of(context.report, number, len(cells))
        outputs, _ = measure_cell(cell, inputs, replace(context, folder=folder, work=work, report=report))
        (folder / "outputs.json").write_text(outputs.model_dump_json())
        yield name, str(folder)


def _outputs_of(folder: Path) -> EvaluationCellOutputs:
    if (folder / MANIFEST).exists():
        return EvaluationCellOutputs.model_validate(read_manifest(folder).outputs)
    return EvaluationCellOutputs.model_validate_json((folder / "outputs.json").read_text())


def cell_configs(
    config: EvaluationStageConfig, compute: ComputeSettings, *, has_pairs: bool
) -> dict[str, EvaluationCellConfig]:
    """Name -> what is measured, in the order of the scores. A name that comes again has a number.

    Raises:
        ValueError: nothing to measure.
    """
    settings = config.settings
    dtype = dtype_of(settings, compute)
    ours = {
        "kind": config.kind, "max_length": settings.max_length, "dtype": dtype, "precision": settings.precision,
        "harness": f"smoltulu {TASK_VERSION}",
    }  # fmt: skip
    cells: list[EvaluationCellConfig] = []
    if config.kind == "language_model":
        of_task = {
            "seed": settings.seed,
            "apply_chat_template": settings.apply_chat_template,
            "harness": harness_name() if settings.tasks else "",
        }
        cells += [EvaluationCellConfig(**{**ours, **of_task, "task": task}) for task in settings.tasks]
        if settings.sampled is not None:
            cells.append(EvaluationCellConfig(**ours, sampled=settings.sampled))
        if not cells:
            raise ValueError("nothing to evaluate: give evaluation.tasks or evaluation.sampled")
    elif config.kind == "reward_model":
        if has_pairs:
            cells.append(EvaluationCellConfig(**ours))
        cells += [EvaluationCellConfig(**ours, benchmark=one) for one in settings.reward_benchmarks or ()]
        if not cells:
            raise ValueError(
                "nothing to evaluate a reward model on: set data.preference_eval, or evaluation.reward_benchmarks"
            )
    else:
        cells.append(EvaluationCellConfig(**ours))
    named: dict[str, EvaluationCellConfig] = {}
    seen: Counter[str] = Counter()
    for cell in cells:
        seen[cell.name] += 1
        named[cell.name if seen[cell.name] == 1 else f"{cell.name}-{seen[cell.name]}"] = cell
    return named


def dtype_of(settings: EvaluationSettings, compute: ComputeSettings) -> str:
    """Type of the weights as this machine measures them. Looks for a GPU without torch; the measurement checks it."""
    if settings.precision == "float32" or compute.device == "cpu":
        return "float32"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "float32"
    return "bfloat16" if any(map(os.path.exists, _GPU_FILES)) else "float32"


def cells_of(job: Job) -> dict[str, Job]:
    """Name -> the job of each measurement that an evaluation is put together of. Imports no torch.

    A cell names its model, rows and files by their content, not by the artifacts that hold them: two recipes with the
    same weights share it.

    Raises:
        ValueError: nothing to measure.
        OSError: the manifest of an input cannot be read.
    """
    config, inputs = job.config, job.inputs
    assert isinstance(config, EvaluationStageConfig) and isinstance(inputs, EvaluationInputs)
    cells = cell_configs(config, job.compute, has_pairs=inputs.preference_eval is not None)
    return {name: _cell_job(name, cell, job, inputs) for name, cell in cells.items()}


def _cell_job(name: str, cell: EvaluationCellConfig, job: Job, inputs: EvaluationInputs) -> Job:
    sources = _sources(cell)
    if cell.task is not None:
        read = []
    elif cell.sampled is not None:
        read = ["verified_eval"]
    elif cell.kind == "implicit_reward":
        read = ["preference_eval", "reference_model"]
    else:
        read = [] if cell.benchmark is not None else ["preference_eval"]
    if any(source.generated for source in sources):
        read.append("world")
    externals = {"model": content_digest(Path(inputs.model)), "chat_template": text_digest(inputs.chat_template)}
    for binding in read:
        if (path := getattr(inputs, binding)) is None:
            raise ValueError(f"{job.node}: {name} needs {binding}, which the recipe does not give")
        if binding != "world":
            externals[binding] = content_digest(Path(path))
    for source in sources:
        if source.generated is not None:
            assert inputs.world is not None
            externals[f"world/{source.generated}"] = content_digest(Path(inputs.world) / source.generated)
    prefix = f"{cell.name}."
    externals |= {key: digest for key, digest in job.spec.externals.items() if key.startswith(prefix)}
    needed = {"model", *read}
    return Job(
        node=f"{job.node}/{name}",
        stage=evaluation_cell,
        config=cell,
        compute=job.compute,
        spec=Spec(
            stage=evaluation_cell.name,
            version=evaluation_cell.version,
            config=scientific(cell),
            inputs={},
            externals=externals,
        ),
        inputs=inputs,
        input_records={binding: record for binding, record in job.input_records.items() if binding in needed},
        refresh=job.refresh,
    )


def _sources(cell: EvaluationCellConfig) -> list[DataSource]:
    if cell.task is not None:
        return list(cell.task.files.values())
    return list(cell.benchmark.sources) if cell.benchmark is not None else []


def content_digest(path: Path) -> str:
    """Digest of a file or folder of an artifact, from the records of its manifest: no byte is read.

    Raises:
        ValueError: it lies in no artifact.
    """
    for root in (path, *path.parents):
        if (root / MANIFEST).is_file():
            prefix = path.relative_to(root).as_posix()
            files = read_manifest(root).files
            if prefix in files:
                return files[prefix].blake3
            below = "" if prefix == "." else f"{prefix}/"
            return records_digest({n.removeprefix(below): one for n, one in files.items() if n.startswith(below)})
    raise ValueError(f"{path} lies in no artifact of a store")


evaluation = Stage(
    name="evaluation",
    # Rises with that of its cells: one that is there already would never ask for them.
    version=1 + evaluation_cell.version,
    config=EvaluationStageConfig,
    inputs=EvaluationInputs,
    outputs=EvaluationOutputs,
    function=evaluate,
    cells=cells_of,
    eval_batch=True,
)
