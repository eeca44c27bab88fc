"""Memory of `pipeline extract` over a run of thousands of tiny clips: does it grow with the number of videos?

The clips are a few encoded files under many names, so that nearly all the time goes into what happens once per video.
While the real command runs, the proportional set size (shared pages divided among their users, from
/proc/PID/smaps_rollup) of driver, model actor, decode children and Ray's own processes is sampled. Growth is the slope
of a straight line through the second half of a run.

    python benchmarks/extract_memory.py --videos 2000
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tiny_corpus
from result_file import write_result

from stages import process_tree

KINDS = {"decode.child_main": "decode children", "ray::WorkerActor": "model actor", "pipeline extract": "driver"}
OTHERS = "Ray's other processes"
MIB = 2**20


def start(folder, options, settings):
    named = [part for name, value in options.items() for part in (f"--{name}", value)]
    named += [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "pipeline", "extract", "--preset", "tiny", *named, "--cache", folder / "cache"]
    with (folder / "events.jsonl").open("w") as events, (folder / "people.txt").open("w") as people:
        return subprocess.Popen([*command, "--json-lines"], stdout=events, stderr=people)


def kind(pid, driver):
    if pid == driver:
        return "driver"
    line = process_tree.command_line(pid)
    return next((name for words, name in KINDS.items() if words in line), OTHERS)


def pss_bytes(pid):
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0


def sample(driver):
    """MiB by kind of process."""
    taken = dict.fromkeys((*KINDS.values(), OTHERS), 0.0)
    for pid in [driver, *process_tree.descendants(driver)]:
        try:
            taken[kind(pid, driver)] += pss_bytes(pid) / MIB
        except OSError:
            continue  # it has ended
    return taken


def videos_done(events):
    return events.read_bytes().count(b'"event": "video"') if events.exists() else 0


def watch(process, folder, every_s):
    """One row every so often: seconds, videos done, MiB by kind."""
    began, rows = time.monotonic(), []
    while process.poll() is None:
        taken = sample(process.pid)
        row = {"s": round(time.monotonic() - began, 1), "videos": videos_done(folder / "events.jsonl")}
        rows.append({**row, **{name: round(value, 1) for name, value in taken.items()}})
        time.sleep(every_s)
    return rows


def summarise(rows):
    """Of each kind: MiB at the start of the work, in its middle, at its end, at most, and growth per 1,000 videos."""
    working = [row for row in rows if row["videos"]]
    last = working[-1]["videos"]
    working = [row for row in working if row["videos"] < last] or working  # without the moments of stopping
    later = [row for row in working if row["videos"] >= last / 2]
    found = {}
    for name in (*KINDS.values(), OTHERS):
        slope = float(np.polyfit([row["videos"] for row in later], [row[name] for row in later], 1)[0])
        middle = working[len(working) // 2][name]
        ends = {"start": working[0][name], "middle": middle, "end": working[-1][name]}
        highest = max(row[name] for row in rows)
        found[name] = {**ends, "maximum": highest, "growth_per_1000_videos": round(1000 * slope, 2)}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=2000)
    parser.add_argument("--every-s", type=float, default=2.0)
    parser.add_argument("--set", action="append", default=[], help="a setting, as for `pipeline extract`")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-memory-"))
    try:
        process = start(folder, tiny_corpus.write(folder, arguments.videos), arguments.set)
        rows = watch(process, folder, arguments.every_s)
        assert process.returncode == 0, (folder / "people.txt").read_text()
        summary = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert summary["done"] == arguments.videos, summary
    found = summarise(rows)
    for name, values in found.items():
        print(name, values)
    hardware = {"cpu_cores": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()}
    work = {"videos": arguments.videos, "frames": summary["frames_now"], "seconds": summary["seconds"]}
    result = {"hardware": hardware, "work": work, "unit": "MiB, proportional set size", "summary": found, "curve": rows}
    write_result("extract-memory", result)


if __name__ == "__main__":
    main()
