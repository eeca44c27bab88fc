"""bfloat16 and float16 against float32: what lower precision does to features and to y*, at the published widths.

A vision tower of the size of InstructBLIP's (39 layers, width 1408) and a teacher of DiT-XL/2's (8 blocks, width 1152,
behind the SD VAE's encoder; adaLN random too, so that no block is the identity), both with random weights, see a few
frames of a synthetic video. Each network is built again for each precision, so that one copy is in memory at a time. As
in Stage 1, the VAE stays in float32 whatever the precision is, and targets are pooled in float32.

Random weights have no outlier channels. So this says how rounding adds up through the layers, not what it does to the
few large channels of a trained tower; float16 can overflow there, and extraction refuses to store what has.

    python benchmarks/precision.py --frames 2
"""

import argparse
import gc
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from gpu.published import SD_VAE
from result_file import write_result
from transformers import InstructBlipVisionConfig, InstructBlipVisionModel

from model.config import DiTSettings
from model.pixels import CLIP_PIXELS
from model.teachers.dit import DiTTeacher
from stages.data.synthetic import generate
from stages.decode.frames import FrameRequest
from stages.decode.reader import decode

EXACT = torch.float32
LOWER = (torch.bfloat16, torch.float16)
ENCODER_PX, TEACHER_PX = 224, 256


def pictures(frames):
    """Frames [T, S, S, 3] uint8 of a synthetic video in each network's size."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), seed=0, videos_per_split={"train": 1}, workers=1)
        (path,) = (Path(folder) / "videos").glob("*.mp4")
        times_s = np.linspace(0.0, 3.0, frames)
        sizes = tuple((size, size) for size in (ENCODER_PX, TEACHER_PX))
        return [torch.from_numpy(view) for view in decode(FrameRequest(path, times_s, sizes, "pyav", 0.5)).views]


def vision(arguments):
    """Patch features [T, P, C] of a frame, by precision."""
    # The class's own deviation of 1e-10 would be zero in float16; 0.02 is what vision transformers are drawn with.
    config = InstructBlipVisionConfig(initializer_range=0.02)
    config.num_hidden_layers = arguments.layers or config.num_hidden_layers

    def run(frames, dtype):
        torch.manual_seed(0)
        tower = InstructBlipVisionModel(config).eval().to(dtype)
        return torch.cat([tower(CLIP_PIXELS.normalise(one[None]).to(dtype)).last_hidden_state for one in frames])

    return run, {"layers": config.num_hidden_layers, "width": config.hidden_size}


def teacher(arguments):
    """Targets y* [T, 1, D], by precision."""
    with torch.device("meta"):
        described = dict(DiTTransformer2DModel(num_layers=1).config) | {"num_layers": 28}
    config = DiTSettings(random_seed=0, **({"block": arguments.blocks} if arguments.blocks else {}))

    def run(frames, dtype):
        torch.manual_seed(0)
        vae = AutoencoderKL(**SD_VAE)
        network = DiTTeacher(
            config, dit_config=described, dit_tensors={}, vae_config=dict(vae.config), vae_tensors=vae.state_dict()
        )
        del vae
        network.lower_precision(dtype)
        return torch.cat([network(one[None]) for one in frames])[:, None]

    return run, {"blocks": config.block, "width": described["num_attention_heads"] * described["attention_head_dim"]}


NETWORKS = {"features": vision, "targets": teacher}


def compare(exact, found):
    """Of one network's outputs [T, P, C]: errors over all numbers, cosines over vectors of one token."""
    off, found = found.float() - exact, found.float()
    cosine = torch.cosine_similarity(exact, found, dim=-1)
    return {
        "relative_l2": (off.norm() / exact.norm()).item(),
        "largest_error_over_largest_value": (off.abs().max() / exact.abs().max()).item(),
        "cosine_mean": cosine.mean().item(),
        "cosine_min": cosine.min().item(),
        "finite": bool(found.isfinite().all()),
    }


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--of", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--frames", type=int, default=2)
    parser.add_argument("--layers", type=int, help="of the vision tower; None: all")
    parser.add_argument("--blocks", type=int, help="of the teacher; None: those that are read")
    arguments = parser.parse_args()
    rows = []
    seen = dict(zip(NETWORKS, pictures(arguments.frames), strict=True))
    for name in arguments.of:
        frames, (run, shape) = seen[name], NETWORKS[name](arguments)
        exact = run(frames, EXACT).float()
        for dtype in LOWER:
            gc.collect()
            found = compare(exact, run(frames, dtype))
            rows.append({"of": name, "precision": str(dtype).removeprefix("torch."), **shape, **found})
            print(rows[-1], flush=True)
    result = {
        "hardware": {"cpu_cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__},
        "weights": "random",
        "frames": arguments.frames,
        "rows": rows,
    }
    write_result("precision", result)


if __name__ == "__main__":
    main()
