"""Log-probabilities of the reference model, computed once for all trainings on the same pairs.

The reference is the model that DPO starts from. Batches, head and precision are DPO's own, so that at DPO's first step
every log-ratio is zero but for rounding. Pairs are processed by length and stored in shards: a killed pass resumes
after its last whole shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.artifacts.checkpoints import mark_complete
from smoltulu.artifacts.files import made_from_folder, sync
from smoltulu.artifacts.keys import file_digest
from smoltulu.schemas.reference import ReferenceLogpsConfig, ReferenceLogpsInputs, ReferenceLogpsOutputs
from smoltulu.tasks.models.folders import (
    fit_embeddings,
    load_language_model,
    load_tokenizer,
    switch_dropout_off,
    use_bfloat16,
)
from smoltulu.tasks.models.processes import processes_of
from smoltulu.tasks.stage import DATASETS_FOLDER, Stage, StageContext
from smoltulu.tasks.trainer.loop import check_tokenisation, load_rows
from smoltulu.tasks.trainer.packed_attention import pack
from smoltulu.tasks.trainer.prepare import prepare_torch

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

#: Pairs of a shard. Not the batch size, which may differ after a resume.
SHARD_PAIRS = 512
_SHOWN_ROWS = 5


def run_reference_logps(
    config: ReferenceLogpsConfig, inputs: ReferenceLogpsInputs, context: StageContext
) -> tuple[ReferenceLogpsOutputs, dict[str, float]]:
    """`chosen` and `rejected` of every tokenised pair, in their order. ValueError names pairs that have none (NaN)."""
    prepare_torch(context)
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    from smoltulu.tasks.training.preference_batch import COLUMNS

    # Of N processes each takes every N-th shard.
    processes = processes_of(context)
    with processes.main_process_first():
        rows = load_rows(inputs.dataset, context, list(COLUMNS))
        shards = _shards_folder(inputs, context)
    order = _longest_first(rows)
    parts = [order[start : start + SHARD_PAIRS] for start in range(0, len(rows), SHARD_PAIRS)]
    files = [shards / f"{number:06d}.npy" for number in range(len(parts))]
    logps_of: Callable[[np.ndarray], np.ndarray] | None = None
    for number in range(processes.process_index, len(parts), processes.num_processes):
        if _read_shard(files[number], len(parts[number])) is None:
            logps_of = logps_of or _computation(rows, config, inputs, context, str(processes.device))
            _write_shard(files[number], logps_of(parts[number]))
        context.report(min((number + 1) * SHARD_PAIRS, len(rows)), len(rows))
    processes.wait_for_everyone()

    outputs = ReferenceLogpsOutputs(num_rows=len(rows))
    if not processes.is_main_process:
        return outputs, {}
    mark_complete(context.work / DATASETS_FOLDER)
    logps = np.empty((len(rows), 2), dtype=np.float32)
    for file, members in zip(files, parts, strict=True):
        logps[members] = np.load(file, allow_pickle=False)
    table = pa.table({"chosen": logps[:, 0], "rejected": logps[:, 1]})
    parquet.write_table(table, context.folder / outputs.file, compression="zstd")
    return outputs, {"logps/chosen": float(logps[:, 0].mean()), "logps/rejected": float(logps[:, 1].mean())}


def _computation(
    rows: Dataset, config: ReferenceLogpsConfig, inputs: ReferenceLogpsInputs, context: StageContext, device: str
) -> Callable[[np.ndarray], np.ndarray]:
    """The model, loaded, as a function: numbers of N rows -> chosen and rejected sums, (N, 2) float32."""
    import numpy as np
    import torch
    from accelerate.utils import send_to_device

    from smoltulu.tasks.training.preference_batch import PairCollator, completion_logps, give_fused_head

    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    check_tokenisation(inputs.dataset, tokenizer)
    collate = PairCollator(tokenizer.pad_token_id, context.compute.packing)
    model = load_language_model(Path(inputs.model))
    fit_embeddings(model, tokenizer)
    switch_dropout_off(model)  # it has none here, and packing refuses a model that would have some in training
    if context.compute.packing:
        pack(model)
    give_fused_head(model)
    model.to(device).eval()
    half, num_pairs = use_bfloat16(config.precision, context.compute), context.compute.per_device_eval_batch_size

    def logps_of(members: np.ndarray) -> np.ndarray:
        sums = []
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            for start in range(0, len(members), num_pairs):
                batch = collate([rows[int(number)] for number in members[start : start + num_pairs]])
                sides = completion_logps(model, send_to_device(batch, device))
                sums.append(torch.stack(sides, dim=1).float().cpu().numpy())
        made: np.ndarray = np.concatenate(sums)
        bad = members[~np.isfinite(made).all(axis=1)]
        if len(bad):
            shown = ", ".join(str(rows[int(number)]["row"]) for number in bad[:_SHOWN_ROWS])
            raise ValueError(
                f"the reference model gives no finite log-probability to {len(bad):,} pairs, of source rows {shown}"
                f"{', ...' if len(bad) > _SHOWN_ROWS else ''}; look at those rows, and at the model: where it answers "
                "nothing sensible at all, its training went wrong"
            )
        return made

    return logps_of


def _longest_first(rows: Dataset) -> np.ndarray:
    """Numbers of the rows, longest first: little padding, and a batch that does not fit into memory fails at once."""
    import numpy as np
    import pyarrow.compute as pc

    if not len(rows):
        return np.empty(0, dtype=np.int64)
    prompt, chosen, rejected = (
        pc.list_value_length(rows.data.column(name)).to_numpy() for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return np.argsort(-(prompt + np.maximum(chosen, rejected)), kind="stable")


def _shards_folder(inputs: ReferenceLogpsInputs, context: StageContext) -> Path:
    """The folder of the shards. Shards of another model or of other pairs are removed."""
    folder = context.work / "shards"
    sources = [Path(inputs.dataset), *sorted(Path(inputs.model).glob("*.safetensors"))]
    made_from = json.dumps([file_digest(file) for file in sources])
    return made_from_folder(folder, made_from)


def _read_shard(file: Path, num_pairs: int) -> np.ndarray | None:
    """A finished shard; None where the file is missing or damaged."""
    import numpy as np

    try:
        found: np.ndarray = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (num_pairs, 2) and found.dtype == np.float32 else None


def _write_shard(file: Path, logps: np.ndarray) -> None:
    import numpy as np

    temporary = file.with_suffix(".part")
    with temporary.open("wb") as stream:
        np.save(stream, logps, allow_pickle=False)
    sync(temporary)
    temporary.replace(file)


reference_logps = Stage(
    "reference_logps", 1, ReferenceLogpsConfig, ReferenceLogpsInputs, ReferenceLogpsOutputs, run_reference_logps,
    block="dpo", distributed=True, eval_batch=True,
)  # fmt: skip
