"""The frozen language model in 8 or 4 bits, by bitsandbytes (the extra `quant`).

Quantised are the matrices of its layers, which are nearly all of a large model: embeddings, norms and the head stay as
they are. They never change, but gradients pass through them to the model's inputs.

    int8    LLM.int8() (arXiv 2208.07339): rows of the matrix and rows of the input in 8 bits, input columns with an
            entry of 6 or more at full precision; the backward pass takes the matrix as it is stored, and the input's
            rounding as none
    nf4     QLoRA's NormalFloat (arXiv 2305.14314): blocks of 64 numbers in 4 bits, with scales that are quantised once
            more; widened to the arithmetic's type for each product, in both directions
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.config import Quantization
from stages.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64
"""Numbers that share a scale in nf4."""
# LLM.int8()'s own threshold, which is transformers' default too.
_OUTLIER = 6.0
_KEY = "language.quantize"


def require_quantization(kind: Quantization, *, sharded: bool = False) -> None:
    """UserError unless this machine and this training can hold the language model so.

    Args:
        kind: how it is to be held.
        sharded: whether its layers are to be in pieces on several processes.
    """
    from importlib.util import find_spec

    if kind == "none":
        return
    if sharded:
        raise UserError(
            "a quantised language model cannot be cut into pieces",
            where="train.shard_language",
            received="fsdp",
            allowed=f"none with {_KEY}={kind}",
            hint=f"let each process have it whole, or leave out {_KEY}",
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "bitsandbytes is not installed",
            where=_KEY,
            received=kind,
            hint='install it with pip install "diff-lmm[quant]", or leave it out',
        )


def layer_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model's layers that are one matrix each, by their names in the model."""
    from transformers.pytorch_utils import Conv1D

    from stages.networks.sharding import decoder_layers

    inside = {id(module) for module in decoder_layers(model).modules()}
    for name, module in model.named_modules():
        # Exactly these: what is derived from them may compute in other ways.
        if id(module) in inside and type(module) in (nn.Linear, Conv1D):
            yield name, module


def shape_of(matrix: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of one of `layer_matrices`."""
    assert isinstance(matrix.weight, Tensor)
    outputs, inputs = matrix.weight.shape if isinstance(matrix, nn.Linear) else reversed(matrix.weight.shape)
    return outputs, inputs


def quantize_layers(model: "PreTrainedModel", kind: Quantization, dtype: torch.dtype, device: torch.device) -> None:
    """Put a quantised module in the place of each matrix of the layers, one after the other.

    The model stays where it is but for these, so a device never holds more than one matrix in full.

    Args:
        model: weights loaded, on the CPU.
        kind: int8 or nf4.
        dtype: arithmetic of nf4's products.
        device: where the quantised matrices go, and where they are made.
    """
    for name in [name for name, _ in layer_matrices(model)]:
        made = _quantized(model.get_submodule(name), kind, dtype)
        model.set_submodule(name, made.to(device).requires_grad_(requires_grad=False))


def _quantized(matrix: nn.Module, kind: Quantization, dtype: torch.dtype) -> nn.Module:
    """The same product of a matrix that bitsandbytes rounds as soon as it is moved to a device, the CPU included."""
    import bitsandbytes

    assert isinstance(matrix.weight, Tensor)
    outputs, inputs = shape_of(matrix)
    # transformers' Conv1D, of GPT-2, is a linear layer with its matrix turned over.
    weight = matrix.weight.data if isinstance(matrix, nn.Linear) else matrix.weight.data.T.contiguous()
    made: Any
    with torch.device("meta"):
        if kind == "int8":
            made = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=_OUTLIER)
            made.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            made = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype)
            made.weight = bitsandbytes.nn.Params4bit(
                weight, requires_grad=False, blocksize=BLOCK, quant_type="nf4", module=made
            )
            # Otherwise, on processors with bfloat16 instructions, the first product without a gradient packs the
            # weights in another way, through which no later gradient would pass.
            made.support_avx512bf16_for_cpu = False
    made.bias = matrix.bias
    # What is new is in training mode, in which bitsandbytes computes in another way on a CPU.
    module: nn.Module = made.train(matrix.training)
    return module


def num_values(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for, which in 4 bits are more than it has entries."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
