"""Item embeddings from what is known about the items, for models that are trained from scratch.

A table of random vectors knows nothing of an item that occurs once, or never, in training; its title does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flr.data import RecProcessor
from flr.data.features import item_features

__all__ = ["init_item_embeddings", "item_features"]


@torch.no_grad()
def init_item_embeddings(
    model: Any, processor: RecProcessor, seed: int = 0, scale: float | None = None, power: float = 0.5
) -> None:
    """Write title features into the rows of the items' tokens, input and output table alike.

    A token that several items carry (a semantic-ID code) gets the mean of theirs. The features are turned by a random
    rotation, so that no dimension is special, and scaled to the table's RMS (or to ``scale``). ``power``: as for
    :func:`item_features`.

    Raises:
        ValueError: the codec is "title", whose tokens are text and not items.
    """
    codec = processor.item_codec
    if codec.name == "title":
        raise ValueError('codec: expected "id" or "sid" to initialise item tokens, got "title"')
    table = model.get_input_embeddings().weight
    size = table.shape[1]
    features = torch.from_numpy(item_features(processor.catalogue, size, seed, power)).to(table)
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    features = features @ rotation.to(table)
    tokens = torch.from_numpy(codec.tokens.astype(np.int64)).to(table.device)
    owner = torch.repeat_interleave(torch.arange(len(codec)), torch.from_numpy(np.diff(codec.offsets))).to(table.device)
    total = torch.zeros_like(table).index_add_(0, tokens, features[owner])
    count = torch.bincount(tokens, minlength=len(table)).to(table)
    rows = (count > 0) & (total.abs().sum(1) > 0)
    mean = total[rows] / count[rows, None]
    if codec.name == "sid":  # what the codes share says nothing about any of them
        mean = torch.nn.functional.normalize(mean - mean.mean(0))
    target = scale or float(table.square().mean().sqrt())
    mean = mean * (target / mean.square().mean().sqrt())
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        weight[rows] = mean.to(weight)
