"""`smoltulu init`: a recipe in which everything is commented out, and any line may be taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from smoltulu.flows.cli.init import commented_recipe
from smoltulu.flows.cli.main import app
from smoltulu.flows.recipe import RecipeError, load_recipe
from smoltulu.recipes import PRESETS as SHIPPED
from smoltulu.schemas.training import DPOSettings

PRESETS = ("smoltulu-1130", "tiny", "real-small")


@pytest.mark.parametrize("preset", PRESETS)
def test_as_written_it_is_the_preset_under_another_name(preset: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    done = CliRunner().invoke(app, ["init", str(file), "--extends", preset])
    assert done.exit_code == 0 and f"smoltulu plan {file}" in done.output
    assert load_recipe(str(file)) == load_recipe(preset).model_copy(update={"name": "mine"})


@pytest.mark.parametrize("preset", PRESETS)
def test_any_single_line_may_be_taken_and_changes_nothing_yet(preset: str, tmp_path: Path) -> None:
    """The values are the preset's own."""
    lines = commented_recipe(preset).splitlines()
    file = tmp_path / "mine.yaml"
    begin = lines.index(f"extends: {preset}")
    settings = [number for number, line in enumerate(lines) if number > begin and line.lstrip().startswith("#")]
    assert len(settings) > 60
    expected = load_recipe(preset)
    for number in settings:
        taken = lines.copy()
        taken[number] = taken[number].replace("# ", "", 1)
        file.write_text("\n".join(taken))
        name = "my-recipe" if taken[number].startswith("name:") else "mine"
        assert load_recipe(str(file)) == expected.model_copy(update={"name": name}), lines[number]


def test_every_setting_of_a_block_is_there_with_its_meaning() -> None:
    text = commented_recipe("smoltulu-1130")
    dpo = text.partition("\ndpo: {")[2].partition("\n}")[0]
    for name, field in DPOSettings.model_fields.items():
        assert f"\n  # {name}: " in dpo
        assert (field.description or "") in dpo
    assert "\n  # learning_rate: 8.0e-07,\n" in dpo  # PyYAML takes 8e-07, without a dot, for a text
    assert "# last | all; " in dpo


def test_an_existing_file_and_an_unknown_preset_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    done = CliRunner().invoke(app, ["init", str(file)])
    assert done.exit_code == 1 and "exists already" in done.output and file.read_text() == "mine"
    other = tmp_path / "other.yaml"
    done = CliRunner().invoke(app, ["init", str(other), "--extends", "tinny"])
    assert done.exit_code == 1 and "did you mean 'tiny'?" in done.output and not other.exists()
    done = CliRunner().invoke(app, ["init", str(other), "--extends", "smoltulu-1207"])
    assert done.exit_code == 1 and "itself extends smoltulu-1130" in done.output and not other.exists()


def test_only_presets_can_be_commented(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text((SHIPPED / "tiny.yaml").read_text())
    with pytest.raises(RecipeError, match=r"base.yaml' is a file; give a preset: "):
        commented_recipe(str(tmp_path / "base.yaml"))
