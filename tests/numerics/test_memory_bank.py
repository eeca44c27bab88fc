"""The memory bank against plain loops over NumPy arrays, and the plan of merges against appending frame by frame."""

import numpy as np
import pytest
import torch
from tolerances import FLOAT32_MEAN, largest_difference

from model.qformer.memory import MemoryBank, append, merge_most_similar, plan_merges

BATCH, TOKENS, WIDTH = 2, 3, 8
M = 4


def cosine(left, right):
    """Cosine of two vectors, 0 where one is zero."""
    dot = norm_left = norm_right = 0.0
    for a, b in zip(left, right, strict=True):
        dot, norm_left, norm_right = dot + a * b, norm_left + a * a, norm_right + b * b
    return dot / max(np.sqrt(norm_left) * np.sqrt(norm_right), 1e-16)


def reference_bank(frames, max_slots):
    """Follow the published rule one token position at a time: [T, C] float64 -> its slots and their counts."""
    slots, counts = [], []
    for frame in frames:
        slots.append([float(value) for value in frame])
        counts.append(1)
        if len(slots) <= max_slots:
            continue
        best, most_alike = 0, -np.inf
        for pair in range(len(slots) - 1):
            alike = cosine(slots[pair], slots[pair + 1])
            if alike > most_alike:
                best, most_alike = pair, alike
        left, right = counts[best], counts[best + 1]
        merged = [(left * a + right * b) / (left + right) for a, b in zip(slots[best], slots[best + 1], strict=True)]
        slots[best : best + 2] = [merged]
        counts[best : best + 2] = [left + right]
    return np.array(slots), np.array(counts)


def random_frames(num_frames, seed=0):
    return torch.randn(BATCH, num_frames, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def signs(num_frames, *pattern):
    """Frames that repeat `pattern`, each of entries +1 and -1: their cosines and means have no rounding error."""
    values = torch.tensor([[1.0 if (index >> bit) % 2 else -1.0 for bit in range(WIDTH)] for index in pattern])
    chosen = values[torch.arange(num_frames) % len(pattern)]
    return chosen[None, :, None].expand(BATCH, -1, TOKENS, -1)


CONTENTS = {
    "random": random_frames,
    "identical": lambda num_frames: signs(num_frames, 173),
    "black": lambda num_frames: torch.zeros(BATCH, num_frames, TOKENS, WIDTH),
    "alternating": lambda num_frames: signs(num_frames, 173, 90),
    "identical random": lambda num_frames: random_frames(1).expand(-1, num_frames, -1, -1),
    "black, then random": lambda num_frames: random_frames(num_frames) * (torch.arange(num_frames) > 1)[:, None, None],
    "in pairs": lambda num_frames: random_frames(num_frames).repeat_interleave(2, dim=1)[:, :num_frames],
}


def append_all(bank, frames, max_slots=M):
    for index in range(frames.shape[1]):
        bank = append(bank, frames[:, index], max_slots)
    return bank


def carried_bank(num_slots, max_slots=M):
    """A bank of that many slots; a full one has merged before."""
    num_frames = num_slots if num_slots < max_slots else 2 * max_slots
    return append_all(MemoryBank.empty(BATCH, TOKENS, WIDTH), random_frames(num_frames, seed=9), max_slots)


@pytest.mark.parametrize("content", ["random", "identical", "black", "alternating"])
@pytest.mark.parametrize("num_frames", [1, M - 1, M, M + 1, 3 * M])
def test_appending_frames_gives_the_slots_of_a_plain_loop(content, num_frames):
    frames = CONTENTS[content](num_frames)
    bank = append_all(MemoryBank.empty(BATCH, TOKENS, WIDTH), frames)
    for clip in range(BATCH):
        for token in range(TOKENS):
            slots, counts = reference_bank(frames[clip, :, token].double().numpy(), M)
            np.testing.assert_array_equal(bank.counts[clip, :, token].numpy(), counts)
            np.testing.assert_allclose(bank.slots[clip, :, token].numpy(), slots, atol=FLOAT32_MEAN, rtol=0)


@pytest.mark.parametrize("max_slots", [1, 2, M])
@pytest.mark.parametrize("content", CONTENTS)
def test_every_slot_is_the_plain_mean_of_a_run_of_consecutive_frames(content, max_slots):
    frames = CONTENTS[content](3 * M)
    bank = append_all(MemoryBank.empty(BATCH, TOKENS, WIDTH), frames, max_slots)
    assert bank.num_slots == max_slots
    for clip in range(BATCH):
        for token in range(TOKENS):
            stops = bank.counts[clip, :, token].long().cumsum(0).tolist()
            assert stops[-1] == 3 * M
            for slot, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
                mean = frames[clip, start:stop, token].double().mean(0)
                assert largest_difference(bank.slots[clip, slot, token], mean) <= FLOAT32_MEAN


def test_merging_chooses_the_most_similar_pair_of_each_token_position_on_its_own():
    slots = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0.1], [1, 0]], [[0, 1], [1, 0.2]]])[None]  # [1, 3, 2, 2]
    merged = merge_most_similar(MemoryBank(slots, torch.tensor([[[3.0, 1], [1, 2], [1, 2]]])))
    assert merged.counts.tolist() == [[[4, 1], [1, 4]]]
    expected = torch.tensor([[[1.0, 0.025], [0, 1]], [[0, 1], [1, 0.1]]])[None]
    assert largest_difference(merged.slots, expected) <= FLOAT32_MEAN


def test_equal_similarities_merge_the_oldest_pair():
    bank = append_all(MemoryBank.empty(BATCH, TOKENS, WIDTH), CONTENTS["black"](M + 3))
    assert (bank.counts == torch.tensor([4.0, 1, 1, 1])[:, None]).all()


def test_identical_pairs_are_equally_alike_whatever_they_show():
    bank = append_all(MemoryBank.empty(BATCH, TOKENS, WIDTH), CONTENTS["in pairs"](2 * M), max_slots=2 * M - 1)
    assert (bank.counts == torch.tensor([2.0, *[1.0] * (2 * M - 2)])[:, None]).all()


def test_slots_that_float32_cosines_cannot_tell_apart_merge_where_they_are_closest():
    steps = torch.tensor([0.0, 1e-4, 1.8e-4, 2.4e-4])  # the last step is the smallest
    slots = torch.stack([torch.ones(4), steps, -steps], dim=1)[None, :, None]  # [1, 4, 1, 3]
    cosines = torch.nn.functional.cosine_similarity(slots[:, :-1], slots[:, 1:], dim=-1)
    assert len(cosines.unique()) == 1
    assert merge_most_similar(MemoryBank(slots, torch.ones(1, 4, 1))).counts.flatten().tolist() == [1, 1, 2]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("num_carried", range(M + 1))
@pytest.mark.parametrize("run", [1, M - 1, M, M + 1, 3 * M])
def test_a_plan_of_merges_ends_where_appending_ends_to_the_last_bit(content, num_carried, run):
    carried, frames = carried_bank(num_carried), CONTENTS[content](run)
    planned = plan_merges(carried, frames, M).bank
    appended = append_all(carried, frames)
    assert torch.equal(planned.counts, appended.counts)
    assert torch.equal(planned.slots, appended.slots)


@pytest.mark.parametrize("max_slots", [1, 2])
def test_a_plan_of_merges_works_with_one_and_two_slots(max_slots):
    for num_carried in range(max_slots + 1):
        carried, frames = carried_bank(num_carried, max_slots), random_frames(7)
        planned = plan_merges(carried, frames, max_slots).bank
        appended = append_all(carried, frames, max_slots)
        assert torch.equal(planned.counts, appended.counts)
        assert torch.equal(planned.slots, appended.slots)


@pytest.mark.parametrize("content", ["random", "identical", "in pairs"])
@pytest.mark.parametrize("num_carried", range(M + 1))
@pytest.mark.parametrize("run", [1, M, 3 * M])
def test_the_plans_pages_show_each_frame_the_bank_it_would_have_seen_and_itself(content, num_carried, run):
    carried, frames = carried_bank(num_carried), CONTENTS[content](run)
    plan = plan_merges(carried, frames, M)
    pages = torch.full((BATCH, plan.num_pages, TOKENS, WIDTH), float("nan"))
    pages[:, :num_carried] = carried.slots
    before = carried
    for index in range(run):
        write(pages, plan.own[:, index], frames[:, index])
        seen = pages[:, : plan.pages_seen(index)]
        expected = torch.cat([before.slots, frames[:, index : index + 1]], dim=1)
        assert largest_difference(in_some_order(seen), in_some_order(expected)) <= FLOAT32_MEAN
        merge = plan.merge_after(index)
        if merge is not None:
            left, right, share = plan.left[:, merge], plan.right[:, merge], plan.share[:, merge, :, None]
            write(pages, left, share * look(pages, left) + (1 - share) * look(pages, right))
            write(pages, right, float("nan") * look(pages, right))  # free: nobody may look at it before it is written
        before = append(before, frames[:, index], M)
    last = torch.stack([look(pages, plan.order[:, slot]) for slot in range(plan.order.shape[1])], dim=1)
    assert largest_difference(last, before.slots) <= FLOAT32_MEAN


def look(pages, page):
    """Values [B, N, C] of the pages [B, N]."""
    return pages.gather(1, page[:, None, :, None].expand(-1, -1, -1, WIDTH))[:, 0]


def write(pages, page, values):
    pages.scatter_(1, page[:, None, :, None].expand(-1, -1, -1, WIDTH), values[:, None])


def in_some_order(slots):
    """Slots [B, k, N, C] sorted, for each token position, by a projection that tells them apart."""
    marks = slots @ torch.linspace(1, 2, WIDTH)  # [B, k, N]
    order = marks.argsort(dim=1)[..., None].expand_as(slots)
    return slots.gather(1, order)


def test_memory_is_detached_and_its_inputs_stay_as_they_were():
    carried = carried_bank(M)
    frames = random_frames(5).requires_grad_()
    before = carried.slots.clone(), carried.counts.clone(), frames.detach().clone()
    banks = [append_all(carried, frames), plan_merges(carried, frames, M).bank]
    assert not any(bank.slots.requires_grad for bank in banks)
    assert torch.equal(carried.slots, before[0])
    assert torch.equal(carried.counts, before[1])
    assert torch.equal(frames, before[2])
