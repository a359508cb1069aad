"""All stages, in the order in which a recipe runs them."""

from __future__ import annotations

from tasks.base import base_model
from tasks.contamination import contamination
from tasks.contamination_index import benchmark_index
from tasks.dataset import dataset
from tasks.dpo import dpo
from tasks.evaluation import evaluation
from tasks.languages import languages
from tasks.preflight import preflight
from tasks.publish import publish
from tasks.reference_logps import reference_logps
from tasks.reward_model import reward_model
from tasks.rlvr import rlvr
from tasks.sft import sft
from tasks.stage import Stage
from tasks.world.stage import world

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        world,
        dataset,
        benchmark_index,
        contamination,
        languages,
        base_model,
        preflight,
        sft,
        reward_model,
        reference_logps,
        dpo,
        rlvr,
        evaluation,
        publish,
    )
}
