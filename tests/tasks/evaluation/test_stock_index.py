"""lm-eval's index, read with each file parsed once, is the one that lm-eval makes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager, _index

from smoltulu.tasks.evaluation.stock_index import each_file_parsed_once

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
    with each_file_parsed_once():
        ours = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert list(ours.task_index.items()) == list(theirs.task_index.items())
    assert set(ours.all_tasks) == {"first", "math", "kin", "some", "deep", "deeper", "cased"}


def test_of_the_thousands_that_lm_eval_ships() -> None:
    with each_file_parsed_once():
        ours = TaskManager()
    theirs = TaskManager()
    assert list(ours.task_index.items()) == list(theirs.task_index.items())
    assert ours.all_groups == theirs.all_groups and len(ours.all_tasks) > 10_000


def test_lm_evals_reader_is_put_back() -> None:
    own = _index.load_yaml
    with pytest.raises(KeyError), each_file_parsed_once():
        raise KeyError
    assert _index.load_yaml is own
