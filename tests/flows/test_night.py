"""A night step by step, over artifacts written by hand; whole nights are in tests/e2e and tests/faults."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.store import Store
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.artifacts.upkeep.gc import Rules, plan_gc
from smoltulu.artifacts.upkeep.removal import remove
from smoltulu.artifacts.upkeep.tags import set_tag
from smoltulu.flows.cli.compare import evaluation_of
from smoltulu.flows.graphs.nodes import Binding, Node, NodeGraph
from smoltulu.flows.nights import baselines, events, repetition
from smoltulu.flows.nights.subjects import Subjects, add_models, check_models
from smoltulu.flows.nights.tonight import Tonight
from smoltulu.flows.recipe import RecipeError
from smoltulu.schemas.artifact import ArtifactReference, FileRecord, InputRecord, Manifest
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.evaluation import EvaluationSettings, EvaluationStageConfig, EvaluationTask, SampledAccuracy
from smoltulu.schemas.models import ModelSource
from smoltulu.schemas.reward_benchmarks import RewardBenchmark
from smoltulu.tasks.comparison.night import Night
from smoltulu.tasks.data.hub import SourceUnavailable
from smoltulu.tasks.engine.runner import reference_to
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.nightly import pins
from smoltulu.tasks.nightly.history import History, Row
from smoltulu.tasks.stages import STAGES

NODE, NUM_ITEMS = "evaluation-sft", 40
LOG = logging.getLogger("test")
Answers = dict[str, str]  # task -> its items, a digit each: 1 right, 0 wrong


class Nights:
    """A recipe of one model and two tasks, whose artifacts are written by hand. Each night is a day later."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store: Store = open_store(ComputeSettings(store=str(root)))
        self.measured: list[tuple[str, bool]] = []
        self.answers: Answers = {}
        self.day = 0
        self.harness, self.template = "lm-eval 0.4.13", "t"
        self.tasks = ("gsm8k", "piqa")

    def graph(self) -> NodeGraph:
        graph = NodeGraph("tiny", ComputeSettings())
        graph.add(Node("sft", STAGES["base_model"], ModelSource(repository="me/sft", revision="c" * 40)))
        tasks = tuple(EvaluationTask(name=name, metric="acc,none") for name in self.tasks)
        config = EvaluationStageConfig(subject="sft", kind="language_model", settings=EvaluationSettings(tasks=tasks))
        inputs = {"model": Binding("sft", "folder")}
        graph.add(Node(NODE, STAGES["evaluation"], config, inputs=inputs, literals={"chat_template": "t"}))
        return graph

    def commit(self, graph: NodeGraph, node: str, files: dict[str, str], outputs: dict[str, Any], **inputs: Any) -> Any:
        spec = graph.spec(node)
        with self.store.producer(spec, lambda who: None) as folder:
            work = self.store.open_work(folder, {}) / "output"
            for name, text in files.items():
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).write_text(text)

            def draft(records: dict[str, FileRecord], digest: str) -> Manifest:
                return Manifest(
                    key=folder.name, spec=spec, digest=digest, inputs=inputs, outputs=outputs, metrics={},
                    files=records, environment={"packages": {"torch": "2.13.0"}}, node=node,
                    started_at="2026-10-01T08:00:00+00:00",
                    finished_at="2026-10-01T09:00:00+00:00", duration_seconds=1.0,
                )  # fmt: skip

            return self.store.commit(spec, work, draft)

    def train(self, weights: str) -> None:
        """A model of other weights under the same key."""
        outputs = {"folder": "model", "num_parameters": 1}
        self.commit(self.graph(), "sft", {"model/config.json": weights}, outputs)

    def make(self, graph: NodeGraph, night: Tonight, node: str, refresh: bool) -> ArtifactReference:
        """Stands for the stage: the answers that the test has given."""
        self.measured.append((node, refresh))
        if "broken" in self.answers:
            raise ValueError(self.answers["broken"])
        config = graph.nodes[node].config
        assert isinstance(config, EvaluationStageConfig)
        scores, lines = [], []
        for entry, task in enumerate(config.settings.tasks):
            answers = self.answers[task.name]
            scores.append({
                "task": task.name, "metric": task.metric, "value": answers.count("1") / len(answers),
                "num_samples": len(answers), "harness": self.harness, "task_version": "1",
                "template_digest": self.template,
            })  # fmt: skip
            lines += [
                {"task": task.name, "entry": entry, "id": i, "filter": "none", "doc_hash": f"d{i}", "target_hash": "t",
                 "prompt_hash": "p", "completion": f"it is {one}", "metrics": {"acc": float(one == "1")}}
                for i, one in enumerate(answers)
            ]  # fmt: skip
        outputs = {"subject": config.subject, "scores": scores, "samples_file": "samples.jsonl"}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        model = night.finished[graph.nodes[node].bindings()["model"].node]
        record = InputRecord(stage=model.stage, key=model.key, digest=model.digest)
        return reference_to(self.commit(graph, node, {"samples.jsonl": text}, outputs, model=record), node, "Completed")

    def night(
        self, gsm8k: str = "1" * NUM_ITEMS, piqa: str = "1" * NUM_ITEMS, *, told: bool = True, models: list[str] = [],  # noqa: B006
        commit: str = "a" * 40,
    ) -> Night:  # fmt: skip
        """One night, with what the stage would measure; `told`: it was not killed before its verdict."""
        self.measured, self.day = [], self.day + 1
        self.answers = self.answers if "broken" in self.answers else {"gsm8k": gsm8k, "piqa": piqa}
        graph, history = self.graph(), History(self.root, "tiny")
        subjects = add_models(graph, models, Catalogue(self.root), lambda *_: commit) if models else Subjects()
        tonight = Tonight(graph, self.store, history, subjects, LOG)
        tonight.now += timedelta(days=self.day)

        def make(node: str, refresh: bool) -> ArtifactReference:
            if graph.nodes[node].stage.name == "base_model":
                made = self.commit(graph, node, {"model/config.json": commit}, {"folder": "model", "num_parameters": 1})
                return reference_to(made, node, "Completed")
            return self.make(graph, tonight, node, refresh)

        tonight.measure(make)
        tonight.compare()
        tonight.repeat(make)
        if told:
            history.add(tonight.rows(f"night-{self.day}"), tonight.kept())
        return tonight.found()

    def rows(self, kind: str) -> list[Row]:
        return [row for row in History(self.root, "tiny").read() if row.kind == kind]


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    made = Nights(tmp_path / "store")
    made.train("first")
    return made


LOST = "0" * 12 + "1" * (NUM_ITEMS - 12)  # 12 of 40, over two tasks: p .00098 each night; 13 are a loss
GONE = "0" * 20 + "1" * (NUM_ITEMS - 20)


def test_only_what_is_new_is_measured_and_a_task_a_night_again(nights: Nights) -> None:
    first = nights.night()
    assert nights.measured == [(NODE, False)] and first.new == ("sft",)
    assert first.message() == "1 evaluations, new: sft; nothing to compare with yet"
    again = [nights.night() for _ in range(3)]
    assert all(one.is_nothing_new and one.went_well for one in again)
    assert [(row.node, row.task, row.verdict) for row in nights.rows("repeated")] == [
        (NODE, "gsm8k", "identical"), (NODE, "piqa", "identical"), (NODE, "gsm8k", "identical"),
    ]  # fmt: skip
    assert nights.measured == [(f"{NODE}-again", True)]
    assert (
        again[0].message()
        == "nothing new: 1 evaluations, all told before; sft gsm8k measured again: 40 identical samples"
    )


def test_another_model_is_compared_with_the_last_different_one_once(nights: Nights) -> None:
    nights.night()
    nights.train("second")
    told = nights.night(gsm8k=GONE)
    assert not told.went_well and "LOSS: sft gsm8k 1.0000 -> 0.5000 against the last model" in told.message()
    assert nights.measured == [(NODE, False)]  # a model that is measured tonight is not measured twice
    after = nights.night(gsm8k=GONE)
    assert after.is_nothing_new and after.went_well and "still standing: loss of sft gsm8k, told on" in after.message()
    assert {(row.task, row.against, row.verdict) for row in nights.rows("comparison")} == {
        ("gsm8k", "last", "loss"), ("piqa", "last", "same"),
    }  # fmt: skip


def test_a_slow_loss_is_seen_against_the_pinned_baseline(nights: Nights) -> None:
    """Five answers fewer each night: never enough against the night before, and in the end against the baseline."""
    nights.night()
    chosen = baselines.chosen(Catalogue(nights.root), _evaluation(nights))
    pins.pin(nights.root, "tiny", chosen, "first")
    verdicts = []
    for number in range(1, 5):
        nights.train(f"model {number}")
        told = nights.night(gsm8k="0" * 5 * number + "1" * (NUM_ITEMS - 5 * number))
        verdicts.append({one.against: one.verdict for one in told.judged if one.comparison.task == "gsm8k"})
    assert [one.get("last", "-") for one in verdicts] == ["-", "within noise", "within noise", "within noise"]
    assert [one["baseline"] for one in verdicts] == ["within noise", "watch", "loss", "loss"]


def _evaluation(nights: Nights) -> str:
    return f"evaluation/{nights.graph().key(NODE)}"


def test_a_model_that_was_told_of_is_compared_with_a_baseline_that_is_pinned_later(nights: Nights) -> None:
    nights.night()
    pins.pin(nights.root, "tiny", baselines.chosen(Catalogue(nights.root), _evaluation(nights)), "first")
    assert nights.night().is_nothing_new  # it is the baseline itself
    nights.train("second")
    nights.night(gsm8k=GONE)
    pins.unpin(nights.root, "tiny", [])
    nights.train("third")
    nights.night(gsm8k=GONE)
    pins.pin(nights.root, "tiny", {NODE: _first(nights)}, "first again")
    told = nights.night(gsm8k=GONE)
    assert not told.new and nights.measured[0][1]  # nothing measured but the task that is repeated
    assert "LOSS: sft gsm8k 1.0000 -> 0.5000 against the baseline" in told.message()


def _first(nights: Nights) -> Any:
    return pins.read_pins(nights.root, "tiny").pins[0].measured


def test_a_drop_that_a_killed_night_measured_is_told_by_the_next(nights: Nights) -> None:
    nights.night()
    nights.train("second")
    assert not nights.night(gsm8k=GONE, told=False).went_well
    collect(nights)
    told = nights.night(gsm8k=GONE)
    assert not told.went_well and "LOSS: sft gsm8k" in told.message()
    assert (NODE, False) not in nights.measured  # it was measured by the one that was killed


def collect(nights: Nights) -> None:
    """gc at its hardest."""
    remove(plan_gc(Catalogue(nights.root), Rules(keep_days=0, keep_runs=0)), nights.root)


@pytest.mark.parametrize("pinned", [True, False])
def test_gc_keeps_what_the_next_night_compares_with(nights: Nights, pinned: bool) -> None:
    """The first model's evaluation is an older generation of the same key, which nothing else needs."""
    nights.night()
    if pinned:
        pins.pin(nights.root, "tiny", baselines.chosen(Catalogue(nights.root), _evaluation(nights)), "first")
    for weights in ("second", "third"):
        nights.train(weights)
        nights.night()
    set_tag(Catalogue(nights.root), "keep", Ref("evaluation", nights.graph().key(NODE)))
    collect(nights)
    left = {path.name for path in (nights.root / "evaluation" / nights.graph().key(NODE)).glob("gen-*")}
    assert left == {"gen-0002", "gen-0003"} | ({"gen-0001"} if pinned else set())
    assert plan_gc(Catalogue(nights.root), Rules()).removals == []


def test_a_baseline_that_is_gone_is_named_and_nothing_is_called_equal(nights: Nights) -> None:
    nights.night()
    pins.pin(nights.root, "tiny", {NODE: _gone(nights)}, "gone")
    told = nights.night()
    assert told.went_well and "no real drop" not in told.message()
    assert "nothing was compared; 2 not comparable: sft gsm8k against the baseline" in told.message()
    assert "(what it is compared with cannot be read: its evaluation is gone from the store)" in told.message()


def _gone(nights: Nights) -> Any:
    [made] = baselines.chosen(Catalogue(nights.root), _evaluation(nights)).values()
    return made.model_copy(update={"generation": "gen-0077", "model_digest": "e" * 64})


@pytest.mark.parametrize(("field", "value", "said"), [
    ("harness", "lm-eval 0.4.12", "another harness: lm-eval 0.4.12 -> lm-eval 0.4.13"),
    ("template", "other", "another chat template: other -> t"),
])  # fmt: skip
def test_a_baseline_that_was_measured_otherwise_is_named(nights: Nights, field: str, value: str, said: str) -> None:
    before = getattr(nights, field)
    setattr(nights, field, value)
    nights.night()
    setattr(nights, field, before)
    nights.train("second")
    told = nights.night()
    assert "nothing was compared" in told.message() and said in told.message() and "no real drop" not in told.message()


def test_a_harness_that_changed_is_no_regression(nights: Nights) -> None:
    nights.night()
    told = nights.night(gsm8k="2" + "1" * (NUM_ITEMS - 1))
    assert told.went_well and told.is_nothing_new and "HARNESS CHANGED: sft gsm8k" in told.message()
    names = [name for name, _ in events.events_of(told)]
    assert names == ["harness-changed", "night"]


def test_a_model_that_fails_is_a_row_and_not_the_end(nights: Nights) -> None:
    nights.answers = {"broken": "no room"}
    told = nights.night()
    assert not told.went_well and told.message().startswith(
        "1 evaluations, new: none; 1 FAILED: evaluation-sft: no room"
    )
    assert [(row.node, row.reason) for row in nights.rows("failed")] == [(NODE, "no room")]
    nights.answers = {}
    assert nights.night().new == ("sft",)


def test_missed_nights_are_told_once(nights: Nights) -> None:
    nights.night()
    nights.day += 3
    told = nights.night()
    assert told.num_missed == 3 and told.message().startswith("3 nights before this one did not run; nothing new")
    assert [name for name, _ in events.events_of(told)] == ["absence", "night"]
    assert nights.night().num_missed == 0


def test_a_history_file_that_was_cut_short_is_named(nights: Nights) -> None:
    nights.night()
    [file] = (nights.root / "history" / "tiny").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    told = nights.night()
    assert told.new == ("sft",) and f"{file.name} cannot be read" in told.message()


# --- Tags and Hub revisions -----------------------------------------------------------------------------------------


def test_a_tag_is_evaluated_as_the_recipes_own_models(nights: Nights) -> None:
    ref = Ref("base_model", nights.graph().key("sft"))
    set_tag(Catalogue(nights.root), "best", ref)
    told = nights.night(models=["best"])
    assert told.new == ("sft", "best")
    assert nights.measured == [(NODE, False), ("evaluation-tag-best", False)]
    assert nights.night(models=["best"]).is_nothing_new


def test_the_scores_of_a_model_are_not_shown_twice(nights: Nights) -> None:
    nights.night()
    nights.night()
    assert nights.measured == [(f"{NODE}-again", True)]
    ref = Ref("base_model", nights.graph().key("sft"))
    assert [score["task"] for score in Catalogue(nights.root).scores(ref)] == ["gsm8k", "piqa"]
    assert list(baselines.chosen(Catalogue(nights.root), ref.key)) == [NODE]
    assert evaluation_of(Catalogue(nights.root), ref.key) == Ref("evaluation", nights.graph().key(NODE))


def test_a_hub_revision_that_moved_is_named_and_compared(nights: Nights) -> None:
    name = "me/model@main"
    assert nights.night(models=[name]).new == ("sft", name)
    assert nights.night(models=[name]).is_nothing_new
    told = nights.night(models=[name], commit="b" * 40, gsm8k=GONE)
    assert told.new == (name,) and f"{name} moved: commit aaaaaaaaaaaa -> commit bbbbbbbbbbbb" in told.message()
    assert f"LOSS: {name} gsm8k" in told.message()


def test_a_model_that_cannot_be_had_is_a_row(nights: Nights, tmp_path: Path) -> None:
    def silent(*_: str) -> str:
        raise SourceUnavailable("Hub model 'me/model': cannot be reached")

    set_tag(Catalogue(nights.root), "fine", Ref("base_model", nights.graph().key("sft")))
    nights.night()
    set_tag(Catalogue(nights.root), "scores", Ref("evaluation", nights.graph().key(NODE)))
    shutil.copy(nights.root / "tags" / "fine.json", nights.root / "tags" / "lost.json")
    record = json.loads((nights.root / "tags" / "lost.json").read_text())
    (nights.root / "tags" / "lost.json").write_text(json.dumps(record | {"key": "d" * 64}))
    names = ["fine", "scores", "lost", "nobody", "me/model"]
    subjects = add_models(nights.graph(), names, Catalogue(nights.root), silent)
    assert set(subjects.finished) == {"tag-fine"}
    assert {name: why.partition(";")[0] for name, why in subjects.failed.items()} == {
        "scores": f"tag 'scores' names evaluation/{nights.graph().key(NODE)[:12]}, which is no model",
        "lost": "tag 'lost' names base_model/dddddddddddd, which is gone",
        "nobody": "the store has no tag 'nobody'",
        "me/model": "Hub model 'me/model': cannot be reached",
    }


@pytest.mark.parametrize("models", ["best", ["best", "best"], [1], [""], None])
def test_bad_models_are_refused(models: Any) -> None:
    with pytest.raises(RecipeError, match=r"^models: "):
        check_models(models)


# --- What is measured again -----------------------------------------------------------------------------------------


def test_a_task_alone_is_the_cell_of_the_whole() -> None:
    """So that measuring it again measures that one, and nothing else of the model."""
    source = {"path": "pairs.jsonl", "format": "preference"}
    benchmark = RewardBenchmark.model_validate({"name": "pairs", "title": "ours", "sources": [source]})
    settings = EvaluationSettings(
        tasks=tuple(EvaluationTask(name=name, metric="acc,none") for name in ("gsm8k", "piqa", "gsm8k")),
        sampled=SampledAccuracy(max_new_tokens=8),
        reward_benchmarks=(benchmark,),
    )
    inputs = {"model": Binding("sft"), "preference_eval": Binding("pairs", "file")}

    def node(kind: str) -> Node:
        config = EvaluationStageConfig(subject="sft", kind=kind, settings=settings)
        return Node("evaluation-sft", STAGES["evaluation"], config, inputs=inputs)

    for kind, expected in (
        ("language_model", ["gsm8k", "piqa", "verified_sampled"]),
        ("reward_model", ["preference", benchmark.label]),
        ("implicit_reward", ["implicit_reward"]),
    ):
        whole = node(kind)
        assert repetition.tasks_of(whole) == expected
        for name in expected:
            one = repetition.alone(whole, name)
            # What measures nothing else is the whole evaluation, whose scores are shown.
            assert one.name == ("evaluation-sft-again" if len(expected) > 1 else "evaluation-sft")
            assert list(repetition._cells(one).values()) == [repetition._cells(whole)[name]]


# --- What a night must not pass over --------------------------------------------------------------------------------


def test_a_model_that_came_back_is_the_last_one(nights: Nights) -> None:
    """Good, bad, good again, bad again: the second fall is as large as the first, and told as well."""
    nights.night()
    nights.train("second")
    assert not nights.night(gsm8k=GONE).went_well
    nights.train("first")
    back = nights.night()
    assert back.new == ("sft",) and back.went_well and "still standing" not in back.message()
    assert nights.night().is_nothing_new
    nights.train("third")
    assert "LOSS: sft gsm8k 1.0000 -> 0.5000 against the last model" in nights.night(gsm8k=GONE).message()
    nights.train("first")
    nights.night()
    nights.train("third")
    assert "LOSS: sft gsm8k 1.0000 -> 0.5000 against the last model" in nights.night(gsm8k=GONE).message()


def test_samples_that_cannot_be_read_are_the_end_of_one_model_only(nights: Nights) -> None:
    set_tag(Catalogue(nights.root), "best", Ref("base_model", nights.graph().key("sft")))
    nights.night(models=["best"])
    nights.train("second")
    nights.night(gsm8k=GONE, models=["best"], told=False)
    newest = Catalogue(nights.root).folder(Ref("evaluation", nights.graph().key(NODE))).path
    file = max(newest.glob("gen-*")) / "samples.jsonl"
    whole = file.read_text()
    file.write_text("[" + whole[1:])  # of the same size: damage that only reading finds
    told = nights.night(gsm8k=GONE, models=["best"])
    assert not told.went_well and "samples.jsonl, line 1" in (told.failed or {})[NODE]
    assert "LOSS: best gsm8k" in told.message()
    file.write_text(whole)
    assert "LOSS: sft gsm8k" in nights.night(gsm8k=GONE, models=["best"]).message()


def test_a_reference_that_could_not_be_read_is_compared_when_it_can_be(nights: Nights) -> None:
    nights.night()
    key = Catalogue(nights.root).folder(Ref("evaluation", nights.graph().key(NODE))).path
    file = key / "gen-0001" / "samples.jsonl"
    nights.train("second")
    file.rename(file.with_suffix(".away"))
    assert "nothing was compared" in nights.night(gsm8k=GONE).message()
    assert "nothing was compared" in nights.night(gsm8k=GONE).message()
    file.with_suffix(".away").rename(file)
    assert "LOSS: sft gsm8k" in nights.night(gsm8k=GONE).message()


def test_a_clock_that_was_ahead_once_hides_nothing(nights: Nights) -> None:
    nights.day = 4000
    nights.night()
    nights.day = 0
    nights.train("second")
    told = nights.night(gsm8k=GONE)
    assert "LOSS: sft gsm8k" in told.message() and "the clock is behind the last night" in told.message()
    nights.train("third")
    told = nights.night(gsm8k=GONE)
    assert [one.verdict for one in told.judged] == ["same", "same"]  # against the second, not the first
    assert nights.night(gsm8k=GONE).repeated and nights.night(gsm8k=GONE).repeated


def test_gc_keeps_what_the_history_names_where_an_evaluation_is_measured_again_as_a_whole(nights: Nights) -> None:
    """One task: its repetition is a new generation of the evaluation, and the next night compares with the first."""
    nights.tasks = ("gsm8k",)
    for _ in range(3):
        nights.night()
    collect(nights)
    nights.train("second")
    assert "LOSS: sft gsm8k 1.0000 -> 0.5000 against the last model" in nights.night(gsm8k=GONE).message()


def test_an_evaluation_that_lacks_another_input_than_its_model_is_named(nights: Nights) -> None:
    graph = nights.graph()
    graph.add(Node("held-out", STAGES["base_model"], ModelSource(repository="me/other", revision="d" * 40)))
    own = graph.nodes[NODE]
    graph.add(
        replace(own, name="evaluation-two", inputs={**own.inputs, "verified_eval": Binding("held-out", "folder")})
    )
    tonight = Tonight(graph, nights.store, History(nights.root, "tiny"), Subjects(), LOG)
    assert tonight.evaluations == [NODE]
    assert tonight.notes == ["evaluation-two is left out: the store has no held-out"]


def test_a_baseline_that_no_evaluation_has_is_named(nights: Nights) -> None:
    nights.night()
    chosen = baselines.chosen(Catalogue(nights.root), _evaluation(nights), of="evaluation-stf")
    pins.pin(nights.root, "tiny", chosen, "first")
    assert "the baseline of evaluation-stf is of no evaluation of this night" in nights.night().message()
