r"""What follows a value: a unit, a noun, or words that make it another value (`3\text{ or more}`)."""

from __future__ import annotations

import re

from smoltulu.tasks.verifiers.math_text import DEGREE, DOLLAR, PERCENT

#: Spelling of a unit -> its one name. Units of one name are equal; two different names are different answers.
_UNITS = {
    "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "m": "m meter metre",
    "km": "km kilometer kilometre", "in": "in inch inche", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile",
    "mg": "mg milligram", "g": "g gm gram", "kg": "kg kilogram", "lb": "lb pound", "oz": "oz ounce",
    "s": "s sec second", "min": "min minute", "h": "h hr hour", "day": "day", "week": "week", "month": "month",
    "year": "year yr", "l": "l liter litre", "ml": "ml milliliter millilitre", "dollar": "dollar",
    "cent": "cent", "percent": "percent", "degree": "degree", "radian": "radian rad",
    # Words that say nothing about what is counted.
    "": "unit way integer number",
}  # fmt: skip
#: Words that multiply.
SCALES = {"dozen": 12, "hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NAMES = {spelling: name for name, spellings in _UNITS.items() for spelling in spellings.split()}


def unit_name(words: str) -> str | None:
    """The one name of a unit: `cm` of `centimeters`, `cm^2` of `square cm`, `mi/h` of `mph`; `` of `units`.

    None for words that are no unit known here.
    """
    words = re.sub(r"[{}.]", "", words.lower()).strip()
    words = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h"}.get(words, words)
    above, slash, below = re.sub(r"\s+per\s+|\s*/\s*", "/", words).partition("/")
    if slash:
        one, other = unit_name(above) if "/" not in below else None, unit_name(below)
        return f"{one}/{other}" if one and other else None
    power = ""
    if match := re.fullmatch(r"(.*?)\s*\^\s*([23])", words):
        words, power = match.group(1).strip(), match.group(2)
    first, _, rest = words.partition(" ")
    if first in ("square", "sq", "cubic", "cu") and rest:
        words, power = rest.strip(), "2" if first in ("square", "sq") else "3"
    name = _NAMES.get(words, _NAMES.get(words.removesuffix("s")))
    if name is None:
        return None
    return f"{name}^{power}" if name and power else name


def noun(words: str) -> str | None:
    """The name of what is counted: a known unit's, or one or two words as they are; None for words that say more."""
    unit = unit_name(words)
    if unit is not None:
        return unit
    plain_words = re.sub(r"[\s.]+", " ", re.sub(r"\b([ap])\.\s*m\b\.?", r"\1m", words.lower())).strip()
    if not re.fullmatch(r"[a-z]+(?: [a-z]+)?", plain_words) or _CHANGING.search(plain_words):
        return None
    return " ".join(word.removesuffix("s") for word in plain_words.split())


#: With one of these words a value is another value, several values or none.
_CHANGING = re.compile(
    r"\b(?:or|and|nor|not|no|non|if|to|than|except|unless|either|neither|both|but|versus|vs|alternatively|maybe|perhaps|"
    r"more|less|fewer|greater|most|least|above|below|under|about|approximately|almost|nearly|up|down|plus|minus|over|"
    r"times|divided|by|of|mod|modulo|base|negative|positive|squared|cubed|factorial|root|power|inverse|reciprocal|"
    r"double|doubled|twice|triple|tripled|thrice|false|wrong|incorrect|zero|one|two|three|four|five|six|seven|eight|nine|"
    r"ten|eleven|twelve|twenty|thirty|forty|fifty|hundred|thousand|million|billion|pi|infinity|half|halves|halfs|"
    r"(?:thir|quarter|four|fif|six|seven|eigh|nin|ten|eleven|twelf|twentie|hundred|thousand|million|billion)(?:ths?|ds?)|"
    r"quarters?|dozens?)\b"
)
_TEMPERATURE = re.compile(r"(.*\S)\s*" + re.escape(DEGREE) + r"\s*(?:\\text\s*\{)?\s*([CFK])\s*\}?", re.DOTALL)
# Units that no product of variables is taken for.
_SAFE_UNITS = ("mm", "cm", "km", "kg", "mph", "degrees", "percent", "dollars", "cents")
POWER = r"(\s*\^\s*\{?\s*[23]\s*\}?)?"
_TRAILING_TEXT = re.compile(r"(.*[0-9.)}\]a-zA-Z¤])\s*\\text\s*\{\s*([^{}]*?)\s*\}" + POWER, re.DOTALL)
_TRAILING_WORDS = re.compile(r"(.*[0-9.)}])\s*((?:(?:square|sq|cubic|cu)\.? )?(?<![a-zA-Z\\])[a-zA-Z]+)\.?" + POWER)
_SCALE = re.compile(r"(.*[0-9.)}¤])\s*(\\text\s*\{)?\s*(" + "|".join(SCALES) + r")s?(?![a-zA-Z])(.*)", re.DOTALL)


def with_scale(text: str) -> str:
    """`5 million dollars` as `(5)*1000000 dollars`."""
    if (match := _SCALE.fullmatch(text)) is None:
        return text
    number, in_text, word, rest = match.groups()
    rest = rest.strip()
    return f"({number.strip()})*{SCALES[word]} " + (f"\\text{{{rest}" if in_text and rest != "}" else rest.strip("}"))


def without_unit(text: str) -> tuple[str, str] | None:
    """A value and the one name of its unit, `` without one; None where the words after it make it another value.

    `9\\text{ a.m.}` has the unit `am`: a noun counts as a unit that only the same noun is equal to.
    """
    if (match := _TEMPERATURE.fullmatch(text)) is not None:
        return match.group(1), f"degree {match.group(2)}"
    for mark, name in ((DOLLAR, "dollar"), (PERCENT, "percent"), (DEGREE, "degree")):
        if mark in text:
            rest = text.replace(mark, " ", 1).strip()
            return (rest, name) if rest and mark not in rest else (text, "")
    if (match := _TRAILING_TEXT.fullmatch(text)) is not None and len(match.group(2)) > 1:
        unit = noun(match.group(2) + (match.group(3) or ""))
        return None if unit is None else (match.group(1).strip(), unit)
    for pattern, in_text in ((_TRAILING_TEXT, True), (_TRAILING_WORDS, False)):
        if (match := pattern.fullmatch(text)) is not None:
            words = match.group(2)
            unit = unit_name(words + (match.group(3) or ""))
            # `5 apples` are 5. Without a space 5cm is a length, but 3s^2 and 2ab are products.
            is_apart = text[match.start(2) - 1] == " "
            if is_apart and not in_text and unit is None and len(words) > 3:
                unit = noun(words)
                return None if unit is None else (match.group(1).strip(), unit)
            if unit is not None and (in_text or (is_apart and len(words) > 1) or words in _SAFE_UNITS):
                return match.group(1).strip(), unit
    return text, ""
