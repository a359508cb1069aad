"""Sizes of a model folder, from the headers of its safetensors alone: reads no weights, imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_SHOWN_CHARACTERS = 120


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
    """Size of a model folder.

    Raises:
        ValueError: no weights, a shard that the index names is missing, or a file is torn.
    """
    shapes = [shape for file in weight_files(folder) for shape in tensor_shapes(file).values()]
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


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a model folder, as transformers finds them: one file, or those of the index.

    Raises:
        ValueError: there is neither, the index is none or names files that are not there, or file and index disagree.
    """
    whole, index = folder / WEIGHTS, folder / WEIGHTS_INDEX
    if not index.exists():
        if whole.exists():
            return [whole]
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ValueError(
            f"{folder} has no {WEIGHTS} and no {WEIGHTS_INDEX}"
            + (f", only {', '.join(others[:3])}, which no index names" if others else "")
            + "; save the model with model.save_pretrained"
        )
    named = named_shards(index)
    absent = [name for name in named if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{index} names files that are not in the folder: {shown(absent)}; copy the model again")
    if whole.exists() and named != [WEIGHTS]:
        raise ValueError(
            f"{folder} holds {WEIGHTS}, and an index that names {shown(named)}: programs differ in which they "
            "load; remove what is not the model"
        )
    return [folder / name for name in named]


def named_shards(index: Path) -> list[str]:
    """Names of the files that an index of shards names. ValueError where it is none, or names what lies elsewhere."""
    try:
        named = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of shards ({error}); save the model again") from None
    if not named:
        raise ValueError(f"{index} names no file; copy the model again")
    if elsewhere := [name for name in named if Path(name).name != name]:
        raise ValueError(f"{index} names files that are not in the folder: {shown(elsewhere)}; copy the model again")
    return named


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor of a safetensors file; ValueError where the file is torn."""
    return {name: shape for name, (_, shape) in tensor_headers(file).items()}


def tensor_headers(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> dtype and shape of every tensor of a safetensors file, from its header; ValueError where it is torn."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}); copy the model again") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); copy the model again") from None


def shown(names: Sequence[str], count: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    texts = (name[:_SHOWN_CHARACTERS] for name in names[:count])
    return ", ".join("".join(letter if letter.isprintable() else "?" for letter in text) for text in texts) + more


def kv_bytes(config: Mapping[str, Any], num_sequences: int, num_tokens: int, bytes_per_value: int) -> int:
    """Bytes of keys and values of equally long sequences, generated at once. `config`: the model's config.json."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return num_sequences * num_tokens * int(config["num_hidden_layers"]) * 2 * kv_heads * head_dim * bytes_per_value
