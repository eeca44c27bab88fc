"""The frozen language model in pieces on all training processes, each layer put together while it computes (FSDP)."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard_layers(model: "PreTrainedModel", device: torch.device) -> None:
    """Cut every layer's weights into as many pieces as torch's default process group has processes; keep one.

    A layer is gathered for its forward, thrown away, and gathered again for its backward. Embeddings, the last norm and
    the head stay whole. From then on every process has to run the model equally often.

    Args:
        model: frozen, and the same on every process, on the CPU or the device.
        device: where the pieces go, layer by layer.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = decoder_layers(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    pieces = {id(parameter) for parameter in layers.parameters()}
    # The model itself has nothing to cut, but as the root it lets the next layer be gathered while one computes.
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if id(p) not in pieces})


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of layers, which is the list of modules with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(parameter.numel() for parameter in found.parameters()))
