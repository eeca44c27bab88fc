"""How fast this machine decodes, encodes and writes: a few seconds of the real thing, for `pipeline plan`.

The extraction's own worker extracts a few planned videos into a cache that is thrown away, and reports what took how
long.
"""

import hashlib
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch

from stages.cache.feature_cache import FeatureCache
from stages.cache.fingerprint import Fingerprint
from stages.cache.storage import STORAGE_FIELD
from stages.config import ExtractConfig
from stages.decode import DecodeError
from stages.device import pick_device
from stages.errors import UserError
from stages.extract.frozen_pair import ExtractionJob
from stages.extract.worker import ExtractionWorker, VideoOutcome, VideoTask, num_decode_children
from stages.wording import counted

# A video that takes longer than this is not measured, and after so many bad ones it is given up.
_DEADLINE_S = 60.0
_MOST_FAILURES = 20
_TICK_S = 0.25

# Called with the seconds measured so far and with what is going on.
OnStep = Callable[[float, str], None]


@dataclass(frozen=True)
class Rate:
    """Seconds that one frame takes, and how many frames this rests on."""

    seconds_per_frame: float
    frames: int


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of each stage on this machine with all its devices and decode children, and of all of them together."""

    decode: float
    networks: float
    write: float
    total: float


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        device: its name.
        devices: how many of them the machine has; the CPU counts as one.
        is_gpu: whether the networks run on GPUs.
        decode_children: decode children that an extraction on this machine runs at once.
        decode: one child's seconds for a frame while all of them decode.
        networks: one device's seconds for a frame through both networks.
        batch_frames: frames that went through the networks at once.
        write: seconds for a frame while several videos are committed at once.
        videos: videos that were decoded.
        failed: reason by id of those that could not be.
    """

    device: str
    devices: int
    is_gpu: bool
    decode_children: int
    decode: Rate
    networks: Rate
    batch_frames: int
    write: Rate
    videos: int
    failed: dict[str, str]

    def seconds(self, frames: int) -> StageSeconds:
        """Extrapolate to so many frames.

        The stages run beside each other and the slowest decides, but without a GPU decoding and networks share the
        cores and add up.
        """
        decode = frames * self.decode.seconds_per_frame / self.decode_children
        networks = frames * self.networks.seconds_per_frame / self.devices
        write = frames * self.write.seconds_per_frame
        computed = max(decode, networks) if self.is_gpu else decode + networks
        return StageSeconds(decode, networks, write, total=max(computed, write))


def spread(tasks: Sequence[VideoTask]) -> list[VideoTask]:
    """The same videos in an order without a pattern that is the same every time."""
    return sorted(tasks, key=lambda task: hashlib.sha256(task.video.encode()).digest())


def calibrate(
    job: ExtractionJob, tasks: Sequence[VideoTask], *, seconds: float, beside: Path, on_step: OnStep
) -> Calibration:
    """Extract the first of `spread(tasks)` with one worker that has the decode children of all devices.

    Args:
        job: which networks, how to decode and encode; the precision must be settled. Its cache is not touched.
        tasks: planned videos that exist; at least one.
        seconds: time to spend; loading the networks is not counted, and what has begun is finished.
        beside: folder of the disk to measure; a temporary cache is made in it and removed.
        on_step: called with the progress.

    Raises:
        UserError: a network or the disk cannot be used, or no video could be decoded.
    """
    device = pick_device()
    is_gpu = device.type == "cuda"
    extract = job.extract
    devices = min(torch.cuda.device_count(), extract.model_actors or torch.cuda.device_count()) if is_gpu else 1
    children = extract.decode_workers * devices if extract.decode_workers else num_decode_children(extract)
    used = {"decode_workers": min(children, len(tasks)), "deadline_s": min(extract.deadline_s, _DEADLINE_S)}
    with _temporary_cache(beside, extract) as root:
        on_step(0.0, "loading the networks")
        job = replace(job, extract=extract.model_copy(update=used), cache_root=str(root))
        with closing(ExtractionWorker(job)) as worker:
            for child in worker.children:
                with suppress(DecodeError):  # the video that it is given will fail, too
                    child.begin()
            rounds = _Rounds(worker, spread(tasks), seconds, on_step)
            rounds.run()
            batch_frames = worker.networks.batch_frames
    return Calibration(
        device=torch.cuda.get_device_name(device) if is_gpu else "CPU",
        devices=devices,
        is_gpu=is_gpu,
        decode_children=children,
        decode=rounds.rate(lambda outcome: outcome.decode_s),
        networks=rounds.rate(lambda outcome: outcome.networks_s),
        batch_frames=batch_frames,
        write=rounds.rate(lambda outcome: outcome.write_s / len(worker.children)),
        videos=len(rounds.videos),
        failed=rounds.failed,
    )


@contextmanager
def _temporary_cache(beside: Path, extract: ExtractConfig) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix=".plan-", dir=beside)
    except OSError as error:
        raise UserError(f"nothing can be written here ({error.strerror})", where=beside) from error
    with folder as name:
        root = Path(name) / "cache"
        fields = {STORAGE_FIELD: extract.storage, "purpose": "calibration"}
        FeatureCache.create_or_open(root, Fingerprint(fields=fields))
        yield root


class _Rounds:
    """Rounds of one piece of a video for each decode child, of twice as many frames as long as the time allows.

    `outcomes` are those of the largest round and of what came after it. The first round pays for what happens once,
    so another one as large takes its place.
    """

    def __init__(self, worker: ExtractionWorker, tasks: Sequence[VideoTask], seconds: float, on_step: OnStep) -> None:
        self.outcomes: list[VideoOutcome] = []
        self.videos: set[str] = set()
        self.failed: dict[str, str] = {}
        self._worker, self._seconds, self._on_step = worker, seconds, on_step
        self._waiting = deque(tasks)
        self._longest = max(len(task.times_s) for task in tasks)
        self._began_s = time.monotonic()

    def run(self) -> None:
        """Extract until the next round would take too long or nothing is left; at least one, unless too many fail."""
        frames, rounds, largest = ceil(self._worker.networks.batch_frames / len(self._worker.children)), 0, 0
        while self._waiting and (largest or len(self.failed) < _MOST_FAILURES):
            began_s = time.monotonic()
            done = self._extract(self._pieces(frames))
            encoded = sum(outcome.frames for outcome in done)
            is_larger = encoded > 1.5 * largest or (rounds == 1 and encoded == largest)
            self.outcomes = done if is_larger else self.outcomes + done
            rounds, largest = rounds + bool(encoded), max(largest, encoded)
            took_s, left_s = time.monotonic() - began_s, self._seconds - self._spent_s()
            if largest and took_s > left_s:
                return
            if encoded and 2 * took_s < left_s and frames < self._longest:
                frames *= 2

    def rate(self, seconds: Callable[[VideoOutcome], float]) -> Rate:
        """Seconds for a frame; UserError where nothing could be decoded."""
        frames = sum(outcome.frames for outcome in self.outcomes)
        if not frames:
            raise UserError(f"no video could be decoded; the first: {next(iter(self.failed.values()))}")
        return Rate(sum(map(seconds, self.outcomes)) / frames, frames)

    def _spent_s(self) -> float:
        return time.monotonic() - self._began_s

    def _pieces(self, frames: int) -> list[VideoTask]:
        """The next frames of one video for each child; what is left of it waits behind the others."""
        pieces = []
        for _ in range(min(len(self._worker.children), len(self._waiting))):
            task = self._waiting.popleft()
            pieces.append(replace(task, times_s=task.times_s[:frames], fresh=True))
            if len(task.times_s) > frames:
                self._waiting.append(replace(task, times_s=task.times_s[frames:]))
        return pieces

    def _extract(self, pieces: Sequence[VideoTask]) -> list[VideoOutcome]:
        """Extract all pieces at once, and return the outcomes; of one that could not be, without its decoding."""
        with ThreadPoolExecutor(len(pieces)) as pool:
            running = [pool.submit(self._worker.process, piece) for piece in pieces]
            try:
                while wait(running, _TICK_S).not_done:
                    encoded = sum(self._worker.encoded().values())
                    self._on_step(min(self._spent_s(), self._seconds), f"{counted(encoded, 'frame')} encoded")
            except KeyboardInterrupt:
                # Nobody waits for what they decode, and the threads end with them.
                while wait(running, 0).not_done:
                    self._worker.kill_children()
                    time.sleep(_TICK_S)
                raise
        done = []
        for outcome in (one.result() for one in running):
            if outcome.fatal is not None:
                raise UserError(outcome.fatal)
            if outcome.reason is None:
                self.videos.add(outcome.video)
                done.append(outcome)
            else:
                self.failed[outcome.video] = outcome.reason
                # What the networks did meanwhile for other videos may stand here.
                done.append(replace(outcome, decode_s=0.0))
        self._waiting = deque(task for task in self._waiting if task.video not in self.failed)
        return done
