"""Checkpoints are whole or absent, the best and the newest are kept, and what is read back is what was written."""

import json
import shutil

import pytest
import torch

from stages.errors import UserError
from stages.networks import checkpoint
from stages.networks.checkpoint import Checkpoints, Position, optimizer_tensors, restore_optimizer

MODEL = {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor([0.5])}
OPTIMIZER = {"w|step": torch.tensor(3.0)}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "run")


def save(checkpoints, step, *, keep=2, value=None, **position):
    model = MODEL if value is None else {"w": torch.full((2,), value)}
    checkpoints.save(model, OPTIMIZER, Position(epoch=step, step=step, **position), keep=keep)


def told_by_resume(checkpoints):
    told = []
    return checkpoints.resume(told.append), told


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir() if path.is_dir())


# --- what is written


def test_what_is_saved_reads_back_bit_for_bit(checkpoints):
    position = Position(epoch=2, step=120, val_top1=0.5, val_loss=1.25, target_width=96, stale=3)
    checkpoints.save(MODEL, OPTIMIZER, position, keep=2)
    name = checkpoints.last()
    assert name == "step-00000120"
    assert checkpoints.position(name) == position
    for saved, read in ((MODEL, checkpoints.model(name)), (OPTIMIZER, checkpoints.optimizer(name))):
        assert saved.keys() == read.keys()
        assert all(torch.equal(saved[key], read[key]) for key in saved)


def test_a_slice_of_a_larger_tensor_is_saved_alone(checkpoints):
    large = torch.arange(1_000_000.0).view(1000, 1000)
    checkpoints.save({"column": large[:, 3]}, {}, Position(1, 1), keep=1)
    assert torch.equal(checkpoints.model("step-00000001")["column"], large[:, 3])
    assert (checkpoints.folder / "step-00000001" / "model.safetensors").stat().st_size < 10_000


def test_a_run_without_checkpoints_says_so(checkpoints):
    assert checkpoints.last() is None
    with pytest.raises(UserError, match=r"run: the run has no checkpoint\. Train it first: pipeline train"):
        checkpoints.best()


# --- an interrupted save


@pytest.mark.parametrize("interruption", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_older_checkpoint_usable(checkpoints, monkeypatch, interruption):
    save(checkpoints, 1, value=1.0)
    before = (checkpoints.folder / "index.json").read_bytes()
    real = checkpoint.save_file

    def fail_at_the_second_file(tensors, path):
        if path.name == "optimizer.safetensors":
            raise interruption
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", fail_at_the_second_file)
    with pytest.raises(type(interruption)):
        save(checkpoints, 2, value=2.0)
    assert (checkpoints.folder / "index.json").read_bytes() == before
    reopened = Checkpoints(checkpoints.run)
    assert (reopened.last(), reopened.best()) == ("step-00000001", "step-00000001")
    assert torch.equal(reopened.model(reopened.last())["w"], torch.ones(2))
    assert names(reopened) == ["step-00000001"], "nothing half-written takes up space"

    monkeypatch.undo()
    save(reopened, 2, value=2.0)
    assert torch.equal(reopened.model(reopened.last())["w"], torch.full((2,), 2.0))


def test_what_a_kill_left_half_written_is_never_read_and_goes_with_the_next_save(checkpoints):
    save(checkpoints, 1)
    shutil.copytree(checkpoints.folder / "step-00000001", checkpoints.folder / ".step-00000002.tmp")
    assert (checkpoints.last(), checkpoints.best()) == ("step-00000001", "step-00000001")
    save(checkpoints, 3)
    assert names(checkpoints) == ["step-00000001", "step-00000003"]


def test_a_checkpoint_that_the_index_does_not_name_yet_is_resumed_from(checkpoints):
    """A kill between the rename and the index leaves it."""
    save(checkpoints, 1, value=1.0)
    index = (checkpoints.folder / "index.json").read_bytes()
    save(checkpoints, 2, value=2.0)
    (checkpoints.folder / "index.json").write_bytes(index)
    assert checkpoints.last() == "step-00000001"
    assert told_by_resume(checkpoints) == ("step-00000002", [])
    assert (checkpoints.last(), checkpoints.best()) == ("step-00000002", "step-00000002")


def test_the_same_step_saved_again_replaces_what_was_there(checkpoints):
    """A run that was stopped before a validation saves at the same step once more after it."""
    save(checkpoints, 1, value=1.0)
    save(checkpoints, 1, value=2.0, val_top1=0.5)
    assert torch.equal(checkpoints.model("step-00000001")["w"], torch.full((2,), 2.0))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["index.json", "step-00000001"]


# --- going back to the newest one that is whole


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_newest_one_is_passed_over_with_one_line_and_kept_aside(checkpoints, file, damage):
    for step in (1, 2):
        save(checkpoints, step, value=float(step))
    path = checkpoints.folder / "step-00000002" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    name, told = told_by_resume(checkpoints)
    assert name == "step-00000001"
    assert len(told) == 1
    assert "Going back to the checkpoint before it" in told[0]
    assert str(checkpoints.folder / "step-00000002") in told[0]
    assert (checkpoints.last(), checkpoints.best()) == ("step-00000001", "step-00000001")
    assert names(checkpoints) == ["damaged-step-00000002", "step-00000001"]


def test_without_a_whole_one_there_is_nothing_to_resume_from(checkpoints):
    assert told_by_resume(checkpoints) == (None, [])
    save(checkpoints, 1)
    (checkpoints.folder / "step-00000001" / "model.safetensors").unlink()
    name, told = told_by_resume(checkpoints)
    assert (name, len(told)) == (None, 1)


def test_going_back_finds_what_was_the_best_then(checkpoints):
    save(checkpoints, 1, val_top1=0.5)
    save(checkpoints, 2, best_step=1)
    save(checkpoints, 3, val_top1=0.9)
    assert checkpoints.best() == "step-00000003"
    (checkpoints.folder / "step-00000003" / "model.safetensors").write_bytes(b"")
    assert told_by_resume(checkpoints)[0] == "step-00000002"
    assert checkpoints.best() == "step-00000001"


# --- newest, best, and what is removed


def test_the_best_and_the_newest_stay_and_the_others_go(checkpoints):
    for step, best_step in enumerate([None, None, 2, 2, 2], start=1):
        save(checkpoints, step, keep=2, best_step=best_step)
    assert names(checkpoints) == ["step-00000002", "step-00000004", "step-00000005"]
    assert (checkpoints.best(), checkpoints.last()) == ("step-00000002", "step-00000005")


def test_the_best_is_not_kept_twice(checkpoints):
    for step in (1, 2, 3):
        save(checkpoints, step, keep=1)
    assert names(checkpoints) == ["step-00000003"]


@pytest.mark.parametrize(
    ("first", "second", "best"),
    [
        ({"val_top1": 0.5, "val_loss": 1.0}, {"val_top1": 0.6, "val_loss": 2.0}, 2),  # accuracy first
        ({"val_top1": 0.6, "val_loss": 2.0}, {"val_top1": 0.5, "val_loss": 1.0}, 1),
        ({"val_top1": 0.5, "val_loss": 1.0}, {"val_top1": 0.5, "val_loss": 0.9}, 2),  # then the loss
        ({"val_top1": 0.5, "val_loss": 0.9}, {"val_top1": 0.5, "val_loss": 1.0}, 1),
        ({"val_top1": 0.0, "val_loss": 9.0}, {}, 1),  # validated is better than not
        ({}, {"val_top1": 0.0, "val_loss": 9.0}, 2),
        ({}, {}, 2),  # without validation the last one counts
    ],
)
def test_the_best_is_chosen_by_accuracy_then_loss_then_age(first, second, best):
    one, two = Position(1, 1, **first), Position(2, 2, **second)
    assert (two.better_than(one), one.better_than(two)) == (best == 2, best == 1)


def test_by_loss_the_loss_comes_first_and_one_that_is_no_number_is_the_worst():
    low, high = Position(1, 1, val_top1=0.5, val_loss=1.0), Position(2, 2, val_top1=0.6, val_loss=2.0)
    assert low.better_than(high, "loss")
    assert high.better_than(low, "accuracy")
    broken = Position(3, 3, val_top1=0.6, val_loss=float("nan"))
    assert low.better_than(broken, "loss")
    assert not broken.better_than(high, "accuracy")


def test_the_first_of_equals_stays_the_best_where_that_is_asked():
    """As MA-LMM's, which takes an epoch for the best only if it is better."""
    first, second = Position(1, 1, val_top1=0.5, val_loss=1.0), Position(2, 2, val_top1=0.5, val_loss=0.9)
    assert not second.better_than(first, "accuracy", "first")
    assert not first.better_than(second, "accuracy", "first")
    assert Position(3, 3, val_top1=0.6, val_loss=9.0).better_than(first, "accuracy", "first")
    assert second.better_than(first, "loss", "first")
    broken, unseen = Position(4, 4, val_top1=0.0, val_loss=float("nan")), Position(5, 5)
    for by in ("accuracy", "loss"):
        assert broken.better_than(unseen, by, "first")
        assert not unseen.better_than(broken, by, "first")
        assert Position(6, 6).better_than(unseen, by, "first"), "without validation the last one counts"


# --- optimizer state


def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(11, 5)).square().sum().backward()
    optimizer.step()


def test_a_restored_optimizer_has_the_same_state_and_takes_the_same_next_step(checkpoints):
    model, optimizer = build()
    for seed in range(3):
        step(model, optimizer, seed)
    parameters = dict(model.named_parameters())
    state = optimizer_tensors(optimizer, {id(parameter): name for name, parameter in parameters.items()})
    assert {key.rpartition("|")[2] for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(state) == 3 * len(parameters)
    checkpoints.save({name: p.data for name, p in parameters.items()}, state, Position(1, 3), keep=1)

    other, restored = build()
    theirs = dict(other.named_parameters())
    for name, value in checkpoints.model("step-00000003").items():
        theirs[name].data.copy_(value)
    restore_optimizer(restored, theirs, checkpoints.optimizer("step-00000003"))
    again = optimizer_tensors(restored, {id(parameter): name for name, parameter in theirs.items()})
    assert all(torch.equal(again[key], value) for key, value in state.items())

    step(model, optimizer, 9)
    step(other, restored, 9)
    assert all(torch.equal(theirs[name], parameter) for name, parameter in parameters.items())


def test_without_the_state_the_next_step_would_differ():
    (model, optimizer), (other, fresh) = build(), build()
    step(model, optimizer, 0)
    other.load_state_dict(model.state_dict())
    step(model, optimizer, 1)
    step(other, fresh, 1)
    assert not torch.equal(model[0].weight, other[0].weight)


# --- damage


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("model.safetensors", Checkpoints.model),
        ("optimizer.safetensors", Checkpoints.optimizer),
        ("state.json", Checkpoints.position),
    ],
)
@pytest.mark.parametrize("left", [0, 5, 30, None])
def test_a_damaged_file_is_one_error_that_names_it(checkpoints, file, read, left):
    save(checkpoints, 1)
    path = checkpoints.folder / "step-00000001" / file
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError) as caught:
        read(checkpoints, "step-00000001")
    said = str(caught.value)
    assert said.startswith(f"{path}: checkpoint file cannot be read: ")
    assert said.endswith("`pipeline train --resume` goes back to the one before it")
    assert "\n" not in said


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"last": "step-00000001"}', "null"])
def test_a_damaged_index_is_one_error_that_names_it(checkpoints, text):
    save(checkpoints, 1)
    (checkpoints.folder / "index.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"index\.json: checkpoint file cannot be read: "):
        checkpoints.last()


def test_a_position_with_unknown_fields_is_an_error(checkpoints):
    save(checkpoints, 1)
    path = checkpoints.folder / "step-00000001" / "state.json"
    path.write_text(json.dumps({"epoch": 1, "steps": 1}), encoding="utf-8")
    with pytest.raises(UserError, match=r"state\.json: checkpoint file cannot be read: "):
        checkpoints.position("step-00000001")
