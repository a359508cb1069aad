"""RLVR refuses an audit of other rows or verifiers, and leaves out the prompts that the recipe names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.rlvr import GRPOSettings, PPOSettings, RLVRInputs
from smoltulu.schemas.verifier_audit import GroupAudit, VerifierAuditOutputs
from smoltulu.tasks.data.rows import rows_digest, stored_rows
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.training.audited import rows_to_train
from smoltulu.tasks.verifiers import VERIFIERS_VERSION
from tests.rows_file import read_rows, write_rows

ROWS = [{"id": f"0:{i}", "prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in range(10)]


def settings(**changes: Any) -> GRPOSettings:
    values = {
        "learning_rate": 1e-5, "effective_batch_size": 8, "num_generations": 2, "num_steps": 1,
        "max_prompt_length": 64, "max_completion_length": 8,
    }  # fmt: skip
    return GRPOSettings(**values | changes)


def bound(folder: Path, pools: dict[str, str] | None = None, **audit: Any) -> tuple[RLVRInputs, StageContext]:
    """Inputs with rows, an audit of them (with these changes), and pass rates where pools are given."""
    (folder / "work").mkdir()
    dataset = write_rows(folder / "rows.parquet", ROWS)
    outputs = VerifierAuditOutputs(
        **{
            "rows_digest": rows_digest(stored_rows(dataset)), "verifiers_version": VERIFIERS_VERSION, "num_rows": 10,
            "num_probes": 1, "groups": (GroupAudit(verifier="math", source="0", num_rows=10),), **audit,
        }
    )  # fmt: skip
    (folder / "audit.json").write_text(outputs.model_dump_json())
    taken = {"model": "m", "dataset": str(dataset), "chat_template": "t", "audit": str(folder / "audit.json")}
    if pools is not None:
        taken["pass_rates"] = str(folder / "pass_rates.parquet")
        parquet.write_table(pa.table({"id": list(pools), "pool": list(pools.values())}), taken["pass_rates"])
    context = StageContext(folder, folder / "work", ComputeSettings(), lambda *args, **kwargs: None)
    return RLVRInputs(**taken), context


def test_the_audit_of_these_rows_is_taken(tmp_path: Path) -> None:
    inputs, context = bound(tmp_path)
    assert rows_to_train(settings(), inputs, context) == (inputs, None)


def test_an_audit_of_other_rows_is_refused(tmp_path: Path) -> None:
    inputs, context = bound(tmp_path, rows_digest="0" * 64)
    with pytest.raises(ValueError, match=r"of other rows: it saw 10 of math \(digest 0000.*has 10 of gsm8k"):
        rows_to_train(settings(), inputs, context)


def test_the_order_of_rows_is_no_other_rows(tmp_path: Path) -> None:
    inputs, context = bound(
        tmp_path, rows_digest=rows_digest(read_rows(write_rows(tmp_path / "r.parquet", ROWS[::-1])))
    )
    assert rows_to_train(settings(), inputs, context) == (inputs, None)


def test_an_audit_of_another_version_of_the_verifiers_is_refused(tmp_path: Path) -> None:
    inputs, context = bound(tmp_path, verifiers_version="1")
    with pytest.raises(ValueError, match=rf"audited in version 1 and now are version {VERIFIERS_VERSION}"):
        rows_to_train(settings(), inputs, context)


@pytest.mark.parametrize("text", ["", "{}", '{"rows_digest": 3}', "[" * 10_000])
def test_what_is_no_audit_is_refused(tmp_path: Path, text: str) -> None:
    inputs, context = bound(tmp_path)
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(ValueError, match="is no verifier audit of this version"):
        rows_to_train(settings(), inputs, context)


POOLS = {f"0:{i}": pool for i, pool in enumerate(["never"] * 3 + ["always"] + ["sometimes"] * 3 + ["ungraded"])}


@pytest.mark.parametrize(
    ("leave_out", "left"),
    [
        (["never"], [3, 4, 5, 6, 7, 8, 9]),
        (["always", "never"], [4, 5, 6, 7, 8, 9]),
        (["always"], [0, 1, 2, *range(4, 10)]),
    ],
)
def test_prompts_of_a_pool_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, leave_out: list[str], left: list[int]
) -> None:
    """Two of the ten were not measured (8 and 9): they are kept, as is what could not be graded."""
    caplog.set_level(logging.INFO)
    inputs, context = bound(tmp_path, POOLS)
    taken, _ = rows_to_train(settings(leave_out=leave_out), inputs, context)
    assert [row["id"] for row in read_rows(Path(taken.dataset))] == [f"0:{i}" for i in left]
    assert taken.model_copy(update={"dataset": inputs.dataset}) == inputs
    assert f"{len(left)} of 10 prompts are left" in caplog.text and "2 not measured" in caplog.text
    before = Path(taken.dataset).read_bytes()
    rows_to_train(settings(leave_out=leave_out), inputs, context)
    assert Path(taken.dataset).read_bytes() == before, "a resume must see the same rows"


def test_prompts_are_held_out_before_pools_are_left_out(tmp_path: Path) -> None:
    """So what is held out does not depend on how often the starting model was right."""
    held_out = {"num_prompts": 3, "every_steps": 1}
    inputs, context = bound(tmp_path, POOLS)
    taken, split = rows_to_train(settings(held_out=held_out, leave_out=["always"]), inputs, context)
    assert split is not None and split.num_left_out == 3
    hidden = {one.row["id"] for one in split.held_out}
    left = [row["id"] for row in read_rows(Path(taken.dataset))]
    assert left == [row["id"] for row in ROWS if row["id"] not in hidden and POOLS.get(row["id"]) != "always"]
    (context.work / "prompts.parquet").unlink()
    _, other = rows_to_train(settings(held_out=held_out), inputs, context)
    assert other == split


def test_too_few_prompts_that_are_left_are_refused(tmp_path: Path) -> None:
    inputs, context = bound(tmp_path, dict.fromkeys(POOLS, "never"))
    with pytest.raises(
        ValueError, match=r"2 of 10 prompts are left \(8 of pool never .* batch of rollouts takes 4 diff"
    ):
        rows_to_train(settings(leave_out=["never"]), inputs, context)


def test_pass_rates_of_other_rows_are_refused(tmp_path: Path) -> None:
    inputs, context = bound(tmp_path, POOLS | {"7:1": "never"})
    with pytest.raises(ValueError, match=r"pass rates are of other rows: 1 of their 9 prompts .* e\.g\. 7:1"):
        rows_to_train(settings(leave_out=["never"]), inputs, context)
    (tmp_path / "pass_rates.parquet").write_text("no table")
    with pytest.raises(ValueError, match="no pass rates"):
        rows_to_train(settings(leave_out=["never"]), inputs, context)
    without = inputs.model_copy(update={"pass_rates": None})
    with pytest.raises(ValueError, match="no pass rates are bound; add a block pass_rates"):
        rows_to_train(settings(leave_out=["never"]), without, context)


def test_order_and_repetition_of_pools_mean_nothing() -> None:
    assert settings(leave_out=["never", "always", "never"]) == settings(leave_out=["always", "never"])
    assert settings(leave_out=[]).leave_out is None
    with pytest.raises(ValueError, match="Input should be 'never' or 'always'"):
        settings(leave_out=["sometimes"])


def test_prompts_of_a_batch_of_rollouts() -> None:
    assert settings(steps_per_generation=3).num_prompts == 12
    ppo = PPOSettings(
        learning_rate=1e-5, effective_batch_size=8, num_minibatches=2, num_samples_per_prompt=4, num_episodes=160,
        max_prompt_length=64, max_completion_length=8,
    )  # fmt: skip
    assert ppo.num_prompts == 4
