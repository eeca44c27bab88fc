"""What the teacher costs a training step: targets from the cache, no alignment at all, and the teacher run online.

One full-width Q-Former with random weights and one small language model take optimizer steps on the same clip, in
turns, each a step that is not timed and one that is: the first one after another arm finds the allocator's pages laid
out for that one. Times are medians. Arms:

  cached        y* from the cache, every frame distilled: the default
  no heads      the same frames computed forward and backward, with a plain mean in place of heads, gate and cosine
  last          y* from the cache, only the last frame distilled
  lambda 0      no distillation; like `last`, only the last frame has a gradient
  online        `cached`, and the time that the teacher takes for y* of as many frames, as without a cache

cached / no heads, and last / lambda 0, are what the heads cost (target <= 1.05); online / cached is what the cache
saves. The teacher is of the published size with random weights, VAE encoder included. Results go to
benchmarks/results/teacher-cost-<date>.json.

    python benchmarks/teacher_cost.py
    python benchmarks/teacher_cost.py --frames 100 --batch 4 --device cuda
    python benchmarks/teacher_cost.py --frames 3 --repeat 1 --no-online
"""

import argparse
import os
import platform
import statistics
import time

import torch
from gpu.published import PUBLISHED, dit_teacher
from result_file import write_result
from torch import nn
from transformers import InstructBlipQFormerConfig

from model.alignment import Alignment, AlignmentReport
from model.config import AlignmentConfig, QFormerConfig
from model.diff_lmm import Clips, DiffLMM
from model.language import FrozenLanguageModel
from model.qformer.qformer import MemoryQFormer
from pipeline.settings.config import resolve
from stages.batches.windows import Batch
from stages.config import TrainConfig
from stages.data.manifest import Sample
from stages.device import Compute, pick_dtype
from stages.networks.build import load_language
from stages.networks.tokens import Tokenizers
from stages.train.step import Stepper

PATCHES, WIDTH, HIDDEN, TARGET_WIDTH, LEVELS = 257, 1408, 768, 1152, 13
FULL_WIDTH = {"vocab_size": 30523}


class NoHeads(nn.Module):
    """In place of `Alignment`: every level of every distilled frame gets a gradient, and nothing is computed for it."""

    def __init__(self):
        super().__init__()
        self.config = AlignmentConfig()

    def observe_mean(self, mean, seen):
        """There is no running mean."""

    def part_of(self, frames, total):
        return frames / total

    def forward(self, levels, *_unused):
        aligned = [levels[level - 1] for level in self.config.levels]
        loss = torch.stack([level.float().mean() for level in aligned]).sum()
        nothing = torch.zeros(len(aligned), device=loss.device)
        return loss, AlignmentReport(self.config.levels, nothing, nothing, nothing.sum(), nothing.sum())


def build_batch(tokenizers, arguments):
    generator = torch.Generator().manual_seed(1)
    size, frames = arguments.batch, arguments.frames
    sample = Sample(
        id="s", video="v", task="t", question="what is the scene?", answer="office", split="train", times_s=(0.0,)
    )
    prompts, answers = [sample.prompt.replace("{}", sample.question)] * size, [sample.answer] * size
    clips = Clips(
        torch.randn(size, frames, PATCHES, WIDTH, generator=generator).half(),
        torch.randn(size, frames, TARGET_WIDTH, generator=generator),
        tokenizers.question(prompts),
        tokenizers.training(prompts, answers),
    )
    return Batch((sample,) * size, clips, None)


def build_arms(arguments, compute):
    """Name -> its stepper; all share one Q-Former, and each has an optimizer state of its own."""
    config = resolve(preset="tiny").config
    tokenizers = Tokenizers.load(config)
    torch.manual_seed(0)
    qformer = MemoryQFormer(
        InstructBlipQFormerConfig(**FULL_WIDTH), 32, QFormerConfig(max_frames=max(120, arguments.frames))
    )
    language = FrozenLanguageModel(load_language(config.language, compute.dtype), tokenizers.special)
    heads = Alignment(AlignmentConfig(), hidden_width=HIDDEN, target_width=TARGET_WIDTH, num_levels=LEVELS)
    alignments = {"cached": heads, "no heads": NoHeads(), "last": heads, "lambda 0": None}
    arms = {}
    for name, alignment in alignments.items():
        model = DiffLMM(qformer, language, alignment, kd_weight=1.0).to(compute.device)
        train = TrainConfig(kd_frames="last" if name == "last" else "all")
        arms[name] = Stepper(train, model, compute)
    return tokenizers, arms


def seconds(work, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def ask(teacher, pixels, at_once):
    for part in pixels.split(at_once):
        teacher(part)


def measure(arguments, compute):
    tokenizers, arms = build_arms(arguments, compute)
    batch = build_batch(tokenizers, arguments)
    plain = Batch(batch.samples, Clips(batch.stored.features, None, batch.stored.question, batch.stored.answer), None)
    times = {name: [] for name in arms}
    for _ in range(arguments.repeat):
        for name, stepper in arms.items():
            given = plain if name == "lambda 0" else batch
            _, spent = (seconds(lambda s=stepper, g=given: s.take(0, 1e-4, [g]), compute.device) for _ in range(2))
            times[name].append(spent)
    if not arguments.no_online:
        teacher = dit_teacher(PUBLISHED, compute.device, compute.dtype)
        shape = (arguments.batch * arguments.frames, teacher.size_px, teacher.size_px, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=compute.device)
        alone = [seconds(lambda: ask(teacher, pixels, 8), compute.device) for _ in range(max(1, arguments.repeat - 1))]
        times["teacher alone"] = alone
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-online", action="store_true", help="leave the teacher out")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    compute = Compute(device, pick_dtype("auto", device))
    times = measure(arguments, compute)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratios = {
        "cached / no heads": medians["cached"] / medians["no heads"],
        "last / lambda 0": medians["last"] / medians["lambda 0"],
    }
    if "teacher alone" in medians:
        medians["online"] = medians["cached"] + medians["teacher alone"]
        ratios["online / cached"] = medians["online"] / medians["cached"]
    result = {
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "device": arguments.device},
        "settings": {**vars(arguments), "dtype": str(compute.dtype)},
        "seconds": times,
        "median_s": medians,
        "ratios": ratios,
    }
    write_result("teacher-cost", result)
    for name, value in medians.items():
        print(f"{name:14} {value:8.2f} s")
    for name, value in ratios.items():
        print(f"{name:18} {value:.3f}")


if __name__ == "__main__":
    main()
