"""Published checkpoints in every form they come in, and every form of damage; made here, small."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from stages.errors import UserError
from stages.weights.repository import Repository

TENSORS = {
    "vision.weight": torch.arange(6.0).view(2, 3),
    "vision.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "vision.scale": torch.tensor(3.0),
    "head.weight": torch.arange(4).view(2, 2),
}
PREFIXES = ("vision.",)


@pytest.fixture(autouse=True)
def _no_hub(tmp_path, monkeypatch):
    # The environment variables count only before the hub's client is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "checkpoint"
    made.mkdir()
    return made


def tensors(folder, subfolder=""):
    return Repository(str(folder)).tensors(subfolder)


def shard(folder, **content):
    """Two shards and their index; `content` replaces the index."""
    save_file({"vision.weight": TENSORS["vision.weight"]}, folder / "model-00001-of-00002.safetensors")
    rest = {name: tensor for name, tensor in TENSORS.items() if name != "vision.weight"}
    save_file(rest, folder / "model-00002-of-00002.safetensors")
    shards = dict.fromkeys(rest, "model-00002-of-00002.safetensors")
    index = {"weight_map": {**shards, "vision.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content or index), encoding="utf-8")


def one_line_from(folder, read):
    with pytest.raises(UserError) as caught:
        read(tensors(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def assert_complete(found):
    assert set(found) == set(TENSORS)
    assert len(found) == len(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


# --- the forms that checkpoints come in


def test_one_safetensors_file(folder):
    save_file(TENSORS, folder / "model.safetensors")
    assert_complete(tensors(folder))


def test_shards_behind_an_index(folder):
    shard(folder)
    assert_complete(tensors(folder))


def test_of_several_shards_only_those_with_a_wanted_tensor_are_opened(folder):
    shard(folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"damaged")
    found = tensors(folder)
    assert found["vision.scale"] == 3.0
    with pytest.raises(UserError, match="00001-of-00002"):
        found["vision.weight"]


@pytest.mark.parametrize("zipped", [True, False], ids=["today", "before torch 1.6"])
def test_a_bin_file_of_tensors(folder, zipped):
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_complete(tensors(folder))


def test_a_component_in_a_subfolder_and_diffusers_own_file_name(folder):
    (folder / "vae").mkdir()
    save_file(TENSORS, folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert_complete(tensors(folder, "vae"))


def test_safetensors_are_preferred_to_a_pickle_beside_them(folder):
    save_file(TENSORS, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert_complete(tensors(folder))


def test_a_name_that_is_not_there_is_a_key_error_as_in_any_mapping(folder):
    save_file(TENSORS, folder / "model.safetensors")
    found = tensors(folder)
    assert "nothing" not in found
    with pytest.raises(KeyError):
        found["nothing"]


# --- what is never run


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(folder, tmp_path, form):
    mark = tmp_path / "was-run"
    content, path = {"vision.weight": Payload(mark)}, folder / "pytorch_model.bin"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    said = one_line_from(folder, dict)
    assert said == (
        f"{path}: damaged, or holds more than tensors, which could run as code and is not loaded. "
        "Use a safetensors version of this checkpoint"
    )
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "the payload works where nobody refuses it"


# --- damage


@pytest.mark.parametrize("kept", [0, 4, 20, 0.5, 0.99])
def test_a_truncated_safetensors_file_is_one_error_that_names_it(folder, kept):
    path = folder / "model.safetensors"
    save_file({"w": torch.arange(1000.0)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    said = one_line_from(folder, dict)
    assert said.startswith(f"{path}: not a safetensors file: ")
    assert said.endswith("Download the file again")


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_bin_file_is_one_error_that_names_it(folder, kept):
    path = folder / "pytorch_model.bin"
    torch.save({"w": torch.arange(1000.0)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    assert "damaged" in one_line_from(folder, dict)


@pytest.mark.parametrize(
    "content", [b"hello\n", b"<!DOCTYPE html>\n", b"version https://git-lfs", b'{"a": 1}', b"\x00" * 64]
)
def test_a_file_that_is_no_checkpoint_is_never_to_be_run(folder, content):
    path = folder / "pytorch_model.bin"
    path.write_bytes(content)
    assert one_line_from(folder, dict) == f"{path}: damaged, or not a checkpoint. Download the file again"


def test_a_bin_file_without_names_is_an_error(folder):
    torch.save(torch.ones(3), folder / "pytorch_model.bin")
    assert one_line_from(folder, dict) == f"{folder / 'pytorch_model.bin'}: holds no tensors by name; got 'Tensor'"


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    said = one_line_from(folder, dict)
    assert said == (f"{folder}: file model-00002-of-00002.safetensors is missing. Check that the download is complete")


def test_a_shard_that_lacks_what_the_index_promises_is_named(folder):
    shard(folder)
    save_file({"other": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")
    said = one_line_from(folder, dict)
    assert "00001-of-00002.safetensors: the shard lacks vision.weight, which its index places there" in said


def test_an_index_without_a_map_is_an_error(folder):
    shard(folder, metadata={})
    assert "model.safetensors.index.json: the index has no weight_map" in one_line_from(folder, dict)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_broken_configuration_file_is_an_error_that_names_it(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: not .*Download the file again"):
        Repository(str(folder)).json("config.json")


def test_a_folder_without_weights_says_which_files_would_do(folder):
    said = one_line_from(folder, dict)
    assert f"{folder}/: no weights found; allowed: model.safetensors, " in said


# --- the hub


@pytest.mark.parametrize("source", ["nobody/nothing-at-all", "a/b/c", "no-such-folder"])
def test_a_source_that_is_neither_here_nor_reachable_is_one_error(source):
    for read in (lambda repository: repository.tensors(), lambda repository: repository.json("config.json")):
        with pytest.raises(UserError) as caught:
            read(Repository(source))
        assert str(caught.value) == (
            "checkpoint: no such local folder, and the model hub gave no answer; "
            f"got {source!r}; allowed: a hub id, a local folder, or bundled:NAME. "
            "Fetch it with `hf download` where there is a network, or set the source to its folder"
        )


def test_what_was_downloaded_before_is_found_without_a_network(tmp_path):
    """The hub's own layout: of the names that are tried, only one is there."""
    commit = "0" * 40
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    torch.save(TENSORS, snapshot / "pytorch_model.bin")
    repository = Repository("someone/model")
    assert_complete(repository.tensors())
    assert repository.find("config.json") is None
    with pytest.raises(UserError, match=r"someone/model: file config\.json is missing\. Check that the download"):
        repository.json("config.json")


def test_an_unknown_bundled_network_is_an_error_that_lists_them():
    with pytest.raises(UserError, match=r"unknown bundled network; got 'tiny'; allowed: tiny-dit, tiny-instructblip"):
        Repository("bundled:tiny")


# --- the digest


def digest_of(folder, content, prefixes=PREFIXES):
    save_file(content, folder / "model.safetensors")
    return tensors(folder).digest(prefixes)


def test_the_digest_does_not_depend_on_the_form_of_the_file(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shard(other)
    assert digest_of(folder, TENSORS) == tensors(other).digest(PREFIXES)


def test_the_digest_ignores_tensors_that_it_does_not_cover(folder):
    before = digest_of(folder, TENSORS)
    assert digest_of(folder, {**TENSORS, "head.weight": torch.zeros(9)}) == before
    assert digest_of(folder, {**TENSORS, "visions": torch.zeros(9)}) == before


@pytest.mark.parametrize(
    "change",
    [
        {"vision.weight": TENSORS["vision.weight"] + torch.tensor([0, 0, 1e-6])},  # one value, hardly
        {"vision.weight": TENSORS["vision.weight"].view(3, 2)},  # shape
        {"vision.weight": TENSORS["vision.weight"].view(torch.int32)},  # type, same bytes
        {"vision.scale": torch.tensor(-3.0)},  # a scalar
        {"vision.more": torch.zeros(1)},  # one more
    ],
)
def test_the_digest_changes_with_anything_that_it_covers(folder, change):
    before = digest_of(folder, TENSORS)
    assert digest_of(folder, {**TENSORS, **change}) != before


def test_the_digest_changes_when_two_tensors_swap_names(folder):
    swap = {"vision.a": torch.zeros(2), "vision.b": torch.ones(2)}
    assert digest_of(folder, swap) != digest_of(folder, {"vision.a": torch.ones(2), "vision.b": torch.zeros(2)})
