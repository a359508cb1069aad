"""LoRA in the SFT and DPO stages: what is trained, what is saved, and that a resume changes nothing."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER
from smoltulu.schemas.training import LoraSettings
from smoltulu.tasks.models.lora import with_adapter
from tests.small_runs import Run, conversations, pairs, run, two_processes
from tests.tiny_model import build_tiny_model

# The first pair has the same answer twice.
ROWS = {"sft": conversations(8), "dpo": pairs(9)[1:]}
LORA = {"r": 4, "lora_alpha": 12.0}
SCALE = 12.0 / 4
SETTINGS: dict[str, Any] = {
    "lora": LORA, "learning_rate": 1e-2, "effective_batch_size": 4, "max_steps": 4, "num_train_epochs": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["sft", "dpo"])
def trained(request: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(request.param, tmp_path_factory.mktemp(request.param), base, ROWS[request.param], SETTINGS)


def language_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()


def adapter_of(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of each adapted weight -> A (r, in) and B (out, r)."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors}
    assert len(tensors) == 2 * len(names)  # nothing but A and B
    return {
        f"{name}.weight": (
            tensors[f"base_model.model.{name}.lora_A.weight"],
            tensors[f"base_model.model.{name}.lora_B.weight"],
        )
        for name in names
    }


def test_the_adapter_adds_its_product_beside_every_linear_layer_but_the_head(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "smoltulu"):
        model = with_adapter(language_model(base, torch.bfloat16), LoraSettings(**LORA))
    linear = {name for name, module in language_model(base).named_modules() if isinstance(module, torch.nn.Linear)}
    beside = {name.rsplit(".lora_", 1)[0] for name, value in model.named_parameters() if value.requires_grad}
    assert {name.removeprefix("base_model.model.") for name in beside} == linear - {"lm_head"} and len(linear) == 15
    trained = [value for value in model.parameters() if value.requires_grad]
    assert {value.dtype for value in trained} == {torch.float32}  # beside bfloat16 weights too
    # Per layer q, k, v, o of 32 x 32 and gate, up, down of 32 x 64: r x (in + out) each.
    assert sum(value.numel() for value in trained) == 2 * 4 * (4 * 64 + 3 * 96)
    num_all = sum(value.numel() for value in model.parameters())
    assert f"trains 4,352 of {num_all:,} parameters ({435200 / num_all:.2f} %)" in caplog.text

    layer = with_adapter(language_model(base), LoraSettings(**LORA)).base_model.model.model.layers[1].mlp.down_proj
    inputs = torch.randn(3, 64)
    torch.testing.assert_close(layer(inputs), inputs @ layer.base_layer.weight.T, rtol=0, atol=0)  # B is zero
    factor_a, factor_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(factor_b)
    expected = inputs @ layer.base_layer.weight.T + SCALE * (inputs @ factor_a.T @ factor_b.T)
    torch.testing.assert_close(layer(inputs), expected)


def test_merging_gives_back_the_base_models_names_and_dtypes(base: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        before = language_model(base, dtype).state_dict()
        adapted = with_adapter(language_model(base, dtype), LoraSettings(**LORA))
        after = adapted.merge_and_unload(safe_merge=True).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype
                   for name, value in before.items())  # fmt: skip


def test_the_trained_model_is_the_base_model_and_the_adapters_product(base: Path, trained: Run) -> None:
    """So the base model's weights were not trained, and what the artifact's model and its adapter say is the same."""
    before, after = load_file(base / "model.safetensors"), load_file(trained.model / "model.safetensors")
    adapter = adapter_of(trained.model.parent / "adapter")
    assert before.keys() == after.keys() and adapter.keys() < before.keys() and len(adapter) == 14
    for name, value in before.items():
        if name in adapter:
            factor_a, factor_b = adapter[name]
            change = SCALE * factor_b @ factor_a
            assert change.abs().max() > 1e-3, name
            torch.testing.assert_close(after[name], value + change, rtol=0, atol=1e-6)
        else:
            assert torch.equal(after[name], value), name
    assert trained.outputs.num_parameters == language_model(base).num_parameters()


def test_the_adapter_on_the_base_model_answers_as_the_trained_model(base: Path, trained: Run) -> None:
    adapted = PeftModel.from_pretrained(language_model(base), str(trained.model.parent / "adapter"))
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        own, other, start = adapted(ids).logits, language_model(trained.model)(ids).logits, language_model(base)(ids)
    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    assert (own - start.logits).abs().max() > 1e-2


def test_the_adapters_files_say_nothing_of_this_machine(trained: Run) -> None:
    folder = trained.model.parent / "adapter"
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["base_model_name_or_path"] and config["target_modules"] == sorted(config["target_modules"])


def stored_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "shards" / "rank-0-of-1.safetensors")


def test_checkpoints_hold_the_adapter_alone(trained: Run) -> None:
    names = sorted(stored_in(trained.checkpoints / "checkpoint-4"))
    weights = [name for name in names if name.startswith("model.weights.")]
    assert len(weights) == 2 * 14 and all(".lora_" in name for name in weights)
    assert len(names) == 3 * len(weights)  # with Adam's two moments


def without_pad_token(base: Path, folder: Path) -> Path:
    """The base model with a tokenizer that has none: one is added, and the embeddings grow."""
    shutil.copytree(base, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace('"<pad>"', '"<other>"'))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": None}))
    return folder


def test_resumed_sft_with_dropout_and_grown_embeddings_ends_bitwise_the_same(base: Path, tmp_path: Path) -> None:
    """The new rows of the embeddings belong to the base model: no checkpoint holds them, they are drawn again."""
    model = without_pad_token(base, tmp_path / "model")
    settings = SETTINGS | {"lora": LORA | {"lora_dropout": 0.2}}
    unbroken = run("sft", tmp_path / "unbroken", model, ROWS["sft"], settings)
    num_rows = language_model(unbroken.model).get_input_embeddings().num_embeddings
    assert num_rows > language_model(base).get_input_embeddings().num_embeddings
    assert len(stored_in(unbroken.checkpoints / "checkpoint-4")) == 3 * 2 * 14
    shutil.copytree(unbroken.checkpoints.parent, tmp_path / "resumed" / "work")
    (tmp_path / "resumed" / "work" / "checkpoints" / "checkpoint-4" / CHECKPOINT_MARKER).unlink()
    torch.manual_seed(99)
    resumed = run("sft", tmp_path / "resumed", model, ROWS["sft"], settings)
    assert (tmp_path / "resumed" / "work" / "resumed.jsonl").read_text() == "3\n"
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (unbroken.model.parent / name).read_bytes() == (resumed.model.parent / name).read_bytes(), name
    dropped = [row["loss"] for row in unbroken.history]
    plain = [row["loss"] for row in run("sft", tmp_path / "plain", model, ROWS["sft"], SETTINGS).history]
    assert dropped[0] == plain[0] and dropped[1] != plain[1]  # B is zero in the first step


@pytest.mark.slow  # two trainings by two processes
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_processes_train_the_adapter_of_one_and_resume_to_the_same_bytes(
    base: Path, tmp_path: Path, stage: str
) -> None:
    """Over gloo, same effective batch; dropout off, because each process draws its own."""
    settings = SETTINGS | {"learning_rate": 1e-3}
    one = load_file(run(stage, tmp_path / "one", base, ROWS[stage], settings).model / "model.safetensors")
    made = two_processes(stage, tmp_path, base, ROWS[stage], settings)
    unbroken = made("unbroken")
    shutil.copytree(unbroken / "checkpoints", tmp_path / "resumed" / "work" / "checkpoints")
    shutil.rmtree(tmp_path / "resumed" / "work" / "checkpoints" / "checkpoint-4")
    resumed = made("resumed")
    assert (resumed / "resumed.jsonl").read_text() == "3\n"
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (unbroken / "output" / name).read_bytes() == (resumed / "output" / name).read_bytes(), name
    two, before = load_file(unbroken / "output" / "model" / "model.safetensors"), load_file(base / "model.safetensors")
    assert max((value - before[name]).abs().max() for name, value in two.items()) > 1e-4
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_layout_and_activation_checkpointing_change_nothing(base: Path, tmp_path: Path, stage: str) -> None:
    """The adapter trains the same however memory is spent: on padding, on whole batches, on activations.

    Its dropout follows rows and positions, of which a pair has two sides.
    """
    ways: list[dict[str, Any]] = [
        {"packing": True, "per_device_train_batch_size": 4},
        {"packing": False, "per_device_train_batch_size": 2},
        {"packing": True, "per_device_train_batch_size": 2, "activation_checkpointing": True},
    ]
    settings = SETTINGS | {"lora": LORA | {"lora_dropout": 0.2}, "learning_rate": 1e-3, "max_steps": 2}
    models = [
        load_file(run(stage, tmp_path / str(number), base, ROWS[stage], settings, **way).model / "model.safetensors")
        for number, way in enumerate(ways)
    ]
    before = load_file(base / "model.safetensors")
    assert max((value - before[name]).abs().max() for name, value in models[0].items()) > 1e-4
    for other in models[1:]:
        for name, value in models[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=2e-5)


class _Config(PretrainedConfig):
    model_type = "no-linear"


class _NoLinear(PreTrainedModel):
    config_class = _Config

    def __init__(self) -> None:
        super().__init__(_Config())
        self.table = torch.nn.Embedding(8, 8)
        self.lm_head = torch.nn.Linear(8, 8)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.lm_head


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="_NoLinear has no linear layers besides its output head"):
        with_adapter(_NoLinear(), LoraSettings())


def test_without_peft_the_error_says_what_to_install(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(base)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'smoltulu\[lora\]'"):
        with_adapter(model, LoraSettings())
