"""Tiny frozen networks in the layouts of the published checkpoints, made on the spot from a seed.

They let the whole path run on any machine without a download: the same classes and the same loading code as the
published weights. Vision tower, Q-Former and DiT have random weights; the language model has learned, in seconds, to
answer questions about a caption (`stages.tiny_language`). `bundled:tiny-instructblip` holds a vision tower, a Q-Former,
a LLaMA language model and both tokenizers; `bundled:tiny-dit` a DiT pipeline.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import UserError
from stages.user_cache import user_cache_folder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import InstructBlipForConditionalGeneration, PreTrainedTokenizerBase

# Part of the folder's name: raise it whenever what is written changes.
_VERSION = 3
_SEED = 20250801
_TEACHER_PX = 64


def bundled_folder(name: str) -> Path:
    """Return the folder of a bundled network, writing it first if this machine does not have it yet.

    Raises:
        UserError: no network of that name is bundled.
    """
    folder = bundled_place(name)
    if not folder.is_dir():
        _write_once(folder, _writers()[name])
    return folder


def bundled_place(name: str) -> Path:
    """Where a bundled network is or would be written; UserError as `bundled_folder`."""
    if name not in _writers():
        raise UserError("unknown bundled network", received=name, allowed=", ".join(sorted(_writers())))
    return user_cache_folder() / "networks" / f"{name}-v{_VERSION}"


def _writers() -> dict[str, Callable[[Path], None]]:
    return {"tiny-instructblip": _write_instructblip, "tiny-dit": _write_dit_pipeline}


def _write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary folder and rename it, so that several processes may come here at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(temporary)
        temporary.rename(folder)
    except OSError:
        # Another process was first if the folder stands now; otherwise the disk is at fault.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_instructblip(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig

    from stages.tiny_language import teach_to_answer

    tokenizer = _write_tokenizer(folder, bert_style=False)
    question_tokenizer = _write_tokenizer(folder / "qformer_tokenizer", bert_style=True)
    config = InstructBlipConfig(
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 14,
            "initializer_range": 0.1,
        },
        qformer_config={
            "vocab_size": len(question_tokenizer),
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": 64,
        },
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ).to_dict(),
        num_query_tokens=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = InstructBlipForConditionalGeneration(config)
        model.query_tokens.data.normal_(std=0.5)
        _make_places_tell(model)
        teach_to_answer(model.language_model, tokenizer, end_id=tokenizer.eos_token_id, seed=_SEED)
    # Saved by name, not with save_pretrained: the names are those of the published file whatever transformers does.
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str), encoding="utf-8")


def _make_places_tell(model: "InstructBlipForConditionalGeneration") -> None:
    """Give random weights what training gives real ones: patches that know their place, heads that look at some.

    With transformers' starting values every patch is attended to alike, and a detail of one patch drowns.
    """
    model.vision_model.embeddings.position_embedding.data.normal_(std=1.0)
    for layer in model.qformer.encoder.layer:
        if layer.has_cross_attention:
            for linear in (layer.crossattention.attention.query, layer.crossattention.attention.key):
                linear.weight.data.normal_(std=0.2)


def _write_dit_pipeline(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED + 1)
        transformer = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=24, num_layers=10, sample_size=_TEACHER_PX // 8, norm_eps=1e-6
        )
        # adaLN-zero starts as the identity: without this the blocks would do nothing (FACTS.md D.4).
        for block in transformer.transformer_blocks:
            torch.nn.init.normal_(block.norm1.linear.weight, std=0.05)
            torch.nn.init.normal_(block.norm1.linear.bias, std=0.5)
        vae = AutoencoderKL(
            block_out_channels=(16, 16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=_TEACHER_PX,
        )
        _give_unit_latents(vae)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")


def _give_unit_latents(vae: "AutoencoderKL") -> None:
    """Scale the VAE's last encoder layer so that scaled latents vary as those of the trained VAE do.

    With the usual random start they hardly vary at all, and the teacher would say the same of every frame.
    """
    import torch

    colours = torch.rand(64, 3, 4, 4).mul(2).sub(1)
    pictures = torch.nn.functional.interpolate(colours, size=_TEACHER_PX)
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
        spread = latents.std(dim=0).mean()
        vae.quant_conv.weight.div_(spread)
        vae.quant_conv.bias.sub_(latents.mean() / vae.config.scaling_factor).div_(spread)


def _write_tokenizer(folder: Path, *, bert_style: bool) -> "PreTrainedTokenizerBase":
    """Write a byte-level BPE tokenizer of the questions' and answers' words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"] if bert_style else ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if bert_style:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        )
        names = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "bos_token": "[DEC]",
        }
    else:
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.save_pretrained(folder)
    return wrapped


def _corpus() -> list[str]:
    """Every prompt and label of the bundled synthetic card, several times, so that each word becomes one token."""
    from stages.cards import load_card

    card = load_card("synthetic")
    lines = [task.prompt for task in card.tasks.values()]
    lines += [label for task in card.tasks.values() for label in task.labels or ()]
    return lines * 10
