"""The keys of every node of every preset, pinned in golden_keys.json: a change of identity is seen in review.

A changed key means that whoever runs the preset makes that stage, and all that is built on it, again. Where that is
meant (a stage's version was raised, a preset changed), write the file anew and look at its diff:

    python -m tests.golden_keys --write

The file holds the key of every node, and once for every key the flat fields that it is made of. Revisions on the Hub
stand for made-up commits, local data and models for made-up files, so that neither network nor data are needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from smoltulu.artifacts.nearest import differences, flat
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import load_recipe, preset_names
from smoltulu.tasks.data.hub import Reference
from smoltulu.tasks.data.sources import expand_path

FILE = Path(__file__).with_suffix(".json")
_FOLDERS = ("SMOLTULU_REAL_DATA", "SMOLTULU_REAL_MODEL")


def made_up_commit(reference: Reference) -> str:
    """A commit for every name."""
    return hashlib.sha1("/".join(reference).encode()).hexdigest()


def made_up_model(folder: Path) -> None:
    """A model folder of a few bytes: one layer of zeros."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    sizes = {
        "vocab_size": 8,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True, **sizes}))
    layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    names = {f"model.layers.0.{name}.weight": (4, 4) for name in layer} | {"model.embed_tokens.weight": (8, 4)}
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    shapes = names | {f"model.{name}.weight": (4,) for name in norms}
    (folder / "tokenizer.json").write_text("{}")
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")


def golden_keys() -> dict[str, Any]:
    """{"keys": preset -> node -> key, "specs": key -> flat fields}, of the code as it is now."""
    keys: dict[str, dict[str, str]] = {}
    specs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, dict.fromkeys(_FOLDERS, folder)):
        made_up_model(Path(folder) / "model")
        for preset in preset_names():
            recipe = load_recipe(preset)
            for source in recipe.data_sources():
                if source.path is not None:
                    file = expand_path(source.path)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(file.name)
            graph = Graph(recipe, resolve=made_up_commit)
            keys[preset] = graph.keys()
            specs |= {graph.key(name): flat(graph.spec(name).model_dump()) for name in graph.nodes}
    return {"keys": keys, "specs": specs}


def compare(pinned: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed, a line for each node: its own fields old -> new. Inputs that follow from others are left out."""
    lines = []
    for preset in sorted(pinned["keys"].keys() | now["keys"].keys()):
        before, after = pinned["keys"].get(preset, {}), now["keys"].get(preset, {})
        lines += [f"{preset}: node {name} is new" for name in after if name not in before]
        lines += [f"{preset}: node {name} is gone" for name in before if name not in after]
        for name in before:
            if name in after and before[name] != after[name]:
                changes = differences(pinned["specs"][before[name]], now["specs"][after[name]])
                # Only what changed here: a new key of an input is that of the node above.
                own = {field: change for field, change in changes.items() if not _follows(field, *change)}
                lines += [f"{preset}: {name}: {field}: {old!r} -> {new!r}" for field, (old, new) in own.items()]
                if not changes:
                    lines.append(f"{preset}: {name}: the same fields have another key")
    return lines


def _follows(field: str, old: object, new: object) -> bool:
    return field.startswith("inputs.") and old is not None and new is not None


def main(arguments: list[str]) -> int:
    """Write the file, or say what differs from it."""
    now = golden_keys()
    if arguments == ["--write"]:
        FILE.write_text(json.dumps(now, indent=1) + "\n")
        print(f"{FILE}: {sum(map(len, now['keys'].values()))} nodes of {len(now['keys'])} presets")
        return 0
    lines = compare(json.loads(FILE.read_text()), now)
    print("\n".join(lines) or "as pinned")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
