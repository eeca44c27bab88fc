"""The Q-Former over a clip: the published frame loop against the clip form, same weights, same losses.

The loop is as published: at every frame all remembered tokens are projected again, and every frame keeps its graph.
The clip form goes back chunk by chunk, so that it keeps one chunk's graph. Both sides run in one process on the same
clip, in turns: forward, and forward + backward of a loss on every frame's 13 levels. Times are medians over the
repetitions. Memory is the most that one pass takes beyond model, gradients and inputs, in a process of its own. Where
the loop does not fit, the law of its memory, measured at smaller T, says what it would take. The multiply-adds of
either form are counted too: without an accelerator's launch costs, time can hardly be won beyond their ratio.

    python benchmarks/qformer.py --frames 20 50 100 --backward-frames 20 40 50 100 --memory-frames 20 30 100 1000
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import InstructBlipQFormerConfig

from model.config import QFormerConfig
from model.qformer.parts import TextTokens
from model.qformer.qformer import MemoryQFormer, frames_per_chunk_of
from stages.networks.memory_law import kept_numbers
from stages.networks.multiply_adds import qformer_multiply_adds

FULL_WIDTH = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 30523}
QUERIES, PATCHES, WIDTH, WORDS = 32, 257, 1408, 12
HIDDEN, INNER, LAYERS, CROSSING = 768, 3072, 12, 6
RESULTS = Path(__file__).parent / "results"
GIB = 2**30


def build(arguments, frames):
    torch.manual_seed(0)
    config = QFormerConfig(memory_slots=arguments.slots, max_frames=max(120, frames))
    return MemoryQFormer(InstructBlipQFormerConfig(**FULL_WIDTH), QUERIES, config).to(arguments.device)


def inputs(frames, device):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, frames, PATCHES, WIDTH, generator=generator)
    ids = torch.randint(1, 30000, (1, WORDS), generator=generator)
    return features.to(device), TextTokens(ids.to(device), torch.ones_like(ids, dtype=torch.bool).to(device))


@functools.cache
def coefficients(levels, queries, hidden, device):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(levels, queries, hidden, generator=generator).to(device)


def loss_of(levels):
    """Every number of every level counts, and differently: a plain square of what a LayerNorm gives is always 1."""
    first = levels[0]
    weighed = zip(levels, coefficients(len(levels), *first.shape[2:], first.device), strict=True)
    return sum((level * each).mean(dim=(0, 2, 3)).sum() for level, each in weighed)


def loop(model, features, text, _arguments, backward):
    memory = model.empty_memory(1, features.shape[2], text.ids.shape[1])
    total = torch.zeros((), device=features.device)
    for frame in features.unbind(1):
        out = model.step(memory, frame, text)
        memory = out.memory
        total = total + loss_of(out.levels)
    if backward:
        total.backward()
    return total.item()


def clip(model, features, text, arguments, backward):
    total = 0.0
    for chunk in model.chunks(features, text, frames_per_chunk=arguments.frames_per_chunk):
        loss = loss_of(chunk.levels)
        if backward:
            loss.backward()
        total += loss.item()
    return total


FORMS = {"loop": loop, "clip": clip}


def one_pass(form, model, clip_inputs, arguments, backward):
    model.zero_grad(set_to_none=False)
    with contextlib.nullcontext() if backward else torch.no_grad():
        return FORMS[form](model, *clip_inputs, arguments, backward)


def compare_times(arguments, frames, backward):
    """Both forms in turns; the loop is left out of a backward pass that would not fit into memory."""
    model, clip_inputs = build(arguments, frames), inputs(frames, arguments.device)
    forms = ["clip"] if backward and frames > arguments.loop_fits else ["clip", "loop"]
    seconds, losses = {form: [] for form in forms}, {}
    for form in forms:  # the first pass also asks the system for memory
        one_pass(form, model, inputs(2, arguments.device), arguments, backward)
    for _ in range(arguments.repeat):
        for form in forms:
            synchronise(arguments)
            started = time.perf_counter()
            losses[form] = one_pass(form, model, clip_inputs, arguments, backward)
            synchronise(arguments)
            seconds[form].append(time.perf_counter() - started)
    row = {"frames": frames, "pass": "forward+backward" if backward else "forward", "seconds": seconds}
    row["median_s"] = {form: statistics.median(times) for form, times in seconds.items()}
    row["multiply_adds_ratio"] = arithmetic("loop", model, frames, arguments, backward) / arithmetic(
        "clip", model, frames, arguments, backward
    )
    if "loop" in forms:
        row["ratio"] = row["median_s"]["loop"] / row["median_s"]["clip"]
        row["loss_difference"] = abs(losses["loop"] - losses["clip"]) / abs(losses["loop"])
    return row


def synchronise(arguments):
    if arguments.device != "cpu":
        torch.cuda.synchronize()


def arithmetic(form, model, frames, arguments, backward):
    """Multiply-adds over a clip, elementwise work aside.

    Backward costs a product twice where both factors get a gradient, once where only the weights do, which is so for
    remembered tokens; attention scores are computed again.
    """
    if form == "clip":
        shape = {"patches": PATCHES, "words": WORDS, "frames_per_chunk": arguments.frames_per_chunk}
        return qformer_multiply_adds(model, frames=frames, **shape, backward=backward)
    tokens = QUERIES + WORDS
    visual, words = 2 * PATCHES * WIDTH * HIDDEN, 2 * tokens * HIDDEN**2  # keys and values of one frame, one layer
    rest = LAYERS * tokens * (2 * HIDDEN**2 + 2 * HIDDEN * INNER) + CROSSING * QUERIES * 2 * HIDDEN**2
    score = CROSSING * QUERIES * PATCHES * HIDDEN + LAYERS * tokens**2 * HIDDEN  # one bank frame, one of two products
    total = 0
    for frame in range(frames):
        seen = min(frame, arguments.slots) + 1
        projected = CROSSING * visual + LAYERS * words
        total += seen * projected * (2 if backward else 1) + rest * (3 if backward else 1)
        total += 2 * seen * score * (3.5 if backward else 1)
        total += (LAYERS * words + CROSSING * visual) * backward  # the frame's own gradient to its input
    return total


def chunk_length(arguments):
    return arguments.frames_per_chunk or frames_per_chunk_of(arguments.slots)


def memory_of(arguments, form, frames):
    """Bytes of one forward + backward in a process of its own; None where it does not fit."""
    command = [sys.executable, __file__, "--device", arguments.device, "--slots", str(arguments.slots)]
    command += ["--frames-per-chunk", str(chunk_length(arguments)), "--measure-memory", form, str(frames)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def measure_memory(arguments, form, frames):
    """One pass, its largest use printed; the process may take nearly all memory there is and not more."""
    frames = int(frames)
    model, clip_inputs = build(arguments, frames), inputs(frames, arguments.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_pass(form, model, clip_inputs, arguments, backward=True)
        print(torch.cuda.max_memory_allocated() - before)
        return
    limit = int(0.92 * memory_bytes("MemAvailable")) + resident("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    one_pass(form, model, clip_inputs, arguments, backward=True)
    print(resident("VmHWM") - before)


def resident(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory_bytes(field):
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def compare_memory(arguments):
    """Peak of both forms at each T, the loop's growth per frame once its bank is full, and the clip form's law."""
    rows = []
    for frames in arguments.memory_frames:
        row = {"frames": frames, "clip_bytes": memory_of(arguments, "clip", frames)}
        if frames <= arguments.loop_fits:
            row["loop_bytes"] = memory_of(arguments, "loop", frames)
        rows.append(row)
        shown = {key: f"{value / GIB:.2f} GiB" for key, value in row.items() if key != "frames" and value}
        print(f"T={frames} memory: {shown}", flush=True)
    measured = [(row["frames"], row["loop_bytes"]) for row in rows if row.get("loop_bytes")]
    law = None
    full = [point for point in measured if point[0] >= arguments.slots]
    if len(full) > 1:
        (first, less), (last, more) = full[0], full[-1]
        per_frame = (more - less) / (last - first)
        law = {"loop_bytes_per_frame": per_frame, "loop_bytes_at_0": less - first * per_frame}
        for row in rows:
            row["loop_bytes_by_law"] = law["loop_bytes_at_0"] + row["frames"] * per_frame
            row["clip_share_of_loop"] = row["clip_bytes"] / row.get("loop_bytes", row["loop_bytes_by_law"])
        law["largest_T_of_loop_in_this_machine"] = int((memory_bytes("MemTotal") - law["loop_bytes_at_0"]) / per_frame)
    return rows, law


def kept_by_law(arguments):
    """What the law of the clip form says that a chunk keeps, in bytes."""
    model = build(arguments, 1)
    return 4 * kept_numbers(model, batch=1, frames=chunk_length(arguments), patches=PATCHES, words=WORDS)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="*", default=[20, 50, 100])
    parser.add_argument("--backward-frames", type=int, nargs="*", default=[20, 40, 50, 100])
    parser.add_argument("--memory-frames", type=int, nargs="*", default=[20, 30, 100, 1000])
    parser.add_argument("--loop-fits", type=int, default=40, help="largest T at which the loop's backward is tried")
    parser.add_argument("--slots", type=int, default=20)
    parser.add_argument("--frames-per-chunk", type=int, default=None)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="qformer", help="beginning of the result file's name")
    parser.add_argument("--measure-memory", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    arguments = parse()
    if arguments.measure_memory:
        measure_memory(arguments, *arguments.measure_memory)
        return
    rows = []
    passes = [(frames, False) for frames in arguments.frames] + [(frames, True) for frames in arguments.backward_frames]
    for frames, backward in passes:
        row = compare_times(arguments, frames, backward)
        rows.append(row)
        medians = {form: f"{seconds:.2f} s" for form, seconds in row["median_s"].items()}
        ratio = f"{row['ratio']:.1f}" if "ratio" in row else "loop does not fit"
        print(f"T={frames} {row['pass']}: {medians} ratio {ratio}, arithmetic {row['multiply_adds_ratio']:.1f}")
        sys.stdout.flush()
    memory, law = compare_memory(arguments)
    result = {
        "hardware": hardware(arguments),
        "shape": {"slots": arguments.slots, "patches": PATCHES, "width": WIDTH, "queries": QUERIES, "words": WORDS},
        "frames_per_chunk": chunk_length(arguments),
        "times": rows,
        "memory": memory,
        "loop_memory_law": law,
        "clip_kept_bytes_by_law": kept_by_law(arguments),
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{arguments.name}-{datetime.now(UTC):%Y-%m-%d}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {target}")


def hardware(arguments):
    found = {"cpu_cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()}
    if arguments.device != "cpu":
        found["device"] = torch.cuda.get_device_name()
    return {**found, "memory_gib": round(memory_bytes("MemTotal") / GIB, 1), "torch": torch.__version__}


if __name__ == "__main__":
    main()
