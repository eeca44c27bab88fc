"""One GPU's ten minutes: what is claimed of it, measured at the published shapes with random weights.

Needs torch, transformers, safetensors, numpy and pydantic, and for the teacher diffusers; no installation, no Ray, no
decoder, no checkpoint. Parts come one after the other, each with seconds of its own; time that one leaves goes to the
next. After every row of figures the result file is whole, so that a run that is cut keeps what it has, and a part that
fails leaves its traceback there and does not stop the others.

    python -m benchmarks.gpu_check                              # from the top of the repository
    python -m benchmarks.gpu_check --minutes 3 --parts clip_form training_step
    python -m benchmarks.gpu_check --tiny                       # tries the program itself, on a CPU too

Results go to benchmarks/results/gpu-check-<date and time>.json. Exit code 1 when a part failed.
"""

import argparse
import gc
import json
import os
import platform
import signal
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

BEGAN_S = time.monotonic()
RESULTS = Path(__file__).parent / "results"
if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402  after the clock, and after the path

from benchmarks.gpu import parts, published  # noqa: E402
from stages.atomic import atomic_path  # noqa: E402

# Each part and its seconds; those that other parts and the machine depend on least come last.
PARTS = {
    "products": (parts.products, 15),
    "frozen_networks": (parts.frozen_networks, 80),
    "clip_form": (parts.clip_form, 100),
    "training_step": (parts.training_step, 90),
    "losses": (parts.losses, 30),
    "copies": (parts.copies, 20),
    "batch_sizes": (parts.batch_sizes, 70),
    "bank_ways": (parts.bank_ways, 60),
    "compiled": (parts.compiled, 90),
}
LEAST_S = 2.0


class TimeIsUp(BaseException):
    """Raised in the middle of a part; no library takes it for a fault of its own."""


class Check:
    """The result file and the clock.

    Args:
        path: the file, rewritten after every row.
        limit_s: seconds for everything.
        about: what the file says beside the parts.
        began_s: when the program was started.
    """

    def __init__(self, path: Path, limit_s: float, about: dict[str, object], *, began_s: float) -> None:
        self.path, self.limit_s, self.began_s = path, limit_s, began_s
        self.result: dict[str, object] = {**about, "parts": {}}

    def run(self, name, machine, *, later_s):
        """Run a part within its time, and what the later ones leave; False if it failed."""
        part, own_s = PARTS[name]
        left_s = self.limit_s - (time.monotonic() - self.began_s)
        allowed_s = max(min(own_s, left_s), left_s - later_s)
        entry = {"state": "left out", "allowed_s": allowed_s, "rows": []}
        self.result["parts"][name] = entry
        if allowed_s >= LEAST_S:
            self._measure(name, part, machine, entry)
        self.write()
        print(f"{name}: {entry['state']}", flush=True)
        return entry["state"] != "failed"

    def _measure(self, name, part, machine, entry):
        started = time.monotonic()
        entry["state"] = "running"
        signal.setitimer(signal.ITIMER_REAL, entry["allowed_s"])
        try:
            for row in part(machine):
                entry["rows"].append(row)
                entry["seconds"] = time.monotonic() - started
                self.write()
                print(f"{name}: {json.dumps(row)}", flush=True)
            entry["state"] = "done"
        except TimeIsUp:
            entry["state"] = "cut"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded, and the others are measured
            entry["state"], entry["error"] = "failed", "".join(traceback.format_exception(error))
            print(entry["error"], file=sys.stderr)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        entry["seconds"] = time.monotonic() - started
        machine.release()

    def write(self):
        self.result["seconds"] = time.monotonic() - self.began_s
        with atomic_path(self.path) as aside:
            aside.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")


def hardware(device):
    """Machine and versions."""
    found = {"machine": platform.machine(), "cpu_cores": os.cpu_count(), "python": platform.python_version()}
    for name in ("torch", "transformers", "diffusers"):
        module = sys.modules.get(name)
        found[name] = None if module is None else module.__version__
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"device": about.name, "device_bytes": about.total_memory, "cuda": torch.version.cuda}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything, from the start of the program")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        print("no GPU here, so nothing is measured; --tiny tries the program on a CPU")
        return 0
    shapes = published.TINY if arguments.tiny else published.PUBLISHED
    now = datetime.now(UTC)
    about = {"started": now.isoformat(), "hardware": hardware(device), "tiny": arguments.tiny, "weights": "random"}
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"gpu-check-{now:%Y-%m-%d-%H%M%S}.json"
    check = Check(path, 60 * arguments.minutes, about, began_s=BEGAN_S)
    signal.signal(signal.SIGALRM, _time_is_up)
    gc.freeze()  # what is imported stays, and need not be looked through between the parts
    machine, fine = parts.Machine(device, shapes, arguments.tiny), True
    for place, name in enumerate(arguments.parts):
        later_s = sum(PARTS[other][1] for other in arguments.parts[place + 1 :])
        fine &= check.run(name, machine, later_s=later_s)
    check.result["hardware"] = hardware(device)
    check.write()
    print(f"written to {check.path}")
    return 0 if fine else 1


def _time_is_up(_number, _frame):
    raise TimeIsUp


if __name__ == "__main__":
    sys.exit(main())
