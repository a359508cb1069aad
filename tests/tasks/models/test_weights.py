"""Model folders whose weights are not those of their config.json: refused with the names, and no right one refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.models import BaseModelInputs, ModelSource
from smoltulu.tasks.base_model.stage import provide_base_model
from smoltulu.tasks.models.classifiers import load_classifier, load_reward_model
from smoltulu.tasks.models.folders import check_model_folder, load_language_model
from smoltulu.tasks.models.weights import check_architecture, check_values
from smoltulu.tasks.stage import StageContext
from tests.small_runs import conversations, run
from tests.tiny_model import build_tiny_model

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def change(folder: Path, tensors: Change | None = None, **config: Any) -> Path:
    """The folder with other weights and fields of config.json; a field that is None is taken out."""
    file = folder / "model.safetensors"
    if tensors is not None:
        weights = load_file(file)
        weights = tensors(weights) or weights
        save_file({name: value.contiguous() for name, value in weights.items()}, file, {"format": "pt"})
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in changed.items() if value is not None})
    )
    return folder


def without(*names: str) -> Change:
    return lambda tensors: {name: value for name, value in tensors.items() if not any(part in name for part in names)}


def prefixed(prefix: str) -> Change:
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


# -------------------------------------------------------------------------------- from headers: at plan and everywhere


HEADER_FAULTS: dict[str, tuple[Change | None, dict[str, Any], str]] = {
    "ddp": (
        prefixed("module."),
        {},
        r"20 tensors are named as DistributedDataParallel .*\(module\.model\.embed",
    ),
    "compile": (prefixed("_orig_mod."), {}, r"20 tensors are named as torch\.compile names"),
    "peft": (prefixed("base_model.model."), {}, r"20 tensors are named as PEFT"),
    "one of them": (
        lambda tensors: tensors | {"module.model.norm.weight": tensors.pop("model.norm.weight").clone()},
        {},
        r"1 tensors are named as .*\(module\.model\.norm\.weight\)",
    ),
    "unmerged": (
        lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32)},
        {},
        r"with an adapter in it \(model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight\)",
    ),
    "a lost layer": (without("layers.1."), {}, r"says 2 layers, numbered from 0; the weights lack layers 1$"),
    "lost layers": (None, {"num_hidden_layers": 9}, r"says 9 layers.*lack layers 2, 3, 4 and 4 more"),
    "more layers": (None, {"num_hidden_layers": 1}, r"says 1 layers.*have layers 1 besides"),
    "no head": (
        None,
        {"tie_word_embeddings": False},
        r"tie_word_embeddings false, and .* no output head",
    ),
    "vocabulary": (None, {"vocab_size": 512}, r"says vocab_size 512, and model\.embed_tokens\.weight is 400 x 32"),
    "width": (None, {"hidden_size": 64}, r"says hidden_size 64, and model\.embed_tokens\.weight is 400 x 32"),
    "quantised": (
        lambda tensors: tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 32, dtype=torch.uint8)},
        {},
        r"quantised \(model\.layers\.0\.mlp\.up_proj\.weight is U8\)",
    ),
    "says quantised": (None, {"quantization_config": {"quant_method": "bitsandbytes"}}, "the weights are quantised;"),
    "another file": (None, {"transformers_weights": "other.safetensors"}, "names a file of weights"),
    "own code": (None, {"auto_map": {"AutoModel": "m.M"}}, "wants code of its own"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_headers_say_what_does_not_fit(copy: Path, fault: str) -> None:
    tensors, config, said = HEADER_FAULTS[fault]
    change(copy, tensors, **config)
    with pytest.raises(ValueError, match=said):
        check_model_folder(copy)


def sharded(folder: Path, named: dict[str, str]) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))
    return folder


def test_an_index_names_its_shards(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    first = {name: value for name, value in weights.items() if ".1." not in name}
    second = {name: value for name, value in weights.items() if ".1." in name}
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {name: names[0] for name in first} | {name: names[1] for name in second}
    sharded(copy, index)
    with pytest.raises(ValueError, match=r"not in the folder: model-00001-of-00002.safetensors, model-00002-of"):
        check_model_folder(copy)  # although model.safetensors is whole
    for name, part in zip(names, (first, second), strict=True):
        save_file(part, copy / name, {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds model.safetensors, and an index that names model-00001"):
        check_model_folder(copy)
    (copy / "model.safetensors").unlink()
    check_model_folder(copy)
    check_values(copy)
    (copy / names[1]).unlink()
    with pytest.raises(ValueError, match=r"not in the folder: model-00002-of-00002.safetensors; copy"):
        check_model_folder(copy)
    sharded(copy, index | {"x": "../model-00001-of-00002.safetensors"})
    with pytest.raises(ValueError, match=r"not in the folder: \.\./model-00001"):
        check_model_folder(copy)


def test_an_adapter_alone_and_beside_a_model_is_refused(copy: Path) -> None:
    """Beside a model it would be worse: transformers loads the base that the adapter names, instead of the model."""
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config.json\).*merged into it"):
        check_model_folder(copy)
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config.json\).*merged into it"):
        check_model_folder(copy)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["num_hidden_layers", "vocab_size", "hidden_size", "tie_word_embeddings", "architectures", "quantization_config",
     "auto_map", "transformers_weights", "num_nextn_predict_layers", "n_layer", "weight_map", "text_config"]
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=JSON | st.dictionaries(FIELDS, JSON), index=JSON | st.dictionaries(FIELDS, JSON) | st.none())
def test_config_and_index_of_any_shape_are_taken_or_refused(copy: Path, config: Any, index: Any) -> None:
    (copy / "config.json").write_text(json.dumps(config))
    file = copy / "model.safetensors.index.json"
    file.unlink(missing_ok=True)
    if index is not None:
        file.write_text(json.dumps(index))
    try:
        check_model_folder(copy)
    except ValueError as error:
        assert str(error).startswith(f"model folder {copy}: ") and len(str(error)) < 3_000


def test_names_are_shown_without_what_a_terminal_would_obey(copy: Path) -> None:
    change(copy, prefixed("module.\x1b[2J"))
    with pytest.raises(ValueError, match=r"\(module\.\?\[2Jmodel"):
        check_model_folder(copy)


def test_a_config_that_is_nested_too_deeply_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        check_model_folder(copy)


# ------------------------------------------------------------------------------------------------- tensor by tensor


#: Headers by themselves do not tell.
ARCHITECTURE_FAULTS: dict[str, tuple[Change | None, dict[str, Any], str]] = {
    "a lost tensor": (
        without("layers.1.mlp.down_proj"), {}, r"1 tensors are missing \(model\.layers\.1\.mlp\.down_proj\.weight\)"
    ),
    "lost in all layers": (without("o_proj"), {}, r"2 tensors are missing \(model\.layers\.0\.self_attn\.o_proj"),
    "no embeddings": (without("embed_tokens"), {}, r"2 tensors are missing \(lm_head\.weight, model\.embed_tokens"),
    "unexpected": (
        lambda tensors: tensors | {"model.layers.0.mlp.gate.weight": torch.zeros(8, 32)},
        {},
        r"1 are unexpected \(model\.layers\.0\.mlp\.gate\.weight\)",
    ),
    "another family": (None, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, r"q_proj\.bias"),
    "gpt2": (None, {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, r"29 tensors are missing \(lm_head"),
    "other heads": (None, {"num_key_value_heads": 1}, r"4 have another shape \(model\.layers\.0\.self_attn\.k_proj"),
    "a number of 4,000 digits": (None, {"vocab_size": 10**4_000}, r"cannot load|have another shape"),
    "wider layers": (
        None, {"intermediate_size": 128}, r"down_proj\.weight is \[32, 64\], not \[32, 128\]"
    ),
    "unknown": (None, {"model_type": "nothing-like-it"}, r"cannot load what config\.json says \(ValueError: "),
    "no kind": (None, {"model_type": None}, r"cannot load what config\.json says"),
    "nonsense": (None, {"num_attention_heads": 0}, r"cannot load what config\.json says"),
    "text": (None, {"rope_parameters": "text"}, r"cannot load what config\.json says"),
    "no language model": (None, {"model_type": "vit"}, r"cannot load what config\.json says"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ARCHITECTURE_FAULTS)
def test_tensors_are_those_of_the_architecture(copy: Path, fault: str) -> None:
    tensors, config, said = ARCHITECTURE_FAULTS[fault]
    change(copy, tensors, **config)
    with pytest.raises(ValueError, match=said):
        check_architecture(copy)
    with pytest.raises(ValueError, match=said):
        load_language_model(copy)
    with pytest.raises(ValueError, match=said):
        load_classifier(copy)


SMALL: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "head_dim": 16,
}  # fmt: skip
OLD_BUFFERS = {
    "gpt2": "transformer.h.0.attn.bias",
    "gpt_neo": "transformer.h.0.attn.attention.masked_bias",
    "gptj": "transformer.h.0.attn.masked_bias",
    "codegen": "transformer.h.0.attn.causal_mask",
    "gpt_bigcode": "transformer.h.0.attn.bias",
    "gpt_neox": "gpt_neox.layers.0.attention.masked_bias",
}
OLD_GPT2 = GPT2Config(vocab_size=160, n_embd=32, n_layer=2, n_head=2, n_positions=64)
ARCHITECTURES: list[PreTrainedConfig] = [
    MistralConfig(**SMALL), Qwen2Config(**SMALL, tie_word_embeddings=True), Qwen3Config(**SMALL), Gemma2Config(**SMALL),
    Gemma3TextConfig(**SMALL), Olmo2Config(**SMALL), Phi3Config(**SMALL),
    MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
    OLD_GPT2,
    GPTBigCodeConfig(vocab_size=160, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    GPTNeoConfig(vocab_size=160, hidden_size=32, num_layers=2, num_heads=2, max_position_embeddings=64,
                 attention_types=[[["global", "local"], 1]]),
    GPTJConfig(vocab_size=160, n_embd=32, n_layer=2, n_head=2, n_positions=64, rotary_dim=8),
    CodeGenConfig(vocab_size=160, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8),
    GPTNeoXConfig(**SMALL | {"tie_word_embeddings": False}),
    BloomConfig(vocab_size=160, hidden_size=32, n_layer=2, n_head=2),
    FalconConfig(vocab_size=160, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    OPTConfig(vocab_size=160, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64,
                                     num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64),
]  # fmt: skip


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
def test_no_right_model_is_refused(copy: Path, config: PreTrainedConfig) -> None:
    """As saved, in bfloat16, in shards, and from its body alone where it has no head of its own."""
    (copy / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(copy, max_shard_size="20KB")
    assert (copy / "model.safetensors.index.json").exists()
    check_model_folder(copy)
    check_values(copy)
    assert load_language_model(copy).dtype == torch.float32
    # What checkpoints of older versions hold besides; -1e4 of a mask is -inf in some of those in half precision.
    buffer = OLD_BUFFERS.get(config.model_type, "model.layers.0.self_attn.rotary_emb.inv_freq")
    shard = next(copy.glob("*-00001-of-*.safetensors"))
    save_file(load_file(shard) | {buffer: torch.full((1,), float("-inf"))}, shard, {"format": "pt"})
    check_values(copy)
    load_language_model(copy)
    if config.tie_word_embeddings:
        for file in copy.glob("model*.safetensors*"):
            file.unlink()
        model.base_model.save_pretrained(copy)
        check_model_folder(copy)
        check_values(copy)


def test_a_reward_model_is_made_from_a_language_model_with_a_head_of_its_own_and_read_whole(
    copy: Path, tmp_path: Path
) -> None:
    change(copy, lambda tensors: tensors | {"lm_head.weight": torch.ones(400, 32)}, tie_word_embeddings=False)
    model = load_classifier(copy)
    assert model.score.weight.shape == (1, 32)
    reward_model = build_tiny_model(tmp_path / "reward", num_labels=1)
    assert load_reward_model(reward_model).score.weight.shape == (1, 32)
    change(reward_model, without("score"))
    with pytest.raises(ValueError, match=r"1 tensors are missing \(score\.weight\)"):
        load_reward_model(reward_model)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_corrupt_values_are_found(copy: Path, value: float, dtype: torch.dtype) -> None:
    def corrupt(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    change(copy, corrupt)
    check_architecture(copy)
    with pytest.raises(ValueError, match=r"infinite values in 1 tensors \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        check_values(copy)


def test_a_trained_bias_is_no_mask(copy: Path) -> None:
    """GPT-2's `attn.bias` is a mask that models compute, its `attn.c_attn.bias` is trained."""
    (copy / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(OLD_GPT2).save_pretrained(copy)
    weights = load_file(copy / "model.safetensors")
    weights["transformer.h.1.attn.c_attn.bias"][3] = float("nan")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"infinite values in 1 tensors \(transformer\.h\.1\.attn\.c_attn\.bias\)"):
        check_values(copy)


def test_a_tied_head_of_other_values_is_refused(copy: Path) -> None:
    """transformers would untie it and others, which read config.json, would not: two different models."""
    change(copy, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    check_values(copy)
    change(copy, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        check_values(copy)


# ------------------------------------------------------------------------------------------------------------- stages


def provide(source: Path, folder: Path) -> Path:
    (folder / "out").mkdir(parents=True)
    context = StageContext(folder / "out", folder / "work", ComputeSettings(), lambda *args, **kwargs: None)
    provide_base_model(ModelSource(path=str(source)), BaseModelInputs(), context)
    return folder / "out" / "model"


def test_the_stage_takes_a_right_model_and_no_other(copy: Path, tmp_path: Path) -> None:
    provided = provide(copy, tmp_path / "right")
    assert (provided / "model.safetensors").read_bytes() == (copy / "model.safetensors").read_bytes()
    change(copy, without("o_proj"))
    with pytest.raises(ValueError, match="2 tensors are missing"):
        provide(copy, tmp_path / "lost")


def test_no_training_begins_with_random_weights(copy: Path, tmp_path: Path) -> None:
    change(copy, without("layers.1.mlp"))
    with pytest.raises(ValueError, match="3 tensors are missing"):
        run("sft", tmp_path / "run", copy, conversations(4), {"max_steps": 1})


def test_headers_are_checked_without_torch(base: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from smoltulu.tasks.models.folders import check_model_folder; "
        "check_model_folder(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(base)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
