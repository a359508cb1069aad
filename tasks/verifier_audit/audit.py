"""Grades the probes of every verifier and source, and counts. Pure but for the verifiers, which are handed in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from smoltulu.schemas.verifier_audit import Example, Finding, GroupAudit, HackCount, VerifierAuditSettings
from smoltulu.tasks.verifier_audit.probes import GroupProbes, Probe, probes_of
from smoltulu.tasks.verifiers.names import VERSIONS
from smoltulu.tasks.verifiers.verdict import Verdict

#: (verifier, completion, ground truth) of many answers -> their verdicts, in order.
Grade = Callable[[Sequence[tuple[str, str, str]]], Sequence[Verdict]]

_NUM_EXAMPLES = 3
_MAX_SHOWN = 300


@dataclass(frozen=True)
class Graded:
    """A probe and what the verifier said.

    other    what its other version said, where there is one
    reverse  what the verifier said to the question the other way round, where it was asked
    """

    probe: Probe
    verdict: Verdict
    other: Verdict | None = None
    reverse: Verdict | None = None

    @property
    def is_right(self) -> bool:
        return self.verdict.outcome == "right"

    @property
    def is_equal(self) -> bool:
        """Whether another spelling of the gold answer was tried, as the verifier says from both sides."""
        return self.is_right and self.reverse is not None and self.reverse.outcome == "right"

    @property
    def is_allowed(self) -> bool:
        return self.probe.allowed or self.is_equal

    def findings(self) -> Iterable[Finding]:
        """What is worth a look in it."""
        kind = self.probe.kind
        if kind == "gold" and self.verdict.outcome == "could_not_grade":
            yield "could_not_grade"
        elif kind == "gold" and not self.is_right:
            yield "gold_wrong"
        elif kind == "shuffled" and self.is_right and not self.probe.allowed:
            yield "shuffled_equal" if self.is_equal else "shuffled_right"
        elif kind == "violation" and self.is_right:
            yield "violation_right"
        elif kind == "hack" and self.is_right:
            yield "hack_allowed" if self.is_allowed else "hack_right"
        elif kind == "hack" and self.probe.name == "empty" and self.verdict.outcome == "could_not_grade":
            yield "could_not_grade"
        elif kind != "gold" and self.verdict.outcome == "could_not_grade":
            yield "wrong_not_graded"
        if self.other is not None and self.other.outcome != self.verdict.outcome:
            yield "versions_differ"


def other_version(verifier: str) -> str:
    """`math@paper` for `math`, `math` for `math@paper`; empty where the verifier has one version only."""
    family, _, version = verifier.partition("@")
    versions = VERSIONS.get(family, ())
    others = [one for one in versions if one != (version or versions[0])]
    return "" if not others else family if others[0] == versions[0] else f"{family}@{others[0]}"


def audit_rows(
    rows: Iterable[Mapping[str, Any]],
    settings: VerifierAuditSettings,
    grade: Grade,
    labels: Sequence[str] = (),
    report: Callable[[int, int], None] = lambda num_done, num_groups: None,
) -> tuple[list[GroupAudit], list[dict[str, Any]], int]:
    """Audit rlvr rows, verifier by verifier and source by source.

    Returns:
        the counts of every group in order of verifier and source; every probe that is worth a look, as plain values;
        and the number of all probes.
    """
    members: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        members[row["verifier"], str(row["id"]).partition(":")[0]].append(row)
    groups, findings, num_probes = [], [], 0
    for number, ((verifier, source), group) in enumerate(sorted(members.items())):
        report(number, len(members))
        made = probes_of(verifier, source, group, settings)
        graded = _grade(verifier, made.probes, grade)
        num_probes += len(graded)
        label = labels[int(source)] if source.isdecimal() and int(source) < len(labels) else ""
        groups.append(_count(verifier, source, label, len(group), made, graded))
        findings += [
            _plain(verifier, source, finding, one) for one in sorted(graded, key=_place) for finding in one.findings()
        ]
    return groups, findings, num_probes


def _grade(verifier: str, probes: Sequence[Probe], grade: Grade) -> list[Graded]:
    """Every probe by its verifier and by the other version. An answer that comes twice is graded once."""
    names = [verifier, other] if (other := other_version(verifier)) else [verifier]
    asked = list(dict.fromkeys((name, p.completion, p.ground_truth) for p in probes for name in names))
    said = dict(zip(asked, grade(asked), strict=True))
    graded = [Graded(p, *(said[name, p.completion, p.ground_truth] for name in names)) for p in probes]
    return _with_reverses(verifier, graded, grade)


def _with_reverses(verifier: str, graded: Sequence[Graded], grade: Grade) -> list[Graded]:
    """The question the other way round, for what is right and should not be."""
    open_ = [one.probe.reverse for one in graded if one.is_right and not one.probe.allowed]
    asked = list(dict.fromkeys((verifier, *reverse) for reverse in open_ if reverse is not None))
    said = dict(zip(asked, grade(asked), strict=True)) if asked else {}
    return [
        replace(one, reverse=said.get((verifier, *one.probe.reverse))) if one.is_right and one.probe.reverse else one
        for one in graded
    ]


def _count(
    verifier: str, source: str, label: str, num_rows: int, made: GroupProbes, graded: Sequence[Graded]
) -> GroupAudit:
    by_kind: dict[str, list[Graded]] = defaultdict(list)
    for one in graded:
        by_kind[one.probe.kind].append(one)
    hacks: dict[str, HackCount] = {}
    for one in by_kind["hack"]:
        so_far = hacks.get(one.probe.name, HackCount())
        hacks[one.probe.name] = HackCount(
            num_rows=so_far.num_rows + 1,
            num_right=so_far.num_right + one.is_right,
            num_allowed=so_far.num_allowed + (one.is_right and one.is_allowed),
        )
    ungradable = {one.probe.row for one in graded if "could_not_grade" in one.findings()}
    wrong = [one for one in graded if one.probe.kind != "gold" and one.probe.row not in ungradable]
    gold = [one for one in by_kind["gold"] if one.verdict.outcome != "could_not_grade"]
    return GroupAudit(
        verifier=verifier,
        source=source,
        label=label,
        num_rows=num_rows,
        num_ungradable=len(ungradable),
        num_without_gold=made.num_without_gold,
        num_gold=len(gold),
        num_gold_right=sum(one.is_right for one in gold),
        num_shuffled=len(by_kind["shuffled"]),
        num_shuffled_right=sum(one.is_right for one in by_kind["shuffled"]),
        num_shuffled_equal=sum("shuffled_equal" in one.findings() for one in graded),
        num_wrong=len(wrong),
        num_wrong_ungraded=sum("wrong_not_graded" in one.findings() for one in wrong),
        chance_share=made.chance_share,
        best_constant=made.best_constant[:_MAX_SHOWN],
        best_constant_share=made.best_constant_share,
        num_violations=len(by_kind["violation"]),
        num_violations_right=sum(one.is_right for one in by_kind["violation"]),
        hacks=dict(sorted(hacks.items())),
        functions=made.functions,
        other_version=other_version(verifier),
        num_versions_differ=sum("versions_differ" in one.findings() for one in graded),
        examples=tuple(_examples(graded)),
    )


def _examples(graded: Sequence[Graded]) -> Iterable[Example]:
    """The first few of every finding; of the hacks that must not be right, the first few of each."""
    num_shown: dict[tuple[str, str], int] = defaultdict(int)
    for one in sorted(graded, key=_place):
        for finding in one.findings():
            which = finding, one.probe.name if finding == "hack_right" else ""
            num_shown[which] += 1
            if num_shown[which] <= _NUM_EXAMPLES:
                yield Example(
                    finding=finding,
                    probe=one.probe.name[:200],
                    row=one.probe.row,
                    completion=_cut(one.probe.completion),
                    ground_truth=_cut(one.probe.ground_truth),
                    outcome=one.verdict.outcome,
                    reason=_reasons(one),
                )


def _place(graded: Graded) -> tuple[str, ...]:
    probe = graded.probe
    return probe.kind, probe.name, probe.row, probe.completion


def _reasons(graded: Graded) -> str:
    other = f"; the other version says {graded.other.outcome}: {graded.other.reason}" if graded.other else ""
    return graded.verdict.reason + other


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def _plain(verifier: str, source: str, finding: Finding, graded: Graded) -> dict[str, Any]:
    probe, other = graded.probe, graded.other
    return {
        "finding": finding,
        "verifier": verifier,
        "source": source,
        "probe": probe.name,
        "row": probe.row,
        "completion": probe.completion,
        "ground_truth": probe.ground_truth,
        "outcome": graded.verdict.outcome,
        "reason": graded.verdict.reason,
        "other_outcome": other.outcome if other else None,
        "other_reason": other.reason if other else None,
    }
