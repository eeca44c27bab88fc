"""The Q-Former over a clip: the published frame loop against the clip form, same weights, same losses.

Both sides run in one process on the same clip: forward, and forward + backward of a loss on every frame's hidden
states. Times are medians over the repetitions, taken in turns; peak memory is the process's largest resident size
during one pass in a process of its own. Results go to benchmarks/results/qformer-<date>.json.

    python benchmarks/qformer.py --frames 20 50 --repeat 3
"""

import argparse
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import InstructBlipQFormerConfig

from model.config import QFormerConfig
from model.qformer import MemoryQFormer, TextTokens

FULL_WIDTH = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 30523}
QUERIES, PATCHES, WIDTH, WORDS = 32, 257, 1408, 12
RESULTS = Path(__file__).parent / "results"


def build(slots):
    torch.manual_seed(0)
    shape = InstructBlipQFormerConfig(**FULL_WIDTH)
    return MemoryQFormer(shape, QUERIES, QFormerConfig(memory_slots=slots)).eval()


def inputs(frames):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, frames, PATCHES, WIDTH, generator=generator)
    ids = torch.randint(1, 30000, (1, WORDS), generator=generator)
    return features, TextTokens(ids, torch.ones_like(ids, dtype=torch.bool))


def loop(model, features, text):
    memory = model.empty_memory(1, PATCHES, WORDS)
    total = torch.zeros(())
    for frame in features.unbind(1):
        out = model.step(memory, frame, text)
        memory = out.memory
        total = total + sum(level.square().mean() for level in out.levels)
    return total


def clip(model, features, text, recompute=False):
    out = model(features, text, recompute=recompute)
    return sum(level.square().mean(dim=(0, 2, 3)).sum() for level in out.levels)


FORMS = {"loop": loop, "clip": clip}


def seconds(form, model, features, text, backward):
    started = time.perf_counter()
    if backward:
        model.zero_grad(set_to_none=True)
        loss = FORMS[form](model, features, text)
        loss.backward()
    else:
        with torch.no_grad():
            loss = FORMS[form](model, features, text)
    return time.perf_counter() - started, loss.item()


def compare(frames, slots, repeat, backward):
    model, (features, text) = build(slots), inputs(frames)
    runs = {form: [] for form in FORMS}
    losses = {}
    for _ in range(repeat):
        for form in FORMS:
            spent, losses[form] = seconds(form, model, features, text, backward)
            runs[form].append(spent)
    medians = {form: statistics.median(times) for form, times in runs.items()}
    return {
        "frames": frames,
        "pass": "forward+backward" if backward else "forward",
        "seconds": runs,
        "ratio": medians["loop"] / medians["clip"],
        "loss_difference": abs(losses["loop"] - losses["clip"]) / abs(losses["loop"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[20])
    parser.add_argument("--slots", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--forward-only", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for frames in arguments.frames:
        for backward in [False] if arguments.forward_only else [False, True]:
            row = compare(frames, arguments.slots, arguments.repeat, backward)
            rows.append(row)
            medians = {form: f"{statistics.median(times):.2f} s" for form, times in row["seconds"].items()}
            print(f"T={frames} {row['pass']}: {medians} ratio {row['ratio']:.1f}", flush=True)
    hardware = {"cpu_cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"qformer-{datetime.now(UTC):%Y-%m-%d}.json"
    shape = {"slots": arguments.slots, "patches": PATCHES, "width": WIDTH, "queries": QUERIES, "text_tokens": WORDS}
    target.write_text(json.dumps({"hardware": hardware, "shape": shape, "rows": rows}, indent=1) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
