"""Masked heads: equal to explicit weights 1/(i + 1), reversible, and refused where they would be something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from smoltulu.tasks.selection.attention import attend_with_heads, attention_modules
from smoltulu.tasks.selection.masking import check_heads, lowest_layer, masked, plain_and_masked, reference_checkpoint
from smoltulu.tasks.trainer.packed_attention import pack, segments_of_lengths

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that attention is far from uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MULTIPLIERS = {"attention_multiplier": 0.4, "embedding_multiplier": 3.0, "residual_multiplier": 0.6}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, all heads": ("Llama", {"num_key_value_heads": 4}),
    "Llama, grouped heads": ("Llama", {"num_key_value_heads": 2, "attention_bias": True}),
    "Qwen2, biased queries": ("Qwen2", {"num_key_value_heads": 1}),
    "Qwen3, normed queries": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "Granite, own scaling": ("Granite", {"num_key_value_heads": 2, **MULTIPLIERS}),
}
HEADS = [(1, 0), (1, 3), (2, 2)]
IDS = torch.tensor([[5, 9, 11, 9, 5, 33, 7, 9], [40, 2, 17, 40, 2, 8, 9, 3]])


def small(family: str, **settings: Any) -> PreTrainedModel:
    name, own = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | own | settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # zero as they are made
            torch.nn.init.normal_(parameter, std=config.initializer_range)
    return model


def padded(side: str) -> dict[str, torch.Tensor]:
    """IDS with three tokens of padding in the first row and one in the second."""
    ids, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
    for row, pads in ((0, 3), (1, 5)):
        place = slice(pads, 11) if side == "left" else slice(0, 11 - pads)
        ids[row, place], mask[row, place] = IDS[row, : 11 - pads], 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@contextmanager
def explicit(model: PreTrainedModel, heads: list[tuple[int, int]]) -> Iterator[list[torch.Tensor]]:
    """The truth: softmax written out, and weights of `heads` replaced by one over the number of visible positions."""
    seen: list[torch.Tensor] = []

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1).float(), value.repeat_interleave(group, 1).float()
        logits = query.float() @ key.transpose(2, 3) * scaling
        weights = logits.masked_fill(~mask, -1e9).softmax(-1)
        for layer, head in heads:
            if layer == module.layer_idx:
                weights[:, head] = (mask / mask.sum(-1, keepdim=True).clamp(min=1))[:, 0]
        seen.append(weights)
        return (weights @ value).to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("explicit", attention)
    AttentionMaskInterface.register(
        "explicit", lambda allow_is_causal_skip=True, **given: sdpa_mask(allow_is_causal_skip=False, **given)
    )
    before = model.config._attn_implementation
    model.set_attn_implementation("explicit")
    yield seen
    model.set_attn_implementation(before)


def logits(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Of the tokens that are no padding."""
    with torch.no_grad():
        made = model(**batch, use_cache=False).logits
    mask = batch.get("attention_mask")
    return made if mask is None else made[mask.bool()]


def equal(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("batch", [{"input_ids": IDS}, padded("left"), padded("right")], ids=["plain", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_heads_attend_equally_and_the_model_is_as_before(family: str, batch: dict[str, Any]) -> None:
    model = small(family)
    before = logits(model, batch)
    with explicit(model, HEADS) as weights:
        truth = logits(model, batch)
    assert weights[1][0, 0, -1].max() == pytest.approx(1 / int(batch.get("attention_mask", torch.ones(2, 8))[0].sum()))
    assert not equal(truth, before, 0.05), "the masked model is another one"
    for kind in ("uniform", "reference_checkpoint"):
        with masked(model, HEADS, kind):
            assert equal(logits(model, batch), truth, 1e-5), kind
        assert torch.equal(logits(model, batch), before), kind
    with masked(model, HEADS, "zero_output"):
        zero = logits(model, batch)
    assert not equal(zero, truth, 0.05) and not equal(zero, before, 0.05)
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_too(family: str) -> None:
    model = small(family, initializer_range=0.05)  # logits of about one
    with torch.no_grad():
        for module in attention_modules(model):
            module.q_proj.weight *= 30
    model.to(torch.bfloat16)
    for batch in ({"input_ids": IDS}, padded("left"), padded("right")):
        with explicit(model, HEADS):
            truth = logits(model, batch)
        assert not equal(logits(model, batch), truth, 2e-2)
        with masked(model, HEADS):
            assert equal(logits(model, batch), truth, 1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_masked_as_each_row_by_itself(family: str) -> None:
    model = small(family)
    lengths = (8, 5)
    with explicit(model, HEADS):
        truth = torch.cat([logits(model, {"input_ids": IDS[row : row + 1, :n]})[0] for row, n in enumerate(lengths)])
    pack(model)
    segments = segments_of_lengths(lengths)
    batch = {
        "input_ids": torch.cat([IDS[0, :8], IDS[1, :5]])[None],
        "position_ids": torch.tensor([segments.position_ids]),
        "segments": segments,
    }
    before = logits(model, batch)
    with masked(model, HEADS):
        assert equal(logits(model, batch)[0], truth, 1e-5)
        with pytest.raises(ValueError, match="no attention mask"):  # no segments: they would see the future
            model(input_ids=IDS)
        assert equal(logits(model, padded("left"))[:3], small_truth(family, 3), 1e-5)
    assert torch.equal(logits(model, batch), before)
    plain, other = plain_and_masked(model, HEADS, "uniform", batch)
    assert equal(model.base_model(**batch).last_hidden_state, plain, 1e-5)
    assert not equal(plain, other, 1e-3)


def small_truth(family: str, num_tokens: int) -> torch.Tensor:
    model = small(family)
    with explicit(model, HEADS):
        return logits(model, {"input_ids": IDS[:1, :num_tokens]})[0]


def test_the_attention_mask_is_never_none() -> None:
    """A name without a mask function gets none, and would attend to the future."""
    model, seen = small("Llama, grouped heads"), []
    with attend_with_heads(model, HEADS, lambda layer, query, key, mask, scaling: seen.append(mask)):
        for batch in ({"input_ids": IDS}, padded("left"), {"input_ids": IDS[:, :1]}):
            logits(model, batch)
    assert len(seen) == 9 and all(mask is not None and mask.dtype == torch.bool for mask in seen)
    assert torch.equal(seen[0][0, 0], torch.ones(8, 8).tril().bool())
    module = attention_modules(model)[0]
    hidden = torch.zeros(1, 2, 32)
    around = model.model.rotary_emb(hidden, torch.arange(2)[None])
    with masked(model, HEADS), pytest.raises(ValueError, match="no attention mask"):
        module(hidden, position_embeddings=around, attention_mask=None)


def test_the_model_is_restored_after_an_error() -> None:
    model = small("Qwen2, biased queries")
    before, implementation = logits(model, {"input_ids": IDS}), model.config._attn_implementation
    for kind in ("uniform", "zero_output", "reference_checkpoint"):
        with pytest.raises(KeyError), masked(model, HEADS, kind):
            raise KeyError
        assert torch.equal(logits(model, {"input_ids": IDS}), before)
        assert model.config._attn_implementation == implementation
        with masked(model, HEADS, kind):  # and it can be masked again
            pass
    with masked(model, HEADS), pytest.raises(AssertionError, match="do not nest"), masked(model, HEADS):
        pass


def test_no_head_is_masked_that_is_not_named() -> None:
    model = small("Llama, grouped heads")
    with explicit(model, []):
        plain = logits(model, {"input_ids": IDS})
    with masked(model, []):
        assert equal(logits(model, {"input_ids": IDS}), plain, 1e-5)


def test_a_reference_checkpoint_is_the_masked_model_wherever_it_is_loaded(tmp_path: Any) -> None:
    model = small("Qwen2, biased queries")
    before = logits(model, {"input_ids": IDS})
    model.save_pretrained(tmp_path, state_dict=reference_checkpoint(model, HEADS))
    assert torch.equal(logits(model, {"input_ids": IDS}), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with masked(model, HEADS):
        assert equal(logits(model, {"input_ids": IDS}), logits(loaded, {"input_ids": IDS}), 1e-5)


@pytest.mark.parametrize("kind", ["uniform", "zero_output", "reference_checkpoint"])
@pytest.mark.parametrize("heads", [HEADS, [(0, 1)], [(2, 0)], []], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_layers_change_nothing(family: str, heads: list[tuple[int, int]], kind: Any) -> None:
    """The layers below the lowest masked one are computed once: counted."""
    model, batch, calls = small(family), padded("right"), [0, 0, 0]
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        plain_alone = model.base_model(**batch).last_hidden_state[kept]
        with masked(model, heads, kind):
            masked_alone = model.base_model(**batch).last_hidden_state[kept]

        def count(module: Any, args: Any) -> None:
            calls[module.self_attn.layer_idx] += 1

        hooks = [layer.register_forward_pre_hook(count) for layer in model.base_model.layers]
        plain, other = plain_and_masked(model, heads, kind, batch)
        for hook in hooks:
            hook.remove()
        assert torch.equal(model.base_model(**batch).last_hidden_state[kept], plain_alone)
    assert equal(plain[kept], plain_alone, 1e-5) and equal(other[kept], masked_alone, 1e-5)
    lowest = lowest_layer(heads) if heads else 3
    assert calls == [1 if layer < lowest else 2 for layer in range(3)]
    if not heads:
        assert torch.equal(plain, other)


def test_heads_of_another_model_are_refused() -> None:
    model = small("Llama, grouped heads")
    for heads in ([(3, 0)], [(0, 4)], [(-1, 0)]):
        with pytest.raises(ValueError, match=r"layers 0 to 2 of heads 0 to 3; heads.json is of another model"):
            check_heads(model, heads)
        with pytest.raises(ValueError, match="another model"), masked(model, heads):
            pass
    with pytest.raises(ValueError, match="twice"):
        check_heads(model, [(0, 0), (0, 0)])


UNKNOWN: dict[str, tuple[str, dict[str, Any], str]] = {
    "sliding window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 4}, "sliding window of 4 tokens"),
    "some layers slide": (
        "Qwen3",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "sliding_attention",
    ),
    "sinks": ("GptOss", {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "layer_types": [
        "full_attention"] * 3, "sliding_window": None}, "attention sinks"),
    "soft caps and windows": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8}, "sliding_attention"),
    "fused queries": ("Phi3", {"num_key_value_heads": 2}, "q_proj"),
    "another layout": ("GPTNeoX", {}, "no attention that is known here in layers 0, 1, 2"),
    "linear biases": ("Bloom", {"n_layer": 3, "n_head": 4}, "does not take attention functions"),
    "no attention": ("Mamba", {"state_size": 4}, "does not take attention functions"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_attention_whose_heads_are_not_known_is_refused(name: str) -> None:
    family, settings, message = UNKNOWN[name]
    config = getattr(transformers, f"{family}Config")(**SHAPE | settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match=message) as raised, masked(model, [(1, 0)]):
        pass
    assert "selection.method rds_plus" in str(raised.value)
    assert model.config._attn_implementation == implementation


def test_a_norm_over_all_heads_is_no_reference_checkpoint() -> None:
    config = transformers.Olmo2Config(**SHAPE, num_key_value_heads=4)
    torch.manual_seed(0)
    model = transformers.Olmo2ForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"set selection\.mask to uniform"):
        reference_checkpoint(model, HEADS)
    with explicit(model, HEADS):
        truth = logits(model, {"input_ids": IDS})
    with masked(model, HEADS):
        assert equal(logits(model, {"input_ids": IDS}), truth, 1e-5)
