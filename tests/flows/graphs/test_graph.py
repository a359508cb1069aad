"""The graph of a recipe: which stages, and which key changes with which field."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.nodes import Binding
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.planning.plan import plan
from smoltulu.flows.recipe import RecipeError, check_evaluation, load_recipe
from smoltulu.recipes import CHAT_TEMPLATES
from smoltulu.tasks.models.chat_template import check_chat_template, load_chat_template
from tests import ROOT
from tests.tiny_model import build_tiny_model

DPO_AND_AFTER = {
    "dpo", "evaluation-dpo", "evaluation-dpo-implicit-reward", "pass-rates", "rlvr", "evaluation-rlvr", "publish",
}  # fmt: skip
AUDIT_AND_AFTER = {"verifier-audit", "rlvr", "evaluation-rlvr", "publish"}


def keys(overrides: dict[str, Any] | None = None, until: str | None = None) -> dict[str, str]:
    graph = Graph(load_recipe("tiny", overrides), until)
    return {name: graph.key(name) for name in graph.nodes}


def changed(overrides: dict[str, Any]) -> set[str]:
    before, after = keys(), keys(overrides)
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_every_stage_of_tiny_is_there() -> None:
    assert list(keys()) == [
        "world",
        "dataset-sft", "benchmark-index", "contamination-sft",
        "dataset-preference", "contamination-preference",
        "dataset-rlvr", "contamination-rlvr",
        "dataset-preference-eval", "dataset-verified-eval",
        "base-model", "evaluation-base-model",
        "preflight-sft", "preflight-reward-model", "preflight-dpo", "preflight-rlvr",
        "verifier-audit",
        "sft", "evaluation-sft",
        "reward-model", "evaluation-reward-model",
        "reference-logps", "dpo", "evaluation-dpo", "evaluation-dpo-implicit-reward",
        "pass-rates", "rlvr", "evaluation-rlvr",
        "publish",
    ]  # fmt: skip


def test_a_changed_learning_rate_of_dpo_changes_dpo_and_what_follows_and_nothing_else() -> None:
    assert changed({"dpo.learning_rate": 5e-7}) == DPO_AND_AFTER


@pytest.mark.parametrize(
    "overrides",
    [
        {"compute.per_device_train_batch_size": 8},
        {"compute.num_threads": 2, "compute.save_steps": 7, "compute.max_parallel_stages": 1},
        {"compute.stages.rlvr.per_device_train_batch_size": 16},
        {"publish.repository": "someone/model"},
        {"description": "other words"},
    ],
)
def test_machinery_changes_no_key(overrides: dict[str, Any]) -> None:
    assert changed(overrides) == set()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"reward_model.seed": 1},
            {"reward-model", "evaluation-reward-model", "rlvr", "evaluation-rlvr", "publish"},
        ),
        ({"rlvr.num_episodes": 512}, {"rlvr", "evaluation-rlvr", "publish"}),
        ({"publish.license": "mit"}, {"publish"}),
        (
            {"evaluation.sampled.temperature": 0.5},
            {"evaluation-sft", "evaluation-dpo", "evaluation-rlvr", "publish"},
        ),
        (
            {"data.rlvr.max_malformed_share": 0.5},
            {"dataset-rlvr", "contamination-rlvr", "preflight-rlvr", *AUDIT_AND_AFTER, "pass-rates"},
        ),
        # A sweep of DPO's settings shares the tokens and the reference, whatever its learning rate, loss or batch.
        (
            {"dpo.loss_type": "ipo", "dpo.beta": 0.1, "dpo.effective_batch_size": 64, "dpo.max_tokens": 9999},
            DPO_AND_AFTER,
        ),
        ({"dpo.trained_turns": "all"}, {"preflight-dpo", "reference-logps", *DPO_AND_AFTER}),
        ({"preflight.max_overlong_share": 0.5, "sft.gate.num_prompts": 0}, set()),
        # Thresholds of the audit change nothing, what it tries does. Pass rates are about prompts, not about training.
        ({"verifier_audit.min_gold_share": 0.5, "verifier_audit.known_faults": ["math@paper"]}, set()),
        ({"verifier_audit.num_shuffled": 100}, AUDIT_AND_AFTER),
        ({"pass_rates.num_samples": 2}, {"pass-rates"}),
        ({"rlvr.temperature": 0.9}, {"pass-rates", "rlvr", "evaluation-rlvr", "publish"}),
        # A benchmark of reward models is nothing to a policy, nor to DPO's implicit reward.
        (
            {
                "evaluation.reward_benchmarks": [
                    {
                        "name": "pairs",
                        "title": "held_out",
                        "sources": [{"generated": "preference_eval.jsonl", "format": "preference"}],
                    }
                ]
            },
            {"evaluation-reward-model", "publish"},
        ),
        ({"rlvr.leave_out": ["never"]}, {"rlvr", "evaluation-rlvr", "publish"}),
    ],
)
def test_a_field_changes_its_own_stage_and_what_depends_on_it(overrides: dict[str, Any], expected: set[str]) -> None:
    assert changed(overrides) == expected


def test_a_reward_model_is_evaluated_on_benchmarks_alone(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}\n")
    entry = {"name": "rewardbench", "sources": [{"path": str(file), "format": "preference"}]}
    overrides = {"data.preference_eval": None, "evaluation.reward_benchmarks": [entry, {"name": "ultrafeedback"}]}
    graph = Graph(load_recipe("tiny", overrides), resolve=lambda reference: "f" * 40)
    node = graph.nodes["evaluation-reward-model"]
    assert set(node.inputs) == {"model"} and "evaluation-dpo-implicit-reward" not in graph.nodes
    assert "rewardbench.data.0" in node.externals
    assert node.config.settings.reward_benchmarks[1].sources[0].revision == "f" * 40  # type: ignore[attr-defined]
    key = graph.key("evaluation-reward-model")
    file.write_text("{}\n{}\n")
    again = Graph(load_recipe("tiny", overrides), resolve=lambda reference: "f" * 40)
    assert again.key("evaluation-reward-model") != key


def test_local_files_of_a_task_are_never_taken_for_others(tmp_path: Path) -> None:
    """Paths are in no key, so their digests must say whose they are."""
    sources = {}
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(name)
        sources[name] = {"path": str(tmp_path / f"{name}.jsonl"), "format": "text"}

    def key(*files: dict[str, Any]) -> str:
        tasks = [{"name": "paper_gsm8k", "metric": "exact_match,none", "files": one} for one in files]
        return Graph(load_recipe("tiny", {"evaluation.tasks": tasks})).key("evaluation-sft")

    a, b = sources["a"], sources["b"]
    as_given, named_anew = key({"train": a, "test": b}), key({"test": a, "train": b})
    assert as_given != named_anew
    with pytest.raises(ValueError, match="'paper_gsm8k' is listed twice with different files"):
        key({"test": a}, {"test": b})
    assert key({"test": a}, {"test": a})


def test_benchmarks_without_a_reward_model_are_told() -> None:
    entries = {"evaluation.reward_benchmarks": [{"name": "rewardbench"}]}
    assert load_recipe("tiny", entries).evaluation_notes() == []
    (note,) = load_recipe("tiny", {**entries, "reward_model": None, "rlvr": None}).evaluation_notes()
    assert "without a block reward_model there is no model that they measure" in note
    source = {"path": "x.jsonl", "format": "preference", "fields": {"label": "x"}}
    wrong = {"evaluation.reward_benchmarks": [{"name": "rewardbench", "sources": [source]}]}
    with pytest.raises(RecipeError, match="has no field label"):
        check_evaluation(load_recipe("tiny", wrong))


def test_other_verdicts_change_rows_of_rlvr_and_what_is_made_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Graph(load_recipe("tiny")).keys()
    monkeypatch.setattr("smoltulu.flows.graphs.recipe_graph.VERIFIERS_VERSION", "next")
    after = Graph(load_recipe("tiny")).keys()
    changed = {name for name in before if before[name] != after[name]}
    assert {
        "dataset-rlvr",
        "dataset-verified-eval",
        "preflight-rlvr",
        "verifier-audit",
        "pass-rates",
        "rlvr",
    } <= changed
    assert not changed & {
        "dataset-sft",
        "dataset-preference",
        "base-model",
        "preflight-sft",
        "sft",
        "reward-model",
        "dpo",
    }


def test_until_stops_after_a_stage_and_still_evaluates_its_models() -> None:
    names = set(keys(until="dpo"))
    assert {"dpo", "evaluation-dpo", "evaluation-reward-model"} <= names
    assert not names & {"rlvr", "evaluation-rlvr", "publish"}
    assert set(keys(until="contamination")) == {
        name for name in keys() if name.startswith(("world", "dataset", "benchmark", "contamination"))
    }
    assert set(keys()) - set(keys(until="evaluation")) == {"publish"}


def test_every_preflight_comes_before_the_first_training() -> None:
    graph = Graph(load_recipe("tiny"))
    preflights = {name for name in graph.nodes if name.startswith("preflight-")}
    assert preflights == {"preflight-sft", "preflight-reward-model", "preflight-dpo", "preflight-rlvr"}
    before = preflights | {"verifier-audit"}
    assert set(graph.nodes["sft"].after) == before == set(graph.nodes["rlvr"].after)
    assert preflights < set(Graph(load_recipe("tiny"), until="verifier_audit").nodes) >= {"verifier-audit"}
    assert "pass-rates" in Graph(load_recipe("tiny"), until="pass_rates").nodes
    alone = Graph(load_recipe("tiny"), until="preflight").nodes
    assert preflights < set(alone) and not {"sft", "evaluation-sft", "reference-logps"} & set(alone)
    reference = set(Graph(load_recipe("tiny"), until="reference_logps").nodes)
    assert {"sft", "preflight-dpo", "reference-logps"} <= reference and not {"dpo", "preflight-rlvr"} & reference
    # Who stops after SFT is not kept waiting for the rows of DPO.
    assert {name for name in keys(until="sft") if name.startswith("preflight")} == {"preflight-sft"}


def test_a_recipe_without_an_audit_keeps_its_keys_and_says_so() -> None:
    """The keys of nodes that others share do not know of it; RLVR's has no input of it."""
    none = {"verifier_audit": None, "pass_rates": None}
    graph, recipe = Graph(load_recipe("tiny", none)), load_recipe("tiny", none)
    assert (
        set(graph.nodes["rlvr"].inputs) == {"model", "dataset", "reward_model"} and "verifier-audit" not in graph.nodes
    )
    assert {name: key for name, key in keys().items() if key != graph.keys().get(name)}.keys() == {
        *AUDIT_AND_AFTER, "pass-rates",
    }  # fmt: skip
    (note,) = recipe.audit_notes()
    assert "nothing audits its verifiers" in note and "{} will do" in note
    assert load_recipe("tiny").audit_notes() == []
    left = load_recipe("tiny", {"rlvr": None})
    assert [note.partition(":")[0] for note in left.audit_notes()] == ["verifier_audit", "pass_rates"]
    assert not {"verifier-audit", "pass-rates"} & Graph(left).nodes.keys()
    no_rows = load_recipe("tiny", {"rlvr": None, "data.rlvr": None})
    assert not {"verifier-audit", "pass-rates"} & Graph(no_rows).nodes.keys()


def test_rlvr_takes_the_audit_and_pass_rates_only_where_prompts_are_left_out() -> None:
    audit, rates = Binding("verifier-audit", "file"), Binding("pass-rates", "file")
    assert Graph(load_recipe("tiny")).nodes["rlvr"].inputs["audit"] == audit
    assert "pass_rates" not in Graph(load_recipe("tiny")).nodes["rlvr"].inputs
    assert Graph(load_recipe("tiny", {"rlvr.leave_out": ["always"]})).nodes["rlvr"].inputs["pass_rates"] == rates
    with pytest.raises(ValueError, match=r"rlvr\.leave_out: always is known once pass rates are measured; add a block"):
        load_recipe("tiny", {"rlvr.leave_out": ["always"], "pass_rates": None})


def test_the_reward_model_starts_where_the_recipe_says() -> None:
    graph = Graph(load_recipe("tiny", {"reward_model.start_from": "dpo"}))
    assert graph.nodes["reward-model"].inputs["model"] == Binding("dpo", "folder")
    assert list(graph.nodes).index("dpo") < list(graph.nodes).index("reward-model")
    assert Graph(load_recipe("tiny")).nodes["reward-model"].inputs["model"] == Binding("sft", "folder")
    until = {"reward_model.start_from": "dpo"}
    assert "reward-model" not in Graph(load_recipe("tiny", until), until="dpo").nodes
    assert {"dpo", "reward-model"} <= set(Graph(load_recipe("tiny", until), until="reward_model").nodes)
    with pytest.raises(ValueError, match="reward_model: starts from the model of dpo; add a block dpo"):
        load_recipe({"extends": "tiny", "dpo": None, "reward_model": {"start_from": "dpo"}})


PPO: dict[str, Any] = {
    "algorithm": "ppo", "learning_rate": 1e-6, "effective_batch_size": 8, "num_episodes": 64, "max_prompt_length": 64,
    "max_completion_length": 32, "precision": "float32",
}  # fmt: skip


def test_ppo_takes_the_reward_model_or_an_earlier_critic(tmp_path: Path) -> None:
    def rlvr(**changes: Any) -> Any:
        graph = Graph(load_recipe("tiny", {"rlvr": PPO | changes}))
        return graph.nodes["rlvr"], graph.key("rlvr")

    node, key = rlvr()
    assert node.inputs["reward_model"] == Binding("reward-model", "folder") and node.inputs["model"].node == "dpo"
    assert rlvr(rollout_batch_size=3)[1] == key != rlvr(critic={"warmup_steps": 1})[1]
    node, _ = rlvr(critic={"initial": "policy"})
    assert "reward_model" not in node.inputs
    node, _ = rlvr(critic={"initial": "policy"}, reward_model_weight=0.5)
    assert node.inputs["reward_model"] == Binding("reward-model", "folder")
    # By content, wherever it lies; refused where it is no critic, before anything runs.
    own = {"initial": "path", "path": str(build_tiny_model(tmp_path / "critic", num_labels=1))}
    node, key = rlvr(critic=own)
    assert "reward_model" not in node.inputs and node.literals["critic"] == own["path"]
    moved = build_tiny_model(tmp_path / "moved", num_labels=1)
    assert rlvr(critic={"initial": "path", "path": str(moved)})[1] == key
    (moved / "README.md").write_text("another content")
    assert rlvr(critic={"initial": "path", "path": str(moved)})[1] != key
    with pytest.raises(ValueError, match="holds LlamaForCausalLM, not a reward model"):
        rlvr(critic={"initial": "path", "path": str(build_tiny_model(tmp_path / "policy"))})
    with pytest.raises(ValueError, match=r"starts its critic from the reward model.*add a block reward_model"):
        load_recipe("tiny", {"rlvr": PPO, "reward_model": None})


def test_a_plan_counts_ppos_steps_episodes_and_second_model(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", {"rlvr": PPO})
    rows = {row.node: row for row in plan(recipe, None, [], Store(tmp_path / "store")).rows}
    assert rows["rlvr"].estimate.num_steps == 64 // 8 * 4


def test_keys_are_the_same_in_another_process(tmp_path: Path) -> None:
    imports = "from smoltulu.flows.graphs.recipe_graph import Graph; from smoltulu.flows.recipe import load_recipe"
    code = f"{imports}; print(Graph(load_recipe('tiny')).key('publish'))"
    environment = {"PYTHONHASHSEED": "7", "PATH": "/usr/bin", "PYTHONPATH": str(ROOT / "src")}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert printed.stdout.strip() == keys()["publish"]


def test_graph_and_plan_never_import_torch() -> None:
    code = (
        "import sys; from smoltulu.flows.graphs.recipe_graph import Graph; "
        "from smoltulu.flows.recipe import load_recipe; "
        "Graph(load_recipe('tiny')); "
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets', 'prefect', 'lm_eval') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout == "[]\n"


def test_plan_of_an_empty_store_runs_everything(tmp_path: Path) -> None:
    rows = plan(load_recipe("tiny"), None, [], Store(tmp_path)).rows
    assert {row.status for row in rows} == {"runs"} and [row.node for row in rows] == list(keys())
    assert rows[0].reason == "never made"


def test_a_local_model_folder_is_checked_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    recipe = load_recipe("tiny", {"base_model": {"path": str(tmp_path)}})
    with pytest.raises(ValueError, match=r"weights are pickles \(pytorch_model.bin\).*no tokenizer"):
        Graph(recipe)


def test_a_revision_that_cannot_be_resolved_stops_before_anything_runs() -> None:
    recipe = load_recipe("tiny", {"base_model": {"repository": "someone/model", "revision": "nowhere"}})
    with pytest.raises(ValueError, match=r"Hub model 'someone/model'.* revision 'nowhere'"):
        Graph(recipe)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "does not render"),
        ("{{ messages[9].content.upper() }}", "does not render"),
        ("{{ raise_exception('no system turns') }}", "does not render: no system turns"),
        ("hello", "loses text"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no generation markers"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "does not close an assistant turn with eos_token",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
            "{% if add_generation_prompt %}Assistant:{% endif %}",
            "is not how the conversation goes on",
        ),
    ],
)
def test_templates_that_do_not_do(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_chat_template(template, "mine")


def test_shipped_templates_do_and_unknown_ones_are_named() -> None:
    for path in CHAT_TEMPLATES.glob("*.jinja"):
        assert load_chat_template(path.stem) == path.read_text()
    assert {"chatml", "llama3", "smollm2", "tulu", "zephyr"} == {path.stem for path in CHAT_TEMPLATES.glob("*.jinja")}
    with pytest.raises(ValueError, match=r"'tuul' is neither shipped \(chatml, .*tulu, zephyr\) nor a readable file"):
        load_chat_template("tuul")
