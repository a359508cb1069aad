"""A recipe: one YAML file is one experiment."""

from __future__ import annotations

from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from smoltulu.schemas.common import StageName, StrictModel, machinery, science
from smoltulu.schemas.compute import ComputeSettings, accumulation_steps
from smoltulu.schemas.contamination import ContaminationSettings
from smoltulu.schemas.data import DataSet, DataSettings, DataSource
from smoltulu.schemas.evaluation import EvaluationSettings
from smoltulu.schemas.models import ModelSource
from smoltulu.schemas.preflight import PreflightSettings
from smoltulu.schemas.publish import PublishSettings
from smoltulu.schemas.training import DPOSettings, RewardModelSettings, RLVRSettings, SFTSettings
from smoltulu.schemas.world import WorldConfig

#: The stages a user can name in `until` and `refresh`, in the order in which they run.
STAGE_ORDER: tuple[str, ...] = get_args(StageName)


class Recipe(StrictModel):
    """Everything that makes an experiment; a stage without a block is left out."""

    name: str = machinery(pattern=r"^[a-z0-9][a-z0-9-]*$", description="used in run names and reports")
    description: str = machinery("")
    world: WorldConfig | None = science(None, description="synthetic data made in code (recipe `tiny`)")
    base_model: ModelSource = science()
    chat_template: str = science(
        "tulu", description="shipped template (recipes/chat_templates/) or path of a .jinja file"
    )
    data: DataSettings = science()
    contamination: ContaminationSettings | None = science(None)
    preflight: PreflightSettings = machinery(PreflightSettings())
    sft: SFTSettings | None = science(None)
    reward_model: RewardModelSettings | None = science(None)
    dpo: DPOSettings | None = science(None)
    rlvr: RLVRSettings | None = science(None)
    evaluation: EvaluationSettings | None = science(None)
    publish: PublishSettings | None = science(None)
    compute: ComputeSettings = machinery(ComputeSettings())

    @model_validator(mode="after")
    def _stages_have_what_they_need(self) -> Self:
        problems = []
        for block, needs in (("sft", "sft"), ("reward_model", "preference"), ("dpo", "preference"), ("rlvr", "rlvr")):
            if getattr(self, block) is not None and getattr(self.data, needs) is None:
                problems.append(f"{block}: needs data.{needs}; add it or remove the {block} block")
        for block in ("reward_model", "dpo", "rlvr"):
            if getattr(self, block) is not None and self.sft is None:
                problems.append(f"{block}: starts from the SFT model; add an sft block")
        if self.reward_model and self.reward_model.start_from == "dpo" and self.dpo is None:
            problems.append("reward_model.start_from: dpo needs a dpo block; add it or set start_from to sft")
        if self.evaluation and self.evaluation.sampled and self.data.verified_eval is None:
            problems.append("evaluation.sampled: needs data.verified_eval")
        for block in ("sft", "reward_model", "dpo", "rlvr"):
            if (settings := getattr(self, block)) is not None:
                try:
                    accumulation_steps(settings.effective_batch_size, self.compute.of(block))
                except ValueError as error:
                    problems.append(f"{block}: {error}")
        if self.world is None:
            problems += [
                f"data source {source.generated!r}: generated data needs a world block"
                for source in self.data_sources()
                if source.generated
            ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def stage_order(self) -> tuple[str, ...]:
        """The stages in the order in which this recipe runs them: a reward model may start from DPO."""
        if self.reward_model is None or self.reward_model.start_from != "dpo":
            return STAGE_ORDER
        order = [stage for stage in STAGE_ORDER if stage != "reward_model"]
        return (*order[: order.index("dpo") + 1], "reward_model", *order[order.index("dpo") + 1 :])

    def data_sources(self) -> list[DataSource]:
        """Every data source that the recipe names: training, held-out, audit, benchmarks, evaluation files."""
        sets: list[DataSet | None] = [getattr(self.data, name) for name in DataSettings.model_fields]
        sources = []
        if self.contamination:
            sets.append(self.contamination.audit)
            sources += [benchmark.source for benchmark in self.contamination.benchmarks]
        if self.evaluation:
            sources += [source for task in self.evaluation.tasks for source in task.files.values()]
        return [source for data in sets if data for source in data.sources] + sources


class ExtendingRecipe(BaseModel):
    """An inline recipe that states only its differences from another; checked in full when the flow starts."""

    model_config = ConfigDict(extra="allow", frozen=True)
    extends: str = Field(description="name of a preset, e.g. smoltulu-1130, or path of a recipe file")

    def as_dict(self) -> dict[str, Any]:
        """The differences together with `extends`."""
        return self.model_dump()
