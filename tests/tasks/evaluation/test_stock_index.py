"""lm-eval's index, read by us, is the one that lm-eval makes alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager, _index

from smoltulu.tasks.evaluation.stock_index import fields_of, quick_index

FILES = {
    "common.yaml": "output_type: generate_until\ntag: [math, kin]\nunknown: 1\n",
    "a.yaml": "include: common.yaml\ntask: first\ndoc_to_text: !function utils.text\n",
    "b.yaml": "include: [common.yaml, a.yaml]\ntask: included_twice\n",  # a includes common again
    "c.yaml": "include: a.yaml\ndescription: has the name of another\n",
    "d.yaml": "include: d.yaml\ntask: circle\n",
    "e.yaml": "- a list\n",
    "f.yaml": "task: [unclosed\n",
    "g.yaml": "group: some\ntask:\n  - first\n  - task: deep\n    include: a.yaml\n",
    "h.yaml": "include: nowhere.yaml\ntask: lost\n",
    "i.yaml": "task: odd\ntag: !python/object:os.system x\n",
    "deep/j.yaml": "include: ../common.yaml\ntask: deep\ntask_list: [x]\n",
    "deep/k.yaml": "include: j.yaml\ntask: deeper\ntag: kin\n",
    "deep/l.yaml": "task: cased\nclass: !function utils.Case\n",
    "__pycache__/m.yaml": "task: never\n",
}


def test_of_files_of_every_shape(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    theirs = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with quick_index():
        ours = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert list(ours.task_index.items()) == list(theirs.task_index.items())
    assert set(ours.all_tasks) == {"first", "math", "kin", "some", "deep", "deeper", "cased"}


def test_of_the_thousands_that_lm_eval_ships() -> None:
    with quick_index():
        ours = TaskManager()
    theirs = TaskManager()
    assert len(ours.all_tasks) > 10_000 and list(ours.task_index) == list(theirs.task_index)
    for name, entry in ours.task_index.items():
        # Of a definition that has a file, lm-eval reads nothing else here.
        assert entry.yaml_path is not None or entry.cfg is None
        assert dataclasses.replace(entry, cfg=None) == dataclasses.replace(theirs.task_index[name], cfg=None)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("task: arc_easy\ndoc_to_text: |\n  task: no\n", {"task": "arc_easy"}),
        ("include: _base.yaml\ntag:  some \n", {"include": "_base.yaml", "tag": "some"}),
        ("group: bbh\ntask:\n  - one\n", {"group": "bbh", "task": ""}),
        ("class: !function utils.Case\ntask: cased\n", {"class": "!function utils.Case", "task": "cased"}),
        ("description: nothing else\n", {}),
        ("task: yes\n", None),
        ("task: 12\n", None),
        ("task: one # or two\n", None),
        ("task: 'quoted'\n", None),
        ("task:\n  - one\n", None),
        ("tag:\n  - one\n", None),
        ("tag: [a, b]\n", None),
        ("task: a\ntask: b\n", None),
        ('"task": "2_of"\n"dataset_name": "x"\n', {"task": "2_of"}),
        ("include: ../_base\ntask: one\n", {"include": "../_base", "task": "one"}),
        ("'task': a\n", None),
        ('"ta\\x73k": a\n', None),
        ('task: "a\\n"\n', None),
        ("task: .5\n", None),
        ("<<: *base\n", None),
        ("include: [a.yaml, b.yaml]\n", None),
    ],
)
def test_what_is_told_without_parsing(text: str, fields: dict[str, str] | None) -> None:
    assert fields_of(text.encode()) == fields


def test_lm_evals_reader_is_put_back() -> None:
    own = _index.load_yaml
    with pytest.raises(KeyError), quick_index():
        raise KeyError
    assert _index.load_yaml is own
