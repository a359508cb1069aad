"""Pages and cards of values that try to be markup: whatever a text says, it changes no element, attribute or cell.

Every page is made twice, once with harmless texts: element by element, both must be built alike.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pytest
import yaml
from markdown_it import MarkdownIt
from pydantic import BaseModel, TypeAdapter, ValidationError

from smoltulu.flows.cli import demo
from smoltulu.flows.cli.output import console
from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.contamination import ContaminationOutputs
from smoltulu.schemas.data import DatasetOutputs
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.languages import LanguageOutputs, LanguageShare
from smoltulu.schemas.preflight import DryRun, LengthReport, PreflightConfig, PreflightOutputs
from smoltulu.schemas.publish import PublishSettings, PublishStageConfig
from smoltulu.schemas.run import RunSummary, StageRun
from smoltulu.schemas.training import DPOSettings
from smoltulu.tasks.data.benchmarks import load_registry
from smoltulu.tasks.preflight.report import html_report as preflight_report
from smoltulu.tasks.preflight.rows import Shown
from smoltulu.tasks.publish.model_card import model_card
from smoltulu.tasks.report import html_report, markdown
from smoltulu.tasks.report.audit import audit_page
from smoltulu.tasks.report.hits import BenchmarkPages, write_hit_pages
from smoltulu.tasks.report.render import render
from smoltulu.tasks.report.text import clean
from tests.flows.test_audit_parts import report, result, write_hits
from tests.tasks.report.test_report import Page, sample_run

HARMLESS = "x"
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>' onload='alert(2)",
    "</pre></td></details></svg></title></style><b>",
    "<!-- <![CDATA[",
    "&lt;script&gt; &#60;b&#62;",
    "{{7*7}}{% raw %}{# ",
    "a | b\n|---|---|\n| c | d |\n\n",
    "``` ` \n\n```\n~~~\n# heading\n\n````",
    "\n\n- item\n\n> quote\n\n<div onclick=x>\n\n---\n\n",
    "[a](javascript:x) ![b](http://example.org/c) <http://example.org>",
    "_a_ *b* __c__ ~~d~~ $e$ \\",
    "# 1. ",
    "[/] [red]",
    "\u2028\u2029\x85",
    "\x1b[31m\x1b]0;title\x07\x9b31m\x00",
    "\u202e\u2066\u200f",
]
Corrupt = Callable[[Any], Any]
Model = TypeVar("Model", bound=BaseModel)
#: What a report of a run looks values up by.
KEPT_KEYS = frozenset({"settings", "mode", "policy"})
OUTPUTS: dict[str, type[BaseModel]] = {
    "dataset": DatasetOutputs,
    "contamination": ContaminationOutputs,
    "evaluation": EvaluationOutputs,
    "preflight": PreflightOutputs,
}


def corrupter(bad: str, kept_fields: frozenset[str] = frozenset({"stage"})) -> Corrupt:
    """A function that puts `bad` around every text in a value, where the type of a field allows it."""

    def corrupt(value: Any) -> Any:
        if isinstance(value, str):
            return f"{bad}{value}{bad}"
        if isinstance(value, Manifest):
            outputs = dict(value.outputs)
            if value.spec.stage in OUTPUTS:
                outputs = corrupt(OUTPUTS[value.spec.stage].model_validate(outputs)).model_dump()
            else:
                outputs = corrupt(outputs) | {"history_file": outputs.get("history_file")}
            return corrupted(value).model_copy(update={"outputs": outputs})
        if isinstance(value, BaseModel):
            return corrupted(value)
        if isinstance(value, Mapping):
            return {key if key in KEPT_KEYS else corrupt(key): corrupt(item) for key, item in value.items()}
        return type(value)(map(corrupt, value)) if isinstance(value, (list, tuple)) else value

    def corrupted(value: Model) -> Model:
        changed = {}
        for name, field in type(value).model_fields.items():
            new = corrupt(getattr(value, name))
            try:
                # With its bounds: what names a file of an artifact is a plain path.
                TypeAdapter(Annotated[(field.annotation, field)]).validate_python(new)
            except ValidationError:
                continue
            if name not in kept_fields:
                changed[name] = new
        return value.model_copy(update=changed)

    return corrupt


# The pages: each from a function that corrupts what it is given.


def preflight_outputs() -> PreflightOutputs:
    return PreflightOutputs(
        num_rows=9,
        num_source_rows=10,
        num_duplicates=2,
        lengths=LengthReport(mean=5, percentiles={"50": 5, "100": 9}, histogram=(1, 4, 4)),
        first_rows={"num_duplicates": (3, 7)},
        dry_run=DryRun(
            device="cpu",
            precision="float32",
            per_device_train_batch_size=2,
            activation_checkpointing=True,
            num_tokens=18,
            seconds=1.0,
            peak_memory_bytes=10,
        ),
    )


def corrupted_run(
    corrupt: Corrupt, folder: Path, made: int | None
) -> tuple[RunSummary, dict[str, Manifest], dict, str]:
    summary, manifests, folders, recipe = sample_run(folder, made=made)
    preflight = manifests["sft"].spec.model_copy(update={"stage": "preflight"})
    outputs = preflight_outputs().model_dump(mode="json")
    manifests["preflight-sft"] = manifests["sft"].model_copy(update={"spec": preflight, "outputs": outputs})
    run = StageRun(node="preflight-sft", stage="preflight", outcome="Completed")
    summary = summary.model_copy(update={"stages": (*summary.stages, run)})
    for file in folder.glob("*/history.jsonl"):
        lines = [{corrupt("metric"): step, "loss": step, "step": step} for step in range(3)]
        file.write_text("\n".join(map(json.dumps, lines)))
    return (
        corrupt(summary),
        corrupt(manifests),
        {corrupt(node): place for node, place in folders.items()},
        corrupt(recipe),
    )


def finished(corrupt: Corrupt, folder: Path) -> str:
    return html_report(*corrupted_run(corrupt, folder, made=None))


def failed(corrupt: Corrupt, folder: Path) -> str:
    return html_report(*corrupted_run(corrupt, folder, made=15))


def preflight(corrupt: Corrupt, folder: Path) -> str:
    training = DPOSettings(learning_rate=1e-3, effective_batch_size=4, max_length=8)
    config = PreflightConfig(kind="pairs", max_length=8, overlong="drop", subject="dpo")
    shown = Shown(number=0, sides=[[(corrupt("piece"), True), (corrupt("more"), False)]] * 2, num_left_out=1)
    texts = {3: corrupt("row"), 7: corrupt("row")}
    outputs = corrupt(preflight_outputs())
    outputs = outputs.model_copy(update={"first_rows": {corrupt("num_special"): (3, 7)}})
    return preflight_report(corrupt(config), outputs, training, texts, [shown])


def languages() -> LanguageOutputs:
    share = LanguageShare(language="en", name="English", num_rows=7, share=0.7, share_of_determined=1)
    counts: dict[str, Any] = {"num_rows": 10, "num_determined": 7, "undetermined": {"too_short": 3}}
    return LanguageOutputs(kind="sft", detector="lingua", detector_version="2", shares=(share,), **counts)


def language_page(corrupt: Corrupt, folder: Path) -> str:
    return render("languages.html.jinja", languages=corrupt(languages()))


def audit(corrupt: Corrupt, folder: Path) -> str:
    reports = [report("own", 1, 3), report("gone", 0, 0, not_checked="gated")]
    pages = [BenchmarkPages(corrupt("own"), 1, ("01-own-0001.html",))]
    shown = corrupt(result(*reports, languages=languages()))
    return audit_page(shown, load_registry(), dict.fromkeys(shown.settings.modes, pages))


def hits(corrupt: Corrupt, folder: Path) -> str:
    files = write_hits(folder, 2, 2, corrupt("a question"))
    (pages,) = write_hit_pages(*files, folder / "pages")
    return (folder / "pages" / pages.files[0]).read_text("utf-8")


@pytest.mark.parametrize("bad", HOSTILE)
@pytest.mark.parametrize("page", [finished, failed, preflight, language_page, audit, hits])
def test_a_page_is_built_alike_whatever_its_texts_say(page: Callable[..., str], bad: str, tmp_path: Path) -> None:
    sources = []
    for name, text in (("harmless", HARMLESS), ("hostile", bad)):
        (tmp_path / name).mkdir()
        sources.append(page(corrupter(text), tmp_path / name))
    harmless, hostile = map(Page, sources)
    assert not hostile.open
    assert [(tag, list(names)) for tag, names in hostile.tags] == [(tag, list(names)) for tag, names in harmless.tags]
    assert clean(bad).strip() in "".join(hostile.words), "shown, as text"
    for character in set(clean(bad)) ^ set(bad):
        assert character == "�" or character not in sources[1]
    assert "Content-Security-Policy" in sources[1]


def test_stages_that_nobody_knows_do_no_harm(tmp_path: Path) -> None:
    corrupt = corrupter("".join(HOSTILE), kept_fields=frozenset())
    page = Page(html_report(*corrupted_run(corrupt, tmp_path, made=15)))
    assert not page.open and "script" not in {tag for tag, _ in page.tags}


# Cards: as a Markdown renderer that lets HTML through shows them.


def run_markdown(corrupt: Corrupt, folder: Path) -> str:
    return markdown(corrupt(sample_run(folder, made=15)[0]))


def card(corrupt: Corrupt, folder: Path) -> str:
    _, manifests, _, recipe = sample_run(folder)
    config = PublishStageConfig(
        recipe_name=corrupt("tiny"),
        subject="sft",
        settings=PublishSettings(),
        recipe={"base_model": {"repository": corrupt("me/base")}},
    )
    scores = corrupt(EvaluationOutputs.model_validate(manifests["evaluation-sft"].outputs))
    evaluations = {"own": scores.model_copy(update={"subject": "sft"}), "other": scores}
    made = {node: manifests[node] for node in ("world", "base-model", "sft")}
    return model_card(config, corrupt(made), evaluations, corrupt(recipe), corrupt("ab" * 32))


@pytest.mark.parametrize("bad", HOSTILE)
@pytest.mark.parametrize("make", [run_markdown, card])
def test_a_card_is_built_alike_whatever_its_texts_say(make: Callable[..., str], bad: str, tmp_path: Path) -> None:
    renderer = MarkdownIt("commonmark").enable("table")
    pages = []
    for name, text in (("harmless", HARMLESS), ("hostile", bad)):
        source = make(corrupter(text), tmp_path / name)
        if make is card:
            _, metadata, source = re.split(r"^---$", source, maxsplit=2, flags=re.MULTILINE)
            named = yaml.safe_load(metadata)["model-index"][0]["name"]
            assert named.split() == f"{text}tiny{text}".split()  # YAML reads U+0085 as a line's end
        pages.append(Page(renderer.render(source)))
        assert not any(character in source for character in "\x1b\x07\x00\u2028\u202e")
    harmless, hostile = pages
    assert [(tag, list(names)) for tag, names in hostile.tags] == [(tag, list(names)) for tag, names in harmless.tags]
    for line in clean(bad).split("\n"):
        assert line.strip() in "".join(hostile.words), "shown, as text"


# The terminal.


@pytest.mark.parametrize("bad", HOSTILE)
def test_the_terminal_obeys_no_text(bad: str, tmp_path: Path) -> None:
    output = io.StringIO()
    for made in (None, 15):
        summary = corrupter(bad)(sample_run(tmp_path, made=made)[0])
        demo.show(summary, console(file=output))
    assert all(character == "\n" or character.isprintable() for character in output.getvalue())
    assert "stages cached" in output.getvalue()
