"""How much memory a training step of Stage 2 takes, by arithmetic on the networks' shapes; nothing is loaded.

In one process, at the moment when most is held, which is the backward pass of a clip's last chunk of frames:

    frozen language model     `frozen_bytes`; `sharded_bytes` where its layers are sharded
    trained parameters        16 bytes each: value, gradient and AdamW's two moments, all float32; under autocast 2
                              more, for the copy that it computes with
    per clip of a part:
      features                as stored in the cache
      Q-Former                `kept_numbers`, dropout, the slots for the next chunk; at most 4 bytes each
      and the more of         one layer's pages while the Q-Former goes back, and before that
      language model          S tokens with `language_kept_bytes` each

Left out are what torch and CUDA take for themselves (about a gigabyte) and the holes in the allocator's memory. A
quantised matrix is widened while it computes, forward and backward, and thrown away: the largest of Vicuna-7B's takes
0.09 GB, at a moment when the Q-Former holds less than in its own backward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.config import ModelConfig, Quantization
from model.qformer.qformer import MemoryQFormer, frames_per_chunk_of
from stages.config import TrainConfig
from stages.errors import UserError
from stages.networks.quantization import BLOCK, layer_matrices, shape_of
from stages.weights.instructblip import instructblip_config, language_config
from stages.weights.repository import Repository

if TYPE_CHECKING:
    from model.diff_lmm import DiffLMM

TRAINED_BYTES = 16
# Under autocast some of what is kept is bfloat16; float32 is the most.
_KEPT_BYTES = 4
FLOAT32_BYTES = 4
ASSUMED_WORDS, ASSUMED_TEXT = 16, 32
"""Tokens of a question, and of prompt and answer, where none are at hand to be counted: LVU's have fewer."""
# nf4: the blocks' scales are stored in a byte each, and so many of them share a scale of their own. Each matrix has the
# tables of the 16 and 256 values that these bits and bytes stand for, and one float32 more.
_SCALES_BLOCK = 256
_NF4_TABLES = 16 + 256 + 1


@dataclass(frozen=True)
class ClipShape:
    """One clip of a training step: T frames, P patches, L question words, S tokens of the language model's sequence.

    S counts the queries, the prompt and the answer.
    """

    frames: int
    patches: int
    words: int
    sequence: int


@dataclass(frozen=True)
class StepMemory:
    """Bytes in one process.

    Attributes:
        language: frozen weights.
        trained: parameters, gradients and moments.
        clip: what every clip of a part adds.
    """

    language: int
    trained: int
    clip: int

    def total(self, clips: int) -> int:
        """Bytes with so many clips in a part (`train.micro_batch_size`)."""
        return self.language + self.trained + clips * self.clip

    def most_clips(self, budget: int) -> int:
        """Largest part that fits into so many bytes; 0 if none does."""
        return max(0, (budget - self.language - self.trained) // self.clip)


@dataclass(frozen=True)
class Parts:
    """How a step is cut, which changes none of its losses but by rounding.

    Attributes:
        clips: most that go through the networks at once (`train.micro_batch_size`).
        frames: most that the Q-Former computes at once (`train.frames_per_chunk`).
    """

    clips: int
    frames: int

    def halved(self) -> "Parts | None":
        """Fewer clips, or fewer frames where it is one clip; None where it is one frame of one."""
        if self.clips > 1:
            return Parts(-(-self.clips // 2), self.frames)
        return Parts(1, -(-self.frames // 2)) if self.frames > 1 else None

    def __str__(self) -> str:
        return f"train.micro_batch_size={self.clips} and train.frames_per_chunk={self.frames}"


def parts_that_fit(memory_of: Callable[[int], StepMemory], budget: int, whole: Parts) -> Parts:
    """The most clips whose step fits into so many bytes; if none does, one with as many frames as fit, at least one.

    Args:
        memory_of: of a step with so many frames per chunk.
        budget: bytes, those of weights and moments included that `memory_of` counts.
        whole: no more than this.
    """
    parts = whole
    while not (clips := memory_of(parts.frames).most_clips(budget)) and parts.frames > 1:
        parts = Parts(1, -(-parts.frames // 2))
    return Parts(max(1, min(parts.clips, clips)), parts.frames)


def frames_with_loss(config: TrainConfig, frames: int, *, distils: bool) -> int:
    """Most frames in a row of a clip that carry a loss; the last one always does, for the answer."""
    if not distils or config.kd_frames == "last":
        return 1
    return frames if config.kd_frames == "all" else min(frames, config.kd_frames + 1)


def training_memory(
    model: "DiffLMM",
    train: TrainConfig,
    clip: ClipShape,
    *,
    quantize: Quantization,
    dtype: torch.dtype,
) -> StepMemory:
    """Add up a training step's memory from the networks' shapes alone.

    Args:
        model: it may be on the meta device.
        train: the recipe.
        clip: one clip.
        quantize: how the frozen language model's matrices are held.
        dtype: of what is not quantised.
    """
    language = model.language.model
    weights = frozen_bytes(language, quantize, bytes_each=dtype.itemsize)
    if train.shard_language == "fsdp":
        from stages.networks.sharding import decoder_layers

        layers = [dtype.itemsize * sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(language)]
        weights = sharded_bytes(weights, layers, train.processes)
    return step_memory(
        model.qformer,
        clip,
        language_config=language.config,
        language_bytes=weights,
        trained=sum(parameter.numel() for parameter in model.trained_parameters().values()),
        bytes_each=dtype.itemsize,
        quantize=quantize,
        frames_per_chunk=train.frames_per_chunk,
        longest=frames_with_loss(train, clip.frames, distils=model.alignment is not None),
    )


def on_meta(config: ModelConfig, *, target_width: int | None) -> "DiffLMM":
    """Stage 2's model by its configuration files, on the meta device: shapes without memory for a weight.

    Args:
        config: the networks.
        target_width: D of the teacher targets; None to leave out the alignment heads.

    Raises:
        UserError: a configuration that cannot be had, or networks and settings do not fit each other.
    """
    from transformers import AutoModelForCausalLM

    from model.language import SpecialTokens
    from stages.networks.build import new_diff_lmm

    described = language_config(Repository(config.language.source))
    width = instructblip_config(Repository(config.qformer.source)).qformer_config.encoder_hidden_size
    # Making a network seeds and moves torch's generator.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        language = AutoModelForCausalLM.from_config(described)
        try:
            return new_diff_lmm(
                config,
                language=language,
                special=SpecialTokens(0, 0),
                visual_width=width,
                target_width=target_width,
                seed=0,
            )
        except ValueError as error:
            raise UserError(str(error), where="configuration") from error


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


def frozen_bytes(model: nn.Module, quantize: Quantization, *, bytes_each: int = 2) -> int:
    """Bytes of a language model's weights, its layers' matrices as `stages.networks.quantization` has them.

    Args:
        model: not quantised itself; it may lie on the meta device.
        quantize: how they are held.
        bytes_each: per number of what is not quantised; 2 in bfloat16.
    """
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if quantize == "none":
        return numbers * bytes_each
    shapes = [shape_of(matrix) for _, matrix in layer_matrices(model)]
    rest = numbers - sum(outputs * inputs for outputs, inputs in shapes)
    bytes_of = _int8_bytes if quantize == "int8" else _nf4_bytes
    return rest * bytes_each + sum(bytes_of(outputs, inputs) for outputs, inputs in shapes)


def _int8_bytes(outputs: int, inputs: int) -> int:
    """A byte per number, and a float32 scale per row."""
    return outputs * inputs + outputs * FLOAT32_BYTES


def _nf4_bytes(outputs: int, inputs: int) -> int:
    """Half a byte per number, a byte per block, a float32 per `_SCALES_BLOCK` blocks, and the tables."""
    numbers = outputs * inputs
    blocks = -(-numbers // BLOCK)
    return -(-numbers // 2) + blocks + (-(-blocks // _SCALES_BLOCK) + _NF4_TABLES) * FLOAT32_BYTES


def language_kept_bytes(config: Any, *, bytes_each: int, quantize: Quantization = "none") -> int:
    """Bytes that autograd keeps per token to lead a gradient through a frozen language model to its input.

    Weights need no gradient, so the inputs of linear layers are not kept. With width W, feed-forward width F, A = heads
    times head width, G the same of the heads that keys and values have, and b bytes per number, each layer keeps

        2 (4 W)      the inputs of its two norms, which compute in float32
        2 (A + G) b  queries, keys, values and outputs of the attention (its scores are computed again)
        3 F b        gate, gate after its activation, and its partner

    and the last norm 4 W. The loss adds float32 scores of the answer's few tokens. bitsandbytes' products in int8 keep
    their inputs although they do not need them, (2 W + F) b more that nobody else keeps; those in nf4 do not.

    Args:
        config: of a transformers LLaMA or a model with the same layers, such as Qwen2.
        bytes_each: b.
        quantize: how its layers' matrices are held.
    """
    width, inner, head = config.hidden_size, _inner_width(config), head_width(config)
    heads = config.num_attention_heads
    of_keys = getattr(config, "num_key_value_heads", None) or heads
    norm = FLOAT32_BYTES * width
    layer = 2 * norm + (2 * (heads + of_keys) * head + 3 * inner) * bytes_each
    if quantize == "int8":
        layer += (2 * width + inner) * bytes_each
    return config.num_hidden_layers * layer + norm


def qformer_bytes(
    qformer: MemoryQFormer, shape: ClipShape, frames_per_chunk: int | None, longest: int, language_bytes: int = 0
) -> int:
    """Most bytes that one clip holds in the Q-Former, and beside it in the language model.

    It holds them while a chunk of frames goes back, or while a longer one of frames without a loss goes by.

    Args:
        qformer: whose widths.
        shape: of the clip.
        frames_per_chunk: as in `train.frames_per_chunk`.
        longest: most frames in a row that carry a loss; 0 where nothing is learned.
        language_bytes: that the language model keeps until it has gone back, which is before the Q-Former does.
    """
    slots, widths = qformer.config.memory_slots, qformer.qformer.config
    chunk = min(frames_per_chunk or frames_per_chunk_of(slots), shape.frames)
    with_loss = min(chunk, longest)
    hidden, visual, inner = widths.hidden_size, widths.encoder_hidden_size, widths.intermediate_size
    layers, crossing = len(qformer.layers), sum(layer.has_cross_attention for layer in qformer.layers)
    tokens = qformer.num_queries + shape.words
    kept = kept_numbers(qformer, batch=1, frames=with_loss, patches=shape.patches, words=shape.words)
    dropout = with_loss * (2 * tokens * layers + qformer.num_queries * crossing) * hidden
    dropout += with_loss * (slots + 1) * (2 * tokens * layers + shape.patches * (crossing + 1))
    # Slots as they are and projected, of every layer: the next chunk's are there before this one's are gone.
    carried = slots * (shape.patches * (visual + 2 * hidden * crossing) + 3 * tokens * hidden * layers)
    scores = 8 * widths.num_attention_heads * qformer.num_queries * shape.patches * (slots + 1)

    pages = scores + 4 * shape.patches * hidden * (slots + 1 + 2 * with_loss)
    back = _KEPT_BYTES * (kept + carried + dropout) + max(language_bytes, _KEPT_BYTES * pages)
    by = 2 * carried + chunk * (3 * shape.patches * visual + tokens * (8 * hidden + 2 * inner))
    by += scores + 2 * shape.patches * hidden * (2 * (slots + 1) + chunk)
    return max(back if with_loss else 0, _KEPT_BYTES * by if with_loss < chunk else 0)


def step_memory(
    qformer: MemoryQFormer,
    shape: ClipShape,
    *,
    language_config: Any,
    language_bytes: int,
    trained: int,
    feature_bytes: int = 2,
    bytes_each: int = 2,
    quantize: Quantization = "none",
    frames_per_chunk: int | None = None,
    longest: int | None = None,
    read_ahead: int = 0,
) -> StepMemory:
    """Add up a training step's memory.

    Args:
        qformer: its shapes; it may lie on the meta device.
        shape: one clip.
        language_config: of the frozen language model.
        language_bytes: of its weights in one process (`frozen_bytes`, `sharded_bytes`).
        trained: number of trained values.
        feature_bytes: per number in the cache.
        bytes_each: per activation of the language model; 2 in bfloat16.
        quantize: how the language model's matrices are held.
        frames_per_chunk: as in `train.frames_per_chunk`.
        longest: most frames in a row that carry a loss; None: all of a clip's.
        read_ahead: so many parts more lie in the same memory as stored.
    """
    features = shape.frames * shape.patches * qformer.qformer.config.encoder_hidden_size * feature_bytes
    features *= 1 + read_ahead
    language_kept = shape.sequence * language_kept_bytes(language_config, bytes_each=bytes_each, quantize=quantize)
    clip = features + qformer_bytes(qformer, shape, frames_per_chunk, longest or shape.frames, language_kept)
    cast = bytes_each if bytes_each < FLOAT32_BYTES else 0
    return StepMemory(language_bytes, trained * (TRAINED_BYTES + cast), clip)


def row_bytes(config: Any, sequence: int, *, bytes_each: int) -> int:
    """Most bytes that a row of so many tokens takes in a causal language model without gradients.

    Keys and values of all layers, one layer's activations, and the vocabulary's scores with their log-probabilities.

    Args:
        config: of a transformers LLaMA or a model with the same layers.
        sequence: tokens.
        bytes_each: per activation.
    """
    width, inner = config.hidden_size, _inner_width(config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kept = 2 * config.num_hidden_layers * heads * head_width(config) * bytes_each
    layer = (4 * width + 3 * inner) * bytes_each + 2 * FLOAT32_BYTES * width
    return sequence * (kept + layer + config.vocab_size * bytes_each) + 4 * config.vocab_size * FLOAT32_BYTES


def watch_bytes(qformer: MemoryQFormer, shape: ClipShape, *, feature_bytes: int = 2) -> int:
    """Most bytes that one clip takes while it is watched without gradients, its features included."""
    features = shape.frames * shape.patches * qformer.qformer.config.encoder_hidden_size * feature_bytes
    return features + qformer_bytes(qformer, shape, None, 0)


def head_width(config: Any) -> int:
    """Of a transformers LLaMA or a model with the same layers."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _inner_width(config: Any) -> int:
    """Of the feed-forwards, which OPT and GPT-2 call otherwise."""
    return getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size


def sharded_bytes(total: int, layers: Sequence[int], processes: int) -> int:
    """Most bytes of frozen weights in one process where each layer is sharded over all of them.

    Two layers are whole at the same time: one computes while the next is gathered.

    Args:
        total: bytes of all weights.
        layers: bytes of each layer.
        processes: how many.
    """
    pieces = sum(-(-layer // processes) for layer in layers)
    return total - sum(layers) + pieces + 2 * max(layers)
