"""All stages, in the order in which a recipe runs them."""

from __future__ import annotations

from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.run import Makes
from smoltulu.schemas.training import RewardModelSettings
from smoltulu.tasks.base_model.stage import base_model
from smoltulu.tasks.contamination.index import benchmark_index
from smoltulu.tasks.contamination.stage import contamination
from smoltulu.tasks.data.mixture_stage import held_out_rows, mixture
from smoltulu.tasks.data.stage import dataset
from smoltulu.tasks.evaluation.cell import evaluation_cell
from smoltulu.tasks.evaluation.stage import evaluation
from smoltulu.tasks.languages.stage import languages
from smoltulu.tasks.near_duplicates.stage import near_duplicates
from smoltulu.tasks.preflight.stage import preflight_of
from smoltulu.tasks.publish.stage import publish
from smoltulu.tasks.sampled.rows import sampled_rows
from smoltulu.tasks.sampled.samples import samples
from smoltulu.tasks.sampled.scores import sample_scores
from smoltulu.tasks.selection.heads_stage import selection_heads
from smoltulu.tasks.selection.scores_stage import selection_scores
from smoltulu.tasks.selection.selection_stage import selection
from smoltulu.tasks.stage import Stage
from smoltulu.tasks.training.dpo import dpo
from smoltulu.tasks.training.reference_logps import reference_logps
from smoltulu.tasks.training.reward_model import reward_model
from smoltulu.tasks.training.rlvr import rlvr
from smoltulu.tasks.training.sft import sft
from smoltulu.tasks.verifier_audit.pass_rates import pass_rates
from smoltulu.tasks.verifier_audit.stage import verifier_audit
from smoltulu.tasks.world.stage import world

STAGES: dict[str, Stage] = {}
STAGES |= {
    stage.name: stage
    for stage in (
        world,
        dataset,
        benchmark_index,
        contamination,
        near_duplicates,
        mixture,
        held_out_rows,
        languages,
        base_model,
        samples,
        sample_scores,
        sampled_rows,
        selection_heads,
        selection_scores,
        selection,
        preflight_of(STAGES),  # read when it runs
        verifier_audit,
        sft,
        reward_model,
        reference_logps,
        dpo,
        pass_rates,
        rlvr,
        evaluation_cell,
        evaluation,
        publish,
    )
}


def made_by(name: str) -> Makes:
    """What a stage of this name makes; `other` for one that is not known here, as records of a run may name any."""
    stage = STAGES.get(name)
    if stage is not None and stage.makes(EvaluationOutputs):
        return "scores"
    if stage is None or not stage.makes(ModelOutputs):
        return "other"
    return "reward model" if issubclass(stage.config, RewardModelSettings) else "language model"
