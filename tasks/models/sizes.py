"""Sizes of a model folder, from the headers of its safetensors alone: reads no weights, imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelSize:
    """What a model folder holds.

    num_parameters   tied weights, which safetensors hold once, count once
    other_bytes      configuration and tokenizer, which every checkpoint repeats
    num_matrices     tensors of two dimensions
    matrix_sides     the sum of both extents of all of them
    """

    num_parameters: int
    num_tensors: int = 0
    other_bytes: int = 0
    num_matrices: int = 0
    matrix_sides: int = 0


def model_size(folder: Path) -> ModelSize:
    """Size of a model folder. Where an index file names the shards, it decides which files count.

    Raises:
        ValueError: no weights, a shard that the index names is missing, or a file is torn.
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
    shapes = [shape for name in shards for shape in tensor_shapes(folder / name).values()]
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


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor of a safetensors file, from its header; ValueError where the file is torn."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}); copy the model again") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); copy the model again") from None
