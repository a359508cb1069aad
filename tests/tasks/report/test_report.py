"""The report of a run: a fabricated run of the `tiny` shape, hostile values, half-finished runs."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from smoltulu.schemas.artifact import ArtifactReference, FileRecord, InputRecord, Manifest, Spec
from smoltulu.schemas.run import RunSummary
from smoltulu.tasks.report import artifact_key, html_report, markdown, stage_table, summarise
from smoltulu.tasks.report.charts import bucketed, direct_parents, layered, line_chart, parse_history, ticks
from smoltulu.tasks.stages import STAGES, made_by

NASTY = '<script>alert(1)</script><img src="https://evil.example/x.png" onerror=alert(2)>"\'&\x00\u202e\ud800 `|*'
PARENTS = {
    "world": [],
    "dataset-sft": ["world"],
    "contamination-sft": ["dataset-sft", "world"],
    "dataset-preference": ["world"],
    "contamination-preference": ["dataset-preference", "world"],
    "dataset-rlvr": ["world"],
    "contamination-rlvr": ["dataset-rlvr", "world"],
    "dataset-preference-eval": ["world"],
    "dataset-verified-eval": ["world"],
    "base-model": ["world"],
    "evaluation-base-model": ["base-model", "world", "dataset-verified-eval"],
    "verifier-audit": ["contamination-rlvr"],
    "sft": ["base-model", "contamination-sft"],
    "evaluation-sft": ["sft", "world", "dataset-verified-eval"],
    "reward-model": ["sft", "contamination-preference"],
    "evaluation-reward-model": ["reward-model", "dataset-preference-eval"],
    "dpo": ["sft", "contamination-preference"],
    "evaluation-dpo": ["dpo", "world", "dataset-verified-eval"],
    "evaluation-dpo-implicit-reward": ["dpo", "sft", "dataset-preference-eval"],
    "pass-rates": ["dpo", "contamination-rlvr"],
    "rlvr": ["dpo", "contamination-rlvr", "verifier-audit", "pass-rates"],
    "evaluation-rlvr": ["rlvr", "world", "dataset-verified-eval"],
    "publish": ["rlvr", "evaluation-base-model", "evaluation-sft", "evaluation-dpo", "evaluation-rlvr"],
}
ACCURACY = {"base_model": 0.004, "sft": 0.702, "dpo": 0.706, "rlvr": 0.712}


def stage_of(node: str) -> str:
    """`evaluation-dpo` -> `evaluation`."""
    prefix = node.split("-")[0]
    return prefix if prefix in ("dataset", "contamination", "evaluation") else node.replace("-", "_")


def _score(task: str, metric: str, value: float, num_samples: int, **more: Any) -> dict[str, Any]:
    stderr = math.sqrt(max(value * (1 - value), 1e-6) / num_samples)
    fixed = {"num_fewshot": 0, "harness": "lm-eval 0.4.11", "task_version": "1", "template_digest": "ab" * 32}
    return {
        "task": task,
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "num_samples": num_samples,
        **fixed,
        **more,
    }


def _outputs(node: str, label: str) -> dict[str, Any]:
    stage = stage_of(node)
    if stage == "dataset":
        malformed = 3 if node == "dataset-sft" else 0
        source = {
            "label": label,
            "num_rows": 20_000,
            "num_malformed": malformed,
            "reasons": {"empty turn": 2, "roles out of order: user, user": 1} if malformed else {},
            "examples": [f'row 17: empty turn: {{"messages": [{label}]}}'] if malformed else [],
        }
        return {"kind": "rlvr" if "rlvr" in node else "sft", "num_rows": 20_000 - malformed, "sources": [source]}
    if stage == "contamination":
        reports = [
            {"name": "arithmetic", "num_instances": 500, "num_skipped": 0, "num_contaminated": 30, "num_short_hits": 4},
            {"name": "instructions", "num_instances": 200, "num_skipped": 1, "num_contaminated": 0},
            {
                "name": "gpqa",
                "num_instances": 0,
                "num_skipped": 0,
                "num_contaminated": 0,
                "not_checked": f"gated: {label}",
            },
        ]
        return {
            "kind": "sft",
            "num_rows_read": 19_997,
            "num_rows": 19_957,
            "num_removed": 40,
            "num_rows_contaminated": 40,
            "benchmarks": reports,
        }
    if stage == "evaluation":
        subject = node.removeprefix("evaluation-").removesuffix("-implicit-reward").replace("-", "_")
        if node.endswith(("reward-model", "implicit-reward")):
            accuracy = 0.9117 if subject == "reward_model" else 0.8633
            fixed = {"harness": "smoltulu 0.1.0", "num_fewshot": None}
            return {"subject": subject, "scores": [_score("preference_eval", "pair_accuracy", accuracy, 600, **fixed)]}
        value = ACCURACY[subject]
        scores = [
            _score("tiny_arithmetic", "exact_match,strict-match", value, 500),
            _score("tiny_instructions", "acc,none", value * 0.9, 200, limited=True),
            _score("verified_eval", "sampled_accuracy", value * 0.7, 4000, harness="smoltulu 0.1.0", num_fewshot=None),
        ]
        return {"subject": subject, "scores": scores}
    if stage == "verifier_audit":
        hack = {"num_rows": 200, "num_right": 12, "num_allowed": 5}
        group = {
            "verifier": "gsm8k_strict", "source": "0", "label": label, "num_rows": 7473, "num_gold": 7473,
            "num_gold_right": 7466, "num_shuffled": 2000, "num_shuffled_right": 24, "chance_share": 0.0099,
            "hacks": {f"bare {label}": hack}, "num_ungradable": 3,
        }  # fmt: skip
        fixed = {"rows_digest": "ab" * 32, "verifiers_version": "2", "num_rows": 7473, "num_probes": 18_000}
        return {**fixed, "groups": [group]}
    if stage == "pass_rates":
        pools = {"never": 300, "sometimes": 150, "always": 50, "ungraded": 0}
        counts = [{"verifier": "gsm8k_strict", "source": "0", "label": label, "num_prompts": 500, "pools": pools,
                   "mean_pass_rate": 0.234}]  # fmt: skip
        return {"pass_rates_of": "ab" * 32, "num_measured": 500, "num_samples": 8, "counts": counts}
    if stage in ("base_model", "sft", "reward_model", "dpo", "rlvr"):
        return {"folder": "model", "num_parameters": 1_070_464, "num_steps": 625, "history_file": "history.jsonl"}
    return {"folder": "model", "note": label}


def _history(node: str) -> list[dict[str, Any]]:
    rng = random.Random(node)
    records = []
    for step in range(5, 630, 5):
        noise = rng.gauss(0, 0.03)
        record: dict[str, Any] = {"step": step, "learning_rate": 2e-3 * (1 - step / 630), "grad_norm": 1 + noise}
        record["tokens_per_second"] = 21_000 + 2_000 * noise
        if node == "rlvr":
            record |= {"reward": 0.42 + 0.0001 * step + noise, "kl": 0.0, "entropy": 0.6 - step / 3000, "loss": noise}
            record |= {"completions/clipped_ratio": 0.02 + abs(noise) / 10, "frac_reward_zero_std": 0.4 + noise}
        else:
            record |= {
                "loss": 0.4 + 5 * math.exp(-step / 60) + noise,
                "mean_token_accuracy": 0.9 - math.exp(-step / 80),
            }
        if node in ("dpo", "reward-model"):
            record |= {"rewards/accuracies" if node == "dpo" else "accuracy": min(1, 0.6 + step / 1500 + noise)}
        records.append(record)
    records[30]["loss"] = None
    return records


def sample_run(folder: Path, label: str = "sft.jsonl", made: int | None = None) -> tuple[Any, ...]:
    """(summary, manifests, folders, recipe) of a fabricated run; only the first `made` nodes where one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    manifests: dict[str, Manifest] = {}
    folders: dict[str, Path] = {}
    nodes = list(PARENTS)[:made]
    keys = {node: hashlib.sha256(node.encode()).hexdigest() for node in PARENTS}
    for index, node in enumerate(nodes):
        stage = stage_of(node)
        config: dict[str, Any] = {"learning_rate": 2e-3, "seed": 0, "label": label}
        if stage == "evaluation":
            kind = "reward_model" if node.endswith("reward-model") else "language_model"
            config = {"kind": "implicit_reward" if node.endswith("implicit-reward") else kind}
        if stage == "rlvr":
            config["leave_out"] = ["always", "never"]
        if stage == "contamination":
            config = {"settings": {"mode": "full", "policy": "remove"}}
        folders[node] = folder / node
        folders[node].mkdir(exist_ok=True)
        outputs = _outputs(node, label)
        if "history_file" in outputs:
            lines = [json.dumps(record) for record in _history(node)]
            (folders[node] / "history.jsonl").write_text("\n".join(lines) + '\n{"step": 700, "lo')
        metrics = {"loss": 0.41, "tokens_per_second": 21_043.5} if "history_file" in outputs else {"num_rows": 19_957.0}
        manifests[node] = Manifest(
            key=keys[node],
            spec=Spec(stage=stage, version=1, config=config, inputs={}, externals={"chat_template": "cd" * 32}),
            digest="ef" * 32,
            inputs={
                f"input_{parent}": InputRecord(stage=stage_of(parent), key=keys[parent], digest="ef" * 32)
                for parent in PARENTS[node]
            },
            outputs=outputs,
            metrics=metrics,
            files={"model/model.safetensors": FileRecord(size=4_300_112, blake3="12" * 32)},
            environment={"python": "3.11", "packages": {"torch": "2.13.0"}, "hardware": label},
            node=node,
            started_at="2026-11-21T07:00:00+00:00",
            finished_at="2026-11-21T07:01:00+00:00",
            duration_seconds=60.5,
            resumed_from_steps=(300,) if node == "dpo" else (),
        )
        outcome = "Cached" if index < 8 else "Resumed" if node == "dpo" else "Completed"
        reference = ArtifactReference(
            stage=stage,
            node=node,
            key=keys[node],
            digest="ef" * 32,
            path=str(folders[node]),
            outcome=outcome,
            outputs=outputs,
            metrics=metrics,
        )
        pairs.append((reference, manifests[node]))
    stopped = list(PARENTS)[made] if made is not None else None
    error = f"{stopped}: loss is nan at step 40; lower the learning rate. {label}" if stopped else None
    summary = summarise(
        run_name="tiny-20261121-070000",
        recipe="tiny",
        state="Failed" if stopped else "Completed",
        started_at="2026-11-21T07:00:00+00:00",
        finished_at="2026-11-21T07:06:12+00:00",
        planned=[(node, stage_of(node), made_by(stage_of(node))) for node in PARENTS],
        made=pairs,
        failed={stopped: ("Failed", error)} if stopped and error else {},
        seconds={stopped: 12.0} if stopped else {},
        error=error,
        published=None if stopped else str(folder / "publish" / "model"),
        pushed="" if stopped else f"Stayed local: the recipe names no repository. {label}",
    )
    return summary, manifests, folders, f"name: tiny\ndescription: {label}\n"


class Page(HTMLParser):
    """Open elements, ids, links and texts of a page; fails on an element that is closed out of order."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check_page(source: str) -> Page:
    """Balanced; nothing loaded, no handler; every link leads to an id of the page or a file beside it, ids are unique.

    No script but the one whose digest the page's policy names.
    """
    script = re.search(r"<script>(.*)</script>", source, re.DOTALL)
    if script:
        digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
        assert f"; script-src 'sha256-{digest}'" in source and source.count("<script") == 1
        source = source.replace(script[0], "")
    else:
        assert "script-src" not in source
    page = Page(source)
    assert not page.open
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in {"script", "img", "link", "iframe", "object", "embed", "image", "use", "base", "form"}, tag
        assert not any(name.startswith("on") or name in ("src", "srcset", "style", "xlink:href") for name in attributes)
        if attributes.get("href") not in (None, "tables.html", "tables.csv"):
            assert attributes["href"].lstrip("#") in ids and attributes["href"].startswith("#")
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style and "//" not in style
    source.encode("utf-8")
    return page


def test_a_finished_run_shows_everything(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path)
    source = html_report(summary, manifests, folders, recipe)
    page = check_page(source)
    words = " ".join(" ".join(page.words).split())
    assert "6 min 12 s" in words and "8 cached, 1 resumed" in words.replace("12 completed, ", "")
    assert "0.702 ± 0.020" in words and "n = 500" in words  # sqrt(0.702 x 0.298 / 500) = 0.02046
    assert "lm-eval 0.4.11, task version 1" in words
    assert "DPO, implicit reward" in words and "0.863 ± 0.014" in words and "0.912 ± 0.012" in words
    assert "30 6.00 % 4 0" in words  # found, share of 500, short, not matchable
    assert "not checked gated" in words and "40 removed, 19,957 kept" in words
    assert "empty turn: 2" in words and "row 17" in words
    assert "from step 300" in words and "made in 1 min 00 s" in words
    assert "1 not finite" in words  # the null in the middle of the loss
    assert source.count("<figure") >= 5 * 4 and "<polyline" in source and 'class="lineage"' in source


def test_hostile_values_stay_text(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path, label=NASTY, made=15)
    source = html_report(summary, manifests, folders, recipe)
    page = check_page(source)
    assert any("<script>alert(1)</script>" in words for words in page.words), "shown, as text"
    summary.model_copy(update={"pushed": ""}).model_dump_json().encode("utf-8")
    assert "\x00" not in source and "\u202e" not in source


def test_hostile_metric_names_in_history_stay_text(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path)
    lines = [json.dumps({"step": step, NASTY: step, "</svg><b>": 1}) for step in range(3)]
    (folders["sft"] / "history.jsonl").write_text("\n".join(lines))
    check_page(html_report(summary, manifests, folders, recipe))


def test_a_history_file_outside_its_artifact_is_not_read(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path / "store")
    (tmp_path / "secret.jsonl").write_text('{"step": 1, "secret_metric": 1.0}\n')
    leaky = manifests["sft"].model_copy(update={"outputs": {"history_file": "../../secret.jsonl"}})
    assert "secret_metric" not in html_report(summary, manifests | {"sft": leaky}, folders, recipe)


def test_what_the_policy_wrote_is_shown_with_its_reward(tmp_path: Path) -> None:
    """Of the first rollouts and the last ones; a model may write anything."""
    summary, manifests, folders, recipe = sample_run(tmp_path)
    lines = [
        json.dumps(
            {"step": step, "prompt": f"asked {step}", "completion": f"wrote {step} {NASTY}", "stopped": step > 0,
             **({"id": f"0:{step}"} if step else {}), "verdict": "right", "reward": 10.0 + step,
             "reason": f"last number {step} equals {step}"}
        )
        for step in (0, 4, 8, 12)
    ]  # fmt: skip
    (folders["rlvr"] / "samples.jsonl").write_text("\n".join([*lines, "[1]", "not JSON", '{"step": "x"}']))
    outputs = manifests["rlvr"].outputs | {"samples_file": "samples.jsonl"}
    shown = manifests | {"rlvr": manifests["rlvr"].model_copy(update={"outputs": outputs})}
    page = check_page(html_report(summary, shown, folders, recipe))
    words = " ".join(page.words)
    assert "What the policy wrote" in words and "last number 12 equals 12" in words and "no end" in words
    assert [step for step in (0, 4, 8, 12) if f"asked {step}" in words] == [0, 8, 12]
    # Of the data set, so that the row can be looked up; samples of earlier versions have none.
    assert "0:12" in words
    leaky = manifests["rlvr"].model_copy(update={"outputs": outputs | {"samples_file": "../../secret.jsonl"}})
    assert "What the policy wrote" not in html_report(summary, manifests | {"rlvr": leaky}, folders, recipe)


def test_what_held_out_prompts_say_is_a_table(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path)
    assert "Held-out prompts" not in html_report(summary, manifests, folders, recipe)
    score = {"step": 0, "accuracy": 0.25, "stderr": 0.125, "kinds_accuracy": 0.5, "kinds_stderr": None}
    found = {
        "num_prompts": 64, "num_prompts_of_kinds": 8, "num_rows_left_out": 1072, "start": score,
        "kept": score | {"step": 40, "accuracy": 0.375}, "last": score | {"step": 80, "kinds_accuracy": None},
        "why": f"keep is best {NASTY}", "ended_early": f"it fell {NASTY}",
    }  # fmt: skip
    rlvr = manifests["rlvr"].model_copy(update={"outputs": manifests["rlvr"].outputs | {"held_out": found}})
    page = check_page(html_report(summary, manifests | {"rlvr": rlvr}, folders, recipe))
    words = " ".join(" ".join(page.words).split())
    assert "kept 40 0.375 ± 0.125 0.500" in words and "at the end 80 0.250 ± 0.125 –" in words
    assert "64 prompts that are not trained on and 8 of kinds that are not" in words and "1,072 rows" in words
    assert "The run ended early: it fell" in words


@pytest.mark.parametrize("made", range(len(PARENTS)))
def test_a_run_that_stopped_anywhere_says_where(tmp_path: Path, made: int) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path, made=made)
    page = check_page(html_report(summary, manifests, folders, recipe))
    words = " ".join(page.words)
    stopped = list(PARENTS)[made]
    assert f"Stopped at {stopped}" in words and "loss is nan at step 40" in words
    assert [run.outcome for run in summary.stages].count("Not run") == len(PARENTS) - made - 1
    assert "loss is nan" in markdown(summary)


def test_outputs_of_another_version_do_not_break_the_page(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path)
    changed = {node: item.model_copy(update={"outputs": {"unknown": 1}}) for node, item in manifests.items()}
    check_page(html_report(summary, changed, folders, recipe))


def test_summary_survives_json_and_holds_what_the_demo_reads(tmp_path: Path) -> None:
    summary, *_ = sample_run(tmp_path)
    data = json.loads(summary.model_dump_json())
    assert RunSummary.model_validate(data) == summary
    assert {"run_name", "recipe", "state", "stages", "scores", "published", "pushed"} <= data.keys()
    assert {"node", "stage", "outcome", "seconds", "key", "path", "metrics"} <= data["stages"][0].keys()
    wanted = {"subject", "task", "metric", "value", "stderr", "num_samples", "num_fewshot", "harness"}
    assert len(data["scores"]) == 4 * 3 + 2 and wanted <= data["scores"][0].keys()
    by_node = {run.node: run for run in summary.stages}
    assert by_node["world"].seconds == 0.0, "cached: its time belongs to the run that made it"
    assert by_node["dpo"].seconds == 60.5 and by_node["dpo"].outcome == "Resumed"


def test_markdown_has_scores_and_escapes(tmp_path: Path) -> None:
    summary, *_ = sample_run(tmp_path, label=NASTY)
    text = markdown(summary)
    assert "| tiny_arithmetic | exact_match,strict-match | 0.004 ± 0.003 (n = 500) | 0.702 ± 0.020 (n = 500) |" in text
    assert "<script>" not in text and "| DPO, implicit reward |" in text
    for line in text.splitlines():
        if line.startswith("| dpo"):
            assert line.count("|") == 5


def test_markdown_error_cannot_leave_its_block() -> None:
    summary = summarise(
        run_name="r",
        recipe="tiny",
        state="Failed",
        started_at="?",
        finished_at="?",
        planned=[],
        made=[],
        error="```\n# not a heading\n````\n",
    )
    block = markdown(summary).split("`````")
    assert len(block) == 3 and "# not a heading" in block[1]


def test_stage_table_rows(tmp_path: Path) -> None:
    _, manifests, _, _ = sample_run(tmp_path)

    def rows(node: str) -> dict[str, str]:
        manifest = manifests[node]
        reference = ArtifactReference(
            stage=stage_of(node),
            node=node,
            key=manifest.key,
            digest="",
            path="",
            outputs=manifest.outputs,
            metrics=manifest.metrics,
        )
        return {row["metric"]: row["value"] for row in stage_table(reference, STAGES[reference.stage].outputs)}

    assert rows("sft")["tokens_per_second"] == "21,044" and rows("sft")["outcome"] == "Completed"
    assert rows("evaluation-sft")["tiny_arithmetic exact_match,strict-match"] == "0.702 ± 0.020 (n = 500)"
    assert rows("evaluation-sft")["tiny_instructions acc,none"].endswith("(n = 200, part of the task)")
    assert rows("contamination-sft")["found of arithmetic"] == "30 of 500 instances"
    assert rows("contamination-sft")["found of gpqa"].startswith("not checked: gated")


@pytest.mark.parametrize("text", ["Tiny run/DPO", "évaluation", "", "--a__b--", "🤗", "tiny-reward_model"])
def test_artifact_key_is_a_prefect_key(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", artifact_key(text))


def test_artifact_key_examples() -> None:
    assert artifact_key("Tiny run/DPO") == "tiny-run-dpo" and artifact_key("reward_model") == "reward-model"


def test_history_last_record_of_a_step_counts_and_bad_lines_are_passed_over() -> None:
    lines = [
        '{"step": 2, "loss": 1.0}',
        '{"step": 1, "loss": NaN, "note": "text", "flag": true}',
        '{"step": 2, "loss": 0.5, "reward": null}',
        '{"step": 3, "loss": Infinity}',
        '{"train_runtime": 4.0}',
        '{"step": "4", "loss": 9}',
        "[1, 2]",
        '{"step": 5, "lo',
        "",
    ]
    assert parse_history(lines) == {"loss": [(1.0, None), (2.0, 0.5), (3.0, None)], "reward": [(2.0, None)]}


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.5, 1.0]) and ticks(0, 100) == pytest.approx([0, 50, 100])
    assert ticks(5, 630) == pytest.approx([200, 400, 600]) and ticks(3, 3) == [3]


def test_buckets_keep_mean_and_range() -> None:
    assert bucketed([(1, 2.0), (2, 4.0), (3, None), (4, None), (5, 1.0)], max_points=3) == [
        (1.5, 3.0, 2.0, 4.0),
        None,
        (5.0, 1.0, 1.0, 1.0),
    ]


def test_a_gap_breaks_the_curve() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, None), (4.0, 1.0), (5.0, 2.0), (6.0, None), (7.0, 3.0)]
    chart = line_chart("loss", points)
    assert chart.count("<polyline") == 2 and chart.count("<circle") == 1 and "2 not finite" in chart


@pytest.mark.parametrize(
    "values",
    [[None, None], [0.0], [3.0, 3.0], [1e-300, 2e-300], [-1e308, 1e308], [1e308, 1e308], [-2.0, -1.0], [1e-9, 5]],
)
def test_every_series_draws_finite_coordinates(values: list[float | None]) -> None:
    chart = line_chart("x", [(float(step), value) for step, value in enumerate(values)])
    Page(chart)
    assert "nan" not in chart and "inf" not in chart.replace("no finite", "")


def test_lineage_leaves_out_implied_lines_and_keeps_order() -> None:
    parents = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"a"}}
    assert direct_parents(parents) == {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"a"}}
    rows, edges = layered({"a": set(), "b": {"a"}, "c": {"b"}, "e": {"a", "c"}})
    assert [sorted(name for name in row if "\0" not in name) for row in rows] == [["a"], ["b"], ["c"], ["e"]]
    assert len(edges) == 6, "a-b, b-c, c-e, and a-e through two place-holders"


def test_audit_and_pass_rates(tmp_path: Path) -> None:
    page = html_report(*sample_run(tmp_path))
    section = page.partition('<section id="verifier_audit">')[2].partition("</section>")[0]
    told = " ".join(re.sub(r"<[^>]+>", " ", section).split())
    assert "gsm8k_strict sft.jsonl 7,473 3 ungradable 99.91 % 1.20 % n = 2,000 0.99 % – 7 of 200 –" in told
    assert "500 300 60.00 % 150 30.00 % 50 10.00 % 0 0 % 23.40 %" in told
    assert "8 samples a prompt" in told and "RLVR leaves out the prompts that are always or never right" in told
    none = html_report(*sample_run(tmp_path / "early", made=list(PARENTS).index("verifier-audit")))
    assert "verifier_audit" not in none
