"""What is published and where."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from smoltulu.schemas.common import MAX_NAME, ArtifactPath, StrictModel, machinery, science

#: As huggingface_hub has it (utils/_validators.py): a letter, digit or _ at both ends of owner and name.
_REPOSITORY = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
#: What no name of a branch holds (git-check-ref-format).
_NO_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^/|/$|\.$|^@$|^-|(^|/)\.|\.lock(/|$)")


class PublishSettings(StrictModel):
    """The last model's folder with card; pushed where `repository` is set and HF_TOKEN is in the environment."""

    license: str = science(
        "apache-2.0",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]*$",
        max_length=MAX_NAME,
        description="for the model card's metadata",
    )
    language: str = science("en", pattern=r"^[A-Za-z]+(-[A-Za-z0-9]+)*$", max_length=MAX_NAME)
    repository: str | None = machinery(
        None, max_length=MAX_NAME, description="Hub repository, owner/name; none: stays local"
    )
    branch: str = machinery("main", max_length=MAX_NAME)
    private: bool = machinery(True)

    @field_validator("repository")
    @classmethod
    def _is_a_repository(cls, name: str | None) -> str | None:
        if name is None:
            return name
        odd = "--" in name or ".." in name or name.endswith(".git")
        if odd or not _REPOSITORY.fullmatch(name):
            raise ValueError(
                "is not a Hub repository: write owner/name with letters, digits, '-', '_' and '.', "
                "e.g. my-name/smoltulu"
            )
        return name

    @field_validator("branch")
    @classmethod
    def _is_a_branch(cls, name: str) -> str:
        if not name or _NO_BRANCH.search(name):
            raise ValueError("is not the name of a branch: write letters, digits, '-', '_', '.' and '/', e.g. main")
        return name


class PublishStageConfig(StrictModel):
    """Config of the `publish` stage: what the card says besides what its inputs say."""

    recipe_name: str = science()
    subject: str = science(description="stage whose model is published")
    settings: PublishSettings = science()
    recipe: dict[str, object] = machinery(
        {}, description="the whole recipe, for the card; its science is in the inputs' keys"
    )


class PublishInputs(StrictModel):
    """Resolved inputs: the model folder and the evaluations (artifact folders by node name)."""

    model: str
    evaluations: dict[str, str] = Field({})
    lineage: dict[str, str] = Field(
        {}, description="node name -> artifact folder of everything the model was made from"
    )


class PublishOutputs(StrictModel):
    """A folder that is ready to be pushed."""

    folder: ArtifactPath = Field("model")
    model_digest: str = Field(description="digest over the weight files, equal to the evaluated model's")


class PushResult(StrictModel):
    """What became of a push."""

    pushed: bool = Field(description="a new commit was made")
    repository: str | None = Field(None)
    branch: str | None = Field(None)
    commit: str | None = Field(None, description="head of the branch afterwards")
    reason: str = Field(description="one sentence for the user: why it stayed local, or what the Hub has now")
