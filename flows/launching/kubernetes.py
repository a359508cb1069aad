"""The jobs of a recipe as Kubernetes manifests: a ConfigMap with the recipe, and a Job for each.

Kubernetes has no order among Jobs: one that waits for others is `suspend`ed, and the lines at the top of the output
resume it once they are complete. A pod that is evicted, preempted or stopped as asked (status 143) counts as no
failure: a new one goes on from the checkpoint. Fields: Kubernetes API 1.31, batch/v1.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from smoltulu.flows.launching.jobs import ClusterJob
from smoltulu.flows.launching.settings import LAST_SECONDS, STOPPED, LaunchSettings

_MAX_NAME = 63  # of a Job, which is a label of its pods
_MAX_CONFIG_BYTES = 1_000_000  # of a ConfigMap, which Kubernetes takes up to 1 MiB of
_RECIPE_FOLDER = "/etc/smoltulu"
_CONTAINER = "stage"
#: Failures of a job that are not the cluster's doing: a few, as a node may be broken.
_NUM_RETRIES = 2


def check(settings: LaunchSettings, store: str, remote: str | None, paths: Sequence[str]) -> None:
    """ValueError where pods could not share what they make, or read what the recipe names.

    store, paths: folders as the recipe names them, variables expanded; paths: of data and models.
    """
    if not settings.image:
        raise ValueError(
            "--image: name the container image that the pods run, e.g. registry.example.org/smoltulu:1; the Dockerfile "
            "of the repository makes one"
        )
    if settings.claim is None and remote is None:
        raise ValueError(
            "pods share nothing: name a volume claim that all machines may write to (--claim, access mode "
            "ReadWriteMany), or a shared store (compute.remote)"
        )
    if not settings.mount.startswith("/") or settings.mount.rstrip("/") == "" or ":" in settings.mount:
        raise ValueError(f"--mount {settings.mount!r:.80}: give an absolute path other than /, without a colon")
    if settings.claim is not None and not _is_below(store, settings.mount):
        raise ValueError(
            f"compute.store is {store}, which is not below {settings.mount}, where the claim {settings.claim} is "
            f"mounted; set compute.store to {settings.mount.rstrip('/')}/store (-o compute.store=...), or --mount"
        )
    for path in paths:
        if settings.claim is None or not _is_below(path, settings.mount):
            raise ValueError(
                f"{path} is on this machine, and pods see only what is below {settings.mount}; put it on the volume "
                "(--claim, --mount) and name it by its path there"
            )


def _is_below(path: str, folder: str) -> bool:
    here, there = PurePosixPath(path), PurePosixPath(folder)
    return ".." not in here.parts and there in here.parents


def object_name(recipe: str, node: str, digest: str) -> str:
    """A name as Kubernetes takes it (RFC 1123 label), another one for every recipe and node."""
    mark = hashlib.sha256(f"{digest}/{node}".encode()).hexdigest()[:8]
    plain = re.sub(r"[^a-z0-9]+", "-", f"{recipe}-{node}".lower()).strip("-")
    return f"{plain[: _MAX_NAME - 9].rstrip('-') or 'smoltulu'}-{mark}"


def manifests(jobs: Sequence[ClusterJob], settings: LaunchSettings, name: str, recipe: str) -> list[dict[str, Any]]:
    """The ConfigMap and the Jobs. ValueError where the recipe is too large for a ConfigMap."""
    if len(recipe.encode()) > _MAX_CONFIG_BYTES:
        raise ValueError(
            f"the recipe has {len(recipe.encode()):,} bytes, and a ConfigMap holds {_MAX_CONFIG_BYTES:,}; put a chat "
            "template or lists of it into files on the volume"
        )
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    shared = object_name(name, "recipe", digest)
    labels = {"app.kubernetes.io/name": "smoltulu", "app.kubernetes.io/instance": shared}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": shared, "labels": labels},
              "data": {"recipe.yaml": recipe}}  # fmt: skip
    named = {job.name: object_name(name, job.name, digest) for job in jobs}
    return [config, *(_job(job, settings, named, shared, labels) for job in jobs)]


def _job(
    job: ClusterJob, settings: LaunchSettings, named: dict[str, str], config: str, labels: dict[str, str]
) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "recipe", "configMap": {"name": config}},
        # Processes of a stage pass tensors through it; Docker gives 64 MiB.
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        {"name": "data", "persistentVolumeClaim": {"claimName": settings.claim}}
        if settings.claim is not None
        else {"name": "data", "emptyDir": {}},
    ]
    mounts = [
        {"name": "recipe", "mountPath": _RECIPE_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "data", "mountPath": settings.mount},
    ]
    requests: dict[str, str] = {"cpu": str(job.num_cpus)}
    limits: dict[str, str] = {}
    if job.memory_gb is not None:
        requests["memory"] = limits["memory"] = str(round(job.memory_gb * 1e9))
    if job.num_devices:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = str(job.num_devices)
    container = {
        "name": _CONTAINER,
        "image": settings.image,
        "command": ["python", "-P", "-m", "smoltulu.flows.local", f"{_RECIPE_FOLDER}/recipe.yaml"],
        "args": ["--grace-seconds", str(settings.grace_seconds - LAST_SECONDS), "--nodes", *job.nodes],
        # Caches and state of a pod that is gone should be found by the next one.
        "env": [
            {"name": "HF_HOME", "value": f"{settings.mount.rstrip('/')}/huggingface"},
            {"name": "SMOLTULU_HOME", "value": f"{settings.mount.rstrip('/')}/home"},
        ],
        "envFrom": [{"secretRef": {"name": "smoltulu", "optional": True}}],  # HF_TOKEN, credentials of a shared store
        "resources": {"requests": requests, "limits": limits},
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "automountServiceAccountToken": False,
        # The user of the Dockerfile's image; a volume of millions of files is not walked at every start.
        "securityContext": {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"},
        "containers": [container],
        "volumes": volumes,
    }
    if settings.hours is not None:
        pod["activeDeadlineSeconds"] = round(settings.hours * 3600)
    rules: list[dict[str, Any]] = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": [STOPPED]}},
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": named[job.name],
            "labels": labels,
            "annotations": {
                "smoltulu/nodes": " ".join(job.nodes),
                "smoltulu/after": " ".join(named[one] for one in sorted(job.after)),
            },
        },
        "spec": {
            "suspend": bool(job.after),
            "backoffLimit": _NUM_RETRIES,
            "podFailurePolicy": {"rules": rules},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def render(
    jobs: Sequence[ClusterJob], settings: LaunchSettings, *, name: str, recipe: str, notes: Sequence[str] = ()
) -> str:
    """The manifests as YAML, with the commands that apply them and resume those that wait."""
    made = manifests(jobs, settings, name, recipe)
    text = yaml.dump_all(made, Dumper=_Readable, sort_keys=False, allow_unicode=True)
    return "".join([*_head(made, name, notes), text])


class _Readable(yaml.SafeDumper):
    """Texts of several lines as they are, where YAML can hold them so."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Readable.add_representer(str, _Readable.represent_str)


def _head(made: list[dict[str, Any]], name: str, notes: Sequence[str]) -> Iterator[str]:
    yield f"# Recipe {name} as {len(made) - 1} Kubernetes Jobs, rendered by `smoltulu launch --print kubernetes`.\n"
    yield "# Credentials: a Secret called smoltulu, whose entries become environment variables (HF_TOKEN, ...).\n"
    for note in notes:
        yield f"# {' '.join(note.split())}\n"
    yield "# kubectl apply -f THIS_FILE, then resume the Jobs that wait, in this order:\n"
    for job in made[1:]:
        if job["spec"]["suspend"]:
            after = [f"job/{one}" for one in job["metadata"]["annotations"]["smoltulu/after"].split()]
            wait = shlex.join(["kubectl", "wait", "--for=condition=complete", "--timeout=-1s", *after])
            resume = f'kubectl patch job/{job["metadata"]["name"]} -p \'{{"spec":{{"suspend":false}}}}\''
            yield f"#   {wait} && {resume}\n"
