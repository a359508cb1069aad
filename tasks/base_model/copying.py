"""A model that is to copy starts as one that does, a little: weights of two layers, written by hand.

From random weights a model of this size does not come to copy within ten minutes of one core. So it starts with the
circuit that such a model ends with (Olsson et al. 2022, In-context learning and induction heads). A head of layer 0
looks k tokens back and writes down what it sees, one head for each k. A head of layer 1 looks for a place where the
token k + 1 back is the one that is k back here, and copies the token of that place. Several of them agree on what
followed the same few tokens before. Training changes all of it as it likes. The model's config says that its copying
is planted.

The hidden state has a constant, then blocks of `head_dim`: the token, the tokens 1, 2, ... back, what is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

#: What the config of such a model has beside its shape.
PLANTED = "smoltulu_planted_copying"
#: Pairs of a head's dimensions that tell distances: with rope_theta 1e8 the others rotate too slowly to matter.
_FAST_PAIRS = 3
_SHARP_PLACE, _SHARP_TOKEN, _LOUD = 120.0, 60.0, 8.0


def start_copying(model: LlamaForCausalLM, seed: int) -> int:
    """Write the circuit into a model with random weights. Returns how many tokens back it looks.

    The model has room for it: `BaseModelConfig` refuses settings that leave none.
    """
    import torch

    config: Any = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    half, num_back = head_dim // 2, min(config.num_attention_heads, (config.hidden_size - 1) // head_dim - 2)
    theta = config.rope_parameters["rope_theta"]
    assert num_back >= 3 and half > _FAST_PAIRS and not config.tie_word_embeddings, "schemas/base_model.py allows none"
    generator = torch.Generator().manual_seed(seed)
    same = torch.eye(head_dim)
    # Tokens are compared in the dimensions that hardly rotate. So a token's code has no others.
    kept = [pair + part for part in (0, half) for pair in range(_FAST_PAIRS, half)]
    codes = torch.zeros(config.vocab_size, head_dim)
    codes[:, kept] = torch.randn(config.vocab_size, len(kept), generator=generator)
    codes = torch.nn.functional.normalize(codes, dim=-1)
    norm = [(2.0 / config.hidden_size) ** 0.5, ((2.0 + num_back) / config.hidden_size) ** 0.5]

    def block(number: int) -> slice:
        return slice(1 + number * head_dim, 1 + (number + 1) * head_dim)

    def head(number: int) -> slice:
        return slice(number * head_dim, (number + 1) * head_dim)

    copied = block(1 + num_back)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[:, block(0)] = codes
        model.lm_head.weight[:, copied] = _LOUD * codes
        for number in range(num_back):
            attention: Any = model.model.layers[0].self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight[head(number)] = 0
            attention.o_proj.weight[:, head(number)] = 0
            # Query and key are constant; turned by the rotation, they agree best `number + 1` tokens apart.
            size = (_SHARP_PLACE * head_dim**0.5 / _FAST_PAIRS) ** 0.5 * norm[0]
            for pair in range(_FAST_PAIRS):
                angle = torch.tensor((number + 1) * theta ** (-pair / half))
                attention.k_proj.weight[number * head_dim + pair, 0] = size
                attention.q_proj.weight[number * head_dim + pair, 0] = size * float(angle.cos())
                attention.q_proj.weight[number * head_dim + pair + half, 0] = -size * float(angle.sin())
            attention.v_proj.weight[head(number), block(0)] = norm[0] * same
            attention.o_proj.weight[block(1 + number), head(number)] = same

            attention = model.model.layers[1].self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight[head(number)] = 0
            attention.o_proj.weight[:, head(number)] = 0
            size = (_SHARP_TOKEN * head_dim**0.5) ** 0.5 * norm[1]
            attention.q_proj.weight[head(number), block(number)] = size * same
            attention.k_proj.weight[head(number), block(number + 1)] = size * same
            attention.v_proj.weight[head(number), block(0)] = norm[1] * same
            attention.o_proj.weight[copied, head(number)] = same
    return num_back
