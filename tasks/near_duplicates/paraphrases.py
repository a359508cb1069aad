"""Texts that mean nearly the same in other words: likeness of word vectors. Told, and never removed for.

The model is the one inside the wheel of wordllama (MIT): 32,000 token vectors of 256 numbers; a text is their mean. It
knows no order and no negation, and mostly English. Nothing is downloaded: the files are read where the wheel laid them,
as safetensors and JSON, and have to be those that results were made with.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FILES = {
    "weights/l2_supercat_256.safetensors": "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
    "tokenizers/l2_supercat_tokenizer_config.json": "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68",
}
#: Further tokens add little to a mean, and cost time.
_MAX_TOKENS = 512
_ROWS_AT_A_TIME, _OTHERS_AT_A_TIME = 2048, 16_384


@dataclass(frozen=True)
class Alike:
    """The most alike text of the other side: its number, and the cosine of the two vectors."""

    number: int
    other: int
    cosine: float


def check_model() -> str:
    """Name of the model, once its files are those that results were made with. ValueError where they are not."""
    _load()
    return "wordllama l2_supercat_256"


@cache
def _load() -> tuple[np.ndarray, Tokenizer]:
    """(32000, 256) float32, and the tokenizer."""
    found = find_spec("wordllama")
    if found is None or found.origin is None:
        raise ValueError(
            "near_duplicates.paraphrases: needs the package wordllama, which is not installed; install "
            "`smoltulu[paraphrases]`, or leave paraphrases out"
        )
    folder = Path(found.origin).parent
    for name, digest in _FILES.items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise ValueError(
                f"near_duplicates.paraphrases: {file} is not the model that this version was made with; install "
                "`smoltulu[paraphrases]` again"
            )
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    weights, tokens = (folder / name for name in _FILES)
    tokenizer = Tokenizer.from_file(str(tokens))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_MAX_TOKENS)
    return load_file(weights)["embedding.weight"].astype(np.float32), tokenizer


def embed(texts: Sequence[str]) -> np.ndarray:
    """Mean of the vectors of a text's tokens, at length 1; a text without tokens is zero.

    Returns: (N, 256) float32
    """
    vectors, tokenizer = _load()
    made = np.zeros((len(texts), vectors.shape[1]), np.float32)
    for number, encoded in enumerate(tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)):
        if encoded.ids:
            made[number] = vectors[encoded.ids].mean(axis=0)
    return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-9)


def most_alike(rows: np.ndarray, others: np.ndarray, threshold: float) -> Iterator[Alike]:
    """The most alike other text of every row that has one from `threshold` on; of equal ones the first.

    rows    (N, D) float32, at length 1
    others  (M, D) float16 or float32, at length 1
    """
    best = np.full(len(rows), -1.0, np.float32)
    number = np.zeros(len(rows), np.int64)
    for first in range(0, len(others), _OTHERS_AT_A_TIME):
        likeness = rows @ others[first : first + _OTHERS_AT_A_TIME].astype(np.float32).T
        here = likeness.argmax(axis=1)
        value = likeness[np.arange(len(rows)), here]
        better = value > best
        best[better], number[better] = value[better], here[better] + first
    for row in np.flatnonzero(best >= threshold):
        yield Alike(int(row), int(number[row]), min(float(best[row]), 1.0))


def batches(items: Iterator[Any], size: int = _ROWS_AT_A_TIME) -> Iterator[list[Any]]:
    """Lists of `size` items; the last one may be shorter."""
    from itertools import islice

    while batch := list(islice(items, size)):
        yield batch


def numbers_of(text: str) -> tuple[str, ...]:
    """The numbers of a text, sorted, without commas between thousands: two tasks with other numbers are two tasks."""
    return tuple(sorted(number.replace(",", "") for number in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)))
