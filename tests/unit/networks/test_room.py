"""What a CPU's memory holds is known from configuration files: the type the language model is read in, or none."""

import json
import shutil

import pytest
import torch

from pipeline.settings.config import resolve
from stages.errors import UserError
from stages.networks.memory_law import ClipShape
from stages.networks.room import compute_for
from stages.weights.tiny import bundled_folder

GB = 10**9
VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32001}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
CLIP = ClipShape(frames=100, patches=257, words=16, sequence=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The configuration of an InstructBLIP with a language model of 6.7 billion numbers, and no weights."""
    folder = tmp_path_factory.mktemp("vicuna") / "model"
    shutil.copytree(bundled_folder("tiny-instructblip"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= VICUNA_7B | HEADS
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def compute(source, monkeypatch):
    monkeypatch.setattr("stages.networks.room.pick_device", lambda: torch.device("cpu"))

    def of(free_gb, precision="auto", quantize="none", clip=CLIP):
        monkeypatch.setattr("stages.networks.room.usable_memory", lambda _device: int(free_gb * GB))
        config = resolve(preset="tiny", overrides=[f"language.source={source}", f"language.quantize={quantize}"]).config
        found, frozen = compute_for(config, precision, target_width=96, clip=clip)
        return found.dtype, frozen

    return of


@pytest.mark.parametrize("clip", [CLIP, None], ids=["training", "answering"])
def test_a_model_of_7b_is_read_in_bfloat16_where_float32_does_not_fit_and_nothing_else_is(compute, clip):
    assert compute(22, clip=clip) == (torch.float32, torch.bfloat16)
    assert compute(60, clip=clip) == (torch.float32, torch.float32)


def test_what_was_asked_for_is_kept_and_refused_in_one_line_with_what_would_do(compute):
    with pytest.raises(UserError) as caught:
        compute(22, precision="float32")
    said = str(caught.value)
    assert "\n" not in said
    assert "need 27.4 GB" in said
    assert "22.0 GB can be had" in said
    assert "Set train.precision=bfloat16 (13.8 GB)" in said
    assert compute(22, precision="bfloat16") == (torch.bfloat16, torch.bfloat16)


def test_where_nothing_would_do_the_line_says_that(compute):
    with pytest.raises(UserError, match=r"need 13\.8 GB of memory, and 9\.0 GB can be had\. Take a machine with more"):
        compute(9)
    with pytest.raises(UserError, match=r"Set language\.quantize=int8"):
        compute(13.6)
