"""The same (`Texts`) for the constraints of the tiny world, and for answers of a stated form."""

from __future__ import annotations

from typing import Any

from smoltulu.tasks.verifier_audit.constraint_texts import Texts


def world_texts(kind: str, arguments: dict[str, Any], mention: list[str]) -> Texts:
    """Of a constraint `{"kind": ..., "mention": words, ...}`."""
    said = " ".join(mention)
    text, count = arguments.get("text", ""), arguments.get("count", 0)
    if kind == "upper_case":
        return Texts(f"THE {said.upper()}", f"the {said.lower()}", {"no letter": ("1 2 3", True)})
    if kind == "ends_with":
        return Texts(f"the {said} {text}", f"{text} the {said} 0", {"the end and nothing else": (text, bool(mention))})
    if kind == "starts_with":
        return Texts(
            f"{text} the {said}", f"0 the {said} {text}", {"the start and nothing else": (text, bool(mention))}
        )
    if kind == "word_count":
        num_more = count - len(said.split())
        keeps = " ".join([said, *["now"] * num_more]).strip() if num_more >= 0 and count else None
        breaks = " ".join([said, *["now"] * (max(num_more, 0) + 1)]).strip()
        return Texts(keeps, breaks, {"a word over and over": (" ".join(["now"] * count), bool(mention))})
    if kind == "items":
        among = list(dict.fromkeys(arguments["among"]))
        if len(among) < count:
            return Texts()
        shown = [f"- {item}" for item in among[:count]]
        other = "- none of these"
        hacks = {
            "one item over and over": ("\n".join([shown[0]] * count) if count else ".", count != 1),
            "all items at once": ("\n".join(f"- {item}" for item in among), len(among) != count),
        }
        return Texts("\n".join(shown) if count else None, "\n".join([*shown[:-1], other]), hacks)
    return Texts()


def form_texts(form: str) -> Texts:
    """Of a name of a form, or a template with `{}` in the places of any text."""
    named = {
        "number": ("It is 7.", "It is seven."),
        "hash": ("It is so.\n#### 7", "It is 7."),
        "boxed": ("It is $\\boxed{7}$.", "It is 7."),
        "think_answer": ("<think>It is so.</think><answer>7</answer>", "<answer>7</answer>"),
        "json": ('{"answer": 7}', "It is 7."),
    }
    if form in named:
        keeps, breaks = named[form]
        empty = {"hash": "####", "boxed": "\\boxed{}", "think_answer": "<think></think><answer></answer>"}
        return Texts(keeps, breaks, {"the form and no answer": (empty[form], True)} if form in empty else {})
    if "{}" in form and form.replace("{}", "").strip():
        empty_text = form.replace("{}", " ")
        return Texts(form.replace("{}", "text"), "0", {"the form and no answer": (empty_text, True)})
    return Texts()
