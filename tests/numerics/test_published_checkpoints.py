"""An InstructBLIP checkpoint as transformers writes it, read by name, gives the networks of the class itself."""

import json
import logging

import pytest
import torch
from tiny_qformer import random_text, randomise
from tolerances import FLOAT32_HIDDEN, FLOAT32_NETWORK, relative_difference
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig

from model.config import EncoderConfig, LanguageConfig, ModelConfig, QFormerConfig
from model.language import SpecialTokens
from stages.errors import UserError
from stages.frozen.load import describe_encoder, load_encoder
from stages.networks.build import build_diff_lmm, load_language
from stages.weights.repository import Repository

VISUAL_WIDTH, QUERIES = 16, 4
INDEX = "model.safetensors.index.json"
# Of InstructBLIP's preprocessor_config.json.
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def build_instructblip():
    torch.manual_seed(0)
    config = InstructBlipConfig(
        # image_size and patch_size keep their defaults, so that a configuration may leave them out.
        vision_config={
            "hidden_size": VISUAL_WIDTH,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        qformer_config={
            "vocab_size": 40,
            "hidden_size": 12,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "max_position_embeddings": 16,
        },
        text_config=LlamaConfig(
            vocab_size=50,
            hidden_size=20,
            intermediate_size=30,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
        ).to_dict(),
        num_query_tokens=QUERIES,
    )
    model = InstructBlipForConditionalGeneration(config)
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def instructblip():
    return build_instructblip()


def save_sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 5


def save_bin(model, folder):
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def shorten_config(folder):
    """Write config.json as the hub has it: what equals a class's defaults is left out, the rest in older words."""
    path = folder / "config.json"
    described = json.loads(path.read_text())
    defaults = InstructBlipConfig(text_config=LlamaConfig().to_dict()).to_dict()
    for part in ("vision_config", "qformer_config"):
        kept = {"model_type"}
        described[part] = {
            key: value for key, value in described[part].items() if key in kept or value != defaults[part].get(key)
        }
    described["qformer_config"].pop("encoder_hidden_size")
    text = described["text_config"]
    text.pop("rope_parameters")
    text |= {
        "torch_dtype": "float16",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "architectures": ["LLaMAForCausalLM"],
    }
    assert "image_size" not in described["vision_config"]
    path.write_text(json.dumps(described))


def save_short(model, folder):
    save_sharded(model, folder)
    shorten_config(folder)


@pytest.fixture(scope="module", params=[save_sharded, save_bin, save_short], ids=["shards", "bin", "hub"])
def checkpoint(request, instructblip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructblip")
    request.param(instructblip, folder)
    return str(folder)


@pytest.fixture
def shards(instructblip, tmp_path):
    save_sharded(instructblip, tmp_path)
    return tmp_path


def start_training(source):
    """Build Stage 2's model from the checkpoint, with its own language model."""
    config = ModelConfig(
        qformer=QFormerConfig(source=str(source), memory_slots=2, max_frames=4),
        language=LanguageConfig(source=str(source)),
    )
    return build_diff_lmm(
        config,
        language=load_language(config.language, torch.float32),
        special=SpecialTokens(2, 2),
        visual_width=VISUAL_WIDTH,
        target_width=None,
        seed=3,
    )


def load_vision(source):
    return load_encoder(EncoderConfig(source=str(source)))


def load_llama(source):
    return load_language(LanguageConfig(source=str(source)), torch.float32)


@torch.no_grad()
def test_the_encoder_gives_the_features_of_the_class(instructblip, checkpoint):
    encoder = load_vision(checkpoint)
    assert encoder.size_px == describe_encoder(EncoderConfig(source=checkpoint)).size_px == 224
    frames = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    pixels = (frames.permute(0, 3, 1, 2) / 255 - mean) / std
    expected = instructblip.vision_model(pixels).last_hidden_state
    assert expected.shape == (2, 257, VISUAL_WIDTH)
    assert relative_difference(encoder(frames), expected) <= FLOAT32_NETWORK


@torch.no_grad()
def test_the_qformer_gives_the_hidden_states_of_the_class(instructblip, checkpoint):
    model = start_training(checkpoint).eval()
    features, text = torch.randn(2, 1, 5, VISUAL_WIDTH), random_text(6, 3)
    expected = instructblip.qformer(
        input_ids=text.ids,
        attention_mask=torch.cat([torch.ones(2, QUERIES), text.mask], dim=1).long(),
        query_embeds=instructblip.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=features[:, 0],
        output_hidden_states=True,
    )
    levels = model.qformer(features, text).levels
    assert len(levels) == len(expected.hidden_states) == 5
    for level, hidden in zip(levels, expected.hidden_states, strict=True):
        assert (level[:, 0] - hidden[:, :QUERIES]).abs().max() <= FLOAT32_HIDDEN
    told = model.language_projection(levels[-1][:, 0])
    expected_told = instructblip.language_projection(expected.last_hidden_state[:, :QUERIES])
    assert relative_difference(told, expected_told) <= FLOAT32_NETWORK


@torch.no_grad()
def test_the_language_model_gives_the_logits_of_the_class(instructblip, checkpoint):
    language = load_llama(checkpoint)
    ids = torch.randint(0, 50, (2, 7))
    assert {parameter.dtype for parameter in language.parameters()} == {torch.float32}
    assert relative_difference(language(ids).logits, instructblip.language_model(ids).logits) <= FLOAT32_NETWORK


def test_the_language_model_is_read_in_the_type_asked_for(checkpoint):
    language = load_language(LanguageConfig(source=checkpoint), torch.bfloat16)
    assert {parameter.dtype for parameter in language.parameters()} == {torch.bfloat16}


def test_the_names_that_transformers_writes_are_the_published_ones(shards):
    names = json.loads((shards / INDEX).read_text())["weight_map"]
    parts = {"vision_model", "query_tokens", "qformer", "language_projection", "language_model"}
    assert {name.split(".")[0] for name in names} == parts


LOADERS = {
    "vision_model.post_layernorm.weight": load_vision,
    "qformer.encoder.layer.3.output_query.dense.weight": start_training,
    "query_tokens": start_training,
    "language_projection.bias": start_training,
    "language_model.lm_head.weight": load_llama,
}


def only_the_needed_shards(folder, prefixes):
    """Delete every shard that holds no tensor of these prefixes."""
    shard_of = json.loads((folder / INDEX).read_text())["weight_map"]
    needed = {shard for name, shard in shard_of.items() if name.startswith(prefixes)}
    unneeded = set(shard_of.values()) - needed
    assert unneeded
    for shard in unneeded:
        (folder / shard).unlink()


@pytest.mark.parametrize(("prefixes", "load"), [(("vision_model.",), load_vision), (("language_model.",), load_llama)])
def test_only_shards_with_needed_tensors_are_opened(shards, prefixes, load):
    only_the_needed_shards(shards, prefixes)
    load(shards)


def test_asking_whether_a_tensor_exists_opens_no_shard(shards):
    tensors = Repository(str(shards)).tensors()
    for shard in shards.glob("*.safetensors"):
        shard.unlink()
    assert "query_tokens" in tensors
    assert "query_tokens.weight" not in tensors


def rewrite(folder, tensors):
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def message_of(load, folder):
    with pytest.raises(UserError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_tensor_is_named(instructblip, shards, name):
    rewrite(shards, {key: value for key, value in instructblip.state_dict().items() if key != name})
    assert name in message_of(LOADERS[name], shards)


@pytest.mark.parametrize("name", LOADERS)
def test_a_misshapen_tensor_is_named_with_both_shapes(instructblip, shards, name):
    tensors = instructblip.state_dict()
    right = tensors[name]
    wrong = right[:, 1:] if name == "query_tokens" else right[1:]
    rewrite(shards, {**tensors, name: wrong.clone()})
    message = message_of(LOADERS[name], shards)
    assert f"{name}: checkpoint {tuple(wrong.shape)}, model {tuple(right.shape)}" in message


def test_query_tokens_of_another_number_are_not_spread_over_all(instructblip, shards):
    """One query token would broadcast to all four."""
    rewrite(shards, {**instructblip.state_dict(), "query_tokens": instructblip.query_tokens[:, :1].detach().clone()})
    assert "query_tokens: checkpoint (1, 1, 12), model (1, 4, 12)" in message_of(start_training, shards)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.999])
def test_a_shard_cut_short_is_named(shards, kept):
    shard = json.loads((shards / INDEX).read_text())["weight_map"]["vision_model.post_layernorm.weight"]
    content = (shards / shard).read_bytes()
    (shards / shard).write_bytes(content[: int(kept * len(content))])
    assert shard in message_of(load_vision, shards)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.999])
def test_a_bin_file_cut_short_is_named(instructblip, shards, kept):
    rewrite(shards, instructblip.state_dict())
    path = shards / "pytorch_model.bin"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert "pytorch_model.bin" in message_of(load_vision, shards)


def test_an_index_cut_short_is_named(shards):
    path = shards / INDEX
    path.write_text(path.read_text()[:-40])
    assert INDEX in message_of(load_vision, shards)
    path.write_text("{}")
    assert INDEX in message_of(load_vision, shards)


def test_a_missing_shard_and_a_shard_without_its_tensor_are_named(shards):
    shard_of = json.loads((shards / INDEX).read_text())["weight_map"]
    name = "vision_model.post_layernorm.weight"
    other = next(shard for shard in shard_of.values() if shard != shard_of[name])
    (shards / shard_of[name]).write_bytes((shards / other).read_bytes())
    message = message_of(load_vision, shards)
    assert name in message or "vision_model." in message
    (shards / shard_of[name]).unlink()
    assert shard_of[name] in message_of(load_vision, shards)


def test_a_folder_of_another_network_is_refused(shards):
    (shards / "config.json").write_text(json.dumps({"model_type": "blip"}))
    assert "instructblip" in message_of(load_vision, shards)
    assert "instructblip" in message_of(lambda folder: describe_encoder(EncoderConfig(source=str(folder))), shards)


def test_a_pickle_is_not_run(shards, instructblip, capsys):
    class Harmful:
        def __reduce__(self):
            return (print, ("it ran",))

    rewrite(shards, {**instructblip.state_dict(), "extra": Harmful()})
    assert "pytorch_model.bin" in message_of(load_vision, shards)
    assert "it ran" not in capsys.readouterr().out


def test_a_projection_for_another_language_model_starts_at_random_and_says_so(instructblip, shards, caplog):
    tensors = instructblip.state_dict()
    rewrite(shards, {**tensors, "language_projection.weight": tensors["language_projection.weight"][:7].clone()})
    with caplog.at_level(logging.WARNING):
        model = start_training(shards)
    assert "language_projection starts at random" in caplog.text
    assert not torch.equal(model.language_projection.weight, instructblip.language_projection.weight)
    assert torch.equal(model.qformer.query_tokens, instructblip.query_tokens)
