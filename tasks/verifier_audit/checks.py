"""The checks of an audit: each compares a count with a threshold, and gives advice where it fails. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from smoltulu.artifacts import readable
from smoltulu.schemas.verifier_audit import Example, Finding, GroupAudit, HackCount, VerifierAuditSettings
from smoltulu.tasks.verifier_audit.answers import family_of
from smoltulu.tasks.verifier_audit.chance import binomial_limit
from smoltulu.tasks.verifiers import canonical_name

#: Characters of a text in an error message.
_MAX_SHOWN = 160

Status = Literal["ok", "noticed", "fails"]


@dataclass(frozen=True)
class Check:
    """One check of one verifier and source."""

    group: str
    name: str
    status: Status
    found: str
    threshold: str = "none"
    examples: tuple[Example, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        """The check as part of an error message: with the rows, what was tried on the first of them, and what to do."""
        limit = f"; allowed: {self.threshold}" if self.threshold != "none" else ""
        shown = ""
        if self.examples:
            one = self.examples[0]
            rows = ", ".join(dict.fromkeys(example.row for example in self.examples))
            shown = (
                f" (rows {rows}). Row {one.row}: {_cut(one.completion)!r} for the truth {_cut(one.ground_truth)!r} "
                f"scores {one.outcome}: {one.reason}"
            )
        return f"{self.group}: {self.found}{limit}{shown}. What to do: {self.advice}"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]} … {text[-_MAX_SHOWN // 2 :]}"


def problems(groups: Iterable[GroupAudit], settings: VerifierAuditSettings) -> list[str]:
    """Every threshold that a verifier fails, in words."""
    return [str(check) for check in checks(groups, settings) if check.status == "fails"]


def checks(groups: Iterable[GroupAudit], settings: VerifierAuditSettings) -> list[Check]:
    """All checks, in the order of the report. Those of `known_faults` are noticed where they would fail."""
    return [check for group in groups for check in _checks(group, settings)]


def chance_limit(group: GroupAudit, settings: VerifierAuditSettings) -> int | None:
    """So many shuffled gold answers may be right; None where they compare with nothing."""
    if group.chance_share is None:
        return None
    return binomial_limit(group.num_shuffled, group.chance_share, settings.chance_level)


def is_known(group: GroupAudit, settings: VerifierAuditSettings) -> bool:
    """Whether the recipe says that it wants this verifier with its faults."""
    return group.verifier in known_verifiers(settings)


def known_verifiers(settings: VerifierAuditSettings) -> list[str]:
    """`known_faults`, each in its one spelling. ValueError for a verifier that there is not."""
    try:
        return [canonical_name(name) for name in settings.known_faults]
    except ValueError as error:
        raise ValueError(f"verifier_audit.known_faults: {error}") from None


def _checks(group: GroupAudit, settings: VerifierAuditSettings) -> Iterator[Check]:
    ungradable = group.num_ungradable / max(group.num_rows, 1)
    yield _check(
        group,
        settings,
        "Truths can be graded",
        ungradable > settings.max_ungradable_share,
        f"{group.num_ungradable:,} of {group.num_rows:,} truths ({readable.percent(ungradable)}) cannot be graded",
        f"verifier_audit.max_ungradable_share {settings.max_ungradable_share:g}",
        "could_not_grade",
        "fix or filter these rows, or name the verifier that reads their truths",
    )
    yield _gold(group, settings)
    ungraded = group.num_wrong_ungraded / max(group.num_wrong, 1)
    yield _check(
        group,
        settings,
        "Wrong texts score wrong, and not could_not_grade",
        ungraded > settings.max_ungradable_share,
        f"{group.num_wrong_ungraded:,} of {group.num_wrong:,} texts that are not the answer "
        f"({readable.percent(ungraded)}) are not graded",
        f"verifier_audit.max_ungradable_share {settings.max_ungradable_share:g}",
        "wrong_not_graded",
        "a rollout that could not be graded is no wrong one, so a policy learns to write what cannot be graded: make "
        "the verifier say wrong, or use another one",
    )
    limit = chance_limit(group, settings)
    if limit is not None:
        equal = f", {group.num_shuffled_equal:,} as other spellings" if group.num_shuffled_equal else ""
        yield _check(
            group,
            settings,
            "Gold answers of other rows score wrong",
            group.num_shuffled_right - group.num_shuffled_equal > limit,
            f"{group.num_shuffled_right:,} of {group.num_shuffled:,} gold answers of other rows score right{equal}; "
            f"{readable.percent(group.chance_share or 0.0)} of the pairs of gold answers coincide",
            f"{limit:,} ({settings.chance_level:g} is the chance of more, verifier_audit.chance_level)",
            "shuffled_right",
            "the verifier takes wrong answers for right, and a policy learns that within hours: use another version, "
            "or see whether the truths are what it compares with",
        )
    if group.num_violations:
        yield _check(
            group,
            settings,
            "Broken constraints score wrong",
            group.num_violations_right / group.num_violations > settings.max_hack_share,
            f"{group.num_violations_right:,} of {group.num_violations:,} texts that break their constraint score right",
            f"verifier_audit.max_hack_share {settings.max_hack_share:g}",
            "violation_right",
            "the verifier does not check what the prompt asks: use version fixed, or leave these rows out",
        )
    yield from (_hack(group, settings, name, hack) for name, hack in group.hacks.items() if hack.num_right)


def _check(
    group: GroupAudit,
    settings: VerifierAuditSettings,
    name: str,
    is_bad: bool,
    found: str,
    threshold: str,
    finding: Finding,
    advice: str,
    probe: str = "",
) -> Check:
    """A check with the examples of its finding. `probe`: of this probe only."""
    fails: Status = "noticed" if is_known(group, settings) else "fails"
    examples = tuple(one for one in group.examples if one.finding == finding and probe in ("", one.probe))
    return Check(group.title, name, fails if is_bad else "ok", found, threshold, examples, advice)


def _gold(group: GroupAudit, settings: VerifierAuditSettings) -> Check:
    name = "Gold answers score right"
    if not group.num_gold:
        return Check(
            group.title,
            name,
            "noticed",
            f"no right answer could be written for any of {group.num_rows:,} rows, so nothing is known of them",
            advice="look at the report: which kinds of rows are not covered, and why",
        )
    share = group.num_gold_right / group.num_gold
    return _check(
        group,
        settings,
        name,
        share < settings.min_gold_share,
        f"{group.num_gold_right:,} of {group.num_gold:,} gold answers ({readable.percent(share)}), written as the "
        "prompts ask, score right",
        f"verifier_audit.min_gold_share {settings.min_gold_share:g}",
        "gold_wrong",
        f"the verifier {family_of(group.verifier)} does not read what the prompts ask for: name the one that does "
        "(field verifier or verifiers of the data source), or leave these rows out. RLVR would pay nothing for right "
        "answers",
    )


def _hack(group: GroupAudit, settings: VerifierAuditSettings, name: str, hack: HackCount) -> Check:
    num_bad = hack.num_right - hack.num_allowed
    """Of one that is right at all: also what the rule allows is worth a look."""
    by_the_rule = f", {hack.num_allowed:,} of them as the rule has it" if hack.num_allowed else ""
    found = _check(
        group,
        settings,
        f"Hack: {name}",
        num_bad / hack.num_rows > settings.max_hack_share,
        f"the hack {name!r} scores right on {hack.num_right:,} of {hack.num_rows:,} rows{by_the_rule}",
        f"verifier_audit.max_hack_share {settings.max_hack_share:g} of those where it does not name the answer",
        "hack_right" if num_bad else "hack_allowed",
        "a policy finds what pays: use another verifier or version, or leave these rows out. If the fault is wanted, "
        f"add {group.verifier} to verifier_audit.known_faults",
        name,
    )
    return found if found.status != "ok" else replace(found, status="noticed")
