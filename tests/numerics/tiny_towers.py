"""Tiny vision towers of CLIP and InstructBLIP with random weights, in the files that transformers writes of them."""

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
)

from model.pixels import CLIP_PIXELS

LAYERS, WIDTH, SIZE_PX = 3, 16, 28
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": SIZE_PX,
    "patch_size": 14,
    "projection_dim": 8,
}
TEXT = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def build_clip():
    torch.manual_seed(0)
    words = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
    return randomise(CLIPModel(CLIPConfig(vision_config=TOWER, text_config={**TEXT, **words})))


def build_instructblip():
    torch.manual_seed(0)
    config = InstructBlipConfig(
        vision_config={name: value for name, value in TOWER.items() if name != "projection_dim"},
        qformer_config={**TEXT, "vocab_size": 20},
        text_config=LlamaConfig(**TEXT, vocab_size=20).to_dict(),
        num_query_tokens=2,
    )
    return randomise(InstructBlipForConditionalGeneration(config))


def save_whole_clip(folder):
    build_clip().save_pretrained(folder)
    return build_clip().vision_model


def save_bare_tower(folder):
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    tower.load_state_dict(build_clip().vision_model.state_dict())
    tower.save_pretrained(folder)
    return tower


def save_projected_tower(folder):
    """The names that a bare tower had before transformers 5, and what they have with a projection still."""
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER))
    tower.vision_model.load_state_dict(build_clip().vision_model.state_dict())
    tower.save_pretrained(folder)
    return tower.vision_model


def save_instructblip(folder):
    build_instructblip().save_pretrained(folder)
    return build_instructblip().vision_model


@torch.no_grad()
def outputs_of_the_class(tower, frames, mean=CLIP_PIXELS.mean, std=CLIP_PIXELS.std):
    """What transformers computes from frames [B, S, S, 3] uint8 that are normalised plainly."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return tower.eval()((frames.permute(0, 3, 1, 2) / 255 - mean) / std, output_hidden_states=True)
