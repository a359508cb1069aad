"""Stage `base_model`: the model that a recipe starts from: from the Hub, from a local folder, or trained here."""

from __future__ import annotations

import glob
import json
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from smoltulu.artifacts.keys import folder_records, records_digest
from smoltulu.schemas.models import BaseModelInputs, ModelOutputs, ModelSource
from smoltulu.tasks.data.rows import stored_rows, turn_text
from smoltulu.tasks.data.sources import expand_path
from smoltulu.tasks.models.folders import GENERATION_CONFIG, check_model_folder, set_pad_token
from smoltulu.tasks.models.sizes import WEIGHTS, WEIGHTS_INDEX, model_size, named_shards, weight_files
from smoltulu.tasks.models.weights import check_values
from smoltulu.tasks.stage import Stage, StageContext

logger = logging.getLogger("smoltulu")

#: What is taken of a model besides the shards that its index names: no pickles, no code, and no second copy of the
#: weights (consolidated.safetensors, original/, onnx/), which others could load.
_WANTED_FILES = (
    *("config.json", GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


def provide_base_model(
    config: ModelSource, inputs: BaseModelInputs, context: StageContext
) -> tuple[ModelOutputs, dict[str, float]]:
    """Put a checked model folder into the artifact.

    Raises:
        ValueError: no tokenizer, weights as pickles, weights that are not those of config.json, corrupt values, or a
            pad token that the tokenizer does not have.
    """
    target = context.folder / "model"
    metrics: dict[str, float] = {}
    if config.scratch is not None:
        from smoltulu.tasks.base_model.scratch import build_base_model

        metrics = build_base_model(config.scratch, _texts(inputs), target, context.report)
    elif config.path is not None:
        source = expand_path(config.path)
        check_model_folder(source)
        target.mkdir()
        shards = {file.name for file in weight_files(source)}
        for name in sorted({*_WANTED_FILES, *shards}):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        if (digest := context.externals.get("base_model")) is not None:
            _check_copy(source, target, digest)
    else:
        _download(config, target)
    check_model_folder(target)
    check_values(target)
    if config.pad_token is not None:
        set_pad_token(target, config.pad_token, inputs.chat_template)
    size = model_size(target).num_parameters
    logger.info("%s parameters", f"{size:,}")
    return ModelOutputs(num_parameters=size), metrics


def _download(config: ModelSource, target: Path) -> None:
    """The files of a Hub repository that make up the model: the index first, which names the shards."""
    from huggingface_hub import snapshot_download

    assert config.repository is not None
    download = partial(snapshot_download, config.repository, revision=config.revision, local_dir=target)
    download(allow_patterns=list(_WANTED_FILES))
    if (target / WEIGHTS_INDEX).exists():
        # A name is no pattern.
        download(allow_patterns=[glob.escape(name) for name in named_shards(target / WEIGHTS_INDEX)])
    shutil.rmtree(target / ".cache", ignore_errors=True)


def _check_copy(source: Path, target: Path, digest: str) -> None:
    """ValueError unless `target` has the files of `source` as they were when the key was made."""
    records, copied = folder_records(source), folder_records(target)
    if records_digest(records) != digest or any(records.get(name) != record for name, record in copied.items()):
        raise ValueError(
            f"base_model.path {source}: its files changed while the run went on, so they are not those that the key "
            "stands for; leave them alone while a run reads them, and run again"
        )


def _texts(inputs: BaseModelInputs) -> Iterator[str]:
    """Plain text to pre-train on: the world's, or the SFT conversations as the Tulu template writes them."""
    if inputs.world is not None:
        with (Path(inputs.world) / "pretrain.jsonl").open() as file:
            for line in file:
                yield json.loads(line)["text"]
        return
    if inputs.dataset is None:
        raise ValueError("base_model.scratch needs text: add a world block or data.sft")
    for row in stored_rows(Path(inputs.dataset)):
        yield "\n".join(f"<|{turn['role']}|>\n{turn_text(turn)}" for turn in row["messages"])


base_model = Stage("base_model", 1, ModelSource, BaseModelInputs, ModelOutputs, provide_base_model)
