"""A recipe: one YAML file is one experiment."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from smoltulu.schemas.common import MAX_PATH, StrictModel, machinery, science
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.compute_checks import batch_notes, sharding_problems
from smoltulu.schemas.contamination import ContaminationSettings
from smoltulu.schemas.data import DataSet, DataSettings, DataSource
from smoltulu.schemas.evaluation import EvaluationSettings
from smoltulu.schemas.languages import LanguageSettings
from smoltulu.schemas.mixture_checks import mixture_problems
from smoltulu.schemas.models import ModelSource
from smoltulu.schemas.near_duplicates import NearDuplicateSettings
from smoltulu.schemas.preflight import PreflightSettings
from smoltulu.schemas.publish import PublishSettings
from smoltulu.schemas.rlvr import AnyRLVRSettings, RLVRSettings
from smoltulu.schemas.sampled import SampledSettings
from smoltulu.schemas.sampled_checks import sampled_notes, sampled_problems
from smoltulu.schemas.selection import SelectionSettings
from smoltulu.schemas.selection_checks import selection_notes, selection_problems
from smoltulu.schemas.training import (
    DPOSettings,
    RewardModelSettings,
    RowKind,
    SFTSettings,
    TrainingSettings,
)
from smoltulu.schemas.verifier_audit import PassRatesSettings, VerifierAuditSettings
from smoltulu.schemas.world import WorldConfig

#: Which set of `data` has the rows of a training, where none is called as the training.
_DATA: dict[RowKind, str] = {"conversations": "sft", "pairs": "preference", "prompts": "rlvr"}
#: An entry of `sampled` is part of names of nodes.
_SampledName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]


class Recipe(StrictModel):
    """Everything that makes an experiment; a stage without a block is left out.

    A block is called as its stage; `title` is what people read.
    """

    name: str = machinery(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=100, description="used in run names and reports")
    description: str = machinery("")
    world: WorldConfig | None = science(None, description="synthetic data made in code (recipe `tiny`)")
    base_model: ModelSource = science()
    chat_template: str = science(
        "tulu",
        max_length=MAX_PATH,
        description="shipped template (recipes/chat_templates/), own (the base model's), or path of a .jinja file",
    )
    add_bos_token: bool | None = science(
        None,
        absent=None,
        description="whether every conversation begins with bos; none: as the template has it. In the key of the "
        "template's text",
    )
    data: DataSettings = science()
    sampled: dict[_SampledName, SampledSettings] = science(
        {}, description="rows that a model writes itself, by a name that data sources give: {sampled: NAME}"
    )
    contamination: ContaminationSettings | None = science(None)
    languages: LanguageSettings | None = science(None, description="language shares of the training data, as read")
    near_duplicates: NearDuplicateSettings | None = science(None)
    selection: SelectionSettings | None = science(None, description="which training rows are kept, or how they weigh")
    preflight: PreflightSettings = machinery(PreflightSettings())
    verifier_audit: VerifierAuditSettings | None = science(None)
    sft: SFTSettings | None = science(None, title="SFT")
    reward_model: RewardModelSettings | None = science(None)
    dpo: DPOSettings | None = science(None, title="DPO")
    pass_rates: PassRatesSettings | None = science(None)
    rlvr: AnyRLVRSettings | None = science(None, title="RLVR")
    evaluation: EvaluationSettings | None = science(None)
    publish: PublishSettings | None = science(None)
    compute: ComputeSettings = machinery(ComputeSettings())

    @model_validator(mode="after")
    def _stages_have_what_they_need(self) -> Self:
        problems = []
        for block, settings in self.trainings.items():
            needs, start = self.rows_of(block), settings.starts_from
            if getattr(self.data, needs) is None:
                problems.append(f"{block}: needs data.{needs}; add it or remove the {block} block")
            if start is not None and getattr(self, start) is None:
                problems.append(f"{block}: starts from the model of {start}; add a block {start}")
            problems += sharding_problems(block, settings, self.compute.of(block, settings.effective_batch_size))
        if isinstance(self.rlvr, RLVRSettings) and self.rlvr.needs_reward_model and self.reward_model is None:
            problems.append(
                "rlvr: starts its critic from the reward model, or adds its score; add a block reward_model, or set "
                "critic.initial to policy and reward_model_weight to 0"
            )
        if self.rlvr is not None and self.rlvr.leave_out and self.pass_rates is None:
            problems.append(
                f"rlvr.leave_out: {', '.join(self.rlvr.leave_out)} is known once pass rates are measured; add a block "
                "pass_rates ({} will do), or remove leave_out"
            )
        if self.evaluation and self.evaluation.sampled and self.data.verified_eval is None:
            problems.append("evaluation.sampled: needs data.verified_eval")
        if self.publish and self.sft is None and self.base_model.scratch:
            problems.append(
                "publish: would publish the base model that is made here (base_model.scratch), which has no chat "
                "template; add a block sft, or remove publish"
            )
        if self.world is None:
            problems += [
                f"data source {source.generated!r}: generated data needs a world block"
                for source in self.data_sources()
                if source.generated
            ]
        problems += sampled_problems(self)
        problems += mixture_problems(self)
        problems += selection_problems(self)
        scratch, followed = self.base_model.scratch, self.sft and self.sft.mup_base_width
        made = scratch and scratch.mup and scratch.mup.base_width
        if scratch is not None and followed is not None and followed != made:
            problems.append(
                f"sft.mup_base_width is {followed}, and base_model.scratch.mup "
                + (f"has base_width {made}" if made else "is not set")
                + "; give both the same, or remove sft.mup_base_width"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def rows_of(self, block: str) -> str:
        """The set of `data` that a training takes: the one that is called as it, or that of its kind of rows."""
        own = block in DataSettings.model_fields and getattr(self.data, block) is not None
        return block if own else _DATA[self.trainings[block].row_rules().kind]

    @property
    def trainings(self) -> dict[str, TrainingSettings]:
        """Settings of the trainings by their block."""
        blocks = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: block for name, block in blocks.items() if isinstance(block, TrainingSettings)}

    def batch_notes(self) -> list[str]:
        """A sentence for every setting of `compute` that a training does not follow, and what it does instead."""
        blocks = self.trainings.items()
        return [note for block, settings in blocks for note in batch_notes(block, settings, self.compute.of(block))]

    def audit_notes(self) -> list[str]:
        """A sentence where RLVR trusts verifiers that nobody tried, or where there is no RLVR to try them for."""
        if self.rlvr is None:
            return [
                f"{block}: is about the prompts of RLVR, and there is no block rlvr: it does nothing"
                for block in ("verifier_audit", "pass_rates")
                if getattr(self, block) is not None
            ]
        if self.verifier_audit is not None:
            return []
        return [
            "rlvr: nothing audits its verifiers before they are trusted, and a policy learns whatever they pay; a "
            "block verifier_audit ({} will do) tries them in minutes, before SFT. It enters the key of RLVR"
        ]

    def near_duplicate_notes(self) -> list[str]:
        """A sentence for every set that is named to be compared with, and is not there or cannot be."""
        settings = self.near_duplicates
        if settings is None:
            return []
        sets: list[str] = [name for name in settings.against if name != "benchmarks"]
        missing = [name for name in sets if getattr(self.data, name) is None]
        if "benchmarks" in settings.against and self.contamination is None:
            missing.append("benchmarks")
        notes = [
            f"near_duplicates.against: nothing is compared with {name}: there is no "
            + ("block contamination" if name == "benchmarks" else f"data.{name}")
            for name in missing
            if "against" in settings.model_fields_set  # the default names what a recipe may have
        ]
        return notes + [
            f"near_duplicates.against: a model of this run writes rows of {name}, later than the rows that would be "
            "compared with them: it is left out"
            for name in sets
            if name in ("preference_eval", "verified_eval") and self._is_sampled(name)
        ]

    def _is_sampled(self, name: str) -> bool:
        data = getattr(self.data, name, None)
        return data is not None and any(source.sampled for source in data.sources)

    def evaluation_notes(self) -> list[str]:
        """A sentence where benchmarks of reward models are named, and no reward model is made."""
        if not (self.evaluation and self.evaluation.reward_benchmarks) or self.reward_model is not None:
            return []
        return ["evaluation.reward_benchmarks: without a block reward_model there is no model that they measure"]

    def mup_notes(self) -> list[str]:
        """A sentence for every training of a base with muP that does not follow it."""
        if self.base_model.scratch is None or self.base_model.scratch.mup is None:
            return []
        return [
            f"{block}: base_model.scratch.mup is set, and this training does not follow it: its learning rate does not "
            "carry over to another width" + ("; set sft.mup_base_width" if block == "sft" else "")
            for block, settings in self.trainings.items()
            if getattr(settings, "mup_base_width", None) is None
        ]

    def sampled_notes(self) -> list[str]:
        """A sentence for every entry of `sampled` whose rows nothing is trained on."""
        return sampled_notes(self)

    @property
    def selector(self) -> SelectionSettings | None:
        """The block `selection` where it selects anything."""
        return None if self.selection is None or self.selection.method == "none" else self.selection

    def selection_notes(self) -> list[str]:
        """A sentence for every setting of `selection` that does nothing."""
        return selection_notes(self)

    def data_sources(self) -> list[DataSource]:
        """Every data source that the recipe names: training, held-out, audit, benchmarks, evaluation files."""
        sets: list[DataSet | None] = [getattr(self.data, name) for name in DataSettings.model_fields]
        sources = []
        if self.contamination:
            sets.append(self.contamination.audit)
            sources += [benchmark.source for benchmark in self.contamination.benchmarks]
        if self.selector and self.selector.method == "rds_plus":
            sets.append(self.selector.targets)
        if self.evaluation:
            sources += [source for task in self.evaluation.tasks for source in task.files.values()]
            sources += [source for one in self.evaluation.reward_benchmarks or () for source in one.sources]
        return [source for data in sets if data for source in data.sources] + sources


class ExtendingRecipe(BaseModel):
    """An inline recipe that states only its differences from another; checked in full when the flow starts."""

    model_config = ConfigDict(extra="allow", frozen=True)
    extends: str = Field(description="name of a preset, e.g. smoltulu-1130, or path of a recipe file")
