"""Stage `base_model`: train a byte-level BPE tokenizer, make a small Llama, pre-train it briefly, save both.

The loop is plain on purpose: packed next-token prediction, AdamW, linear schedule, one process. Recipes that start from
a published base model do not use it.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.base_model import BaseModelConfig
from smoltulu.tasks.base_model.copying import PLANTED, start_copying
from smoltulu.tasks.models import mup
from smoltulu.tasks.stage import Report
from smoltulu.tasks.world.lookups import draw_copying_text

if TYPE_CHECKING:
    from transformers import GraniteForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
PAD = "<pad>"  # not the eos: a masked eos would never be learned

# The template's headers are plain text, not special tokens. As pieces of their own they become one BPE token each,
# which shortens every conversation. Their newline stays outside: lm-eval moves it from the prompt to the answer, and
# tokens must not depend on that. Digits stay single: arithmetic is learnable digit by digit.
_HEADERS = ("<|system|>", "<|user|>", "<|assistant|>")
#: Fewer tokens than a copying text has on average.
_COPYING_TEXT_TOKENS = 80
_MOST_COPYING_TEXTS = 100_000
_PIECES = r"<\|(?:system|user|assistant)\|>|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def build_base_model(config: BaseModelConfig, texts: Iterable[str], folder: Path, report: Report) -> dict[str, float]:
    """Build, pre-train and save a base model into `folder` (made if missing). Returns the metrics of its training.

    Args:
        texts: plain texts; at most `config.max_texts` of them are read, so a large stream is fine.

    Raises:
        ValueError: no text at all, or too little text for one training sequence.
    """
    import torch

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    sample = [text[: config.max_text_characters] for text in itertools.islice(texts, config.max_texts) if text.strip()]
    if not sample:
        raise ValueError("the base model got no text to learn from: give at least one non-empty text")

    tokenizer = train_tokenizer(sample, config)
    model = new_model(config, tokenizer)
    if config.texts != "given":
        start_copying(model, config.seed)
        setattr(model.config, PLANTED, True)  # in its config.json: whoever finds that it copies has to know
    learned = [*(sample if config.texts != "copying" else []), *_copying_texts(config)]
    metrics = _pretrain(model, tokenizer, learned, config, report)

    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)  # writes config.json, generation_config.json and model.safetensors
    tokenizer.save_pretrained(folder)
    return metrics


def train_tokenizer(texts: list[str], config: BaseModelConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `config.vocab_size` tokens; bos = eos, a separate pad, no chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # As many headers as texts, so that they are among the first merges whatever the data is.
    bpe.train_from_iterator(itertools.chain(texts, list(_HEADERS) * len(texts)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def new_model(config: BaseModelConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM | GraniteForCausalLM:
    """A Llama in float32 with random weights that follow from `config.seed`; with muP a Granite."""
    import torch
    from transformers import GenerationConfig, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **ids,
    }
    if config.mup is None:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        factors = mup.multipliers(config.mup, config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
        model = GraniteForCausalLM(GraniteConfig(**shape, **factors))
        mup.scale_initial_weights(model, config.mup.base_width)
    # Later stages call a completion truncated when it does not end in one of these ids.
    model.generation_config = GenerationConfig(**ids)
    return model


def _pretrain(
    model: LlamaForCausalLM | GraniteForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    config: BaseModelConfig,
    report: Report,
) -> dict[str, float]:
    """Next-token training in place. Metrics: tokens seen, and the mean loss of the last tenth of the steps."""
    import torch

    if config.num_steps == 0:
        return {"num_tokens": 0.0}
    sequences = _pack(tokenizer, texts, config)  # (num_sequences, sequence_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    if config.mup is not None:
        mup.scale_rates(optimizer, model, config.mup.base_width)
    warmup = max(1, config.num_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (config.num_steps - step) / max(1, config.num_steps - warmup)),
    )
    order = _endless_order(len(sequences), config.seed)
    losses: list[float] = []
    started = time.monotonic()
    tokens_per_step = config.effective_batch_size * config.sequence_length
    model.train()
    for step in range(1, config.num_steps + 1):
        batch = sequences[[next(order) for _ in range(config.effective_batch_size)]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 or step == config.num_steps:
            seconds = time.monotonic() - started
            report(step, config.num_steps, loss=losses[-1], tokens_per_second=step * tokens_per_step / seconds)
    model.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return {"num_tokens": float(config.num_steps * tokens_per_step), "loss": sum(tail) / len(tail)}


def _pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], config: BaseModelConfig) -> Any:
    """All texts, each closed by eos, cut into rows of `sequence_length` tokens; the rest of the last row is dropped."""
    import torch

    needed = config.num_steps * config.effective_batch_size * config.sequence_length
    shuffled = list(texts)
    random.Random(config.seed).shuffle(shuffled)
    stream: list[int] = []
    for start in range(0, len(shuffled), 1_000):
        for ids in tokenizer(shuffled[start : start + 1_000], add_special_tokens=False)["input_ids"]:
            stream.extend(ids)
            stream.append(tokenizer.eos_token_id)
        if len(stream) >= needed:  # the rest would never be read
            break
    rows = len(stream) // config.sequence_length
    if rows == 0:
        raise ValueError(
            f"the texts have only {len(stream)} tokens, less than one sequence of base_model.sequence_length "
            f"{config.sequence_length}: give more text or shorten the sequence"
        )
    return torch.tensor(stream[: rows * config.sequence_length]).view(rows, config.sequence_length)


def _copying_texts(config: BaseModelConfig) -> list[str]:
    """Texts of nothing but lookups and repetitions, enough that few are read twice; none where they are not asked for.

    A model of this size learns from the world's texts what comes next in the world, and copies nothing. The tokenizer
    is still that of the texts given: a selector model must have the one of the model whose rows it scores.
    """
    if config.texts == "given":
        return []
    rng = random.Random(f"copying {config.seed}")
    num_tokens = config.num_steps * config.effective_batch_size * config.sequence_length
    if config.texts == "both":
        num_tokens //= 2
    num_texts = min(_MOST_COPYING_TEXTS, 100 + num_tokens // _COPYING_TEXT_TOKENS)
    return [draw_copying_text(rng) for _ in range(num_texts)]


def _endless_order(count: int, seed: int) -> Iterator[int]:
    """Row numbers in a new random order each pass, without end."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(range(count), count)
