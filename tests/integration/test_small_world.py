"""The recipe of the tiny networks run from end to end with few steps, and what the project ships of it."""

import json

import pytest
import torch
import yaml

from model.config import DiTSettings, EncoderConfig
from recipes.small_world import __main__ as recipe
from recipes.small_world.record import PROBE_TOLERANCE, load_record
from recipes.small_world.settings import CONFIG, read_settings
from stages.frozen.load import load_encoder, load_teacher
from stages.weights.repository import BUNDLED

MOST_BYTES = 20_000_000
MOST_MINUTES = 60
FEW = {
    "frames": {"videos": 64, "each": 1, "world_seed": 1},
    "vae": {"steps": 2, "batch": 2},
    "diffusion": {"steps": 2, "batch": 2},
    "contrast": {"steps": 2, "groups": 2, "group_size": 2},
    "reading": {"steps": 2},
    "probe_videos": 20,
    "probe_held_out": 6,
    "sheet_steps": 2,
    "sheet_columns": 1,
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The shipped configuration with hardly any steps."""
    settings = yaml.safe_load(CONFIG.read_text())
    for name, value in FEW.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    path = tmp_path_factory.mktemp("settings") / "few.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def made(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "networks"
    assert recipe.main(["--out", str(out), "--settings", str(few), "--device", "cpu"]) == 0
    return out


def test_what_is_made_loads_as_published_checkpoints_do(made):
    encoder = load_encoder(EncoderConfig(source=str(made / "tiny-instructblip")))
    teacher = load_teacher(DiTSettings(source=str(made / "tiny-dit")))
    frames = torch.zeros(2, 112, 112, 3, dtype=torch.uint8)
    assert encoder(frames).shape == (2, 65, 96)
    assert teacher.tokens(frames[:, :64, :64]).shape == (2, 16, 112)


def test_the_record_tells_what_was_done(made, few):
    record = load_record(made / "record.json")
    assert record.settings == read_settings(few).model_dump(mode="json")
    assert record.steps == {"vae": 2, "dit": 2, "tower": 2, "language": 2}
    assert set(record.losses) == set(record.steps)
    assert 0 <= record.probes["language model"]["captions read"] <= 1
    assert (made / "samples.png").stat().st_size > 0
    assert all((made / name / "MODEL_CARD.md").is_file() for name in ("tiny-instructblip", "tiny-dit"))
    assert not [path for path in made.parent.iterdir() if path != made]


def test_a_second_run_is_held_against_the_first(made, few, tmp_path, capsys):
    arguments = ["--settings", str(few), "--against", str(made / "record.json"), "--device", "cpu"]
    assert recipe.main(["--out", str(tmp_path / "again"), *arguments]) == 0
    assert f"are within {PROBE_TOLERANCE} of the record's" in capsys.readouterr().out
    for name in ("tiny-instructblip/model.safetensors", "tiny-dit/transformer/diffusion_pytorch_model.safetensors"):
        assert (made / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    changed = json.loads((made / "record.json").read_text())
    changed["probes"]["tower mean"]["scene"] += 0.5
    (tmp_path / "record.json").write_text(json.dumps(changed))
    assert recipe._compare(load_record(tmp_path / "record.json"), load_record(tmp_path / "again" / "record.json")) == 3
    assert "tower mean, scene: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "{made}"], "already there"),
        (["--out", "{new}", "--against", "nowhere.json"], "nowhere.json"),
        (["--out", "{new}", "--settings", "nowhere.yaml"], "nowhere.yaml"),
        (["--out", "{new}", "--device", "abacus"], "--device: no such device here; got 'abacus'"),
        (["--out", "{made}/record.json/new"], "--out: cannot be made"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(arguments, said, made, tmp_path, capsys):
    places = {"made": made, "new": tmp_path / "new"}
    assert recipe.main([argument.format(**places) for argument in arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert "\n" not in told
    assert not (tmp_path / "new").exists()


# --- what is shipped


def test_the_shipped_record_is_of_the_configuration_that_stands_there():
    record = load_record(BUNDLED / "record.json")
    assert record.settings == read_settings().model_dump(mode="json")
    assert record.seconds["all"] <= 60 * MOST_MINUTES


def test_the_shipped_weights_are_those_of_the_record_and_small():
    sizes = {
        folder.name: sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        for folder in BUNDLED.iterdir()
        if folder.is_dir()
    }
    assert sizes == load_record(BUNDLED / "record.json").sizes
    assert sum(sizes.values()) <= MOST_BYTES
    assert all((BUNDLED / name / "MODEL_CARD.md").is_file() for name in sizes)
