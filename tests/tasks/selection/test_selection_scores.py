"""Stage `selection_scores`: what the scores are, that nothing but the rows changes them, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.selection import SelectionScoresConfig, SelectionScoresInputs
from smoltulu.tasks.engine.launch import run_child
from smoltulu.tasks.job import Job
from smoltulu.tasks.models.folders import load_language_model, load_tokenizer
from smoltulu.tasks.selection import scores_file, scores_stage, scoring
from smoltulu.tasks.selection.rendering import Rendered, Renderer
from smoltulu.tasks.selection.scores_file import RowScore, stored_scores
from smoltulu.tasks.selection.scoring import batches_of, influence_score
from smoltulu.tasks.stages import STAGES
from tests import ROOT
from tests.rows_file import write_rows
from tests.small_runs import pairs, turn
from tests.tasks.preflight.test_preflight import prompts
from tests.tasks.selection.scored import conversation, conversations, scored, strong_model, write_heads
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model, build_tokenizer

HEADS = [(1, 0), (2, 1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strong_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_stage, "PART_ROWS", 8)
    monkeypatch.setattr(scoring, "ROW_TOKENS", 32)


def near(one: list[RowScore], other: list[RowScore]) -> None:
    """The same lines but for rounding."""
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        for name in ("loss", "masked_loss", "score"):
            assert getattr(first, name) == pytest.approx(getattr(second, name), abs=1e-6)
        for part, twin in zip(first.parts, second.parts, strict=True):
            assert part.score == pytest.approx(twin.score, abs=1e-6)
        unmeasured: dict[str, Any] = {"loss": None, "masked_loss": None, "score": None, "parts": ()}
        assert replace(first, **unmeasured) == replace(second, **unmeasured)


# --- What the scores are ------------------------------------------------------------------------------------------


def _expected(model: Path, row: Rendered, heads: list[tuple[int, int]], whole: bool) -> list[float]:
    """Plain and masked loss: one row in one forward, the heads' query rows zero, the mean in float64."""
    losses = []
    for masked in (False, True):
        net = load_language_model(model)
        size = net.config.head_dim
        for layer, head in heads if masked else []:
            net.model.layers[layer].self_attn.q_proj.weight.data[head * size : (head + 1) * size] = 0
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([row.ids])).logits[0, :-1].double()
        all_losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[1:]), reduction="none")
        keep = torch.tensor([whole or bool(trained) for trained in row.mask[1:]])
        losses.append(all_losses[keep].mean().item())
    return losses


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("over", ["trained", "whole"])
def test_influence_is_that_of_one_row_alone(tmp_path: Path, model: Path, packing: bool, over: str) -> None:
    rows = conversations(5)
    lines, outputs, metrics = scored(tmp_path, model, rows, heads=HEADS, over=over, compute={"packing": packing})
    rendered = Renderer(load_tokenizer(model, TULU_TEMPLATE), "sft", 200)(enumerate(rows))
    for line, row in zip(lines, rendered, strict=True):
        loss, masked = _expected(model, row, HEADS, over == "whole")
        assert line.loss == pytest.approx(loss, abs=2e-5) and line.masked_loss == pytest.approx(masked, abs=2e-5)
        assert abs(masked - loss) > 0.01  # or the comparison would show nothing
        assert line.score == pytest.approx((masked - loss) / loss, abs=2e-5)
        assert (line.num_tokens, line.num_trained_tokens) == (len(row.ids), sum(row.mask))
    assert outputs.num_scored_rows == 5 and outputs.num_tokens == sum(len(row.ids) for row in rendered)
    assert metrics["score"] == pytest.approx(sum(line.score or 0 for line in lines) / 5)


def test_a_loss_of_nearly_nothing_is_clipped() -> None:
    assert influence_score(2.0, 3.0) == 0.5
    assert influence_score(0.1, 0.2) == pytest.approx(1.0)
    assert influence_score(0.001, 0.101) == pytest.approx(1.0)  # by 0.1, not by 0.001
    assert influence_score(2.0, 1.0) == -0.5


def test_parts_are_scored_as_the_row_is(tmp_path: Path, model: Path) -> None:
    """The mean of a row is the mean of its turns, each weighted by its tokens."""
    row = {"id": "0:0", "messages": [
        turn("user", "one"), turn("assistant", "cat\n\ndog cow"), turn("user", "two"), turn("assistant", "good"),
    ]}  # fmt: skip
    for by, num in (("turn", 2), ("step", 3)):
        (line,), _, _ = scored(tmp_path / by, model, [row], by=by)
        assert len(line.parts) == num and sum(part.num_tokens for part in line.parts) == line.num_trained_tokens
        for name in ("loss", "masked_loss"):
            mean = sum(getattr(part, name) * part.num_tokens for part in line.parts) / line.num_trained_tokens
            assert mean == pytest.approx(getattr(line, name), abs=1e-9)
        for part in line.parts:
            assert part.loss is not None and part.masked_loss is not None
            assert part.score == influence_score(part.loss, part.masked_loss)


def test_the_other_scorers(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = conversations(6)
    influence, _, _ = scored(tmp_path / "influence", model, rows)
    perplexity, outputs, _ = scored(tmp_path / "perplexity", model, rows, scorer="perplexity", by="turn")
    assert outputs.scorer == "perplexity"
    for own, other in zip(perplexity, influence, strict=True):
        assert own.score == own.loss == pytest.approx(other.loss, abs=1e-6) and own.masked_loss is None
        assert [part.score for part in own.parts] == [own.score]
    counts, _, _ = scored(tmp_path / "counts", model, rows, scorer="counts", by="turn")
    assert "by turn does nothing: counts measures whole rows" in caplog.text
    nothing: dict[str, Any] = {"loss": None, "masked_loss": None, "score": None, "parts": ()}
    assert counts == [replace(line, **nothing) for line in influence]


def test_a_selector_that_knows_nothing_of_the_rows_is_told(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model of random weights is surer than a guess, and wrong."""
    _, _, metrics = scored(tmp_path / "perplexity", model, conversations(6), scorer="perplexity")
    assert metrics["loss"] > 6 and "it knows nothing of such texts" in caplog.text
    caplog.clear()
    scored(tmp_path / "counts", model, conversations(6), scorer="counts")
    assert "knows nothing" not in caplog.text


@pytest.mark.parametrize("kind", ["preference", "rlvr"])
def test_the_other_kinds(tmp_path: Path, model: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = pairs(4) if kind == "preference" else prompts(4)
    lines, _, _ = scored(tmp_path, model, rows, kind=kind, by="turn", trained_turns="all")
    assert all(line.score is not None for line in lines)
    if kind == "rlvr":  # the whole prompt, whatever `over` says
        assert all(line.num_trained_tokens == 0 and not line.parts for line in lines)
        assert "prompts have no trained turn" in caplog.text
    else:
        assert [len(line.parts) for line in lines] == [2, 1, 1, 2]  # every third prompt has an answer


def test_logits_that_a_model_scales(tmp_path: Path) -> None:
    """Granite divides its logits; the head is the model's own."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    net = GraniteForCausalLM(GraniteConfig(vocab_size=50, logits_scaling=4.0, initializer_range=1.0, **sizes)).eval()
    ids = torch.randint(0, 50, (1, 9))
    with torch.no_grad():
        logits = net(input_ids=ids).logits[0, :-1]
        hidden = net.model(input_ids=ids).last_hidden_state[0, :-1]
        ours = scoring.token_losses(net, hidden, ids[0, 1:])
    assert torch.allclose(ours, torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"), atol=1e-5)
    assert "forward" not in vars(net.model)
    net.forward = lambda **given: type(net).forward(net, **given) if "inputs_embeds" in given else _doubled(net, given)
    with pytest.raises(ValueError, match="makes its logits in a way that is not known"):
        scoring.check_head(scoring.Selector(net, 32, False, 0))


HEADS_THAT_ASK: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 2, "intermediate_size": 16, "num_key_value_heads": 1},  # for what the routers said
    "GPT2": {},  # for cross-attentions
    "Mamba": {"state_size": 4},  # for a cache of its own
}


@pytest.mark.parametrize("family", HEADS_THAT_ASK)
def test_losses_of_models_whose_head_asks_the_layers_for_more(family: str) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, initializer_range=1.0, **HEADS_THAT_ASK[family])
    net = getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(config).eval()
    selector = scoring.Selector(net, 32, False, 0)
    scoring.check_head(selector)
    row = Rendered(0, "0:0", "", [5, 6, 7, 8], [0, 0, 1, 1], 0, 0.0)
    with torch.no_grad():
        logits = net(input_ids=torch.tensor([row.ids])).logits[0, 1:3]
    truth = torch.nn.functional.cross_entropy(logits, torch.tensor([7, 8]))
    assert scoring.score_rows(selector, [row], scoring.perplexity(False))[0].loss == pytest.approx(float(truth), 1e-5)


def _doubled(net: Any, given: dict[str, Any]) -> Any:
    made = type(net).forward(net, **given)
    made.logits = made.logits * 2
    return made


def test_a_model_that_cannot_be_packed_is_padded(tmp_path: Path) -> None:
    """A sliding window: no head can be masked there, but there is a loss."""
    import json

    from transformers import MistralConfig, MistralForCausalLM

    folder = build_tiny_model(tmp_path / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = MistralConfig(vocab_size=tokens, num_key_value_heads=1, sliding_window=8, **sizes)
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(folder)
    rows = conversations(4)
    lines, _, _ = scored(tmp_path / "packed", folder, rows, scorer="perplexity")
    near(scored(tmp_path / "padded", folder, rows, scorer="perplexity", compute={"packing": False})[0], lines)
    with pytest.raises(ValueError, match="sliding window"):
        scored(tmp_path / "masked", folder, rows)


def test_a_selector_with_dropout_drops_nothing_and_is_the_same_each_time(tmp_path: Path) -> None:
    """Granite's attention has dropout, so it is padded; rows of embeddings that are missing are drawn by chance."""
    import json

    from transformers import LlamaConfig, LlamaForCausalLM

    folder = build_tiny_model(tmp_path / "model")
    made = json.loads((folder / "config.json").read_text())
    made |= {"vocab_size": made["vocab_size"] - 3, "attention_dropout": 0.5, "initializer_range": 0.5}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**made)).save_pretrained(folder)
    tokenizer = load_tokenizer(folder, TULU_TEMPLATE)
    selectors = [scoring.load_selector(folder, tokenizer, "float32", ComputeSettings(device="cpu"), "cpu")] * 2
    torch.manual_seed(1)
    selectors[1] = scoring.load_selector(folder, tokenizer, "float32", ComputeSettings(device="cpu"), "cpu")
    assert not any(selector.packs or selector.model.training for selector in selectors)
    row = Rendered(0, "0:0", "", [5, 6, 7, 8], [0, 1, 1, 1], 0, 0.0)
    one, other = (scoring.score_rows(selector, [row], scoring.perplexity(False)) for selector in selectors)
    assert one == other
    assert torch.equal(*(selector.model.get_input_embeddings().weight for selector in selectors))


def test_logits_exist_chunk_by_chunk(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = conversations(6)
    whole, _, _ = scored(tmp_path / "whole", model, rows)
    monkeypatch.setattr(scoring, "CPU_CHUNK_LOGITS", 3 * 400)
    monkeypatch.setattr(scoring, "_CHUNK_ROWS", 1)
    sizes = []
    cross_entropy = torch.nn.functional.cross_entropy

    def seen(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(logits.numel())
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", seen)
    near(scored(tmp_path / "chunks", model, rows)[0], whole)
    assert max(sizes) <= 7 * 400 and len(sizes) > 30  # but for the check of the head: 7 positions


# --- What changes nothing -----------------------------------------------------------------------------------------


def test_batches_by_hand() -> None:
    assert list(batches_of([3, 9, 4, 1], 8)) == [[1], [2, 0], [3]]
    assert list(batches_of([3, 9, 4, 1], 8, is_sorted=False)) == [[0], [1], [2, 3]]
    assert list(batches_of([], 8)) == []


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_every_row_once(lengths: list[int], max_tokens: int) -> None:
    made = list(batches_of(lengths, max_tokens))
    assert sorted(place for batch in made for place in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or max(lengths[place] for place in batch) * len(batch) <= max_tokens
    longest = [lengths[place] for batch in made for place in batch]
    assert longest == sorted(longest, reverse=True)


def test_batch_size_layout_order_and_parts_change_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = conversations(24)
    lines, _, _ = scored(tmp_path / "whole", model, rows, heads=HEADS, by="step")
    for number, compute in enumerate(
        [{"per_device_eval_batch_size": 1}, {"per_device_eval_batch_size": 64}, {"packing": False}]
    ):
        near(scored(tmp_path / f"{number}", model, rows, heads=HEADS, by="step", compute=compute)[0], lines)
    monkeypatch.setattr(scores_stage, "PART_ROWS", 5)
    near(scored(tmp_path / "parts", model, rows, heads=HEADS, by="step")[0], lines)
    backwards, _, _ = scored(tmp_path / "backwards", model, rows[::-1], heads=HEADS, by="step")
    near([replace(line, row=23 - line.row) for line in backwards[::-1]], lines)
    # A row of a mixture that is repeated has one score.
    twice, _, _ = scored(tmp_path / "twice", model, [rows[3], rows[3] | {"id": "0:3#2"}], heads=HEADS)
    assert twice[0].digest == twice[1].digest == lines[3].digest
    assert twice[0].score == twice[1].score == pytest.approx(lines[3].score, abs=1e-6)


#: Scores in a process of its own, which kills itself in its fifth batch of losses: the middle of the second part.
KILLED = """
import os, signal, sys
from pathlib import Path
from smoltulu.tasks.selection import scores_stage, scoring
from tests.tasks.selection.scored import conversations, scored
scores_stage.PART_ROWS, scoring.ROW_TOKENS = 8, 32
score_rows, calls = scoring.influence, []
def influence(*args):
    measure = score_rows(*args)
    def counted(selector, batch):
        calls.append(len(batch.rows))
        if sum(calls) > 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(selector, batch)
    return counted
scoring.influence = influence
scored(Path(sys.argv[1]), Path(sys.argv[2]), conversations(30), compute={"per_device_eval_batch_size": 2})
"""


def test_a_process_that_is_killed_in_the_middle_of_a_part(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL: no handler runs, nothing is tidied up."""
    rows, compute = conversations(30), {"per_device_eval_batch_size": 2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    scored(whole, model, rows, compute=compute)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(broken), str(model)], cwd=ROOT, env=dict(os.environ), capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.parent.name for path in sorted(broken.glob("work/parts/*/.complete"))] == ["000000"]
    made: list[int] = []
    monkeypatch.setattr(
        "smoltulu.tasks.sampled.parts.remove_tree", lambda place: made.append(int(place.name))
    )  # called for every part that is made
    scored(broken, model, rows, compute=compute)
    assert made == [1, 2, 3]
    files = [folder / "out" / "scores.parquet" for folder in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_damaged_part_is_made_again_and_parts_of_anything_else_do_not_count(tmp_path: Path, model: Path) -> None:
    rows = conversations(20)
    scored(tmp_path, model, rows)
    before = (tmp_path / "out" / "scores.parquet").read_bytes()
    (part,) = (tmp_path / "work" / "parts" / "000001").glob("*.parquet")
    damaged = bytearray(part.read_bytes())
    damaged[60] ^= 255
    part.write_bytes(damaged)
    scored(tmp_path, model, rows)
    assert (tmp_path / "out" / "scores.parquet").read_bytes() == before
    stamp = part.stat().st_mtime_ns
    scored(tmp_path, model, rows)
    assert part.stat().st_mtime_ns == stamp  # all there: nothing is made
    for change in ({"heads": [(0, 0)]}, {"over": "whole"}, {"max_length": 190}, {"by": "turn"}):
        scored(tmp_path, model, rows, **change)
        assert part.stat().st_mtime_ns != stamp, change
        stamp = part.stat().st_mtime_ns
    scored(tmp_path, model, rows, compute={"per_device_eval_batch_size": 1}, by="turn")
    assert part.stat().st_mtime_ns == stamp  # machinery


def test_the_next_part_is_tokenised_while_one_is_scored(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    render, score_rows, waited = Renderer.__call__, scoring.score_rows, []

    def rendering(self: Renderer, rows: Any) -> list[Rendered]:
        rows = list(rows)
        if rows[0][0] == 8:
            begun.set()
        return render(self, rows)

    def scoring_rows(selector: Any, rows: Any, measure: Any) -> Any:
        if rows:
            waited.append(begun.wait(20))
        return score_rows(selector, rows, measure)

    monkeypatch.setattr(Renderer, "__call__", rendering)
    monkeypatch.setattr(scoring, "score_rows", scoring_rows)
    scored(tmp_path, model, conversations(16))
    assert waited == [True, True]


@pytest.mark.slow
def test_two_processes_write_the_same_lines(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in ((scores_stage, "PART_ROWS", 256), (scoring, "ROW_TOKENS", 512)):
        monkeypatch.setattr(module, name, value)  # what a process of its own has
    lines, _, _ = scored(tmp_path, model, conversations(300, most=10))
    config = SelectionScoresConfig(
        kind="sft", scorer="attention_influence", over="trained", by="row", max_length=200, mask="uniform"
    )
    inputs = SelectionScoresInputs(
        model=str(model), tokenizer=str(model), dataset=str(tmp_path / "rows.parquet"),
        heads=str(tmp_path / "heads.json"), chat_template=TULU_TEMPLATE,
    )  # fmt: skip
    spec = Spec(stage="selection_scores", version=1, config=scientific(config), inputs={}, externals={})
    compute = ComputeSettings(device="cpu", num_threads=1, num_processes=2, launcher="warm")
    work = tmp_path / "two"
    (work / "output").mkdir(parents=True)
    import logging

    job = Job("influence-sft-0", STAGES["selection_scores"], config, compute, spec, inputs)
    run_child(job, work, work / "output", logging.getLogger())
    assert list(stored_scores(work / "output" / "scores.parquet")) == lines


# --- Rows without a score, and what is refused --------------------------------------------------------------------


def test_rows_without_a_score_are_listed_and_kept_out(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [conversation(0, "cat, dog"), conversation(1, "cat " * 300), conversation(2, " "), conversation(3, "dog")]
    lines, outputs, _ = scored(tmp_path, model, rows)
    assert [line.problem for line in lines] == ["", scores_file.TOO_LONG, scores_file.EMPTY_ANSWER, ""]
    assert lines[1].num_tokens > 300 and lines[1].score is lines[1].loss is None
    assert (outputs.num_scored_rows, outputs.num_unscored_rows) == (2, 2)
    assert "2 of 4 rows have no score: 1 empty answer (rows 0:2); 1 too long (rows 0:1)" in caplog.text
    alone, _, _ = scored(tmp_path / "alone", model, [rows[0], rows[3]])
    near([replace(line, row=number) for number, line in enumerate([lines[0], lines[3]])], alone)


def _with_nan(folder: Path, word: str) -> Path:
    """A model that gives NaN for every row with a token."""
    from safetensors.torch import load_file, save_file

    strong_model(folder)
    (token,) = build_tokenizer()(word)["input_ids"]
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    weights["lm_head.weight"] = torch.nan_to_num(weights["model.embed_tokens.weight"]).clone()  # else all logits are
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("scorer", ["attention_influence", "perplexity", "rds_plus"])
def test_a_row_of_nan_spoils_no_other(tmp_path: Path, scorer: str, packing: bool) -> None:
    import json

    model = _with_nan(tmp_path / "model", "%")
    settings = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(settings))
    rows = conversations(5, most=8)
    rows[2]["messages"][1]["content"] = "cat % dog"
    targets = write_rows(tmp_path / "targets.parquet", conversations(2, seed=1))
    given: dict[str, Any] = {"scorer": scorer, "targets": targets, "compute": {"packing": packing}}
    lines, outputs, _ = scored(tmp_path / "all", model, rows, **given)
    assert [line.problem for line in lines] == ["", "", scores_file.NO_NUMBER, "", ""]
    assert lines[2].loss is lines[2].score is None and outputs.num_unscored_rows == 1
    others, _, _ = scored(tmp_path / "others", model, rows[:2] + rows[3:], **given)
    near([replace(line, row=number) for number, line in enumerate(lines[:2] + lines[3:])], others)
    with pytest.raises(ValueError, match=r"none of the 1 rows has a score: 1 loss is no number \(rows 0:2\).*broken"):
        scored(tmp_path / "one", model, rows[2:3], **given)
    if scorer == "rds_plus":
        with pytest.raises(ValueError, match=r"no number for targets 0:2; look at them"):
            scored(tmp_path / "target", model, rows[:2], **given | {"targets": write_rows(targets, rows[2:3])})


def test_no_row_has_a_score(tmp_path: Path, model: Path) -> None:
    rows = [conversation(0, "cat " * 300), conversation(1, "dog " * 300), conversation(2, "")]
    with pytest.raises(ValueError, match=r"none of the 3 rows has a score: 1 empty answer \(rows 0:2\); 2 too long"):
        scored(tmp_path, model, rows)
    with pytest.raises(ValueError, match=r"Raise selection.max_length \(200 tokens"):
        scored(tmp_path, model, rows, scorer="counts")
    with pytest.raises(ValueError, match="has no row to score"):
        scored(tmp_path / "none", model, [])


def test_rows_beyond_the_positions_of_the_model(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [conversation(0, "cat, dog"), conversation(1, "cat " * 250)]
    lines, _, _ = scored(tmp_path, model, rows, max_length=1000)
    assert [line.problem for line in lines] == ["", scores_file.TOO_LONG] and lines[1].num_tokens < 1000
    assert "selection.max_length 1,000 is more than the 256 positions of the selector model" in caplog.text


def test_positions_under_another_name(tmp_path: Path) -> None:
    """GPT-2 has n_positions. A row beyond them is an index error in the middle of the run."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = build_tiny_model(tmp_path / "model")
    rows = conversations(6)
    room = sorted(line.num_tokens for line in scored(tmp_path / "counts", folder, rows, scorer="counts")[0])[3]
    sizes = {"n_positions": room, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(build_tokenizer()), **sizes)).save_pretrained(folder)
    lines, _, _ = scored(tmp_path / "scores", folder, rows, scorer="perplexity")
    assert {line.problem: line.num_tokens > room for line in lines} == {"": False, "too long": True}


def test_a_selector_of_another_tokenizer_is_refused(tmp_path: Path, model: Path) -> None:
    rows = conversations(3)
    twin = strong_model(tmp_path / "twin", seed=1)
    lines, _, _ = scored(tmp_path / "same", twin, rows, base=model)
    assert all(line.score is not None for line in lines)
    other = build_tiny_model(tmp_path / "other")
    build_tokenizer(vocab_size=380).save_pretrained(other)
    with pytest.raises(ValueError, match=r"selection\.model has another tokenizer than the base model"):
        scored(tmp_path / "refused", other, rows, base=model)
    with pytest.raises(ValueError, match=r"cannot render rows for the selector model: it refuses"):
        scored(tmp_path / "template", model, rows, template=TULU_TEMPLATE + "{{ raise_exception('never') }}")


def test_heads_of_another_model_are_refused(tmp_path: Path, model: Path) -> None:
    rows = conversations(2)
    other = strong_model(tmp_path / "other", seed=1)
    heads = write_heads(tmp_path / "heads.json", other, HEADS)
    with pytest.raises(ValueError, match="the heads are of another model"):
        scored(tmp_path / "digest", model, rows, heads=heads)
    with pytest.raises(ValueError, match=r"heads \[\(7, 0\)\] .* are not of this model"):
        scored(tmp_path / "layer", model, rows, heads=[(7, 0)])
    with pytest.raises(ValueError, match="no head is chosen"):
        scored(tmp_path / "none", model, rows, heads=[])
    heads.write_text("{}")
    with pytest.raises(ValueError, match="not the heads file"):
        scored(tmp_path / "empty", model, rows, heads=heads)


def test_texts_are_no_rows_to_select(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ValueError, match="texts are no conversations"):
        rows = write_rows(tmp_path / "rows.parquet", conversations(1))
        scored(tmp_path, model, rows, kind="texts", scorer="counts")
