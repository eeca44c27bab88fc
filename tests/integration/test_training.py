"""The training command in this process, on a small cache of random features: what it logs, keeps, refuses and says."""

import gzip
import json
import re
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.commands import train as command
from pipeline.reporting.runs import cautions, read_runs
from pipeline.runs import training
from pipeline.runs.run_folder import RunFolder
from pipeline.settings.config import resolve
from stages.batches.feed import Collate
from stages.errors import UserError
from stages.evaluate.answering import predict_batches
from stages.evaluate.at_once import clip_shape
from stages.networks.checkpoint import Checkpoints, Position
from stages.networks.memory_law import language_kept_bytes
from stages.signals import StopRequest
from stages.train.parts import parts_for
from stages.train.run_lock import training as locked
from stages.train.schedule import learning_rate
from stages.train.step import Stepper
from tests.training_world import SETTINGS, STEPS, dropping_out, make, near, numbers, rows_of, weights

FLOAT32_LOSS = 1e-5  # relative
GRADIENT = 1e-4  # relative to the parameter's largest, in float32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("training"))


@pytest.fixture
def resolved(world, tmp_path, monkeypatch):
    """The resolved configuration of a run called `run` with more settings."""
    monkeypatch.chdir(tmp_path)

    def of(*more, name="run", cache=None):
        options = {
            "data.dataset": str(world.folder / "card.yaml"),
            "data.annotations": str(world.folder),
            "cache.root": str(cache or world.cache),
            "run.name": name,
        }
        return resolve(preset="tiny", options=options, overrides=[*SETTINGS, "train.epochs=2", *more])

    return of


def trained(resolved, *, resume=False, **keywords):
    return command.run(resolved, resume=resume, as_json=False, **keywords)


def test_without_a_terminal_lines_show_how_far_it_is(resolved, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.screen.console.FIRST_LINE_S", 0.05)
    monkeypatch.setattr("pipeline.screen.console.LINE_EVERY_S", 0.05)
    run = trained(resolved("train.epochs=1"))
    shown = capsys.readouterr()
    assert shown.out == f"trained 8 steps; best after epoch 1, {shown.out.partition(', ')[2]}"
    assert shown.out.endswith(f"; run {run}\n")
    *within, last = [line for line in shown.err.splitlines() if line.startswith("train ")]
    shape = r"train \d/8 steps, [\d.]+ steps/(s|min), 0:\d\d:\d\d left; epoch 1/1  answer [\d.]+  kd -?[\d.]+"
    assert any(re.fullmatch(shape, line) for line in within), shown.err
    assert last.startswith("train 8/8 steps in 0:")


# --- gradient accumulation


def stepper(resolved):
    trainer, loaded, _ = training.prepare_training(resolved.config, config_path(resolved), StopRequest())
    # The parts of a batch draw other numbers than the batch does.
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return Stepper(resolved.config.train, loaded.model, loaded.compute), trainer.data


def with_unequal_answers(windows):
    """Six windows with answers of unequal length: a mean of parts' means is another loss than the mean."""
    answers = ("office", "the king is in the office", "hotel and airport", "office", "hotel", "airport of the king")
    return [
        w._replace(sample=w.sample.model_copy(update={"answer": a, "candidates": None}))
        for w, a in zip(windows, answers, strict=True)
    ]


@pytest.mark.parametrize("kd_frames", ["all", "2"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (4, 2)])
def test_parts_of_a_batch_have_the_losses_gradients_and_running_mean_of_the_whole(resolved, sizes, kd_frames):
    config = resolved("alignment.target=centred", f"train.kd_frames={kd_frames}")
    found = []
    for cut in ((6,), sizes):
        taker, data = stepper(config)
        windows = with_unequal_answers(data.train[index] for index in range(6))
        starts = np.cumsum([0, *cut])
        parts = [Collate(data.tokenizers)(windows[a:b]) for a, b in pairwise(starts)]
        lengths = {int(part.stored.answer.answer_mask.sum(1).max()) for part in parts}
        assert len(cut) == 1 or len(lengths) > 1
        losses = taker._forward_backward(0, parts)
        gradients = {name: p.grad for name, p in taker.parameters.items() if p.grad is not None}
        found.append((losses, gradients, taker.model.alignment.target_mean.clone()))
    (whole, gradients, mean), (parts_losses, parts_gradients, parts_mean) = found
    for name in ("total", "answer", "kd"):
        torch.testing.assert_close(getattr(parts_losses, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts_losses.alignment.cosine, whole.alignment.cosine, rtol=1e-4, atol=1e-6)
    assert torch.equal(mean, parts_mean)
    assert gradients.keys() == parts_gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp(min=1e-4)
        assert ((parts_gradients[name] - gradient).abs().max() / scale).item() < GRADIENT, name


@pytest.mark.parametrize("sizes", [(6,), (4, 2), (1,) * 6])
@pytest.mark.parametrize("group", [1, 4, 6])
def test_the_answer_loss_of_groups_is_the_mean_of_their_means_however_the_batch_is_cut(resolved, sizes, group):
    """With groups of 16, MA-LMM's loss on four GPUs."""
    taker, data = stepper(resolved(f"train.answer_loss_samples={group}", "alignment.kd_weight=0"))
    windows = with_unequal_answers(data.train[index] for index in range(6))

    def alone(start, stop):
        clips = Collate(data.tokenizers)(windows[start:stop]).on(taker.compute.device)
        return taker.model(clips).answer

    taker.model.train()
    parts = [Collate(data.tokenizers)(windows[a:b]) for a, b in pairwise(np.cumsum([0, *sizes]))]
    starts = range(0, 6, group)
    expected = torch.stack([alone(start, start + group) for start in starts]).mean()
    found = taker._forward_backward(0, parts)
    torch.testing.assert_close(found.answer, expected, rtol=FLOAT32_LOSS, atol=0)
    torch.testing.assert_close(found.total, expected, rtol=FLOAT32_LOSS, atol=0)
    gradients = {name: p.grad.clone() for name, p in taker.parameters.items() if p.grad is not None}
    taker.model.zero_grad(set_to_none=True)
    for start in starts:
        clips = Collate(data.tokenizers)(windows[start : start + group]).on(taker.compute.device)
        (taker.model(clips).total / len(starts)).backward()
    for name, gradient in gradients.items():
        theirs = taker.parameters[name].grad
        scale = theirs.abs().max().clamp(min=1e-4)
        assert ((gradient - theirs).abs().max() / scale).item() < GRADIENT, name
    pooled, _ = stepper(resolved("alignment.kd_weight=0"))
    other = pooled._forward_backward(0, parts).answer
    assert (abs(other - expected) > 100 * FLOAT32_LOSS * expected) == (group != 6)


def test_a_training_in_parts_takes_as_many_steps_and_the_same_first_one(world, resolved):
    settings = ("train.epochs=1", dropping_out(world))
    whole = rows_of(trained(resolved(*settings, "train.validate_every=9", name="whole")))
    parts = rows_of(trained(resolved(*settings, "train.micro_batch_size=3", name="parts")))
    assert [row["step"] for row in parts] == [row["step"] for row in whole] == list(range(8))
    assert parts[0]["answer_loss"] == pytest.approx(whole[0]["answer_loss"], rel=FLOAT32_LOSS)  # dropout included
    assert all(row["data_wait_s"] >= 0 for row in parts)


def test_a_run_that_is_resumed_in_other_parts_has_the_losses_of_one_that_was_not(world, resolved):
    dropout = dropping_out(world)
    whole = trained(resolved(dropout, name="whole"))
    undropped = trained(resolved("train.epochs=1", name="undropped"))
    assert rows_of(whole)[0]["loss"] != pytest.approx(rows_of(undropped)[0]["loss"], rel=10 * FLOAT32_LOSS)
    config = resolved(dropout, "train.micro_batch_size=1", "train.frames_per_chunk=2")
    path = config_path(config)
    trainer, loaded, stamp = training.prepare_training(config.config, path, StopRequest())
    training.begin(path, config.config, loaded, stamp, resume=False)
    trainer.stop = lambda: trainer.position.step == 3
    trainer.fit(lambda _row: None)
    assert stamp_of(path)["train.micro_batch_size"] == 1
    trained(resolved(dropout, "train.micro_batch_size=3"), resume=True)
    assert stamp_of(path) == {"train.micro_batch_size": 3, "train.frames_per_chunk": 2, "evaluate.batch_size": 64}
    near(path, whole)


def test_the_validation_loss_is_that_of_all_answer_tokens_however_many_samples_are_answered_at_once(resolved):
    whole = trained(resolved("train.epochs=1", name="whole"))
    parts = trained(resolved("train.epochs=1", "evaluate.batch_size=3", name="parts"))
    assert stamp_of(parts)["evaluate.batch_size"] == 3
    (mine,), (theirs,) = rows_of(parts, "val"), rows_of(whole, "val")
    assert mine["answer_loss"] == pytest.approx(theirs["answer_loss"], rel=FLOAT32_LOSS)


def test_how_many_samples_a_validation_answers_at_once_leaves_room_for_gradients_and_moments(resolved, monkeypatch):
    config = resolved("train.epochs=1", "evaluate.batch_size=auto")
    trainer, loaded, stamp = training.prepare_training(config.config, config_path(config), StopRequest())
    training.begin(config_path(config), config.config, loaded, stamp, resume=False)
    gradients_and_moments = 12 * loaded.trained_count

    def chosen(free):
        monkeypatch.setattr("stages.evaluate.at_once.usable_memory", lambda _device: free)
        trainer._settle_parts()
        return stamp_of(config_path(config))["evaluate.batch_size"]

    # One sample takes a little less than these: two would fit without them.
    assert chosen(9 * gradients_and_moments // 5) == 1
    assert chosen(3 * gradients_and_moments) == 2


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_parts_are_chosen_by_the_law_of_a_language_model_in_as_many_bits(resolved, monkeypatch, quantize):
    taker, data = stepper(resolved())
    clip = clip_shape(data.train, data.train.samples, data.tokenizers, taker.model.qformer.num_queries)
    clip, law = replace(clip, sequence=5000), []
    monkeypatch.setattr("stages.train.parts.parts_that_fit", lambda memory_of, *_rest: law.append(memory_of(1)))
    parts_for(taker.config, taker.model, clip, taker.compute, samples=4, quantize=quantize, with_moments=False)
    config, width = taker.model.language.model.config, 4
    kept = {one: language_kept_bytes(config, bytes_each=width, quantize=one) for one in ("none", "int8")}
    assert kept["int8"] > kept["none"]
    assert 5000 * kept[quantize] < law[0].clip < 5000 * (kept[quantize] + kept["int8"] - kept["none"])


def stamp_of(path):
    return json.loads((path / "run.json").read_text())["at_once"]


@pytest.mark.parametrize("target", ["raw", "centred"])
def test_trying_how_much_fits_changes_nothing_that_follows(resolved, target, caplog):
    """Not the losses, the weights, the running mean of y* nor what is drawn; half is what fits here."""
    settings = ("train.epochs=1", f"alignment.target={target}")
    whole = trained(resolved(*settings, name="whole"))
    config = resolved(*settings)
    path = config_path(config)
    trainer, loaded, stamp = training.prepare_training(config.config, path, StopRequest())
    training.begin(path, config.config, loaded, stamp, resume=False)
    before, drawn = loaded.model.trained_tensors(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    real, sizes = loaded.model.forward_backward, []

    def two_at_most(clips, **more):
        sizes.append(len(clips.features))
        if len(clips.features) > 2:
            raise MemoryError
        return real(clips, **more)

    loaded.model.forward_backward = two_at_most
    trainer.stepper.try_parts(Collate(loaded.tokenizers)([trainer.data.train[index] for index in range(4)]))
    assert sizes == [4, 2]
    assert trainer.stepper.parts.clips == 2
    assert "train.micro_batch_size=2" in caplog.text
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.trained_tensors().items())
    assert all(parameter.grad is None for parameter in trainer.stepper.parameters.values())
    assert not trainer.stepper.optimizer.state
    loaded.model.forward_backward = real
    trainer.fit(lambda _row: None)
    assert numbers(path) == numbers(whole)


def test_one_frame_of_one_sample_that_does_not_fit_ends_in_one_line(resolved, monkeypatch):
    monkeypatch.setattr("model.diff_lmm.DiffLMM.forward_backward", lambda *_, **__: torch.empty(2**50))
    with pytest.raises(UserError, match=r"one sample with one frame at a time.*language\.quantize=nf4") as caught:
        trained(resolved())
    assert "\n" not in str(caught.value)


# --- what is not finite


def plant_nan(world, video):
    """Change bytes behind the cache's back; returns what undoes it."""
    group = next(path for path in (world.cache / "videos").iterdir() if path.name.startswith(f"{video}."))
    chunk = min((group / "features").glob("c*"))
    before = chunk.read_bytes()
    values = np.frombuffer(before, np.float16).copy()
    values[::7] = np.nan
    chunk.write_bytes(values.tobytes())
    return lambda: chunk.write_bytes(before)


def test_nan_planted_in_one_videos_features_is_found_by_name_and_nothing_is_overwritten(world, resolved):
    config = resolved("train.save_every_steps=1", "train.epochs=1", "train.validate_every=9")
    undo = plant_nan(world, "train_7")
    try:
        with pytest.raises(UserError) as caught:
            trained(config)
    finally:
        undo()
    said = str(caught.value)
    steps = len(rows_of(RunFolder.open(config_path(config)).path))
    assert f"loss is nan at step {steps}; nothing was overwritten" in said
    assert "features or targets of video 'train_7' hold NaN" in said
    assert "samples " in said
    assert "pipeline cache verify" in said
    assert "\n" not in said
    checkpoints = Checkpoints(config_path(config))
    assert checkpoints.last() == (f"step-{steps:08d}" if steps else None)
    if steps:
        assert all(t.isfinite().all() for t in checkpoints.model(checkpoints.last()).values())
    # With the cache mended, it goes on.
    assert len(rows_of(trained(config, resume=True))) == 8


def test_nan_in_a_validation_video_is_found_by_name_and_what_was_learned_is_kept(world, resolved):
    whole = trained(resolved("train.epochs=1", name="whole"))
    config = resolved("train.epochs=1")
    undo = plant_nan(world, "val_2")
    try:
        with pytest.raises(UserError, match=r"features or targets of video 'val_2' hold NaN or infinity"):
            trained(config)
    finally:
        undo()
    run = config_path(config)
    assert rows_of(run, "val") == []
    assert Checkpoints(run).last() == "step-00000008"
    trained(config, resume=True)
    assert numbers(run) == numbers(whole)


def test_a_checkpoint_of_another_model_is_one_line(resolved):
    trainer, _, _ = training.prepare_training(resolved().config, config_path(resolved()), StopRequest())
    tensors = trainer.model.trained_tensors()
    wrong = next(name for name in sorted(tensors) if name.startswith("alignment.heads."))
    for changed, line in [
        ({**tensors, wrong: tensors[wrong][:3]}, rf"of another model: {wrong} is \(3,"),
        ({name: tensor for name, tensor in tensors.items() if name != wrong}, rf"{wrong} is not in it"),
    ]:
        trainer.checkpoints.save(changed, {}, Position(epoch=1, step=8), keep=1)
        with pytest.raises(UserError, match=line):
            trainer.resume(print)


def config_path(resolved):
    from pipeline.settings import locations

    return locations.run_folder(resolved.config)


def test_the_first_step_that_overflows_is_kept_until_it_is_asked_for_and_its_samples_are_named(resolved):
    taker, data = stepper(resolved())
    batch = Collate(data.tokenizers)([data.train[index] for index in (0, 3)])
    taker.take(4, 1e-3, [batch])
    assert taker.bad_step() is None
    with torch.no_grad():
        taker.model.language_projection.weight.fill_(float("inf"))
    for step in (5, 6):
        taker.take(step, 1e-3, [batch])
    assert taker.bad_step() == (5, "loss is nan")
    with pytest.raises(UserError, match=r"loss is nan at step 5.*Their features are finite"):
        taker.refuse("loss is nan at step 5", [batch])


def test_a_step_that_overflows_between_rows_ends_the_training_at_the_next_and_nothing_is_saved(resolved):
    config = resolved("train.log_every=3", "train.save_every_steps=2").config
    path = config_path(resolved())
    trainer, loaded, stamp = training.prepare_training(config, path, bool)
    training.begin(path, config, loaded, stamp, resume=False)
    with torch.no_grad():
        trainer.model.language_projection.weight.fill_(float("inf"))
    taken = []
    with pytest.raises(UserError, match=r"at step 0; nothing was overwritten.*Their features are finite"):
        trainer.fit(taken.append)
    assert [set(row) for row in taken] == [{"step", "epoch", "lr"}] * 2
    assert not (path / "checkpoints").exists()


# --- where it ends


def test_it_stops_early_when_validation_is_no_better_and_resuming_does_not_go_on(resolved):
    config = resolved("train.epochs=6", "train.patience=2", "train.lr=1e-12", "train.warmup_start_lr=1e-12")
    run = trained(config)
    assert len(rows_of(run, "val")) == 3
    assert len(rows_of(run)) == STEPS
    assert len(rows_of(trained(config, resume=True))) == STEPS


def test_asked_to_stop_before_a_validation_it_validates_first_when_resumed(resolved):
    whole = trained(resolved(name="whole"))
    config = resolved(name="stopped")
    path = config_path(config)
    trainer, _, stamp = training.prepare_training(config.config, path, StopRequest())
    RunFolder.create(path, config.config, stamp)
    trainer.stop = lambda: trainer.position.step == 8
    ending = trainer.fit(lambda _row: None)
    assert (ending.at.epoch, ending.at.step, ending.stopped) == (0, 8, True)
    assert rows_of(path, "val") == []
    trained(config, resume=True)
    assert numbers(path) == numbers(whole)
    mine, theirs = weights(path), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Of equals the later is the best, but no gain.
        (["train.best_by=loss"], [(None, 0), (1, 1), (None, 2), (None, 0), (4, 1)]),
        (["train.best_by=accuracy"], [(None, 0), (None, 0), (2, 1), (2, 2), (None, 0)]),
        (["train.best_by=loss", "train.best_of_equals=first"], [(None, 0), (1, 1), (1, 2), (None, 0), (4, 1)]),
        (["train.best_by=accuracy", "train.best_of_equals=first"], [(None, 0), (None, 0), (2, 1), (2, 2), (2, 3)]),
    ],
)
def test_of_equals_the_other_number_decides_or_the_first_is_the_best(resolved, settings, expected):
    trainer, _, _ = training.prepare_training(resolved(*settings).config, config_path(resolved()), StopRequest())
    judged = []
    for step, (top1, loss) in enumerate([(0.5, 1.0), (0.9, 2.0), (0.5, 1.0), (0.1, 0.5), (0.9, 1.5)], start=1):
        position = replace(trainer.position, epoch=step, step=step, val_top1=top1, val_loss=loss)
        trainer.position = trainer._judged(position)
        judged.append((trainer.position.best_step, trainer.position.stale))
    assert judged == expected


def test_without_validation_the_last_is_the_best_whatever_decides_between_equals(resolved):
    trainer, _, _ = training.prepare_training(
        resolved("train.best_of_equals=first").config, config_path(resolved()), StopRequest()
    )
    for step in (1, 2):
        trainer.position = trainer._judged(replace(trainer.position, epoch=step, step=step))
        assert trainer.position.best_step is None


# --- long questions


def test_a_training_says_once_how_many_questions_it_cuts_and_reads_them_as_evaluation_does(
    world, resolved, tmp_path, capfd
):
    config = resolved("language.max_prompt_tokens=14")
    trainer, loaded, _ = training.prepare_training(config.config, config_path(config), StopRequest())
    assert "too long" not in capfd.readouterr().err
    window = trainer.data.train[0]
    long = window.sample.model_copy(update={"prompt": "what is the {} of the movie?", "question": "scene and the year"})
    tokenizers = replace(loaded.tokenizers, max_prompt=10)
    batch = Collate(tokenizers)([window._replace(sample=long)])
    (answered,) = predict_batches(
        loaded.model, [batch], tokenizers, config.config.language, loaded.compute.device, loaded.compute.dtype
    )
    row, answer = batch.stored.answer.ids[0], batch.stored.answer.answer_mask[0]
    assert tokenizers.decode(row[~answer][None, None])[0][0] == answered.question
    assert answered.question.startswith("what is the ")
    assert answered.question.endswith(" of the movie?")
    assert len(answered.question) < len(long.prompt.replace("{}", long.question))
    assert (~answer & batch.stored.answer.mask[0]).sum() <= 10

    lines = (world.folder / "samples.jsonl").read_text(encoding="utf-8")
    (tmp_path / "samples.jsonl").write_text(lines.replace('"scene", "a', '"scene and scene and scene", "a', 3))
    longer = resolved("language.max_prompt_tokens=10", f"data.annotations={tmp_path}")
    training.prepare_training(longer.config, config_path(longer), StopRequest())
    told = capfd.readouterr().err
    assert told.count("too long") == 1
    assert "warning: 3 of 40 questions are too long for qformer.max_text_tokens=32 or language.max_prompt_" in told

    tight = resolved("language.max_prompt_tokens=7")
    with pytest.raises(UserError, match="the text around a question is too long by itself"):
        training.prepare_training(tight.config, config_path(tight), StopRequest())


# --- one name, one run


def test_two_trainings_of_one_run_at_once_are_refused(resolved):
    config = resolved("train.epochs=1")
    run = trained(config)
    with locked(run), pytest.raises(UserError, match=r"process \(\d+ on .* is training this run\. Wait until it has"):
        trained(config, resume=True)
    trained(config, resume=True)


def test_a_run_of_the_name_is_refused_without_resume_and_with_other_settings(resolved):
    config = resolved("train.epochs=1")
    trained(config)
    with pytest.raises(UserError, match=r"a run of this name is there already\. Add --resume"):
        trained(config)
    with pytest.raises(UserError, match=rf"differs in train.lr \({config.config.train.lr}, now 0.1\)"):
        trained(resolved("train.epochs=1", "train.lr=0.1"), resume=True)
    trained(resolved("train.epochs=1", "train.loader_workers=1", "train.prefetch=3"), resume=True)


# --- going on with what the run itself says


def test_a_run_is_resumed_by_its_folder_alone(resolved, pipeline):
    config = resolved("train.epochs=1", "train.lr=5e-4", "train.loader_workers=0")
    path = trained(config)
    before = (path / "config.yaml").read_bytes()
    out, _ = pipeline("train", "--resume", path, "--json")
    assert json.loads(out)["steps"] == 8
    assert (path / "config.yaml").read_bytes() == before
    # By name, too; and what the command names and the run has is no difference.
    pipeline("train", "--resume", "--name", "run", "--preset", "tiny", "--set", "train.lr=5e-4")
    for wrong, line in [
        (["--resume", path, "--set", "train.lr=1e-4"], "differs in train.lr (0.0005, now 0.0001)"),
        (["--resume", path, "--preset", "ma-lmm-7b"], "differs in preset ('tiny', now 'ma-lmm-7b')"),
        (["--resume", path, "--task", "scene"], "differs in data.task ('all', now 'scene')"),
        (["--resume", path, "--name", "other"], f"{path}: the run has its name already; got '--name other'"),
        ([path], f"{path}: a run's folder is given to go on with it. Add --resume"),
    ]:
        _, err = pipeline("train", *wrong, status=2)
        assert line in err
        assert err.count("\n") == 1
    assert (path / "config.yaml").read_bytes() == before


def test_a_resumed_run_takes_and_keeps_what_may_change(resolved, pipeline):
    path = trained(resolved("train.epochs=1"))
    changed = ["--set", "train.loader_workers=1", "--set", "train.trackers=[]", "--set", "train.micro_batch_size=2"]
    pipeline("train", "--resume", path, *changed)
    kept = RunFolder.open(path).config()
    assert (kept.train.loader_workers, kept.train.trackers, kept.train.micro_batch_size) == (1, (), 2)
    assert kept == resolved("train.epochs=1", *changed[1::2]).config


def test_more_epochs_go_on_as_the_longer_schedule_says(resolved, pipeline):
    path = trained(resolved(name="longer"))
    pipeline("train", "--resume", path, "--set", "train.epochs=4")
    short, long = resolved().config.train, resolved("train.epochs=4").config.train
    rows = rows_of(path)
    assert [row["step"] for row in rows] == list(range(32))
    for row in rows:
        epoch, step = divmod(row["step"], 8)
        recipe = short if epoch < 2 else long
        assert row["lr"] == learning_rate(recipe, epoch=epoch, step_in_epoch=step, steps_per_epoch=8)
    assert RunFolder.open(path).config().train.epochs == 4
    assert RunFolder.open(path).stamp()["more_epochs"] == [{"step": 16, "before": 2, "now": 4}]
    assert cautions(read_runs([path])[0]) == ["its learning rate was that of 2 epochs until step 16, then that of 4"]
    pipeline("train", "--resume", path)
    assert len(rows_of(path)) == 32
    _, err = pipeline("train", "--resume", path, "--set", "train.epochs=3", status=2)
    assert err == (
        f"error: {path}: train.epochs: a run that is resumed can only be given more epochs; got 3; allowed: 4 or more\n"
    )


def test_with_a_constant_rate_more_epochs_are_the_training_that_had_them_from_the_start(resolved, pipeline):
    constant = ["train.schedule=cosine", "train.warmup_steps=0", "train.lr=1e-3", "train.min_lr=1e-3"]
    path = trained(resolved(*constant, name="longer"))
    pipeline("train", "--resume", path, "--set", "train.epochs=4")
    whole = trained(resolved(*constant, "train.epochs=4", name="whole"))
    assert numbers(path) == numbers(whole)
    mine, theirs = weights(path), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# --- how it is shown


def test_the_profile_breaks_a_step_down_and_its_trace_names_the_parts(resolved, capsys):
    run = trained(resolved("train.epochs=1"), profile=True)
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    found = json.loads((run / "profile" / "breakdown.json").read_text())
    assert found["steps"] == 3
    assert list(found["seconds"]) == ["read", "Q-Former", "alignment", "LLM", "backward", "optimizer", "other"]
    assert all(seconds > 0 for name, seconds in found["seconds"].items() if name != "other")
    assert sum(found["seconds"].values()) == pytest.approx(found["step_s"])
    with gzip.open(run / "profile" / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"read", "Q-Former", "LLM", "backward", "optimizer"} <= names
    said = capsys.readouterr().out
    assert "one training step (mean of 3)" in said


def test_weights_and_biases_gets_the_rows_offline_and_goes_on_with_the_same_run(resolved, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = resolved("train.epochs=1", "train.trackers=[wandb]")
    run = trained(config)
    name = (run / "wandb-id.txt").read_text()
    kept = list((run / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(kept) == 1
    until = time.monotonic() + 60  # its own process writes it
    while not all(curve in kept[0].read_bytes() for curve in (b"train/answer_loss", b"val/top1")):
        assert time.monotonic() < until, "the rows are not in wandb's file"
        time.sleep(0.2)


def test_without_wandb_installed_the_first_line_says_so(resolved, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(UserError, match=r"train.trackers: wandb is not installed.*diff-lmm\[wandb\]"):
        trained(resolved("train.trackers=[tensorboard,wandb]"))


def test_the_switches_of_order_choice_and_trackers_train(resolved):
    settings = ["train.order=near", "train.best_by=loss", "train.grad_clip=0.5", "train.trackers=[]"]
    run = trained(resolved("train.epochs=1", *settings))
    assert len(rows_of(run)) == 8
    assert not (run / "tensorboard").exists()
