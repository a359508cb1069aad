"""Recipes as untrusted text: keys given twice, bombs, long names and numbers. One short error each, in a short time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from smoltulu.flows.cli.main import app
from smoltulu.flows.reading import MAX_BYTES, MAX_DEPTH, Unreadable, read_json, read_yaml, shortened, within_bounds
from smoltulu.flows.recipe import RecipeError, check_parameter, load_recipe, parse_overrides, preset_names
from smoltulu.recipes import PRESETS
from tests import ROOT

#: More than any machine of ours takes, less than a user waits.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SECONDS = 10.0
LONGEST_MESSAGE = 25_000

TWICE = """\
extends: tiny
sft:
  learning_rate: 1.0e-5
dpo: {beta: 2}
sft:
  learning_rate: 1.0e-6
"""
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], y{n}: 1}}\n" for n in range(1, 60))
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 4000))


def refused(text: str, path: Path) -> str:
    """The message with which a recipe file of this text is refused; short, and in a short time."""
    path.write_text(text)
    begin = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert time.perf_counter() - begin < SECONDS
    message = str(caught.value)
    assert len(message) < LONGEST_MESSAGE and "Traceback" not in message
    return message


def test_a_key_that_is_given_twice_is_said_with_both_lines(tmp_path: Path) -> None:
    assert "line 5: `sft` is given twice, first in line 2; keep one of them" in refused(TWICE, tmp_path / "a.yaml")
    nested = "extends: tiny\ndpo:\n  beta: 1\n  'beta': 2\n"
    assert "line 4: `beta` is given twice, first in line 3" in refused(nested, tmp_path / "a.yaml")
    assert "`beta` is given twice" in refused("extends: tiny\ndpo: {beta: 1, beta: 1}\n", tmp_path / "a.yaml")
    listed = "extends: tiny\ndata: {sft: {sources: [{path: a, path: b, format: text}]}}\n"
    assert "`path` is given twice" in refused(listed, tmp_path / "a.yaml")
    many = "extends: tiny\n" + "sft: {}\n" * 5000
    assert "and 4989 more" in refused(many, tmp_path / "a.yaml")


def test_a_base_that_gives_a_key_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text((PRESETS / "tiny.yaml").read_text() + "\nsft: {seed: 1}\n")
    message = refused("extends: ./base.yaml\n", tmp_path / "a.yaml")
    assert "base.yaml is not readable YAML: line " in message and "`sft` is given twice" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("[" * 200_000, "nested deeper than 32", id="brackets"),
        pytest.param("extends: tiny\nsft: " + "{a: " * 50_000, "nested deeper than 32", id="braces"),
        pytest.param("- " * 100_000, "nested deeper than 32", id="dashes"),
        pytest.param("? " * 100_000, "nested deeper than 32", id="question marks"),
        pytest.param("".join(" " * n + "a:\n" for n in range(600)), "nested deeper than 32", id="indentation"),
        pytest.param(LAUGHS, "aliases followed", id="billion laughs"),
        pytest.param(MERGES, "aliases followed", id="merges"),
        pytest.param(CHAIN, "nested deeper than 32", id="a chain of aliases"),
        pytest.param("a: &a [*a]", "stands for what it is part of", id="a circle"),
        pytest.param("a: &a {b: *a}", "stands for what it is part of", id="a circle of mappings"),
        pytest.param("a: &a\n  <<: *a\n", "stands for what it is part of", id="a circle of merges"),
        pytest.param("extends: tiny\nx: " + "1" * 5000, "a number has 5,000 digits", id="integer"),
        pytest.param("extends: tiny\nx: 0x" + "f" * 5000, "a number has 5,002 digits", id="hexadecimal"),
        pytest.param("extends: tiny\nx: 1" + ":59" * 5000, "a number has 15,001 digits", id="sexagesimal"),
        pytest.param("extends: tiny\nx: 1." + "1" * 5000, "a number has 5,002 digits", id="float"),
        pytest.param("extends: tiny\nx: 2020-99-99", "a value in it cannot be read", id="no date"),
        pytest.param("extends: tiny\nx: !!int many", "a value in it cannot be read", id="no integer"),
        pytest.param("extends: tiny\nx: !!bool maybe", "a value in it cannot be read", id="no bool"),
        pytest.param("extends: tiny\nx: !!python/name:os.system", "could not determine a constructor", id="tag"),
        pytest.param("extends: tiny\n1: x", "the name of a field is a text, this one is a int", id="number as name"),
        pytest.param("extends: tiny\non: x", "line 2: the name of a field is a text", id="bool as name"),
        pytest.param("extends: tiny\n? [a]\n: x", "the name of a field is a text", id="list as name"),
        pytest.param("extends: tiny\nx: \x00", "characters are not allowed", id="control character"),
        pytest.param("extends: tiny\n---\nextends: tiny", "expected a single document", id="two documents"),
        pytest.param("extends: tiny\n" + "# more\n" * 100_000, "longer than 262,144 bytes", id="size"),
        pytest.param("extends: tiny\n? " + "a" * 5000 + "\n: 1", "a field's name has 5,000 characters", id="name"),
        pytest.param("extends: tiny\ndescription: " + "a" * 30_000, "a text has 30,000 characters", id="text"),
        pytest.param("extends: tiny\nname: " + "a" * 5000, "at most 100 characters", id="name of the recipe"),
        pytest.param("extends: " + "a" * 5000, "is no recipe: names of files have 255 bytes", id="name of the preset"),
        pytest.param("extends: ./" + "a" * 5000, "names of files have 255 bytes", id="path of the preset"),
        pytest.param("extends: tiny\nsft: {learning_rate: .nan}", "finite number", id="nan"),
        pytest.param("extends: tiny\nsft: {learning_rate: .inf}", "finite number", id="inf"),
        pytest.param("extends: tiny\nsft: {learning_rate: 1.0e+400}", "finite number", id="overflow"),
        pytest.param("extends: [tiny]", "extends ['tiny']", id="a list is extended"),
        pytest.param("extends: {}", "extends {}", id="a mapping is extended"),
    ],
)
def test_every_bomb_is_one_short_error(text: str, said: str, tmp_path: Path) -> None:
    message = refused(text, tmp_path / "a.yaml")
    assert said in message
    # And through the command line, where a message of another kind would be a traceback.
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "a.yaml")])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert len(result.output) < LONGEST_MESSAGE


def test_thousands_of_unknown_fields_are_counted_not_listed(tmp_path: Path) -> None:
    unknown = "".join(f"  unknown_{n}: 1\n" for n in range(9000))
    message = refused(f"extends: tiny\nsft:\n{unknown}", tmp_path / "a.yaml")
    assert "9,000 problems" in message and "and 8,980 more" in message and "sft.unknown_0: no such field" in message
    assert message.count("\n") == 21
    begin = time.perf_counter()
    with pytest.raises(RecipeError, match="more than 20,000 values"):
        load_recipe({"extends": "tiny", "sft": {f"unknown_{n}": 1 for n in range(1_000_000)}})
    with pytest.raises(RecipeError, match="9,000 problems"):
        load_recipe("tiny", {f"sft.unknown_{n}": 1 for n in range(9000)})
    assert time.perf_counter() - begin < SECONDS


def test_the_process_survives_what_ends_the_loader() -> None:
    """libyaml's own loader overflows the stack of the process: no exception, SIGSEGV."""
    program = """
import sys, yaml
from smoltulu.flows.reading import Unreadable, read_json, read_yaml
for opening in ("[", "- ", "? ", "{a: ", "[{a: "):
    for read in (read_yaml, read_json):
        try:
            read((opening * 262_144)[:262_144])
        except Unreadable as error:
            assert len(str(error)) < 500
        else:
            raise SystemExit(1)
if sys.argv[1:]:
    yaml.load("[" * 100_000, yaml.CSafeLoader)
"""
    command = [sys.executable, "-c", program]
    ours = subprocess.run(command, cwd=ROOT, timeout=60, check=False)
    assert ours.returncode == 0
    if hasattr(yaml, "CSafeLoader"):
        theirs = subprocess.run([*command, "too"], cwd=ROOT, timeout=60, check=False, capture_output=True)
        assert theirs.returncode != 0, "PyYAML refuses it itself: then _check_nesting can go"


def test_aliases_and_merges_of_usual_size_are_read() -> None:
    text = "base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\nlist: [*base, *base]\n"
    assert read_yaml(text)["more"] == {"a": 1, "b": 3}
    assert read_yaml("") is None and read_yaml("# nothing") is None
    assert read_yaml("x: 1_000\ny: 0x1f\nz: 5.0e-7") == {"x": 1000, "y": 31, "z": 5e-7}


def test_a_byte_order_mark_is_none_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfextends: tiny\n")
    assert load_recipe(str(tmp_path / "mine.yaml")).name == "mine"
    (tmp_path / "mine.yaml").write_bytes(b"extends: tiny # \xe9\n")
    with pytest.raises(RecipeError, match="it is not UTF-8"):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("name", preset_names())
def test_what_ships_is_far_from_every_bound(name: str) -> None:
    assert (PRESETS / f"{name}.yaml").stat().st_size < MAX_BYTES / 10
    assert load_recipe(name) == load_recipe(json.loads(load_recipe(name).model_dump_json()))


# Inline recipes, overrides, names.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sft={'a': 1", "sft"),
        ('sft={"seed": 1, "seed": 2}', "`seed` is given twice"),
        ("sft={seed: 1, seed: 2}", "line 1: `seed` is given twice, first in line 1"),
        ("sft.seed=" + "1" * 5000, "a number has 5,000 digits"),
        ("sft.seed=0x" + "f" * 5000, "a number has 5,002 digits"),
        ("sft=" + "[" * 100_000, "nested deeper than"),
        ("sft=" + '{"a":' * 50_000, "nested deeper than"),
        ("sft=" + "x" * 300_000, "longer than 262,144 bytes"),
        ("sft.seed=2020-99-99", "a value in it cannot be read"),
        ("sft=&a [*a]", "stands for what it is part of"),
        ("a" * 5000, "give a dotted field and a value"),
    ],
)
def test_overrides_that_are_bombs(text: str, said: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="--override") as caught:
        parse_overrides([text])
    assert said in str(caught.value) and len(str(caught.value)) < 1000
    assert time.perf_counter() - begin < SECONDS


def test_a_field_that_is_overridden_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'dpo\.beta' is given twice"):
        parse_overrides(["dpo.beta=1", "dpo.beta =2"])
    assert parse_overrides(["dpo.beta=5e-7", "sft.seed= 3", "name=x"]) == {"dpo.beta": 5e-7, "sft.seed": 3, "name": "x"}


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("a" * 5000, {}),
        ("/" + "a" * 5000, {}),
        ("a/" * 5000 + "b.yaml", {}),
        ("a\0b", {}),
        ('{"extends": "' + "x" * 100_000 + '"}', {}),
        ("tiny", {"a" * 5000: 1}),
        ("tiny", {".".join(["a"] * 2000): 1}),
        ("tiny", {"contamination.benchmarks." + "9" * 190 + ".name": 1}),
        ("tiny", {"contamination.benchmarks.².name": 1}),
        ("tiny", {"name": "a" * 5000}),
        ("tiny", {"sft.seed": 10**5000}),
        ("tiny", {"sft.learning_rate": math.nan}),
        ("tiny", {"sft.seed": "1" * 15_000}),
        ("tiny", {"contamination.benchmarks.0.name": "a" * 5000}),
        ("tiny", {"evaluation.tasks": [{"name": "a" * 5000, "metric": "acc,none"}]}),
        ("tiny", {"data.sft.sources.0.generated": "a" * 5000}),
        ("tiny", {"compute.stages": {"a" * 200: {}}}),
        ({"extends": "tiny", 1: 2}, {}),
        ({"extends": "tiny", "sft": {None: 2}}, {}),
    ],
)
def test_names_and_numbers_without_end(recipe: Any, overrides: dict[str, Any]) -> None:
    begin = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    assert len(str(caught.value)) < 5000 and time.perf_counter() - begin < SECONDS


def test_values_that_hold_themselves_are_refused() -> None:
    circle: dict[str, Any] = {"extends": "tiny"}
    circle["sft"] = circle
    with pytest.raises(RecipeError, match="nested deeper than"):
        load_recipe(circle)


@pytest.mark.parametrize("command", [["plan"], ["adopt"], ["run", "smoltulu/full", "-p"]])
def test_a_name_of_5000_letters_is_one_short_error_of_every_command(command: list[str]) -> None:
    given = [f"recipe=./{'a' * 5000}"] if command[0] == "run" else ["a" * 5000]
    result = CliRunner().invoke(app, [*command, *given])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "error: " in result.output and len(result.output) < 1000


def test_inline_recipes_are_read_before_prefect_reads_them() -> None:
    """Prefect keeps the last of two keys in silence."""
    for text in ('recipe={"sft": {}, "sft": {}}', '--param=recipe={"sft": {}, "sft": {}}'):
        with pytest.raises(RecipeError, match="recipe: `sft` is given twice"):
            check_parameter(text)
    with pytest.raises(RecipeError, match=r"overrides: `dpo\.beta` is given twice"):
        check_parameter('overrides={"dpo.beta": 1, "dpo.beta": 2}')
    for text in ('{"recipe": "a", "recipe": "b"}', '--params={"recipe": "a", "recipe": "b"}'):
        with pytest.raises(RecipeError, match="parameters: `recipe` is given twice"):
            check_parameter(text)
    for text in ('overrides= {"a": 1, "a": 2}', '-poverrides={"a": 1, "a": 2}', 'recipe=\n{"a": 1, "a": 2}'):
        with pytest.raises(RecipeError, match="`a` is given twice"):
            check_parameter(text)
    with pytest.raises(RecipeError, match="recipe: line 1, column 2"):
        check_parameter("recipe={broken")
    for text in ("recipe=tiny", "recipe=a{b}.yaml", "-p", "--param", 'recipe={"extends": "tiny"}', "until=dpo"):
        check_parameter(text)


@pytest.mark.parametrize("value", [b"binary", {"a", "b"}, "caf\ud83d", {"caf\ud83d": 1}])
def test_values_that_no_report_could_hold_are_refused(value: Any) -> None:
    """A lone surrogate was found by the report, after every training; bytes hid a token from the look for secrets."""
    with pytest.raises(RecipeError, match=r"no value of a recipe|half a character"):
        load_recipe("tiny", {"description": value})


def test_a_secret_in_a_recipe_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Days later the publication would be refused; until then it would stand in every record of the run."""
    monkeypatch.setenv("WANDB_API_KEY", "f00d" * 10)
    for field, text in (
        ("description", "made with hf_abcdefghijklmnopqrst"),
        ("description", f"key {'f00d' * 10}"),
        ("compute.remote", "s3://key:hunter2-hidden@bucket/x"),
        ("data.sft.sources.0.fields", {"messages": "ghp_" + "a1" * 20}),
        ("data.sft.sources.0.fields", {"ghp_" + "a1" * 20: "messages"}),
        ("recipe", {"hf_abcdefghijklmnopqrst": 1}),
    ):
        with pytest.raises(RecipeError, match=r"is in it\. A recipe is recorded and published") as caught:
            load_recipe("tiny", text if field == "recipe" else {field: text})  # type: ignore[arg-type]
        assert str(caught.value).startswith(field)
        assert not any(secret in str(caught.value) for secret in ("hf_abc", "f00d", "hidden", "ghp_"))


# Properties: the reader against the parsers that it stands on.

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**60), 10**60) | st.floats(allow_nan=False) | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=20,
)
PIECES = "a: |b: |- |? |: |[|]|{|}|, |\n|  |&x |*x|<<: |1|0x1f|1:59|.nan|2020-99-99|~|'|\"|>\n|#|---\n|= |\t"
TAGS = ["int", "float", "bool", "null", "set", "binary", "timestamp", "omap", "pairs", "str", "map", "seq", "x"]
SNIPPETS = st.lists(
    st.sampled_from([*PIECES.split("|"), "|\n", "\x85", "é", *(f"!!{tag} " for tag in TAGS)]), max_size=30
).map("".join)


@given(PLAIN)
def test_values_come_back_as_they_were_written(values: Any) -> None:
    assert read_json(json.dumps(values)) == values
    text = yaml.safe_dump(values, allow_unicode=True)
    assert read_yaml(text) == yaml.safe_load(text)


@given(SNIPPETS | st.text(max_size=200))
@example("!!timestamp x")
@example("? !!set {a: b}\n: 1")
@example("<<: 1")
@example("!!float ''")
def test_any_text_is_read_as_the_parser_reads_it_or_refused_in_words(text: str) -> None:
    for read in (read_yaml, read_json):
        try:
            values = read(text)
        except Unreadable as error:
            assert 0 < len(str(error)) < 2000
            continue
        within_bounds(values)
        expected = yaml.load(text, Loader=LOADER) if read is read_yaml else json.loads(text)
        assert repr(values) == repr(expected)  # nan is not equal to itself


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=5)


@given(st.dictionaries(NAMES, st.integers(), min_size=1, max_size=5), st.data())
def test_no_double_is_read(values: dict[str, int], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(values)))
    pairs = [json.dumps(key) + ": 1" for key in [*values, name]]
    for read in (read_yaml, read_json):
        with pytest.raises(Unreadable, match="is given twice"):
            read("{" + ", ".join(pairs) + "}")


@given(PLAIN)
def test_shortened_is_short(value: Any) -> None:
    assert len(shortened(value)) < 800


def test_the_depth_that_is_allowed_is_read() -> None:
    for opening, closing in (("[", "]"), ('{"a": ', "}")):
        inside = MAX_DEPTH - 1
        document = opening * inside + "1" + closing * inside
        assert read_yaml(document) == read_json(document)
        with pytest.raises(Unreadable, match="deeper"):
            read_yaml(opening * MAX_DEPTH + "1" + closing * MAX_DEPTH)
