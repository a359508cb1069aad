"""Templates that people have: shipped by name, the model's own, and what stands in for one without markers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.recipes import CHAT_TEMPLATES
from smoltulu.tasks.models.chat_template import _renderings, _trl_templates, check_chat_template, load_chat_template
from smoltulu.tasks.models.folders import load_tokenizer
from smoltulu.tasks.models.tokens import conversations, stop_token_ids
from tests.families import FAMILIES, build_family, family_tokenizer
from tests.hub_double import HubDouble
from tests.small_runs import turn
from tests.tiny_model import EOS, TULU_TEMPLATE, build_tiny_model

#: As the models on the Hub have them, without generation markers.
ORIGINALS = {
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}
ENDS = {"smollm2": "<|im_end|>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "zephyr": EOS, "tulu": EOS}


def own(text: str) -> str:
    return load_chat_template("own", {"chat_template.jinja": text}.get)


@pytest.mark.parametrize("name", ORIGINALS)
def test_shipped_templates_render_as_the_originals_and_stand_in_for_them(name: str) -> None:
    shipped = (CHAT_TEMPLATES / f"{name}.jinja").read_text("utf-8")
    rendered = list(_renderings(ORIGINALS[name]))
    assert list(_renderings(shipped)) == rendered and None not in rendered
    with pytest.raises(ValueError, match="no generation markers"):
        check_chat_template(ORIGINALS[name], name)
    assert own(ORIGINALS[name]) in (shipped, _training("llama3"))
    assert own(shipped) == shipped


def _training(family: str) -> str:
    return next(training for original, training in _trl_templates() if original.stem == family).read_text("utf-8")


@pytest.mark.parametrize("name", ENDS)
def test_what_is_trained_is_the_answer_and_the_end_of_its_turn(name: str) -> None:
    family = {"llama3": "llama3", "tulu": "tulu", "zephyr": "tulu"}.get(name, "qwen")
    tokenizer = family_tokenizer(FAMILIES[family])
    tokenizer.chat_template = load_chat_template(name)
    row = [turn("system", "s"), turn("user", "a"), turn("assistant", "b c"), turn("user", "d"), turn("assistant", "e")]
    (made,) = conversations(tokenizer, [row])
    trained = [token for token, mask in zip(made.input_ids, made.mask, strict=True) if mask]
    assert tokenizer.decode(trained) == f"b c{ENDS[name]}e{ENDS[name]}" and made.stable
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    assert stop_token_ids(tokenizer) == list(dict.fromkeys([tokenizer.eos_token_id, end]))
    assert made.labels.count(end) == 2


def test_trl_knows_these_families_and_its_training_templates_are_taken() -> None:
    """Without importing TRL, the same answer as its function, for every template that it ships."""
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = family_tokenizer(FAMILIES["qwen"])
    taken = set()
    for original, _ in _trl_templates():
        text = original.read_text("utf-8")
        tokenizer.chat_template = text
        try:
            theirs = get_training_chat_template(tokenizer)
        except ValueError:
            theirs = None
        try:
            assert own(text) == theirs, original.stem
            taken.add(original.stem)
        except ValueError as error:
            assert "chat_template 'own'" in str(error), original.stem
    known = {"llama3", "qwen2_5", "qwen3", "qwen3_instruct_2507", "gemma", "gemma3", "glm4moe", "phi3", "cohere"}
    assert known <= taken


@pytest.mark.parametrize(
    ("family", "original", "end"),
    [
        ("gemma", "gemma", "<end_of_turn>"),
        ("qwen", "qwen2_5", "<|im_end|>"),
        ("qwen", "qwen3", "<|im_end|>"),
        ("llama3", "llama3", "<|eot_id|>"),
    ],
)
def test_own_templates_of_real_families_train_and_stop_at_the_end_of_turn(
    tmp_path: Path, family: str, original: str, end: str
) -> None:
    model = build_family(tmp_path, FAMILIES[family])
    text = next(first for first, _ in _trl_templates() if first.stem == original).read_text("utf-8")
    tokenizer = load_tokenizer(model, own(text))
    (made,) = conversations(tokenizer, [[turn("user", "a"), turn("assistant", "b")]])
    token = tokenizer.convert_tokens_to_ids(end)
    assert token in made.labels and made.stable
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id, token]


CHATML = (CHAT_TEMPLATES / "chatml.jinja").read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}",
            r"no generation markers.* TRL has no training template for it either\. Name the shipped template",
        ),
        (CHATML.replace("messages -%}", "messages -%}{{ strftime_now('%d %b %Y') }}", 1), "writes today's date"),
        (CHATML.replace(" + '<|im_end|>' -}}\n{% endgen", " -}}\n{% endgen"), "does not close an assistant turn"),
        (
            CHATML.replace(" + '<|im_end|>' -}}\n{% endgeneration %}", " -}}\n{% endgeneration %}{{ '<|im_end|>' }}"),
            "or the token that ends a turn",
        ),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
            "{{ '<|assistant|>' + m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
            "and not with the header of its turn",
        ),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}A: Sure, {% generation %}"
            "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}A: {% endif %}",
            "begin the {% generation %} block there",
        ),
    ],
)
def test_what_does_not_do_is_refused_with_what_to_do(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own(text)


PLAIN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.mark.parametrize(
    ("part", "instead", "message"),
    [
        (
            "{{ m.content + eos_token }}{% endgeneration %}",
            "{{ m.content + (eos_token if loop.last else '') }}{% endgeneration %}{{ '' if loop.last else eos_token }}",
            "or the token that ends a turn",
        ),
        ("+ eos_token", "+ (eos_token if loop.last else '')", "or the token that ends a turn"),
        (
            "A: {% generation %}",
            "{% if loop.index < 4 %}A: {% endif %}{% generation %}{% if loop.index >= 4 %}A: {% endif %}",
            "and not with the header of its turn",
        ),
        (
            "{{ m.role }}: {{ m.content }}",
            "{{ m.role }}: {% if loop.index < 3 %}{{ m.content }}{% else %}{% generation %}{{ m.content }}"
            "{% endgeneration %}{% endif %}",
            "trains on other text",
        ),
        (
            "{{ m.role }}: {{ m.content }}\n",
            "{% if loop.index > 2 %}{% generation %}{{ m.role }}: {{ m.content }}\n{% endgeneration %}"
            "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}",
            "trains on other text",
        ),
        (
            "{{ m.role }}: {{ m.content }}",
            "{% if loop.index > 2 %}{% generation %}{{ m.role }}: {% endgeneration %}{% else %}{{ m.role }}: "
            "{% endif %}{{ m.content }}",
            "trains on other text",
        ),
        (
            "{{ m.content + eos_token }}{% endgeneration %}",
            "{{ m.content }}{% endgeneration %}{{ eos_token }}{% generation %}\n{% endgeneration %}",
            "or the token that ends a turn",
        ),
        (
            "{{ m.content + eos_token }}{% endgeneration %}",
            "{% endgeneration %}{{ m.content }}{% generation %}{{ eos_token }}{% endgeneration %}",
            "trains on other text",
        ),
        ("A: {% generation %}", "{{ 'A: ' if loop.last else 'B: ' }}{% generation %}", "trains on other text"),
        (
            "{% generation %}{{ m.content + eos_token }}{% endgeneration %}",
            "{% if loop.last %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}"
            "{{ eos_token }}{% endif %}",
            "marks one of several answers only",
        ),
        (
            "add_generation_prompt %}A: ",
            "add_generation_prompt %}A: {% if messages[0].role == 'user' %}Sure{% endif %}",
            "is not how the conversation goes on",
        ),
        ("{{ m.content }}", "{% if loop.index < 3 %}{{ m.content }}{% endif %}", "loses text"),
    ],
)
def test_what_shows_in_a_second_answer_or_without_a_system_turn_is_refused_too(
    part: str, instead: str, message: str
) -> None:
    assert own(PLAIN) == PLAIN and part in PLAIN
    with pytest.raises(ValueError, match=message):
        own(PLAIN.replace(part, instead))


def test_a_template_without_generation_prompt_of_its_own_does() -> None:
    """As Mistral's: the answer follows the question's closing bracket."""
    text = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ ' ' + m.content + eos_token }}{% endgeneration %}{% else %}[INST] {{ m.content }} [/INST]{% endif %}"
        "{% endfor %}"
    )
    assert own(text) == text


# --- Where a model's own template is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": TULU_TEMPLATE},
        {
            "chat_template": [
                {"name": "tool_use", "template": "{{ tools }}"},
                {"name": "default", "template": TULU_TEMPLATE},
            ]
        },
    ],
)
def test_own_template_in_the_tokenizers_config(config: dict[str, Any]) -> None:
    assert load_chat_template("own", {"tokenizer_config.json": json.dumps(config)}.get) == TULU_TEMPLATE


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the base model has no chat template .* name a shipped one"),
        ({"tokenizer_config.json": "{}"}, "the base model has no chat template"),
        ({"tokenizer_config.json": '{"chat_template": 5}'}, "the base model has no chat template"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "a"}]}'}, "cannot be read"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "a", "template": "b"}]}'}, "has no chat template"),
        ({"tokenizer_config.json": "[]"}, "cannot be read"),
        ({"tokenizer_config.json": "{"}, "cannot be read"),
        ({"chat_template.jinja": " \n"}, "has no chat template"),
    ],
)
def test_no_own_template_is_said(files: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"chat_template own: .*{message}"):
        load_chat_template("own", files.get)


def test_own_of_a_folder_is_in_the_keys_as_the_text_is(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(ORIGINALS["chatml"])
    changes = {"base_model": {"path": str(model)}}
    keys = {
        name: Graph(load_recipe("tiny", changes | {"chat_template": name}), until="sft").keys()
        for name in ("own", "chatml", "tulu")
    }
    assert keys["own"] == keys["chatml"] != keys["tulu"]
    (model / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="cannot be read"):
        Graph(load_recipe("tiny", changes | {"chat_template": "own"}))


def test_a_model_made_here_has_no_template_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"base_model.scratch\) has none; name a shipped"):
        Graph(load_recipe("tiny", {"chat_template": "own"}))


def test_own_of_a_hub_model_is_read_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    import huggingface_hub.file_download as download

    from smoltulu.tasks.data.hub import Reference, SourceUnavailable, hub_text

    with HubDouble() as hub:
        first = hub.add("model", "someone/model", {"chat_template.jinja": ORIGINALS["smollm2"].encode()})
        hub.repositories["model", "someone/model"].commit("main", "another", {"chat_template.jinja": b"changed"})
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(download.constants, "HF_HUB_CACHE", str(tmp_path))
        changes = {"base_model": {"repository": "someone/model", "revision": first}, "chat_template": "own"}
        graph = Graph(load_recipe("tiny", changes))
        shipped = (CHAT_TEMPLATES / "smollm2.jinja").read_text("utf-8")
        assert graph.nodes["preflight-sft"].literals == {"chat_template": shipped}
        assert hub_text(Reference("model", "someone/model", first), "tokenizer_config.json") is None
    # Without the Hub. What was fetched is there; what was not is said, and looking only does not need it.
    assert Graph(load_recipe("tiny", changes)).keys() == graph.keys()
    assert hub_text(Reference("model", "someone/model", first), "tokenizer_config.json") is None
    changes["base_model"] = {"repository": "someone/other", "revision": "0" * 40}
    with pytest.raises(SourceUnavailable, match=r"someone/other.*chat_template.jinja cannot be fetched"):
        Graph(load_recipe("tiny", changes))
    looked = Graph(load_recipe("tiny", changes), unresolved="keep")
    assert [reference.repository for reference in looked.unresolved] == ["someone/other"]


# --- Whether there is a bos ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tulu", "chatml", "llama3", "zephyr"])
@pytest.mark.parametrize("family", ["llama3", "gemma", "adds both"])
def test_a_bos_is_the_recipes_decision(name: str, family: str) -> None:
    tokenizer = family_tokenizer(FAMILIES[family])
    bos = tokenizer.bos_token_id
    row = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    made = {}
    for decision in (None, True, False):
        text = load_chat_template(name, add_bos_token=decision)
        tokenizer.chat_template = text
        made[decision] = conversations(tokenizer, [row])[0].input_ids
    assert made[True] == [bos, *made[False]] and bos not in made[False]
    as_written = name == "llama3"
    assert made[None] == made[as_written]
    shipped = (CHAT_TEMPLATES / f"{name}.jinja").read_text("utf-8")
    assert load_chat_template(name, add_bos_token=as_written) == shipped, "the key is that of the template"


def test_a_bos_in_other_places_is_not_decided_here(tmp_path: Path) -> None:
    file = tmp_path / "every_turn.jinja"
    file.write_text(TULU_TEMPLATE.replace("'<|user|>", "bos_token + '<|user|>"))
    load_chat_template(str(file))
    with pytest.raises(ValueError, match=r"add_bos_token is true, and chat_template .* writes bos in other places"):
        load_chat_template(str(file), add_bos_token=True)


@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>", "lstrip": False}])
def test_a_bos_that_stands_as_text_is_one(bos: Any) -> None:
    files = {"chat_template.jinja": "<s>" + PLAIN, "tokenizer_config.json": json.dumps({"bos_token": bos})}
    assert load_chat_template("own", files.get, True) == "<s>" + PLAIN
    with pytest.raises(ValueError, match=r"add_bos_token is false.* or as text"):
        load_chat_template("own", files.get, False)
    files["tokenizer_config.json"] = json.dumps({"bos_token": "<other>"})
    assert load_chat_template("own", files.get, False) == "<s>" + PLAIN


@pytest.mark.parametrize("decision", [True, False])
def test_a_bos_that_opens_every_turn_is_none(decision: bool) -> None:
    """SmolLM2's tokenizer says so of <|im_start|>."""
    files = {"chat_template.jinja": CHATML, "tokenizer_config.json": json.dumps({"bos_token": "<|im_start|>"})}
    assert load_chat_template("own", files.get, decision) == CHATML


def test_earlier_answers_may_have_lost_thoughts_but_not_their_header() -> None:
    """As Qwen3 renders: empty thoughts are prompted, and only the last answer keeps them."""
    qwen = (
        PLAIN.replace("A: {% generation %}", "A: {% if loop.last %}<think></think>{% endif %}{% generation %}")
        .replace("add_generation_prompt %}A: ", "add_generation_prompt %}A: <think></think>")
    )  # fmt: skip
    assert own(qwen) == qwen
    with pytest.raises(ValueError, match="not with the header of its turn"):
        own(
            qwen.replace("A: {% if loop.last", "{% if loop.last %}A: {% endif %}{% if loop.last").replace(
                "{% generation %}", "{% generation %}{% if not loop.last %}A: {% endif %}"
            )
        )


def test_a_bos_that_only_some_conversations_have_is_decided_for_all() -> None:
    some = "{{ bos_token if messages[0].role == 'system' else '' }}" + PLAIN
    assert load_chat_template("own", {"chat_template.jinja": some}.get, False) != some
    with pytest.raises(ValueError, match=r"add_bos_token is true.* writes bos in other places"):
        load_chat_template("own", {"chat_template.jinja": some}.get, True)


def test_a_bos_changes_the_keys_and_its_absence_does_not() -> None:
    plain = Graph(load_recipe("tiny")).keys()
    assert Graph(load_recipe("tiny", {"add_bos_token": False})).keys() == plain
    changed = Graph(load_recipe("tiny", {"add_bos_token": True})).keys()
    assert {name for name in plain if plain[name] == changed[name]} >= {"world", "base-model", "dataset-sft"}
    assert not {name for name in plain if plain[name] == changed[name]} & {"preflight-sft", "sft", "dpo", "publish"}


# --- A real tokenizer ---------------------------------------------------------------------------------------------

REAL = os.environ.get("SMOLTULU_REAL_MODEL", "")


@pytest.mark.skipif(not REAL, reason="no folder of a real SmolLM2 (set SMOLTULU_REAL_MODEL)")
def test_own_template_of_a_real_smollm2(tmp_path: Path) -> None:
    files = {path.name: path.read_text("utf-8") for path in Path(REAL).glob("*.j*")}
    assert load_chat_template("own", files.get) == (CHAT_TEMPLATES / "smollm2.jinja").read_text("utf-8")
    tokenizer = load_tokenizer(Path(REAL), load_chat_template("own", files.get))
    (made,) = conversations(tokenizer, [[turn("user", "Hi"), turn("assistant", "Hello!")]])
    trained = [token for token, mask in zip(made.input_ids, made.mask, strict=True) if mask]
    assert tokenizer.decode(trained) == "Hello!<|im_end|>" and made.stable
    assert tokenizer.decode(made.input_ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    assert tokenizer.pad_token_id not in stop_token_ids(tokenizer)
