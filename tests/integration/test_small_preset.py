"""Preset `small` on tiny checkpoints of its architectures: InstructBLIP's tower and Q-Former, a Qwen2, a DiT."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.runs.models import about_of
from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.frozen.load import load_encoder
from stages.networks.build import load_language
from stages.networks.memory_law import frozen_bytes
from stages.networks.pretrained import LoadedModel
from stages.networks.quantization import layer_matrices
from stages.networks.tokens import Tokenizers
from tests.tiny_small import END, PATCHES, QWEN_WIDTH, VISUAL_WIDTH, save_instructblip, save_qwen

QUESTION = "what is the scene of the movie?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("small")
    return save_instructblip(made / "instructblip"), save_qwen(made / "qwen")


def config_of(folders, *more):
    instructblip, qwen = folders
    sources = {"encoder": instructblip, "qformer": instructblip, "language": qwen, "teacher": "bundled:tiny-dit"}
    overrides = [f"{part}.source={source}" for part, source in sources.items()]
    return resolve(preset="small", overrides=[*overrides, "qformer.memory_slots=3", *more]).config


def start(config):
    about = about_of(config, locations.card_of(config))
    return LoadedModel.start(about, visual_width=VISUAL_WIDTH, target_width=96, seed=1)


def without_the_language_model(folder):
    """Remove the files that hold nothing else; how many."""
    shard_of = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in shard_of.items() if not name.startswith("language_model.")}
    others = set(shard_of.values()) - needed
    for shard in others:
        (folder / shard).unlink()
    return len(others)


def test_the_shards_of_the_instructblips_language_model_are_not_needed(folders, tmp_path):
    instructblip = save_instructblip(tmp_path / "cut")
    assert without_the_language_model(instructblip) > 2
    config = config_of((instructblip, folders[1]))
    assert load_encoder(config.encoder).width == VISUAL_WIDTH
    assert start(config).trained_count > 0


def test_the_qformer_is_the_checkpoints_and_the_projection_starts_at_random(folders):
    loaded = start(config_of(folders))
    _, base = loaded.loading
    stored = {}
    for path in folders[0].glob("*.safetensors"):
        stored |= load_file(path)
    own = loaded.model.state_dict()
    assert torch.equal(own["qformer.query_tokens"], stored["query_tokens"])
    name = "encoder.layer.0.crossattention.attention.key.weight"
    assert torch.equal(own[f"qformer.qformer.{name}"], stored[f"qformer.{name}"])
    assert loaded.model.language_projection.weight.shape == (QWEN_WIDTH, 24)
    assert "language_projection.weight" in base.initialised
    assert not any(one.startswith("language_projection") for one in base.taken)


def test_the_language_model_is_the_checkpoints_with_biases_and_one_matrix_for_both_ends(folders):
    config = config_of(folders)
    mine, theirs = load_language(config.language, torch.float32), AutoModelForCausalLM.from_pretrained(folders[1])
    ids = torch.arange(12)[None]
    assert torch.equal(mine(input_ids=ids).logits, theirs.float()(input_ids=ids).logits)
    assert mine.model.layers[0].self_attn.k_proj.bias.abs().max() > 0
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    stored = sum(tensor.numel() for tensor in load_file(folders[1] / "model.safetensors").values())
    assert frozen_bytes(mine, "none") == 2 * stored
    assert len(list(layer_matrices(mine))) == 2 * 7


def test_prompts_are_those_of_ma_lmm_without_the_models_chat_template(folders):
    tokenizers = Tokenizers.load(config_of(folders))
    end = tokenizers.language.convert_tokens_to_ids(END)
    assert tokenizers.language.bos_token_id is None
    assert tokenizers.language.chat_template is not None
    ids, mask = tokenizers.prompts([QUESTION])
    assert ids[0, 0] == end == tokenizers.special.end_id
    assert tokenizers.language.decode(ids[0, 1:]) == QUESTION
    row = tokenizers.training([QUESTION], ["hotel"])
    answer = row.ids[0][row.answer_mask[0]].tolist()
    assert (tokenizers.language.decode(answer[:-1]), answer[-1]) == ("hotel", end)
    assert mask.all()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_it_learns_and_answers_with_five_beams(folders, quantize):
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    loaded = start(config_of(folders, f"language.quantize={quantize}", "train.precision=bfloat16"))
    torch.manual_seed(0)
    features = torch.randn(1, 6, PATCHES, VISUAL_WIDTH)
    (reply,) = loaded.answer(features, [QUESTION])
    assert len(reply.answers) == 5
    tokens = loaded.tokenizers.training([QUESTION], ["hotel"])
    model = loaded.model.train()
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=3e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        queries = model.language_projection(
            model.qformer(features, loaded.tokenizers.question([QUESTION])).levels[-1][:, -1]
        )
        loss = model.language.answer_loss(queries, tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
