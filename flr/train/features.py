"""Embeddings of items' tokens from what is known about the items: their titles.

A table of random vectors knows nothing of an item that occurs once, or never, in training; its title does. A model that
is trained from scratch gets features of the titles' words, a pretrained one the embeddings that it has for them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flr.data import CSR, RecProcessor
from flr.data.codecs import END_TOKEN, title_tokens
from flr.data.features import item_features, text_tfidf

__all__ = ["init_grown_tokens", "init_item_embeddings", "init_new_tokens", "item_features"]

_CHUNK = 1 << 16  # tokens of titles whose embeddings are read at a time
_ALIKE = 10  # known items that a new one starts from
_BLOCK = 256  # new items whose likeness to all known ones is in memory at a time


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
    total, count = _over_items(features, processor, len(table))
    rows = (count > 0) & (total.abs().sum(1) > 0)
    mean = total[rows] / count[rows, None]
    if codec.name == "sid":  # what the codes share says nothing about any of them
        mean = torch.nn.functional.normalize(mean - mean.mean(0))
    target = scale or float(table.square().mean().sqrt())
    mean = mean * (target / mean.square().mean().sqrt())
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        weight[rows] = mean.to(weight)


def _over_items(features: Tensor, processor: RecProcessor, rows: int) -> tuple[Tensor, Tensor]:
    """Sums [rows, D] over the items that carry a token of the features [C, D] of an item, and their number [rows]."""
    codec = processor.item_codec
    tokens = torch.from_numpy(codec.tokens.astype(np.int64)).to(features.device)
    owner = torch.repeat_interleave(torch.arange(len(codec)), torch.from_numpy(np.diff(codec.offsets)))
    total = features.new_zeros(rows, features.shape[1]).index_add_(0, tokens, features[owner.to(features.device)])
    return total, torch.bincount(tokens, minlength=rows).to(features)


@torch.no_grad()
def init_new_tokens(model: Any, processor: RecProcessor, known: int, how: str = "text") -> list[str]:
    """Fill the rows of tokens that a pretrained model has not seen, in its input and its output table.

    "text": a token stands for the items that carry it, and starts at the mean over them of the mean of their titles'
    token embeddings. Means of many tokens lie close together; so what differs between them is scaled, row by row, to
    the RMS distance of the known tokens from their mean. "mean", and tokens that stand for no text (the end of an
    item, items without a title): the mean of the known tokens.

    Args:
        model: a causal LM with a row for every token of ``processor.tokenizer``; changed in place.
        processor: its items' tokens were added to the tokenizer.
        known: tokens of the tokenizer before; rows from there on are filled.
        how: "text" or "mean".

    Returns:
        Lines for the user, where titles are missing.

    Raises:
        ValueError: ``how`` is neither.
    """
    if how not in ("text", "mean"):
        raise ValueError(f"init_items: expected text or mean, got {how!r}")
    new = torch.arange(known, len(processor.tokenizer))
    titles = title_tokens(processor.catalogue.titles, processor.tokenizer) if how == "text" and len(new) else None
    pair = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    found = torch.zeros(len(new), dtype=torch.bool)
    for weight in {id(weight): weight for weight in pair}.values():
        old = weight[:known].float()
        centre = old.mean(0)
        weight[new] = centre.to(weight)
        if titles is None:
            continue
        spread = (old - centre).square().mean().sqrt()
        rows, found = _from_titles(weight, processor, titles, new)
        apart = rows - rows.mean(0)
        size = apart.square().mean(1, keepdim=True).sqrt()
        weight[new[found]] = (rows.mean(0) + apart * (spread / size).where(size > 1e-6 * spread, 0)).to(weight)
    if titles is None or (left := _untitled(processor, known, new[~found])) == 0:
        return []
    wanted = f"{left:,} new tokens of items start from the mean of all tokens: their items have no title"
    return [wanted]


@torch.no_grad()
def init_grown_tokens(model: Any, processor: RecProcessor, known: int) -> list[str]:
    """Fill the rows of tokens that a catalogue's growth has brought to a trained model, input and output table alike.

    Where the tokenizer reads text, as :func:`init_new_tokens` does. A tokenizer that was made of the items alone has no
    embeddings of words: there a token starts at the mean of what the known items have in its place that are most alike
    by the words of their titles, ten for each new item, weighted by likeness. Such means are moved away from their own
    mean to the distance that known tokens have. Tokens without such items start at the mean of the known ones.

    Args:
        model: a causal LM with a row for every token of ``processor.tokenizer``; changed in place.
        processor: of the grown catalogue (:meth:`flr.data.RecProcessor.grown`).
        known: tokens of the tokenizer before; rows from there on are filled.

    Returns:
        Lines for the user.
    """
    size = len(processor.tokenizer)
    if size == known:
        return []
    if type(processor.tokenizer.backend_tokenizer.model).__name__ != "WordLevel":
        return init_new_tokens(model, processor, known)
    links = _alike_tokens(processor, known, size)
    pair = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for weight in {id(weight): weight for weight in pair}.values():
        old = weight[:known].float()
        centre = old.mean(0)
        weight[known:size] = centre.to(weight)
        if not links:
            continue
        new, source, likeness = (torch.tensor(column, device=weight.device) for column in zip(*links, strict=True))
        rows = old.new_zeros(size - known, old.shape[1])
        rows.index_add_(0, new - known, old[source] * likeness.float()[:, None])
        total = old.new_zeros(size - known).index_add_(0, new - known, likeness.float())
        found = total > 0
        rows = rows[found] / total[found, None]
        spread = (old - centre).square().mean().sqrt()
        apart = rows - rows.mean(0)
        length = apart.square().mean(1, keepdim=True).sqrt()
        scale = torch.where(length > 1e-6 * spread, spread / length, 0)
        weight[known:size][found] = (rows.mean(0) + apart * scale).to(weight)
    return []


def _alike_tokens(processor: RecProcessor, known: int, size: int) -> list[tuple[int, int, float]]:
    """(new token, known token, likeness): what items that are alike have in the place of a new item's new token."""
    codec = processor.item_codec
    before = processor.growth[-1]
    features = text_tfidf(processor.catalogue.titles)
    old = features[:before]
    lengths = codec.lengths
    links = []
    for start in range(before, len(codec), _BLOCK):
        items = range(start, min(start + _BLOCK, len(codec)))
        likeness = (features[items.start : items.stop] @ old.T).tocsr()
        for row, item in enumerate(items):
            near = slice(likeness.indptr[row], likeness.indptr[row + 1])
            order = np.lexsort((likeness.indices[near], -likeness.data[near]))[:_ALIKE]
            for place, token in enumerate(codec.encode(item)):
                if not known <= token < size:
                    continue
                for other, value in zip(likeness.indices[near][order], likeness.data[near][order], strict=True):
                    if place < lengths[other] and (its := int(codec.tokens[codec.offsets[other] + place])) < known:
                        links.append((token, its, float(value)))
    return links


def _from_titles(weight: Tensor, processor: RecProcessor, titles: CSR, new: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, D] of those of the tokens ``new`` [N] that stand for titled items, and which these are, bool [N]."""
    count = torch.from_numpy(np.diff(titles.offsets)).to(weight.device)
    owner = torch.repeat_interleave(torch.arange(len(count), device=weight.device), count)
    tokens = torch.from_numpy(titles.values.astype(np.int64)).to(weight.device)
    means = weight.new_zeros(len(count), weight.shape[1], dtype=torch.float32)
    for part in torch.arange(len(tokens)).split(_CHUNK):
        means.index_add_(0, owner[part], weight[tokens[part]].float())
    means /= count.clamp_min(1)[:, None]
    titled = torch.cat([(count > 0).float()[:, None], means], 1)  # an item without a title adds nothing
    total, _ = _over_items(titled, processor, len(weight))
    total = total[new.to(weight.device)]
    ends = processor.tokenizer.convert_tokens_to_ids(END_TOKEN)  # every item's
    found = (total[:, 0] > 0).cpu() & (new != (-1 if ends is None else ends))
    return total[found, 1:] / total[found, :1], found


def _untitled(processor: RecProcessor, known: int, left: Tensor) -> int:
    """How many of the new tokens ``left`` are carried by items."""
    tokens = np.unique(processor.item_codec.tokens)
    ends = processor.tokenizer.convert_tokens_to_ids(END_TOKEN)
    return int(np.isin(left.numpy(), tokens[(tokens >= known) & (tokens != ends)]).sum())
