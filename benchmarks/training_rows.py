"""Rows and models for `benchmarks/training.py`: a length mix, synthetic token ids, random weights."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

#: The SmolTulu SFT mix under SmolLM2's tokenizer: tokens a row, and the share of tokens with a loss.
MIX_MEAN, MIX_MEDIAN, SUPERVISED_SHARE = 517, 404, 0.85
_MIN_LENGTH = 16
#: Token ids 0 to 2 are special; bos = eos as in SmolLM2.
_EOS, _PAD, _UNK = "<|endoftext|>", "<pad>", "<unk>"
_FIRST_WORD = 3


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 8192

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_layer_parameters(self) -> int:
        """Of the linear layers inside the blocks: what a token is multiplied with, the output head left out."""
        d, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        return self.num_hidden_layers * (2 * d * d + 2 * d * kv + 3 * d * self.intermediate_size)

    @property
    def num_head_parameters(self) -> int:
        """Of the output head, which is also the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        return self.num_layer_parameters + self.num_head_parameters + norms


#: SmolLM2's two, from their config.json; `small` and `minute` are ours, for two CPU cores and for tests.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("1.7B", 2048, 8192, 24, 32, 32, 49_152, 130_000.0),
        Shape("135M", 576, 1536, 30, 9, 3, 49_152, 100_000.0),
        Shape("small", 192, 512, 3, 3, 1, 3072),
        Shape("minute", 32, 64, 2, 2, 1, 128),
    )
}


def lognormal(mean: float, median: float) -> tuple[float, float]:
    """(mu, sigma) of the log-normal with this mean and median: median = e^mu, mean = e^(mu + sigma^2 / 2)."""
    return math.log(median), math.sqrt(2 * math.log(mean / median))


def share_above(length: float, mean: float, median: float) -> float:
    """Share of the log-normal's mass above `length`."""
    mu, sigma = lognormal(mean, median)
    return 1 - NormalDist(mu, sigma).cdf(math.log(length))


def mixed_lengths(num_rows: int, mean: float, median: float, longest: int, seed: int) -> list[int]:
    """Lengths in tokens of the log-normal, in random order: evenly spaced quantiles, so that few rows have the mix."""
    normal = NormalDist(*lognormal(mean, median))
    lengths = [round(math.exp(normal.inv_cdf((i + 0.5) / num_rows))) for i in range(num_rows)]
    lengths = [min(max(length, _MIN_LENGTH), longest) for length in lengths]
    random.Random(seed).shuffle(lengths)
    return lengths


def padding_factor(lengths: Sequence[int], batch_size: int, longest: int, seed: int = 0) -> float:
    """Places computed per token where random batches are padded to their longest row, of rows cut to `longest`."""
    cut, draw = [min(length, longest) for length in lengths], random.Random(seed)
    computed = 0
    for _ in range(200):
        draw.shuffle(cut)
        computed += sum(batch_size * max(cut[i : i + batch_size]) for i in range(0, len(cut), batch_size))
    return computed / 200 / sum(cut)


def prompt_length(side: int, prompt_share: float) -> int:
    """Tokens of a pair's prompt, where it is `prompt_share` of prompt + chosen + rejected and a side has `side` tokens.

    p = s (2 side - p), so p = 2 s side / (1 + s). Computing the prompt once saves, of all tokens, a factor of 1 + s.
    """
    return round(2 * prompt_share * side / (1 + prompt_share))


def conversation_rows(lengths: Sequence[int], shape: Shape, seed: int = 0) -> list[dict[str, Any]]:
    """Tokenised rows of SFT: a prompt without loss, then an answer with it, closed by eos."""
    draw = random.Random(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = [*_words(draw, length - 1, shape), 0]
        num_prompt = round((1 - SUPERVISED_SHARE) * length)
        rows.append({"row": number, "input_ids": ids, "labels": [-100] * num_prompt + ids[num_prompt:]})
    return rows


def pair_rows(
    sides: Sequence[int], prompt_share: float, shape: Shape, spread: float, seed: int
) -> list[dict[str, Any]]:
    """Tokenised pairs. `sides`: tokens of prompt + chosen; the rejected completion is e^N(0, spread) times as long."""
    draw = random.Random(seed)
    rows = []
    for number, side in enumerate(sides):
        num_prompt = min(prompt_length(side, prompt_share), side - 2)
        num_chosen = side - num_prompt
        num_rejected = min(max(round(num_chosen * math.exp(draw.gauss(0, spread))), 2), max(sides) - num_prompt)
        chosen, rejected = ([*_words(draw, n - 1, shape), 0] for n in (num_chosen, num_rejected))
        row: dict[str, Any] = {"row": number, "prompt_ids": _words(draw, num_prompt, shape)}
        row |= {"prompt_mask": [0] * num_prompt, "chosen_ids": chosen, "chosen_mask": [1] * len(chosen)}
        rows.append(row | {"rejected_ids": rejected, "rejected_mask": [1] * len(rejected)})
    return rows


def num_tokens(rows: Sequence[dict[str, Any]], max_length: int) -> tuple[int, int]:
    """(tokens, tokens with a loss) of rows cut to `max_length` tokens a sequence; both sides of a pair."""
    total = trained = 0
    for row in rows:
        if "labels" in row:
            sides = [[label != -100 for label in row["labels"]]]
        else:
            sides = [row["prompt_mask"] + row[f"{side}_mask"] for side in ("chosen", "rejected")]
        for side in sides:
            total += len(side[:max_length])
            trained += sum(side[1:max_length])
    return total, trained


def write_rows(rows: Sequence[dict[str, Any]], file: Path) -> Path:
    """Parquet as the preflight writes it."""
    import pyarrow as pa
    from pyarrow import parquet

    names = [name for name in rows[0] if name != "row"]
    types = [pa.list_(pa.int8() if name.endswith("_mask") else pa.int32()) for name in names]
    schema = pa.schema([("row", pa.int64()), *zip(names, types, strict=True)])
    parquet.write_table(pa.Table.from_pylist(list(rows), schema), file)
    return file


def write_plain_rows(rows: Sequence[dict[str, Any]], stage: str, file: Path) -> Path:
    """The same rows as TRL takes them.

    Its DPO takes text only: the tokenizer has one word per token, so that both sides train on the same ids.
    """
    import pyarrow as pa
    from pyarrow import parquet

    sides = ("chosen", "rejected")
    if stage == "sft":
        made = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    elif stage == "reward_model":
        made = [{f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in sides} for row in rows]
    else:
        made = [
            {"prompt": _text(row["prompt_ids"])} | {side: " " + _text(row[f"{side}_ids"]) for side in sides}
            for row in rows
        ]
    parquet.write_table(pa.Table.from_pylist(made), file)
    return file


def prompt_in_each_answer(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same pairs with nothing to share: all of the prompt but its first token is part of either completion."""
    apart = []
    for row in rows:
        new = {"row": row["row"], "prompt_ids": row["prompt_ids"][:1], "prompt_mask": row["prompt_mask"][:1]}
        for side in ("chosen", "rejected"):
            new[f"{side}_ids"] = row["prompt_ids"][1:] + row[f"{side}_ids"]
            new[f"{side}_mask"] = row["prompt_mask"][1:] + row[f"{side}_mask"]
        apart.append(new)
    return apart


def write_model(shape: Shape, folder: Path, device: str = "cpu") -> None:
    """A Llama of that shape with random weights in float32, and a tokenizer with one word per token id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    words = Tokenizer(models.WordLevel({_word(token): token for token in range(shape.vocab_size)}, unk_token=_UNK))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=_EOS, eos_token=_EOS, pad_token=_PAD, unk_token=_UNK,
        model_max_length=shape.max_position_embeddings,
    )  # fmt: skip
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    sizes = {name: value for name, value in asdict(shape).items() if name not in ("name", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, rope_parameters=rope, **ids)
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    assert model.num_parameters() == shape.num_parameters
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # the training gets the whole card
    tokenizer.save_pretrained(folder)


def _words(draw: random.Random, count: int, shape: Shape) -> list[int]:
    return draw.choices(range(_FIRST_WORD, shape.vocab_size), k=count)


def _text(tokens: Sequence[int]) -> str:
    return " ".join(_word(token) for token in tokens)


def _word(token: int) -> str:
    return (_EOS, _PAD, _UNK)[token] if token < _FIRST_WORD else f"w{token}"
