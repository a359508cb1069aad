"""A node is refused where it binds what is not there, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from smoltulu.flows.graphs.audit_graph import AuditGraph
from smoltulu.flows.graphs.nodes import Binding, Node, NodeGraph
from smoltulu.schemas.audit import AuditSettings
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.models import ModelSource
from smoltulu.schemas.training import SFTSettings
from smoltulu.tasks.stages import STAGES

SFT = SFTSettings(learning_rate=1e-5, effective_batch_size=8, max_length=64)
TEMPLATE = {"chat_template": ""}


def graph() -> NodeGraph:
    """A base model, whose outputs are folder, num_parameters, num_steps, num_tokens and history_file."""
    made = NodeGraph("test", ComputeSettings())
    made.add(Node("base-model", STAGES["base_model"], ModelSource(repository="owner/name")))
    return made


@pytest.mark.parametrize(
    ("inputs", "literals", "message"),
    [
        (
            {"model": Binding("base-model", "weights"), "dataset": Binding("base-model")},
            TEMPLATE,
            r"sft: its input model is bound to base-model\.weights, and the outputs of stage base_model are folder, "
            ".*; bind it to one of these",
        ),
        (
            {"model": Binding("base-model", "folder"), "dataset": Binding("rows", "file")},
            TEMPLATE,
            "sft: its input dataset is bound to rows, which is no node before it",
        ),
        (
            {"model": Binding("base-model", "folder")},
            TEMPLATE,
            r"sft: has the inputs \['chat_template', 'model'\]; stage sft needs \['chat_template', 'dataset', ",
        ),
        (
            {"model": Binding("base-model"), "dataset": Binding("base-model"), "judge": Binding("base-model")},
            TEMPLATE,
            "'judge', 'model'.; stage sft needs .* and takes",
        ),
        (
            {"model": Binding("base-model"), "dataset": {"two": Binding("base-model", "no")}},
            TEMPLATE,
            r"sft: its input dataset\.two is bound to base-model\.no",
        ),
    ],
)  # fmt: skip
def test_a_node_that_binds_what_is_not_there_is_refused(
    inputs: dict[str, Any], literals: dict[str, str], message: str
) -> None:
    made = graph()
    with pytest.raises(ValueError, match=message):
        made.add(Node("sft", STAGES["sft"], SFT, inputs=inputs, literals=literals))
    assert list(made.nodes) == ["base-model"]


def test_what_is_there_is_taken() -> None:
    made = graph()
    inputs = {"model": Binding("base-model", "folder"), "dataset": Binding("base-model", "history_file")}
    assert made.add(Node("sft", STAGES["sft"], SFT, inputs=inputs, literals=TEMPLATE)) == "sft"
    assert list(made.nodes) == ["base-model", "sft"]


def test_an_audit_with_an_exception_for_no_stage_is_refused() -> None:
    compute = ComputeSettings.model_validate({"stages": {"contaminations": {"num_threads": 2}}})
    with pytest.raises(ValueError, match=r"no stage is called 'contaminations' .did you mean 'contamination'"):
        AuditGraph(["rows.jsonl"], AuditSettings(compute=compute))
