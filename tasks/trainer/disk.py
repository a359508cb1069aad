"""Disk that a training stage needs while it runs, computed from its model and rows. Pure but for reading headers.

A checkpoint holds, for N parameters (weights are float32 in both precisions, see `load_language_model`):

    4 N   weights, float32
    8 N   Adam's two moments, float32
    + about 1 kB a tensor (names and shapes, thrice), the tokenizer's files, and 30 kB of random state, scheduler,
      arguments and trainer state

At its peak `work/` holds the checkpoints that are kept and the one being written, since old ones go only after the new
one is whole, and the Arrow copy of the rows. The finished model (4 N) takes the place of the checkpoint in writing.
With LoRA, N is the adapter's parameters in a checkpoint, and the model's in the finished one beside the adapter.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

_BYTES_PER_PARAMETER = 4
_MOMENTS_BYTES_PER_PARAMETER = 8
_BYTES_PER_TENSOR = 1_000
_STATE_BYTES = 30_000
_MAX_HEADER_BYTES = 100_000_000

#: In the Arrow copy of tokenised rows: input_ids and labels, or ids and mask; of a pair no token takes more.
BYTES_PER_TOKEN = 8
#: Arrow copy of rows of text as a multiple of their compressed file, which is a fourth of them or less: of RLVR's
#: prompts; of other rows, at four bytes of text a token, what their tokens will take (8 / 4).
TEXT_FACTOR = 8


@dataclass(frozen=True)
class ModelSize:
    """What a model folder holds.

    other_bytes   configuration and tokenizer, which every checkpoint repeats
    num_matrices  tensors of two dimensions, and matrix_sides the sum of both extents of all of them
    """

    num_parameters: int
    num_tensors: int = 0
    other_bytes: int = 0
    num_matrices: int = 0
    matrix_sides: int = 0


def num_parameters(folder: Path) -> int:
    """Parameters of a model folder; tied weights, which safetensors hold once, count once. Errors: as `model_size`."""
    return model_size(folder).num_parameters


def model_size(folder: Path) -> ModelSize:
    """Size of a model folder, from the headers of its *.safetensors alone.

    Where an index file names the shards, it decides which files count.

    Raises:
        ValueError: no weights, a shard that the index names is missing, or a header is not one.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of shards ({error}); save the model again") from None
    else:
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{folder} has no *.safetensors weights")
    shapes = [shape for name in shards for shape in _shapes(folder / name)]
    other = (path for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors")
    matrices = [shape for shape in shapes if len(shape) == 2]
    return ModelSize(
        num_parameters=sum(map(math.prod, shapes)),
        num_tensors=len(shapes),
        other_bytes=sum(path.stat().st_size for path in other),
        num_matrices=len(matrices),
        matrix_sides=sum(map(sum, matrices)),
    )


def adapter_size(size: ModelSize, r: int) -> ModelSize:
    """A LoRA adapter of rank `r`: r (in + out) values beside a matrix. At most: embeddings and head have none."""
    return ModelSize(r * size.matrix_sides, 2 * size.num_matrices, size.other_bytes)


def checkpoint_bytes(size: ModelSize) -> int:
    """One trainer checkpoint: weights, Adam's two moments, and what is small (see the module's text)."""
    large = size.num_parameters * (_BYTES_PER_PARAMETER + _MOMENTS_BYTES_PER_PARAMETER)
    return large + size.num_tensors * _BYTES_PER_TENSOR + size.other_bytes + _STATE_BYTES


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
    size: ModelSize, rows_cache_bytes: int, num_checkpoints_kept: int, adapter: ModelSize | None = None
) -> int:
    """Most that a training stage has on disk at any time.

    Args:
        size: of the model that it starts from.
        rows_cache_bytes: Arrow copy of its rows, see `cache_bytes`.
        num_checkpoints_kept: checkpoints that stay beside the one being written.
        adapter: where it alone is trained.
    """
    checkpoint = checkpoint_bytes(adapter or size)
    at_the_end = model_bytes(size) + (model_bytes(adapter) if adapter else 0)
    return rows_cache_bytes + num_checkpoints_kept * checkpoint + max(checkpoint, at_the_end)


def _shapes(file: Path) -> list[tuple[int, ...]]:
    """Shape of every tensor of a safetensors file."""
    try:
        with file.open("rb") as stream:
            head = stream.read(8)
            (length,) = struct.unpack("<Q", head) if len(head) == 8 else (0,)
            if not 2 <= length <= min(file.stat().st_size, _MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file, or none")
            header = json.loads(stream.read(length))
        return [tuple(map(int, tensor["shape"])) for name, tensor in header.items() if name != "__metadata__"]
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); copy the model again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); copy the model again") from None
