"""A recipe as jobs of a cluster: which nodes run together, on what, after what; what is refused; whose locks hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.launching.jobs import ClusterJob, jobs_of
from smoltulu.flows.launching.render import check_store, local_paths, recipe_text
from smoltulu.flows.launching.settings import LaunchSettings, check_jobs, check_time
from smoltulu.flows.machine import file_systems
from smoltulu.flows.machine.file_systems import Mount, mount_of, mounts, without_locks
from smoltulu.flows.recipe import load_recipe, preset_names
from smoltulu.schemas.compute import ComputeSettings, StageCompute
from smoltulu.schemas.recipe import Recipe
from smoltulu.tasks.data.hub import is_commit
from smoltulu.tasks.stages import STAGES

#: Those of real data need files that are not in the repository.
PRESETS = [name for name in sorted(preset_names()) if not name.startswith("real-")]


def graph_of(preset: str, **overrides: Any) -> Graph:
    recipe = load_recipe(preset, {name.replace("__", "."): value for name, value in overrides.items()})
    return Graph(recipe, unresolved="keep", resolve=lambda reference: "a" * 40)


def by_name(jobs: list[ClusterJob]) -> dict[str, ClusterJob]:
    return {job.name: job for job in jobs}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_node_is_in_one_job_that_waits_for_its_inputs(preset: str) -> None:
    graph = graph_of(preset)
    jobs = jobs_of(graph, cpus_per_device=4)
    assert sorted(node for job in jobs for node in job.nodes) == sorted(graph.nodes)
    job_of = {node: job.name for job in jobs for node in job.nodes}
    reach: dict[str, set[str]] = {}
    for job in jobs:
        assert job.after <= reach.keys(), "a job comes after those that it waits for"
        reach[job.name] = {job.name}.union(*(reach[one] for one in job.after))
        for name in job.nodes:
            node = graph.nodes[name]
            before = {*(one.node for one in node.bindings().values()), *node.after}
            assert {job_of[one] for one in before} <= reach[job.name]
            assert job.num_devices == node.stage.num_devices(graph.compute_of(node))
        if job.is_training:
            assert len(job.nodes) == 1
        for other in job.after:  # none that another one waits for already
            assert not any(other in reach[third] for third in job.after - {other})


def test_the_resources_are_those_of_each_stage() -> None:
    stages = {"sft": {"num_processes": 8, "host_memory_gb": 500}, "evaluation": {"num_threads": 3}}
    jobs = by_name(
        jobs_of(graph_of("smoltulu-1130", compute__num_processes=4, compute__stages=stages), cpus_per_device=6)
    )
    assert (jobs["sft"].num_devices, jobs["sft"].num_cpus, jobs["sft"].memory_gb) == (8, 48, 500)
    assert (jobs["dpo"].num_devices, jobs["dpo"].num_cpus, jobs["dpo"].memory_gb) == (4, 24, None)
    assert (jobs["evaluation-sft"].num_devices, jobs["evaluation-sft"].num_cpus) == (1, 3)
    assert jobs["dataset-sft"].num_devices == 0 and "contamination-sft" in jobs["dataset-sft"].nodes
    assert jobs["preflight-sft"].num_devices == 1, "its dry run runs where the training will"


def test_an_evaluation_that_fails_keeps_no_training_from_its_rows() -> None:
    jobs = jobs_of(graph_of("smoltulu-1130"), cpus_per_device=4)
    waited_for = set().union(*(job.after for job in jobs if job.is_training))
    assert not any(node.startswith("evaluation") for job in jobs if job.name in waited_for for node in job.nodes)


def test_what_is_done_gets_no_job_and_is_waited_for_by_none() -> None:
    graph = graph_of("smoltulu-1130")
    jobs = by_name(jobs_of(graph, cpus_per_device=4, done=graph.ancestors("dpo")))
    assert "sft" not in jobs and "dpo" not in jobs
    assert not any(node in ("sft", "dpo") for job in jobs.values() for node in job.nodes)
    (of_dpo,) = (job for job in jobs.values() if "evaluation-dpo" in job.nodes)
    assert not of_dpo.after, "what it needs is there"


def test_on_cpus_no_job_asks_for_a_gpu() -> None:
    assert {job.num_devices for job in jobs_of(graph_of("tiny", compute__device="cpu"), cpus_per_device=2)} == {0}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_stages_that_run_a_model_ask_for_a_device(stage: Any) -> None:
    runs_model = {
        "samples", "sample_scores", "selection_heads", "selection_scores", "preflight", "sft", "reward_model",
        "reference_logps", "dpo", "pass_rates", "rlvr", "evaluation_cell", "evaluation",
    }  # fmt: skip
    assert stage.uses_device == (stage.name in runs_model)
    assert stage.num_devices(ComputeSettings(device="cpu", num_processes=2)) == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_that_is_written_out_for_its_jobs_keeps_its_keys(preset: str, tmp_path: Path) -> None:
    """Also where a branch on the Hub moves on while its jobs are in the queue."""
    recipe = load_recipe(preset, {})
    graph = graph_at(recipe, "a" * 40)
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe, tmp_path / "store", graph.commits))
    again = load_recipe(str(tmp_path / "recipe.yaml"), {})
    assert again.compute.store == str(tmp_path / "store")
    assert graph.keys() == graph_at(again, "b" * 40).keys()


def graph_at(recipe: Recipe, commit: str) -> Graph:
    """With all branches at a commit."""
    return Graph(recipe, unresolved="keep", resolve=lambda one: one.revision if is_commit(one.revision) else commit)


def test_all_that_a_recipe_reads_from_this_machine_is_known() -> None:
    assert not list(local_paths(load_recipe("smoltulu-1130", {})))
    source = {"path": "/home/me/rows.jsonl", "split": "train", "format": "messages"}
    changes = {
        "chat_template": "/home/me/mine.jinja",
        "data.sft.sources": [source],
        "base_model": {"path": "/models/m"},
    }
    found = set(local_paths(load_recipe("smoltulu-1130", changes)))
    assert found == {"/home/me/rows.jsonl", "/home/me/mine.jinja", "/models/m"}


# ---------------------------------------------------------------------------------------------------------- refusals


def job(name: str, num_devices: int) -> ClusterJob:
    return ClusterJob(name, num_devices, 8, None, leads_on=False, is_training=True)


def test_more_gpus_than_a_machine_has_are_refused() -> None:
    settings = LaunchSettings(devices_per_node=4)
    check_jobs([job("sft", 4)], settings)
    with pytest.raises(
        ValueError, match=r"reward-model runs on 8 GPUs .* a machine has 4 .*at most 4.*stages.reward_model"
    ):
        check_jobs([job("sft", 4), job("reward-model", 8)], settings)


@pytest.mark.parametrize(
    ("hours", "grace", "seconds", "told"),
    [
        (1.0, 300, 3300.0, None),  # 3,600 - 300 are left
        (1.0, 300, 3301.0, r"checkpoints of sft, 55 min .*at least 1\.1 hours.*at most 499"),
        (0.05, 300, 1.0, "--hours 0.05 is 3 min 00 s, of which --grace-seconds 300"),
        (None, 300, 1e9, None),
        (24.0, 300, 24 * 3600.0, "at least 24.1 hours"),
    ],
)  # fmt: skip
def test_a_limit_shorter_than_a_checkpoint_interval_is_refused(
    hours: float | None, grace: int, seconds: float, told: str | None
) -> None:
    settings = LaunchSettings(hours=hours, grace_seconds=grace)
    if told is None:
        assert check_time(settings, {"sft": (seconds, 500)}) == []
    else:
        with pytest.raises(ValueError, match=told):
            check_time(settings, {"sft": (seconds, 500)})


def test_an_interval_that_nobody_knows_is_said() -> None:
    (note,) = check_time(LaunchSettings(hours=2), {"sft": (None, 500), "dpo": (10.0, 500), "rlvr": (None, 5)})
    assert "not known for sft, rlvr" in note and "doctor --gpu" in note
    assert check_time(LaunchSettings(), {"sft": (None, 500)}) == []


@pytest.mark.parametrize("hours", [0, -1, float("nan"), float("inf"), 1e9])
def test_hours_that_are_none_are_refused(hours: float) -> None:
    with pytest.raises(ValueError, match="hours"):
        LaunchSettings(hours=hours)


def test_host_memory_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="host_memory_gb"):
        StageCompute(host_memory_gb=0)


# ------------------------------------------------------------------------------------------------------------- locks

TABLE = r"""/dev/sda1 / ext4 rw,relatime 0 0
server:/home /home nfs4 rw,vers=4.2,local_lock=none,addr=10.0.0.1 0 0
server:/old /home/old nfs rw,vers=3,nolock,local_lock=all 0 0
mds@tcp:/scratch /scratch lustre rw,flock,lazystatfs 0 0
mds@tcp:/fast /mnt/with\040blank lustre rw,lazystatfs 0 0
user@host:/x /mnt/ssh fuse.sshfs rw,user_id=0 0 0
ceph /mnt/ceph fuse.ceph-fuse rw 0 0
tmpfs /home/ram tmpfs rw 0 0
over /home/ram tmpfs rw,size=1k 0 0
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind", "why"),
    [
        ("/var/store", "ext4", None),
        ("/home/me/store", "nfs4", None),
        ("/homeless", "ext4", None),
        ("/home/old/store", "nfs", "mounted with nolock"),
        ("/scratch/store", "lustre", None),
        ("/mnt/with blank/store", "lustre", "mounted without flock"),
        ("/mnt/ssh/store", "fuse.sshfs", "locks stay on one machine"),
        ("/mnt/ceph", "fuse.ceph-fuse", None),
    ],
)
def test_whose_locks_hold_between_machines(path: str, kind: str, why: str | None) -> None:
    mount = mount_of(Path(path), mounts(TABLE))
    assert mount is not None and mount.kind == kind
    said = without_locks(mount)
    assert said is None if why is None else said is not None and why in said and mount.folder in said


def test_of_two_mounts_of_one_folder_the_last_counts() -> None:
    mount = mount_of(Path("/home/ram/a"), mounts(TABLE))
    assert mount is not None and "size=1k" in mount.options


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("lustre", {"localflock"}, "mounted with localflock"),
        ("nfs", {"local_lock=flock"}, "local_lock=flock"),
        ("nfs4", {"local_lock=posix"}, None),  # which is not what is used here
        ("cifs", {"nobrl"}, "nobrl"),
        ("fuse.gcsfuse", set(), "one machine"),
        ("9p", {"trans=virtio"}, "one machine"),
        ("gpfs", set(), None),
        ("beegfs", set(), None),
    ],
)
def test_mounts_without_locks(kind: str, options: set[str], why: str | None) -> None:
    said = without_locks(Mount("/x", kind, frozenset(options)))
    assert said is None if why is None else said is not None and why in said


def test_a_shared_folder_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "see that the machines of the cluster share it" in "".join(check_store(tmp_path)) or not check_store(
        tmp_path
    )
    bad = Mount(str(tmp_path), "nfs", frozenset({"nolock"}))
    monkeypatch.setattr("smoltulu.flows.launching.render.mount_of_folder", lambda folder: bad)
    with pytest.raises(ValueError, match="nfs, mounted with nolock, so that two machines would write one artifact"):
        check_store(tmp_path / "store")
    bad = Mount(str(tmp_path), "beegfs", frozenset({"rw", "cfgFile=/etc/beegfs/beegfs-client.conf"}))
    (told,) = check_store(tmp_path / "store")  # its mount does not say what it is set to
    assert "tuneUseGlobalFileLocks" in told


def test_this_machine_says_what_a_folder_is_on(tmp_path: Path) -> None:
    mount = file_systems.mount_of_folder(tmp_path / "not" / "there")
    assert mount is not None and mount.kind
