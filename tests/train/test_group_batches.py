"""Noise and batches of groups."""

import torch

from flr.data import EpochSampler, InteractionDataset
from flr.train.group_batches import GroupCollator, RepeatedBlocks
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable


def test_noise_depends_on_seed_epoch_and_row_alone():
    _, processor = trainable("sid", num_thoughts=2)
    collate = GroupCollator(processor, 4, 32, seed=1)
    rows = InteractionDataset(DATA.train)
    whole = collate([rows[(2, i)] for i in (5, 9, 11)])
    alone = collate([rows[(2, 9)]])
    assert whole["noise"].shape == (3, 4, 2, 32)
    assert torch.equal(whole["noise"][1], alone["noise"][0])
    assert not whole["noise"][:, 0].any()
    others = [collate([rows[(3, 9)]]), GroupCollator(processor, 4, 32, seed=2)([rows[(2, 9)]]), collate([rows[(2, 8)]])]
    for other in others:
        assert abs(float((other["noise"][0, 1:] * alone["noise"][0, 1:]).mean())) < 0.3
    drawn = torch.cat([collate([rows[(e, i)] for i in range(20)])["noise"][:, 1:].flatten() for e in range(4)])
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02
    tokens = [processor.item_codec.encode(rows[i].target) for i in (5, 9, 11)]
    for b, sequence in enumerate(tokens):
        assert whole["targets"][b][whole["target_mask"][b]].tolist() == list(sequence)


def test_blocks_are_repeated():
    sampler = RepeatedBlocks(EpochSampler(11, seed=0), block=4, times=3)
    rows = list(sampler)
    assert len(rows) == len(sampler) == 24
    assert rows[:4] == rows[4:8] == rows[8:12] != rows[12:16]
    sampler.set_epoch(1)
    assert all(epoch == 1 for epoch, _ in sampler)
