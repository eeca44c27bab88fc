"""A tiny DINOv2 with random weights, in each variant, as transformers writes it."""

import torch
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

BLOCKS, WIDTH, PATCH_PX, CROP_PX = 3, 16, 14, 42
PATCHES, REGISTERS = (CROP_PX // PATCH_PX) ** 2, 2
SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "patch_size": PATCH_PX,
    "image_size": 70,  # the table of positions is for more patches than a picture has, as in the published DINOv2
}
VARIANTS = {
    "plain": (Dinov2Model, Dinov2Config(**SHAPE)),
    "swiglu": (Dinov2Model, Dinov2Config(**SHAPE, use_swiglu_ffn=True)),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=REGISTERS)),
}


def build(variant):
    torch.manual_seed(0)
    network_class, config = VARIANTS[variant]
    network = network_class(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def save(network, folder, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **options):
    network.save_pretrained(folder, **options)
    size = {"height": CROP_PX, "width": CROP_PX}
    BitImageProcessorPil(
        size={"shortest_edge": 48}, crop_size=size, image_mean=list(mean), image_std=list(std)
    ).save_pretrained(folder)
    return folder
