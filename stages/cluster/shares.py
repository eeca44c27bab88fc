"""Who gets which share of a cluster: extraction workers and the trainings of a study."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray

from stages.config import ExtractConfig
from stages.errors import UserError
from stages.wording import counted


class WorkerPlace(NamedTuple):
    """Where an actor runs: a node by preference, the GPUs it needs, and the share of the node's cores it may use."""

    node_id: str
    num_gpus: int
    cores: int


def places_on(nodes: Sequence[dict[str, Any]], num_tasks: int, config: ExtractConfig) -> list[WorkerPlace]:
    """An actor for each GPU of the cluster, or for each node without any; a node's cores are divided among its own.

    With `model_actors` set, so many on each node, as far as its GPUs (or without any GPU its cores) go.

    Args:
        nodes: as `ray.nodes()` lists them.
        num_tasks: there is no use for more actors than that.
        config: how many actors per node.

    Raises:
        UserError: no node has a CPU core to give.
    """
    able = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    with_gpu = [node for node in able if node["Resources"].get("GPU", 0) >= 1]
    places = []
    for node in with_gpu or able:
        cores = int(node["Resources"]["CPU"])
        most = min(cores, int(node["Resources"]["GPU"])) if with_gpu else cores
        actors = min(most, config.model_actors or (most if with_gpu else 1))
        places += [WorkerPlace(node["NodeID"], int(bool(with_gpu)), cores // actors)] * actors
    if not places:
        raise UserError("no node of the Ray cluster has a CPU core to give", hint="start a node with CPU cores")
    return places[: max(1, num_tasks)]


@dataclass(frozen=True)
class Share:
    """How many trials run at once, and what each may use."""

    parallel: int
    cpus: float
    gpus: float


def share_of(parallel: int | None, cpus: float | None, gpus: float | None, *, trials: int, cores_wanted: int) -> Share:
    """Divide what the cluster has among trials; call it inside `stages.cluster.connect.cluster`.

    Args:
        parallel: trials at once; None means one for each GPU, or without any as many as have their cores.
        cpus: cores of each; None means an equal share.
        gpus: GPUs of each, may be a fraction; None means an equal share of at most one.
        trials: how many there are; no more run at once.
        cores_wanted: cores that a trial can use at least, if `parallel` is None.

    Raises:
        UserError: no node has what one trial is to get.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores, devices = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    parallel = min(trials, parallel or max(1, int(devices or cores // (cpus or cores_wanted))))
    if gpus is None:
        gpus = min(1.0, devices / parallel) if devices else 0.0
    widest = max((node.get("CPU", 0) for node in nodes if node.get("GPU", 0) >= min(gpus, 1)), default=0)
    if cpus is None:
        cpus = cores / parallel
        cpus = float(min(int(cpus), int(widest))) if cpus >= 1 else cpus
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise UserError(
            f"no node has {counted(cpus, 'CPU core')} and {counted(gpus, 'GPU')} for one training",
            received=f"nodes with {', '.join(_resources(node) for node in nodes)}",
            hint="give less with --cpus and --gpus",
        )
    return Share(parallel, cpus, gpus)


def _resources(node: dict[str, float]) -> str:
    return f"{counted(node.get('CPU', 0), 'core')} and {counted(node.get('GPU', 0), 'GPU')}"
