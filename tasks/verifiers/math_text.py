r"""One spelling of a piece of LaTeX: what never changes a value is dropped, shorthand is written out.

`\dfrac12` and `\frac{1}{2}`, `\left( 1,\,2 \right)` and `(1, 2)`, `5\text{ cm}` and `5 \mathrm{cm}` become the same.
Answers are short (`math.MAX_ANSWER_CHARACTERS`), so nothing here has to be linear.
"""

from __future__ import annotations

import re
from unicodedata import normalize

_LETTERS = str.maketrans(
    {"×": "\\times ", "·": "\\cdot ", "÷": "\\div ", "°": "\\degree ", "∞": "\\infty ",
     "π": "\\pi ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∈": "\\in ", "±": "\\pm ",
     "∅": "\\emptyset ",
     "\u00a0": " ", "\u2009": " ", "\n": " ", "\t": " ", "\r": " ", "％": "%", "，": ",", "（": "(", "）": ")"}
)  # fmt: skip
_MINUS = str.maketrans("−－–", "---")
_SIZES = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?")
_STYLES = re.compile(r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it)(?![a-zA-Z])")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_TEXTS = re.compile(
    r"\\(?:mbox|hbox|textrm|textbf|textit|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|operatorname)\s*(?=\{)"
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!;:]|,\s*\\!)(?=[0-9]{3}(?![0-9]))")
_SPACES = re.compile(r"\\[,;: !]|~|\\q?quad(?![a-zA-Z])|\\hspace\{[^{}]*\}")
_DEGREES = re.compile(
    r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])|\\deg(?![a-zA-Z])|\^\{\\text\{o\}\}"
)
_ORDINAL = re.compile(
    r"(?<=[0-9])\s*(?:\^\s*\{\s*\\text\s*\{(?:st|nd|rd|th)\}\s*\}|\^?\\text\s*\{\s*(?:st|nd|rd|th)\s*\}"
    r"|\^\s*\{\s*(?:st|nd|rd|th)\s*\}|(?:st|nd|rd|th)(?![a-zA-Z]))"
)
# What people write without LaTeX: sin(x), sqrt(3), 5E3.
_FUNCTIONS = re.compile(r"(?<![a-zA-Z\\])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|pi)(?![a-zA-Z])")
# 2e-5 may be twice Euler's number less 5; 1e-5, 1.5e-5 and 2e-05 are not.
_SCIENTIFIC = re.compile(
    r"(?<=[0-9])(?:E([+-]?[0-9]+)|e(\+?[0-9]+|[+-]0[0-9])|(?:(?<=(?<![0-9.])1)|(?<=[0-9]\.[0-9])|(?<=\.[0-9]{2})"
    r"|(?<=\.[0-9]{3}))e(-[0-9]+))(?![0-9a-zA-Z.]|\s*_)"
)
_SUPERSCRIPTS = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_PLAIN_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_VULGAR = re.compile(r"[¼½¾⅐-⅞]")
_ROOT_SIGN = re.compile(r"√\s*([0-9]+(?:\.[0-9]+)?|[a-zA-Z])?")
# TeX raises the sign only; whoever writes x^-1 means all of it.
_NEGATIVE_POWER = re.compile(r"\^\s*-\s*([0-9]+|[a-zA-Z])")
_AND = re.compile(r"\\text\s*\{[\s,]*(and|or)[\s,]*\}|(?<=[\s,}])(and|or)(?=[\s\\$])(?!\s+(?:more|less|fewer)\b)")
# Text with another answer in it: `3\\text{ or 4}`, `2\\text{ hours and 45 minutes}`; not `3\\text{ or more}`.
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_SEPARATOR = re.compile(r"\b(?:and|or)\b(?!\s+(?:more|less|fewer)\b)|;|(?<![0-9]),|,(?![0-9]{3})")
_WORDS = {
    "\\leqslant": "\\le", "\\geqslant": "\\ge", "\\leq": "\\le", "\\geq": "\\ge", "\\neq": "\\ne", "\\lt": "<",
    "\\gt": ">", "\\infin": "\\infty", "\\varnothing": "\\emptyset", "\\lbrace": "\\{", "\\rbrace": "\\}",
    "\\lbrack": "[", "\\rbrack": "]", "\\lvert": "|", "\\rvert": "|", "\\vert": "|", "\\ast": "*", "\\bullet": "\\cdot",
    "\\dbinom": "\\binom", "\\tbinom": "\\binom", "\\dots": "\\ldots", "\\cdots": "\\ldots", "\\to": "\\rightarrow",
}  # fmt: skip
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_ENDS = " .,;:"
#: Stands for the currency after `$` signs of formulas were dropped.
DOLLAR = "¤"
#: Stands before the comma that an "or" became.
OR = "∨"
PERCENT, DEGREE = "%", "\\degree"


def plain(text: str) -> str:
    """One spelling of marks and commands; structure, words and single spaces stay."""
    text = (
        _typed(text)
        .translate(_LETTERS)
        .replace("\\$", DOLLAR)
        .replace("$", "")
        .replace("\\%", "%")
        .replace("\\\\ ", "\\\\")
    )
    text = _THOUSANDS.sub(",", text)
    text = _FRACTIONS.sub(r"\\frac", _STYLES.sub("", _SIZES.sub("", text)))
    text = _TEXT.sub(_apart, _TEXTS.sub(r"\\text", text))
    text = _COMMAND.sub(lambda match: _WORDS.get(match.group(), match.group()), text)
    text = _ORDINAL.sub("", text)
    text = _SCIENTIFIC.sub(
        lambda power: f"\\times10^{{{next(filter(None, power.groups()))}}}", _FUNCTIONS.sub(r"\\\1", text)
    )
    text = _DEGREES.sub(r" \\degree ", text)
    text = _AND.sub(lambda word: f" {OR if 'or' in word.groups() else ''}, ", _SPACES.sub(" ", text))
    return without_ends(" ".join(text.split()))


def _typed(text: str) -> str:
    """What people type without LaTeX, in LaTeX: `½`, `x²`, `√2`, `x^-1`, `2**3`, `<=`."""
    text = text.replace("**", "^").replace("<=", "\\le ").replace(">=", "\\ge ")
    text = _SUPERSCRIPTS.sub(lambda digits: f"^{{{digits.group().translate(_PLAIN_DIGITS)}}}", text)
    text = _VULGAR.sub(lambda sign: "\\frac{{{}}}{{{}}}".format(*normalize("NFKC", sign.group()).split("⁄")), text)
    text = _ROOT_SIGN.sub(lambda root: f"\\sqrt{{{root.group(1)}}}" if root.group(1) else "\\sqrt ", text)
    return _NEGATIVE_POWER.sub(r"^{-\1}", text.translate(_MINUS))


def _apart(text: re.Match[str]) -> str:
    r"""`\text{ or 4}` as ` , 4`: numbers in a text are parts of a list, where words of a list stand between them."""
    words = text.group(1)
    pieces = [piece.strip() for piece in _SEPARATOR.split(words)]
    if len(pieces) < 2 or not re.search(r"[0-9=]", words):
        return text.group()
    comma = f" {OR if 'or' in _SEPARATOR.findall(words) else ''}, "
    return comma.join(f"\\text{{{piece}}}" if re.fullmatch(r"[a-zA-Z. ]{2,}", piece) else piece for piece in pieces)


def without_ends(text: str) -> str:
    """Without the punctuation of the sentence around it: the full stop of `5.`, not the point of `.5`."""
    text = text.strip()
    while text and text[-1] in _ENDS and not text.endswith(("\\,", "\\;", "\\:")):
        text = text[:-1].rstrip()
    return text.removesuffix("\\\\").rstrip()


def canonical_expression(text: str) -> str:
    """A leaf in one spelling: shorthand written out, spaces dropped where they mean nothing.

    A space between two digits stays: `1 2` is not 12.
    """
    text = _braced(text)
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=[\^_])\{(\\[a-zA-Z]+|[^{}\\])\}", r"\1", text)
    text = re.sub(r"(\\[a-zA-Z]+) (?=[a-zA-Z])", "\\1\0", text)
    text = re.sub(r"(?<=[0-9.]) (?=[0-9.])", "\0", text).replace(" ", "").replace("\0", " ")
    return text.removeprefix("+")


def _braced(text: str) -> str:
    r"""`\frac12` → `\frac{1}{2}`, `\sqrt3` → `\sqrt{3}`, `\sqrt[3]2` → `\sqrt[3]{2}`, at every depth."""
    out, place = [], 0
    for match in re.finditer(r"\\(frac|sqrt|binom)(?![a-zA-Z])", text):
        if match.start() < place:
            continue
        out.append(text[place : match.end()])
        place = match.end()
        if match.group(1) == "sqrt" and (index := re.match(r"\s*\[[^\[\]]*\]", text[place:])):
            out.append(index.group().strip())
            place += index.end()
        for _ in range(1 if match.group(1) == "sqrt" else 2):
            argument, place = _argument(text, place)
            out.append(f"{{{_braced(argument)}}}")
    return "".join([*out, text[place:]])


def _argument(text: str, place: int) -> tuple[str, int]:
    """What a command takes at `place`: a group, a command or one character; and where it ends."""
    while place < len(text) and text[place] == " ":
        place += 1
    if text[place : place + 1] == "{":
        end = matching(text, place)
        return text[place + 1 : end], end + 1
    if text[place : place + 1] == "(":  # sqrt(3), as in programs
        end = matching(text, place, "(", ")")
        return text[place + 1 : end], end + 1
    if command := re.match(r"\\[a-zA-Z]+", text[place:]):
        name = command.group()
        place += len(name)
        if name in ("\\frac", "\\sqrt", "\\text"):  # \frac\sqrt34: the root takes its own
            pieces = []
            for _ in range(2 if name == "\\frac" else 1):
                piece, place = _argument(text, place)
                pieces.append(f"{{{piece}}}")
            return name + "".join(pieces), place
        return name, place
    return text[place : place + 1], place + 1


def matching(text: str, start: int, opening: str = "{", closing: str = "}") -> int:
    """Where the group that opens at `start` closes; the end of the text if nowhere."""
    depth, place = 0, start
    while place < len(text):
        mark = text[place]
        if mark == "\\":
            place += 2
            continue
        depth += (mark == opening) - (mark == closing)
        if depth == 0:
            return place
        place += 1
    return len(text)


def braces_close(text: str) -> bool:
    r"""Whether every `{` has its `}`; those of `\{` do not count."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth < 0:
            return False
    return depth == 0
