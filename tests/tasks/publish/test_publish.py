"""The publication folder, its card, and the push, against a real HTTP server that behaves as the Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from smoltulu.artifacts.keys import file_digest, folder_records, with_checksum
from smoltulu.schemas.artifact import FileRecord, InputRecord, Manifest, Spec
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.evaluation import EvaluationOutputs, Score
from smoltulu.schemas.publish import PublishInputs, PublishSettings, PublishStageConfig, PushResult
from smoltulu.tasks.publish import push
from smoltulu.tasks.publish.model_card import find_private, without_paths
from smoltulu.tasks.publish.push import check_push_access
from smoltulu.tasks.publish.stage import build_publication, model_digest
from smoltulu.tasks.stage import StageContext
from tests.hub_double import HubDouble
from tests.tiny_model import build_tiny_model

REPOSITORY = "me/tiny"


def _context(folder: Path) -> StageContext:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return StageContext(folder / "out", folder / "work", ComputeSettings(device="cpu"), lambda *_, **__: None)


def _manifest(stage: str, key: str, digest: str, inputs: dict, outputs: dict, files: dict | None = None) -> Manifest:
    return Manifest(
        key=key * 16,
        spec=Spec(stage=stage, version=1, config={}, inputs={}, externals={}),
        digest=digest,
        inputs=inputs,
        outputs=outputs,
        metrics={"loss": 1.5},
        files=files or {},
        environment={"packages": {"torch": "2.13.0"}, "platform": "Linux-secret-host"},
        node=stage,
        started_at="2025-01-01T00:00:00+00:00",
        finished_at=f"2025-01-01T00:00:0{len(inputs)}+00:00",
        duration_seconds=1.0,
    )


def _write(folder: Path, manifest: Manifest) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(with_checksum(manifest).model_dump_json())
    return folder


@pytest.fixture
def world(tmp_path: Path) -> dict:
    """Artifacts of a small run: dataset -> dpo, and the evaluation of dpo."""

    store = tmp_path / "store"
    dpo = store / "dpo"
    build_tiny_model(dpo / "model")
    (dpo / "model" / "training_args.bin").write_bytes(b"a pickle that a trainer leaves behind")
    files = {
        f"model/{path.name}": FileRecord(size=path.stat().st_size, blake3=file_digest(path))
        for path in (dpo / "model").iterdir()
    }
    _write(store / "dataset", _manifest("dataset", "aaaa", "d1", {}, {}))
    data = InputRecord(stage="dataset", key="aaaa" * 16, digest="d1")
    _write(dpo, _manifest("dpo", "bbbb", "d2", {"dataset": data}, {}, files))
    score = Score(
        task="tiny_arithmetic",
        metric="exact_match,strict-match",
        value=0.703,
        stderr=0.0204,
        num_samples=500,
        num_fewshot=0,
        harness="lm-eval 0.4.13",
        task_version="1.0",
        template_digest="t" * 64,
    )
    outputs = EvaluationOutputs(subject="dpo", scores=(score,)).model_dump(mode="json")
    measured = InputRecord(stage="dpo", key="bbbb" * 16, digest="d2")
    _write(store / "evaluation-dpo", _manifest("evaluation", "cccc", "d3", {"model": measured}, outputs))
    config = PublishStageConfig(
        recipe_name="tiny",
        subject="dpo",
        settings=PublishSettings(),
        recipe={"name": "tiny", "data": {"sft": {"path": "/home/somebody/private/rows.jsonl"}}, "dpo": {"beta": 5.0}},
    )
    inputs = PublishInputs(
        model=str(dpo / "model"),
        evaluations={"evaluation-dpo": str(store / "evaluation-dpo")},
        lineage={"dataset": str(store / "dataset"), "dpo": str(dpo)},
    )
    return {"config": config, "inputs": inputs, "store": store, "tmp": tmp_path}


def _publish(world: dict) -> Path:
    context = _context(world["tmp"] / "publish")
    outputs, _ = build_publication(world["config"], world["inputs"], context)
    return context.folder / outputs.folder


def test_the_folder_is_complete_and_loads(world: dict) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _publish(world)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "lineage.json",
        "model.safetensors",
        "recipe.yaml",
        "scores.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert model_digest(folder) == model_digest(Path(world["inputs"].model))
    AutoModelForCausalLM.from_pretrained(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>\nhi\n<|assistant|>\n"


def test_the_card_says_where_each_number_comes_from_and_nothing_private(world: dict) -> None:
    from huggingface_hub import ModelCard

    folder = _publish(world)
    text = (folder / "README.md").read_text()
    card = ModelCard(text)
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_type, result.metric_type) == (
        0.703,
        "tiny_arithmetic",
        "exact_match,strict-match",
    )
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    row = "| dpo | tiny_arithmetic | exact_match,strict-match | 0.7030 ± 0.0204 | 500 | 0 | lm-eval 0.4.13, task 1.0 |"
    assert row in text
    assert "| dpo | dpo | `bbbbbbbbbbbb` | dataset `aaaaaaaaaaaa` |" in text
    assert "beta: 5.0" in text
    for name in ("README.md", "recipe.yaml", "lineage.json", "scores.json"):
        written = (folder / name).read_text()
        for private in ("somebody", str(world["tmp"]), "secret-host", str(Path.home()) + "/"):
            assert private not in written, (name, private)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["sft"]["path"] == "rows.jsonl"
    assert [record["stage"] for record in json.loads((folder / "lineage.json").read_text())] == ["dataset", "dpo"]


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"repository": "hub/base"}, "post-training of `hub/base` with"),
        (
            {"path": "/home/somebody/base-1b"},
            f"post-training of the local model folder `base-1b` (content `{'d' * 16}`)",
        ),
        ({"scratch": {}}, "post-training of a model made from scratch"),
    ],
)
def test_the_card_says_where_the_base_came_from(world: dict, base: dict, said: str) -> None:
    made = _manifest("base_model", "eeee", "d0", {}, {})
    made = made.model_copy(update={"spec": made.spec.model_copy(update={"externals": {"base_model": "d" * 64}})})
    _write(world["store"] / "base-model", made)
    world["config"] = world["config"].model_copy(update={"recipe": {**world["config"].recipe, "base_model": base}})
    lineage = {"dpo": world["inputs"].lineage["dpo"], "base-model": str(world["store"] / "base-model")}
    world["inputs"] = world["inputs"].model_copy(update={"lineage": lineage})
    folder = _publish(world)
    assert said in (folder / "README.md").read_text()
    nodes = [record["node"] for record in json.loads((folder / "lineage.json").read_text())]
    assert nodes == ["dpo", "base-model"], "in the order of the graph, whenever they were made"


def test_a_secret_in_the_recipe_stops_the_publication(world: dict) -> None:
    recipe = {**world["config"].recipe, "description": "made with hf_abcdefghijklmnopqrstuv"}
    world["config"] = world["config"].model_copy(update={"recipe": recipe})
    with pytest.raises(ValueError, match="secret") as error:
        _publish(world)
    assert "hf_abc" not in str(error.value)


@pytest.mark.parametrize(
    "variable",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "GOOGLE_API_KEY",
        "WANDB_API_KEY",
        "PREFECT_API_KEY",
    ],
)
@pytest.mark.parametrize("place", ["recipe", "lineage", "scores", "config.json", "chat_template.jinja", "weights"])
def test_every_secret_of_the_project_is_found_in_every_file(
    world: dict, monkeypatch: pytest.MonkeyPatch, variable: str, place: str
) -> None:
    secret = "aB3*d_F|h/J+l$n`p=="
    monkeypatch.setenv(variable, secret)
    _put(world, place, secret)
    with pytest.raises(ValueError, match=f"would publish a secret .the value of {variable}.") as error:
        _publish(world)
    assert secret not in str(error.value)
    monkeypatch.delenv(variable)
    shutil.rmtree(world["tmp"] / "publish")
    _publish(world)


def _put(world: dict, place: str, text: str) -> None:
    """A text into what a publication is made from."""
    model = Path(world["inputs"].model)
    if place == "recipe":
        recipe = {**world["config"].recipe, "description": f"with {text} in it"}
        world["config"] = world["config"].model_copy(update={"recipe": recipe})
        return
    if place in ("lineage", "scores"):
        file = world["store"] / ("dataset" if place == "lineage" else "evaluation-dpo") / "manifest.json"
        manifest = json.loads(file.read_text())
        if place == "lineage":
            manifest["environment"]["packages"][text] = "1"
        else:
            manifest["outputs"]["scores"][0]["details"] = {"note": text}
        _write(file.parent, Manifest.model_validate(manifest))
        return
    if place == "weights":
        from safetensors.torch import load_file, save_file

        file = model / "model.safetensors"
        save_file(load_file(file), file, metadata={"format": "pt", "note": text})
    elif place == "config.json":
        file = model / place
        file.write_text(json.dumps({**json.loads(file.read_text()), "note": text}))
    else:
        file = model / place
        file.write_text(f"{{# {text} #}}{file.read_text()}")
    manifest = json.loads((model.parent / "manifest.json").read_text())
    manifest["files"][f"model/{file.name}"] = {"size": file.stat().st_size, "blake3": file_digest(file)}
    _write(model.parent, Manifest.model_validate(manifest))


def test_a_local_folder_in_a_file_of_the_model_stops_the_publication(world: dict) -> None:
    _put(world, "config.json", str(world["tmp"] / "store" / "dpo" / "model"))
    with pytest.raises(ValueError, match=r"config\.json would publish a local folder.*base model"):
        _publish(world)


def test_pickled_weights_are_refused(world: dict) -> None:
    (Path(world["inputs"].model) / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*safetensors"):
        _publish(world)


@pytest.mark.parametrize("missing", ["chat_template.jinja", "generation_config.json", "config.json", "tokenizer.json"])
def test_what_a_user_needs_must_be_there(world: dict, missing: str) -> None:
    (Path(world["inputs"].model) / missing).unlink()
    with pytest.raises(ValueError, match=missing.replace(".", r"\.")):
        _publish(world)


def test_weights_that_changed_since_their_stage_finished_are_refused(world: dict) -> None:
    weights = Path(world["inputs"].model) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="manifest"):
        _publish(world)


def test_an_evaluation_of_another_making_is_refused(world: dict) -> None:
    file = world["store"] / "evaluation-dpo" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["inputs"]["model"]["digest"] = "another"
    _write(file.parent, Manifest.model_validate(manifest))
    with pytest.raises(ValueError, match="another making"):
        _publish(world)


def test_paths_are_cut_and_tokens_found() -> None:
    recipe = {"path": "../data/a.jsonl", "x": ["/abs/b", "owner/name"], "y": {"path": "${HOME}/c.json"}, "n": 1}
    assert without_paths(recipe) == {"path": "a.jsonl", "x": ["b", "owner/name"], "y": {"path": "c.json"}, "n": 1}
    assert find_private("nothing here", ["/secret"]) is None
    assert find_private("in /secret/place", ["", "/secret"]) == "/secret"
    assert find_private("x hf_abcdefghijklmnopqrst y", []) == "hf_abcdefghijklmnopqrst"


# The push.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubDouble() as double:
        monkeypatch.setenv("HF_ENDPOINT", double.endpoint)
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield double


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_model(tmp_path_factory.mktemp("published") / "model")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# tiny\n")
    return folder


def push_model(folder: Path, settings: PublishSettings, token: str | None) -> PushResult:
    return push.push_model(folder, folder_records(folder), settings, token)


def _settings(**changes: object) -> PublishSettings:
    return PublishSettings(**{"repository": REPOSITORY, **changes})


def test_without_repository_or_token_it_stays_local_and_says_why(published: Path) -> None:
    for settings, token, reason in ((PublishSettings(), "hf_x", "repository"), (_settings(), None, "HF_TOKEN")):
        result = push_model(published, settings, token)
        assert not result.pushed and "stayed local" in result.reason and reason in result.reason


@pytest.mark.parametrize(
    "name", ["name", "a/b/c", "me/na me", "me/", "me/x--y", "me/x.git", "../x", "me/x-", "-me/x", "mé/x", "me/x\n"]
)
def test_a_bad_repository_name_is_refused_before_anything(name: str) -> None:
    with pytest.raises(ValidationError, match="owner/name"):
        _settings(repository=name)


@pytest.mark.parametrize(
    "name", ["", "-x", "a..b", "a b", "a.lock", "a.lock/b", "/a", "a/", "a/.b", "@", "refs@{0}", "a" * 201]
)
def test_a_bad_branch_is_refused_before_anything(name: str) -> None:
    with pytest.raises(ValidationError, match="branch"):
        _settings(branch=name)


def test_push_creates_all_files_and_a_second_push_makes_no_commit(hub: HubDouble, published: Path) -> None:
    first = push_model(published, _settings(), hub.token)
    repository = hub.repositories["model", REPOSITORY]
    assert first.pushed and repository.private and first.commit == repository.branches["main"]
    head = repository.at("main")
    assert head is not None
    assert {name: head.files[name] for name in os.listdir(published)} == {
        path.name: path.read_bytes() for path in published.iterdir()
    }
    commits = len(repository.commits)
    second = push_model(published, _settings(), hub.token)
    assert not second.pushed and second.commit == first.commit and "already" in second.reason
    assert len(repository.commits) == commits


def test_changed_content_is_one_commit_and_stale_shards_go(hub: HubDouble, published: Path, tmp_path: Path) -> None:
    old = shutil.copytree(published, tmp_path / "old")
    shutil.copyfile(old / "model.safetensors", old / "model-00002-of-00002.safetensors")
    push_model(old, _settings(), hub.token)
    repository = hub.repositories["model", REPOSITORY]
    commits = len(repository.commits)
    assert push_model(published, _settings(), hub.token).pushed
    assert len(repository.commits) == commits + 1
    head = repository.at("main")
    assert head is not None and "model-00002-of-00002.safetensors" not in head.files
    assert "model.safetensors" in head.files and ".gitattributes" in head.files


def test_a_missing_branch_is_made(hub: HubDouble, published: Path) -> None:
    result = push_model(published, _settings(branch="dpo"), hub.token)
    repository = hub.repositories["model", REPOSITORY]
    assert result.pushed and repository.branches["dpo"] == result.commit
    assert "model.safetensors" not in repository.at("main").files  # type: ignore[union-attr]


def test_a_wrong_token_is_a_clear_error_without_the_token(hub: HubDouble, published: Path) -> None:
    wrong = "hf_wrongwrongwrongwrong"
    for act in (lambda: check_push_access(_settings(), wrong), lambda: push_model(published, _settings(), wrong)):
        with pytest.raises(ValueError, match="does not accept HF_TOKEN") as error:
            act()
        assert wrong not in str(error.value) and error.value.__suppress_context__
    assert not hub.repositories


def test_access_is_checked_before_days_of_training(hub: HubDouble) -> None:
    assert check_push_access(_settings(), hub.token) is None
    assert check_push_access(PublishSettings(), hub.token) is None
    assert not hub.repositories, "looking makes nothing"
    with pytest.raises(ValueError, match=r"under 'other'.*start with: me"):
        check_push_access(_settings(repository="other/tiny"), hub.token)
    hub.role = "read"
    with pytest.raises(ValueError, match="may only read"):
        check_push_access(_settings(), hub.token)


def test_a_run_that_will_not_push_says_so_at_the_start() -> None:
    note = check_push_access(_settings(), None)
    assert note is not None and REPOSITORY in note and "HF_TOKEN is not set: the model will stay local" in note


def test_a_private_model_is_not_pushed_into_a_public_repository(hub: HubDouble, published: Path) -> None:
    """`private: true` was ignored where the repository existed: everybody saw the model."""
    hub.add("model", REPOSITORY, {"README.md": b"# mine"}, private=False)
    for act in (
        lambda: check_push_access(_settings(), hub.token),
        lambda: push_model(published, _settings(), hub.token),
    ):
        with pytest.raises(ValueError, match=r"publish.private is true, and me/tiny exists and is public"):
            act()
    assert len(hub.repositories["model", REPOSITORY].commits) == 1
    assert check_push_access(_settings(private=False), hub.token) is None
    assert push_model(published, _settings(private=False), hub.token).pushed


def test_organisations_and_fine_grained_tokens_are_understood(hub: HubDouble) -> None:
    def scope(kind: str, name: str, *permissions: str) -> dict:
        return {"entity": {"_id": "0", "type": kind, "name": name}, "permissions": list(permissions)}

    hub.orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]
    assert check_push_access(_settings(repository="lab/tiny"), hub.token) is None
    with pytest.raises(ValueError, match=r"only a reader of 'club'.*start with: lab, me$"):
        check_push_access(_settings(repository="club/tiny"), hub.token)
    hub.role, hub.scopes = "fineGrained", [scope("org", "lab", "repo.content.read", "repo.write"), scope("user", "me")]
    assert check_push_access(_settings(repository="lab/tiny"), hub.token) is None
    with pytest.raises(ValueError, match="may write to lab, not to me/tiny, which it must be allowed to create"):
        check_push_access(_settings(), hub.token)
    hub.scopes = [scope("model", REPOSITORY, "repo.write")]
    with pytest.raises(ValueError, match="may write to me/tiny, not to me/tiny, which it must be allowed to create"):
        check_push_access(_settings(), hub.token)
    hub.add("model", REPOSITORY, {}, private=True)
    assert check_push_access(_settings(), hub.token) is None


def test_a_card_that_the_hub_refuses_is_refused_at_the_start(hub: HubDouble, published: Path) -> None:
    with pytest.raises(ValueError, match='"license" must be one of') as error:
        check_push_access(_settings(license="my-own"), hub.token)
    assert error.value.__suppress_context__ and hub.token not in str(error.value)


def test_what_would_be_loaded_beside_the_new_weights_goes_and_notes_stay(hub: HubDouble, published: Path) -> None:
    stale = ["adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "modeling_x.py", "vocab.json",
             "model.safetensors.index.json", "additional_chat_templates/tools.jinja"]  # fmt: skip
    kept = ["LICENSE", "NOTES.md", "figures/loss.png", "eval/results.json", "gguf/x.gguf", "demo/app.py", "runs/x.bin"]
    hub.add("model", REPOSITORY, dict.fromkeys([*stale, *kept], b"old"), private=True)
    assert push_model(published, _settings(), hub.token).pushed
    repository = hub.repositories["model", REPOSITORY]
    assert len(repository.commits) == 2
    assert set(repository.commits[-1].files) == {*kept, *os.listdir(published)}


@pytest.mark.parametrize("damage", ["changed", "added", "gone", "linked", "nothing"])
def test_only_what_the_manifest_names_is_sent(hub: HubDouble, published: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(published, tmp_path / "model")
    records = folder_records(folder) if damage != "nothing" else {}
    if damage == "changed":
        (folder / "README.md").write_text("# other")
    elif damage == "added":
        (folder / "id_rsa").write_text("key")
    elif damage == "gone":
        (folder / "README.md").unlink()
    elif damage == "linked":
        (folder / "README.md").rename(tmp_path / "elsewhere")
        (folder / "README.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is not what its manifest says|is a link"):
        push.push_model(folder, records, _settings(), hub.token)
    assert not hub.repositories


def test_no_permission_and_no_network_are_told_apart(
    hub: HubDouble, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.role = "read"
    with pytest.raises(ValueError, match="403"):
        push_model(published, _settings(), hub.token)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="cannot reach the Hub"):
        check_push_access(_settings(), hub.token)


def test_a_503_on_the_commit_surfaces_and_a_retry_succeeds(hub: HubDouble, published: Path) -> None:
    hub.fail("POST", "/commit/", 503)
    with pytest.raises(ConnectionError, match="503"):
        push_model(published, _settings(), hub.token)
    uploads = sum(method == "PUT" for method, _ in hub.requests)
    assert push_model(published, _settings(), hub.token).pushed
    assert sum(method == "PUT" for method, _ in hub.requests) == uploads  # the weights were there already


def test_a_push_in_between_is_a_connection_error(hub: HubDouble, published: Path) -> None:
    hub.fail("POST", "/commit/", 412)
    with pytest.raises(ConnectionError, match="412"):
        push_model(published, _settings(), hub.token)


_DOWNLOAD = """
import sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM
commit, local = sys.argv[1:]
folder = snapshot_download("me/tiny", revision=commit)
for source, options in ((folder, {}), ("me/tiny", {"revision": commit})):
    ours = AutoModelForCausalLM.from_pretrained(local).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(source, **options).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
print("same weights")
"""

_LOAD_DATASET = """
import datasets, huggingface_hub
rows = datasets.load_dataset("me/rows", split="train", revision="main")
print([row["question"] for row in rows])
print(huggingface_hub.HfApi().dataset_info("me/rows", revision="main").sha)
try:
    huggingface_hub.HfApi().dataset_info("me/rows", revision="nowhere")
except huggingface_hub.errors.RevisionNotFoundError:
    print("no such revision")
"""


def _with_double(hub: HubDouble, home: Path, script: str, *arguments: str) -> str:
    """Run a script whose Hub is the double: HF_ENDPOINT is read when huggingface_hub is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_was_pushed_downloads_with_the_same_weights(hub: HubDouble, published: Path, tmp_path: Path) -> None:
    result = push_model(published, _settings(), hub.token)
    assert "same weights" in _with_double(hub, tmp_path, _DOWNLOAD, str(result.commit), str(published))


def test_the_double_serves_datasets_and_knows_its_revisions(hub: HubDouble, tmp_path: Path) -> None:
    oid = hub.add(
        "dataset", "me/rows", {"train.jsonl": b'{"question": "a"}\n{"question": "b"}\n', "README.md": b"# x\n"}
    )
    printed = _with_double(hub, tmp_path, _LOAD_DATASET)
    assert printed.splitlines()[-3:] == ["['a', 'b']", oid, "no such revision"]
