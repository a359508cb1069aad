"""What a graph reads off a recipe: configs that are made of the settings of other stages, and references. Pure."""

from __future__ import annotations

from smoltulu.artifacts.keys import text_digest
from smoltulu.flows.graphs.nodes import hub_reference
from smoltulu.schemas.common import MAX_NAME
from smoltulu.schemas.data import DataSet, DatasetKind
from smoltulu.schemas.mixture import MixtureConfig
from smoltulu.schemas.preflight import PreflightConfig, PreflightSettings
from smoltulu.schemas.recipe import Recipe
from smoltulu.schemas.sampled import SampledRowsConfig, SampledSettings, SamplesConfig, SampleScoresConfig
from smoltulu.schemas.training import TrainingSettings
from smoltulu.schemas.verifier_audit import PassRatesConfig, VerifierAuditConfig
from smoltulu.tasks.data.hub import Reference


def preflight_config(block: str, settings: TrainingSettings, checks: PreflightSettings) -> PreflightConfig:
    """The settings that decide the rows of a training stage. The others are there for the dry run, in no key."""
    return PreflightConfig(
        **settings.row_rules().model_dump(),
        subject=block,
        training_settings=settings.model_dump(mode="json"),
        settings=checks,
    )


def mixture_config(kind: DatasetKind, data: DataSet) -> MixtureConfig:
    """How much of each source the set has."""
    rules = tuple(source.rule for source in data.sources)
    return MixtureConfig(kind=kind, rules=rules, seed=data.seed, labels=tuple(source.label for source in data.sources))


def held_out_config(kind: DatasetKind, data: DataSet) -> MixtureConfig:
    """Which rows are held out, whatever the mixture."""
    config = mixture_config(kind, data)
    return config.model_copy(update={"rules": tuple(rule.of_held_out for rule in config.rules), "seed": 0})


def audit_config(recipe: Recipe) -> VerifierAuditConfig | None:
    """None where the recipe asks for no audit, or has no rows of RLVR."""
    if recipe.verifier_audit is None or recipe.data.rlvr is None:
        return None
    return VerifierAuditConfig(settings=recipe.verifier_audit, source_labels=_labels(recipe))


def pass_rates_config(recipe: Recipe) -> PassRatesConfig | None:
    """As RLVR will draw and pay its rollouts; None where the recipe asks for no pass rates, or for no RLVR."""
    if recipe.pass_rates is None or recipe.rlvr is None:
        return None
    return PassRatesConfig(
        settings=recipe.pass_rates,
        temperature=recipe.rlvr.temperature,
        max_completion_length=recipe.rlvr.max_completion_length,
        must_stop=recipe.rlvr.non_stop_reward is not None,
        precision=recipe.rlvr.precision,
        source_labels=_labels(recipe),
    )


def samples_config(entry: SampledSettings) -> SamplesConfig:
    """What its model writes."""
    shared = {name: getattr(entry, name) for name in SamplesConfig.model_fields if name != "writer"}
    return SamplesConfig(writer=_writer(entry), **shared)


def sample_scores_config(entry: SampledSettings) -> SampleScoresConfig:
    """What its samples are scored by."""
    return SampleScoresConfig(
        verifier=entry.score == "verifier", reward_precision=entry.precision if entry.reads_rewards else None
    )


def sampled_rows_config(entry: SampledSettings) -> SampledRowsConfig:
    """Which of its samples become rows."""
    return SampledRowsConfig(rules=entry.rules, writer=_writer(entry))


def _writer(entry: SampledSettings) -> str:
    """What its model is called."""
    outside = entry.checkpoint
    return str(entry.model or (outside and (outside.repository or outside.path)))[-MAX_NAME:]


def template_parts(text: str) -> dict[str, dict[str, str]]:
    """Literals and externals of a node that takes a chat template."""
    return {"literals": {"chat_template": text}, "externals": {"chat_template": text_digest(text)}}


def _labels(recipe: Recipe) -> tuple[str, ...]:
    assert recipe.data.rlvr is not None
    return tuple(source.label for source in recipe.data.rlvr.sources)


def hub_references(recipe: Recipe) -> list[Reference]:
    """All Hub references of a recipe. Data come first: the first error of this order is reported."""
    references = [hub_reference(source) for source in recipe.data_sources() if source.repository is not None]
    models = [recipe.base_model, *(entry.checkpoint for entry in recipe.sampled.values() if entry.checkpoint)]
    if recipe.selector and recipe.selector.model is not None and recipe.selector.asks_model:
        models.append(recipe.selector.model)
    return references + [Reference("model", one.repository, one.revision) for one in models if one.repository]
