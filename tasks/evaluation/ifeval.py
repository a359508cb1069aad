"""What lm-eval's IFEval needs of nltk, without the network."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

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
