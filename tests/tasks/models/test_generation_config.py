"""What a base says of generation, in generation_config.json or config.json, changes no score, rollout or file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.evaluation import EvaluationInputs, EvaluationStageConfig
from smoltulu.schemas.rlvr import GRPOSettings
from smoltulu.tasks.evaluation.samples import read_samples
from smoltulu.tasks.evaluation.stage import evaluate
from smoltulu.tasks.models.folders import check_model_folder, load_language_model
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.training.rlvr import train_rlvr
from tests.rows_file import write_rows
from tests.small_runs import conversations, run, training_inputs, turn
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model

#: Each of them changes what an untrained model writes.
HOSTILE: dict[str, Any] = {
    "do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.01, "typical_p": 0.2, "min_p": 0.5,
    "epsilon_cutoff": 0.3, "eta_cutoff": 0.3, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0, "suppress_tokens": list(range(2, 200)), "begin_suppress_tokens": [0, 3],
    "bad_words_ids": [[5], [300]], "sequence_bias": [[[7], 50.0]], "min_new_tokens": 6, "min_length": 250,
    "max_new_tokens": 2, "max_length": 3, "max_time": 0.0001, "stop_strings": ["e"], "num_beams": 2,
    "num_return_sequences": 2, "length_penalty": -5.0, "early_stopping": True, "forced_bos_token_id": 9,
    "forced_eos_token_id": 11, "exponential_decay_length_penalty": [1, 3.0], "guidance_scale": 3.0,
    "renormalize_logits": True, "remove_invalid_values": True, "use_cache": False, "cache_implementation": "static",
    "return_dict_in_generate": True, "output_scores": True, "prompt_lookup_num_tokens": 2, "penalty_alpha": 0.9,
    "decoder_start_token_id": 4, "trust_remote_code": True, "custom_generate": "somebody/else",
    "watermarking_config": {"bias": 9.0}, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights: without a generation config, with a hostile one, and with the same in config.json."""
    base = build_tiny_model(tmp_path_factory.mktemp("model") / "plain")
    (base / "generation_config.json").unlink()
    file, config = (Path(shutil.copytree(base, base.parent / name)) for name in ("file", "config"))
    (file / "generation_config.json").write_text(json.dumps(HOSTILE))
    plain = json.loads((base / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(HOSTILE | plain))
    return {"plain": base, "file": file, "config": config}


def context(folder: Path) -> StageContext:
    (folder / "out").mkdir(parents=True)
    (folder / "work" / "checkpoints").mkdir(parents=True)
    compute = ComputeSettings(device="cpu", per_device_train_batch_size=4, logging_steps=1)
    return StageContext(folder / "out", folder / "work", compute, lambda *args, **kwargs: None)


@pytest.mark.parametrize("name", ["file", "config"])
def test_only_ids_are_taken(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    model = load_language_model(folders[name])
    said = model.generation_config.to_diff_dict()
    said.pop("transformers_version")
    assert said == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0 if name == "file" else 1}
    model.save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "generation_config.json").read_text()).keys() & (
        HOSTILE.keys() - {"pad_token_id"}
    )
    assert model.config._get_generation_parameters() == {}


def test_several_ends_of_a_turn_are_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["file"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "bos_token_id": None}))
    generation = load_language_model(tmp_path).generation_config
    assert (generation.eos_token_id, generation.bos_token_id) == ([0, 5], 0)
    for odd in ({"eos_token_id": "text"}, {"eos_token_id": []}, {"eos_token_id": [True]}, {"eos_token_id": 1.5}):
        (tmp_path / "generation_config.json").write_text(json.dumps(odd))
        assert load_language_model(tmp_path).generation_config.eos_token_id == 0


@pytest.mark.parametrize("text", ["{", "[1]", "null", "\udcff"])
def test_a_file_that_is_no_object_is_refused(folders: dict[str, Path], tmp_path: Path, text: str) -> None:
    shutil.copytree(folders["plain"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"generation_config\.json is not"):
        check_model_folder(tmp_path)


def answers(model: Path, folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Scores, and what the model wrote, of an lm-eval task and of sampled prompts."""
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"#### {2 * n}"} for n in range(6)]
    folder.mkdir()
    (folder / "arithmetic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [
        {"id": str(n), "prompt": [turn("user", f"What is {n}?")], "verifier": "gsm8k", "ground_truth": str(n)}
        for n in range(4)
    ]
    source = {"path": str(folder / "arithmetic.jsonl"), "format": "text"}
    settings = {
        "max_length": 200,
        "tasks": [
            {
                "name": "tiny_arithmetic",
                "metric": "exact_match,strict-match",
                "files": {"test": source},
                "num_fewshot": 0,
            }
        ],
        "sampled": {"num_prompts": 4, "num_samples_per_prompt": 2, "max_new_tokens": 12, "temperature": 1.0},
    }
    config = EvaluationStageConfig(subject="sft", kind="language_model", settings=settings)
    inputs = EvaluationInputs(
        model=str(model), chat_template=TULU_TEMPLATE, verified_eval=str(write_rows(folder / "rows.parquet", prompts))
    )
    outputs, _ = evaluate(config, inputs, context(folder / "stage"))
    return outputs.scores, list(read_samples(folder / "stage" / "out" / outputs.samples_file))


def test_scores_are_those_without_it(folders: dict[str, Path], tmp_path: Path) -> None:
    plain, file, config = (answers(folders[name], tmp_path / name) for name in folders)
    assert file == plain and config == plain
    assert any(len(row["completion"]) > 20 for row in plain[1])


def rollouts(model: Path, folder: Path) -> list[dict[str, float]]:
    """The history of two steps of RLVR, each of which samples anew."""
    settings = GRPOSettings(
        learning_rate=1e-2, effective_batch_size=8, num_generations=4, num_steps=2, max_prompt_length=100,
        max_completion_length=12, precision="float32", beta=0.05,
        gate={"num_prompts": 2, "max_new_tokens": 8, "min_stopped_share": 0},
    )  # fmt: skip
    truth = json.dumps({"kind": "word_count", "count": 2})
    rows = [
        {"id": f"0:{i}", "prompt": [turn("user", f"What is {i}?")], "verifier": "constraint", "ground_truth": truth}
        for i in range(8)
    ]
    where = context(folder)
    inputs = training_inputs("rlvr", folder / "before", model, rows, settings, where.compute)
    _, metrics = train_rlvr(settings, inputs, where)
    history = [json.loads(line) for line in (folder / "out" / "logs" / "history.jsonl").open()]
    ours = json.loads((folder / "out" / "model" / "generation_config.json").read_text())
    assert ours.keys() <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    gate = {name: value for name, value in metrics.items() if name.startswith("gate")}
    timed = ("tokens_per_second", "step_time", "peak_memory_gb")
    return [gate, *({name: value for name, value in row.items() if name not in timed} for row in history)]


def test_rollouts_and_gate_are_those_without_it(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in folders:
        (tmp_path / name / "before").mkdir(parents=True)
    plain, file, config = (rollouts(folders[name], tmp_path / name) for name in folders)
    assert file == plain and config == plain
    assert plain[0]["gate_mean_length"] > 2 and plain[1]["completions/max_length"] == 12


def test_the_gate_of_sft_is_the_one_without_it(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = {"max_steps": 1, "gate": {"num_prompts": 3, "max_new_tokens": 9, "min_stopped_share": 0}}
    plain, file = (run("sft", tmp_path / name, folders[name], conversations(4), settings) for name in ("plain", "file"))
    names = ("gate_mean_length", "gate_stopped_share", "loss")
    assert [plain.metrics[name] for name in names] == [file.metrics[name] for name in names]
