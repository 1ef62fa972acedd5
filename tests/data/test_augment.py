"""Augmentation, prefixes, sampler: pure functions of (seed, epoch, row), the same after a resume and in workers."""

import itertools

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from flr.data import (
    Augment,
    EpochSampler,
    Interaction,
    InteractionDataset,
    Interactions,
    RecProcessor,
    SFTCollator,
    build_tokenizer,
    expand_prefixes,
    planted_dataset,
)

DATA = planted_dataset(40, 60, seed=2)
PROCESSOR = RecProcessor(build_tokenizer(DATA.catalogue), DATA.catalogue)
EVERYTHING = Augment(prefix=0.3, suffix=0.3, drop_item=0.3, shuffle=0.7)


def one(history, target=99, row=0, epoch=0) -> Interaction:
    return Interaction("u", np.array(history, np.int32), target, row=row, epoch=epoch)


def many(count=2000, length=8):
    return [one(range(length), row=row) for row in range(count)]


def test_off_by_default():
    histories, targets = Augment()([one([3, 1, 2]), one([])])
    assert histories.values.tolist() == [3, 1, 2]
    assert targets.tolist() == [99, 99]
    assert not Augment().enabled


def test_drop_item_rate_and_order():
    histories, _ = Augment(drop_item=0.25)(many())
    assert abs(len(histories.values) / 16000 - 0.75) < 0.02
    for row in range(50):
        kept = histories.row(row).tolist()
        assert kept == sorted(kept)
    histories, _ = Augment(drop_item=1.0)([one([5, 6, 7]), one([]), one([4])])
    assert [histories.row(row).tolist() for row in range(3)] == [[7], [], [4]]


def test_suffix_keeps_the_latest():
    histories, targets = Augment(suffix=1.0)(many())
    lengths = histories.lengths
    assert set(lengths.tolist()) == set(range(1, 9))
    assert abs(lengths.mean() - 4.5) < 0.2
    assert all(histories.row(row)[-1] == 7 for row in range(2000))
    assert set(targets.tolist()) == {99}


def test_prefix_moves_the_target():
    histories, targets = Augment(prefix=1.0)([*many(), one([5])])
    assert set(histories.lengths[:-1].tolist()) == set(range(1, 8))
    for row in range(2000):
        assert histories.row(row).tolist() == list(range(int(targets[row])))
    assert histories.row(2000).tolist() == [5]
    assert targets[2000] == 99


def test_shuffle_is_local():
    histories, _ = Augment(shuffle=1.0, shuffle_window=3)(many())
    moved = 0
    for row in range(2000):
        items = histories.row(row).tolist()
        assert sorted(items) == list(range(8))
        for (i, a), (j, b) in itertools.combinations(enumerate(items), 2):
            assert i < j
            assert a - b < 3  # items three or more apart keep their order
        moved += items != list(range(8))
    assert moved > 1500
    still, _ = Augment(shuffle=0.0001)(many(100))
    assert still.row(0).tolist() == list(range(8))


def test_random_numbers_depend_on_seed_epoch_and_row_only():
    base, targets = EVERYTHING(many(64), seed=1)
    for row in range(64):
        alone, target = EVERYTHING([many(64)[row]], seed=1)
        assert alone.values.tolist() == base.row(row).tolist()
        assert target[0] == targets[row]
    for other in (EVERYTHING(many(64), seed=2), EVERYTHING([one(range(8), row=r, epoch=1) for r in range(64)], seed=1)):
        assert other[0].values.tolist() != base.values.tolist()


def test_rows_from_no_data_set_go_by_content():
    rows = [one([1, 2, 3, 4, 5, 6, 7], row=-1), one([1, 2, 3, 4, 5, 6, 8], row=-1)]
    first, _ = Augment(drop_item=0.5)(rows)
    again, _ = Augment(drop_item=0.5)(rows[::-1])
    assert first.row(0).tolist() == again.row(1).tolist()


@pytest.mark.parametrize("name", ["prefix", "suffix", "drop_item", "shuffle"])
def test_augment_errors(name):
    with pytest.raises(ValueError, match=rf"{name}: expected a probability in 0\.\.1, got 1\.5"):
        Augment(**{name: 1.5})
    with pytest.raises(ValueError, match="shuffle_window: expected at least 2"):
        Augment(shuffle_window=1)


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


def batches(workers=0, accelerate=False, skip=0, epoch=2, persistent=False):
    dataset = InteractionDataset(DATA.train.select(range(50)))
    sampler = EpochSampler(len(dataset), seed=7)
    options = {"persistent_workers": True} if persistent else {}
    loader = DataLoader(
        dataset,
        8,
        sampler=sampler,
        collate_fn=SFTCollator(PROCESSOR, EVERYTHING, seed=1),
        num_workers=workers,
        **options,
    )
    if accelerate:
        loader = Accelerator(cpu=True).prepare_data_loader(loader)
    if skip:
        loader = skip_first_batches(loader, skip)
    if persistent:
        list(loader)  # an epoch before: workers are alive and hold a copy of the data set
    (loader if accelerate else sampler).set_epoch(epoch)
    return list(loader)


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key


def test_same_batches_in_workers_and_after_a_resume():
    expected = batches()
    assert_same(batches(workers=2), expected)
    assert_same(batches(workers=1, persistent=True), expected)
    assert_same(batches(accelerate=True), expected)
    assert_same(batches(accelerate=True, skip=3), expected[3:])  # what Trainer does when it resumes in an epoch
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches(epoch=1), expected, strict=True))


def test_dataset_rows():
    dataset = InteractionDataset(DATA.train)
    assert len(dataset) == len(DATA.train)
    assert dataset[5].row == 5
    assert dataset[-1].row == len(dataset) - 1
    assert dataset[(4, 5)].epoch == 4
    dataset.set_epoch(3)
    assert dataset[5].epoch == 3
    with pytest.raises(IndexError):
        dataset[len(dataset)]


HISTORY = st.lists(st.integers(0, 4), max_size=5)
ROWS = st.lists(st.tuples(st.sampled_from("uv"), HISTORY, st.integers(0, 4)), max_size=6)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(1, 2), st.none() | st.integers(2, 4))
def test_expand_prefixes_equals_plain_construction(rows, min_history, max_history):
    given_rows = Interactions(
        [u for u, _, _ in rows], [h for _, h, _ in rows], [t for _, _, t in rows], range(len(rows))
    )
    expanded = expand_prefixes(given_rows, min_history=min_history, max_history=max_history)
    result = [(row.user, tuple(row.history.tolist()), row.target) for row in expanded]
    originals = [(user, tuple(history), target) for user, history, target in rows]
    assert result[: len(rows)] == originals
    possible = set()
    for user, history, _ in rows:
        for cut in range(min_history, len(history)):
            start = 0 if max_history is None else max(0, cut - max_history)
            possible.add((user, tuple(history[start:cut]), history[cut]))

    def contains(larger, smaller):
        """The larger row is the same event with at least as long a history."""
        size = len(smaller[1])
        return larger[0] == smaller[0] and larger[2] == smaller[2] and larger[1][len(larger[1]) - size :] == smaller[1]

    kept = {
        row
        for row in possible
        if not any(contains(other, row) and other != row for other in {*possible, *originals}) and row not in originals
    }
    assert sorted(result[len(rows) :]) == sorted(kept)  # each once
    assert expanded.timestamps is not None
    assert len(expand_prefixes(expanded, min_history=min_history, max_history=max_history)) == len(expanded)


def test_expand_prefixes_errors_and_no_timestamps():
    rows = Interactions(["u"], [[1, 2]], [3])
    assert expand_prefixes(rows).timestamps is None
    with pytest.raises(ValueError, match="min_history: expected at least 1, got 0"):
        expand_prefixes(rows, min_history=0)
    with pytest.raises(ValueError, match="max_history: expected None or at least"):
        expand_prefixes(rows, min_history=3, max_history=2)
