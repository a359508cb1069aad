"""`smoltulu chat`, as a user types it, on a two-layer model in a store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smoltulu.artifacts.manifests import Ref
from smoltulu.flows.cli.main import app
from smoltulu.tasks.models.conversation import Conversation
from tests.flows.cli.test_store_cli import call, words
from tests.hand_store import HandStore
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def store(tmp_path: Path) -> HandStore:
    return HandStore(tmp_path / "store")


@pytest.fixture
def sft(store: HandStore, model: Path) -> Ref:
    """A model's artifact; its weights were put there by hand."""
    ref = store.make("sft", "sft", outputs={"folder": "model", "num_parameters": 1})
    shutil.copytree(model, store.folder(ref) / "gen-0001" / "model")
    store.run("brave-fox", {"sft": ref})
    return ref


def test_a_model_answers_by_key_by_stage_of_a_run_and_from_its_folder(store: HandStore, sft: Ref, model: Path) -> None:
    options = ("--say", "Good morning", "--say", "Which one?", "--temperature", "0", "--max-new-tokens", "5")
    said = [call(store, "chat", what, *options).output for what in (sft.key, "brave-fox:sft", str(model))]
    assert said[0] == said[1] == said[2] and said[0].count("\n") >= 2
    sampled = [call(store, "chat", sft.key, *options[:2], "--seed", seed).output for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


def test_it_asks_until_an_empty_line(store: HandStore, sft: Ref) -> None:
    arguments = ["chat", sft.key, "--store", str(store.root), "--temperature", "0", "--max-new-tokens", "3"]
    made = CliRunner().invoke(app, arguments, input="Good morning\n/new\nGood morning\n\nnever asked\n")
    assert made.exit_code == 0, made.output
    answers = [line for line in made.output.split("> ") if "cut after 3 tokens" in line]
    assert len(answers) == 2 and answers[0] == answers[1], made.output


def test_a_full_conversation_can_begin_anew(store: HandStore, sft: Ref) -> None:
    """What was said so far, and the loaded model, are not lost with it."""
    arguments = ["chat", sft.key, "--store", str(store.root), "--temperature", "0", "--max-new-tokens", "3"]
    made = CliRunner().invoke(app, arguments, input="so " * 600 + "\n/new\nGood morning\n\n")
    assert made.exit_code == 0 and "begin anew (/new)" in made.output and "cut after 3 tokens" in made.output
    said = call(store, "chat", sft.key, "--say", "so " * 600, code=1).output
    assert "begin anew" in words(said)


def test_turns_are_remembered_and_a_full_conversation_is_refused(model: Path) -> None:
    talk = Conversation(model, template=None, system="Be brief.", max_new_tokens=4, temperature=0.0, seed=0)
    shown: list[str] = []
    talk.answer("Good morning", shown.append)
    talk.answer("Which one?", shown.append)
    assert [turn["role"] for turn in talk.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert "".join(shown).strip() == (talk.turns[2]["content"] + talk.turns[4]["content"]).strip()
    before = list(talk.turns)
    with pytest.raises(ValueError, match=r"the conversation has [\d,]+ tokens, and this model reads \d+; begin anew"):
        talk.answer("so " * 600, shown.append)
    assert talk.turns == before
    talk.forget()
    assert [turn["role"] for turn in talk.turns] == ["system"]


def test_what_is_no_model_to_talk_to_is_refused(store: HandStore, sft: Ref, model: Path, tmp_path: Path) -> None:
    data = store.make("dataset", "rows")
    said = call(store, "chat", data.key, "--say", "x", code=1).output
    assert "(dataset) is no model; name a model's artifact, e.g. of sft, dpo or rlvr" in words(said)
    said = call(store, "chat", "brave-fox", "--say", "x", code=1).output
    assert "brave-fox is a whole run; name one of its models: brave-fox:sft" in words(said)
    reward = build_tiny_model(tmp_path / "reward", num_labels=1)
    said = call(store, "chat", str(reward), "--say", "x", code=1).output
    assert "which gives scores and writes nothing; name a language model" in words(said)
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "chat_template.jinja").unlink()
    said = call(store, "chat", str(base), "--say", "x", code=1).output
    assert "has no chat template: it was never taught one. Give --template" in words(said)
    call(store, "chat", str(base), "--say", "x", "--template", "tulu", "--max-new-tokens", "2")
    assert (model / "chat_template.jinja").read_text() == TULU_TEMPLATE
    leaky = store.make("sft", "leaky", outputs={"folder": "../../../secret"})
    assert "Traceback" not in call(store, "chat", leaky.key, "--say", "x", code=1).output
