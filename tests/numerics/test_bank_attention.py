"""The ways to attend to a memory bank that `benchmarks.gpu_check` times against the pages give the same context."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import relative_difference

from benchmarks.gpu import bank_attention
from model.qformer.memory import MemoryBank, plan_merges
from model.qformer.paged_attention import PagedAttention, Remembered, project

CLIPS, TOKENS, WIDTH, HIDDEN, HEADS, QUERIES, SLOTS = 2, 5, 12, 16, 2, 3, 4


@pytest.mark.parametrize("frames", [1, 2 * SLOTS, 5 * SLOTS])
@pytest.mark.parametrize("before", [SLOTS, 3 * SLOTS])
def test_gathered_entries_and_a_mask_over_the_table_give_the_context_of_the_pages(frames, before):
    torch.manual_seed(0)
    empty = MemoryBank.empty(CLIPS, TOKENS, WIDTH)
    bank = plan_merges(empty, torch.randn(CLIPS, before, TOKENS, WIDTH), SLOTS).bank
    inputs, query = torch.randn(CLIPS, frames, TOKENS, WIDTH), torch.randn(CLIPS, frames, QUERIES, HIDDEN)
    weight, bias = torch.randn(2 * HIDDEN, WIDTH) / 3, torch.randn(2 * HIDDEN) / 3
    plan = plan_merges(bank, inputs, SLOTS)
    remembered = Remembered(bank.slots, project(bank.slots, weight, bias, HEADS))
    expected, _ = PagedAttention(plan, HEADS, None)(query, inputs, weight, bias, remembered)

    table = bank_attention.table_of(plan, bank.counts)
    own, slots = F.linear(inputs, weight, bias), F.linear(bank.slots, weight, bias)
    entries = bank_attention.entries_of(table, own, slots, bank.counts)
    gathered = bank_attention.gather(query, entries, table.seen(frames), HEADS, frames_at_once=3)
    masked = bank_attention.flex(query, entries, bank_attention.flex_mask(table, QUERIES, frames), HEADS)
    for found in (gathered, masked):
        assert relative_difference(found, expected) < 1e-6


def test_a_bank_that_is_not_full_is_refused():
    empty = MemoryBank.empty(CLIPS, TOKENS, WIDTH)
    plan = plan_merges(empty, torch.randn(CLIPS, SLOTS, TOKENS, WIDTH), SLOTS)
    table = bank_attention.table_of(plan, empty.counts)
    with pytest.raises(AssertionError, match="must be full"):
        table.seen(SLOTS)
