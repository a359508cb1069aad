"""Sizes of model folders from the headers of their safetensors."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smoltulu.tasks.models.folders import check_model_folder
from smoltulu.tasks.models.sizes import ModelSize, model_size, tensor_shapes


def weights(file: Path, shapes: dict[str, list[int]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        count = 1
        for extent in shape:
            count *= extent
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def test_parameters_from_headers_and_shards(tmp_path: Path) -> None:
    weights(tmp_path / "model-1.safetensors", {"a": [3, 4], "b": [5]})
    weights(tmp_path / "model-2.safetensors", {"c": [2, 2], "scalar": []})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"only model-1.safetensors, model-2.safetensors, which no index names"):
        model_size(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors"}}))
    assert model_size(tmp_path) == ModelSize(
        num_parameters=12 + 5 + 4 + 1,
        num_tensors=4,
        other_bytes=2 + index.stat().st_size,
        num_matrices=2,
        matrix_sides=3 + 4 + 2 + 2,
    )
    assert tensor_shapes(tmp_path / "model-2.safetensors") == {"c": [2, 2], "scalar": []}
    # A left-over beside the shards that the index names is not part of the model.
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}))
    assert model_size(tmp_path).num_parameters == 17
    index.write_text(json.dumps({"weight_map": {"a": "model-9.safetensors"}}))
    with pytest.raises(ValueError, match=r"names files that are not in the folder: model-9.safetensors; copy"):
        model_size(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is no index of shards"):
        model_size(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 4) + b"[1,2",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 12) + b'{"a":{"x":1}}',
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}      ' + bytes(7),
    ],
)
def test_headers_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file .*copy the model again"):
        model_size(tmp_path)
    with pytest.raises(ValueError, match=r"config.json is missing; .*model.safetensors is not a whole"):
        check_model_folder(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no model.safetensors and no model.safetensors.index.json; save"):
        model_size(tmp_path)


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", {"a": [3, 4]})
    code = (
        "import sys; from pathlib import Path; from smoltulu.tasks.models.sizes import model_size; "
        "print(model_size(Path(sys.argv[1])).num_parameters, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["12", "False"]
