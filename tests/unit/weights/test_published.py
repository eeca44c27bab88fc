"""Published checkpoints that are not here: their shapes, their bytes, and random weights in their place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import EncoderConfig, LanguageConfig
from pipeline.settings.config import resolve
from stages.errors import UserError
from stages.frozen.load import load_encoder
from stages.networks.build import load_language
from stages.networks.tokens import Tokenizers
from stages.weights.published import DIT_XL, INSTRUCTBLIP_VICUNA, PUBLISHED, QWEN, download_bytes, tensor_shapes
from stages.weights.random import RANDOM_FILE, RandomTensors
from stages.weights.repository import Repository
from stages.weights.stand_in import write_stand_in

GB = 10**9
# The files of the InstructBLIP as the hub shows them, which nothing here was told.
SHOWN_GB = (9.9, 9.96, 9.92, 1.88)
PEAK = """
import sys, torch
from model.config import LanguageConfig
from stages.free_memory import peak_memory
from stages.networks.build import load_language
import transformers.models.llama.modeling_llama
before = peak_memory()
model = load_language(LanguageConfig(source=sys.argv[1]), torch.bfloat16)
assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
print(peak_memory() - before, sum(2 * parameter.numel() for parameter in model.parameters()))
"""


def test_the_files_of_the_instructblip_have_the_sizes_that_the_hub_shows():
    everything = download_bytes(INSTRUCTBLIP_VICUNA, [""])
    first = download_bytes(INSTRUCTBLIP_VICUNA, ["query_tokens"])
    last = download_bytes(INSTRUCTBLIP_VICUNA, ["language_model.lm_head."])
    assert [round(size / GB, 2) for size in (everything, first, last)] == [31.65, SHOWN_GB[0], SHOWN_GB[-1]]
    assert abs(everything / GB - sum(SHOWN_GB)) < 0.01


def test_vision_tower_and_qformer_lie_in_the_first_file():
    tower_and_qformer = ("vision_model.", "qformer.", "query_tokens", "language_projection.")
    assert download_bytes(INSTRUCTBLIP_VICUNA, tower_and_qformer) == download_bytes(
        INSTRUCTBLIP_VICUNA, ["query_tokens"]
    )


def test_the_other_checkpoints_have_their_published_numbers():
    """Qwen2.5's 0.49 billion in bfloat16, tied; DiT-XL/2's 749.8 million and the VAE's 83.7 in float32."""
    assert download_bytes(QWEN, [""]) == 2 * 494_032_768
    assert download_bytes(DIT_XL, ["transformer_blocks.0.norm1."]) == pytest.approx(4 * 749.8e6, rel=1e-4)
    assert download_bytes(DIT_XL, ["quant_conv."]) == pytest.approx(4 * 83.7e6, rel=1e-3)
    assert download_bytes("nobody/nothing", [""]) is None


def write_shapes(folder, **shapes):
    path = folder / RANDOM_FILE
    path.write_text(json.dumps(shapes))
    return path


def test_random_tensors_are_views_of_one_small_buffer_the_same_at_every_reading(tmp_path):
    path = write_shapes(tmp_path, matrix=[3000, 2000], conv=[8, 3, 5, 5], bias=[7], **{"norm.weight": [9]})
    one, other = RandomTensors(path), RandomTensors(path)
    assert {name: list(one[name].shape) for name in one} == json.loads(path.read_text())
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["matrix"].untyped_storage().nbytes() < 50_000
    assert torch.equal(one["norm.weight"], torch.ones(9))
    assert 0.015 < one["matrix"].std() < 0.025
    assert torch.linalg.matrix_rank(one["conv"].flatten(1)) == 8


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": "b"}'])
def test_a_broken_file_of_shapes_is_named(tmp_path, content):
    (tmp_path / RANDOM_FILE).write_text(content)
    with pytest.raises(UserError, match=f"{RANDOM_FILE}: not a file of shapes"):
        Repository(str(tmp_path)).tensors()


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundled") / "stand-in"
    write_stand_in("bundled:tiny-instructblip", folder, language_layers=1)
    return folder


def test_a_stand_in_has_the_shapes_and_tokenizers_of_what_is_here_and_other_weights(bundled):
    own = load_encoder(EncoderConfig(source=str(bundled))).state_dict()
    theirs = load_encoder(EncoderConfig(source="bundled:tiny-instructblip")).state_dict()
    assert {name: one.shape for name, one in own.items()} == {name: one.shape for name, one in theirs.items()}
    assert not torch.equal(own["vision_model.post_layernorm.bias"], theirs["vision_model.post_layernorm.bias"])

    def words(source):
        config = resolve(preset="tiny", overrides=[f"language.source={source}", f"qformer.source={source}"]).config
        return Tokenizers.load(config).prompts(["what is the scene of the movie?"])[0]

    assert torch.equal(words(bundled), words("bundled:tiny-instructblip"))


@torch.no_grad()
def test_its_language_model_has_fewer_layers_where_that_is_asked_and_computes_finite_numbers(bundled):
    model = load_language(LanguageConfig(source=str(bundled)), torch.bfloat16)
    assert len(model.model.layers) == 1
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()


@torch.no_grad()
def test_a_published_checkpoint_that_is_not_here_has_a_stand_in_of_its_shapes(tmp_path):
    write_stand_in(QWEN, tmp_path / "qwen", language_layers=1)
    model = load_language(LanguageConfig(source=str(tmp_path / "qwen")), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (151_936, 896)
    assert model(inputs_embeds=torch.randn(1, 4, 896, dtype=torch.bfloat16)).logits.isfinite().all()


def test_a_checkpoint_of_which_nothing_is_known_is_refused_and_the_known_ones_named(tmp_path):
    with pytest.raises(UserError, match="nobody/nothing") as caught:
        write_stand_in("nobody/nothing", tmp_path / "stand-in")
    assert all(name in str(caught.value) for name in PUBLISHED)


def test_a_configuration_that_describes_nothing_is_one_line():
    with pytest.raises(UserError, match="no network"):
        tensor_shapes({"model_type": "no-such-network"})


def test_random_bfloat16_weights_are_made_without_a_float32_copy(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": 32_000,
                "hidden_size": 1024,
                "intermediate_size": 2048,
                "num_hidden_layers": 6,
            }
        )
    )
    write_stand_in(str(tmp_path), tmp_path / "stand-in")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "stand-in")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    taken, size = map(int, done.stdout.split())
    assert size > 2**27
    assert taken < 1.2 * size
