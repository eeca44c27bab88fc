"""The extraction worker in the command's own process: this machine's cores and one GPU, without Ray."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing

import torch

from stages.device import usable_cores
from stages.extract.worker import (
    MOST_VIDEOS,
    ExtractionJob,
    ExtractionWorker,
    VideoOutcome,
    VideoTask,
    has_room,
    internal_error,
)

_HEARTBEAT_S = 1.0
_TICK_S = 0.05


def process_all(
    tasks: Sequence[VideoTask], job: ExtractionJob, *, on_encoded: Callable[[dict[str, int]], None]
) -> Iterator[tuple[VideoOutcome, int]]:
    """Extract every task and yield each outcome, with its number of attempts (1), as it comes.

    It uses the cores that this process may run on, as a scheduler has set them, and the first GPU that it sees. What
    ends the process ends the extraction: then no video is charged, and the next call goes on.

    Args:
        tasks: what to extract.
        job: what the worker is to do.
        on_encoded: called now and then with the frames of each video in work that have been through the networks.

    Raises:
        UserError: a checkpoint or the cache cannot be opened.
    """
    cores = usable_cores()
    torch.set_num_threads(cores)
    waiting, running = deque(tasks), dict[Future[VideoOutcome], VideoTask]()
    with closing(ExtractionWorker(job, cores=cores)) as worker, ThreadPoolExecutor(MOST_VIDEOS) as threads:
        try:
            while waiting or running:
                while waiting and has_room(
                    [len(task.times_s) for task in running.values()], worker.networks.batch_frames, len(worker.children)
                ):
                    task = waiting.popleft()
                    running[threads.submit(worker.process, task)] = task
                ended = wait(running, _HEARTBEAT_S, FIRST_COMPLETED).done
                if not ended:
                    on_encoded(worker.encoded())
                for future in ended:
                    yield _outcome(future, running.pop(future)), 1
        finally:
            # Stopped in the middle: nobody waits for what they decode, and the threads end with them.
            while wait(running, 0).not_done:
                worker.kill_children()
                time.sleep(_TICK_S)


def _outcome(future: Future[VideoOutcome], task: VideoTask) -> VideoOutcome:
    error = future.exception()
    return future.result() if error is None else internal_error(task.video, error)
