"""The order of rows: every one once an epoch, and those of similar length together."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from flr.data import EpochSampler, LengthGroupedSampler

LENGTHS = np.random.default_rng(0).integers(3, 60, 1003)
TARGETS = np.random.default_rng(1).integers(1, 20, 1003)


def test_sampler_is_a_permutation_an_epoch():
    sampler = EpochSampler(50, seed=3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert {number for number, _ in pairs} == {epoch}
        assert sorted(row for _, row in pairs) == list(range(50))
        epochs.append([row for _, row in pairs])
        assert pairs == list(sampler)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(EpochSampler(3, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]
    assert len(sampler) == 50


def rows_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    pairs = list(sampler)
    assert {number for number, _ in pairs} <= {epoch}
    assert len(sampler) == len(pairs)
    return np.array([row for _, row in pairs], int)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=80), st.integers(1, 12), st.integers(0, 3))
def test_grouped_rows_are_a_permutation_whose_first_batch_has_the_longest(lengths, batch, epoch):
    lengths = np.array(lengths, int)
    rows = rows_of(LengthGroupedSampler(lengths, batch, lengths % 3), epoch)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    if len(lengths) >= batch:
        assert lengths[rows[:batch]].max() == lengths.max()


def test_the_order_is_a_function_of_seed_epoch_and_lengths():
    def order(seed=0, epoch=0, lengths=LENGTHS, targets=TARGETS):
        return rows_of(LengthGroupedSampler(lengths, 16, targets, seed), epoch).tolist()

    assert order() == order()
    others = [order(seed=1), order(epoch=1), order(lengths=LENGTHS[::-1]), order(targets=TARGETS[::-1])]
    assert len({tuple(rows) for rows in (order(), *others)}) == 5
    sampler = LengthGroupedSampler(LENGTHS, 16, TARGETS)
    rows_of(sampler, 3)
    assert rows_of(sampler).tolist() == order(), "epochs before have no influence"


def padding(rows, batch):
    starts = range(0, len(rows), batch)
    parts = [rows[start : start + batch] for start in starts]
    places = sum(len(part) * (LENGTHS[part].max() + TARGETS[part].max()) for part in parts)
    return 1 - (LENGTHS + TARGETS).sum() / places


def test_batches_hold_little_padding_and_come_in_any_order():
    random = padding(rows_of(EpochSampler(len(LENGTHS))), 8)
    prompts = padding(rows_of(LengthGroupedSampler(LENGTHS, 8)), 8)
    both = padding(rows_of(LengthGroupedSampler(LENGTHS, 8, TARGETS)), 8)
    assert random > 0.35 > 0.2 > prompts > both + 0.03
    rows = rows_of(LengthGroupedSampler(LENGTHS, 8))[8:1000]
    means = LENGTHS[rows].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.25
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25


def test_which_rows_meet_and_which_are_left_over_is_chance():
    sampler = LengthGroupedSampler(LENGTHS, 8, TARGETS)
    epochs = [rows_of(sampler, epoch) for epoch in range(200)]
    left = np.concatenate([rows[1000:] for rows in epochs])
    assert abs(LENGTHS[left].mean() - LENGTHS.mean()) < 2.5  # 600 draws of deviation 16
    batches = [{frozenset(rows[i : i + 8].tolist()) for i in range(0, 1000, 8)} for rows in epochs[:5]]
    assert all(len(a & b) == 0 for a, b in pairwise(batches))


def test_every_process_gets_its_part_of_rows_that_are_alike():
    world, size = 4, 8
    sampler = LengthGroupedSampler(LENGTHS, world * size)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, size, False), world, i)) for i in range(world)]
    seen = [row for shard in shards for batch in shard for _, row in batch]
    assert set(seen) == set(range(len(LENGTHS)))
    again = [row for row, times in Counter(seen).items() if times > 1]
    assert 0 < len(again) < world * size
    assert set(again) <= set(rows_of(sampler)[: world * size]), "accelerate fills the last step with rows of the first"
    steps = [[LENGTHS[[row for _, row in batch]].max() for batch in step] for step in zip(*shards, strict=True)]
    apart = [max(widths) - min(widths) for widths in steps[:-1]]  # the last one has what was left over
    assert np.mean(apart) < 9
    alone = LengthGroupedSampler(LENGTHS, size)  # groups of one process's size would let others wait
    shards = [list(BatchSamplerShard(BatchSampler(alone, size, False), world, i)) for i in range(world)]
    steps = [[LENGTHS[[row for _, row in batch]].max() for batch in step] for step in zip(*shards, strict=True)]
    assert np.mean([max(widths) - min(widths) for widths in steps[:-1]]) > 20


def test_a_resumed_epoch_goes_on_with_its_batches():
    def loader():
        sampler = LengthGroupedSampler(LENGTHS, 8, TARGETS, seed=7)
        sampler.set_epoch(2)
        return DataLoader(range(len(LENGTHS)), 8, sampler=_Rows(sampler))

    whole = [batch.tolist() for batch in loader()]
    assert [batch.tolist() for batch in skip_first_batches(loader(), 40)] == whole[40:]


class _Rows:
    """Rows without their epoch."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        return (row for _, row in self.sampler)


def test_refuses():
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        LengthGroupedSampler(LENGTHS, 0)
    with pytest.raises(ValueError, match="targets: expected a length for each of 1003 rows, got 2"):
        LengthGroupedSampler(LENGTHS, 8, TARGETS[:2])
