"""`smoltulu compare`, as a user types it: artifacts, models, stages of a run, folders of lm-eval."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from smoltulu.artifacts.manifests import Ref
from smoltulu.tasks.comparison.lm_eval_files import read_folder
from tests.flows.cli.test_store_cli import call, words
from tests.hand_store import HandStore
from tests.tiny_model import build_tiny_model

RIGHT = {"sft": 10, "dpo": 30}


@pytest.fixture
def store(tmp_path: Path) -> HandStore:
    return HandStore(tmp_path / "store")


def evaluate(store: HandStore, model: Ref, num_right: int, **settings: Any) -> Ref:
    """40 items, the first `num_right` of them right."""
    rows = [
        {"task": "gsm8k", "id": i, "filter": "strict", "doc_hash": f"d{i}", "prompt_hash": "p", "target_hash": f"t{i}",
         "target": f"{i}", "metrics": {"exact_match": float(i < num_right)}, "completion": f"{model.stage} says {i}"}
        for i in range(40)
    ]  # fmt: skip
    score = {
        "task": "gsm8k", "metric": "exact_match,strict", "value": num_right / 40, "stderr": 0.01, "num_samples": 40,
        "harness": "lm-eval 0.4.13", "task_version": "3.0", "template_digest": "t", "num_fewshot": 0,
    }  # fmt: skip
    return store.make(
        "evaluation", f"evaluation-{model.stage}", {"model": model},
        outputs={"subject": model.stage, "scores": [score], "samples_file": "samples.jsonl"},
        files={"samples.jsonl": "".join(json.dumps(row) + "\n" for row in rows)},
        kind="language_model", settings={"precision": "float32"} | settings,
    )  # fmt: skip


@pytest.fixture
def evaluated(store: HandStore) -> dict[str, Ref]:
    made: dict[str, Ref] = {}
    for stage, num_right in RIGHT.items():
        made[stage] = store.make(stage, stage)
        made[f"evaluation-{stage}"] = evaluate(store, made[stage], num_right)
    store.run("brave-fox", made)
    return made


def test_two_models_by_stage_of_a_run_by_key_and_by_evaluation(store: HandStore, evaluated: dict[str, Ref]) -> None:
    def compared(*what: str) -> list[dict[str, str]]:
        made: list[dict[str, str]] = json.loads(call(store, "compare", *what, "--json").stdout)
        return made

    [row] = compared("brave-fox:sft", "brave-fox:dpo")
    assert row == {
        "task": "gsm8k", "metric": "exact_match,strict", "before": "0.2500", "after": "0.7500",
        # One more each way: 20 / 42, and 2.023 times the root of (40^2 * 0.25 / 39 + 2 + 2 * 40 * 0.25 / 42) / 42^2.
        "difference": "+0.5000", "interval": "+0.3043 to +0.6480", "items": "40",
        "lost, gained": "0, 20", "p": f"{2 / 2**20:.3g}", "p (Holm)": f"{2 / 2**20:.3g}",
        "visible": "0.3132", "verdict": "gain",
    }  # fmt: skip
    for names in (("sft", "dpo"), ("evaluation-sft", "evaluation-dpo")):
        assert compared(*(evaluated[name].key for name in names)) == [row]
    assert compared("brave-fox:dpo", "brave-fox:sft")[0]["verdict"] == "drop"
    assert compared("brave-fox:dpo", "brave-fox:dpo")[0]["verdict"] == "same"
    shown = call(store, "compare", "brave-fox:sft", "brave-fox:dpo", "--flips", "2").output
    assert "gsm8k: 20 items changed, 2 of them" in shown
    assert "item 10: 0 -> 1; target '10'\n    before 'sft says 10'\n    after  'dpo says 10'" in shown
    assert "gain" in words(shown)


def test_what_cannot_be_compared_is_refused_with_what_can(store: HandStore, evaluated: dict[str, Ref]) -> None:
    other = evaluate(store, evaluated["sft"], 5, precision="bfloat16")
    said = call(store, "compare", evaluated["evaluation-dpo"].key, other.key, code=1).output
    assert (
        "measured with another precision: float32 -> bfloat16; evaluate both with one (evaluation.precision"
        in words(said)
    )
    said = call(store, "compare", evaluated["sft"].key, "brave-fox:dpo", code=1).output
    assert "was evaluated 2 times: evaluation/" in said
    said = call(store, "compare", "brave-fox", "brave-fox:dpo", code=1).output
    assert "brave-fox is a whole run; name one of its models: brave-fox:sft, brave-fox:dpo" in words(said)
    said = call(store, "compare", "brave-fox:rlvr", "brave-fox:dpo", code=1).output
    assert "brave-fox has no evaluation of 'rlvr'; name one of its models: brave-fox:sft, brave-fox:dpo" in words(said)
    alone = store.make("sft", "never evaluated")
    said = call(store, "compare", alone.key, "brave-fox:dpo", code=1).output
    assert "(sft) was not evaluated; run the recipe up to evaluation" in words(said)
    assert "did you mean 'brave-fox'" in call(store, "compare", "brave-fux:dpo", "brave-fox:dpo", code=1).output


def test_no_heavy_import(store: HandStore, evaluated: dict[str, Ref]) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from smoltulu.flows.cli.main import app\n"
        f"what = ['brave-fox:sft', 'brave-fox:dpo', '--store', {str(store.root)!r}]\n"
        "made = CliRunner().invoke(app, ['compare', *what])\n"
        "assert made.exit_code == 0, made.output\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'lm_eval', 'prefect'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# --- Folders of lm-eval ---------------------------------------------------------------------------------------------


def test_a_folder_that_is_none_is_refused(store: HandStore, tmp_path: Path, evaluated: dict[str, Ref]) -> None:
    (tmp_path / "empty").mkdir()
    said = call(store, "compare", str(tmp_path / "empty"), "brave-fox:sft", code=1).output
    assert "is no evaluation: it has no results_*.json of `lm-eval run --log_samples" in words(said)
    (tmp_path / "empty" / "results_2026.json").write_text("{}")
    said = call(store, "compare", str(tmp_path / "empty"), "brave-fox:sft", code=1).output
    assert "has no samples beside it; run lm-eval again with --log_samples" in words(said)
    (tmp_path / "empty" / "samples_a_2026.jsonl").write_text('{"doc_id": 0}\n')
    said = call(store, "compare", str(tmp_path / "empty"), "brave-fox:sft", code=1).output
    assert "samples_a_2026.jsonl is not as lm-eval 0.4.13 writes samples: KeyError('metrics')" in words(said)


def lm_eval_folder(folder: Path, results: Any = None, **changes: Any) -> str:
    """As lm-eval 0.4.13 writes it: four items of one task."""
    folder.mkdir()
    whole = {
        "results": {"t": {"acc,none": 0.5}}, "n-samples": {"t": {"effective": 4}}, "n-shot": {"t": 0},
        "versions": {"t": 1}, "config": {"model_dtype": "torch.float32"}, "lm_eval_version": "0.4.13",
    }  # fmt: skip
    rows = [
        {"doc_id": i, "filter": "none", "metrics": ["acc"], "acc": float(i < 2), "resps": [["x"]], "target": "x",
         "doc_hash": f"d{i}", "prompt_hash": "p", "target_hash": "t"} | changes
        for i in range(4)
    ]  # fmt: skip
    (folder / "results_2026.json").write_text(json.dumps(whole if results is None else whole | results))
    (folder / "samples_t_2026.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_folders_of_another_precision_are_not_compared(store: HandStore, tmp_path: Path) -> None:
    one = lm_eval_folder(tmp_path / "one")
    other = lm_eval_folder(tmp_path / "other", {"config": {"model_dtype": "torch.bfloat16"}})
    assert "same" in call(store, "compare", one, one).output
    said = words(call(store, "compare", one, other, code=1).output)
    assert "measured with another precision: float32 -> bfloat16" in said and "lm-eval: dtype in --model_args" in said


@pytest.mark.parametrize(("changes", "text", "said"), [
    ({"resps": []}, None, "is not as lm-eval 0.4.13 writes samples: IndexError"),
    ({}, "[]", "results_2026.json is no results file of lm-eval: no object; run lm-eval again"),
    ({}, '{"a', "results_2026.json is no results file of lm-eval: Unterminated string"),
    ({}, '{"results": {"t": {"acc,none": 1}}, "n-samples": {"t": {"effective": 4}}, "n-shot": null}',
     "is not as lm-eval 0.4.13 writes samples: AttributeError"),
])  # fmt: skip
def test_damaged_folders_are_refused_without_a_traceback(
    store: HandStore, tmp_path: Path, changes: dict[str, Any], text: str | None, said: str
) -> None:
    one = lm_eval_folder(tmp_path / "one", **changes)
    if text is not None:
        (tmp_path / "one" / "results_2026.json").write_text(text)
    assert said in words(call(store, "compare", one, one, code=1).output)


def test_folders_of_other_generation_settings_are_not_compared(store: HandStore, tmp_path: Path) -> None:
    """Greedy and sampled answers to the same prompts were once compared."""

    def configs(temperature: float, **model: Any) -> dict[str, Any]:
        task = {"output_type": "generate_until", "generation_kwargs": {"until": [], "temperature": temperature}}
        return {"configs": {"t": task}, "config": {"model_dtype": "torch.float32", "model": "hf", "model_args": model}}

    greedy = lm_eval_folder(tmp_path / "greedy", configs(0.0))
    sampled = lm_eval_folder(tmp_path / "sampled", configs(1.0))
    [row] = json.loads(call(store, "compare", greedy, sampled, "--json").stdout)
    assert row["verdict"] == (
        'not comparable: another generation settings: {"temperature": 0.0, "until": []} -> '
        '{"temperature": 1.0, "until": []}'
    )
    bos = lm_eval_folder(tmp_path / "bos", configs(0.0, pretrained="b", add_bos_token=True))
    other = lm_eval_folder(tmp_path / "other", configs(0.0, pretrained="a", batch_size=8))
    [row] = json.loads(call(store, "compare", greedy, bos, "--json").stdout)
    assert row["verdict"] == 'not comparable: another model settings: None -> {"add_bos_token": "True"}'
    assert json.loads(call(store, "compare", greedy, other, "--json").stdout)[0]["verdict"] == "same"
    vllm = lm_eval_folder(tmp_path / "vllm", {"config": {"model_dtype": "torch.float32", "model": "vllm"}})
    said = words(call(store, "compare", greedy, vllm, code=1).output)
    assert "measured with another backend: transformers -> vllm; evaluate both with one (lm-eval: --model hf)" in said


def test_groups_and_instructions_of_folders_are_compared(store: HandStore, tmp_path: Path) -> None:
    """A group of six subsets whose means count alike, a group of groups, and a metric of several parts an item."""
    subsets = [f"s{i}" for i in range(6)]

    def folder(name: str, num_right: int) -> str:
        made = tmp_path / name
        made.mkdir()
        sizes = {subset: 4 + 2 * number for number, subset in enumerate(subsets)}
        for subset, size in sizes.items():
            rows = [
                {"doc_id": i, "filter": "none", "metrics": ["acc", "parts"], "acc": float(i < num_right),
                 "parts": [i < num_right, True], "resps": [["x"]], "target": "x",
                 "doc_hash": f"{subset}{i}", "prompt_hash": "p", "target_hash": "t"}
                for i in range(size)
            ]  # fmt: skip
            (made / f"samples_{subset}_2026.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        means = {subset: min(num_right, size) / size for subset, size in sizes.items()}
        macro = sum(means.values()) / 6
        results = {
            "results": {one: {"acc,none": mean, "parts,none": (mean + 1) / 2} for one, mean in means.items()},
            "groups": {"bbh": {"acc,none": macro, "alias": "bbh"}, "all": {"acc,none": macro}},
            "group_subtasks": {"all": ["bbh"], "bbh": subsets}, "n-shot": dict.fromkeys([*subsets, "bbh", "all"], 0),
            "versions": dict.fromkeys([*subsets, "bbh"], 1),
            "n-samples": {s: {"effective": n} for s, n in sizes.items()},
            "config": {"model_dtype": "torch.float32", "model": "hf"}, "lm_eval_version": "0.4.13",
            "higher_is_better": {one: {"acc": True} for one in [*subsets, "bbh"]},
        }  # fmt: skip
        (made / "results_2026.json").write_text(json.dumps(results))
        return str(made)

    one, two = folder("one", 4), folder("two", 3)
    rows = {row["task"]: row for row in json.loads(call(store, "compare", one, two, "--json").stdout)}
    assert set(rows) == {f"{name} acc,none" for name in (*subsets, "bbh", "all")} | {f"{s} parts,none" for s in subsets}
    # One of 4, 6, 8, 10, 12, 14 lost: the mean of the shares.
    lost = sum(1 / size for size in (4, 6, 8, 10, 12, 14)) / 6
    assert rows["bbh acc,none"]["difference"] == rows["all acc,none"]["difference"] == f"{-lost:+.4f}"
    assert (rows["bbh acc,none"]["items"], rows["bbh acc,none"]["lost, gained"]) == ("54", "6, 0")
    assert rows["bbh acc,none"]["p"] == f"{2 / 2**6:.3g}"
    assert rows["s0 parts,none"]["difference"] == "-0.1250" and rows["s0 parts,none"]["lost, gained"] == "1, 0"
    shown = words(call(store, "compare", one, two).output)
    assert f"bbh acc,none: of other members like its 6 (each one value): {-lost:+.4f} [" in shown


def test_bits_per_byte_that_rise_are_a_drop(store: HandStore, tmp_path: Path) -> None:
    def folder(name: str, bits: float) -> str:
        values = {"metrics": ["bits_per_byte"], "bits_per_byte": bits}
        whole = {"results": {"t": {"bits_per_byte,none": bits}}, "n-samples": {"t": {"effective": 12}}}
        made = lm_eval_folder(tmp_path / name, whole, **values)
        rows = (tmp_path / name / "samples_t_2026.jsonl").read_text().splitlines()
        many = [json.loads(rows[0]) | {"doc_id": i, "doc_hash": f"d{i}"} for i in range(12)]
        (tmp_path / name / "samples_t_2026.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
        return made

    low, high = folder("low", 1.0), folder("high", 1.25)
    [row] = json.loads(call(store, "compare", low, high, "--json").stdout)
    assert (row["difference"], row["lost, gained"], row["verdict"]) == ("+0.2500", "12, 0", "drop")
    assert "is better when it is lower" in call(store, "compare", low, high).output
    assert (
        json.loads(call(store, "compare", high, low, "--metric", "bits_per_byte", "--json").stdout)[0]["verdict"]
        == "gain"
    )
    said = call(store, "compare", low, high, "--metric", "acc", code=1).output
    assert "neither evaluation has a task with the metric 'acc'; leave --metric out" in words(said)


@pytest.mark.slow
def test_what_lm_eval_writes_is_compared(store: HandStore, tmp_path: Path) -> None:
    """Its own command line, twice, on two models: the items of both metrics, their means its scores."""
    rows = [{"question": f"What is {i}?", "choices": ["so", "good"], "label": i % 2} for i in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    task = {
        "task": "pick", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "label",
        "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    (tmp_path / "tasks" / "pick.yaml").write_text(yaml.safe_dump(task))
    commands = []
    for seed in (0, 1):
        model = build_tiny_model(tmp_path / f"model-{seed}", seed=seed)
        commands.append(
            ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}", "--tasks", "pick",
             "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / f"out-{seed}"),
             "--log_samples", "--device", "cpu"]
        )  # fmt: skip
    code = "import json, sys\nfrom lm_eval.__main__ import cli_evaluate\n"
    code += "for sys.argv in json.loads(sys.argv[1]):\n    cli_evaluate()"
    subprocess.run([sys.executable, "-c", code, json.dumps(commands)], check=True, capture_output=True)
    sides = [read_folder(tmp_path / f"out-{seed}") for seed in (0, 1)]
    for side in sides:
        assert side.keys() == {"pick acc,none", "pick acc_norm,none"}
        for one in side.values():
            values = [item.value for item in one.items.values()]
            assert len(values) == 12 and sum(values) / 12 == pytest.approx(one.score.value)
    shown = json.loads(call(store, "compare", *(str(tmp_path / f"out-{seed}") for seed in (0, 1)), "--json").stdout)
    assert [row["task"] for row in shown] == ["pick acc,none", "pick acc_norm,none"]
    assert all(row["items"] == "12" and row["verdict"] != "not comparable" for row in shown)
