"""Model folders: what they must hold; loads, saves and checks them. No pickles, no remote code."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.models.sizes import shown
from smoltulu.tasks.models.tokens import stop_token_ids, tokenisation
from smoltulu.tasks.models.weights import header_problems, load_whole

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from smoltulu.schemas.compute import ComputeSettings

logger = logging.getLogger("smoltulu")

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
#: Files that name the pad token; the second one where it is there, for programs older than the first.
_PAD_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
SPARE_PAD_TOKEN = "<pad>"
GENERATION_CONFIG = "generation_config.json"
#: What transformers saves with a tokenizer of how it was loaded: the bytes of a model would depend on HF_HUB_OFFLINE.
_HOW_LOADED = ("is_local", "local_files_only")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_model_folder(folder: Path) -> None:
    """Raise ValueError where a folder is no model that we load. The message lists every fault."""
    if not folder.is_dir():
        raise ValueError(
            f"model folder {folder} does not exist; give a folder with config.json, *.safetensors and tokenizer"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    weights = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if Path(name).suffix in _PICKLE_SUFFIXES and name != "training_args.bin"]
    problems = []
    config: dict[str, Any] = {}
    if "config.json" not in names:
        problems.append("config.json is missing")
    else:
        try:
            config = _read_config(folder / "config.json")
        except ValueError as error:
            problems.append(str(error))
    if GENERATION_CONFIG in names:
        try:
            _read_config(folder / GENERATION_CONFIG)
        except ValueError as error:
            problems.append(str(error))
    if "adapter_config.json" in names:
        problems.append(
            "it holds an adapter (adapter_config.json): transformers would load the base model that this file names; "
            "give the base model with the adapter merged into it"
        )
    elif not weights and pickles:
        problems.append(
            f"weights are pickles ({', '.join(pickles[:3])}), which can run code; convert them to safetensors"
        )
    elif not weights:
        problems.append("no *.safetensors weights")
    else:
        problems += header_problems(folder, config)
    if not any(name in names for name in _TOKENIZER_FILES):
        problems.append(f"no tokenizer ({' or '.join(_TOKENIZER_FILES)}); save it with tokenizer.save_pretrained")
    if "auto_map" in config:
        problems.append("config.json wants code of its own (auto_map); only architectures of transformers are loaded")
    if config.get("transformers_weights"):
        problems.append("config.json names a file of weights (transformers_weights); name that file model.safetensors")
    if problems:
        raise ValueError(f"model folder {folder}: " + "; ".join(problems))


def _read_config(file: Path) -> dict[str, Any]:
    """Content of a JSON file that holds one object; ValueError where it does not."""
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file.name} is not a JSON object, but {str(config)[:40]}")
    return config


def device_of(compute: ComputeSettings) -> str:
    """`cuda` or `cpu`. ValueError where `compute` wants CUDA and there is none."""
    import torch

    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device is cuda, but torch finds no CUDA device; set it to auto or cpu")
    return "cuda" if compute.device != "cpu" and torch.cuda.is_available() else "cpu"


def use_bfloat16(precision: str, compute: ComputeSettings) -> bool:
    """Whether a stage that asks for `precision` runs in bfloat16 here; falls back with a warning where allowed."""
    import torch

    if precision == "float32":
        return False
    if device_of(compute) == "cuda" and torch.cuda.is_bf16_supported():
        return True
    if not compute.precision_fallback:
        raise ValueError(
            "precision is bfloat16, which this device does not have, and compute.precision_fallback is false; set the "
            "stage's precision to float32, compute.precision_fallback to true, or take another device"
        )
    logger.warning("no bfloat16 on this device: running in float32")
    return False


def load_tokenizer(folder: Path, chat_template: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a model folder with the recipe's template and a pad token that ends no answer.

    pad = eos would hide the closing eos from the loss and make the reward model pool the wrong token. A token that ends
    an answer is a special one: no verifier or benchmark reads it as text.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    for name in _HOW_LOADED:
        tokenizer.init_kwargs.pop(name, None)
    if tokenizer.eos_token is None:
        raise ValueError(f"tokenizer of {folder} has no eos token: a model could never learn to stop; set eos_token")
    tokenizer.chat_template = chat_template
    stops = stop_token_ids(tokenizer)
    if tokenizer.pad_token is None or tokenizer.pad_token_id in stops:
        tokenizer.add_special_tokens({"pad_token": SPARE_PAD_TOKEN})
    assert tokenizer.pad_token_id not in stops
    ordinary = [tokenizer.added_tokens_decoder[stop] for stop in stops if stop in tokenizer.added_tokens_decoder]
    if names := [token.content for token in ordinary if not token.special]:
        tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    return tokenizer


def set_pad_token(folder: Path, pad_token: str, chat_template: str) -> None:
    """Write the pad token of a recipe into the tokenizer's files, so that everyone who loads the model has it.

    Raises:
        ValueError: it is no special token of the vocabulary, or it ends an answer.
    """
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(folder, chat_template)
    stops = stop_token_ids(tokenizer)
    # The tokenizer as it is: what `load_tokenizer` adds is in no vocabulary of the base.
    base = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    special = {token.content: number for number, token in base.added_tokens_decoder.items() if token.special}
    if special.get(pad_token) in (None, *stops):
        if pad_token in special:
            why = "ends an answer: as padding it would never be learned"
        elif pad_token in base.get_vocab():
            why = "is a token of ordinary text, which answers hold"
        else:
            why = "is not in the vocabulary"
        allowed = [token for token, number in sorted(special.items()) if number not in stops]
        raise ValueError(
            f"base_model.pad_token {pad_token!r} {why}. "
            + (f"Allowed are the special tokens {shown(allowed, 20)}" if allowed else "There is no other special token")
            + f". Name one, or none: then {SPARE_PAD_TOKEN} is added where the base has no pad token of its own"
        )
    for name in _PAD_TOKEN_FILES:
        if (folder / name).is_file() or name == _PAD_TOKEN_FILES[0]:
            said = _read_config(folder / name) if (folder / name).is_file() else {}
            (folder / name).write_text(json.dumps(said | {"pad_token": pad_token}, indent=2, ensure_ascii=False))
    written = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if written.pad_token_id != special[pad_token] or written.get_vocab() != base.get_vocab():
        raise RuntimeError(f"the tokenizer has pad token {written.pad_token!r} after {pad_token!r} was written into it")


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embeddings (to a multiple of 8, as Tulu 3 does) if the tokenizer has more tokens than they have rows."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give model and generation config the tokenizer's ids: a wrong eos there makes every completion look truncated.

    The generation config lists every token that ends an answer, where the template has another than eos. Embeddings get
    the pad id too: their row of that id has no gradient, and it was eos where the base padded with eos.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            has_row = tokenizer.pad_token_id < module.num_embeddings
            module.padding_idx = tokenizer.pad_token_id if has_row else None
    stops = stop_token_ids(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id
        generation.eos_token_id = stops if len(stops) > 1 else stops[0]
        generation.bos_token_id = tokenizer.bos_token_id


class _WithoutDropout:
    """A model's config as it is at any time, but for dropout rates: they are 0. The config that is saved keeps them."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config" or name.startswith("__"):  # copying and pickling ask before there is a config
            raise AttributeError(name)
        value = getattr(self._config, name)
        return 0.0 if "drop" in name and type(value) is float else value


def switch_dropout_off(model: PreTrainedModel) -> None:
    """Set every dropout rate to 0: of modules, numbers that layers keep, and those that they read from their config."""
    from torch.nn.modules.dropout import _DropoutNd
    from transformers import PreTrainedConfig, PreTrainedModel

    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and type(value) is float:
                setattr(module, name, 0.0)
        if not isinstance(module, PreTrainedModel) and isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = _WithoutDropout(module.config)


def load_language_model(folder: Path) -> PreTrainedModel:
    """Causal language model in float32 (the masters; bfloat16 is autocast: pure bf16 weights lose small updates)."""
    import torch

    check_model_folder(folder)
    return load_whole(
        "AutoModelForCausalLM", folder, dtype=torch.float32, generation_config=own_generation_config(folder)
    )


def load_to_write(folder: Path, tokenizer: PreTrainedTokenizerBase, bfloat16: bool) -> PreTrainedModel:
    """Causal language model as a stage samples it: never trained, so in bfloat16 the weights themselves are cast.

    Not the buffers: rotary frequencies in bfloat16 turn position 2,000 by another radian.
    """
    import torch

    model = load_language_model(folder)
    fit_embeddings(model, tokenizer)
    stop_ids(model, tokenizer)
    if bfloat16:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def own_generation_config(folder: Path) -> GenerationConfig:
    """Where generation begins, ends and is padded, and nothing else of what a model folder says of generation.

    transformers takes what a call of `generate` leaves open from generation_config.json, else from config.json. So a
    repetition penalty or a minimal length of the base would change rollouts, gate and scores, and be published.
    """
    from transformers import GenerationConfig

    ids: dict[str, Any] = {}
    for name in ("config.json", GENERATION_CONFIG):
        if (folder / name).is_file():
            found = _read_config(folder / name)
            ids |= {field: found[field] for field in _TOKEN_IDS if _is_token_id(field, found.get(field))}
    return GenerationConfig(**ids)


def _is_token_id(field: str, value: Any) -> bool:
    """Whether this is a token id; of eos there may be several."""
    several = field == "eos_token_id" and isinstance(value, list) and value
    return all(isinstance(one, int) and not isinstance(one, bool) for one in (value if several else [value]))


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """Save model and tokenizer, load both again, compare tensors and tokens. Returns the number of parameters."""
    import torch
    from transformers import AutoTokenizer

    model.config.use_cache = True  # trainers switch it off; a published model generates with its cache
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    check_model_folder(folder)
    reloaded = type(model).from_pretrained(str(folder), dtype=model.dtype, use_safetensors=True)
    before, after = model.state_dict(), reloaded.state_dict()
    if before.keys() != after.keys():
        raise RuntimeError(
            f"saved model has other tensors than the trained one: {sorted(before.keys() ^ after.keys())[:5]}"
        )
    differing = [name for name, value in before.items() if not torch.equal(value.cpu(), after[name])]
    if differing:
        raise RuntimeError(f"saved model differs from the trained one in {differing[:5]}")
    if tokenisation(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)) != tokenisation(tokenizer):
        raise RuntimeError(
            "the saved tokenizer gives other tokens than the one of the training; look at the tokenizer's files"
        )
    return model.num_parameters()
