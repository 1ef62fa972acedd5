"""Rows to batches: data set, sampler, prefixes, soft targets; the same in workers and after a resume."""

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from flr.data import (
    Augment,
    EpochSampler,
    InteractionDataset,
    Interactions,
    RecProcessor,
    SFTCollator,
    build_tokenizer,
    expand_prefixes,
)
from flr.train import item_neighbours
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable


def test_collator_adds_soft_targets_for_one_token_codecs_only():
    table = item_neighbours(DATA.train, DATA.catalogue, top=4)
    for codec, expected in (("id", True), ("sid", False)):
        _, processor = trainable(codec)
        batch = SFTCollator(processor, Augment(neighbour=1.0, neighbours=table))([DATA.train[0]])
        assert ("soft_targets" in batch) == expected


def test_a_target_is_seen_and_is_that_of_the_changed_row():
    rows = [InteractionDataset(DATA.train)[(0, n)] for n in range(16)]
    table = item_neighbours(DATA.train, DATA.catalogue, top=4)
    augment = Augment(prefix=1.0, neighbours=table)
    for codec in ("id", "title"):
        _, processor = trainable(codec)
        histories, targets, _ = augment.with_sources(rows, 5)
        assert targets.tolist() != [row.target for row in rows]
        batch = SFTCollator(processor, augment, 5)(rows)
        sequences = [processor.item_codec.encode(int(target)) for target in targets]
        prompts = processor.prompts(histories).tokens.lengths  # thoughts included
        for n, tokens in enumerate(sequences):
            assert batch["labels"][n][batch["labels"][n] != -100].tolist() == [int(token) for token in tokens]
            assert int(batch["attention_mask"][n].sum()) == prompts[n] + len(tokens)
        if codec == "id":
            assert batch["soft_targets"][:, -1].tolist() == [int(tokens[0]) for tokens in sequences]
        other = SFTCollator(processor, augment, 6)(rows)
        assert not torch.equal(batch["labels"], other["labels"])


PROCESSOR = RecProcessor(build_tokenizer(DATA.catalogue), DATA.catalogue)
EVERYTHING = Augment(prefix=0.3, suffix=0.3, drop_item=0.3, shuffle=0.7)


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
