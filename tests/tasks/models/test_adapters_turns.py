"""Tool calls, reasoning, other roles and turns that are not trained on, through real templates; masks by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.recipes import CHAT_TEMPLATES
from smoltulu.tasks.models.chat_template import _trl_templates, check_chat_template
from smoltulu.tasks.models.tokens import (
    conversations,
    fit_conversation,
    fit_pair,
    pairs,
    prompt_ids,
    rendering_errors,
)
from smoltulu.tasks.models.turns import NotRendered
from tests.families import FAMILIES, family_tokenizer
from tests.rich_rows import ASKED, HERMES, TOOLS, call, calling
from tests.small_runs import turn
from tests.tasks.models.test_tokens import ODD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHIPPED = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja"))
#: Of TRL's, those that call tools.
TRL = {training.stem: training for _, training in _trl_templates()}
#: Of models with images: text is a list of parts there.
TAKE_PARTS = ("idefics3_training", "llava_next_training", "smolvlm_training")
#: A conversation of which the first answer is not trained on.
HALF: list[dict[str, Any]] = [
    turn("user", "a"), turn("assistant", "BAD") | {"train": False}, turn("user", "b"), turn("assistant", "GOOD"),
]  # fmt: skip


def tokenizer_of(template: str, family: str = "qwen") -> PreTrainedTokenizerFast:
    tokenizer = family_tokenizer(FAMILIES[family])
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def hermes() -> PreTrainedTokenizerFast:
    check_chat_template(HERMES, "hermes")
    return tokenizer_of(HERMES)


def trained(tokenizer: Any, row: list[dict[str, Any]], tools: Any = None) -> tuple[str, str]:
    """The text of a row, and what of it is trained on."""
    (made,) = conversations(tokenizer, [row], [tools])
    assert made.stable
    said = [token for token, mask in zip(made.input_ids, made.mask, strict=True) if mask]
    return tokenizer.decode(made.input_ids), tokenizer.decode(said)


def test_a_conversation_with_tools_by_hand(hermes: Any) -> None:
    text, said = trained(hermes, ASKED, TOOLS)
    called = (
        '<think>\nI must look.\n</think>\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "days": 3}}\n'
        "</tool_call><|im_end|>"
    )
    signature = (
        '{"type": "function", "function": {"name": "weather", "description": "The weather of a city.", "parameters": '
        '{"type": "object", "properties": {"city": {"type": "string", "description": "its name"}, "days": {"type": '
        '"integer"}}, "required": ["city"]}}}'
    )
    assert text == (
        f"<|im_start|>system\n# Tools\n<tools>\n{signature}\n</tools><|im_end|>\n<|im_start|>user\nRain in Bonn?"
        f"<|im_end|>\n<|im_start|>assistant\n{called}\n<|im_start|>user\n<tool_response>\ndry, 21\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\nNo rain.<|im_end|>\n"
    )
    assert said == called + "No rain.<|im_end|>"
    untrained = [ASKED[0], ASKED[1] | {"train": False}, *ASKED[2:]]
    assert trained(hermes, untrained, TOOLS) == (text, "No rain.<|im_end|>")
    assert trained(hermes, [*ASKED[:3], ASKED[3] | {"train": False}], TOOLS) == (text, called)
    # What generation is asked is how the row begins.
    (asked,) = prompt_ids(hermes, [ASKED[:3]], [TOOLS])
    (whole,) = conversations(hermes, [untrained], [TOOLS])
    assert whole.input_ids[: len(asked)] == asked


@pytest.mark.parametrize("name", SHIPPED)
def test_an_answer_that_is_not_trained_on_is_context_in_every_shipped_template(name: str) -> None:
    tokenizer = tokenizer_of((CHAT_TEMPLATES / f"{name}.jinja").read_text("utf-8"), "llama3")
    plain = [{"role": one["role"], "content": one["content"]} for one in HALF]
    (half,), (whole,) = conversations(tokenizer, [HALF]), conversations(tokenizer, [plain])
    assert half.input_ids == whole.input_ids and half.stable
    answer, other = trained(tokenizer, HALF)[1], trained(tokenizer, [*plain[:3], plain[3] | {"train": False}])[1]
    assert answer.startswith("GOOD") and "BAD" not in answer and other.startswith("BAD") and "GOOD" not in other
    assert trained(tokenizer, plain)[1] == other + answer
    with pytest.raises(NotRendered, match=r"leaves out text: tool_calls, .*tools; name a template that renders it"):
        conversations(tokenizer, [[ASKED[0], calling(call(city="Bonn"))]], [TOOLS])
    with pytest.raises(NotRendered, match="leaves out text: reasoning_content"):
        conversations(tokenizer, [[ASKED[0], turn("assistant", "No.") | {"reasoning_content": "No"}]])
    with pytest.raises(NotRendered, match="leaves out text: tools"):
        prompt_ids(tokenizer, [ASKED[:1]], [TOOLS])
    if name == "tulu":  # the others write any role
        for role in ("tool", "developer"):
            with pytest.raises(NotRendered, match=f"leaves out text: turns of role {role}"):
                prompt_ids(tokenizer, [[turn(role, "x"), turn("user", "y")]])


@pytest.mark.parametrize("name", sorted(TRL))
def test_templates_of_real_families_mask_the_turn_that_is_not_trained_on(name: str) -> None:
    tokenizer = tokenizer_of(TRL[name].read_text("utf-8"))
    if name in TAKE_PARTS:
        with pytest.raises(rendering_errors()):
            conversations(tokenizer, [HALF])
        return
    (half,) = conversations(tokenizer, [HALF])
    said = tokenizer.decode([token for token, mask in zip(half.input_ids, half.mask, strict=True) if mask])
    assert "GOOD" in said and "BAD" not in said and "BAD" in tokenizer.decode(half.input_ids)


@pytest.mark.parametrize(("name", "fault"), [
    ("qwen3_training", None), ("qwen2_5_training", "reasoning_content"), ("glm4moe_training", None),
    ("llama3_training", "reasoning_content, tool_calls, tools"), ("deepseekv3_training", "reasoning_content, tools"),
    ("gptoss_training", "reasoning_content"),
])  # fmt: skip
def test_what_real_templates_say_of_tools(name: str, fault: str | None) -> None:
    tokenizer = tokenizer_of(TRL[name].read_text("utf-8"))
    if fault is not None:
        with pytest.raises(NotRendered, match=fault):
            conversations(tokenizer, [ASKED], [TOOLS])
        return
    (made,) = conversations(tokenizer, [ASKED], [TOOLS])
    said = tokenizer.decode([token for token, mask in zip(made.input_ids, made.mask, strict=True) if mask])
    assert "I must look." in said and "Bonn" in said and "No rain." in said and "dry, 21" not in said


_TURNS = """\
{%- for m in messages %}<{{ m.role }}>
{%- if m.role == 'assistant' %}{% generation %}ANSWER|{% endgeneration %}{%- else %}{{ m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{%- endif %}"""


def answering(answer: str) -> PreTrainedTokenizerFast:
    """With a template that writes an answer so."""
    return tokenizer_of(_TURNS.replace("ANSWER", answer))


@pytest.mark.parametrize(("answer", "fault"), [
    ("{{ m.content }}", "leaves out text: tool_calls"),
    ("{{ m.content }}{{ m.tool_calls }}", "as Python writes them"),
    ("{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}", "leaves out text: tool_calls"),
    ("{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}", "tool_calls"),
    ("{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name[:3] }}{{ c.function.arguments | tojson }}"
     "{% endfor %}", "tool_calls"),
    ("{{ m.content | length }}{{ m.tool_calls | tojson }}", "otherwise where a text of it is another"),
    ("{{ m.content }}{{ m.tool_calls | tojson }}", None),
])  # fmt: skip
def test_a_template_that_loses_a_part_of_a_call_is_found_out(answer: str, fault: str | None) -> None:
    """What stands elsewhere in the row does not hide it: the city is in the question, too."""
    tokenizer = answering(answer)
    row = [turn("user", "weather city Bonn 3 days"), calling(call(city="Bonn", days=3), content="So:")]
    if fault is None:
        assert trained(tokenizer, row)[1].startswith('So:[{"type": "function", "function": {"name": "weather"')
        return
    with pytest.raises(NotRendered, match=fault):
        conversations(tokenizer, [row])


def test_calls_that_would_not_be_learned_are_refused() -> None:
    behind = "{{ m.content }}|{% endgeneration %}{{ m.tool_calls | tojson if m.tool_calls }}{% generation %}"
    tokenizer, row = answering(behind), [turn("user", "a"), calling(call(city="Bonn"), content="So:")]
    with pytest.raises(NotRendered, match=r"writes tool_calls outside of \{% generation %\}"):
        conversations(tokenizer, [row])
    # As context they may stand there.
    last = [turn("user", "b"), turn("assistant", "c")]
    assert trained(tokenizer, [row[0], row[1] | {"train": False}, *last])[1] == "c||"
    assert len(prompt_ids(tokenizer, [[*row, last[0]]])) == 1


def test_one_block_around_all_answers_cannot_leave_one_out() -> None:
    tokenizer = tokenizer_of("{% generation %}{% for m in messages %}{{ m.content }}|{% endfor %}{% endgeneration %}")
    with pytest.raises(NotRendered, match="marks turns with train false and turns that are trained as one"):
        conversations(tokenizer, [HALF])


def test_two_answers_one_after_the_other_are_told_apart(hermes: Any) -> None:
    row = [turn("user", "a"), turn("assistant", "one") | {"train": False}, turn("assistant", "two")]
    assert trained(hermes, row)[1] == "two<|im_end|>"


def test_a_template_that_looks_at_how_a_text_ends_is_no_obstacle() -> None:
    """As Qwen 3's looks for </tool_response>: a mark goes to another place."""
    looks = "{{ m.content }}{% if m.content.endswith('BAD') %}!{% endif %}"
    assert trained(answering(looks), HALF) == ("<user>a<assistant>BAD!|<user>b<assistant>GOOD|", "GOOD|")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ODD), st.booleans()), min_size=1, max_size=4), st.sampled_from(SHIPPED))
def test_whatever_the_texts_only_the_answers_that_are_trained_on_have_labels(
    answers: list[tuple[str, bool]], name: str
) -> None:
    """The parts that are trained on are those of the answers, in their order, whichever are left out."""
    tokenizer = tokenizer_of((CHAT_TEMPLATES / f"{name}.jinja").read_text("utf-8"), "llama3")
    plain: list[dict[str, Any]] = []
    for text, _ in answers:
        plain += [turn("user", "Go on."), turn("assistant", text)]
    row = [dict(one) for one in plain]
    for number, (_, is_trained) in enumerate(answers):
        if not is_trained:
            row[2 * number + 1]["train"] = False
    (whole,) = conversations(tokenizer, [plain])
    try:
        (made,) = conversations(tokenizer, [row])
    except NotRendered:
        assert any(not text.strip() for text, _ in answers)  # nothing of it can be seen
        return
    assert made.input_ids == whole.input_ids
    runs, runs_made = _runs(whole.mask), _runs(made.mask)
    if len(runs) == len(answers):  # no two answers touch
        assert runs_made == [run for run, (_, is_trained) in zip(runs, answers, strict=True) if is_trained]


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """First and last place of each stretch of ones."""
    edges = [place for place, (now, before) in enumerate(zip([*mask, 0], [0, *mask], strict=True)) if now != before]
    return [(start, stop - 1) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def test_a_row_of_which_nothing_is_trained_on_is_left_out(hermes: Any) -> None:
    (made,) = conversations(hermes, [[turn("user", "a"), turn("assistant", "b") | {"train": False}]])
    assert not any(made.mask) and fit_conversation(made, 100, "truncate") is None


def test_pairs_with_tools_and_turns_that_do_not_count(hermes: Any) -> None:
    row = {
        "prompt": ASKED[:1],
        "chosen": [ASKED[1] | {"train": False}, *ASKED[2:]],
        "rejected": [calling(call(city="Köln", days=1))],
        "tools": TOOLS,
    }
    (pair,) = pairs(hermes, [row], "last")
    assert pair.stable and not any(pair.prompt_mask)
    (asked,) = prompt_ids(hermes, [ASKED[:1]], [TOOLS])
    assert pair.prompt_ids == asked
    counted = [token for token, mask in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if mask]
    assert hermes.decode(counted) == "No rain.<|im_end|>"
    assert '"Köln"' in hermes.decode(pair.rejected_ids) and fit_pair(pair, 1000, "drop") == pair
    untrained = row | {"rejected": [calling(call(city="Köln"), train=False)]}
    (pair,) = pairs(hermes, [untrained], "last")
    assert fit_pair(pair, 1000, "drop") is None
    # Answers of the prompt count in trained_turns all, but not those that are context.
    sides = {"chosen": [turn("assistant", "d")], "rejected": [turn("assistant", "e")]}
    before = {"prompt": [*HALF, turn("user", "c")], **sides}
    (pair,) = pairs(hermes, [before], "all")
    counted = [token for token, mask in zip(pair.prompt_ids, pair.prompt_mask, strict=True) if mask]
    assert hermes.decode(counted) == "GOOD<|im_end|>"


def test_a_row_does_not_depend_on_the_rows_beside_it(hermes: Any) -> None:
    plain = [turn("user", "a"), turn("assistant", "b")]
    rows, tools = [plain, ASKED, HALF, plain], [None, TOOLS, None, TOOLS]
    alone = [conversations(hermes, [row], [own])[0] for row, own in zip(rows, tools, strict=True)]
    assert conversations(hermes, rows, tools) == alone
    assert prompt_ids(hermes, rows, tools) == [
        prompt_ids(hermes, [row], [own])[0] for row, own in zip(rows, tools, strict=True)
    ]


def test_the_rows_of_this_file_need_no_network() -> None:
    assert all(Path(path).is_file() for path in TRL.values()) and len(TRL) > 10
