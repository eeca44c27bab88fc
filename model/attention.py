"""Attention of the Q-Former's plain form, by torch's own kernel; the clip form's is `model.paged_attention`."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def project_heads(linear: nn.Linear, inputs: Tensor, heads: int) -> Tensor:
    """Project [B, K, width] and split into heads: [B, heads, K, H / heads]."""
    projected: Tensor = linear(inputs)
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(inner: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention over heads, joined again: [B, N, H].

    `inner` is an `InstructBlipQFormerMultiHeadAttention`, asked only for its dropout. The mask is boolean, True where
    a key is seen, and broadcasts to [B, heads, N, K].
    """
    dropout = inner.attention_dropout if inner.training else 0.0
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return context.transpose(1, 2).flatten(2)
