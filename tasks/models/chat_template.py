"""Loads chat templates, shipped ones by name and others by path, and checks them before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from smoltulu.recipes import CHAT_TEMPLATES

#: A conversation that a template is tried on.
PROBE = [
    {"role": "system", "content": "probe system"},
    {"role": "user", "content": "probe question"},
    {"role": "assistant", "content": "probe answer"},
]


def load_chat_template(name_or_path: str) -> str:
    """Text of a template, checked on a probe conversation.

    Raises ValueError: unknown name, unreadable file, syntax or rendering error, text lost, no generation markers
    (without them the loss cannot be limited to assistant tokens), or a prompt that is not a prefix of the conversation.
    """
    shipped = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja"))
    path = CHAT_TEMPLATES / f"{name_or_path}.jinja" if name_or_path in shipped else Path(name_or_path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"chat_template {name_or_path!r} is neither shipped ({', '.join(shipped)}) nor a readable file: {error}"
        ) from None
    check_chat_template(text, name_or_path)
    return text


def check_chat_template(text: str, name: str) -> None:
    """Render a probe conversation; see `load_chat_template` for what is refused."""
    import jinja2

    try:
        whole = _render(text, PROBE, add_generation_prompt=False)
        prompt = _render(text, PROBE[:-1], add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"chat_template {name!r} does not render: {error}") from None
    lost = [turn["content"] for turn in PROBE if turn["content"] not in whole]
    if lost:
        raise ValueError(f"chat_template {name!r} loses text: {lost} is not in what it renders")
    if not re.search(r"\{%[-+]?\s*generation\b", text):  # the word alone is in every add_generation_prompt
        raise ValueError(
            f"chat_template {name!r} has no generation markers: wrap the assistant's content and eos in "
            "{% generation %} … {% endgeneration %}"
        )
    trained = _render(text, PROBE, add_generation_prompt=False, show_trained=True)
    if "<eos>" in whole and "<train>probe answer<eos>" not in trained:
        raise ValueError(
            f"chat_template {name!r} trains on other text than the assistant's content and eos: begin the block with "
            "the content and put the eos inside {% generation %} … {% endgeneration %}; without the eos in it, a model "
            "never learns to stop"
        )
    if "<eos>" not in whole:
        raise ValueError(
            f"chat_template {name!r} does not close an assistant turn with eos_token: a model would never stop"
        )
    if not whole.startswith(prompt):
        raise ValueError(
            f"chat_template {name!r}: the generation prompt {prompt[-40:]!r} is not how the conversation goes on "
            f"({whole[: len(prompt)][-40:]!r}); training and generation would see different text"
        )


def _render(
    text: str, messages: list[dict[str, str]], *, add_generation_prompt: bool, show_trained: bool = False
) -> str:
    """As transformers renders (sandboxed, trimmed blocks, `generation` blocks), without importing it.

    show_trained: what is inside `generation` blocks stands between <train> and </train>.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """Accepts {% generation %} blocks, renders what is inside, and marks it where asked to."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            if show_trained:
                before, after = (
                    jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in ("<train>", "</train>")
                )
                body = [before, *body, after]
            return jinja2.nodes.Scope(body).set_lineno(line)

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = fail
    return environment.from_string(text).render(
        messages=messages, add_generation_prompt=add_generation_prompt, bos_token="<bos>", eos_token="<eos>"
    )
