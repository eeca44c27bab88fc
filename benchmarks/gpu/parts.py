"""What `gpu_check` measures: each part is a generator of rows, so that what was measured before a fault is kept."""

import copy
import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import qformer
from benchmarks.gpu import bank_attention, published
from benchmarks.gpu.machine import LOWER, Machine, difference
from model.qformer.memory import MemoryBank, plan_merges
from model.qformer.paged_attention import PagedAttention, Remembered, project
from stages.config import TrainConfig
from stages.device import Compute, autocast
from stages.extract.frozen_pair import FrozenPair
from stages.networks.memory_law import ClipShape, Parts, training_memory
from stages.networks.sharding import decoder_layers
from stages.train.parts import parts_for
from stages.train.step import Stepper

Rows = Iterator[dict[str, Any]]
EXACT = torch.float32
LR = 1e-4


def products(machine: Machine) -> Rows:
    """Plain matrix products: the peak that shares are taken of."""
    for dtype in (LOWER, EXACT):
        for size in (64,) if machine.tiny else (4096, 8192, 16384):
            left, right = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
            spent = machine.seconds(lambda a=left, b=right: a @ b, repeat=20, most_s=2.0)
            machine.peak[dtype] = max(machine.peak.get(dtype, 0.0), 2 * size**3 / spent)
            yield {"dtype": str(dtype), "size": size, "tflops": 2 * size**3 / spent / 1e12}


def frozen_networks(machine: Machine) -> Rows:
    """Vision tower and teacher, as extraction runs them on a GPU."""
    yield from _network_rows(machine, "vision tower", published.vision_tower(machine.shapes, machine.device, LOWER))
    machine.release()
    try:
        teacher = published.dit_teacher(machine.shapes, machine.device, LOWER)
    except ModuleNotFoundError as error:
        yield {"network": "teacher", "left_out": str(error)}
        return
    yield from _network_rows(machine, "teacher", teacher)
    frames = 2 if machine.tiny else 32
    pixels = torch.zeros(frames, 3, teacher.size_px, teacher.size_px, device=machine.device)
    with torch.no_grad():
        latents = teacher.latents(pixels)
        spent = machine.seconds(lambda: teacher.latents(pixels))
        yield {"network": "teacher, VAE encoder alone", "frames": frames, "frames_per_s": frames / spent}
        spent = machine.seconds(lambda: teacher.residual_stream(latents))
        yield {"network": "teacher, DiT blocks alone", "frames": frames, "frames_per_s": frames / spent}


def _passes(machine):
    return (1, 2) if machine.tiny else (1, 8, 32, 64, 128, 256)


def _pixels(machine, network, frames):
    generator = torch.Generator(machine.device).manual_seed(0)
    size = (frames, network.size_px, network.size_px, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, device=machine.device, generator=generator)


def _network_rows(machine, name, network):
    with FlopCounterMode(display=False) as counter:
        network(_pixels(machine, network, 1))
    flops = counter.get_total_flops()
    for frames in _passes(machine):
        pixels = _pixels(machine, network, frames)
        if not machine.fits(lambda p=pixels: network(p)):
            yield {"network": name, "frames": frames, "fits": False}
            return
        spent = machine.seconds(lambda p=pixels: network(p))
        yield {
            "network": name,
            "frames": frames,
            "seconds": spent,
            "frames_per_s": frames / spent,
            "gflops_per_frame": flops / 1e9,
            "share_of_peak": machine.share_of_peak(flops * frames / spent),
            "peak_bytes": machine.peak_bytes(lambda p=pixels: network(p)),
        }


def clip_form(machine: Machine) -> Rows:
    """The clip form against the published loop: equality, then times and memory in both precisions."""
    shapes = machine.shapes
    model = published.qformer(shapes, machine.device, dropout=0.0)
    features, text = published.features(shapes, machine.device), published.text(shapes, machine.device)
    lengths = (shapes.frames, shapes.frames // 5)
    for frames in lengths:
        rows: list[dict[str, Any]] = []
        if machine.fits(lambda t=frames, into=rows: into.append(_equality(model, features[:, :t], text))):
            yield rows[0]
            break
    for frames in lengths:
        for dtype in (EXACT, LOWER):
            for backward in (False, True):
                yield _forms_row(machine, model, (features[:, :frames], text), dtype, backward)


def _equality(model, features, text):
    """Levels and gradients of the two forms in float32."""
    arguments, levels, gradients = SimpleNamespace(frames_per_chunk=None), {}, {}
    with torch.no_grad():
        levels["clip"] = model(features, text).levels
        memory, steps = model.empty_memory(1, features.shape[2], text.ids.shape[1]), []
        for frame in features.unbind(1):
            out = model.step(memory, frame, text)
            memory = out.memory
            steps.append(out.levels)
        levels["loop"] = [torch.cat(level, dim=1) for level in zip(*steps, strict=True)]
    for form, run in qformer.FORMS.items():
        model.zero_grad(set_to_none=True)
        run(model, features, text, arguments, True)
        gradients[form] = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    # The gradient of a key's bias is zero in theory, so what there is of it is rounding.
    names = [name for name in gradients["loop"] if not name.endswith("key.bias")]
    off = {name: _relative(gradients["loop"][name], gradients["clip"][name]) for name in names}
    worst = max(off, key=off.get)
    model.zero_grad(set_to_none=True)
    return {
        "frames": features.shape[1],
        # Where two pairs of slots are alike but for rounding, the forms may merge differently, and go on from there.
        "level_differences": [difference(*pair) for pair in zip(levels["loop"], levels["clip"], strict=True)],
        "level_differences_l2": [_relative(*pair) for pair in zip(levels["loop"], levels["clip"], strict=True)],
        "gradient_difference_median": statistics.median(off.values()),
        "gradient_difference_largest": off[worst],
        "of_parameter": worst,
    }


def _relative(expected, found):
    return ((expected - found).norm() / expected.norm().clamp(min=1e-30)).item()


def _forms_row(machine, model, clip_inputs, dtype, backward):
    arguments = SimpleNamespace(frames_per_chunk=None, slots=machine.shapes.slots)
    frames = clip_inputs[0].shape[1]
    row = {"frames": frames, "pass": "forward+backward" if backward else "forward", "precision": str(dtype)}
    row["seconds"], row["peak_bytes"] = {}, {}
    for form in qformer.FORMS:

        def run(form=form):
            with autocast(machine.device, dtype):
                qformer.one_pass(form, model, clip_inputs, arguments, backward)

        if not machine.fits(run):
            row["does_not_fit"] = form
            continue
        row["peak_bytes"][form] = machine.peak_bytes(run)
        row["seconds"][form] = machine.seconds(run, repeat=3, most_s=8.0)
    if len(row["seconds"]) == len(qformer.FORMS):
        row["ratio"] = row["seconds"]["loop"] / row["seconds"]["clip"]
    if machine.shapes is published.PUBLISHED:
        counts = {form: qformer.arithmetic(form, frames, arguments, backward) for form in qformer.FORMS}
        row["multiply_adds_ratio"] = counts["loop"] / counts["clip"]
    return row


def training_step(machine: Machine) -> Rows:
    """A step of Stage 2 with ever more clips in a part, then with other chunks of frames."""
    shapes, stepper, largest = machine.shapes, _stepper(machine), 1
    usual = stepper.parts.frames
    for clips in _parts(machine):
        row = _step_row(machine, stepper, Parts(clips, usual))
        yield row
        if not row["fits"]:
            break
        largest = clips
    for frames in sorted({max(1, shapes.slots // 2), shapes.slots, shapes.frames}):
        yield _step_row(machine, stepper, Parts(max(1, largest // 4), frames))


def _stepper(machine):
    model = published.diff_lmm(machine.shapes, machine.device, LOWER)
    return Stepper(TrainConfig(), model, Compute(machine.device, LOWER))


def _parts(machine):
    return (1, 2) if machine.tiny else (1, 2, 4, 8, 16, 32, 64)


def _step_row(machine, stepper, parts):
    """Steps of as many clips as go through the networks at once."""
    row = {"micro_batch_size": parts.clips, "frames_per_chunk": parts.frames}
    recipe = TrainConfig(frames_per_chunk=parts.frames)
    law = training_memory(stepper.model, recipe, _clip(machine.shapes), quantize="none", dtype=LOWER)
    row["bytes_by_law"] = law.total(parts.clips)
    batch = published.batch(machine.shapes, machine.device, parts.clips)
    stepper.parts = parts

    def take():
        stepper.take(0, LR, [batch])

    # What does not fit, the step takes again in smaller parts.
    if not machine.fits(take) or stepper.parts != parts:
        return {**row, "fits": False, "fits_as": str(stepper.parts)}
    spent = machine.seconds(take, repeat=3, most_s=8.0)
    row |= {"fits": True, "seconds": spent, "clips_per_s": parts.clips / spent, "step_bytes": machine.peak_bytes(take)}
    row["bytes"] = torch.cuda.max_memory_allocated(machine.device) if machine.on_gpu else None
    bad = stepper.bad_step()
    return {**row, "not_finite": None if bad is None else bad[1]}


def _clip(shapes):
    return ClipShape(shapes.frames, shapes.patches, shapes.words, shapes.queries + shapes.answer)


def losses(machine: Machine) -> Rows:
    """The same steps from the same weights in float32 and in bfloat16, with two layers of the language model."""
    exact = published.diff_lmm(machine.shapes, machine.device, EXACT, language_layers=2, dropout=0.0)
    lower = copy.deepcopy(exact)
    lower.language.to(LOWER)
    steppers = {
        dtype: Stepper(TrainConfig(), model, Compute(machine.device, dtype))
        for dtype, model in ((EXACT, exact), (LOWER, lower))
    }
    part = published.batch(machine.shapes, machine.device, 2)
    for step in range(2 if machine.tiny else 10):
        row: dict[str, Any] = {"step": step}
        for dtype, stepper in steppers.items():
            found = stepper.take(step, LR, [part])
            row[str(dtype)] = {name: getattr(found, name).item() for name in ("total", "answer", "kd")}
        one, other = row[str(EXACT)], row[str(LOWER)]
        row["relative_difference"] = {name: abs(other[name] - one[name]) / abs(one[name]) for name in one}
        yield row


def copies(machine: Machine) -> Rows:
    """A batch on its way to the device, from plain and from page-locked memory."""
    if not machine.on_gpu:
        yield {"left_out": "there is no other memory to copy to"}
        return
    for clips in (1, 8):
        plain = published.batch(machine.shapes, torch.device("cpu"), clips)
        started = time.perf_counter()
        locked = plain.pin_memory()
        locking_s = time.perf_counter() - started
        num_bytes = plain.stored.features.numel() * plain.stored.features.element_size()
        for kind, part in (("plain", plain), ("page-locked", locked)):
            spent = machine.seconds(lambda p=part: p.on(machine.device))
            machine.synchronise()
            started = time.perf_counter()
            moved = part.on(machine.device)
            returned_s = time.perf_counter() - started
            machine.synchronise()
            yield {
                "memory": kind,
                "clips": clips,
                "bytes": num_bytes,
                "seconds": spent,
                "gb_per_s": num_bytes / spent / 1e9,
                "until_the_call_returns_s": returned_s,
                "locking_s": locking_s,
                "equal": torch.equal(moved.features.cpu(), plain.stored.features),
            }


class RandomPair(FrozenPair):
    """Stage 1's pair of networks with random weights, its passes found as extraction finds them."""

    def __init__(self, machine: Machine) -> None:
        self.device, self.dtype = machine.device, LOWER
        self.encoder = published.vision_tower(machine.shapes, machine.device, LOWER)
        self.teacher = published.dit_teacher(machine.shapes, machine.device, LOWER)
        self.sizes_px = tuple((size, size) for size in (self.encoder.size_px, self.teacher.size_px))
        self._encoder, self._teacher = self.encoder, self.teacher
        self.batch_frames = self.find_pass() if machine.on_gpu else 2


def batch_sizes(machine: Machine) -> Rows:
    """Sizes that are found: clips of a training step's part, and frames of a pass of extraction."""
    yield _clips_found(machine)
    machine.release()
    started = time.perf_counter()
    try:
        pair = RandomPair(machine)
    except ModuleNotFoundError as error:
        yield {"of": "frames of a pass", "left_out": str(error)}
        return
    yield {"of": "frames of a pass", "found": pair.batch_frames, "seconds": time.perf_counter() - started}
    numbers = np.random.default_rng(0)
    count = 2 * pair.batch_frames
    views = [numbers.integers(0, 256, (count, *size, 3), dtype=np.uint8) for size in pair.sizes_px]
    spent = machine.seconds(lambda: pair.encode(*views), repeat=3)
    yield {"of": "frames through both networks, copies included", "frames": count, "frames_per_s": count / spent}


def _clips_found(machine):
    """As training settles it: by the law of a step's memory, then by one real forward and backward."""
    stepper, samples = _stepper(machine), _parts(machine)[-1]
    batch = published.batch(machine.shapes, machine.device, samples)
    config = TrainConfig(micro_batch_size="auto", loader_workers=0)
    started = time.perf_counter()
    by_law = parts_for(
        config,
        stepper.model,
        _clip(machine.shapes),
        stepper.compute,
        samples=samples,
        quantize="none",
        with_moments=False,
    )
    stepper.parts = by_law
    stepper.try_parts(batch)
    tried = stepper.parts
    spent = time.perf_counter() - started
    step_s = machine.seconds(lambda: stepper.take(0, LR, [batch]), repeat=1)
    row = {"of": "clips of a part", "samples": samples, "by_law": str(by_law), "tried": str(tried), "seconds": spent}
    return {**row, "step_s": step_s, "after_steps": str(stepper.parts)}


def bank_ways(machine: Machine) -> Rows:
    """One layer's attention to the visual bank: pages against gathered entries and FlexAttention."""
    config = machine.shapes.qformer_config(0.0)
    for clips in (1,) if machine.tiny else (1, 8):
        made = _Bank(machine, clips, config)
        yield {"clips": clips, "plan_merges_s": made.plan_s, "table_s": made.table_s, "entries": made.entries}
        ways = {"pages": made.pages, "gather": made.gathered, "flex": made.flexed}
        with torch.no_grad():
            expected = made.pages()
        for name, way in ways.items():
            with torch.no_grad():
                started = time.perf_counter()
                found = way()
                machine.synchronise()
                first_s = time.perf_counter() - started
                forward_s = machine.seconds(way)
            row = {"clips": clips, "way": name, "first_s": first_s, "forward_s": forward_s}
            row["difference"] = difference(expected, found)
            if name != "flex" or machine.on_gpu:  # a CPU has no backward pass of it
                row["forward_backward_s"] = machine.seconds(lambda w=way: w().float().square().sum().backward())
                row["peak_bytes"] = machine.peak_bytes(lambda w=way: w().float().square().sum().backward())
            yield row


class _Bank:
    """A full bank, a chunk of frames behind it, and one layer's projections."""

    def __init__(self, machine, clips, config):
        shapes, device = machine.shapes, machine.device
        self.machine, self.heads = machine, config.num_attention_heads
        self.frames, hidden, slots = 2 * shapes.slots, config.hidden_size, shapes.slots
        torch.manual_seed(0)
        dtype = EXACT if machine.tiny else LOWER
        width, patches = shapes.visual_width, shapes.patches
        self.inputs = torch.randn(clips, self.frames, patches, width, device=device)
        before = torch.randn(clips, 2 * slots, patches, width, device=device)
        self.bank = plan_merges(MemoryBank.empty(clips, patches, width, device), before, slots).bank
        self.plan = plan_merges(self.bank, self.inputs, slots)
        self.plan_s = machine.seconds(lambda: plan_merges(self.bank, self.inputs, slots), repeat=3)
        self.weight = (torch.randn(2 * hidden, width, device=device) * width**-0.5).requires_grad_()
        self.bias = torch.zeros(2 * hidden, device=device, requires_grad=True)
        asked = torch.randn(clips, self.frames, shapes.queries, hidden, device=device)
        self.query = asked.to(dtype).requires_grad_()
        self.slots = project(self.bank.slots, self.weight, self.bias, self.heads).detach()
        self.table = bank_attention.table_of(self.plan, self.bank.counts)
        self.table_s = machine.seconds(lambda: bank_attention.table_of(self.plan, self.bank.counts), repeat=3)
        self.seen = self.table.seen(self.frames)
        self.entries = self.table.first.shape[1]
        self.mask = bank_attention.flex_mask(self.table, shapes.queries, self.frames)

    def pages(self):
        attention = PagedAttention(self.plan, self.heads, None)
        remembered = Remembered(self.bank.slots, self.slots)
        return attention(self.query, self.inputs, self.weight, self.bias, remembered)[0]

    def _entries(self):
        dtype = self.query.dtype
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        own = F.linear(self.inputs.to(dtype), weight, bias)
        slots = F.linear(self.bank.slots, self.weight, self.bias)
        return bank_attention.entries_of(self.table, own, slots, self.bank.counts)

    def gathered(self):
        return bank_attention.gather(self.query, self._entries(), self.seen, self.heads)

    def flexed(self):
        attend = {} if self.machine.tiny else {"attend": bank_attention.compiled_flex()}
        query = self.query if torch.is_grad_enabled() else self.query.detach()
        return bank_attention.flex(query, self._entries(), self.mask, self.heads, **attend)


def compiled(machine: Machine) -> Rows:
    """torch.compile against eager: a training step whose language model's layers are compiled, the frozen networks."""
    yield _compiled_step(machine)
    for name, build in (("teacher", published.dit_teacher), ("vision tower", published.vision_tower)):
        torch.compiler.reset()
        machine.release()
        try:
            network = build(machine.shapes, machine.device, LOWER)
        except ModuleNotFoundError as error:
            yield {"of": name, "left_out": str(error)}
        else:
            yield {"of": name, **_compiled_network(machine, network)}


def _backend(machine):
    return "eager" if machine.tiny else "inductor"


def _compiled_step(machine):
    stepper = _stepper(machine)
    part = published.batch(machine.shapes, machine.device, 2 if machine.tiny else 8)

    def take():
        return stepper.take(0, LR, [part])

    eager_s = machine.seconds(take, repeat=3)
    for layer in decoder_layers(stepper.model.language.model):  # one after the other: they share what is compiled
        layer.compile(dynamic=False, backend=_backend(machine))
    return {"of": "training step", "eager_s": eager_s, **_timed(machine, take)}


def _compiled_network(machine, network):
    pixels = _pixels(machine, network, 2 if machine.tiny else 32)
    faster = torch.compile(network, dynamic=False, backend=_backend(machine))
    eager_s, expected = machine.seconds(lambda: network(pixels)), network(pixels)
    row = {"eager_s": eager_s, **_timed(machine, lambda: faster(pixels))}
    return {**row, "difference": difference(expected, faster(pixels))}


def _timed(machine, work):
    """The first run, which compiles, and then the others."""
    started = time.perf_counter()
    work()
    machine.synchronise()
    return {"first_s": time.perf_counter() - started, "compiled_s": machine.seconds(work, repeat=3)}
