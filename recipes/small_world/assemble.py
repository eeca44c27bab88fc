"""Writes the trained networks in the layouts of the published checkpoints."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from safetensors.torch import save_file
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipVisionModel

from recipes.small_world.diffusion import noise_schedule
from recipes.small_world.optimise import Trained
from recipes.small_world.reading import llama_config, reading_accuracy, teach_to_read
from recipes.small_world.settings import WorldSettings
from recipes.small_world.vocabulary import write_tokenizer

TOWER_FOLDER, TEACHER_FOLDER = "tiny-instructblip", "tiny-dit"
_QUERIES = 8
_QFORMER = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 64,
}
_READ_CAPTIONS = 500


def write_instructblip(folder: Path, tower: InstructBlipVisionModel, settings: WorldSettings) -> tuple[Trained, float]:
    """Write an InstructBLIP: the trained tower, a Q-Former to start from, and a language model trained here.

    Returns:
        The language model's training, and its share of right answers on captions drawn with another seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, bert_style=False)
    question_tokenizer = write_tokenizer(folder / "qformer_tokenizer", bert_style=True)
    config = InstructBlipConfig(
        vision_config=tower.config.to_dict(),
        qformer_config={"vocab_size": len(question_tokenizer), **_QFORMER},
        text_config=llama_config(settings.reading, len(tokenizer)).to_dict(),
        num_query_tokens=_QUERIES,
    )
    torch.manual_seed(settings.seed)
    model = InstructBlipForConditionalGeneration(config)
    _start_qformer(model)
    model.vision_model.load_state_dict(tower.state_dict())
    trained = teach_to_read(model.language_model, tokenizer, settings.reading, seed=settings.seed)
    accuracy = reading_accuracy(model.language_model, tokenizer, seed=settings.probe_seed, count=_READ_CAPTIONS)
    # Saved by name, not with save_pretrained: the names are those of the published file whatever transformers does.
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str), encoding="utf-8")
    return trained, accuracy


def _start_qformer(model: InstructBlipForConditionalGeneration) -> None:
    """Give random weights what training gives real ones: queries that differ, heads that look at some patches.

    With transformers' starting values every patch is attended to alike, and a detail of one patch drowns.
    """
    model.query_tokens.data.normal_(std=0.5)
    for layer in model.qformer.encoder.layer:
        if layer.has_cross_attention:
            for linear in (layer.crossattention.attention.query, layer.crossattention.attention.key):
                linear.weight.data.normal_(std=0.2)


def write_dit(folder: Path, vae: AutoencoderKL, transformer: DiTTransformer2DModel) -> None:
    """Write a DiT pipeline in diffusers' layout."""
    vae.save_pretrained(folder / "vae")
    transformer.save_pretrained(folder / "transformer")
    noise_schedule().save_pretrained(folder / "scheduler")
