"""Two processes in one gloo group, on their own: what they agree on, refuse and share."""

import json
import os
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from model.diff_lmm import DiffLMM
from pipeline.commands import train as command
from pipeline.runs import training
from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.errors import UserError
from stages.train.group import ProcessGroup
from tests.several import together
from tests.training_world import SETTINGS, dropping_out, make, near, rows_of

STEPS = 8  # of one epoch


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def alone(world):
    """The run of one process."""
    os.chdir(world.folder)
    return command.run(settings(world, "alone"), resume=False, as_json=False)


@pytest.fixture(scope="module")
def alone_dropping_out(world):
    """The run of one process with dropout."""
    os.chdir(world.folder)
    return command.run(settings(world, "alone-dropping-out", dropping_out(world)), resume=False, as_json=False)


def settings(world, name, *more):
    options = {
        "data.dataset": str(world.folder / "card.yaml"),
        "data.annotations": str(world.folder),
        "cache.root": str(world.cache),
        "run.folder": str(world.folder / "runs"),
        "run.name": name,
    }
    return resolve(preset="tiny", options=options, overrides=[*SETTINGS, "train.epochs=1", *more])


def waits_of(_group):
    """How long a process that has a GPU waits for the others in the CPU's memory."""
    of_cpus = ProcessGroup(torch.device("cuda"), timedelta(minutes=75))._of_cpus
    return of_cpus._get_backend(torch.device("cpu")).options._timeout


def test_beside_a_gpu_what_lies_in_the_cpus_memory_is_waited_for_as_long_as_all_else(tmp_path):
    assert together(waits_of, 1, tmp_path) == [timedelta(minutes=75)]


def fit(group, resolved, stop_at=None):
    """Train in one process of a group; the second of them is asked to stop after so many steps."""
    config, taken = resolved.config, []

    def stop():
        return stop_at is not None and group.rank == 1 and len(taken) >= stop_at

    path = locations.run_folder(config)
    try:
        trainer, loaded, stamp = training.prepare_training(config, path, stop, group)
        if group.rank == 0:
            training.begin(path, config, loaded, stamp, resume=False)
        ending = trainer.fit(taken.append)
    except UserError as error:
        return str(error)
    return ending.at.step, ending.stopped, len(trainer.data.train), kept_numbers(trainer.model.language)


def kept_numbers(module):
    """Numbers of a network that lie in this process."""
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in module.parameters())


def run_of(world, name):
    return world.folder / "runs" / name


def test_parts_of_each_processs_share_add_up_to_the_batch_and_drop_out_the_same(world, alone_dropping_out, tmp_path):
    together(fit, 2, tmp_path, settings(world, "parts", "train.micro_batch_size=1", dropping_out(world)))
    near(run_of(world, "parts"), alone_dropping_out)


def short_of_memory(group, resolved):
    """Train; in the second process nothing but a single clip ever fits."""
    if group.rank == 1:
        real = DiffLMM.forward_backward

        def one_at_most(model, clips, **more):
            if len(clips.features) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(model, clips, **more)

        DiffLMM.forward_backward = one_at_most
    return fit(group, resolved)


def test_one_of_two_that_runs_out_of_memory_takes_its_share_in_smaller_parts_while_the_other_waits(
    world, alone, tmp_path
):
    together(short_of_memory, 2, tmp_path, settings(world, "short", "train.micro_batch_size=2"))
    near(run_of(world, "short"), alone)


def weights_of(group, resolved, counts):
    """What the answer tokens of this process's share of the samples weigh."""
    trainer, _, _ = training.prepare_training(resolved.config, locations.run_folder(resolved.config), bool, group)
    own = len(counts) // group.size
    masks = torch.arange(9) < torch.tensor(counts[group.rank * own : (group.rank + 1) * own])[:, None]
    stored = SimpleNamespace(answer=SimpleNamespace(answer_mask=masks), targets=None)
    (share,) = trainer.stepper._shares([SimpleNamespace(stored=stored, samples=range(own))])
    return share.answer.tolist()


def test_groups_of_samples_that_two_processes_share_are_those_of_one(world, tmp_path):
    """Of six samples in groups of four, the first group lies on both."""
    counts, resolved = [1, 2, 3, 4, 5, 6], settings(world, "groups", "train.answer_loss_samples=4")
    first, second = 1 / (2 * (1 + 2 + 3 + 4)), 1 / (2 * (5 + 6))
    found = together(weights_of, 2, tmp_path, resolved, counts)
    assert [*found[0], *found[1]] == pytest.approx([first] * 4 + [second] * 2)


def test_with_the_language_model_in_pieces_the_losses_and_answers_are_the_same(world, alone, tmp_path):
    resolved = settings(world, "pieces", "train.shard_language=fsdp")
    found = together(fit, 2, tmp_path, resolved)
    near(run_of(world, "pieces"), alone)
    _, loaded, _ = training.prepare_training(settings(world, "other").config, run_of(world, "other"), bool)
    whole = kept_numbers(loaded.model.language)
    layers = sum(p.numel() for p in loaded.model.language.model.model.layers.parameters())
    assert [answer[-1] for answer in found] == [whole - layers // 2] * 2


def test_all_stop_after_the_step_at_which_one_is_asked_to_and_the_first_saves_it(world, tmp_path):
    found = together(fit, 2, tmp_path, settings(world, "stopped", "train.save_every_steps=100"), 3)
    assert [answer[:2] for answer in found] == [(3, True)] * 2
    assert len(rows_of(run_of(world, "stopped"))) == 3
    index = json.loads((run_of(world, "stopped") / "checkpoints" / "index.json").read_text())
    assert index["last"] == "step-00000003"


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "reduce_scatter_tensor")


def counted_fit(group, resolved):
    """How many collectives were called between one report of a step and the next."""
    calls, at_steps = [], []
    for name in COLLECTIVES:
        real = getattr(dist, name)
        setattr(dist, name, lambda *args, real=real, **more: (calls.append(real.__name__), real(*args, **more))[1])
    config = resolved.config
    path = locations.run_folder(config)
    trainer, loaded, stamp = training.prepare_training(config, path, bool, group)
    if group.rank == 0:
        training.begin(path, config, loaded, stamp, resume=False)
    trainer.fit(lambda _: at_steps.append(len(calls)))
    return [later - before for before, later in pairwise(at_steps)]


def test_a_step_makes_three_collectives(world, tmp_path):
    """What the batch's losses are divided by and the mean of y*; losses and gradients; whether to stop."""
    resolved = settings(world, "counted", "train.log_every=3", "train.micro_batch_size=1")
    assert together(counted_fit, 2, tmp_path, resolved) == [[3] * (STEPS - 1)] * 2
    rows = rows_of(run_of(world, "counted"))
    assert [row["step"] for row in rows] == [2, 5, 7]


def test_a_loss_that_is_not_finite_stops_all_of_them_with_the_samples_of_whoever_has_it(world, tmp_path):
    group = next(path for path in (world.cache / "videos").iterdir() if path.name.startswith("train_7."))
    chunk = min((group / "features").glob("c*"))
    before = chunk.read_bytes()
    values = np.frombuffer(before, np.float16).copy()
    values[::7] = np.nan
    chunk.write_bytes(values.tobytes())
    try:
        said = together(fit, 2, tmp_path, settings(world, "broken"))
    finally:
        chunk.write_bytes(before)
    assert said[0] == said[1], "the samples are those of both"
    assert "nothing was overwritten. Cached features or targets of video 'train_7' hold NaN" in said[0]
    assert said[0].startswith("samples ")


def test_a_batch_that_cannot_be_shared_equally_is_refused(world, tmp_path):
    said = together(fit, 2, tmp_path, settings(world, "odd", "train.batch_size=5"))
    assert (
        said
        == [
            "train.batch_size: a batch has 5 samples, which 2 processes cannot share equally. Make it a multiple of "
            "--processes"
        ]
        * 2
    )
