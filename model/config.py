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
    """The frozen visual encoder (paper section 3.1): InstructBLIP's vision tower, or a CLIP vision model."""

    source: str = "Salesforce/instructblip-vicuna-7b"
    """Hub id or local folder of an InstructBLIP or CLIP checkpoint; `bundled:NAME` is a tiny one of this project."""
    layer: PositiveInt | None = None
    """The block, counted from 1, whose output is read as it is. null: the last one's, after the final LayerNorm for
    InstructBLIP, without one for CLIP; LLaVA reads the last but one of CLIP (23 of ViT-L's 24)."""

    def require_fits(self, layers: int) -> None:
        """Raise ValueError unless an encoder of so many layers has the one asked for."""
        if self.layer is not None and self.layer > layers:
            raise ValueError(f"encoder.layer is {self.layer}, but the encoder has {layers} layers")


_KIND = "Family of the teacher: dit, dinov2 or tower. Each has settings of its own and a default source."


class TeacherSettings(Settings):
    """What every family of frozen teachers is asked (paper section 3.2)."""

    kind: str
    source: str
    random_seed: int | None = None
    """Seed of random weights in place of the trained ones, as a control; a DiT's VAE keeps its own. null: trained."""


class DiTSettings(TeacherSettings):
    """SD-VAE encoder and the first blocks of a DiT, the paper's teacher."""

    kind: Literal["dit"] = Field("dit", description=_KIND)
    source: str = "facebook/DiT-XL-2-256"
    """Hub id or local folder of a DiT pipeline in diffusers' layout (subfolders transformer and vae), or the path of an
    original DiT file (DiT-XL-2-256x256.pt)."""
    block: PositiveInt = 8
    """The block, counted from 1, after which the residual stream is read."""
    timestep: Annotated[int, Field(ge=0, le=999)] = 0
    """Index of the diffusion step, an integer; 0 is the clean end."""
    timestep_embedding: Literal["original", "diffusers"] = "original"
    """Frequencies of the step's embedding. The published weights were trained with `original`; `diffusers` spreads them
    a little wider (docs/teachers.md). The same at step 0."""
    class_label: Annotated[int, Field(ge=0)] | None = None
    """Row of the class table. null: the last, which is the null class (1000 of the published DiT)."""
    vae_source: str | None = None
    """Hub id or local folder of another VAE. null: the pipeline's own; for an original file, which has none,
    stabilityai/sd-vae-ft-mse."""
    heads: PositiveInt | None = None
    """Original file: attention heads. null: those of the published size of that width."""

    def require_fits(self, dit_config: Mapping[str, Any]) -> None:
        """Raise ValueError unless the DiT that this `config.json` describes has the block and the class."""
        blocks, null_class = dit_config["num_layers"], dit_config["num_embeds_ada_norm"]
        if self.block > blocks:
            raise ValueError(f"teacher.block is {self.block}, but the DiT has {blocks} blocks")
        if self.class_label is not None and self.class_label > null_class:
            raise ValueError(
                f"teacher.class_label is {self.class_label}, but the DiT's classes are 0...{null_class} "
                "(the last is the null class)"
            )


class _TransformerSettings(TeacherSettings):
    """A vision transformer with a class token."""

    block: PositiveInt | None = None
    """The block, counted from 1, whose output is read as it is. null: the last, after the final LayerNorm; a CLIP's
    without one, as `encoder.layer` has it."""
    pooling: Literal["mean", "class"] = "mean"
    """y* is the mean over the patch tokens (no class or register tokens), or the class token."""

    def require_fits(self, blocks: int) -> None:
        """Raise ValueError unless a network of so many blocks has the one asked for."""
        if self.block is not None and self.block > blocks:
            raise ValueError(f"teacher.block is {self.block}, but the network has {blocks} blocks")


class DinoSettings(_TransformerSettings):
    """A DINOv2 of transformers, with or without registers."""

    kind: Literal["dinov2"] = Field("dinov2", description=_KIND)
    source: str = "facebook/dinov2-base"
    """Hub id or local folder of a DINOv2 of transformers."""


class TowerSettings(_TransformerSettings):
    """The vision tower of a CLIP or an InstructBLIP of transformers."""

    kind: Literal["tower"] = Field("tower", description=_KIND)
    source: str = "Salesforce/instructblip-vicuna-7b"
    """Hub id or local folder of a CLIP or an InstructBLIP; `bundled:NAME` is a tiny one of this project."""

    def as_encoder(self) -> EncoderConfig:
        """The visual encoder whose tokens are pooled."""
        return EncoderConfig(source=self.source, layer=self.block)


TeacherConfig = Annotated[DiTSettings | DinoSettings | TowerSettings, Field(discriminator="kind")]
TEACHERS: dict[str, type[DiTSettings | DinoSettings | TowerSettings]] = {
    "dit": DiTSettings,
    "dinov2": DinoSettings,
    "tower": TowerSettings,
}
"""Settings of the frozen teacher by its kind. A family that is added gets a class."""


class QFormerConfig(Settings):
    """The trained Q-Former with its memory bank (MA-LMM:lavis/models/blip2_models/blip2_vicuna_instruct.py:159-210)."""

    source: str = "Salesforce/instructblip-vicuna-7b"
    """Hub id or folder of the InstructBLIP whose Q-Former, queries and language projection training starts from."""
    start: str | None = None
    """What is laid over them: a `.pth` of LAVIS or MA-LMM, a run, or an exported model (folder, safetensors file or hub
    id). What it lacks stays as in the source."""
    memory_slots: PositiveInt = 20
    """M, slots of every memory bank."""
    max_frames: PositiveInt = 120
    """Rows of the learned temporal table of Eq. 1; no clip may be longer."""
    max_text_tokens: PositiveInt = 128
    """Longest prompt in Q-Former tokens; a longer one loses the beginning of its question."""


# The switches of the equations in model/alignment.py.
LossForm = Literal["negative_cosine", "one_minus_cosine"]
GateInput = Literal["sum", "concat", "normalised_sum"]
HeadKind = Literal["mlp", "linear", "repa"]
Reduction = Literal["sum", "mean"]
TargetForm = Literal["raw", "centred", "layer_norm"]


class AlignmentConfig(Settings):
    """Distillation from the teacher, Eq. 4-7, with a switch for every point that the paper leaves open.

    docs/method.md has the reasons. All of them may be combined. With constant weights there is no gate, and its
    switches have no effect.
    """

    kd_weight: NonNegativeFloat = 1.0
    """lambda of Eq. 9; 0 switches the distillation off and builds neither heads nor gate."""
    levels: Levels = (8, 9, 10, 11, 12, 13)
    """Aligned levels u; level u is the Q-Former's hidden_states[u - 1], so 1 is the embedding output."""
    tokens: Literal["queries", "all"] = "queries"
    """Tokens that h is made of: the Q queries, or queries and the question's text tokens without padding."""
    pooling: Literal["before", "after", "loss"] = "before"
    """Where the tokens become one: `before` the head (mean, then head), `after` it (head, then mean of the
    projections), or in the `loss` (every token against the same y* with a weight of its own, then the mean). `after`
    runs the head once per token, `loss` head and gate."""
    head: HeadKind = "mlp"
    """h_phi: `mlp` is H-D-D with GELU, `linear` H-D, `repa` REPA's H-2048-2048-D with SiLU."""
    shared_head: bool = False
    """One head for all levels instead of one per level."""
    weighting: Literal["adaptive", "softmax", "average", "half", "one"] = "adaptive"
    """w_i of Eq. 6: `adaptive` is the gate's sigmoid, `softmax` U times the gate's softmax over the levels, so that
    they sum to U; `average`, `half`, `one` are the constants 1/U, 0.5, 1."""
    gate_input: GateInput = "sum"
    """What g_psi reads: the `sum` h_phi(h) + y*, both side by side (`concat`), or the sum of both at length 1
    (`normalised_sum`)."""
    shared_gate: bool = True
    """One g_psi for all levels; false gives each level its own."""
    gate_width: PositiveInt = 288
    """Hidden width of the gate's MLP."""
    gate_gradient: Literal["through", "input_detached", "weight_detached"] = "through"
    """Where the gradient of w_i stops: nowhere (`through`), at g_psi's input, so that w_i trains only the gate, or at
    w_i itself: then nothing trains the gate, which keeps its random start."""
    loss: LossForm = "negative_cosine"
    """L_i of Eq. 4: -cos, or 1 - cos. With the latter a free gate gains by falling to 0 and the distillation fades
    away (docs/method.md): take it with constant or softmax weights."""
    level_reduction: Reduction = "sum"
    """Over the levels, Eq. 7 as written is the `sum`; `mean` divides by U."""
    frame_reduction: Reduction = "mean"
    """Over a clip's distilled frames: `mean` keeps lambda's meaning whatever their number, `sum` does not. Over clips
    it is always the mean."""
    target: TargetForm = "raw"
    """y*: as the teacher gives it, `centred` (less the running mean of the targets seen in training), or after
    `layer_norm` over its D entries, without parameters."""


Quantization = Literal["none", "int8", "nf4"]


class LanguageConfig(Settings):
    """The frozen causal language model and how it answers (paper, section 3.3, Eq. 8)."""

    source: str = "Salesforce/instructblip-vicuna-7b"
    """Hub id or folder of an InstructBLIP checkpoint, or of any causal language model of transformers."""
    quantize: Quantization = "none"
    """How the matrices of its layers are held: in the arithmetic's type (`none`), or in 8 (`int8`) or 4 bits (`nf4`) by
    bitsandbytes, the extra `quant`. Training, answering and ranking work with each, with slightly other numbers."""
    max_prompt_tokens: PositiveInt = 128
    """Longest prompt in tokens of the language model; a longer one loses the beginning of its question."""
    num_beams: PositiveInt = 5
    """Beams of the search; as many answers are returned."""
    max_new_tokens: PositiveInt = 4
    """Longest answer in new tokens, its end included where there is room for one; 4 for LVU, 9 for MSVD-QA. MA-LMM's
    max_length 5 and 10 count a start token in every version of transformers in which it runs."""
    answer_words: PositiveInt | None = None
    """Words of a generated answer that count, 1 for MSVD-QA; None counts all."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Shortest answer in new tokens; MA-LMM's min_length 1 is just the start token."""
    length_penalty: float = 1.0
    """Exponent of the length in a beam's score; 1 for LVU, 0 for MSVD-QA."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.5
    """Penalty on tokens already generated."""


class ModelConfig(Settings):
    """Every network of the method."""

    encoder: EncoderConfig = EncoderConfig()
    teacher: TeacherConfig = DiTSettings()
    qformer: QFormerConfig = QFormerConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    language: LanguageConfig = LanguageConfig()
