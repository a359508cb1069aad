"""Faults of what looks after a store: SIGKILL in `smoltulu gc`, `verify`, `tag`, `untag` and `audit`."""

from __future__ import annotations

import filecmp
import functools
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.artifacts import layout
from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.store import Missing
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.artifacts.upkeep.tags import set_tag
from tests.faults import damage, served
from tests.faults.commands import (
    DAY,
    GC,
    Moment,
    cli,
    command_of,
    copied,
    interrupt,
    made_again,
    no_trash,
    not_whole,
    same_names,
    start,
    unbroken,
    without_inputs,
)
from tests.faults.kills import Result
from tests.faults.sandbox import TRAINERS, Sandbox

if TYPE_CHECKING:
    from tests.faults.draw import Draw

_TAGS = ("set", "move", "remove")


# gc


def killed_gc(sandbox: Sandbox, baseline: Sandbox, node: str, moment: Moment, is_remade: bool = True) -> Result:
    """Kill a gc that may take one evaluation, what stands on it, and everything old; the rest is tagged.

    is_remade  the recipe runs afterwards
    """
    sandbox.copy_from(baseline)
    going = _to_tidy(sandbox, node)
    other = copied(sandbox, "unbroken")
    whole = unbroken(other, command_of(other, *GC), other.root)
    result, run = interrupt(sandbox, command_of(sandbox, *GC), sandbox.root, moment, whole)
    if whole.code or not all(isinstance(other.found(name), Missing) for name in going):
        result.problems.append(f"the unbroken gc left what should go: status {whole.code}, {whole.text[-300:]}")
    kept = [name for name in sandbox.graph.nodes if name not in going]
    result.problems += not_whole(sandbox, kept, run.text) + without_inputs(sandbox)
    code, text = cli(sandbox, *GC)
    if code:
        result.problems.append(f"the next gc failed: {text[-300:]}")
    same_names(result, sandbox, other)
    return made_again(sandbox, baseline, set(going), result) if is_remade else result


def _to_tidy(sandbox: Sandbox, node: str) -> list[str]:
    """Give gc one of everything to remove; all but `node` and what stands on it is tagged. Returns what may go."""
    going = [node]
    for name, one in sandbox.graph.nodes.items():
        if any(binding.node in going for binding in one.bindings().values()):
            going.append(name)
    catalogue = Catalogue(sandbox.root)
    for name in sandbox.graph.nodes:
        folder = sandbox.folder(name)
        if name not in going:
            set_tag(catalogue, f"keep-{name}", Ref(folder.parent.name, folder.name))
        if name in TRAINERS or name in going:
            _second_generation(folder)
        (folder / "work" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "work" / "log.txt").write_text("left by an attempt")
        (folder / ".trash-work-1-1").mkdir()
        (folder / ".trash-work-1-1" / "log.txt").write_text("left by a kill")
    aside = sandbox.folder(node) / f"{layout.ASIDE_PREFIX}gen-0003-1"
    shutil.copytree(sandbox.folder(node) / "gen-0001", aside)
    (aside / layout.REASON).write_text("a test")
    for file in (sandbox.root / layout.TAGS / ".keep.json.1", sandbox.root / ".trash-old"):
        file.write_text("left by a kill")
        os.utime(file, (time.time() - 2 * DAY,) * 2)
    return going


def _second_generation(folder: Path) -> None:
    """The same artifact made again: the first generation is old."""
    shutil.copytree(folder / "gen-0001", folder / "gen-0002")
    (folder / layout.CURRENT).write_text("gen-0002")


# verify


def killed_verify(
    sandbox: Sandbox,
    baseline: Sandbox,
    nodes: tuple[str, ...],
    rng: random.Random,
    moment: Moment,
    is_remade: bool = True,
) -> Result:
    """Kill a check of a store in which one bit of some artifacts is flipped; only those may be made again."""
    sandbox.copy_from(baseline)
    for node in nodes:
        generation = sandbox.folder(node) / "gen-0001"
        files = sandbox.manifest(node).files
        damage.flip(generation / rng.choice(sorted(name for name in files if files[name].size)), rng)
    other = copied(sandbox, "unbroken")
    whole = unbroken(other, command_of(other, "verify"), other.root)
    result, run = interrupt(sandbox, command_of(sandbox, "verify"), sandbox.root, moment, whole)
    if whole.code != 1:
        result.problems.append(f"the unbroken check did not see the damage: {whole.text[-300:]}")
    sound = [name for name in sandbox.graph.nodes if name not in nodes]
    result.problems += not_whole(sandbox, sound, run.text)
    cli(sandbox, "verify")
    code, text = cli(sandbox, "verify")
    if code:
        result.problems.append(f"two checks after the kill, something is damaged: {text[-300:]}")
    result = made_again(sandbox, baseline, set(nodes), result) if is_remade else result
    code, text = cli(sandbox, *GC)
    left = [path.name for path in sandbox.root.glob("*/*/damaged-*")]
    if code or left:
        result.problems.append(f"gc leaves what was set aside: {left}, {text[-300:]}")
    return result


# Tags


def killed_tag(sandbox: Sandbox, baseline: Sandbox, how: str, node: str, other: str, moment: Moment) -> Result:
    """Kill the giving, moving or taking away of a tag: it names the old artifact, the new one, or nothing."""
    sandbox.copy_from(baseline)
    old, new = (Ref(folder.parent.name, folder.name) for folder in (sandbox.folder(node), sandbox.folder(other)))
    if how != "set":
        set_tag(Catalogue(sandbox.root), "best", old)
    arguments = {
        "set": ("tag", "best", new.key),
        "move": ("tag", "best", new.key, "--move"),
        "remove": ("untag", "best"),
    }[how]
    before, after = (None if how == "set" else old), (None if how == "remove" else new)
    trial = copied(sandbox, "unbroken")
    whole = unbroken(trial, command_of(trial, *arguments), trial.root)
    result, _ = interrupt(sandbox, command_of(sandbox, *arguments), sandbox.root, moment, whole)
    named = _named(sandbox, result)
    if whole.code or named not in (before, after):
        result.problems.append(f"the tag names {named}, neither {before} nor {after}")
    result.problems += not_whole(sandbox, list(sandbox.graph.nodes), "")
    # gc, now: it keeps what the tag names, with all that it was made from.
    tidied = copied(sandbox, "tidied")
    code, text = cli(tidied, *GC)
    if code:
        result.problems.append(f"gc failed: {text[-300:]}")
    result.problems += without_inputs(tidied)
    for name in (node, other):
        folder = tidied.folder(name)
        if (folder.parent.name, folder.name) == named:
            result.problems += not_whole(tidied, [name], text)
    # The same again, then nothing of the kill is left.
    code, text = cli(sandbox, *arguments)
    if (code and not (how == "remove" and named is None)) or _named(sandbox, result) != after:
        result.problems.append(f"the command again: status {code}, {text[-300:]}")
    no_trash(sandbox, result)
    return result


def _named(sandbox: Sandbox, result: Result) -> Ref | None:
    catalogue = Catalogue(sandbox.root)
    record = catalogue.tags().get("best")
    if catalogue.notes:
        result.problems.append(f"torn: {'; '.join(catalogue.notes)}")
    return None if record is None else Ref(record.stage, record.key)


# Audit


def killed_audit(sandbox: Sandbox, baseline: Sandbox, moment: Moment, detector: str = "auto") -> Result:
    """Kill an audit of a data set, audit again; another store was never interrupted."""
    folder = sandbox.home / "data"
    _write_audited(folder)
    sandbox.root.mkdir(parents=True)
    other = sandbox.beside("unbroken")
    other.root.mkdir(parents=True)

    def command(of: Sandbox) -> list[str]:
        benchmarks = [text for name in ("gsm8k", "piqa") for text in ("-b", f"{name}={folder / name}.jsonl:text")]
        audit = ["audit", str(folder / "train.jsonl"), *benchmarks, "--detector", detector, "--threads", "1", "--json"]
        return command_of(of, *audit)

    whole = unbroken(other, command(other), other.home)
    result, _ = interrupt(sandbox, command(sandbox), sandbox.home, moment, whole)
    run = start(sandbox, command(sandbox))
    if run.wait() or whole.code:
        result.problems.append(f"the next audit failed: {run.text[-300:]}")
        return result
    if _told(run.text, other, sandbox) != _told(whole.text, other, sandbox):
        result.problems.append(f"another result: {run.text[-300:]}")
    _same_files(result, sandbox, other)
    code, text = cli(sandbox, "verify")
    if code:
        result.problems.append(f"damaged: {text[-300:]}")
    no_trash(sandbox, result)
    return result


def _write_audited(folder: Path) -> None:
    """Rows of which every fourth holds an instance of one of two benchmarks."""
    folder.mkdir(parents=True)
    texts = [f"In town {n} a baker sells {n} loaves on Monday and {n * 7} on Tuesday, how many?" for n in range(40)]
    for name, own in (("gsm8k", texts[:20]), ("piqa", texts[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    rows = [
        {"instruction": texts[n // 4 % 40] if n % 4 == 0 else f"Is {n} even?", "output": "Yes."} for n in range(800)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _told(text: str, *places: Sandbox) -> object:
    """The JSON of an audit without what differs from run to run, and without the paths of places."""
    for place in places:
        text = text.replace(str(place.home), "")
    (told,) = json.loads(text[text.index("[") :])
    return {name: value for name, value in told.items() if name != "outcomes"}


def _same_files(result: Result, sandbox: Sandbox, other: Sandbox) -> None:
    """The artifacts and the reports of two audits: the same files, byte for byte."""
    for pattern in ("store/*/*/gen-*", "reports/*"):
        mine, theirs = (
            {path.relative_to(of.home) for path in of.home.glob(f"{pattern}/**/*") if path.is_file()}
            for of in (sandbox, other)
        )
        if mine != theirs:
            result.problems.append(f"other files: {sorted(map(str, mine ^ theirs))[:5]}")
        for name in sorted(mine & theirs):
            told = name.name in (layout.MANIFEST, "result.json", "index.html") or "logs" in name.parts
            if not told and not filecmp.cmp(sandbox.home / name, other.home / name, shallow=False):
                result.problems.append(f"{name} differs")


def add(draw: Draw, num: int = 1) -> None:
    """`num` of each kind, instants drawn from the draw's seed; needs evaluations in the recipe."""
    evaluations = [node for node in draw.nodes if node.startswith("evaluation-")]
    cheap = [node for node in draw.nodes if node.startswith(("evaluation-", "dataset-", "contamination-"))]
    for turn in range(num):
        rng = draw._rng()
        node, moment = rng.choice(evaluations), Moment.draw(rng)
        attempt = functools.partial(killed_gc, node=node, moment=moment)
        draw.add("SIGKILL of gc", f"{node} goes, {moment}", attempt)
        rng = draw._rng()
        nodes, moment = tuple(rng.sample(cheap, 3)), Moment.draw(rng)
        attempt = functools.partial(killed_verify, nodes=nodes, rng=rng, moment=moment)
        draw.add("SIGKILL of verify", f"{', '.join(nodes)} damaged, {moment}", attempt)
        rng = draw._rng()
        how, moment = _TAGS[turn % len(_TAGS)], Moment.draw(rng)
        node, other = rng.sample(draw.nodes, 2)
        attempt = functools.partial(killed_tag, how=how, node=node, other=other, moment=moment)
        draw.add("SIGKILL of a tag", f"{how}, {moment}", attempt)
        moment = Moment.draw(draw._rng(), ("parent", "parent", "child", None))
        draw.add("SIGKILL of an audit", str(moment), functools.partial(killed_audit, moment=moment))
    served.add(draw, num)
