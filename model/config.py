"""The settings of everything that is computed, with the paper's values as the defaults.

These classes are the only place where a default of a network or a loss stands. The presets and the command line
override them by name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Settings(BaseModel):
    """Base of every branch of the configuration tree: frozen; a misspelt key, nan and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _check_levels(levels: tuple[int, ...]) -> tuple[int, ...]:
    if any(level < 1 for level in levels):
        raise ValueError("levels are numbered from 1 (the embeddings)")
    if len(set(levels)) != len(levels):
        raise ValueError("each level may be named once")
    return tuple(sorted(levels))


Levels = Annotated[tuple[int, ...], AfterValidator(_check_levels)]


class EncoderConfig(Settings):
    """The frozen visual encoder (paper section 3.1): the InstructBLIP vision tower."""

    source: str = "Salesforce/instructblip-vicuna-7b"
    """Hub id or local folder of an InstructBLIP checkpoint; `bundled:NAME` is a tiny network of this project."""


class TeacherConfig(Settings):
    """The frozen diffusion teacher (paper section 3.2): SD-VAE encoder and the first blocks of a DiT."""

    source: str = "facebook/DiT-XL-2-256"
    """Hub id or local folder of a DiT pipeline in diffusers' layout (subfolders transformer and vae)."""
    block: PositiveInt = 8
    """The block, counted from 1, after which the residual stream is read."""
    timestep: Annotated[int, Field(ge=0, le=999)] = 0
    """Index of the diffusion step, an integer; 0 is the clean end."""
    class_label: Annotated[int, Field(ge=0)] = 1000
    """Row of the class table; 1000 is the null class of the published DiT."""

    def require_fits(self, dit_config: Mapping[str, Any]) -> None:
        """Raise ValueError unless the DiT that this `config.json` describes has the block and the class."""
        blocks, null_class = dit_config["num_layers"], dit_config["num_embeds_ada_norm"]
        if self.block > blocks:
            raise ValueError(f"teacher.block is {self.block}, but the DiT has {blocks} blocks")
        if self.class_label > null_class:
            raise ValueError(
                f"teacher.class_label is {self.class_label}, but the DiT's classes are 0...{null_class} "
                "(the last is the null class)"
            )


class QFormerConfig(Settings):
    """The trained Q-Former with its memory bank (MA-LMM; FACTS.md C.5)."""

    source: str = "Salesforce/instructblip-vicuna-7b"
    """Hub id or folder whose Q-Former, query tokens and language projection training starts from."""
    memory_slots: PositiveInt = 20
    """M, slots of every memory bank."""
    max_frames: PositiveInt = 120
    """Rows of the learned temporal table of Eq. 1; no clip may be longer."""
    max_text_tokens: PositiveInt = 128
    """Longest question in Q-Former tokens; longer ones lose their beginning."""


class AlignmentConfig(Settings):
    """Distillation from the teacher, Eq. 4-7."""

    kd_weight: NonNegativeFloat = 1.0
    """lambda of Eq. 9; 0 switches the distillation off and builds neither heads nor gate."""
    levels: Levels = (8, 9, 10, 11, 12, 13)
    """Aligned levels u; level u is the Q-Former's hidden_states[u - 1], so 1 is the embedding output."""
    weighting: Literal["adaptive", "average", "half", "one"] = "adaptive"
    """w_i of Eq. 6: the gate, or the constants 1/U, 0.5, 1."""
    gate_width: PositiveInt = 288
    """Hidden width of the gate's MLP."""


class LanguageConfig(Settings):
    """The frozen causal language model and how it answers (FACTS.md C.5, C.6)."""

    source: str = "Salesforce/instructblip-vicuna-7b"
    """Hub id or folder of an InstructBLIP checkpoint, or of any causal language model of transformers."""
    max_prompt_tokens: PositiveInt = 128
    """Longest prompt in tokens of the language model."""
    num_beams: PositiveInt = 5
    """Beams of the search; as many answers are returned."""
    max_new_tokens: PositiveInt = 5
    """Longest answer in tokens; 5 for LVU, 10 for MSVD-QA."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 1
    """Shortest answer in tokens."""
    length_penalty: float = 1.0
    """Exponent of the length in a beam's score; 1 for LVU, 0 for MSVD-QA."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.5
    """Penalty on tokens already generated."""


class ModelConfig(Settings):
    """Every network of the method."""

    encoder: EncoderConfig = EncoderConfig()
    teacher: TeacherConfig = TeacherConfig()
    qformer: QFormerConfig = QFormerConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    language: LanguageConfig = LanguageConfig()
