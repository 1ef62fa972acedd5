"""Catalogues, beams and a model for the decoding benchmarks."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import flr
from flr.data import build_codec, build_tokenizer, load_dataset
from flr.decode import CatalogueTrie

FOLDER = Path(os.environ.get("FLR_DATA") or Path(__file__).parents[2] / "shared" / "data")
END = 9  # of synthetic titles
CODES = 256  # of a level of a synthetic semantic ID


class Items(NamedTuple):
    """A catalogue: its sequences, their trie, one more than the largest token, the token that ends a title (or -1)."""

    name: str
    sequences: list[tuple[int, ...]]
    trie: CatalogueTrie
    tokens: int
    end: int


def _items(name: str, values: np.ndarray, offsets: np.ndarray, end: int) -> Items:
    flat = values.tolist()
    sequences = [tuple(flat[a:b]) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return Items(name, sequences, CatalogueTrie.from_sequences(values, offsets), int(values.max()) + 1, end)


def _real_titles() -> Items:
    catalogue = load_dataset(FOLDER / "amazon-cds").catalogue
    tokenizer = build_tokenizer(catalogue, "title", vocab_size=10_000)
    codec = build_codec("title", catalogue, tokenizer)
    return _items("titles", codec.tokens, codec.offsets, codec.encode(0)[-1])


def _synthetic_titles(num_items: int = 5841, vocabulary: int = 10_000) -> Items:
    """As many tokens, and as few children of most nodes, as the titles of amazon-cds have."""
    rng = np.random.default_rng(0)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < num_items:
        length = min(70, int(rng.lognormal(1.35, 0.75)) + 1)
        first = 10 + int((vocabulary - 10) * rng.random() ** 3)
        found[(first, *(10 + (vocabulary - 10) * rng.random(length - 1) ** 2).astype(int).tolist(), END)] = None
    lengths = [len(s) for s in found]
    values = np.array([t for s in found for t in s], np.int32)
    return _items("synthetic-titles", values, np.concatenate(([0], np.cumsum(lengths))), END)


def _codes(num_items: int) -> Items:
    """Random semantic IDs of four codes of 256, every level with tokens of its own."""
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, CODES, (num_items + num_items // 50, 4), dtype=np.int32), axis=0)
    rng.shuffle(codes)
    codes = codes[:num_items] + 10 + CODES * np.arange(4, dtype=np.int32)
    return _items(f"codes-{num_items}", codes.ravel(), np.arange(0, codes.size + 1, 4), -1)


@cache
def catalogue(name: str) -> Items:
    """ "titles" (amazon-cds where the data is there, else "synthetic-titles", made up to its statistics; the result's
    name says which), or the number of items with codes."""
    if name not in ("titles", "synthetic-titles"):
        return _codes(int(name))
    return _real_titles() if name == "titles" and FOLDER.is_dir() else _synthetic_titles()


def beams_at(items: Items, depth: int, users: int, beams: int) -> torch.Tensor:
    """Nodes int64 [users, beams] with children at `depth`, different for each user where there are enough; at 0 the
    root."""
    start, stop = items.trie.level_start[depth : depth + 2]
    fanout = items.trie.children[start + 1 : stop + 1] - items.trie.children[start:stop]
    nodes = (fanout > 0).nonzero()[:, 0] + start
    generator = torch.Generator().manual_seed(0)
    if len(nodes) < beams:
        return nodes[torch.randint(len(nodes), (users, beams), generator=generator)]
    return torch.stack([nodes[torch.randperm(len(nodes), generator=generator)[:beams]] for _ in range(users)])


def prefix_of(items: Items, node: int, depth: int) -> tuple[int, ...]:
    return items.sequences[int(items.trie.items[int(items.trie.leaf_begin[node])])][:depth]


@torch.no_grad()
def thinking_model(items: Items, hidden: int, layers: int, vocabulary: int) -> Any:
    """A Qwen2 with a latent thought of one factor, whose logits know which token of a title follows which.

    A random model finds every token as likely as any other, so that the shortest titles win and decoding ends early.
    Tokens of a title must be likely after each other, as in a trained model, for decoding to go through whole titles.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=4 * hidden, tie_word_embeddings=False, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=max(items.end, 2), pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    table = model.get_input_embeddings().weight.normal_()
    before, after = [], []
    for s in items.sequences:
        before += s[:-1]
        after += s[1:]
    unit = torch.nn.functional.normalize(table, dim=1)
    head = torch.zeros_like(table).index_add_(0, torch.tensor(after), unit[torch.tensor(before)])
    # several tokens may come before one, and the other way round; taste is added so that users differ
    model.lm_head.weight.copy_(0.7 * torch.nn.functional.normalize(head, dim=1) + 0.05 * torch.randn_like(head))
    flr.patch_model(
        model,
        config=flr.FLRConfig(variant="latentr3", num_factors=1, num_refinements=1, thought_token_id=vocabulary - 1),
    )
    model.flr.rescale(20.0)
    return model
