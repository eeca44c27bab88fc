"""Stage 1 end to end against its parts and against a plain loop, on the same videos, frames and networks.

    end to end   the extraction worker: decode children, both networks, commits; several videos in work at once
    decode       the same children and requests alone, without networks
    networks     the same frames through the same networks in the same passes alone, without decoding
    commits      what came out of them written into the cache alone
    plain loop   as people write it: for each video decode in this process, run both networks on its frames, save

All run in one process (its decode children aside), in turns, after a round that is not counted, so all find everything
started and warm; what starting took stands beside them (`start_s`). Times are medians over the repetitions.

Without a GPU the parts compete for the same cores; then even a perfect overlap takes their processor time together, and
`bound` says that: processor seconds of decode + networks + commits / cores. Neither can it beat the plain loop by much,
whose networks use all cores too, and which does less: it decodes where a bad file can hang or kill it, and writes
without checksums and without waiting for the disk. The tiny networks take milliseconds per frame, so what happens once
per video weighs far more than with published ones. `--vit 384` puts a vision tower of 12 layers of that width (224 px,
random weights) in the tiny one's place: then the networks are the slower part, as they are in earnest.

    python benchmarks/extract.py
    python benchmarks/extract.py --vit 384 --videos 24 --name extract-vit
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from result_file import write_result
from transformers import CLIPVisionConfig, CLIPVisionModel

from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.data.synthetic import generate
from stages.decode import DecodeChild, FrameRequest
from stages.decode.reader import decode
from stages.extract.worker import ExtractionJob, ExtractionWorker, VideoTask, num_decode_children
from stages.frozen.identity import fingerprint, settle_precision

DEADLINE_S = 600.0
# The plain loop's passes: all frames of a video, up to so many.
PLAIN_FRAMES = 64


def build(arguments, folder):
    """The job, and a task for each synthetic video: a frame every `every_s` seconds."""
    per_split = {"train": arguments.videos}
    generate(folder / "data", seed=0, videos_per_split=per_split)
    settings = [
        *arguments.set,
        *([f"encoder.source={write_vit(folder / 'vit', arguments.vit)}"] if arguments.vit else []),
    ]
    config = resolve(preset=arguments.preset, overrides=settings).config
    extract = settle_precision(config.extract)
    job = ExtractionJob(config.encoder, config.teacher, extract, str(folder / "cache"))
    FeatureCache.create_or_open(folder / "cache", fingerprint(config, extract))
    times_s = np.arange(0.0, arguments.seconds, arguments.every_s)
    videos = sorted((folder / "data" / "videos").glob("*.mp4"))
    return job, [VideoTask(path.stem, str(path), times_s, fresh=True) for path in videos]


def write_vit(folder, width):
    """A CLIP vision tower with random weights, as a checkpoint."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=12, image_size=224, patch_size=16, **sizes)).save_pretrained(
        folder
    )
    return folder


def start(job, tasks):
    """A worker that has extracted a video, and the seconds until then."""
    began = time.perf_counter()
    worker = ExtractionWorker(job)
    outcome = worker.process(tasks[0])
    assert outcome.checksum is not None, outcome
    return worker, time.perf_counter() - began


def request(task, worker):
    extract = worker.job.extract
    return FrameRequest(Path(task.path), task.times_s, worker.networks.sizes_px, extract.decoder, extract.tolerance_s)


def end_to_end(worker, tasks, _views, arguments):
    """More videos than children, so that full passes can be had of short ones, as the flow on Ray does."""
    with ThreadPoolExecutor(arguments.ahead) as threads:
        for outcome in threads.map(worker.process, tasks):
            assert outcome.checksum is not None, outcome


def decode_alone(worker, tasks, _views, _arguments):
    children = [DecodeChild() for _ in range(num_decode_children(worker.job.extract))]
    free = list(children)
    for child, task in zip(children, tasks, strict=False):  # started, as they are before the worker's first video
        child.decode(request(task, worker), DEADLINE_S)

    def one(task):
        child = free.pop()
        decoded = child.decode(request(task, worker), DEADLINE_S)
        free.append(child)
        return decoded

    started = time.perf_counter(), cpu_seconds(children)
    with ThreadPoolExecutor(len(children)) as threads:
        for _ in threads.map(one, tasks):
            pass
    taken = time.perf_counter() - started[0], cpu_seconds(children) - started[1]
    for child in children:
        child.close()
    return taken


def networks_alone(worker, _tasks, views, _arguments):
    worker.networks.encode(*views)


def commits_alone(worker, tasks, _views, arguments):
    """In as many threads as the worker has, with the features of any one video."""
    count = len(tasks[0].times_s)
    features, targets = arguments.encoded
    content = {"times_s": tasks[0].times_s, "features": features[:count], "targets": targets[:count]}
    with ThreadPoolExecutor(arguments.ahead) as threads:
        for _ in threads.map(lambda task: worker.cache.write_video(task.video, **content), tasks):
            pass


def plain_loop(worker, tasks, _views, arguments):
    """One video after the other, one pass per video's frames up to the batch size, one file per video."""
    out = arguments.folder / "plain"
    out.mkdir(exist_ok=True)
    size, networks = PLAIN_FRAMES, worker.networks
    for task in tasks:
        views = decode(request(task, worker)).views
        features, targets = [], []
        for start in range(0, len(task.times_s), size):
            pictures = [torch.from_numpy(view[start : start + size]).to(networks.device) for view in views]
            features.append(networks.encoder(pictures[0]).float().cpu())
            targets.append(networks.teacher(pictures[1]).cpu())
        np.savez(out / task.video, features=torch.cat(features).half().numpy(), targets=torch.cat(targets).numpy())


def cpu_seconds(children):
    """Processor time of this process and of the children given."""
    ticks = 0
    for child in children:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


FORMS = {
    "decode": decode_alone,
    "networks": networks_alone,
    "commits": commits_alone,
    "end to end": end_to_end,
    "plain loop": plain_loop,
}
PARTS = ("decode", "networks", "commits")


def measure(arguments, worker, tasks):
    views = [np.concatenate(parts) for parts in zip(*(decode(request(t, worker)).views for t in tasks), strict=True)]
    arguments.encoded = worker.networks.encode(*(view[: len(tasks[0].times_s)] for view in views))
    seconds = {form: [] for form in FORMS}
    processor = {form: [] for form in FORMS}
    for repetition in range(arguments.repeat + 1):
        for form, function in FORMS.items():
            started = time.perf_counter(), time.process_time()
            taken = function(worker, tasks, views, arguments)
            taken = taken or (time.perf_counter() - started[0], time.process_time() - started[1])
            if repetition:  # the first round pays for what happens once
                seconds[form].append(taken[0])
                processor[form].append(taken[1])
    return seconds, processor


def summarise(seconds, processor, frames):
    median = {form: statistics.median(times) for form, times in seconds.items()}
    busy = {form: statistics.median(times) for form, times in processor.items()}
    slower = max(median["decode"], median["networks"])
    found = {
        "seconds": seconds,
        "frames_per_s": {form: frames / value for form, value in median.items()},
        "share_of_the_slower_part": slower / median["end to end"],
        "plain_loop_over_end_to_end": median["plain loop"] / median["end to end"],
    }
    if not torch.cuda.is_available():
        bound = max(slower, sum(busy[part] for part in PARTS) / (os.cpu_count() or 1))
        found |= {"processor_s": busy, "bound_s": bound, "share_of_bound": bound / median["end to end"]}
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each video; the shortest has four")
    parser.add_argument("--every-s", type=float, default=0.25)
    parser.add_argument("--ahead", type=int, default=8, help="videos in work at once")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--vit", type=int, help="width of the vision tower, instead of the preset's")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--set", action="append", default=[], help="a setting, as for `pipeline extract`")
    parser.add_argument("--name", default="extract", help="beginning of the result file's name")
    return parser.parse_args()


def main():
    arguments = parse()
    arguments.folder = Path(tempfile.mkdtemp(prefix="bench-extract-"))
    try:
        job, tasks = build(arguments, arguments.folder)
        worker, start_s = start(job, tasks)
        frames = sum(len(task.times_s) for task in tasks)
        seconds, processor = measure(arguments, worker, tasks)
        worker.close()
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    result = {
        "hardware": hardware(),
        "work": {"videos": len(tasks), "frames": frames, "preset": arguments.preset, "settings": arguments.set},
        "vit": arguments.vit,
        "start_s": start_s,
        "frames_per_pass": worker.networks.batch_frames,
        "decode_children": num_decode_children(job.extract),
        **summarise(seconds, processor, frames),
    }
    for form, rate in result["frames_per_s"].items():
        print(f"{form}: {rate:.1f} frames/s")
    print({key: round(value, 2) for key, value in result.items() if key.startswith(("share", "plain", "bound"))})
    write_result(arguments.name, result)


def hardware():
    found = {"cpu_cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return {**found, "torch": torch.__version__}


if __name__ == "__main__":
    main()
