"""Loads chat templates, shipped ones by name, the model's own and others by path, and checks them first."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.recipes import CHAT_TEMPLATES

if TYPE_CHECKING:
    import jinja2

logger = logging.getLogger("smoltulu")

#: In place of a template's name: the one that the base model brings.
OWN = "own"
#: A conversation that a template is tried on.
PROBE = [
    {"role": "system", "content": "probe system"},
    {"role": "user", "content": "probe question"},
    {"role": "assistant", "content": "probe answer"},
]
_MORE = [{"role": "user", "content": "more to ask"}, {"role": "assistant", "content": "more to say"}]
_BOS, _EOS = "<bos>", "<eos>"  # stand for the tokenizer's
_MARKER = re.compile(r"\{%[-+]?\s*generation\b")  # the word alone is in every add_generation_prompt
_TRAINED = re.compile("<train>|</train>")


class _DoesNotRender(ValueError):
    """A template refuses a conversation, or is faulty."""


def load_chat_template(
    name_or_path: str, read: Callable[[str], str | None] = lambda name: None, add_bos_token: bool | None = None
) -> str:
    """Text of a template, checked on a probe conversation.

    Args:
        name_or_path: a shipped template, `own`, or a file.
        read: text of a file of the base model, None where it has no such file; for `own`.
        add_bos_token: whether a conversation begins with bos; None: as the template has it.

    Raises:
        ValueError: unknown name, no own template, unreadable file, syntax or rendering error, text lost, no generation
            markers (without them the loss cannot be limited to assistant tokens) and no template that could stand in,
            an end of turn that is not trained, or a prompt that is not a prefix of the conversation.
    """
    shipped = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja"))
    if name_or_path == OWN:
        text = _trainable(_own_template(read))
    else:
        path = CHAT_TEMPLATES / f"{name_or_path}.jinja" if name_or_path in shipped else Path(name_or_path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"chat_template {name_or_path!r} is neither shipped ({', '.join(shipped)}) nor a readable file, nor "
                f"{OWN!r}, the base model's: {error}"
            ) from None
    check_chat_template(text, name_or_path)
    if add_bos_token is None:
        return text
    return _with_bos(text, name_or_path, add_bos_token, _BOS if name_or_path in shipped else _bos_of(read))


def _own_template(read: Callable[[str], str | None]) -> str:
    """The template in a model's files; ValueError where there is none."""
    try:
        found: Any = read("chat_template.jinja")
        if found is None:
            found = json.loads(read("tokenizer_config.json") or "{}").get("chat_template")
            if isinstance(found, list):  # several, by name
                found = {one["name"]: one["template"] for one in found}.get("default")
    except (UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"chat_template own: chat_template.jinja or tokenizer_config.json of the base model cannot be read: {error}"
        ) from None
    if not isinstance(found, str) or not found.strip():
        raise ValueError(
            "chat_template own: the base model has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); name a shipped one, e.g. tulu, or give the path of a .jinja file"
        )
    return found


def _trainable(own: str) -> str:
    """A model's own template, or one with generation markers that stands in for it.

    TRL's training templates stand in for the texts that they were made from. A shipped template, or one of TRL's,
    stands in for any that renders the same conversations.
    """
    if _MARKER.search(own):
        return own
    candidates = {path: f"the shipped template {path.stem}" for path in sorted(CHAT_TEMPLATES.glob("*.jinja"))}
    for original, training in _trl_templates():
        if own == original.read_text(encoding="utf-8"):
            candidates = {training: f"TRL's {training.stem}"}
            break
        candidates[training] = f"TRL's {training.stem}"
    rendered = list(_renderings(own))
    for path, name in candidates.items():
        text = path.read_text(encoding="utf-8")
        same = any(rendered) and all(made == wanted for made, wanted in zip(_renderings(text), rendered, strict=True))
        if same or len(candidates) == 1:
            logger.info("chat_template own: %s stands in for it, with generation markers", name)
            return text
    return own


def _trl_templates() -> Iterator[tuple[Path, Path]]:
    """A family's template, and TRL's variant of it for training. TRL itself is not imported: that takes seconds."""
    package = importlib.util.find_spec("trl")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for training in sorted(Path(folder, "chat_templates").glob("*_training.jinja")):
            original = training.with_name(training.name.replace("_training", ""))
            if original.is_file():
                yield original, training


def _renderings(text: str, **options: Any) -> Iterator[str | None]:
    """What a template makes of conversations of the shapes that rows have; None where it refuses one."""
    system, user, assistant = ({**turn, "content": f" {turn['content']}\n"} for turn in PROBE)
    for turns in ([user, assistant], [user], [user, assistant, user], [user, assistant, user, assistant]):
        for conversation in (turns, [system, *turns]):
            for asks in (False, True):
                try:
                    yield _render(text, conversation, add_generation_prompt=asks, **options)
                except _DoesNotRender:
                    yield None


def check_chat_template(text: str, name: str) -> None:
    """Render conversations of the shapes that rows have; see `load_chat_template` for what is refused."""
    given = f"chat_template {name!r}"
    try:
        probe, whole = _rendered_probe(text)
        _render(text, probe[:-1], add_generation_prompt=True)
    except _DoesNotRender as error:
        raise ValueError(f"{given} does not render: {error}") from None
    _refuse_lost_text(given, probe, whole)
    if list(_renderings(text, day="another day")) != list(_renderings(text)):
        raise ValueError(
            f"{given} writes today's date (strftime_now): the same conversation would be other tokens tomorrow. Copy "
            "it to a file, write a date there in place of the call, and give the file's path"
        )
    if not _MARKER.search(text):
        advice = (
            ". TRL has no training template for it either. Name the shipped template of its family, or copy it to a "
            "file, add them there, and give the file's path"
            if name == OWN
            else ""
        )
        raise ValueError(
            f"{given} has no generation markers: wrap the assistant's content and the end of its turn in "
            f"{{% generation %}} … {{% endgeneration %}}{advice}"
        )
    for conversation in (PROBE, PROBE[1:], [*PROBE, *_MORE], [*PROBE[1:], *_MORE]):
        places = [place for place, turn in enumerate(conversation) if turn["role"] == "assistant"]
        try:
            marked = _render(text, conversation, show_trained=True)
            asked = [_render(text, conversation[:place]) for place in places]
            prompts = [_render(text, conversation[:place], add_generation_prompt=True) for place in places]
        except _DoesNotRender:
            continue  # the preflight counts such rows
        _refuse_lost_text(given, conversation, marked)
        _check_answers(given, conversation, marked, list(zip(asked, prompts, strict=True)))


def _refuse_lost_text(given: str, conversation: list[dict[str, str]], whole: str) -> None:
    lost = [turn["content"] for turn in conversation if turn["content"] not in whole]
    if lost:
        raise ValueError(f"{given} loses text: {lost} is not in what it renders")


def _check_answers(given: str, conversation: list[dict[str, str]], marked: str, prompts: list[tuple[str, str]]) -> None:
    """Refuse a template that trains on other text of a conversation than each answer and the end of its turn.

    Args:
        marked: the conversation's text, with <train> and </train> around what the template marks.
        prompts: for each answer, the text of what comes before it without and with the generation prompt.
    """
    whole, is_trained = "", []  # is_trained: of each character
    for number, piece in enumerate(_TRAINED.split(marked)):
        whole += piece
        is_trained += [number % 2 == 1] * len(piece)
    places, place = [], 0  # where each turn's content begins and ends
    for turn in conversation:
        begin = max(whole.find(turn["content"], place), 0)
        place = begin + len(turn["content"])
        places.append((begin, place))
    answers = [number for number, turn in enumerate(conversation) if turn["role"] == "assistant"]
    ends_of_turns = []
    for number, (asked, prompt) in zip(answers, prompts, strict=True):
        begin, end = places[number]
        is_last = number == answers[-1]
        start, stop = places[number - 1][1], len(whole) if is_last else places[number + 1][0]
        if not any(is_trained[start:stop]) and any(is_trained):
            raise ValueError(
                f"{given} marks one of several answers only: put {{% generation %}} … {{% endgeneration %}} around "
                "every answer and the end of its turn"
            )
        end_of_turn = "".join(whole[at] for at in takewhile(lambda at: is_trained[at], range(end, stop))).strip()
        ends_of_turns.append(end_of_turn)
        if all(is_trained[begin:end]) and not end_of_turn:
            if whole[end:stop].strip():
                raise ValueError(
                    f"{given} trains on other text than the assistant's content and the end of its turn: put the eos "
                    "inside {% generation %} … {% endgeneration %}, or the token that ends a turn; without it there, a "
                    "model never learns to stop"
                )
            raise ValueError(
                f"{given} does not close an assistant turn with eos_token, or with a token that ends a turn: a model "
                "would never stop"
            )
        # Where the text before the answer ends, and up to where the conversation goes on as it was prompted.
        header, shared = _num_shared(asked, prompt), _num_shared(whole, prompt)
        if is_last and shared < len(prompt):
            raise ValueError(
                f"{given}: the generation prompt {prompt[-40:]!r} is not how the conversation goes on "
                f"({whole[: len(prompt)][-40:]!r}); training and generation would see different text"
            )
        first = next((at for at in range(start, stop) if is_trained[at]), stop)
        # What stands between the header and an answer, such as empty <think> tags, may be both prompted and trained.
        # Earlier answers may have lost it, but not the header.
        is_header_trained = first < shared and not prompt[header:first].strip()
        is_other_header = bool(prompt[header:].strip()) and not prompt[header:shared].strip()
        if not all(is_trained[begin:end]) or is_header_trained or is_other_header or whole[shared:first].strip():
            raise _trains_on_other_text(given, prompt)
    others = [places[number] for number in range(len(conversation)) if number not in answers]
    if any(any(is_trained[begin:end]) for begin, end in others) or not all(map(end_of_turn.startswith, ends_of_turns)):
        raise _trains_on_other_text(given, prompts[-1][1])


def _num_shared(first: str, second: str) -> int:
    """Characters with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _trains_on_other_text(given: str, prompt: str) -> ValueError:
    return ValueError(
        f"{given} trains on other text than what follows the generation prompt {prompt[-40:]!r}: begin the "
        "{% generation %} block there, with the content and not with the header of its turn"
    )


def _with_bos(text: str, name: str, add_bos_token: bool, bos: str) -> str:
    """A template whose conversations begin with one bos, or none. `bos`: the tokenizer's, for it may stand as text."""
    rendered = [whole for whole in _renderings(text) if whole is not None]
    # A text that every turn begins with is no bos, though a tokenizer may call it so (SmolLM2's <|im_start|>).
    is_text = bos != _BOS and all(whole.startswith(bos) and whole.count(bos) == 1 for whole in rendered)
    if all((whole.startswith((_BOS, bos) if add_bos_token else _BOS)) == add_bos_token for whole in rendered) and (
        add_bos_token or not is_text
    ):
        return text
    written = "{{ bos_token or raise_exception('add_bos_token is true, and the tokenizer has no bos token') }}"
    # A line of its own after a block: what `trim_blocks` takes away is not the template's.
    changed = written + text if add_bos_token else "{% set bos_token = '' %}\n" + text
    counts = {whole.count(_BOS) for whole in _renderings(changed) if whole is not None}
    if counts != {int(add_bos_token)} or is_text:
        raise ValueError(
            f"add_bos_token is {str(add_bos_token).lower()}, and chat_template {name!r} writes bos in other places as "
            "well, or as text; copy it to a file, write bos there where you want it, and leave add_bos_token out"
        )
    return changed


def _bos_of(read: Callable[[str], str | None]) -> str:
    """The tokenizer's bos, as its files say; a stand-in where they say none."""
    try:
        found = json.loads(read("tokenizer_config.json") or "{}").get("bos_token")
        found = found["content"] if isinstance(found, dict) else found
    except (ValueError, LookupError, TypeError, AttributeError):
        return _BOS  # made here, or faulty: the base model's own check says so
    return found if isinstance(found, str) and found else _BOS


def _rendered_probe(text: str) -> tuple[list[dict[str, str]], str]:
    """PROBE, without its system turn where a template takes none (the preflight counts such rows), and its text."""
    try:
        return PROBE, _render(text, PROBE)
    except _DoesNotRender as error:
        try:
            return PROBE[1:], _render(text, PROBE[1:])
        except _DoesNotRender:
            raise error from None


def _render(
    text: str,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
    show_trained: bool = False,
    day: str = "a day",
) -> str:
    """As transformers renders (sandboxed, trimmed blocks, `generation` blocks), without importing it.

    show_trained: what is inside `generation` blocks stands between <train> and </train>.
    """
    import jinja2

    tokens = {"bos_token": _BOS, "eos_token": _EOS, "pad_token": "<pad>", "unk_token": "<unk>"}
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    faults = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
    try:
        return _compiled(text, show_trained).render(**given, **tokens, strftime_now=lambda form: day)
    except (jinja2.TemplateError, *faults) as error:
        raise _DoesNotRender(str(error)) from None


@lru_cache(maxsize=8)
def _compiled(text: str, show_trained: bool) -> jinja2.Template:
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
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = fail
    return environment.from_string(text)
