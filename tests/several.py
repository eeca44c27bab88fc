"""A function in several processes that are one gloo group: forked from one that has imported torch."""

import multiprocessing
import queue
import time
from datetime import timedelta


def together(function, size, folder, *arguments, deadline_s=150.0):
    """What `function(group, *arguments)` returns in each process, by rank; an exception there is raised here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "pipeline.commands.train"])
    found = context.Queue()
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    processes = [
        context.Process(target=_member, args=(function, rank, size, meeting, found, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        answers = [found.get(timeout=deadline_s) for _ in range(size)]
    except queue.Empty:
        raise AssertionError("a process has not answered") from None
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    for _, error, _ in answers:
        if error is not None:
            raise error
    return [answer for _, _, answer in sorted(answers, key=lambda one: one[0])]


def _member(function, rank, size, meeting, found, arguments):
    import torch
    import torch.distributed as dist

    from stages.train.group import ProcessGroup

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    answer, failure = None, None
    try:
        answer = function(ProcessGroup(torch.device("cpu"), timedelta(minutes=5)), *arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, the test is to see it
        failure = error
    found.put((rank, failure, answer))
