"""Stage 2 on a cache whose frozen networks were changed afterwards at the place that they were read from."""

import logging
import os
import shutil
import time

import pytest
from safetensors.torch import load_file, save_file

from pipeline.runs.cached_data import open_cache
from pipeline.settings.config import resolve
from stages.cache import FeatureCache
from stages.errors import UserError
from stages.frozen.identity import fingerprint, settle_precision
from stages.frozen.load import describe_encoder
from stages.frozen.source import user_cache_folder
from stages.weights.repository import Repository
from tests.in_this_process import in_this_process
from tests.training_world import CARD

LONG_AGO_S = time.time() - 3600
VISION, QFORMER = "vision_model.encoder.layers.1.mlp.fc1.weight", "query_tokens"
DIT, UNREAD = "transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.9.attn1.to_q.weight"


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Copies of the bundled networks, and a user's cache folder and a hub of their own."""
    folders = {}
    for part, name in (("encoder", "bundled:tiny-instructblip"), ("teacher", "bundled:tiny-dit")):
        folders[part] = tmp_path / part
        shutil.copytree(Repository(name).folder, folders[part])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folders


@pytest.fixture
def resolved(copies, tmp_path):
    """The tiny preset with the copies as frozen networks, and a cache without videos that was made with them."""

    def of(*more, encoder=copies["encoder"], teacher=copies["teacher"]):
        (tmp_path / "card.yaml").write_text(CARD, encoding="utf-8")
        options = {"data.dataset": str(tmp_path / "card.yaml"), "cache.root": str(tmp_path / "cache")}
        sources = [f"encoder.source={encoder}", f"teacher.source={teacher}"]
        return resolve(preset="tiny", options=options, overrides=[*sources, *more]).config

    config = of()
    FeatureCache.create_or_open(tmp_path / "cache", fingerprint(config, settle_precision(config.extract)))
    return of


def change(weights, name):
    """Another last number of one tensor."""
    tensors = load_file(weights)
    tensors[name].flatten()[-1] += 1.0
    save_file(tensors, weights)


def test_networks_that_are_as_they_were_are_not_read_again(resolved, copies):
    """Whoever reads what is remembered believes it, so a digest that is changed there shows that it was read."""
    config = resolved()
    for path in copies["encoder"].iterdir():
        os.utime(path, (LONG_AGO_S, LONG_AGO_S))
    assert open_cache(config)
    entries = [path for path in (user_cache_folder() / "descriptions").iterdir() if "vision" in path.read_text()]
    (entry,) = entries
    digest = open_cache(config).fingerprint.fields["encoder.weights"]
    entry.write_text(entry.read_text().replace(digest, "remembered"))
    with pytest.raises(UserError, match=r"encoder.weights differs; got 'remembered'"):
        open_cache(config)


def test_changed_vision_weights_are_named_by_their_source_in_one_line(resolved, copies):
    before = describe_encoder(resolved().encoder).digest
    change(copies["encoder"] / "model.safetensors", VISION)
    with pytest.raises(UserError) as caught:
        open_cache(resolved())
    said, now = str(caught.value), describe_encoder(resolved().encoder).digest
    assert said.startswith(f"encoder.source {copies['encoder']}: no longer the network that the cache at ")
    assert f"encoder.weights differs; got '{now[:12]}'; allowed: '{before[:12]}'. Put back what was there" in said
    with pytest.raises(UserError, match=r"encoder.weights"):
        open_cache(resolved("alignment.kd_weight=0"))


def test_changed_pixels_are_noticed_too(resolved, copies):
    """The statistics that pictures are normalised by are no weights, but they change every feature."""
    (copies["encoder"] / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    with pytest.raises(UserError, match=r"encoder.pixels differs"):
        open_cache(resolved())


def test_a_changed_teacher_matters_where_its_targets_are_used(resolved, copies):
    change(copies["teacher"] / "transformer" / "diffusion_pytorch_model.safetensors", DIT)
    with pytest.raises(UserError, match=rf"teacher.source {copies['teacher']}: .* teacher.weights differs"):
        open_cache(resolved())
    assert open_cache(resolved("alignment.kd_weight=0"))


def test_weights_that_no_feature_depends_on_may_change(resolved, copies):
    """The Q-Former beside the vision tower is trained; the teacher's last blocks are never read."""
    change(copies["encoder"] / "model.safetensors", QFORMER)
    change(copies["teacher"] / "transformer" / "diffusion_pytorch_model.safetensors", UNREAD)
    assert open_cache(resolved())


def test_weights_that_are_not_on_this_machine_are_not_asked_for(resolved, copies, caplog):
    (copies["encoder"] / "model.safetensors").unlink()
    shutil.rmtree(copies["teacher"])
    with caplog.at_level(logging.DEBUG):
        assert open_cache(resolved())
    assert "whether the encoder" in caplog.text
    assert not any(record.levelno > logging.DEBUG for record in caplog.records)
    shutil.rmtree(copies["encoder"])
    assert open_cache(resolved())


def test_of_a_hub_id_what_was_downloaded_is_looked_at(resolved, copies, tmp_path):
    hub = tmp_path / "hub" / "models--someone--blip"
    commit = "1" * 40
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    shutil.copytree(copies["encoder"], hub / "snapshots" / commit)
    config = resolved(f"cache.root={tmp_path / 'other'}", encoder="someone/blip")
    FeatureCache.create_or_open(tmp_path / "other", fingerprint(config, settle_precision(config.extract)))
    assert open_cache(config)
    change(hub / "snapshots" / commit / "model.safetensors", VISION)
    with pytest.raises(UserError, match=r"encoder.source someone/blip: .* encoder.weights differs"):
        open_cache(config)
    shutil.rmtree(hub)
    assert open_cache(config)


@pytest.mark.usefixtures("resolved")
def test_the_training_command_says_so_before_it_reads_a_frame(copies, tmp_path, monkeypatch, capfd):
    change(copies["encoder"] / "model.safetensors", VISION)
    (tmp_path / "samples.jsonl").write_text(
        '{"video": "a", "duration_s": 1.0, "task": "scene", "question": "scene", "answer": "hotel", "split": "train"}\n'
    )
    monkeypatch.chdir(tmp_path)
    call = in_this_process(monkeypatch, capfd)
    named = ("--preset", "tiny", "--dataset", tmp_path / "card.yaml", "--annotations", tmp_path, "--cache", "cache")
    sources = [part for name, folder in copies.items() for part in ("--set", f"{name}.source={folder}")]
    _, said = call("train", *named, *sources, status=2)
    assert said.strip().splitlines()[-1].startswith(f"error: encoder.source {copies['encoder']}: no longer the network")
    assert not (tmp_path / "runs").exists()
