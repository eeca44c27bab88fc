"""Networks of the published shapes with random weights, and tiny ones of the same classes to try a program with."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
)

from model.alignment import Alignment
from model.config import AlignmentConfig, DiTSettings, EncoderConfig, QFormerConfig
from model.diff_lmm import Clips, DiffLMM
from model.language import AnswerTokens, FrozenLanguageModel, SpecialTokens
from model.pixels import CLIP_PIXELS
from model.qformer.parts import TextTokens
from model.qformer.qformer import MemoryQFormer
from model.vision import VisionEncoder
from stages.batches.windows import Batch
from stages.data.manifest import Sample
from stages.weights.published import DIT_XL
from stages.weights.published import PUBLISHED as CHECKPOINTS

# stabilityai/sd-vae-ft-mse.
_VAE = CHECKPOINTS[DIT_XL].configurations["vae/config.json"]
SD_VAE = {name: value for name, value in _VAE.items() if name != "_class_name"}
# The smallest that downscales by 8.
TINY_VAE = {**SD_VAE, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
DEVIATION = 0.02


@dataclass(frozen=True)
class Shapes:
    """What differs from the defaults of the networks' configuration classes, which are the published shapes."""

    vision: dict[str, Any] = field(default_factory=dict)
    dit: dict[str, Any] = field(default_factory=lambda: {"num_layers": 28})
    dit_block: int = 8
    vae: dict[str, Any] = field(default_factory=lambda: SD_VAE)
    qformer: dict[str, Any] = field(default_factory=lambda: {"vocab_size": 30_523})
    language: dict[str, Any] = field(default_factory=lambda: {"vocab_size": 32_064})
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    frames: int = 100
    slots: int = 20
    queries: int = 32
    words: int = 12
    answer: int = 24
    target_width: int = 1152

    @property
    def vision_config(self):
        return InstructBlipVisionConfig(initializer_range=DEVIATION, **self.vision)

    @property
    def patches(self):
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2 + 1

    @property
    def visual_width(self):
        return self.vision_config.hidden_size

    def qformer_config(self, dropout):
        drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return InstructBlipQFormerConfig(encoder_hidden_size=self.visual_width, **drop, **self.qformer)


PUBLISHED = Shapes()
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
TINY = Shapes(
    vision={**_SMALL, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14},
    dit={"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8},
    dit_block=2,
    vae=TINY_VAE,
    qformer={**_SMALL, "vocab_size": 50, "num_hidden_layers": 2},
    alignment=AlignmentConfig(levels=(2, 3)),
    language={**_SMALL, "vocab_size": 50, "num_hidden_layers": 2, "num_key_value_heads": 2},
    frames=6,
    slots=3,
    queries=4,
    words=5,
    answer=8,
    target_width=16,
)


def vision_tower(shapes, device, dtype):
    """On its device from the start: a GPU draws a billion numbers faster than a CPU."""
    with torch.device(device):
        tower = VisionEncoder(
            EncoderConfig(),
            vision_config=shapes.vision_config,
            tensors={},
            prefix="",
            pixels=CLIP_PIXELS,
            random_seed=0,
        )
    return tower.to(device, dtype)


def dit_teacher(shapes, device, dtype):
    """As in Stage 1, the VAE stays in float32; ImportError without diffusers."""
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    from model.teachers.dit import DiTTeacher

    with torch.device("meta"):
        described = dict(DiTTransformer2DModel(**{**shapes.dit, "num_layers": 1}).config) | shapes.dit
    torch.manual_seed(0)
    vae = AutoencoderKL(**shapes.vae)
    teacher = DiTTeacher(
        DiTSettings(random_seed=0, block=shapes.dit_block),
        dit_config=described,
        dit_tensors={},
        vae_config=dict(vae.config),
        vae_tensors=vae.state_dict(),
    )
    teacher.lower_precision(dtype)
    return teacher.to(device)


def qformer(shapes, device, *, dropout):
    torch.manual_seed(0)
    with torch.device(device):
        return MemoryQFormer(
            shapes.qformer_config(dropout),
            shapes.queries,
            QFormerConfig(memory_slots=shapes.slots, max_frames=max(120, shapes.frames)),
        )


def diff_lmm(shapes, device, dtype, *, language_layers=None, dropout=0.1):
    """Stage 2's model, its language model in `dtype` and cut to so many layers (None: all); BERT's dropout."""
    layers = {} if language_layers is None else {"num_hidden_layers": language_layers}
    trained = qformer(shapes, device, dropout=dropout)
    with torch.device(device):
        language = AutoModelForCausalLM.from_config(LlamaConfig(**{**shapes.language, **layers}), dtype=dtype)
        heads = Alignment(
            shapes.alignment,
            hidden_width=trained.qformer.config.hidden_size,
            target_width=shapes.target_width,
            num_levels=trained.num_levels,
        )
        model = DiffLMM(trained, FrozenLanguageModel(language, SpecialTokens(2, 2)), heads, kd_weight=1.0)
    return model.to(device)


def text(shapes, device, clips=1):
    ids = torch.randint(3, 50, (clips, shapes.words), generator=torch.Generator().manual_seed(1)).to(device)
    return TextTokens(ids, torch.ones_like(ids, dtype=torch.bool))


def features(shapes, device, clips=1, dtype=torch.float32):
    """Random features [B, T, P, C], drawn on the device."""
    generator = torch.Generator(device).manual_seed(2)
    size = (clips, shapes.frames, shapes.patches, shapes.visual_width)
    return torch.randn(size, generator=generator, device=device, dtype=dtype)


def batch(shapes, device, clips):
    """A part of a training step as the cache gives it, features in float16; they alone are on `device` already."""
    ids = torch.randint(3, 50, (clips, shapes.answer), generator=torch.Generator().manual_seed(4))
    real = torch.ones_like(ids, dtype=torch.bool)
    answered = real.clone()
    answered[:, :-3] = False
    stored = Clips(
        features(shapes, device, clips, torch.float16),
        torch.randn(clips, shapes.frames, shapes.target_width, generator=torch.Generator().manual_seed(3)),
        text(shapes, torch.device("cpu"), clips),
        AnswerTokens(ids, real, answered),
    )
    sample = Sample(id="s", video="v", task="t", question="what?", answer="this", split="train", times_s=(0.0,))
    return Batch((sample,) * clips, stored, None)
