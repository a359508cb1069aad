"""The pipeline of a recipe as a graph: its stages, their inputs, and their artifact keys.

The flow and `smoltulu plan` read the same graph. Keys need no run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel

from smoltulu.artifacts.keys import folder_digest
from smoltulu.flows.graphs.evaluation_settings import asked_of
from smoltulu.flows.graphs.nodes import Binding, Node, NodeGraph
from smoltulu.flows.graphs.references import References
from smoltulu.flows.graphs.row_nodes import RowNodes, world_if_generated
from smoltulu.flows.graphs.sampled_nodes import Add, EntryNodes, add_sampled_nodes, node_name
from smoltulu.flows.graphs.selection_nodes import SelectionNodes
from smoltulu.flows.graphs.stage_configs import (
    audit_config,
    hub_references,
    pass_rates_config,
    preflight_config,
    template_parts,
)
from smoltulu.flows.recipe import stage_order
from smoltulu.schemas.data import DatasetKind
from smoltulu.schemas.evaluation import EvaluationStageConfig, ScoreKind
from smoltulu.schemas.models import ModelSource
from smoltulu.schemas.publish import PublishStageConfig
from smoltulu.schemas.recipe import Recipe
from smoltulu.schemas.reference import ReferenceLogpsConfig
from smoltulu.schemas.rlvr import PPOSettings
from smoltulu.schemas.sampled import SampledSettings
from smoltulu.tasks.data.hub import Reference, resolve_commit
from smoltulu.tasks.data.sources import expand_path
from smoltulu.tasks.models.chat_template import load_chat_template
from smoltulu.tasks.models.classifiers import check_one_score
from smoltulu.tasks.models.folders import check_model_folder
from smoltulu.tasks.stage import Stage
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.verifiers import VERIFIERS_VERSION

#: Sets of `data` that are trained on, and the kind of their rows.
_TRAINED_SETS: dict[str, DatasetKind] = {"sft": "sft", "preference": "preference", "dpo": "preference", "rlvr": "rlvr"}


class Graph(NodeGraph):
    """The nodes of a recipe in an order in which every node comes after its inputs."""

    def __init__(
        self,
        recipe: Recipe,
        until: str | None = None,
        *,
        unresolved: Literal["refuse", "keep"] = "refuse",
        resolve: Callable[[Reference], str] = lambda reference: resolve_commit(*reference),
        digest_of: Callable[[Path], str] = folder_digest,
    ) -> None:
        """Resolve all references from outside the store, and add the nodes up to stage `until`.

        unresolved  keep, for a plan: a revision that cannot be resolved stays as written (`self.unresolved`)
        resolve     returns the commit of a Hub reference, see `tasks.data.hub.resolve_commit`
        digest_of   content digest of a model's folder: thousands of cells of a sweep read it once

        Raises ValueError for a missing file or folder, a template that does not render, a malformed name, and (unless
        `unresolved` is keep) for a revision that cannot be resolved.
        """
        super().__init__(recipe.name, recipe.compute)
        self.recipe = recipe
        self._digest_of = digest_of
        #: What a verdict means is no setting, and yet decides what stages make.
        self._verifiers = {"verifiers": VERIFIERS_VERSION}
        self._references = References(hub_references(recipe), resolve, keep_unresolved=unresolved == "keep")
        self.commits, self.unresolved = self._references.commits, self._references.unresolved
        self._order = stage_order(recipe)
        self._until = self._order.index(until) if until else len(self._order)
        read = partial(self._references.text_of_model, recipe.base_model)
        self._template = template_parts(load_chat_template(recipe.chat_template, read, recipe.add_bos_token))
        #: Nodes that are there: rows by their set of `data`, models by their block, chosen rows by entry of `sampled`.
        self._sets: dict[str, str] = {}
        self._models: dict[str, str] = {}
        self._sampled: dict[str, str] = {}
        self._rows = RowNodes(self, recipe, self._add, self._references, self._verifiers, self._sampled)
        #: What trainings take of each set. What is sampled or held out, and tokenizers, are of all rows.
        self._selection = SelectionNodes(
            self, recipe, self._add, self._rows.read, self._rows.without_contamination, self._model_from, self._template
        )
        self._lay_out()

    # The nodes, in the order of a run.

    def _lay_out(self) -> None:
        recipe = self.recipe
        if recipe.world is not None:
            self._add("world", STAGES["world"], recipe.world)

        data = recipe.data
        self._lay_out_rows()
        if recipe.contamination and recipe.contamination.audit:
            self._rows.training("audit", "sft", recipe.contamination.audit)
        self._rows.read("preference-eval", "preference", data.preference_eval)
        self._rows.read("verified-eval", "rlvr", data.verified_eval)

        self._lay_out_samples()
        base = self._base_model()
        self._evaluate(base, "language_model")
        self._preflights(base)
        self._verifier_audit()
        self._made("base_model", base)
        sft = self._made("sft", self._train("sft", base))
        self._evaluate(sft, "language_model")
        reward_model = None
        if recipe.reward_model and recipe.reward_model.start_from == "sft":
            reward_model = self._made("reward_model", self._train("reward_model", sft))
            self._evaluate(reward_model, "reward_model")
        logps = self._reference_logps(sft, _preflight_of("dpo"), "reference-logps")
        reference = {"reference_logps": Binding(logps, "file") if logps else None}
        if aside := self._reference_logps(sft, _held_out_of("dpo"), "reference-logps-held-out"):
            reference["held_out_reference_logps"] = Binding(aside, "file")
        dpo = self._made("dpo", self._train("dpo", sft, reference))
        self._evaluate(dpo, "language_model")
        self._evaluate(dpo, "implicit_reward", reference_model=sft)
        if recipe.reward_model and recipe.reward_model.start_from == "dpo":
            reward_model = self._made("reward_model", self._train("reward_model", dpo))
            self._evaluate(reward_model, "reward_model")
        self._pass_rates(dpo or sft)
        rlvr = self._made("rlvr", self._rlvr(dpo or sft, reward_model))
        self._evaluate(rlvr, "language_model")
        self._publish(rlvr or dpo or sft or base)

    def _lay_out_rows(self) -> bool:
        """Rows of the sets that are trained on; those that a model writes once their samples are there. Whether any."""
        before = len(self._sets)
        for name, kind in _TRAINED_SETS.items():
            if name not in self._sets and (rows := self._rows.training(name, kind, getattr(self.recipe.data, name))):
                self._sets[name] = rows
        return len(self._sets) > before

    def _lay_out_samples(self) -> None:
        """All samples whose model, prompts and reward model are there, and the rows that are made of them."""
        for name, entry in self.recipe.sampled.items():
            needs = [self._sets.get(entry.prompts), *([self._models.get(entry.model)] if entry.model else [])]
            rewards = self._models.get("reward_model") if entry.reads_rewards else None
            if name in self._sampled or None in needs or (entry.reads_rewards and rewards is None):
                continue
            if (rows := self._sample(name, entry, rewards)) is not None:
                self._sampled[name] = rows
                self._lay_out_rows()
                return self._lay_out_samples()  # its rows may be the prompts of another one

    def _sample(self, name: str, entry: SampledSettings, reward_model: str | None) -> str | None:
        last = max(map(self._order.index, entry.models))
        # Those of the last model stand in the order of stages; earlier ones do not wait for it.
        order = None if last + 1 == self._order.index("samples") else last + 0.5
        add = partial(self._add, order=order)
        if entry.checkpoint is None:
            assert entry.model is not None
            model: str | None = self._models[entry.model]
        else:
            model = self._model_from(node_name("base-model", name), entry.checkpoint, add=add)
        if model is None:
            return None
        nodes = EntryNodes(model, self._sets[entry.prompts], reward_model)
        return add_sampled_nodes(self, add, name, entry, nodes, self._references, self._template, self._verifiers)

    def _made(self, block: str, node: str | None) -> str | None:
        """Note a model, and lay out what only waited for it: samples, their rows, and the preflights of these."""
        if node is not None:
            self._models[block] = node
            self._lay_out_samples()
            self._preflights(self._models["base_model"])
        return node

    def _add(self, name: str, stage: Stage, config: BaseModel, order: float | None = None, **parts: Any) -> str | None:
        """Add a node unless its stage comes after `until`. An evaluation counts as the stage of its model.

        order  where it is another place than that of its stage
        """
        order = self._order.index(stage.name) if order is None else order
        if stage.name == "evaluation":
            measured = self._order.index(parts["inputs"]["model"].node.replace("-", "_"))
            order = min(order, measured)
        if order > self._until:
            return None
        return self.add(Node(name, stage, config, **parts))

    def _base_model(self) -> str | None:
        return self._model_from("base-model", self.recipe.base_model, add=self._add)

    def _model_from(self, name: str, config: ModelSource, add: Add) -> str | None:
        """The node of a model that is there before any training: the base, or a checkpoint that is only sampled."""
        inputs: dict[str, Binding] = {}
        # What ends an answer, and so cannot be padding, is what the template writes.
        parts = self._template if config.pad_token is not None else {"literals": {}, "externals": {}}
        externals = dict(parts["externals"])
        if config.scratch is not None:
            if self.recipe.world is not None:
                inputs["world"] = Binding("world")
            elif "sft" in self._sets:
                inputs["dataset"] = Binding(self._sets["sft"], "file")
        elif config.path is not None:
            folder = expand_path(config.path)
            check_model_folder(folder)
            externals["base_model"] = self._digest_of(folder)
        else:
            assert config.repository is not None
            revision = self._references.commit(Reference("model", config.repository, config.revision))
            config = config.model_copy(update={"revision": revision})
        return add(name, STAGES["base_model"], config, inputs=inputs, literals=parts["literals"], externals=externals)

    def _preflights(self, base: str | None) -> None:
        """Those of all trainings whose rows are there. Rows of DPO are checked before SFT, unless SFT writes them."""
        if base is not None:
            for name in self._selection.untrained:
                self._selection.rows(name, self._sets, base)
        for block in self.recipe.trainings:
            if _preflight_of(block) not in self.nodes:
                self._preflight(block, base, self.recipe.rows_of(block))

    def _preflight(self, block: str, base: str | None, data_set: str) -> None:
        """Tokenised rows of a training stage."""
        first = self._order.index({"dpo": "reference_logps", "rlvr": "pass_rates"}.get(block, block))
        if base is None or self._order.index("verifier_audit") < self._until < first:
            return
        rows = self._selection.rows(data_set, self._sets, base)
        if rows is None:
            return
        settings, checks = self.recipe.trainings[block], self.recipe.preflight
        nodes = {_preflight_of(block): (checks, Binding(rows, "file"))}
        if (aside := self._rows.held_out.get(data_set)) is not None:
            # The same sources: what they lack is said once.
            lenient = {name: 1.0 for name in type(checks).model_fields if name.startswith("max_")}
            checks = checks.model_copy(update={**lenient, "dry_run": False})
            nodes[_held_out_of(block)] = (checks, Binding(aside, "file"))
        for name, (own, dataset) in nodes.items():
            self._add(
                name,
                STAGES["preflight"],
                preflight_config(block, settings, own),
                inputs={"model": Binding(base, "folder"), "dataset": dataset},
                literals=self._template["literals"],
                externals=self._template["externals"],
            )

    def _verifier_audit(self) -> None:
        """Of the rows that RLVR will see; made before SFT, as the preflights are."""
        config = audit_config(self.recipe)
        if config is not None and (rows := _preflight_of("rlvr")) in self.nodes:
            inputs = {"dataset": Binding(rows, "file")}
            self._add("verifier-audit", STAGES["verifier_audit"], config, inputs=inputs, externals=self._verifiers)

    def _pass_rates(self, start: str | None) -> None:
        config, rows = pass_rates_config(self.recipe), _preflight_of("rlvr")
        if config is None or start is None or rows not in self.nodes:
            return
        self._add(
            "pass-rates",
            STAGES["pass_rates"],
            config,
            inputs={"model": Binding(start, "folder"), "dataset": Binding(rows, "file")},
            literals=self._template["literals"],
            externals=self._template["externals"] | self._verifiers,
        )

    def _reference_logps(self, start: str | None, tokens: str, name: str) -> str | None:
        """Log-probabilities of the pairs of a preflight under the model that DPO starts from."""
        if self.recipe.dpo is None or start is None or tokens not in self.nodes:
            return None
        return self._add(
            name,
            STAGES["reference_logps"],
            ReferenceLogpsConfig(precision=self.recipe.dpo.precision),
            inputs={"model": Binding(start, "folder"), "dataset": Binding(tokens, "file")},
            literals=self._template["literals"],
            externals=self._template["externals"],
        )

    def _train(
        self,
        block: str,
        start: str | None,
        others: Mapping[str, Binding | None] = MappingProxyType({}),
        folders: Mapping[str, Path] = MappingProxyType({}),
    ) -> str | None:
        """A training on the rows of its preflight. `others`: further inputs; `folders`: those outside the store."""
        settings, rows = getattr(self.recipe, block), _preflight_of(block)
        if settings is None or start is None or rows not in self.nodes or None in others.values():
            return None
        inputs = {"model": Binding(start, "folder"), "dataset": Binding(rows, "file"), **others}
        if _held_out_of(block) in self.nodes:
            inputs["held_out"] = Binding(_held_out_of(block), "file")
            inputs["held_out_rows"] = Binding(self._rows.held_out[self.recipe.rows_of(block)], "file")
        inputs |= self._selection.weights(self.recipe.rows_of(block))
        literals = {name: str(folder) for name, folder in folders.items()}
        digests = {name: self._digest_of(folder) for name, folder in folders.items()}
        return self._add(
            block.replace("_", "-"),
            STAGES[block],
            settings,
            inputs=inputs,
            literals=self._template["literals"] | literals,
            externals=self._template["externals"] | digests,
            after=tuple(n for n, node in self.nodes.items() if node.stage.name in ("preflight", "verifier_audit")),
        )

    def _rlvr(self, start: str | None, reward_model: str | None) -> str | None:
        """RLVR, with the reward model or an earlier run's critic where its settings ask for one."""
        settings = self.recipe.rlvr
        if settings is None:
            return None
        others: dict[str, Binding | None] = {}
        if settings.needs_reward_model:
            others["reward_model"] = Binding(reward_model, "folder") if reward_model else None
        if self.recipe.verifier_audit is not None:
            others["audit"] = Binding("verifier-audit", "file")
        if settings.leave_out:
            others["pass_rates"] = Binding("pass-rates", "file")
        folders = {}
        if isinstance(settings, PPOSettings) and settings.critic.path is not None:
            folders["critic"] = expand_path(settings.critic.path)
            check_model_folder(folders["critic"])
            check_one_score(folders["critic"])
        return self._train("rlvr", start, others, folders)

    def _evaluate(self, subject: str | None, kind: ScoreKind, reference_model: str | None = None) -> None:
        """Evaluate a model: a language model on the tasks and on sampled answers, any other on preference pairs."""
        settings = self.recipe.evaluation
        if settings is None or subject is None:
            return
        if subject == "base-model":
            # A base model rarely ends an answer: sampling it would be slow and tell nothing.
            settings = settings.model_copy(update={"sampled": None})
        asked = asked_of(kind, settings, self._references, has_pairs="dataset-preference-eval" in self.nodes)
        if asked is None or (asked.settings.sampled is not None and "dataset-verified-eval" not in self.nodes):
            return
        inputs = {"model": Binding(subject, "folder"), **world_if_generated(asked.sources)}
        if asked.settings.sampled is not None:
            inputs["verified_eval"] = Binding("dataset-verified-eval", "file")
        if kind != "language_model" and "dataset-preference-eval" in self.nodes:
            inputs["preference_eval"] = Binding("dataset-preference-eval", "file")
        if reference_model is not None:
            inputs["reference_model"] = Binding(reference_model, "folder")
        suffix = "-implicit-reward" if kind == "implicit_reward" else ""
        self._add(
            f"evaluation-{subject}{suffix}",
            STAGES["evaluation"],
            EvaluationStageConfig(subject=subject.replace("-", "_"), kind=kind, settings=asked.settings),
            inputs=inputs,
            literals=self._template["literals"],
            externals={**self._template["externals"], **asked.externals},
        )

    def _publish(self, subject: str | None) -> None:
        if self.recipe.publish is None or subject is None:
            return
        lineage = self.ancestors(subject)
        evaluations = {
            name: Binding(name)
            for name, node in self.nodes.items()
            if node.stage.name == "evaluation" and node.inputs["model"].node in lineage  # type: ignore[union-attr]
        }
        config = PublishStageConfig(
            recipe_name=self.recipe.name,
            subject=subject.replace("-", "_"),
            settings=self.recipe.publish,
            recipe=self.recipe.model_dump(mode="json", exclude={"compute"}),
        )
        inputs = {
            "model": Binding(subject, "folder"),
            "evaluations": evaluations,
            "lineage": {name: Binding(name) for name in lineage},
        }
        self._add("publish", STAGES["publish"], config, inputs=inputs)


def _preflight_of(block: str) -> str:
    return f"preflight-{block.replace('_', '-')}"


def _held_out_of(block: str) -> str:
    """The preflight of its held-out rows."""
    return f"{_preflight_of(block)}-held-out"
