"""One of the processes that train a run together: which it is, where all meet, and what it uses of its machine.

`torchrun`, `srun` and `pipeline train --processes` start such processes. Each reads its rank from torch's variables
(RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or from Slurm's where those are not set. All
see the folders of cache and runs under the same paths.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from stages import own_code
from stages.device import pick_device, usable_cores
from stages.errors import UserError
from stages.signals import is_interrupted
from stages.train.group import ProcessGroup
from stages.wording import counted

# All have to be started by then.
_MEETING_LIMIT = timedelta(minutes=10)
# Rank 0 may write a checkpoint meanwhile, or all read a large model from a slow disk.
_COLLECTIVE_LIMIT = timedelta(hours=1)
# Below the ports that Linux gives away by itself.
_FIRST_PORT, _PORTS = 20_000, 10_000


@dataclass(frozen=True)
class Place:
    """Which of the processes this is.

    Attributes:
        rank: among all, from 0.
        size: how many there are.
        local_rank: among those of its machine; the index of its GPU.
        local_size: how many its machine has.
        restarts: how often torch's agent has started all of them again.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    restarts: int


def place_in(environment: Mapping[str, str]) -> Place | None:
    """The place that torch's variables name; None in a process that was started by itself.

    Raises:
        UserError: RANK is set and another variable is missing, or one is no number.
    """
    if "RANK" not in environment:
        return None
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise UserError(f"RANK is set, but {name} is not", hint="start training processes with torchrun or srun")
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        local_size = int(environment.get("LOCAL_WORLD_SIZE", local_rank + 1))
        return Place(rank, size, local_rank, local_size, int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)))
    except ValueError as error:
        raise UserError(f"RANK or a variable like it is no number: {error}") from error


def variables_of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Torch's variables for a task of `srun`; none in any other process, or where torch's are set.

    A batch script has SLURM_PROCID, too; only tasks of `srun` have SLURM_STEP_NUM_TASKS. MASTER_ADDR is the first node
    of the step, and MASTER_PORT a number that all tasks work out from the ids of job and step, unless they are set. A
    task that was given GPUs of its own (--gpus-per-task, --ntasks-per-gpu) sees no others: it is the only one of its
    machine.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in environment or "SLURM_PROCID" not in environment or tasks == 1:
        return {}
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    ids = int(environment.get("SLURM_JOB_ID", 0)) + int(environment.get("SLURM_STEP_ID", 0))
    first = first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")) if nodes > 1 else "127.0.0.1"
    is_alone = not environment.keys().isdisjoint(("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if is_alone else environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": "1" if is_alone else str(-(-tasks // nodes)),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first),
        "MASTER_PORT": environment.get("MASTER_PORT", str(_FIRST_PORT + ids % _PORTS)),
    }


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: `gpu[03-05,9],login1` -> `gpu03`."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    assert found is not None  # every part may be empty
    return "".join(part or "" for part in found.groups())


class TrainingProcess:
    """This process, once all have met.

    Args:
        place: which it is.
        store: what all can write to and read from.
    """

    def __init__(self, place: Place, store: dist.Store) -> None:
        self.place, self._store = place, store

    def is_first_to(self, what: str) -> bool:
        """Whether no other process has asked this before; False where the store is gone with its process."""
        try:
            return self._store.add(f"first to {what}", 1) == 1
        except dist.DistError:
            return False

    def require_same_code(self) -> None:
        """UserError where rank 0 runs other code."""
        if self.place.rank == 0:
            self._store.set("code", own_code.digest())
        own_code.require_same(self._store.get("code").decode())

    def join(self) -> ProcessGroup:
        """The group of all, for training; from now on this process keeps to its GPU, or to its share of the cores.

        Raises:
            UserError: the machine has GPUs, but not one for each of its processes.
        """
        device, place = pick_device(), self.place
        if device.type == "cuda":
            gpus = torch.cuda.device_count()
            if gpus < place.local_size:
                raise UserError(
                    f"this machine has {counted(gpus, 'GPU')}, one for each training process",
                    received=counted(place.local_size, "process", "processes"),
                    allowed=f"1 to {gpus}",
                )
            torch.cuda.set_device(place.local_rank)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cores() // place.local_size))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("training", self._store),
            rank=place.rank,
            world_size=place.size,
            timeout=_COLLECTIVE_LIMIT,
        )
        return ProcessGroup(device, _COLLECTIVE_LIMIT)


@contextmanager
def met(place: Place) -> Iterator[TrainingProcess]:
    """Wait until all processes are there, and be one of them within the block.

    What fails in one process makes others fail: the block's exception goes on in the first process that has one, the
    others end without a word.

    Raises:
        UserError: the others are not there, or run other code.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.size, timeout=_MEETING_LIMIT))
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the training processes could not meet: {error}", where=where, exit_code=1) from error
    # The agent's store outlives processes that it starts again.
    process = TrainingProcess(place, dist.PrefixStore(f"start {place.restarts}", store))
    try:
        process.require_same_code()
        yield process
    except Exception as error:
        if is_interrupted() or process.is_first_to("fail"):
            raise
        raise SystemExit(error.exit_code if isinstance(error, UserError) else 1) from error
    if dist.is_initialized():
        dist.destroy_process_group()
