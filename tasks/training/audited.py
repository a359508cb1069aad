"""What RLVR takes from the stages before it: the audit of its verifiers, and prompts, less those that are held out."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoltulu.artifacts.files import read_plain
from smoltulu.schemas.common import first_problem
from smoltulu.schemas.rlvr import RLVRInputs, RLVRSettings
from smoltulu.schemas.verifier_audit import VerifierAuditOutputs
from smoltulu.tasks.data.rows import rows_digest, stored_rows
from smoltulu.tasks.data.rows_writer import RowsWriter
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.training.held_out_rows import Split, split_rows
from smoltulu.tasks.verifiers import VERIFIERS_VERSION

logger = logging.getLogger("smoltulu")
ROWS_FILE = "prompts.parquet"
Row = dict[str, Any]


def rows_to_train(config: RLVRSettings, inputs: RLVRInputs, context: StageContext) -> tuple[RLVRInputs, Split | None]:
    """`inputs` with the rows that are trained on, and what is held out (None: nothing).

    Prompts are held out of all rows, before any pool is left out: so runs with and without `leave_out` are measured on
    the same ones, and how often the starting model was right has no part in the choice.

    Raises:
        ValueError: the audit or the pass rates are of other rows or another version of the verifiers; held-out kinds
            that no row has; too few prompts are left for a step.
    """
    if inputs.audit is not None:
        check_audit(Path(inputs.audit), Path(inputs.dataset))
    if not config.leave_out and config.held_out is None:
        return inputs, None
    if config.leave_out and inputs.pass_rates is None:
        raise ValueError(
            f"rlvr.leave_out is {', '.join(config.leave_out)} and no pass rates are bound; add a block pass_rates"
        )
    rows = list(stored_rows(Path(inputs.dataset)))
    split = split_rows(config.held_out, config.seed, rows) if config.held_out else None
    trained = [rows[line] for line in split.trained] if split else rows
    if split is not None:
        logger.info(
            "%s of %s rows are not trained on; %s prompts are held out",
            f"{split.num_left_out:,}", f"{len(rows):,}", f"{len(split.held_out):,}",
        )  # fmt: skip
        if len(trained) < config.num_prompts:
            raise ValueError(
                f"held_out leaves {len(trained):,} of {len(rows):,} rows to train on, and a batch of rollouts takes "
                f"{config.num_prompts:,} different prompts; lower held_out.num_prompts or effective_batch_size, or "
                "hold out fewer kinds"
            )
    if config.leave_out:
        assert inputs.pass_rates is not None
        trained = _left(config, rows, trained, Path(inputs.pass_rates))
    file = context.work / ROWS_FILE
    _write(trained, file)
    return inputs.model_copy(update={"dataset": str(file)}), split


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


def _left(config: RLVRSettings, rows: list[Row], trained: list[Row], pass_rates: Path) -> list[Row]:
    """Those of `trained` whose pool is not left out, in their order; prompts that were not measured are kept."""
    pools = _pools(pass_rates)
    if missing := sorted(pools.keys() - {str(row["id"]) for row in rows}):
        raise ValueError(
            f"the pass rates are of other rows: {len(missing):,} of their {len(pools):,} prompts are not trained on, "
            f"e.g. {', '.join(missing[:3])}; measure them on the rows of this training (refresh pass_rates)"
        )
    assert config.leave_out is not None
    pool_of = [pools.get(str(row["id"])) for row in trained]
    left = [row for row, pool in zip(trained, pool_of, strict=True) if pool not in config.leave_out]
    said = ", ".join(f"{pool_of.count(name):,} of pool {name}" for name in config.leave_out)
    said += f" are left out, {pool_of.count(None):,} not measured"
    counts = f"{len(left):,} of {len(trained):,} prompts are left ({said})"
    if len(left) < config.num_prompts:
        raise ValueError(
            f"rlvr.leave_out: {counts}, and a batch of rollouts takes {config.num_prompts:,} different ones; leave out "
            "fewer pools, start from a model that is better or worse at these prompts, or lower effective_batch_size"
        )
    logger.info("%s", counts)
    return left


def _write(rows: list[Row], file: Path) -> None:
    if file.exists():  # of the same rows, pools and settings, else `work` would have been emptied
        return
    # Every process of a training does this, and all write the same.
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with RowsWriter(temporary, "rlvr") as writer:
        for row in rows:
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
