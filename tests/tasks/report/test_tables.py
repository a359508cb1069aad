"""Tables as Markdown, LaTeX and HTML: a golden example, names that try to be markup, and the section of a report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from smoltulu.artifacts.readable import clean
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.tasks.report import html_report
from smoltulu.tasks.report.latex import ESCAPED, escape, latex
from smoltulu.tasks.report.tables import FORMATS, measured_model, tables_of_run, tables_section
from smoltulu.tasks.tables.build import paper_table, stage_tables
from smoltulu.tasks.tables.published import parse_published
from smoltulu.tasks.tables.values import Table
from tests.tasks.report.test_hostile import HOSTILE
from tests.tasks.report.test_report import Page, sample_run
from tests.tasks.tables.scores import model, right, score

PUBLISHED = {
    "format": 1,
    "sources": {"card": {"title": "a card", "url": "https://example.org/card"}},
    "rows": {
        "piqa": {"title": "PIQA", "task": "paper_piqa", "metric": "acc_norm,none", "num_items": [40]},
        "arc": {"title": "ARC", "task": "paper_arc", "metric": "acc_norm,none"},
    },
    "models": {"theirs": {"title": "Theirs", "sources": ["card"], "figures": {"piqa": 95.0}}},
    "tables": {"3": {"title": "Table 3", "subjects": ["sft"], "rows": ["piqa", "arc"], "models": ["theirs"]}},
}


def small() -> Table:
    """10 and 30 of 40 right beside 95 %: both are below it, the second is better than the first."""
    models = [model("ours a", right(10), score("paper_arc", value=0.5, limited=True)), model("ours b", right(30))]
    return paper_table("3", parse_published(PUBLISHED, "by hand"), models)


def test_golden_markdown() -> None:
    expected = r"""
### Table 3

| Task | A: Theirs, published \[1\] | ours a, measured | ours b, measured | Measured with |
|---|---:|---:|---:|---|
| PIQA | 95.0 | 25.0 ± 1.0 (n = 40) &lt; A | **75.0 ± 1.0** (n = 40) &lt; A | lm-eval 0.4.13, paper_piqa version 1.0, 0-shot, bfloat16 |
| ARC | - | 50.0 ± 1.0 (n = 1,838, part) not comparable \[2\] | - | lm-eval 0.4.13, paper_arc version 1.0, 0-shot, bfloat16 |

Percent; ± is one standard error, n the number of items; - was not measured, or not published. Published columns are as printed; nothing of them was measured here. Bold: significantly better than every other measured model of the row that it can be compared with (paired by item; all tests of a row together at 0.05, Holm). &gt; A, &lt; B: significantly above the published column A, below B, at 0.05 (Holm over the row). That test is unpaired: of a published figure only its sampling error is known, from its number of items.

\[1\] published: a card, https://example.org/card

\[2\] not comparable: part of the task
"""  # noqa: E501
    assert FORMATS["markdown"]([small()]) == expected.lstrip()


def test_golden_latex() -> None:
    expected = r"""
% Table 3
\begin{tabular}{l|r|rr|l}
\hline
Task & A: Theirs, published\textsuperscript{1} & ours a, measured & ours b, measured & Measured with \\
\hline
PIQA & 95.0 & 25.0 $\pm$ 1.0 (n = 40) \textless{}\,A & \textbf{75.0 $\pm$ 1.0} (n = 40) \textless{}\,A & lm-eval 0.4.13, paper\_piqa version 1.0, 0-shot, bfloat16 \\
ARC & - & 50.0 $\pm$ 1.0 (n = 1,838, part) not comparable\textsuperscript{2} & - & lm-eval 0.4.13, paper\_arc version 1.0, 0-shot, bfloat16 \\
\hline
\end{tabular}
"""  # noqa: E501
    made = FORMATS["latex"]([small()])
    assert made.startswith(expected.lstrip())
    assert r"\textsuperscript{1} published: a card, https://example.org/card.\par" in made


def test_golden_html() -> None:
    page = FORMATS["html"]([small()])
    folded = " ".join(page.split())
    assert '<th scope="col" class="n">A: Theirs<small>published <sup>[1]</sup></small></th>' in folded
    assert '<th scope="col" class="n">ours b<small>measured</small></th>' in folded
    cell = '<td class="n measured"><b>75.0 ± 1.0</b><small>n = 40</small> <small>&lt; A</small> </td>'
    assert cell in folded
    assert '<small class="warn">not comparable <sup>[2]</sup></small>' in folded
    assert '<td class="n muted">-</td>' in folded
    assert "Content-Security-Policy" in page and not Page(page).open


# Names that try to be markup.

ODD = [*HOSTILE, "a_b%c&d<e>f", r"\input{x} ^~#$", '[1] * `x\' "y" --- ?`', "} \\end{tabular} {", "|x| @{} !!"]


def odd_table(text: str) -> Table:
    """The text is a model's label, a task, a metric, a harness and a title of a published column."""
    values = json.loads(json.dumps(PUBLISHED))
    line = " ".join(text.split()) or "blank"
    values["models"]["theirs"]["title"] = line
    values["rows"]["piqa"] |= {"task": f"t{line}"}
    published = parse_published(values, "by hand")
    name = published.rows["piqa"].task
    ours = [
        model(text, right(10, task=name, harness=text)),
        model("x", right(30, task=name, harness=text), score("near", text, num_samples=7)),
    ]
    table = paper_table("3", published, ours)
    [stages] = stage_tables(ours)
    return Table(**{**vars(table), "rows": (*table.rows, *_padded(stages))})


def _padded(stages: Table) -> list:  # type: ignore[type-arg]
    return [type(row)(**{**vars(row), "published": (None,)}) for row in stages.rows]


@pytest.mark.parametrize("bad", ODD)
def test_odd_names_are_text_in_html(bad: str) -> None:
    pages = [Page(FORMATS["html"]([odd_table(text)])) for text in ("harmless", bad)]
    assert not pages[1].open
    assert [(tag, list(names)) for tag, names in pages[1].tags] == [(tag, list(names)) for tag, names in pages[0].tags]
    assert clean(bad).strip() in "".join(pages[1].words)


@pytest.mark.parametrize("bad", ODD)
def test_odd_names_are_text_in_markdown(bad: str) -> None:
    renderer = MarkdownIt("commonmark").enable("table")
    pages = [Page(renderer.render(FORMATS["markdown"]([odd_table(text)]))) for text in ("harmless", bad)]
    assert [(tag, list(names)) for tag, names in pages[1].tags] == [(tag, list(names)) for tag, names in pages[0].tags]
    assert clean(" ".join(bad.split())) in " ".join("".join(pages[1].words).split())


@pytest.mark.parametrize("bad", ODD)
def test_odd_names_are_text_in_latex(bad: str) -> None:
    made = latex(odd_table(bad))
    body = made[made.index(r"\begin{tabular}") : made.index(r"\end{tabular}")].splitlines()
    rows = [line for line in body if line.endswith(r" \\")]
    assert len(rows) == len(body) - 4  # the environment and three lines
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {4}
    assert made.count(r"\end{tabular}") == 1 and made.count("\\\\") == len(rows)
    plain = re.sub(r"\\[{}]", "", made)
    assert plain.count("{") == plain.count("}")


#: What escape may write, the longest first: each is one character, `{}` is none.
TOKENS = {written: character for character, written in ESCAPED.items()} | {"{}": ""}
TOKEN = re.compile("|".join(map(re.escape, sorted(TOKENS, key=len, reverse=True))))


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("".join(ESCAPED) + "-,?! \n\tabc"), st.characters())))
def test_latex_shows_every_text_as_it_is(text: str) -> None:
    """Read back token by token it is the text, and outside the tokens is nothing that TeX obeys."""
    written = escape(text)
    read = TOKEN.sub(lambda match: TOKENS[match[0]], written)
    assert read == " ".join(clean(text).split())
    rest = TOKEN.sub("\x00", written)
    assert not set(rest) & set("\\{}$&#%_^~<>|\"'`[]*\n\t")
    assert not re.search(r"--|,,|\?`|!`", written)


# In a report.


def test_a_reports_tables_are_of_its_own_scores(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path)
    page = html_report(summary, manifests, folders, recipe)
    section = page[page.index('<section id="tables">') : page.index('<section id="stages">')]
    assert "Language models: stages × tasks" in section and "Rewards on pairs" in section
    heads = re.findall(r'<th scope="col" class="n">([^<]*)<small>measured', section)
    assert heads == ["Base model", "SFT", "DPO", "RLVR", "Reward model", "DPO, implicit reward"]
    assert "Table 3" not in section and "published" not in section.lower()
    assert "0.702 ± 0.020" in section
    assert '<a href="#tables">Tables</a>' in page


def test_a_report_without_scores_has_no_tables(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path, made=5)
    assert 'id="tables"' not in html_report(summary, manifests, folders, recipe)
    assert tables_of_run({}, {}) == ([], []) and tables_section([], []) == ""


def test_items_that_cannot_be_read_end_no_report(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path)
    outputs = manifests["evaluation-sft"].outputs | {"samples_file": "samples.jsonl"}
    manifests["evaluation-sft"] = manifests["evaluation-sft"].model_copy(update={"outputs": outputs})
    page = html_report(summary, manifests, folders, recipe)
    assert "SFT: the items cannot be read, so no score of it is tested: " in page
    (folders["evaluation-sft"] / "samples.jsonl").write_text('{"task": "tiny_')
    assert "samples.jsonl, line 1" in html_report(summary, manifests, folders, recipe)
    (folders["evaluation-sft"] / "samples.jsonl").write_text('{"task": "tiny_arithmetic", "id": 1, "entry": 99}\n')
    assert "so no score of it is tested: IndexError" in html_report(summary, manifests, folders, recipe)


def test_a_model_of_an_evaluation(tmp_path: Path) -> None:
    rows = [
        {"task": "paper_piqa", "id": i, "doc_hash": f"d{i}", "target_hash": "t", "metrics": {"acc_norm": 1.0}}
        for i in range(4)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = EvaluationOutputs(subject="sft", scores=(score(value=1.0, num_samples=4),), samples_file="samples.jsonl")
    config = {"kind": "language_model", "settings": {"precision": "float32", "max_length": 256}}
    made, problem = measured_model("SFT", outputs, config, tmp_path)
    assert (made.precision, made.max_length, problem) == ("float32", 256, "")
    items = made.measured(outputs.scores[0])
    assert items is not None and len(items.items) == 4
    made, _ = measured_model("SFT", outputs, {"kind": "unheard of", "settings": ["odd"]}, None)
    assert (made.kind, made.precision, made.max_length) == ("language_model", None, None)
