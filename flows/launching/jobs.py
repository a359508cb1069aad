"""Which nodes of a recipe run together as one job of a cluster, on what, and after which other jobs. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from smoltulu.flows.graphs.nodes import Node, NodeGraph


@dataclass
class ClusterJob:
    """Nodes that run one after the other in one allocation.

    name         of its first node, and so unique
    num_devices  GPUs; 0: none of its nodes computes with a model
    num_cpus     CPU cores
    memory_gb    main memory, 10^9 bytes; None: what the cluster gives
    after        names of the jobs that must have succeeded
    leads_on     whether a training waits for it
    """

    name: str
    num_devices: int
    num_cpus: int
    memory_gb: float | None
    leads_on: bool
    is_training: bool
    nodes: list[str] = field(default_factory=list)
    after: set[str] = field(default_factory=set)


def jobs_of(graph: NodeGraph, cpus_per_device: int, done: Collection[str] = ()) -> list[ClusterJob]:
    """The jobs of a graph, each after those that it waits for. Nodes in `done` are there already.

    A training is a job of its own. Other nodes share one where they need the same, wait for nothing that it does not
    wait for, and as many wait for them: a job more is a place in the queue more, and an evaluation that fails must not
    keep a training from its rows.
    """
    leading = _leading(graph)
    jobs: dict[str, ClusterJob] = {}
    job_of: dict[str, str] = {}
    ancestors: dict[str, set[str]] = {}  # of jobs, themselves included
    for name, node in graph.nodes.items():
        if name in done:
            continue
        wanted = _job_for(graph, node, cpus_per_device, name in leading)
        waits_for = {job_of[one] for one in _before(node) if one in job_of}
        for job in jobs.values():
            alike = (job.num_devices, job.num_cpus, job.memory_gb, job.leads_on, job.is_training)
            is_same = alike == (wanted.num_devices, wanted.num_cpus, wanted.memory_gb, wanted.leads_on, False)
            # It then waits for no other job than before, so that no two can come to wait for each other.
            if not wanted.is_training and is_same and waits_for <= ancestors[job.name]:
                wanted = job
                break
        else:
            jobs[name] = wanted
            wanted.after = {one for one in waits_for if not _is_implied(one, waits_for, ancestors)}
            ancestors[name] = {name}.union(*(ancestors[one] for one in waits_for))
        wanted.nodes.append(name)
        job_of[name] = wanted.name
    return list(jobs.values())


def _job_for(graph: NodeGraph, node: Node, cpus_per_device: int, leads_on: bool) -> ClusterJob:
    compute = graph.compute_of(node)
    num_devices, num_ranks = node.stage.num_devices(compute), node.stage.num_ranks(compute)
    num_cpus = compute.num_threads * num_ranks if compute.num_threads else cpus_per_device * max(num_ranks, 1)
    return ClusterJob(node.name, num_devices, num_cpus, compute.host_memory_gb, leads_on, node.stage.is_training)


def _before(node: Node) -> set[str]:
    return {*(binding.node for binding in node.bindings().values()), *node.after}


def _leading(graph: NodeGraph) -> set[str]:
    """Nodes that a training waits for, trainings left out unless another one waits for them."""
    leading: set[str] = set()
    for name, node in reversed(graph.nodes.items()):
        if node.stage.is_training or name in leading:
            leading |= _before(node)
    return leading


def _is_implied(job: str, others: Collection[str], ancestors: dict[str, set[str]]) -> bool:
    return any(job in ancestors[other] for other in others if other != job)
