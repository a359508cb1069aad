"""What the stage takes of a model that others made: its own files, and the pad token of the recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.recipes import CHAT_TEMPLATES
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.models import BaseModelInputs, ModelSource
from smoltulu.tasks.base_model.stage import provide_base_model
from smoltulu.tasks.models.folders import load_tokenizer
from smoltulu.tasks.stage import StageContext
from tests.families import FAMILIES, build_family
from tests.hub_double import HubDouble
from tests.tiny_model import EOS, PAD, TULU_TEMPLATE, build_tiny_model

CHATML = (CHAT_TEMPLATES / "chatml.jinja").read_text("utf-8")


def provide(source: ModelSource, folder: Path, template: str = TULU_TEMPLATE) -> Path:
    (folder / "out").mkdir(parents=True)
    context = StageContext(folder / "out", folder / "work", ComputeSettings(), lambda *args, **kwargs: None)
    provide_base_model(source, BaseModelInputs(chat_template=template), context)
    return folder / "out" / "model"


# --- Which files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two shards, among what repositories on the Hub hold besides."""
    from transformers import AutoModelForCausalLM

    folder = build_tiny_model(tmp_path_factory.mktemp("crowded") / "model")
    whole = (folder / "model.safetensors").read_bytes()
    AutoModelForCausalLM.from_pretrained(str(folder)).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name in ("consolidated.safetensors", "original/consolidated.00.safetensors", "model.fp16.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(whole)
    pickled = ("pytorch_model.bin", "training_args.bin", "original/consolidated.00.pth", "modeling_own.py")
    for name in (*pickled, "original/params.json", "onnx/config.json", "trainer_state.json", "requirements.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def check_files(provided: Path, source: Path) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    names = {path.relative_to(provided).as_posix() for path in provided.rglob("*") if path.is_file()}
    assert len(shards) > 1
    assert names == shards | {
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert all((provided / name).read_bytes() == (source / name).read_bytes() for name in names)


def test_only_the_model_is_taken_from_a_folder(crowded: Path, tmp_path: Path) -> None:
    check_files(provide(ModelSource(path=str(crowded)), tmp_path), crowded)


def test_only_the_model_is_taken_from_the_hub(crowded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    files = {path.relative_to(crowded).as_posix(): path.read_bytes() for path in crowded.rglob("*") if path.is_file()}
    with HubDouble() as hub:
        commit = hub.add("model", "someone/model", files)
        url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        provided = provide(ModelSource(repository="someone/model", revision=commit), tmp_path)
    check_files(provided, crowded)


def test_pickles_alone_are_refused(crowded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(crowded, tmp_path / "pickles")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"weights are pickles \(pytorch_model\.bin"):
        provide(ModelSource(path=str(folder)), tmp_path)


# --- The pad token ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Special tokens besides eos and pad: those of ChatML."""
    return build_family(tmp_path_factory.mktemp("qwen") / "model", FAMILIES["qwen"])


@pytest.mark.parametrize("legacy", [False, True], ids=["config", "special tokens map too"])
def test_the_pad_token_of_the_recipe_is_that_of_everyone_who_loads_the_model(
    qwen: Path, tmp_path: Path, legacy: bool
) -> None:
    from transformers import AutoTokenizer

    source = Path(shutil.copytree(qwen, tmp_path / "source"))
    if legacy:
        (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS, "pad_token": PAD}))
    before = AutoTokenizer.from_pretrained(str(source))
    assert before.pad_token == PAD
    provided = provide(ModelSource(path=str(source), pad_token="<|im_end|>"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(provided))
    assert tokenizer.pad_token == load_tokenizer(provided, TULU_TEMPLATE).pad_token == "<|im_end|>"
    assert tokenizer.get_vocab() == before.get_vocab() and tokenizer.eos_token == EOS
    text = f"two words <|im_end|>{PAD} and {EOS}"
    assert tokenizer(text)["input_ids"] == before(text)["input_ids"]
    if legacy:
        said = json.loads((provided / "special_tokens_map.json").read_text())
        assert said == {"eos_token": EOS, "pad_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("pad_token", "template", "why"),
    [
        ("<|nowhere|>", TULU_TEMPLATE, "is not in the vocabulary"),
        ("a", TULU_TEMPLATE, "is a token of ordinary text"),
        (EOS, TULU_TEMPLATE, "ends an answer"),
        ("<|im_end|>", CHATML, "ends an answer"),
    ],
)
def test_a_pad_token_that_cannot_be_one_is_refused(
    qwen: Path, tmp_path: Path, pad_token: str, template: str, why: str
) -> None:
    with pytest.raises(ValueError, match=why) as error:
        provide(ModelSource(path=str(qwen), pad_token=pad_token), tmp_path, template)
    allowed = f"{PAD}, " + ("<|im_end|>, " if template == TULU_TEMPLATE else "") + "<|im_start|>"
    assert f"Allowed are the special tokens {allowed}. Name one" in str(error.value)


def test_a_pad_token_is_judged_by_the_template_so_its_key_depends_on_it(qwen: Path) -> None:
    def base_key(**changes: object) -> str:
        return Graph(load_recipe("tiny", changes)).keys()["base-model"]

    own = {"path": str(qwen), "scratch": None}
    assert base_key(base_model=own) == base_key(base_model=own, chat_template="chatml")
    own["pad_token"] = "<|im_start|>"
    assert base_key(base_model=own) != base_key(base_model=own, chat_template="chatml")
