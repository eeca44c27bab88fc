"""The truncated, folded teacher against the whole DiT of diffusers: same latents, same y*.

Both have one set of random weights of the published size (1152 x 28 blocks, 256 tokens; adaLN random too, so that no
block is the identity). The whole DiT is what `DiTTransformer2DModel.forward` runs, with its adaLN in every block and
its output layers; its y* is read by a hook after the same block. The VAE encoder comes before either and is left out
of both sides. Times are medians over the repetitions, taken in turns. Results go to
benchmarks/results/teacher-<date>.json.

    python benchmarks/teacher.py --frames 2 4 --repeat 3
    python benchmarks/teacher.py --frames 32 --repeat 10 --device cuda --dtype bfloat16
"""

import argparse
import os
import platform
import statistics
import time

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from gpu.published import TINY_VAE
from result_file import write_result

from model.config import DiTSettings
from model.teachers.dit import DIT_NORM_EPS, DiTTeacher

LATENT_CHANNELS = 4


def build(config, device, dtype):
    torch.manual_seed(0)
    whole = DiTTransformer2DModel(norm_eps=DIT_NORM_EPS).eval()
    with torch.no_grad():
        for block in whole.transformer_blocks:
            block.norm1.linear.bias.normal_(std=0.5)
    vae = AutoencoderKL(**TINY_VAE)  # left out of the comparison, but the teacher is not built without one
    teacher = DiTTeacher(
        config,
        dit_config=dict(whole.config),
        dit_tensors=whole.state_dict(),
        vae_config=dict(vae.config),
        vae_tensors=vae.state_dict(),
    )
    teacher.lower_precision(dtype)
    return whole.to(device, dtype), teacher.to(device)


def forms(whole, teacher, config):
    """Both ways from latents [T, 4, 32, 32] to y* [T, D] float32."""
    seen = []
    whole.transformer_blocks[config.block - 1].register_forward_hook(lambda _, __, out: seen.append(out))

    def all_blocks(latents):
        seen.clear()
        timestep = torch.full((len(latents),), config.timestep, device=latents.device)
        whole(latents, timestep=timestep, class_labels=torch.full_like(timestep, whole.config.num_embeds_ada_norm))
        return seen[0].float().mean(dim=1)

    return {"whole": all_blocks, "folded": lambda latents: teacher.residual_stream(latents).float().mean(dim=1)}


def seconds(form, latents):
    if latents.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    target = form(latents)
    if latents.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, target


@torch.no_grad()
def compare(ways, frames, size, repeat, device, dtype):
    latents = torch.randn(frames, LATENT_CHANNELS, size, size, generator=torch.Generator().manual_seed(1))
    latents = latents.to(device, dtype)
    targets = {name: way(latents) for name, way in ways.items()}  # and a first run of each, not timed
    runs = {name: [] for name in ways}
    for _ in range(repeat):
        for name, way in ways.items():
            spent, targets[name] = seconds(way, latents)
            runs[name].append(spent)
    medians = {name: statistics.median(times) for name, times in runs.items()}
    whole, folded = targets["whole"].double(), targets["folded"].double()
    return {
        "frames": frames,
        "seconds": runs,
        "ratio": medians["whole"] / medians["folded"],
        "target_difference": ((whole - folded).abs().max() / whole.abs().max()).item(),
        "target_cosine": torch.cosine_similarity(whole, folded).min().item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    config, dtype = DiTSettings(), getattr(torch, arguments.dtype)
    whole, teacher = build(config, arguments.device, dtype)
    shape = {
        "width": teacher.width,
        "blocks": whole.config.num_layers,
        "read_after_block": config.block,
        "tokens": (whole.config.sample_size // whole.config.patch_size) ** 2,
        "whole_parameters": sum(parameter.numel() for parameter in whole.parameters()),
        "folded_parameters": sum(
            parameter.numel() for part in (teacher.pos_embed, teacher.blocks) for parameter in part.parameters()
        ),
        "vae": "left out of both sides",
    }
    ways, rows = forms(whole, teacher, config), []
    for frames in arguments.frames:
        row = compare(ways, frames, whole.config.sample_size, arguments.repeat, arguments.device, dtype)
        rows.append(row)
        medians = {name: f"{statistics.median(times):.3f} s" for name, times in row["seconds"].items()}
        difference = f"y* differs by {row['target_difference']:.1e}"
        print(f"{frames} frames: {medians} ratio {row['ratio']:.2f}, {difference}", flush=True)
    hardware = {
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "dtype": arguments.dtype,
    }
    write_result("teacher", {"hardware": hardware, "shape": shape, "rows": rows})


if __name__ == "__main__":
    main()
