"""What RLVR takes from the stages before it: the audit of its verifiers, and the prompts that are left out."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pydantic import ValidationError

from smoltulu.artifacts.files import read_plain
from smoltulu.schemas.common import first_problem
from smoltulu.schemas.rlvr import RLVRInputs, RLVRSettings
from smoltulu.schemas.verifier_audit import VerifierAuditOutputs
from smoltulu.tasks.data.rows import RowsWriter, rows_digest, stored_rows
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.verifiers import VERIFIERS_VERSION

logger = logging.getLogger("smoltulu")
ROWS_FILE = "prompts.parquet"


def rows_to_train(config: RLVRSettings, inputs: RLVRInputs, context: StageContext) -> RLVRInputs:
    """`inputs` with the rows that are trained on: all, or those of the pools that are not left out.

    Raises:
        ValueError: the audit or the pass rates are of other rows or another version of the verifiers; too few prompts
            are left for a step.
    """
    if inputs.audit is not None:
        check_audit(Path(inputs.audit), Path(inputs.dataset))
    if not config.leave_out:
        return inputs
    if inputs.pass_rates is None:
        raise ValueError(
            f"rlvr.leave_out is {', '.join(config.leave_out)} and no pass rates are bound; add a block pass_rates"
        )
    file = context.work / ROWS_FILE
    _write_left(config, Path(inputs.dataset), Path(inputs.pass_rates), file)
    return inputs.model_copy(update={"dataset": str(file)})


def check_audit(audit: Path, dataset: Path) -> None:
    """ValueError where an audit is not of these rows and of today's verifiers."""
    try:
        outputs = VerifierAuditOutputs.model_validate_json(read_plain(audit))
    except ValidationError as error:
        raise ValueError(
            f"{audit} is no verifier audit of this version: {first_problem(error)}; make it again (refresh "
            "verifier_audit)"
        ) from None
    if outputs.verifiers_version != VERIFIERS_VERSION:
        raise ValueError(
            f"the verifiers were audited in version {outputs.verifiers_version} and now are version "
            f"{VERIFIERS_VERSION}: what they pay may be another thing; make the audit again (refresh verifier_audit)"
        )
    rows = list(stored_rows(dataset))
    digest = rows_digest(rows)
    if outputs.rows_digest != digest:
        verifiers = sorted({row["verifier"] for row in rows})
        audited = sorted({group.verifier for group in outputs.groups})
        raise ValueError(
            f"the verifier audit is of other rows: it saw {outputs.num_rows:,} of {', '.join(audited)} (digest "
            f"{outputs.rows_digest[:12]}), the training has {len(rows):,} of {', '.join(verifiers)} (digest "
            f"{digest[:12]}); make the audit of the rows of this training (refresh verifier_audit)"
        )


def _write_left(config: RLVRSettings, dataset: Path, pass_rates: Path, file: Path) -> None:
    """The rows that are left, in their order; prompts whose pass rate was not measured are kept."""
    pools = _pools(pass_rates)
    rows = list(stored_rows(dataset))
    if missing := sorted(pools.keys() - {str(row["id"]) for row in rows}):
        raise ValueError(
            f"the pass rates are of other rows: {len(missing):,} of their {len(pools):,} prompts are not trained on, "
            f"e.g. {', '.join(missing[:3])}; measure them on the rows of this training (refresh pass_rates)"
        )
    assert config.leave_out is not None
    left = [row for row in rows if pools.get(str(row["id"])) not in config.leave_out]
    said = ", ".join(f"{sum(pool == name for pool in pools.values()):,} of pool {name}" for name in config.leave_out)
    num_unmeasured = len(rows) - len(pools)
    counts = f"{len(left):,} of {len(rows):,} prompts are left ({said} are left out, {num_unmeasured:,} not measured)"
    if len(left) < config.num_prompts:
        raise ValueError(
            f"rlvr.leave_out: {counts}, and a batch of rollouts takes {config.num_prompts:,} different ones; leave out "
            "fewer pools, start from a model that is better or worse at these prompts, or lower effective_batch_size"
        )
    logger.info("%s", counts)
    if file.exists():  # of the same rows and pools, else `work` would have been emptied
        return
    # Every process of a training does this, and all write the same.
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with RowsWriter(temporary, "rlvr") as writer:
        for row in left:
            writer.write(row)
    temporary.replace(file)


def _pools(pass_rates: Path) -> dict[str, str]:
    """Id of a measured prompt -> its pool."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pass_rates, columns=["id", "pool"])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{pass_rates}: no pass rates ({str(error)[:200]}); refresh pass_rates") from error
    return dict(zip(*(table.column(name).to_pylist() for name in ("id", "pool")), strict=True))
