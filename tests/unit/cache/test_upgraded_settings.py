"""Settings of a teacher as version 0.1.0 stored them mean today what they meant then, and a cache keeps its digest."""

import hashlib
import json

import pytest

from model.config import DinoSettings, DiTSettings, ModelConfig, TowerSettings
from pipeline.settings.config import leaves, load_yaml, resolve
from stages.cache.feature_cache import FeatureCache
from stages.cache.fingerprint import Fingerprint
from stages.frozen.identity import feature_fields
from stages.networks.exported import About
from stages.upgrade import upgraded

# What every tree and every fingerprint had.
OLD = {
    "block": 8,
    "timestep": 0,
    "timestep_embedding": "original",
    "class_label": None,
    "vae_source": None,
    "heads": None,
    "dino_block": None,
    "dino_pooling": "mean",
    "tower_block": None,
    "tower_pooling": "mean",
    "random_seed": None,
}
CASES = {
    "a DiT": ({"source": "facebook/DiT-XL-2-256", "block": 4, "timestep": 9}, "dit", DiTSettings(block=4, timestep=9)),
    "a DiT file": ({"source": "/m/DiT.pt", "heads": 3}, "dit", DiTSettings(source="/m/DiT.pt", heads=3)),
    "a DINOv2": ({"source": "facebook/dinov2-base"}, "dinov2", DinoSettings()),
    "a DINOv2's block": (
        {"source": "/m/d", "dino_block": 3, "dino_pooling": "class", "random_seed": 1},
        "dinov2_with_registers",
        DinoSettings(source="/m/d", block=3, pooling="class", random_seed=1),
    ),
    "a tower": ({"source": "Salesforce/instructblip-vicuna-7b"}, "instructblip", TowerSettings()),
    "a CLIP": (
        {"source": "openai/clip-vit-large-patch14", "tower_block": 23},
        "clip",
        TowerSettings(source="openai/clip-vit-large-patch14", block=23),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    """Settings of then, the family that the fingerprint stated, and the settings of today."""
    own, family, today = CASES[request.param]
    return {**OLD, **own}, family, today


def test_a_fingerprint_of_then_fits_the_settings_of_today_and_keeps_its_digest(case, tmp_path):
    settings, family, today = case
    new = feature_fields(ModelConfig(teacher=today))
    others = {key: value for key, value in new.items() if not key.startswith("teacher.")}
    facts = {"teacher.family": family, "storage": "float32"}
    fields = {**others, **{f"teacher.{name}": value for name, value in settings.items()}, **facts}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    content = {"format_version": 1, "fields": fields, "digest": digest}
    (tmp_path / "fingerprint.json").write_text(json.dumps(content))
    made = FeatureCache.open(tmp_path).fingerprint
    made.require_match(new, "cache")
    assert made == Fingerprint(fields={**new, **facts})
    assert made.digest == digest
    # And what is written today is the very file of then.
    FeatureCache.create_or_open(tmp_path / "new", made)
    assert json.loads((tmp_path / "new" / "fingerprint.json").read_text()) == content


def test_a_run_and_an_export_of_then_have_the_settings_of_today(case, tmp_path):
    settings, _family, today = case
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"preset": "diff-lmm-7b", "teacher": settings}))
    assert load_yaml(file).teacher == today
    card = {"name": "c", "title": "t", "annotations": {"format": "jsonl", "file": "a"}, "videos": {"pattern": "{id}"}}
    card |= {"text": "caption", "tasks": {"a": {"prompt": "{}"}}}
    card |= {"frame_rule": {"kind": "uniform", "num_frames": 4, "index_fps": 10}}
    about = About(networks={"teacher": settings}, card=card, task="a", precision="auto")
    assert about.networks.teacher == today


def test_a_checkpoint_in_a_folder_of_any_name_says_its_kind_itself(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    settings = {f"teacher.{name}": value for name, value in {**OLD, "source": str(tmp_path)}.items()}
    assert upgraded(settings)["teacher.kind"] == "tower"


def test_settings_of_today_stay_as_they_are():
    for overrides in ([], ["teacher.kind=tower", "teacher.block=3"]):
        settings = dict(leaves(resolve(overrides=overrides).config.model_dump()))
        assert upgraded(settings) == settings


def test_a_run_that_took_its_batches_whole_takes_as_much_as_fits_today(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("preset: tiny\ntrain: {micro_batch_size: null, batch_size: 8}\n")
    assert load_yaml(file).train.micro_batch_size == "auto"
    file.write_text("preset: tiny\ntrain: {micro_batch_size: 4}\n")
    assert load_yaml(file).train.micro_batch_size == 4
