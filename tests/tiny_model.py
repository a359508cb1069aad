"""A two-layer Llama and its tokenizer, built in code: the smallest real model folder a stage can work on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.recipes import CHAT_TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"
PAD = "<pad>"
TULU_TEMPLATE = (CHAT_TEMPLATES / "tulu.jinja").read_text("utf-8")
REFUSED = "what a template refuses"
#: The same, but a conversation in which somebody says so is refused, as stricter templates do.
PICKY_TEMPLATE = (
    f"{{%- for turn in messages if turn['content'] == '{REFUSED}' -%}}{{{{ raise_exception('no') }}}}{{%- endfor -%}}\n"
    + TULU_TEMPLATE
)

_TEXTS = (
    "<|system|>\nYou are helpful.\n<|user|>\nTom has 12 apples and buys 7 more. How many apples has Tom?\n",
    "<|assistant|>\n12 + 7 = 19\n#### 19",
    "Write your answer in upper case and name exactly three animals: cat, dog, cow.",
    "What is 3 plus 5? The answer is 8. Which one is better, and why? Good morning, good night.",
)


def build_tokenizer(texts: Iterable[str] = _TEXTS, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE (every text can be encoded); bos = eos = `<|endoftext|>`, its own `<pad>`, the Tulu template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TULU_TEMPLATE
    return tokenizer


def build_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    num_hidden_layers: int = 2,
    hidden_size: int = 32,
    num_labels: int | None = None,
    max_position_embeddings: int = 256,
) -> Path:
    """Write a random Llama and its tokenizer into `folder` (safetensors, generation_config, chat_template.jinja).

    With `num_labels=1` it is a reward model (sequence classification) instead of a language model.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = build_tokenizer()
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        **ids,
        **({"num_labels": num_labels} if num_labels else {}),
    )
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(config) if num_labels else LlamaForCausalLM(config)
    if not num_labels:
        model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def build_tiny_experts(folder: Path) -> Path:
    """A random Mixtral: its experts have a loss of their own, and its head has weights of its own."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    made = build_tiny_model(folder)
    config = MixtralConfig.from_pretrained(
        made,
        intermediate_size=48,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=1,
        router_aux_loss_coef=1.0,
        tie_word_embeddings=False,
        sliding_window=None,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(made)
    return made
