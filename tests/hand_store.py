"""Artifacts written by hand in the layout of the store, without its waiting for the disk: for tests of many."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from smoltulu.artifacts.checkpoints import mark_complete
from smoltulu.artifacts.keys import artifact_key, canonical_json, folder_records, records_digest, with_checksum
from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.schemas.artifact import ExtendedTraining, InputRecord, Manifest, Spec
from smoltulu.schemas.nightly import MeasuredModel, Pin, Pins, Told
from smoltulu.schemas.run import RunRecord, TagRecord

DAY = 86_400.0


class HandStore:
    """A store whose artifacts have a name, which makes their key."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.manifests: dict[Ref, Manifest] = {}

    @property
    def catalogue(self) -> Catalogue:
        """A fresh look."""
        return Catalogue(self.root)

    def spec(self, stage: str, name: str, inputs: dict[str, Ref], **config: Any) -> Spec:
        keys = {binding: ref.key for binding, ref in inputs.items() if "." not in binding}
        for binding, ref in inputs.items():
            if "." in binding:
                outer, inner = binding.split(".")
                keys.setdefault(outer, {})[inner] = ref.key  # type: ignore[attr-defined,arg-type]
        return Spec(stage=stage, version=1, config={"name": name, **config}, inputs=keys, externals={})

    def begin(self, stage: str, name: str, inputs: dict[str, Ref] | None = None, **config: Any) -> Ref:
        """A key whose producer has written its spec and nothing else."""
        spec = self.spec(stage, name, inputs or {}, **config)
        ref = Ref(stage, artifact_key(spec))
        folder = self.folder(ref)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec.json").write_text(canonical_json(spec.model_dump()))
        (folder / "lock").touch()
        (folder / "writer").touch()
        return ref

    def make(
        self,
        stage: str,
        name: str,
        inputs: dict[str, Ref] | None = None,
        *,
        content: str = "",
        outputs: dict[str, Any] | None = None,
        files: dict[str, str] | None = None,
        days_ago: float = 100.0,
        taken: dict[str, str] | None = None,
        extends: ExtendedTraining | None = None,
        **config: Any,
    ) -> Ref:
        """A finished artifact; a second one of the same name is its next generation.

        `taken` says with which digest an input was taken, where that is not its present one.
        """
        inputs = inputs or {}
        ref = self.begin(stage, name, inputs, **config)
        number = len(list(self.folder(ref).glob("*gen-[0-9]*"))) + 1
        generation = self.folder(ref) / f"gen-{number:04d}"
        generation.mkdir()
        for file, text in (files or {"data.txt": f"{stage} {name} {content}\n"}).items():
            (generation / file).parent.mkdir(parents=True, exist_ok=True)
            (generation / file).write_text(text)
        records = folder_records(generation)
        manifest = Manifest(
            key=ref.key,
            spec=self.spec(stage, name, inputs, **config),
            digest=records_digest(records),
            inputs={
                binding: InputRecord(
                    stage=upstream.stage,
                    key=upstream.key,
                    digest=(taken or {}).get(binding) or self.manifests[upstream].digest,
                )
                for binding, upstream in inputs.items()
            },
            outputs=outputs or {},
            metrics={"loss": 1.5} if stage in ("sft", "dpo") else {},
            files=records,
            environment={"packages": {"torch": "2.13.0"}, "git_commit": "c0ffee"},
            node=name,
            started_at="2026-10-01T08:00:00+00:00",
            finished_at="2026-10-01T09:00:00+00:00",
            duration_seconds=3600.0,
            extends=extends,
        )
        manifest = with_checksum(manifest)
        (generation / "manifest.json").write_text(manifest.model_dump_json(indent=1))
        (self.folder(ref) / "current").write_text(generation.name)
        self.manifests[ref] = manifest
        self.age(ref, days_ago)
        return ref

    def evaluate(self, model: Ref, value: float, **options: Any) -> Ref:
        """An evaluation of a language model with one score."""
        score = {"task": "gsm8k", "metric": "exact_match,strict", "value": value, "stderr": 0.01, "num_samples": 100}
        return self.make(
            "evaluation",
            f"evaluation-{model.stage}",
            {"model": model},
            outputs={"subject": model.stage, "scores": [score]},
            subject=model.stage,
            kind="language_model",
            **options,
        )

    def age(self, ref: Ref, days_ago: float) -> None:
        """Everything of a key was last changed, and used, so long ago."""
        moment = time.time() - days_ago * DAY
        for path in [*self.folder(ref).rglob("*"), self.folder(ref)]:
            os.utime(path, (moment, moment))

    def checkpoint(self, ref: Ref, step: int = 10, days_ago: float = 100.0) -> Path:
        """A trainer's checkpoint in the key's work folder."""
        folder = self.folder(ref) / "work" / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.bin").write_text("weights" * 100)
        (folder / "trainer_state.json").write_text(json.dumps({"max_steps": 40}))
        mark_complete(folder)
        (self.folder(ref) / "work" / "generation").write_text(self.catalogue.folder(ref).next_generation)
        self.age(ref, days_ago)
        return folder

    def run(self, name: str, nodes: dict[str, Ref], **changes: Any) -> RunRecord:
        """A record of a run of these artifacts."""
        fields = {
            "run_name": name,
            "recipe": "by-hand",
            "state": "Completed",
            "started_at": "2026-10-01T08:00:00+00:00",
            "finished_at": "2026-10-01T08:30:00+00:00",
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "stages": {node: ref.stage for node, ref in nodes.items()},
            "keys": {node: ref.key for node, ref in nodes.items()},
            "outcomes": {node: "Completed" for node in nodes},
        }
        record = RunRecord.model_validate({**fields, **changes})
        (self.root / "runs").mkdir(exist_ok=True)
        (self.root / "runs" / f"{name}.json").write_text(record.model_dump_json())
        return record

    def tag(self, name: str, ref: Ref) -> None:
        (self.root / "tags").mkdir(exist_ok=True)
        record = TagRecord(stage=ref.stage, key=ref.key, tagged_at="2026-10-01T08:00:00+00:00")
        (self.root / "tags" / f"{name}.json").write_text(record.model_dump_json())

    def pin(self, node: str, ref: Ref) -> None:
        """The baseline of an evaluation, which a night told of as well."""
        folder = self.root / "history" / "by-hand"
        folder.mkdir(parents=True, exist_ok=True)
        manifest = self.manifests[ref]
        measured = MeasuredModel(
            stage=ref.stage,
            key=ref.key,
            generation=(self.folder(ref) / "current").read_text(),
            digest=manifest.digest,
            model_digest=manifest.inputs["model"].digest,
        )
        at = "2026-10-01T08:00:00+00:00"
        pin = Pin(node=node, measured=measured, named=ref.key, pinned_by="me@here", pinned_at=at)
        (folder / "pins.json").write_text(Pins(pins=(pin,)).model_dump_json())
        (folder / "told.json").write_text(Told(evaluations=(measured,)).model_dump_json())

    def folder(self, ref: Ref) -> Path:
        return self.root / ref.stage / ref.key

    def finished(self) -> set[Ref]:
        """Artifacts whose pointer names a generation with its manifest."""
        return {
            Ref(path.parent.parent.name, path.parent.name)
            for path in self.root.glob("*/*/current")
            if (path.parent / path.read_text() / "manifest.json").exists()
        }


def pipeline(store: HandStore) -> dict[str, Ref]:
    """A small experiment: data, base model, SFT, DPO, evaluations, publication."""
    source = {"repository": "allenai/tulu", "revision": "a" * 40, "subset": None, "split": "train"}
    rows = store.make("dataset", "dataset-sft", data={"sources": [source]})
    base = store.make("base_model", "base-model", repository="org/base", revision="b" * 40)
    sft = store.make("sft", "sft", {"model": base, "dataset": rows})
    dpo = store.make("dpo", "dpo", {"model": sft, "dataset": rows})
    scored_sft, scored_dpo = store.evaluate(sft, 0.25), store.evaluate(dpo, 0.5)
    published = store.make(
        "publish",
        "publish",
        {
            "model": dpo,
            "evaluations.evaluation-dpo": scored_dpo,
            **{f"lineage.{ref.stage}": ref for ref in (rows, base, sft, dpo)},
        },
    )
    return {
        "dataset-sft": rows,
        "base-model": base,
        "sft": sft,
        "evaluation-sft": scored_sft,
        "dpo": dpo,
        "evaluation-dpo": scored_dpo,
        "publish": published,
    }
