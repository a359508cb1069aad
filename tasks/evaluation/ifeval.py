"""IFEval's checkers, from lm-eval, without the network and without chance.

lm-eval's own way needs a download (punkt), draws arguments that a row does not give, and lets langdetect guess anew
each time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger("smoltulu")


@cache
def prepare_punkt() -> bool:
    """Let nltk find sentences without a download; called before lm-eval's IFEval is imported. Whether it is nltk's own.

    Where nltk's punkt_tab is not installed, one without a list of abbreviations takes its place: `Mr. Smith` then is
    two sentences. Of IFEval's 25 instructions, number_sentences and capital_word_frequency use it.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        pass
    else:
        return True
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params

    ours = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoltulu" / "nltk"
    nltk.data.path.append(str(ours))  # nltk reads and writes only what is in its path
    folder = ours / "tokenizers" / "punkt_tab" / "english"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        save_punkt_params(PunktParameters(), dir=str(made))
        with contextlib.suppress(OSError):  # another process was first
            made.rename(folder)
    logger.warning(
        "IFEval: nltk's punkt_tab is not installed, so sentences are told apart without its list of abbreviations; "
        "`python -m nltk.downloader punkt_tab` installs it"
    )
    return False


def followed(doc: Mapping[str, Any], response: str) -> list[bool]:
    """Of each instruction of an IFEval row, whether `response` follows it strictly. An empty one follows none.

    Raises:
        ValueError: an instruction that does not exist or lacks an argument, which lm-eval would draw at random.
    """
    import langdetect

    prepare_punkt()
    langdetect.DetectorFactory.seed = 0
    return [
        bool(response.strip()) and bool(_checker(doc, number).check_following(response))
        for number in range(len(doc["instruction_id_list"]))
    ]


def _checker(doc: Mapping[str, Any], number: int) -> Any:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    name = doc["instruction_id_list"][number]
    if name not in INSTRUCTION_DICT:
        raise ValueError(f"IFEval row {doc['key']}: unknown instruction {name!r}; known: {', '.join(sorted(INSTRUCTION_DICT))}")
    given = {argument: value for argument, value in doc["kwargs"][number].items() if value}
    checker = INSTRUCTION_DICT[name](name)
    checker.build_description(**given)
    used = checker.get_instruction_args() or {}
    if "prompt" in used:
        checker.build_description(prompt=doc["prompt"])
    if name == "keywords:letter_frequency" and "letter" in given:
        checker._letter = given["letter"].lower()  # of `#` and `!`, in two rows, lm-eval makes a random letter
    if missing := sorted(used.keys() - given.keys() - {"prompt", "prompt_to_repeat"}):
        raise ValueError(
            f"IFEval row {doc['key']}: {name} lacks {', '.join(missing)} (0 and empty count as missing), and lm-eval "
            "would draw it at random; give it in kwargs or take the instruction out"
        )
    return checker
