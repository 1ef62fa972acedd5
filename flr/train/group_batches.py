"""Batches of latent GRPO: prompts, targets and noise, and how often each is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from flr.data import CSR, EpochSampler, RecProcessor

_NOISE = 0x5EED  # stream of random numbers of the noise


class GroupCollator:
    """Prompts, targets and noise of a batch of interactions.

    Returns what the processor makes of the histories (less item_positions), targets int64 [B, S], target_mask bool
    [B, S], items int64 [B] and noise float32 [B, G, N, D]. A row's noise depends on (seed, epoch, row) alone: neither on the batch nor on
    the process, nor on how often the batch is used.
    """

    def __init__(self, processor: RecProcessor, group_size: int, hidden_size: int, seed: int) -> None:
        self.processor, self.group_size, self.hidden_size, self.seed = processor, group_size, hidden_size, seed

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = self.processor(CSR.from_rows([row.history for row in rows]))
        del batch["item_positions"]
        codec = self.processor.item_codec
        sequences = CSR(codec.tokens, codec.offsets).take(np.array([row.target for row in rows]))
        lengths = sequences.lengths
        mask = np.arange(lengths.max()) < lengths[:, None]
        targets = np.zeros(mask.shape, np.int64)
        targets[mask] = sequences.values
        batch["items"] = torch.tensor([row.target for row in rows])
        batch["targets"], batch["target_mask"] = torch.from_numpy(targets), torch.from_numpy(mask)
        batch["noise"] = torch.from_numpy(np.stack([self.noise(row.epoch, row.row) for row in rows]))
        return batch

    def noise(self, epoch: int, row: int) -> np.ndarray:
        """float32 [G, N, D], unit normal; zeros for member 0."""
        key = (self.seed % 2**32) << 32 | _NOISE
        counter = [0, 0, row % 2**64, epoch]
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        noise = generator.standard_normal(
            (self.group_size, self.processor.num_thoughts, self.hidden_size), dtype=np.float32
        )
        noise[0] = 0
        return noise


class RepeatedBlocks(Sampler[tuple[int, int]]):
    """The rows of a sampler in blocks of ``block`` rows, every block ``times`` times; an incomplete last block is left out."""

    def __init__(self, rows: EpochSampler, block: int, times: int) -> None:
        self.rows, self.block, self.times = rows, block, times

    def __len__(self) -> int:
        return len(self.rows) // self.block * self.block * self.times

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rows = list(self.rows)
        for start in range(0, len(rows) - self.block + 1, self.block):
            for _ in range(self.times):
                yield from rows[start : start + self.block]

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)
