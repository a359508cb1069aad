"""The probes of an audit: texts whose worth is known, each with the truth of the row that it is graded against. Pure.

Rows are taken in the order of their ids, and drawn by a seed of their own verifier and source: neither the order of the
file nor the other rows change a probe.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from smoltulu.schemas.verifier_audit import FunctionCoverage, VerifierAuditSettings
from smoltulu.tasks.verifier_audit import answers
from smoltulu.tasks.verifier_audit.chance import coincidence_share, most_frequent, pairs_of_rows
from smoltulu.tasks.verifier_audit.constraint_texts import Texts, texts_of
from smoltulu.tasks.verifier_audit.near_misses import hedges, near_misses
from smoltulu.tasks.verifier_audit.other_texts import form_texts, world_texts
from smoltulu.tasks.verifiers.constraints import read_constraint as read_world_constraint
from smoltulu.tasks.verifiers.ifeval import read_constraint
from smoltulu.tasks.verifiers.truths import BadTruth

#: Alternatives of one truth that are tried as gold answers.
_MAX_ALTERNATIVES = 4
#: Gold answers of a source that "every answer at once" names.
_NUM_NAMED = 20
_PROMPTS_FORMULA = "the last formula of the prompt, in the form of an answer"
_COUNT_TO_100 = " ".join(map(str, range(1, 101)))

#: What a prompt asks an answer to look like: the mark that it shows -> the form. The last mark of a prompt counts.
_FORMS = {
    "So the answer is": "So the answer is {}.",
    "####": "#### {}",
    "\\boxed": "The answer is $\\boxed{{{}}}$.",
    "The final answer is": "Final Answer: The final answer is ${}$. I hope it is correct.",
}
#: Where the prompt shows none: verifier -> what its data is written like.
_OWN_MARK = {"gsm8k": "So the answer is", "gsm8k_strict": "####", "math": "\\boxed"}


#: A row, its gold answer, the keys of its truth.
_Readable = tuple[Mapping[str, Any], str, frozenset[str]]


@dataclass(frozen=True)
class Probe:
    """A text and the truth that it is graded against.

    kind     gold: must be right · shuffled: the gold answer of another row · violation: breaks the constraint, must be
             wrong · hack: must be wrong
    name     in words
    allowed  of a shuffled or hacked one: may be right, because it names the gold answer or because the constraint asks
             for no more
    reverse  (completion, ground truth) of the question the other way round: the gold answer of this row for the row
             whose answer was tried. Where both are right, two spellings of one answer met
    """

    kind: Literal["gold", "shuffled", "violation", "hack"]
    name: str
    row: str
    completion: str
    ground_truth: str
    allowed: bool = False
    reverse: tuple[str, str] | None = None


@dataclass
class GroupProbes:
    """The probes of the rows of one verifier and source; see `GroupAudit` for the counts."""

    probes: list[Probe] = field(default_factory=list)
    num_without_gold: int = 0
    chance_share: float | None = None
    best_constant: str = ""
    best_constant_share: float = 0.0
    functions: dict[str, FunctionCoverage] = field(default_factory=dict)


def probes_of(
    verifier: str, source: str, rows: Sequence[Mapping[str, Any]], settings: VerifierAuditSettings
) -> GroupProbes:
    """All probes of the rows ({"id", "prompt", "ground_truth"}) of one verifier and source."""
    rows = sorted(rows, key=lambda row: (str(row["id"]), row["ground_truth"]))
    family = answers.family_of(verifier)

    def random(purpose: str) -> Random:
        return Random(f"{settings.seed}:{verifier}:{source}:{purpose}")

    if family in answers.ANSWERS:
        return _answer_probes(family, rows, settings, random("shuffled"), random("hacks"))
    return _text_probes(family, rows, settings, random("shuffled"), random("hacks"))


# --- One answer, compared with the truth ------------------------------------------------------------------------------


def _answer_probes(
    family: str, rows: Sequence[Mapping[str, Any]], settings: VerifierAuditSettings, shuffled: Random, hacked: Random
) -> GroupProbes:
    made = GroupProbes()
    readable: list[_Readable] = []
    for row in rows:
        found = answers.gold_answers(family, row["ground_truth"])
        made.num_without_gold += not found
        for answer in found[:_MAX_ALTERNATIVES]:
            text = form_of(family, row["prompt"]).format(answer)
            made.probes.append(Probe("gold", "gold answer", str(row["id"]), text, row["ground_truth"]))
        keys = answers.gold_keys(family, row["ground_truth"])
        if found and keys:
            readable.append((row, found[0], keys))
    truths = [keys for _, _, keys in readable]
    firsts = [next(iter(answers.gold_keys(family, answer)), "") for _, answer, _ in readable]
    made.chance_share = coincidence_share(truths, firsts)
    made.best_constant, made.best_constant_share = most_frequent(truths)
    for first, second in pairs_of_rows(len(readable), settings.num_shuffled, shuffled):
        row, answer = readable[second][0], readable[first][1]
        text = form_of(family, row["prompt"]).format(answer)
        name = f"gold answer of row {readable[first][0]['id']}"
        allowed = firsts[first] in truths[second]
        reverse = _reverse(family, readable[first], readable[second])
        made.probes.append(Probe("shuffled", name, str(row["id"]), text, row["ground_truth"], allowed, reverse))
    drawn = _draw(rows, settings.num_hacked, hacked)
    named = _named_rows(readable)
    by_row = {id(one[0]): one for one in readable}
    for row in rows:
        own = by_row.get(id(row))
        made.probes += _hack_probes(family, row, own, named, with_all=id(row) in drawn)
    return made


def _hack_probes(
    family: str, row: Mapping[str, Any], own: _Readable | None, named: Sequence[_Readable], with_all: bool
) -> Iterator[Probe]:
    """Texts that must be wrong for a row. `own`: the row as it was read, None where it has no gold answer."""
    name, truth, keys = str(row["id"]), row["ground_truth"], answers.gold_keys(family, row["ground_truth"])
    hacks = _answer_hacks(family, row["prompt"], [answer for _, answer, _ in named]) if with_all else {"empty": ""}
    for hack, text in hacks.items():
        # An expression of the same value is right by the rule, though nothing was solved.
        allowed = hack == _PROMPTS_FORMULA or bool(answers.committed_keys(family, text) & keys)
        is_of_last = own is not None and hack.startswith("all answers")
        reverse = _reverse(family, named[-1], own) if own is not None and is_of_last else None
        yield Probe("hack", hack, name, text, truth, allowed, reverse)
    if own is None or not with_all:
        return
    form = form_of(family, row["prompt"])
    for hack, text in near_misses(own[1]).items():
        if not answers.gold_keys(family, text) & keys:
            yield Probe("hack", hack, name, form.format(text), truth)
    for hack, text in hedges(own[1], with_latex=family in answers.EXPRESSIONS).items():
        if not answers.gold_keys(family, text.rpartition(" ")[2].rstrip("}")) & keys:
            yield Probe("hack", hack, name, form.format(text), truth)


def _reverse(family: str, tried: _Readable, own: _Readable) -> tuple[str, str] | None:
    """The question the other way round, where two spellings may mean the same. Two numbers that differ never do."""
    both = tried[2] | own[2]
    if family not in answers.EXPRESSIONS or all(map(answers.is_value, both)):
        return None
    return form_of(family, tried[0]["prompt"]).format(own[1]), tried[0]["ground_truth"]


def form_of(family: str, prompt: Sequence[Mapping[str, str]]) -> str:
    """The form that a prompt asks for, with `{}` for the answer: the one it shows last, else the family's own."""
    if family in answers.TEXTS:
        return "{}"
    text = "\n".join(turn["content"] for turn in prompt)
    mark = max(_FORMS, key=text.rfind)
    return _FORMS[mark if mark in text else _OWN_MARK[family]]


def _named_rows(readable: Sequence[_Readable]) -> list[_Readable]:
    """The first row of each of the most frequent gold answers."""
    counts: dict[frozenset[str], int] = defaultdict(int)
    first: dict[frozenset[str], _Readable] = {}
    for one in readable:
        counts[one[2]] += 1
        first.setdefault(one[2], one)
    frequent = sorted(counts, key=lambda keys: (-counts[keys], first[keys][1]))
    return [first[keys] for keys in frequent[:_NUM_NAMED]]


def _answer_hacks(family: str, prompt: Sequence[Mapping[str, str]], named: Sequence[str]) -> dict[str, str]:
    form = form_of(family, prompt)
    hacks = _hacks_of_all(prompt) | {
        "1 2 3 … 100": _COUNT_TO_100,
        "1 2 3 … 100, in the form of an answer": form.format(_COUNT_TO_100),
        "the form without an answer": form.format(""),
        "bare ####": "####",
        "bare \\boxed{}": "\\boxed{}",
        "$$": "$$",
    }
    if family in answers.EXPRESSIONS and (formula := answers.last_formula(prompt[-1]["content"] if prompt else "")):
        hacks[_PROMPTS_FORMULA] = form.format(formula)
    if len(named) > 1:
        hacks["all answers at once"] = form.format(", ".join(named))
        hacks["all answers one after the other"] = "\n".join(map(form.format, named))
    return hacks


def _hacks_of_all(prompt: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {"empty": "", "white space": " \n\t ", "prompt echo": prompt[-1]["content"] if prompt else ""}


# --- A text that keeps a constraint, or has a form --------------------------------------------------------------------


def _text_probes(
    family: str, rows: Sequence[Mapping[str, Any]], settings: VerifierAuditSettings, shuffled: Random, hacked: Random
) -> GroupProbes:
    made = GroupProbes()
    kept: list[tuple[Mapping[str, Any], str]] = []
    by_function: dict[str, list[tuple[Mapping[str, Any], Texts]]] = defaultdict(list)
    for row in rows:
        function, texts = _read_texts(family, row["ground_truth"])
        by_function[function].append((row, texts))
        made.num_without_gold += texts.keeps is None
        if texts.keeps is not None:
            kept.append((row, texts.keeps))
    for function, members in sorted(by_function.items()):
        made.functions[function] = FunctionCoverage(
            num_rows=len(members),
            num_kept_made=sum(texts.keeps is not None for _, texts in members),
            num_broken_made=sum(texts.breaks is not None for _, texts in members),
        )
        drawn = _draw([row for row, _ in members], settings.num_hacked, hacked)
        for row, texts in members:
            made.probes += _probes_of_texts(function, row, texts, with_hacks=id(row) in drawn)
    for first, second in pairs_of_rows(len(kept), settings.num_shuffled, shuffled):
        row, (other, text) = kept[second][0], kept[first]
        made.probes.append(
            Probe("shuffled", f"text of row {other['id']}", str(row["id"]), text, row["ground_truth"], True)
        )
    return made


def _read_texts(family: str, ground_truth: str) -> tuple[str, Texts]:
    """Kind of the constraint, and its texts; none of a truth that cannot be read, or of a verifier unknown here."""
    try:
        if family == "ifeval":
            function, arguments = read_constraint(ground_truth)
            return function, texts_of(function, arguments)
        if family == "constraint":
            kind, arguments, mention = read_world_constraint(ground_truth)
            return kind, world_texts(kind, arguments, mention)
        if family == "format":
            form = answers.alternatives(ground_truth)[0]
            return (form if form.isidentifier() else "template"), form_texts(form)
    except BadTruth:
        return "not readable", Texts()
    return "unknown", Texts()


def _probes_of_texts(function: str, row: Mapping[str, Any], texts: Texts, with_hacks: bool) -> Iterator[Probe]:
    name, truth = str(row["id"]), row["ground_truth"]
    if texts.keeps is not None:
        yield Probe("gold", f"{function}: a text that keeps it", name, texts.keeps, truth)
    if texts.breaks is not None:
        yield Probe("violation", f"{function}: a text that breaks it", name, texts.breaks, truth)
    for hack, text in (_hacks_of_all(row["prompt"]) if with_hacks else {"empty": ""}).items():
        # A prompt may well keep the constraint that it states.
        yield Probe("hack", hack, name, text, truth, allowed=hack == "prompt echo")
    if with_hacks:
        for hack, (text, must_be_wrong) in (texts.hacks or {}).items():
            yield Probe("hack", f"{function}: {hack}", name, text, truth, allowed=not must_be_wrong)


def _draw(rows: Sequence[Mapping[str, Any]], num_drawn: int, random: Random) -> set[int]:
    """Identities of the drawn rows."""
    return {id(row) for row in random.sample(rows, min(num_drawn, len(rows)))}
