"""A `.pth` in the layout of LAVIS or MA-LMM, laid over an InstructBLIP, gives the class that it was written from."""

import argparse
import re
import shlex
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from test_published_checkpoints import QUERIES, VISUAL_WIDTH, build_instructblip, save_sharded
from tiny_qformer import random_text, randomise
from tolerances import FLOAT32_HIDDEN, FLOAT32_NETWORK, relative_difference
from transformers import AutoModelForCausalLM, InstructBlipVisionModel

from model.config import LanguageConfig, ModelConfig, QFormerConfig
from model.frozen import load_named
from model.language import SpecialTokens
from stages.errors import UserError
from stages.networks.build import build_diff_lmm, load_language
from stages.weights.lavis import open_lavis, translate

FRAMES = 4
HIDDEN = 12
LAYERS = 4


@pytest.fixture(scope="module")
def trained():
    """What MA-LMM's training would end with: other weights than those that training starts from."""
    model = build_instructblip()
    torch.manual_seed(5)
    randomise(model)
    for layer in model.vision_model.encoder.layers:
        # LAVIS has no bias on the keys.
        layer.self_attn.qkv.bias.data.unflatten(0, (3, -1))[1] = 0
    return model


@pytest.fixture(scope="module")
def positions():
    torch.manual_seed(6)
    return torch.randn(FRAMES, VISUAL_WIDTH)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructblip")
    save_sharded(build_instructblip(), folder)
    return str(folder)


def lavis_state(model, positions):
    """The whole of LAVIS's state dict, name by name as its classes call the parts."""
    state = OrderedDict()
    vision = model.vision_model
    state["visual_encoder.cls_token"] = vision.embeddings.class_embedding
    state["visual_encoder.pos_embed"] = vision.embeddings.position_embedding
    for part in ("weight", "bias"):
        state[f"visual_encoder.patch_embed.proj.{part}"] = getattr(vision.embeddings.patch_embedding, part)
        state[f"ln_vision.{part}"] = getattr(vision.post_layernorm, part)
    for index, layer in enumerate(vision.encoder.layers):
        block = f"visual_encoder.blocks.{index}"
        state[f"{block}.attn.q_bias"], _, state[f"{block}.attn.v_bias"] = layer.self_attn.qkv.bias.chunk(3)
        state[f"{block}.attn.qkv.weight"] = layer.self_attn.qkv.weight
        parts = {
            "attn.proj": layer.self_attn.projection,
            "norm1": layer.layer_norm1,
            "norm2": layer.layer_norm2,
            "mlp.fc1": layer.mlp.fc1,
            "mlp.fc2": layer.mlp.fc2,
        }
        for name, module in parts.items():
            state |= {f"{block}.{name}.{part}": value for part, value in module.state_dict().items()}
    state["query_tokens"] = model.query_tokens
    bert = model.qformer
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(16)[None]
    state["Qformer.bert.embeddings.word_embeddings.weight"] = bert.embeddings.word_embeddings.weight
    state["Qformer.bert.embeddings.position_embeddings.weight"] = bert.embeddings.position_embeddings.weight
    for part in ("weight", "bias"):
        state[f"Qformer.bert.embeddings.LayerNorm.{part}"] = getattr(bert.embeddings.layernorm, part)
    for index, layer in enumerate(bert.encoder.layer):
        inside = f"Qformer.bert.encoder.layer.{index}"
        parts = {
            "intermediate.dense": layer.intermediate.dense,
            "output.dense": layer.output.dense,
            "output.LayerNorm": layer.output.LayerNorm,
            "intermediate_query.dense": layer.intermediate_query.dense,
            "output_query.dense": layer.output_query.dense,
            "output_query.LayerNorm": layer.output_query.LayerNorm,
        }
        for name in ("attention", "crossattention"):
            block = getattr(layer, name, None)
            if block is not None:
                parts |= {f"{name}.self.{part}": getattr(block.attention, part) for part in ("query", "key", "value")}
                parts |= {f"{name}.output.{part}": getattr(block.output, part) for part in ("dense", "LayerNorm")}
        for name, module in parts.items():
            state |= {f"{inside}.{name}.{part}": value for part, value in module.state_dict().items()}
    state["Qformer.cls.predictions.bias"] = torch.zeros(40)
    state |= {f"llm_model.{name}": value for name, value in model.language_model.state_dict().items()}
    state |= {f"llm_proj.{name}": value for name, value in model.language_projection.state_dict().items()}
    state["image_pe.weight"] = positions
    return OrderedDict((name, value.detach().clone()) for name, value in state.items())


def trained_part(state):
    """What MA-LMM:lavis/runners/runner_base.py:582-597 saves: trained parameters and buffers."""
    kept = ("query_tokens", "Qformer.bert.", "llm_proj.", "ln_vision.", "image_pe.")
    return OrderedDict((name, value) for name, value in state.items() if name.startswith(kept))


def write_ma_lmm(path, state, **more):
    content = {"model": state, "optimizer": {"state": {0: {"step": 3}}}, "scaler": {"scale": 65536.0}, "epoch": 19}
    torch.save({**content, "config": {"run": {"lr_sched": "linear_warmup_cosine_lr"}}, **more}, path)
    return path


@pytest.fixture(params=["MA-LMM", "LAVIS", "state dict"])
def start(request, trained, positions, tmp_path):
    state, path = lavis_state(trained, positions), tmp_path / "checkpoint.pth"
    if request.param == "MA-LMM":
        return write_ma_lmm(path, trained_part(state))
    torch.save({"model": state} if request.param == "LAVIS" else state, path)
    return path


def begin(base, start, reports=None, **qformer):
    settings = {"source": base, "start": str(start), "memory_slots": 2, "max_frames": FRAMES, **qformer}
    config = ModelConfig(qformer=QFormerConfig(**settings), language=LanguageConfig(source=base))
    return build_diff_lmm(
        config,
        language=load_language(config.language, torch.float32),
        special=SpecialTokens(2, 2),
        visual_width=VISUAL_WIDTH,
        target_width=None,
        seed=3,
        on_loaded=(lambda _: None) if reports is None else reports.append,
    )


@torch.no_grad()
def test_the_model_gives_the_hidden_states_of_the_class_that_the_file_was_written_from(base, start, trained, positions):
    model = begin(base, start).eval()
    features, text = torch.randn(2, 1, 5, VISUAL_WIDTH), random_text(6, 3)
    expected = trained.qformer(
        input_ids=text.ids,
        attention_mask=torch.cat([torch.ones(2, QUERIES), text.mask], dim=1).long(),
        query_embeds=trained.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=features[:, 0] + positions[0],
        output_hidden_states=True,
    )
    levels = model.qformer(features, text).levels
    for level, hidden in zip(levels, expected.hidden_states, strict=True):
        assert (level[:, 0] - hidden[:, :QUERIES]).abs().max() <= FLOAT32_HIDDEN
    told = trained.language_projection(expected.last_hidden_state[:, :QUERIES])
    assert relative_difference(model.watch(features, text)[0], told) <= FLOAT32_NETWORK


def test_every_trained_parameter_comes_from_the_file(base, start, trained, positions):
    model = begin(base, start)
    expected = {f"qformer.qformer.{name}": value for name, value in trained.qformer.named_parameters()}
    expected |= {f"language_projection.{name}": value for name, value in trained.language_projection.named_parameters()}
    expected |= {"qformer.query_tokens": trained.query_tokens, "qformer.frame_positions.weight": positions}
    own = model.trained_parameters()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], value) for name, value in expected.items())


@torch.no_grad()
def test_a_whole_lavis_file_fills_vision_tower_and_language_model(trained, positions, tmp_path):
    path = tmp_path / "lavis.pth"
    torch.save({"model": lavis_state(trained, positions)}, path)
    tensors = open_lavis(path)
    vision = InstructBlipVisionModel(trained.config.vision_config).eval()
    load_named(vision, tensors, prefix="vision_model.")
    pixels = torch.randn(1, 3, 224, 224)
    expected = trained.vision_model(pixels).last_hidden_state
    assert relative_difference(vision(pixels).last_hidden_state, expected) <= FLOAT32_NETWORK
    language = AutoModelForCausalLM.from_config(trained.config.text_config).eval()
    load_named(language, tensors, prefix="language_model.")
    ids = torch.randint(0, 50, (2, 7))
    assert relative_difference(language(ids).logits, trained.language_model(ids).logits) <= FLOAT32_NETWORK


# --- what is told


def test_the_report_names_what_was_taken_left_and_never_given(base, trained, positions, tmp_path):
    state = trained_part(lavis_state(trained, positions))
    del state["image_pe.weight"]
    reports = []
    model = begin(base, write_ma_lmm(tmp_path / "ma.pth", state), reports)
    first, second = reports
    assert first.source == base
    assert first.initialised == second.initialised == ("qformer.frame_positions.weight",)
    assert not model.qformer.frame_positions.weight.any()
    assert {name.split(".")[0] for name in first.taken} == {"qformer", "query_tokens", "language_projection"}
    assert {name.split(".")[0] for name in first.left} == {"vision_model", "language_model"}
    assert set(second.left) == {"Qformer.bert.embeddings.position_ids", "ln_vision.weight", "ln_vision.bias"}
    assert set(second.taken) == state.keys() - set(second.left)
    assert second.summary() == (
        f"{tmp_path / 'ma.pth'}: took {len(second.taken)} (query_tokens 1, Qformer {len(second.taken) - 3}, "
        "llm_proj 2), left 3 (ln_vision 2, Qformer 1); still at the start: 1 (qformer.frame_positions 1)"
    )


def test_what_the_file_lacks_stays_as_instructblip_has_it(base, trained, positions, tmp_path):
    state = trained_part(lavis_state(trained, positions))
    lacking = "encoder.layer.3.output_query.dense.weight"
    del state[f"Qformer.bert.{lacking}"]
    reports = []
    model = begin(base, write_ma_lmm(tmp_path / "ma.pth", state), reports)
    assert torch.equal(
        model.qformer.qformer.get_parameter(lacking), build_instructblip().qformer.get_parameter(lacking)
    )
    assert reports[1].initialised == ()


def test_the_value_biases_are_not_those_of_the_queries(trained, positions, tmp_path):
    """A map that swapped them would load without an error."""
    path = tmp_path / "lavis.pth"
    torch.save(lavis_state(trained, positions), path)
    bias = open_lavis(path)["vision_model.encoder.layers.1.self_attn.qkv.bias"]
    assert torch.equal(bias, trained.vision_model.encoder.layers[1].self_attn.qkv.bias)
    query, key, value = bias.chunk(3)
    assert not torch.equal(query, value)
    assert not key.any()


def test_every_name_that_is_shown_is_one_of_transformers(trained, positions):
    shown = {translate(name) for name in lavis_state(trained, positions) if "_bias" not in name.rpartition(".")[2]}
    assert shown - set(trained.state_dict()) == {None, "image_pe.weight"}


# --- files that do not do


def message_of(base, path, **qformer):
    with pytest.raises(UserError) as caught:
        begin(base, path, **qformer)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_file_with_objects_is_refused_with_the_command_that_takes_the_tensors_out(base, trained, positions, tmp_path):
    state = trained_part(lavis_state(trained, positions))
    path = write_ma_lmm(tmp_path / "ma lmm.pth", state, config=argparse.Namespace(lr=1e-4))
    message = message_of(base, path)
    assert "holds more than tensors, which could run as code and is not loaded. If you trust" in message
    command = re.search(r"`python (.*)` and name (.*) instead", message)
    done = subprocess.run([sys.executable, *shlex.split(command[1])], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    begin(base, tmp_path / command[2])


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.999])
def test_a_file_cut_short_is_named(base, trained, positions, tmp_path, kept):
    path = write_ma_lmm(tmp_path / "ma.pth", trained_part(lavis_state(trained, positions)))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert "damaged" in message_of(base, path)


@pytest.mark.parametrize("content", [torch.ones(3), {"model": torch.ones(3)}, {"model": {}}, {"epoch": 3}])
def test_a_file_without_tensors_by_name_is_refused(base, tmp_path, content):
    torch.save(content, tmp_path / "ma.pth")
    assert "holds no tensors by name" in message_of(base, tmp_path / "ma.pth")


def test_a_file_of_another_network_is_refused(base, tmp_path):
    torch.save({"model": {"visual_encoder.cls_token": torch.zeros(1, 1, VISUAL_WIDTH)}}, tmp_path / "eva.pth")
    assert "holds no tensor of the Q-Former" in message_of(base, tmp_path / "eva.pth")


def test_a_file_that_is_not_there_is_named(base, tmp_path):
    assert "file not found" in message_of(base, tmp_path / "nothing.pth")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(base, trained, positions, tmp_path):
    path = write_ma_lmm(tmp_path / "ma.pth", trained_part(lavis_state(trained, positions)))
    expected = f"image_pe.weight: checkpoint {(FRAMES, VISUAL_WIDTH)}, model {(FRAMES + 1, VISUAL_WIDTH)}"
    assert expected in message_of(base, path, max_frames=FRAMES + 1)


def test_a_projection_for_another_language_model_stays_at_its_start(base, trained, positions, tmp_path, caplog):
    state = trained_part(lavis_state(trained, positions))
    state["llm_proj.weight"] = torch.zeros(7, HIDDEN)
    reports = []
    model = begin(base, write_ma_lmm(tmp_path / "ma.pth", state), reports)
    assert "language_projection keeps its starting values" in caplog.text
    assert torch.equal(model.language_projection.weight, build_instructblip().language_projection.weight)
    assert {"llm_proj.weight", "llm_proj.bias"} <= set(reports[1].left)
    assert torch.equal(model.qformer.query_tokens, trained.query_tokens)
