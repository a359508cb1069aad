"""Whether the weights of a model folder are those of the model that its config.json describes.

transformers only warns of a tensor that it does not find, and fills it with random numbers: with a prefix before all
names (`module.`), lost layers or the config of another model, random weights would be trained to the end. Three checks:

    header_problems       by rules, from the headers, without torch: wherever a folder is used, and before a run begins
    check_architecture    tensor by tensor, against the model that transformers builds; reads headers only, too
    check_values          reads every value: finite, and equal where the model ties two tensors
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.models.sizes import shown, tensor_headers, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What wrappers of a model put before every name, and how a checkpoint of theirs is made a model again.
_WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "base_model": "PEFT",
}
_ADAPTER = re.compile(r"\.(lora_|base_layer\.|modules_to_save\.|ia3_)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_CAUSAL = ("ForCausalLM", "LMHeadModel")
#: What old checkpoints hold and models compute: causal masks (some of them with -inf), rotary frequencies, positions.
_COMPUTED = re.compile(r"(?:^|\.)(?:masked_bias|causal_mask|inv_freq|position_ids|(?:attn|attention)\.bias)$")
_SHOWN_ERROR = 300
_MOST = 10**9  # a larger number is none of layers, tokens or sizes
#: Begins the last line of the check in a process of its own, where the weights are wrong.
_FAULT = "fault: "


def header_problems(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the weights of a folder, in words, from their headers and config.json."""
    try:
        tensors = {name: header for file in weight_files(folder) for name, header in tensor_headers(file).items()}
    except ValueError as error:
        return [str(error)]
    if not tensors:
        return ["the weight files hold no tensor; save the model again"]
    wrapped = _wrapper_problems(list(tensors))
    # Where the names are others, what else the names say is no news.
    return wrapped or [
        *_dtype_problems(tensors, config),
        *_layer_problems(list(tensors), config),
        *_shape_problems({name: shape for name, (_, shape) in tensors.items()}, config),
    ]


def _wrapper_problems(names: list[str]) -> list[str]:
    for prefix, wrapper in _WRAPPERS.items():
        wrapped = [name for name in names if name.split(".")[0] == prefix]
        if wrapped:
            return [
                f"{len(wrapped):,} tensors are named as {wrapper} names those of a model that it wraps "
                f"({shown(wrapped)}): no model would find them; save the model inside of it"
            ]
    adapters = [name for name in names if _ADAPTER.search(name)]
    if adapters:
        return [f"the weights are those of a model with an adapter in it ({shown(adapters)}); merge the adapter first"]
    return []


def _dtype_problems(tensors: Mapping[str, tuple[str, list[int]]], config: Mapping[str, Any]) -> list[str]:
    quantised = [
        name
        for name, (dtype, _) in tensors.items()
        if dtype not in _FLOATS and (name.endswith(".weight") or dtype.startswith(("F8", "F6", "F4")))
    ]
    if quantised or config.get("quantization_config"):
        which = f" ({shown([f'{name} is {tensors[name][0]}' for name in quantised])})" if quantised else ""
        return [f"the weights are quantised{which}; give the model before its quantisation, training needs floats"]
    return []


def _layer_problems(names: list[str], config: Mapping[str, Any]) -> list[str]:
    """Layers by number against `num_hidden_layers`."""
    wanted = _count(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    found = {int(match[1]) for name in names if (match := _LAYER.search(name)) and len(match[1]) < 6}
    if wanted is None or not found:
        return []
    # Layers for the prediction of several tokens lie behind the others.
    allowed = wanted + (_count(config, "num_nextn_predict_layers") or 0)
    problems = []
    if lost := sorted(set(range(min(wanted, 100_000))) - found):
        problems.append(f"the weights lack layers {shown(list(map(str, lost)))}")
    if more := sorted(number for number in found if number >= allowed):
        problems.append(f"the weights have layers {shown(list(map(str, more)))} besides")
    if not problems:
        return []
    return [f"config.json says {wanted:,} layers, numbered from 0; {' and '.join(problems)}"]


def _shape_problems(shapes: Mapping[str, list[int]], config: Mapping[str, Any]) -> list[str]:
    """Embeddings and head against `vocab_size`, `hidden_size` and `tie_word_embeddings`."""
    vocab_size, width = _count(config, "vocab_size"), _count(config, "hidden_size", "n_embd", "d_model")
    if "word_embed_proj_dim" in config or "embedding_size" in config:  # embeddings narrower than the model
        width = None
    problems = []
    embeddings = {name: shape for name, shape in shapes.items() if _EMBEDDING.search(name) and len(shape) == 2}
    for name, shape in embeddings.items():
        for wanted, extent, field in ((vocab_size, shape[0], "vocab_size"), (width, shape[1], "hidden_size")):
            if wanted is not None and wanted != extent:
                problems.append(f"config.json says {field} {wanted:,}, and {name} is {shape[0]:,} x {shape[1]:,}")
    architectures = config.get("architectures") or [_CAUSAL[0]]
    is_causal = isinstance(architectures, list) and str(architectures[0]).endswith(_CAUSAL)
    if is_causal and embeddings and not problems and config.get("tie_word_embeddings") is False and vocab_size:
        rows = [name for name, shape in shapes.items() if name not in embeddings and shape[:1] == [vocab_size]]
        if not rows:
            problems.append(
                "config.json says tie_word_embeddings false, and the weights have no output head (no tensor of "
                f"{vocab_size:,} rows besides {shown(list(embeddings))}); restore it, or set tie_word_embeddings to "
                "true where the model was trained so"
            )
    return problems


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that is a number. Of a model of several parts the config is nested: not looked into."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and 0 <= value < _MOST), None)


# ------------------------------------------------------------------------------------------------- tensor by tensor


def load_whole(kind: str, folder: Path, *, new_head: bool = False, **options: Any) -> PreTrainedModel:
    """`from_pretrained` of a transformers auto class, but a tensor that does not fit is an error, not a random number.

    Args:
        new_head: a language model becomes a classifier: its score head is new, its output head is left out.

    Raises:
        ValueError: transformers cannot build what config.json describes, or tensors are missing, unexpected, or of
            another shape.
    """
    import transformers

    from smoltulu.tasks.process import is_out_of_memory

    options = {"use_safetensors": True, "trust_remote_code": False} | options
    try:
        # Mismatches are not ignored: they are listed below, with what else is wrong.
        model, info = getattr(transformers, kind).from_pretrained(
            str(folder), output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # a config can break the code of a model in any way
        if is_out_of_memory(error) or getattr(error, "errno", None):  # it's the machine's, not the folder's
            raise
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:_SHOWN_ERROR]}"
        raise ValueError(f"model folder {folder}: transformers cannot load what config.json says ({said})") from error
    loaded: PreTrainedModel = model
    problems = list(_load_problems(info, new_head))
    if problems:
        raise ValueError(
            f"model folder {folder}: the weights are not those of {type(model).__name__} as config.json describes it: "
            + "; ".join(problems)
            + ". transformers fills what is missing with random numbers, and drops what it does not know. Give the "
            "config.json and the weights of one model"
        )
    return loaded


def _load_problems(info: Mapping[str, Any], new_head: bool) -> Iterator[str]:
    missing = sorted(name for name in info["missing_keys"] if not (new_head and name.startswith("score.")))
    unexpected = sorted(name for name in info["unexpected_keys"] if not new_head and not _COMPUTED.search(name))
    others = sorted(f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in info["mismatched_keys"])
    if missing:
        yield f"{len(missing):,} tensors are missing ({shown(missing)})"
    if unexpected:
        yield f"{len(unexpected):,} are unexpected ({shown(unexpected)})"
    if others:
        yield f"{len(others):,} have another shape ({shown(others)})"


def check_architecture(folder: Path) -> dict[str, str]:
    """Raise ValueError unless a folder holds the tensors of the model that config.json describes, and no others.

    Returns:
        which tensors the model ties to which other ones.
    """
    # On torch's meta device tensors have a shape and no values: headers are read, nothing else.
    return dict(load_whole("AutoModelForCausalLM", folder, device_map="meta").all_tied_weights_keys)


def check_architecture_apart(folder: Path) -> str | None:
    """`check_architecture` in a process of its own (8 seconds, for torch); this one stays without torch.

    Returns:
        why the folder could not be checked; None where it was.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, str(folder)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode and lines and lines[-1].startswith(_FAULT):
        raise ValueError(lines[-1].removeprefix(_FAULT))
    if not done.returncode:
        return None
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1][:_SHOWN_ERROR]
    return f"{folder} was not compared with its config.json: the process for it ended with {done.returncode}: {said}"


def check_values(folder: Path) -> None:
    """Raise ValueError where a value is NaN or infinite, or where tensors differ that the model ties to each other.

    Includes `check_architecture`.
    """
    import torch
    from safetensors import safe_open

    tied = check_architecture(folder)
    problems, files = [], {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                files[name] = file
                if not _COMPUTED.search(name) and not torch.isfinite(tensors.get_tensor(name)).all():
                    problems.append(name)
    if problems:
        raise ValueError(
            f"model folder {folder}: NaN or infinite values in {len(problems):,} tensors ({shown(problems)}); copy the "
            "model again, or take an earlier checkpoint of it"
        )

    def values(name: str) -> torch.Tensor:
        with safe_open(files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    for one, other in tied.items():
        if one in files and other in files and not torch.equal(values(one), values(other)):
            raise ValueError(
                f"model folder {folder}: config.json ties {one} to {other}, and the two have different values; set "
                "tie_word_embeddings to false where the model has a head of its own, or remove the head"
            )


if __name__ == "__main__":
    try:
        check_architecture(Path(sys.argv[1]))
    except ValueError as error:
        print(_FAULT + " ".join(str(error).split()))
        sys.exit(1)
