"""The graph of `smoltulu audit --compare A B`: rows of both sets, and the near-duplicates of each in the other.

Of one set alone: the near-duplicates among its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smoltulu.flows.graphs.audit_graph import AuditedData, audited_data
from smoltulu.flows.graphs.nodes import Binding, Node, NodeGraph, local_digests
from smoltulu.flows.recipe import check_compute
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.audit import AuditSettings
from smoltulu.schemas.data import DataSet, DatasetStageConfig
from smoltulu.schemas.near_duplicates import NearDuplicateOutputs, NearDuplicateRules, NearDuplicateStageConfig
from smoltulu.tasks.stages import STAGES

#: What the other set is called in the results.
OTHER = "the other set"


class CompareGraph(NodeGraph):
    """The nodes of a comparison. Attributes: data, the one or two sets."""

    def __init__(self, data: Sequence[str], settings: AuditSettings, rules: NearDuplicateRules) -> None:
        """Find the sets, detect the formats of their rows, add the nodes. ValueError as `AuditGraph`."""
        super().__init__("audit-compare", settings.compute)
        check_compute(settings.compute)
        if len(data) not in (1, 2):
            raise ValueError(f"--compare takes two data sets, A and B, or one for its own rows; given: {len(data)}")
        self.data = audited_data(data, settings)
        for audited in self.data:
            rows = DatasetStageConfig(
                kind=audited.detected.kind, data=DataSet(sources=(audited.source,), max_malformed_share=1.0)
            )
            self.add(Node(_rows(audited), STAGES["dataset"], rows, externals=local_digests([audited.source])))
        alone = len(data) == 1
        for audited, other in zip(self.data, self.data[::-1], strict=True):
            config = NearDuplicateStageConfig(kind=audited.detected.kind, within=alone, settings=rules)
            inputs: dict[str, Any] = {"dataset": Binding(_rows(audited), "file")}
            if not alone:
                inputs["others"] = {OTHER: Binding(_rows(other), "file")}
            self.add(Node(f"near-duplicates-{audited.name}", STAGES["near_duplicates"], config, inputs=inputs))

    def results(
        self, references: Mapping[str, ArtifactReference]
    ) -> list[tuple[AuditedData, NearDuplicateOutputs, str]]:
        """(set, its rows that are nearly the same as another, folder), for each."""
        made = []
        for audited in self.data:
            reference = references[f"near-duplicates-{audited.name}"]
            made.append((audited, NearDuplicateOutputs.model_validate(reference.outputs), reference.path))
        return made


def _rows(audited: AuditedData) -> str:
    return f"dataset-{audited.name}"
