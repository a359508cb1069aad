"""One night, step by step: what is there, what is new, what it is compared with, and what goes into the history."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path

from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.store import Found, Log, Store, read_manifest
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.flows.nights import repetition
from smoltulu.flows.nights.subjects import Subjects
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.nightly import MeasuredModel
from smoltulu.tasks.comparison.evaluations import READ_ERRORS, Comparison, Measured, compare
from smoltulu.tasks.comparison.night import Against, Judged, Night, Repeated, judge
from smoltulu.tasks.engine.runner import reference_to
from smoltulu.tasks.nightly.history import (
    UNREAD,
    History,
    Row,
    compared_pair,
    is_compared,
    is_told,
    last_different,
    next_repetition,
    num_missed,
    time_of_night,
    told_models,
)
from smoltulu.tasks.nightly.pins import read_pins

#: Makes an artifact of a node; with True it is measured again although it is there.
Make = Callable[[str, bool], ArtifactReference]


@dataclass
class Tonight:
    """One night, step by step: `measure`, `compare`, `repeat`; then `found` says what it found.

    finished     node -> artifact, of all that is there
    evaluations  nodes of finished models
    """

    graph: NodeGraph
    store: Store
    history: History
    subjects: Subjects
    log: Log
    finished: dict[str, ArtifactReference] = field(default_factory=dict)
    evaluations: list[str] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: list[tuple[Against, Comparison, str, MeasuredModel]] = field(default_factory=list)
    repeated: list[tuple[str, Repeated]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.now = datetime.now(UTC)
        self.past = self.history.read()
        self.told = told_models(self.past)
        self.pins = read_pins(self.store.root, self.graph.name).held()
        self.notes += self.history.notes
        for note in self.history.notes:
            self.log.warning("%s", note)
        self.finished.update(self.subjects.finished)
        self.failed.update(self.subjects.failed)
        for name, node in self.graph.nodes.items():
            if name in self.finished:
                continue
            if lacking := self._lacking(name):
                if node.stage.makes(EvaluationOutputs) and node.bindings()["model"].node not in lacking:
                    self.notes.append(f"{name} is left out: the store has no {', '.join(lacking)}")
                continue
            if node.stage.makes(EvaluationOutputs):
                self.evaluations.append(name)
            if (found := self.store.obtain(self.graph.spec(name), self._digests(name), name, self.log)) is not None:
                self.finished[name] = reference_to(found, name, "Cached")

    def _lacking(self, name: str) -> list[str]:
        """Its inputs that are not there and will not be fetched tonight."""
        there = {*self.finished, *self.subjects.to_fetch}
        return sorted({binding.node for binding in self.graph.nodes[name].bindings().values()} - there)

    def _digests(self, name: str) -> dict[str, str]:
        bindings = self.graph.nodes[name].bindings()
        return {dotted: self.finished[one.node].digest for dotted, one in bindings.items() if one.node in self.finished}

    def measure(self, make: Make) -> None:
        """Fetch and measure what is not there. One that fails is not the end of the others."""
        self.fresh: set[str] = set()
        for name in [*self.subjects.to_fetch, *self.evaluations]:
            if name in self.finished:
                self.outcomes[name] = "Cached"
                continue
            if not {one.node for one in self.graph.nodes[name].bindings().values()} <= self.finished.keys():
                continue  # its model could not be fetched, which is told
            self.outcomes[name] = "Failed"
            try:
                self.finished[name] = make(name, False)
                self.outcomes[name] = self.finished[name].outcome
                self.fresh.add(name)
            except Exception as error:
                self.failed[name] = str(error) or type(error).__name__
                self.log.error("%s failed: %s", name, self.failed[name])

    def measured_model(self, name: str) -> MeasuredModel:
        """What an evaluation of tonight is, for the history."""
        made = self.finished[name]
        model = self.graph.nodes[name].bindings()["model"].node
        return MeasuredModel(
            stage=made.stage,
            key=made.key,
            generation=Path(made.path).name,
            digest=made.digest,
            model_digest=self.finished[model].digest,
        )

    def references(self, name: str) -> dict[Against, MeasuredModel]:
        """What an evaluation is compared with: the pinned baseline and the last different model; not with itself."""
        tonight = self.measured_model(name)
        found: dict[Against, MeasuredModel] = {}
        if (pin := self.pins.get(name)) is not None and pin.measured.model_digest != tonight.model_digest:
            found["baseline"] = pin.measured
        last = last_different(self.told.get(name, []), tonight.model_digest)
        if last is not None and last.identity not in {one.identity for one in found.values()}:
            found["last"] = last
        return found

    def compare(self) -> None:
        """Compare what no night compared yet: new models, and old ones with a new baseline."""
        if odd := [name for name in self.pins if name not in self.graph.nodes]:
            self.notes.append(f"the baseline of {', '.join(odd)} is of no evaluation of this night")
        for name in self.evaluations:
            if name not in self.finished:
                continue
            tonight, model = self.measured_model(name), _model(name)
            is_new = not self._is_told(name)
            references = {
                against: reference
                for against, reference in self.references(name).items()
                if is_new or not is_compared(self.past, name, tonight, reference)
            }
            try:
                after = repetition.of_evaluation(self.finished[name]) if references else {}
            except READ_ERRORS as error:  # it is told of, not compared, and tried again the next night
                self.failed[name] = str(error) or type(error).__name__
                self.log.error("%s cannot be compared: %s", name, self.failed[name])
                continue
            if is_new:
                self.new.append(model)
                self._note_moved(name)
            for against, reference in references.items():
                for one in self._compare(model, after, reference):
                    self.compared.append((against, one, name, reference))

    def _is_told(self, name: str) -> bool:
        return is_told(self.told.get(name, ()), self.measured_model(name))

    def _compare(self, model: str, after: Mapping[str, Measured], reference: MeasuredModel) -> list[Comparison]:
        """The scores of both; where those of the reference cannot be read, that is said of each score, once."""
        try:
            folder = Catalogue(self.store.root).path(Ref.checked(reference.stage, reference.key)) / reference.generation
            if not folder.is_dir():
                raise ValueError("its evaluation is gone from the store")
            found = Found(read_manifest(folder), folder)
            if found.manifest.digest != reference.digest:
                raise ValueError("its evaluation has other content than was told")
            before = repetition.of_evaluation(reference_to(found, model, "Cached"))
        except READ_ERRORS as error:
            reason = f"{UNREAD}: {str(error) or type(error).__name__}"
            return [
                Comparison(model, name, one.score.metric, one.score.value, one.score.value, reason=reason)
                for name, one in after.items()
            ]
        return compare(model, before, after)

    def _note_moved(self, name: str) -> None:
        """Say where a Hub revision stands at another commit than the last night told."""
        commit = self.subjects.commits.get(name)
        before = next((row.reason for row in reversed(self.past) if row.kind == "score" and row.node == name), "")
        if commit is not None and before and before != _commit_text(commit):
            self.notes.append(f"{_model(name)} moved: {before} -> {_commit_text(commit)}")

    def repeat(self, make: Make) -> None:
        """Measure one task of a model again whose weights are those of an earlier night."""
        nodes = [name for name in self.evaluations if name in self.finished and name not in self.fresh]
        candidates = [(name, one) for name in nodes for one in repetition.tasks_of(self.graph.nodes[name])]
        turn = next_repetition(self.past, candidates, self.today)
        if turn is None:
            return
        name, task_name = turn
        if self.found().is_nothing_new:  # said before what takes long
            self.log.info("%s; %s %s is measured again", self.found().message(), _model(name), task_name)
        again = self.graph.add(repetition.alone(self.graph.nodes[name], task_name))
        self.outcomes[again] = "Failed"
        try:
            second = make(again, True)
            self.outcomes[again] = second.outcome
            one = repetition.compared(_model(name), task_name, self.finished[name], second)
            self.repeated.append((name, one))
        except Exception as error:
            self.failed[again] = str(error) or type(error).__name__
            self.log.error("%s failed: %s", again, self.failed[again])

    @property
    def today(self) -> date:
        """Of this night, UTC."""
        return self.now.date()

    @property
    def at(self) -> datetime:
        """Time of this night in the history."""
        return time_of_night(self.past, self.now)

    def judged(self) -> list[Judged]:
        """The comparisons of tonight with their verdicts, in their order."""
        return judge([(against, one) for against, one, _, _ in self.compared])

    def found(self) -> Night:
        """What the night found so far."""
        notes = list(self.notes)
        if (ahead := self.at - self.now).total_seconds() > 1:
            last = self.now + ahead
            notes.append(f"the clock is behind the last night, {last:%Y-%m-%d %H:%M} UTC: missed nights are not seen")
        return Night(
            num_evaluations=len(self.evaluations),
            new=tuple(self.new),
            judged=self.judged(),
            failed=self.failed,
            repeated=[one for _, one in self.repeated],
            num_missed=num_missed(self.past, self.today),
            notes=notes,
            standing=self._standing(),
        )

    def _standing(self) -> list[str]:
        """Losses that an earlier night told and that still hold: of the same model, against the same reference."""
        now = {
            (name, *self.measured_model(name).identity, *reference.identity)
            for name in self.evaluations
            if name in self.finished and self._is_told(name)
            for reference in self.references(name).values()
        }
        newest = {
            (*compared_pair(row), row.task): row
            for row in self.past
            if row.verdict == "loss" and compared_pair(row) in now
        }
        return [f"loss of {_model(row.node)} {row.task}, told on {row.at[:10]}" for row in newest.values()]

    def kept(self) -> list[MeasuredModel]:
        """What the next night may compare with, for gc: the newest of each evaluation, and the different one before.

        Those that the history names: of what was told of before there may be newer generations, which it does not name.
        """
        told = {name: list(models) for name, models in self.told.items()}
        for name in self.evaluations:
            if name in self.finished and not self._is_told(name):
                told.setdefault(name, []).append(self.measured_model(name))
        kept = []
        for models in told.values():
            kept.append(models[-1])
            if (before := last_different(models, models[-1].model_digest)) is not None:
                kept.append(before)
        return kept

    def rows(self, run: str) -> list[Row]:
        """The night as lines of the history."""
        at, found = self.at.isoformat(timespec="seconds"), self.found()
        verdict = "well" if found.went_well else "failed"
        rows = [Row("night", at, run, verdict=verdict, reason=found.message(), num_items=found.num_missed)]
        for name in self.evaluations:
            if name in self.finished and not self._is_told(name):
                rows += self._score_rows(at, run, name, self.measured_model(name))
        for one, (against, _, name, reference) in zip(found.judged, self.compared, strict=True):
            rows.append(_comparison_row(at, run, name, self.measured_model(name), one, against, reference))
        rows += [Row("failed", at, run, node=name, reason=why) for name, why in self.failed.items()]
        for name, again in self.repeated:
            verdict = {True: "identical", False: "harness changed", None: "unknown"}[again.is_identical]
            rows.append(
                Row(
                    "repeated", at, run, node=name, model=self.measured_model(name).model_digest, task=again.task,
                    num_items=again.num_items, num_lost=again.num_different, verdict=verdict,
                    reason=again.reason or ", ".join(again.changes),
                )
            )  # fmt: skip
        return rows

    def _score_rows(self, at: str, run: str, name: str, made: MeasuredModel) -> list[Row]:
        outputs = EvaluationOutputs.model_validate(self.finished[name].outputs)
        commit = self.subjects.commits.get(name)
        return [
            Row(
                "score", at, run, node=name, model=made.model_digest, stage=made.stage, key=made.key,
                generation=made.generation, evaluation=made.digest, task=score.task, metric=score.metric,
                value=score.value, stderr=score.stderr, num_items=score.num_samples,
                reason=_commit_text(commit) if commit else "",
            )
            for score in outputs.scores
        ]  # fmt: skip


def _comparison_row(
    at: str, run: str, name: str, made: MeasuredModel, judged: Judged, against: Against, reference: MeasuredModel
) -> Row:
    one, test = judged.comparison, judged.comparison.test
    return Row(
        "comparison", at, run, node=name, model=made.model_digest, key=made.key, evaluation=made.digest,
        task=one.task, metric=one.metric, value=one.after, against=against, reference=reference.key,
        reference_model=reference.model_digest, reference_value=one.before,
        p_value=test.p_value if test else None, adjusted=judged.adjusted, num_items=test.num_items if test else None,
        num_lost=test.num_lost if test else None, num_gained=test.num_gained if test else None,
        verdict=judged.verdict, reason=one.reason,
    )  # fmt: skip


def _model(node: str) -> str:
    """What people call the model of an evaluation."""
    return node.removeprefix("evaluation-").removeprefix("tag-").removeprefix("hub-")


def _commit_text(commit: str) -> str:
    return f"commit {commit[:12]}"
