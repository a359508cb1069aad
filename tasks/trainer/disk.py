"""Disk that a training stage needs while it runs, from the sizes of its model and rows. Pure but for the rows' footer.

A checkpoint holds, for N parameters (weights are float32 in both precisions, see `load_language_model`):

    4 N   weights, float32
    8 N   Adam's two moments, float32
    + about 600 bytes a tensor (names, shapes and places, thrice), and 12 kB of schedule, marker and trainer state

At its peak `work/` holds the kept checkpoints, the one being written (old ones are removed only after the new one is
whole) and the Arrow copy of the rows. At the end the finished model (4 N) is written instead of a checkpoint. With
LoRA a checkpoint holds the adapter's N parameters, and the finished model lies beside the adapter. PPO's critic is a
second model of N parameters: in every checkpoint with its own moments, and beside the finished model. Where the weights
of the best held-out accuracy are kept, they lie there twice at most: those that the newest checkpoint names, and newer.
"""

from __future__ import annotations

from pathlib import Path

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.training import TrainingSettings
from smoltulu.tasks.models.sizes import ModelSize, adapter_size, model_size

_BYTES_PER_PARAMETER = 4
_MOMENTS_BYTES_PER_PARAMETER = 8
_BYTES_PER_TENSOR = 600
_STATE_BYTES = 12_000

#: In the Arrow copy of tokenised rows: input_ids and labels, or ids and mask; of a pair no token takes more.
BYTES_PER_TOKEN = 8
#: Arrow copy of rows of text as a multiple of their compressed file, which is a fourth of them or less: of RLVR's
#: prompts; of other rows, at four bytes of text a token, what their tokens will take (8 / 4).
TEXT_FACTOR = 8


def num_checkpoints_kept(compute: ComputeSettings, is_extendable: bool) -> int:
    """Checkpoints kept beside the one being written: the newest few, the best, and the one for larger budgets."""
    return compute.save_total_limit + 1 + (is_extendable and compute.keep_extension_checkpoint)


def checkpoint_bytes(size: ModelSize) -> int:
    """One trainer checkpoint: weights, Adam's two moments, and the small files (see the top of this module)."""
    large = size.num_parameters * (_BYTES_PER_PARAMETER + _MOMENTS_BYTES_PER_PARAMETER)
    return large + size.num_tensors * _BYTES_PER_TENSOR + _STATE_BYTES


def model_bytes(size: ModelSize) -> int:
    """The finished model, which stays."""
    return size.num_parameters * _BYTES_PER_PARAMETER + size.other_bytes


def cache_bytes(rows: Path) -> int:
    """The Arrow copy of a rows file that a training makes, from the file's footer: exact for tokenised rows."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(rows)
    widths = {"row": 8, **{f"{side}_mask": 1 for side in ("prompt", "chosen", "rejected")}}
    return sum(
        # Of text its bytes, and four for each length, as in Arrow.
        column.total_uncompressed_size
        if column.physical_type == "BYTE_ARRAY"
        else column.num_values * widths.get(column.path_in_schema.partition(".")[0], 4)
        for group in range(metadata.num_row_groups)
        for column in map(metadata.row_group(group).column, range(metadata.num_columns))
    )


def training_bytes(
    size: ModelSize,
    rows_cache_bytes: int,
    num_checkpoints: int,
    adapter: ModelSize | None = None,
    has_critic: bool = False,
    keeps_best: bool = False,
) -> int:
    """The most bytes that a training stage has on disk at any time. `size`: of the model that it starts from.

    rows_cache_bytes  Arrow copy of its rows, see `cache_bytes`
    num_checkpoints   kept beside the one being written, see `num_checkpoints_kept`
    adapter           where only an adapter is trained
    has_critic        where a critic of the same size is trained beside it
    keeps_best        where the best weights are kept beside the checkpoints, at most one for each and one more
    """
    checkpoint = checkpoint_bytes(adapter or size) + (checkpoint_bytes(size) if has_critic else 0)
    at_the_end = model_bytes(size) * (1 + has_critic) + (model_bytes(adapter) if adapter else 0)
    trained = _BYTES_PER_PARAMETER * ((adapter or size).num_parameters + has_critic * size.num_parameters)
    best = num_checkpoints * trained if keeps_best else 0
    return rows_cache_bytes + num_checkpoints * checkpoint + max(checkpoint, at_the_end) + best


def disk_of_training(settings: TrainingSettings, model: Path, rows: Path, compute: ComputeSettings) -> int:
    """`training_bytes` from the model's folder and the rows file: what a preflight says and what a start checks."""
    size, lora = model_size(model), getattr(settings, "lora", None)
    adapter = adapter_size(size, lora.r) if lora else None
    kept = num_checkpoints_kept(compute, settings.is_extendable)
    return training_bytes(size, cache_bytes(rows), kept, adapter, settings.trains_critic, settings.keeps_best)
