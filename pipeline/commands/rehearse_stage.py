"""One stage of a rehearsal in a process of its own: `python -m pipeline.commands.rehearse_stage STAGE FOLDER PARENT`.

What it took is written into `FOLDER/STAGE.json`, as `Cost` has it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.settings.config import PipelineConfig, load_yaml
from stages.atomic import atomic_write_text
from stages.errors import LackOfMemoryError, UserError
from stages.free_memory import data_held, free_memory, limit_memory, peak_memory
from stages.process_tree import die_with

CONFIG = "rehearsal.yaml"
"""The configuration, in FOLDER."""


@dataclass(frozen=True)
class Cost:
    """What a stage took, or how it failed.

    Attributes:
        work: what it did.
        loading_s: seconds until the networks were ready.
        seconds: seconds of the work itself.
        cpu_s: seconds of all cores, of both.
        peak_bytes: most memory of its process; the decode child, which is limited by `extract.memory_gb`, comes on top.
        gpu_bytes: most memory that torch had of the GPU; None without one.
        free_bytes: of the device, when it began, with what the process held of a CPU's memory then.
        fits: whether the memory was enough.
        error: a mistake that the user can mend.
    """

    work: str = ""
    loading_s: float = 0.0
    seconds: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    gpu_bytes: int | None = None
    free_bytes: int = 0
    fits: bool = True
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return self.fits and self.error is None


# What a stage did, and the seconds that it took once its networks were ready.
_Done = tuple[str, float]


def _extract(config: PipelineConfig) -> _Done:
    """Decode the video, take its frames through both networks, commit them: `pipeline extract` without Ray."""
    from pipeline.commands.extract import prepare_extraction
    from stages.extract.worker import ExtractionWorker

    extraction, _ = prepare_extraction(config, retry_failed=False, refresh_changed=False)
    with closing(ExtractionWorker(extraction.job)) as worker:
        started = time.perf_counter()
        try:
            summary = extraction.run(lambda tasks: ((worker.process(task), 1) for task in tasks), lambda *_: None)
        except UserError as error:
            if not worker.networks.try_empty(1):
                raise MemoryError from error
            raise
        seconds = time.perf_counter() - started
    for video, reason in summary.failed.items():
        raise UserError(reason, where=video)
    return f"{summary.frames_now} frames, encoder and teacher", seconds


def _train(config: PipelineConfig) -> _Done:
    """One optimizer step on the clip, as `pipeline train` takes it."""
    from pipeline.runs.training import prepare_training
    from pipeline.settings.locations import run_folder
    from stages.batches.feed import feed
    from stages.batches.windows import Drawn
    from stages.train.trial import timed_step

    trainer, loaded, _ = prepare_training(config, run_folder(config), stop=lambda: False)
    first = [[Drawn(0, config.train.seed, 0)]]
    parts = list(feed(trainer.data.train, first, loaded.tokenizers, workers=0))
    seconds = timed_step(trainer.stepper, parts)
    return f"1 step, 1 clip of {parts[0].stored.features.shape[1]} frames", seconds


def _answer(config: PipelineConfig) -> _Done:
    """The clip's question, answered by beam search."""
    from pipeline.runs.cached_data import find_training_data
    from pipeline.runs.models import build_for_training
    from stages.batches.feed import feed
    from stages.batches.windows import WindowDataset
    from stages.evaluate.answering import predict_batches

    found = find_training_data(config)
    loaded = build_for_training(config, found.cache, found.train[0])
    data = WindowDataset(found.cache, found.train, tolerance_s=config.cache.tolerance_s, with_targets=False)
    started = time.perf_counter()
    batches = feed(data, [range(1)], loaded.tokenizers, workers=0)
    compute = loaded.compute.device, loaded.compute.dtype
    (answered,) = predict_batches(loaded.model, batches, loaded.tokenizers, config.language, *compute)
    return f"1 answer, {len(answered.answers)} beams", time.perf_counter() - started


STAGES: dict[str, Callable[[PipelineConfig], _Done]] = {"extract": _extract, "train": _train, "answer": _answer}
"""In this order: each works on what the one before has left in the folder."""


def main() -> None:
    """Run the stage and write down what it took."""
    name, folder, parent = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    die_with(parent)
    cost = _cost_of(STAGES[name], load_yaml(folder / CONFIG))
    atomic_write_text(folder / f"{name}.json", json.dumps(asdict(cost)))


def _cost_of(stage: Callable[[PipelineConfig], _Done], config: PipelineConfig) -> Cost:
    import torch

    from stages.device import is_out_of_memory, pick_device

    on_gpu = pick_device().type == "cuda"
    # On a CPU, what this process holds already counts in its peak and under its limit, too.
    free = torch.cuda.mem_get_info()[0] if on_gpu else free_memory(torch.device("cpu")) + data_held()
    if not on_gpu:
        limit_memory(free)
    started, work, seconds, fits, error = time.perf_counter(), "", 0.0, True, None
    try:
        work, seconds = stage(config)
    except Exception as raised:
        causes = [raised]
        while (cause := causes[-1].__cause__) is not None and isinstance(cause, Exception):
            causes.append(cause)
        fits = not any(isinstance(one, LackOfMemoryError) or is_out_of_memory(one) for one in causes)
        if fits and not isinstance(raised, UserError):
            raise
        error = str(raised) if fits else None
    spent = time.perf_counter() - started
    times = os.times()
    return Cost(
        work=work,
        loading_s=spent - seconds,
        seconds=seconds,
        cpu_s=times.user + times.system + times.children_user + times.children_system,
        peak_bytes=peak_memory(),
        gpu_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        free_bytes=free,
        fits=fits,
        error=error,
    )


if __name__ == "__main__":
    main()
