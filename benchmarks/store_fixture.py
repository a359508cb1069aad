"""A synthetic store of any size, in the real layout: for measuring how commands grow with the number of artifacts."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from smoltulu.artifacts.keys import artifact_key, canonical_json, records_digest, with_checksum
from smoltulu.schemas.artifact import FileRecord, InputRecord, Manifest, Spec
from smoltulu.schemas.run import RunRecord

_BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
_ENVIRONMENT = {
    "packages": {name: "1.2.3" for name in ("torch", "transformers", "trl", "datasets", "accelerate", "pydantic")},
    "python": "3.11.7",
    "platform": "synthetic",
    "num_cpus": 2,
    "git_commit": "0" * 40,
    "git_dirty": False,
}
#: node -> stage, inputs by name, whether each experiment has its own (the others belong to a group of ten experiments).
_NODES: dict[str, tuple[str, dict[str, str], bool]] = {
    "dataset-sft": ("dataset", {}, False),
    "dataset-preference": ("dataset", {}, False),
    "dataset-rlvr": ("dataset", {}, False),
    "contamination-sft": ("contamination", {"dataset": "dataset-sft"}, False),
    "base-model": ("base_model", {}, False),
    "evaluation-base-model": ("evaluation", {"model": "base-model"}, False),
    "sft": ("sft", {"model": "base-model", "dataset": "contamination-sft"}, True),
    "evaluation-sft": ("evaluation", {"model": "sft"}, True),
    "reward-model": ("reward_model", {"model": "sft", "dataset": "dataset-preference"}, True),
    "dpo": ("dpo", {"model": "sft", "dataset": "dataset-preference"}, True),
    "evaluation-dpo": ("evaluation", {"model": "dpo"}, True),
    "rlvr": ("rlvr", {"model": "dpo", "dataset": "dataset-rlvr"}, True),
    "evaluation-rlvr": ("evaluation", {"model": "rlvr"}, True),
}


def make_store(root: Path, num_artifacts: int) -> list[Spec]:
    """Fill `root` with exactly `num_artifacts` finished artifacts of some kilobytes, and the runs that made them.

    Returns the specs in the order of making.
    """
    specs: list[Spec] = []
    digests: dict[str, str] = {}
    experiment = 0
    while len(specs) < num_artifacts:
        keys: dict[str, str] = {}
        started = _BEGIN + timedelta(minutes=30 * experiment)
        outcomes = {}
        for node, (stage, inputs, is_own) in _NODES.items():
            spec = Spec(
                stage=stage,
                version=1,
                config=_config(node, stage, experiment if is_own else experiment // 10),
                inputs={name: keys[upstream] for name, upstream in inputs.items()},
                externals={"chat_template": "ab" * 32} if stage in ("sft", "dpo", "rlvr", "evaluation") else {},
            )
            keys[node] = key = artifact_key(spec)
            outcomes[node] = "Cached" if key in digests else "Completed"
            if key not in digests and len(specs) < num_artifacts:
                records = {
                    name: InputRecord(stage=_NODES[upstream][0], key=keys[upstream], digest=digests[keys[upstream]])
                    for name, upstream in inputs.items()
                }
                digests[key] = _write_artifact(root, spec, key, node, records, started)
                specs.append(spec)
        run = RunRecord(
            run_name=f"synthetic-{experiment:05d}",
            recipe="synthetic",
            state="Completed",
            started_at=started.isoformat(timespec="seconds"),
            finished_at=(started + timedelta(minutes=25)).isoformat(timespec="seconds"),
            host="synthetic",
            pid=1,
            stages={node: stage for node, (stage, _, _) in _NODES.items()},
            keys=keys,
            outcomes=outcomes,
        )
        (root / "runs").mkdir(parents=True, exist_ok=True)
        (root / "runs" / f"{run.run_name}.json").write_text(run.model_dump_json(indent=1))
        experiment += 1
    return specs


def _config(node: str, stage: str, number: int) -> dict[str, object]:
    """A config of about the size of a real one; `number` makes it another experiment."""
    if stage == "dataset":
        source = {"repository": f"synthetic/{node}", "revision": f"{number:040x}", "subset": None, "split": "train"}
        return {"kind": node.removeprefix("dataset-"), "data": {"sources": [source], "max_malformed_share": 0.01}}
    if stage == "evaluation":
        settings = {"tasks": [{"name": "gsm8k", "metric": "exact_match", "num_fewshot": 8}], "max_length": 2048}
        return {"kind": "language_model", "subject": node.removeprefix("evaluation-"), "settings": settings}
    fields = {f"setting_{position}": position / 10 for position in range(20)}
    return {"learning_rate": 1e-6 * (number + 1), "effective_batch_size": 64, "seed": 0, **fields}


def _write_artifact(
    root: Path, spec: Spec, key: str, node: str, inputs: dict[str, InputRecord], started: datetime
) -> str:
    """One artifact as the store lays it out, without its fsyncs; returns its content digest."""
    from blake3 import blake3

    folder = root / spec.stage / key
    generation = folder / "gen-0001"
    generation.mkdir(parents=True)
    contents = {name: f"{name} of {key}\n".encode() * 20 for name in ("model.safetensors", "config.json", "rows.jsonl")}
    files = {}
    for name, content in contents.items():
        (generation / name).write_bytes(content)
        files[name] = FileRecord(size=len(content), blake3=blake3(content).hexdigest())
    outputs: dict[str, object] = {"folder": "."}
    if spec.stage == "evaluation":
        value = int(key[:4], 16) / 65_536
        score = {"task": "gsm8k", "metric": "exact_match", "value": value, "stderr": 0.01, "num_samples": 1319}
        outputs = {"subject": spec.config["subject"], "scores": [score], "samples_file": "rows.jsonl"}
    manifest = Manifest(
        key=key,
        spec=spec,
        digest=records_digest(files),
        inputs=inputs,
        outputs=outputs,
        metrics={"loss": 1.25},
        files=files,
        environment=_ENVIRONMENT,
        compute={f"machinery_{position}": position for position in range(20)},
        node=node,
        started_at=started.isoformat(timespec="seconds"),
        finished_at=(started + timedelta(minutes=2)).isoformat(timespec="seconds"),
        duration_seconds=120.0,
    )
    (generation / "manifest.json").write_text(with_checksum(manifest).model_dump_json(indent=1))
    (folder / "spec.json").write_text(canonical_json(spec.model_dump()))
    (folder / "lock").write_text(json.dumps({"pid": 1, "host": "synthetic", "since": 0.0}))
    (folder / "writer").touch()
    (folder / "current").write_text(generation.name)
    used = started.timestamp()
    os.utime(folder / "current", (used, used))
    return manifest.digest


if __name__ == "__main__":
    made = make_store(Path(sys.argv[1]), int(sys.argv[2]))
    print(f"{len(made)} artifacts in {sys.argv[1]}")
