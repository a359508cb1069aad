"""Stage `publish`: make a folder to push, with the evaluated weights, tokenizer, template, card and recipe."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from smoltulu.artifacts.keys import file_digest
from smoltulu.artifacts.layout import MANIFEST
from smoltulu.artifacts.readable import json_text
from smoltulu.artifacts.secrets import known_secrets
from smoltulu.artifacts.store import read_manifest
from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.preflight import PreflightOutputs
from smoltulu.schemas.publish import PublishInputs, PublishOutputs, PublishStageConfig
from smoltulu.tasks.models.folders import check_model_folder
from smoltulu.tasks.models.tokens import tokenisation
from smoltulu.tasks.publish.model_card import find_private, lineage_records, model_card, score_records, without_paths
from smoltulu.tasks.stage import Stage, StageContext

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")
# By name, so that what a trainer leaves behind (training_args.bin is a pickle) stays behind.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_NEEDED = {
    "generation_config.json": "save it with the model, or generation would not know where to stop",
    "tokenizer_config.json": "save the tokenizer beside the model",
    "chat_template.jinja": "set tokenizer.chat_template before saving",
}
#: Of a safetensors file, as the format has it.
_MAX_HEADER_BYTES = 100_000_000
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def build_publication(
    config: PublishStageConfig, inputs: PublishInputs, context: StageContext
) -> tuple[PublishOutputs, dict[str, float]]:
    """Copy the model, check that it is the one that was evaluated, write card, recipe, lineage and scores.

    Raises:
        ValueError: the folder is no model, holds pickled weights, lacks what a user needs, its weights are not those
            that the store recorded or the evaluations measured, or a text holds a local folder or a secret.
    """
    source = Path(inputs.model)
    _check_publishable(source)
    # In the order of the graph, which is that of the stages.
    lineage = {node: read_manifest(Path(folder)) for node, folder in inputs.lineage.items()}
    evaluated = {node: read_manifest(Path(folder)) for node, folder in inputs.evaluations.items()}
    evaluations = {node: EvaluationOutputs.model_validate(manifest.outputs) for node, manifest in evaluated.items()}
    _check_evaluated(config.subject, lineage, evaluated, evaluations)
    _check_recorded(source)

    target = context.folder / "model"
    target.mkdir(parents=True)
    files = [path for path in sorted(source.iterdir()) if path.name in _MODEL_FILES or _is_weight(path)]
    for step, path in enumerate(files, 1):
        shutil.copyfile(path, target / path.name)
        context.report(step, len(files))
    digest = model_digest(target)
    if digest != model_digest(source):
        raise RuntimeError(f"weights changed while they were copied to {target}; check the disk and run again")

    _check_tokens(target, lineage)

    recipe_yaml = yaml.safe_dump(without_paths(config.recipe), sort_keys=False, allow_unicode=True, width=120)
    documents = {
        "README.md": model_card(config, lineage, evaluations, recipe_yaml, digest),
        "recipe.yaml": recipe_yaml,
        "lineage.json": _json(lineage_records(lineage)),
        "scores.json": _json(score_records(evaluations)),
    }
    # Folders that are in the inputs anyway.
    folders = [inputs.model, *inputs.evaluations.values(), *inputs.lineage.values(), str(context.folder)]
    home = str(Path.home())
    _check_nothing_private(documents, target, [*folders, home if len(home) > 5 else ""])
    for name, text in documents.items():
        (target / name).write_text(text, encoding="utf-8")
    num_bytes = sum(path.stat().st_size for path in target.iterdir())
    return PublishOutputs(folder="model", model_digest=digest), {"num_bytes": float(num_bytes)}


def _check_tokens(folder: Path, lineage: Mapping[str, Manifest]) -> None:
    """Whoever loads the published model must get the tokens, and stop at the tokens, that it was trained with."""
    from transformers import AutoTokenizer

    preflights = {
        node: PreflightOutputs.model_validate(manifest.outputs).tokenizer
        for node, manifest in lineage.items()
        if manifest.spec.stage == "preflight"
    }
    # Those of older versions say nothing of it.
    facts = {node: found for node, found in preflights.items() if found is not None and found.tokenisation is not None}
    if not facts:
        return
    published = tokenisation(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False))
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    ends = set(generation if isinstance(generation, list) else [generation])
    for node, found in facts.items():
        if found.tokenisation != published:
            raise ValueError(
                f"the model's tokenizer and chat template give a conversation other tokens than {node}, on whose rows "
                "it was trained: another version of transformers or tokenizers, or changed files. Make the rows again "
                "(refresh preflight)"
            )
        if missing := sorted(set(found.stop_token_ids) - ends):
            raise ValueError(
                f"generation_config.json does not stop at the tokens {missing}, which end an answer in {node}; add "
                "them to its eos_token_id"
            )


def model_digest(folder: Path) -> str:
    """SHA-256 over names and contents of the weight files: equal for equal weights, whatever lies beside them."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if _is_weight(path):
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def _is_weight(path: Path) -> bool:
    return path.is_file() and path.name.endswith(_WEIGHT_SUFFIXES)


def _check_publishable(folder: Path) -> None:
    check_model_folder(folder)
    pickles = [path.name for path in folder.iterdir() if path.suffix in _PICKLES and path.name != "training_args.bin"]
    if pickles:
        raise ValueError(
            f"the model folder holds pickles ({', '.join(sorted(pickles))}), which can run code where they are loaded: "
            "convert them to safetensors and remove them"
        )
    for name, remedy in _NEEDED.items():
        if not (folder / name).is_file():
            raise ValueError(f"the model folder has no {name}: {remedy}")


def _check_recorded(model: Path) -> None:
    """Every file must have the digest that the store recorded when its stage finished."""
    if not (model.parent / MANIFEST).is_file():
        return  # a base model from the Hub or a local folder
    recorded = read_manifest(model.parent).files
    for path in sorted(model.iterdir()):
        record = recorded.get(f"{model.name}/{path.name}")
        if record is None or record.blake3 != file_digest(path):
            raise ValueError(
                f"{path.name} is not what its artifact's manifest recorded: the file was changed or damaged. "
                "Make the stage again (refresh) before publishing"
            )


def _check_evaluated(
    subject: str,
    lineage: dict[str, Manifest],
    evaluated: dict[str, Manifest],
    evaluations: dict[str, EvaluationOutputs],
) -> None:
    """The evaluations of the subject must have measured this content, not an earlier one of the same key."""
    made = [manifest for manifest in lineage.values() if manifest.spec.stage == subject]
    if len(made) != 1:
        return  # nothing recorded, or a stage that ran more than once: the flow's keys already bind them
    for node, outputs in evaluations.items():
        record = evaluated[node].inputs.get("model")
        if outputs.subject == subject and record is not None and record.digest != made[0].digest:
            raise ValueError(
                f"{node} measured another making of {subject} ({record.digest[:12]}) than the one to be published "
                f"({made[0].digest[:12]}); run the evaluation again"
            )


def _check_nothing_private(documents: dict[str, str], copied: Path, folders: list[str]) -> None:
    """Refuse a publication where what we write, or a file that is copied, names a local folder or holds a secret."""
    secrets = known_secrets()
    texts = chain(documents.items(), ((path.name, _text_of(path)) for path in sorted(copied.iterdir())))
    for name, text in texts:
        if (private := find_private(text, folders, secrets)) is not None:
            what = "a local folder" if private in folders else f"a secret ({secrets.get(private, 'by its form')})"
            where = "the recipe's text fields, e.g. description" if name in documents else "the base model"
            raise ValueError(f"{name} would publish {what}, not shown here; look for it in {where}, and take it out")


def _text_of(path: Path) -> str:
    """What is readable in a file of a publication: all of it; of weights, the header with their metadata."""
    if not path.name.endswith(".safetensors"):
        return path.read_text(encoding="utf-8", errors="replace")
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        return file.read(min(num_bytes, _MAX_HEADER_BYTES)).decode(errors="replace")


def _json(value: Any) -> str:
    return json_text(value, indent=2) + "\n"


publish = Stage(
    name="publish",
    version=1,
    config=PublishStageConfig,
    inputs=PublishInputs,
    outputs=PublishOutputs,
    function=build_publication,
    copies_model=True,
)
