"""Keys: the same for the same experiment everywhere, another for every scientific difference. See design, section 5."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from smoltulu.artifacts.keys import artifact_key, canonical_json
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import role_of
from smoltulu.schemas.recipe import Recipe
from tests import ROOT, golden_keys
from tests.golden_keys import made_up_commit

# --- Canonical JSON ---------------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def same(a: object, b: object) -> bool:
    """Equality as keys mean it: 1 is 1.0 but not True, a tuple is a list."""
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, str) and isinstance(b, str) and a == b


@given(plain)
@example({"x": -0.0})
@example([1e300, 2**53 + 1, 5e-324])
def test_canonical_json_can_be_read_back(value: object) -> None:
    # What can be read back from a text cannot share the text with anything else.
    assert same(json.loads(canonical_json(value)), value)


@given(plain, plain)
@example({"a": 1}, {"a": True})
@example([[]], [{}])
@example({"a": None}, {})
@example({"ab": "c"}, {"a": "bc"})
@example("1", 1)
def test_canonical_json_is_the_same_exactly_for_the_same_values(a: object, b: object) -> None:
    assert (canonical_json(a) == canonical_json(b)) == same(a, b)


@given(plain, st.randoms(use_true_random=False))
def test_canonical_json_has_one_spelling(value: object, chance: random.Random) -> None:
    def respell(item: object) -> object:
        if isinstance(item, dict):
            names = list(item)
            chance.shuffle(names)
            return {name: respell(item[name]) for name in names}
        if isinstance(item, list):
            items = [respell(each) for each in item]
            return tuple(items) if chance.random() < 0.5 else items
        if isinstance(item, int) and not isinstance(item, bool) and abs(item) < 2**53:
            return float(item)
        return item

    assert canonical_json(respell(value)) == canonical_json(value)


def test_canonical_json_of_floats() -> None:
    assert canonical_json([1e-4, 0.0001, 1.0, 1, -0.0, 1e22]) == "[0.0001,0.0001,1,1,0,10000000000000000000000]"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_canonical_json_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="use a finite number"):
        canonical_json({"x": [value]})


@pytest.mark.parametrize("value", [{1, 2}, frozenset(), b"x", bytearray(b"x"), object(), Path("x"), 1j, range(3), int])
def test_canonical_json_refuses_types_without_a_form(value: object) -> None:
    with pytest.raises(TypeError, match="has no canonical form; use str, int"):
        canonical_json({"x": value})


@pytest.mark.parametrize("name", [1, None, True, 1.0, ("a",)])
def test_canonical_json_refuses_keys_that_are_no_text(name: Any) -> None:
    with pytest.raises(TypeError, match="only text keys"):
        canonical_json({name: 1})


@pytest.mark.parametrize("value", ["\ud83d\ude00", "a\udfff", {"\ud800": 1}])
def test_canonical_json_refuses_lone_surrogates(value: object) -> None:
    # JSON writes a pair of them as it writes the character they stand for: two values would share a text.
    with pytest.raises(ValueError, match="lone surrogate"):
        canonical_json(value)
    assert canonical_json("😀") == '"\\ud83d\\ude00"'


# --- Other processes and Pythons --------------------------------------------------------------------------------------

_SPEC: dict[str, Any] = {
    "format": 1, "stage": "sft", "version": 1, "externals": {},
    "config": {"b": 1e-4, "a": 2.0, "é": [0.1 + 0.2, 1e22, 5e-324, -0.0, None, True], "text": "line\n\u2028\U0001f600"},
    "inputs": {"model": "a" * 64, "many": {"z": "b" * 64, "y": "c" * 64}},
}  # fmt: skip

#: The key code as it is, without the packages that another Python may lack: only the spec's fields are needed of them.
_ELSEWHERE = """
import json, sys, types
class Empty(types.ModuleType):
    def __getattr__(self, name):
        return object
for name in ("blake3", "pydantic", "smoltulu.schemas", "smoltulu.schemas.artifact"):
    sys.modules[name] = Empty(name)
sys.path.insert(0, sys.argv[1])
from smoltulu.artifacts.keys import artifact_key
class Fields:
    def model_dump(self):
        return json.loads(sys.argv[2])
print(artifact_key(Fields()))
"""


def _pythons() -> list[str]:
    """Interpreters of this machine that work and that the project supports."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names = [f"python3.{minor}" for minor in range(11, 16)]
    found = [shutil.which(name) for name in names] + [str(path) for path in pyenv.glob("3.*/bin/python")]
    works = {}
    for python in (sys.executable, *filter(None, found)):
        code = "import sys; print(sys.version_info >= (3, 11), sys.version_info[:2])"
        done = subprocess.run([python, "-c", code], text=True, capture_output=True, check=False)
        if done.stdout.startswith("True"):
            works[done.stdout] = python
    return list(works.values())


def test_canonical_keys_are_the_same_under_every_hash_seed_and_python() -> None:
    expected = artifact_key(Spec(**_SPEC))
    for number, python in enumerate([*_pythons(), sys.executable]):
        environment = {"PYTHONHASHSEED": str(number + 1), "PATH": os.environ["PATH"], "LC_ALL": "C"}
        done = subprocess.run(
            [python, "-c", _ELSEWHERE, str(ROOT / "src"), json.dumps(_SPEC)], env=environment, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.stdout.strip() == expected, (python, done.stderr)
    # Pinned: a changed value means that every stored artifact of every user would be lost from sight.
    assert expected == "357f842f3dceebc82257a7f3c877b868390326f4beaa6565037f638b7933f76b"


# --- Recipes ----------------------------------------------------------------------------------------------------------


def keys_of(values: dict[str, Any]) -> dict[str, str]:
    return Graph(load_recipe(values), resolve=made_up_commit).keys()


@cache
def values_of(preset: str) -> dict[str, Any]:
    return load_recipe(preset).model_dump(mode="json")


@cache
def preset_keys(preset: str) -> dict[str, str]:
    return keys_of(values_of(preset))


def _fields(model: type[BaseModel], value: Any, path: tuple[Any, ...], role: str) -> Iterator[tuple[Any, ...]]:
    """(path, value, annotation, role) of every leaf of a recipe; a field inside machinery is machinery."""
    for name, field in model.model_fields.items():
        inner_role = "machinery" if role == "machinery" else role_of(field)
        yield from _leaves(field.annotation, getattr(value, name), (*path, name), inner_role)


def _leaves(annotation: Any, value: Any, path: tuple[Any, ...], role: str) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, BaseModel):
        yield from _fields(type(value), value, path, role)
    elif isinstance(value, (tuple, list)) and value and isinstance(value[0], BaseModel):
        for position, item in enumerate(value):
            yield from _leaves(None, item, (*path, position), role)
    elif isinstance(value, dict) and value and all(isinstance(item, BaseModel) for item in value.values()):
        for name, item in value.items():
            yield from _leaves(None, item, (*path, name), role)
    else:
        yield path, value, annotation, role


@cache
def leaves_of(preset: str) -> list[tuple[Any, ...]]:
    return list(_fields(Recipe, load_recipe(preset), (), "science"))


def other_values(value: Any, annotation: Any) -> list[Any]:
    """Values that a field might have instead."""
    options = [annotation, *get_args(annotation)]
    literals = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    found: list[Any] = [choice for choice in literals if choice != value]
    if isinstance(value, bool):
        found.append(not value)
    elif isinstance(value, (int, float)):
        found += [value + 1, value * 2 or 0.25, value / 2, value * 1.000001, 0]
    elif isinstance(value, str):
        found += [value + "x", "z"]
    elif isinstance(value, list):
        found += [[*value, "more"], []]
    elif value is None:
        found += [1, 0.5, 2.0, "some"]
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(st.data())
def test_canonical_keys_change_with_science_and_only_with_science(data: st.DataObject) -> None:
    preset = data.draw(st.sampled_from(["tiny", "smoltulu-1130"]))
    path, value, annotation, role = data.draw(st.sampled_from(leaves_of(preset)))
    changed = copy.deepcopy(values_of(preset))
    parent: Any = changed
    for step in path[:-1]:
        parent = parent[step]
    new = data.draw(
        st.sampled_from([*other_values(list(value) if isinstance(value, tuple) else value, annotation), None])
    )
    parent[path[-1]] = new
    try:
        recipe = load_recipe(changed)
    except ValueError:
        return  # not every value is allowed
    at = recipe
    for step in path:
        at = at[step] if isinstance(step, int) or isinstance(at, dict) else getattr(at, step)
    try:
        keys = Graph(recipe, resolve=made_up_commit).keys()
    except (ValueError, ValidationError):
        return  # a template or a file that is not there
    if path == ("name",):
        # It names runs, which is machinery, but stands in the published model card too.
        keys["publish"] = preset_keys(preset)["publish"]
    # "Not given" is keyed as the split that it was before it had a meaning of its own.
    is_same = same(_plain(at), _plain(value)) or (path[-1] == "split" and {at, value} == {None, "train"})
    is_off = path[0] == "selection" and recipe.selector is None  # a block that says who would select
    if role == "machinery" or is_same or is_off:
        assert keys == preset_keys(preset), (path, value, new)
    else:
        assert keys != preset_keys(preset), (path, value, new)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def test_canonical_keys_every_field_of_the_training_stages_counts() -> None:
    """The same for all of them, not for a sample: no field of a training stage may be forgotten."""
    for path, value, annotation, role in leaves_of("tiny"):
        machinery = ("gate", "guards", "max_rollouts_without_signal", "rollout_batch_size")
        if (
            path[0] in ("sft", "reward_model", "dpo", "rlvr")
            and path[1] not in machinery
            and path[1:] not in (("critic", "path"), ("critic", "offload_optimizer"))
        ):
            assert role == "science"
            for new in (other for other in other_values(value, annotation) if other != value):
                try:
                    keys = Graph(load_recipe("tiny", {".".join(path): new}), resolve=made_up_commit).keys()
                except ValueError:
                    continue
                assert keys != preset_keys("tiny"), path
                break
            else:
                # Fields with one choice, blocks that are not set, and what goes with another loss only: nothing else
                # can be said there by a plain value (the keys of schedules are in test_schedules.py).
                alone = [
                    ("rlvr", "algorithm"), ("rlvr", "leave_out"), ("rlvr", "random_reward_probability"),
                    ("rlvr", "held_out"), ("rlvr", "keep"), ("dpo", "label_smoothing"), ("sft", "mup_base_width"),
                ]  # fmt: skip
                assert path in alone or path[1] in ("schedule", "lora", "held_out"), path


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1.0e-04", "'1e-4'", "1E-4", "0.00010"])
def test_canonical_keys_do_not_depend_on_how_a_number_is_written(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: tiny\nname: mine\nsft: {{learning_rate: {text}, num_train_epochs: 2}}\n")
    other = load_recipe("tiny", {"sft.learning_rate": 0.0001, "sft.num_train_epochs": 2.0, "name": "mine"})
    assert Graph(load_recipe(str(file))).keys() == Graph(other).keys()


@given(st.randoms(use_true_random=False))
@settings(max_examples=5, deadline=None)
def test_canonical_keys_do_not_depend_on_the_order_of_fields(chance: random.Random) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            names = list(value)
            chance.shuffle(names)
            return {name: shuffled(value[name]) for name in names}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    values = yaml.safe_load((ROOT / "recipes" / "tiny.yaml").read_text())
    assert keys_of(shuffled(values)) == preset_keys("tiny")


def test_canonical_keys_depend_on_what_a_path_holds_not_on_how_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_FOLDER", str(tmp_path))

    def key(path: str) -> str:
        source = {"path": path, "format": "messages"}
        recipe = {"name": "x", "base_model": {"scratch": {}}, "data": {"sft": {"sources": [source]}}}
        return Graph(load_recipe(recipe)).key("dataset-sft")

    spellings = ["one/rows.jsonl", "./one/rows.jsonl", "two/../one/rows.jsonl", str(tmp_path / "one/rows.jsonl")]
    spellings += ["${SOME_FOLDER}/one/rows.jsonl", "${NOT_THERE:-one}/rows.jsonl", "two/rows.jsonl", "one", "two"]
    assert len({key(path) for path in spellings}) == 1
    before = key("one/rows.jsonl")
    (tmp_path / "one" / "rows.jsonl").write_text(rows * 2)
    assert key("one/rows.jsonl") != before and key("two/rows.jsonl") == before


def test_canonical_keys_depend_on_the_commit_not_on_the_branch() -> None:
    commit = "b" * 40
    by_branch = Graph(load_recipe("smoltulu-1130"), resolve=lambda reference: commit)
    pinned = load_recipe("smoltulu-1130", {"base_model.revision": commit, "data.sft.sources.0.revision": commit})
    assert Graph(pinned, resolve=lambda reference: commit).keys() == by_branch.keys()
    moved = Graph(load_recipe("smoltulu-1130"), resolve=made_up_commit)
    assert all(moved.key(name) != by_branch.key(name) for name in moved.nodes)


# --- Golden -------------------------------------------------------------------------------------------------------


def test_canonical_keys_of_the_presets_are_as_pinned() -> None:
    changes = golden_keys.compare(json.loads(golden_keys.FILE.read_text()), golden_keys.golden_keys())
    advice = "if that is meant, run `python -m tests.golden_keys --write`, and say in CHANGELOG.md what is made again"
    assert not changes, "keys of presets changed; " + advice + ":\n" + "\n".join(changes)


def test_a_changed_key_is_told_by_node_and_field() -> None:
    pinned = json.loads(golden_keys.FILE.read_text())
    now = copy.deepcopy(pinned)
    old = pinned["keys"]["tiny"]["dpo"]
    now["specs"]["new"] = now["specs"][old] | {"config.beta": 0.1}
    now["keys"]["tiny"] = {**now["keys"]["tiny"], "dpo": "new", "more": "new"}
    del now["keys"]["tiny"]["publish"]
    beta = pinned["specs"][old]["config.beta"]
    assert golden_keys.compare(pinned, now) == [
        "tiny: node more is new", "tiny: node publish is gone", f"tiny: dpo: config.beta: {beta!r} -> 0.1",
    ]  # fmt: skip
