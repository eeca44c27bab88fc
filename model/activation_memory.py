"""How much the Q-Former keeps for its backward pass: the law that bounds a training step's memory."""

from model.qformer.qformer import MemoryQFormer


def kept_numbers(model: MemoryQFormer, *, batch: int, frames: int, patches: int, words: int) -> int:
    """Numbers that autograd keeps for one chunk of frames (`MemoryQFormer.chunks`), dropout aside.

    With Y layers, X of them with cross-attention, and F the feed-forward width, c = `frames` and a full bank:

        B c [P (C + 2 H X) + N (8 H + 2 F) Y + 4 Q H X]     the chunk's frames: visual inputs, keys and values, hidden
      + B M [P (C + 2 H X) + 3 N H Y]                       the slots carried in, as they are and projected
      + 2 H (C X + H Y)                                     key and value weights side by side

    T does not appear: a longer clip has more chunks, and one is kept at a time. To this, the backward pass adds for a
    moment one layer's pages and their gradients, 4 B P H (M + 1 + 2 c), at most. Dropout adds B c (2 N Y + Q X) H.

    Args:
        model: whose widths.
        batch: B.
        frames: c, frames of the chunk.
        patches: P.
        words: L.
    """
    shape = model.qformer.config
    hidden, visual, inner = shape.hidden_size, shape.encoder_hidden_size, shape.intermediate_size
    layers, crossing = len(model.layers), sum(layer.has_cross_attention for layer in model.layers)
    queries, slots = model.num_queries, model.config.memory_slots
    tokens = queries + words
    seen = patches * (visual + 2 * hidden * crossing)
    frame = seen + tokens * (8 * hidden + 2 * inner) * layers + 4 * queries * hidden * crossing
    slot = seen + 3 * tokens * hidden * layers
    return batch * (frames * frame + slots * slot) + 2 * hidden * (visual * crossing + hidden * layers)
