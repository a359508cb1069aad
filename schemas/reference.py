"""Log-probabilities of the reference model for DPO, as an artifact of their own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from smoltulu.schemas.common import ArtifactPath, StrictModel, science
from smoltulu.schemas.training import TrainingInputs


class ReferenceLogpsConfig(StrictModel):
    """Config of the `reference_logps` stage. Data, template and length are in the key of the tokenised pairs."""

    precision: Literal["float32", "bfloat16"] = science("bfloat16", description="as DPO's")


class ReferenceLogpsInputs(TrainingInputs):
    """Those of the DPO training: the model that it starts from is the reference."""


class ReferenceLogpsOutputs(StrictModel):
    """One line a pair, in the order of the tokenised pairs."""

    file: ArtifactPath = Field(
        "reference_logps.parquet", description="chosen, rejected: sums of log-probabilities (float32)"
    )
    num_rows: int = Field(ge=0)
