"""Random tries, hypotheses and filters for ``flr_kernels.trie_step``, and its result in plain Python, item by item."""

from __future__ import annotations

import math
from typing import Any

import torch

from flr.decode import CatalogueTrie
from flr.decode.filters import item_filter


def case(seed: int, users: int, items: int, beams: int, depth: int, spread: int, kind: str = "none") -> dict[str, Any]:
    """Arguments of trie_step (without widths) for hypotheses at ``depth`` in a random trie, whose items are longer."""
    g = torch.Generator().manual_seed(seed)
    seen: set[tuple[int, ...]] = set()
    while len(seen) < items:
        length = int(torch.randint(1, depth + 3, (1,), generator=g))
        seen.add((*torch.randint(1, spread, (length,), generator=g).tolist(), 0))
    sequences = sorted(seen)
    flat = [t for s in sequences for t in s]
    offsets = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    trie = CatalogueTrie.from_sequences(flat, offsets.numpy())
    level = torch.arange(trie.level_start[depth], trie.level_start[depth + 1])
    inner = level[trie.children[level] < trie.children[level + 1]]
    width = min(beams, len(inner))
    node = torch.stack([inner[torch.randperm(len(inner), generator=g)[:width]] for _ in range(users)])
    score = -torch.rand(users, width, generator=g)
    score[torch.rand(users, width, generator=g) < 0.2] = -torch.inf
    mask = torch.rand(users, items, generator=g) < 0.6
    few = torch.randint(-1, items, (users, 5), generator=g)
    filters = {"none": {}, "prefix": {"allowed": mask}, "only": {"only": few}, "exclude": {"exclude": few}}
    allows = item_filter(trie, users, **filters[kind])
    arguments = {"score": score, "node": node, "trie": trie, "allows": allows, "filter": kind}
    return arguments | {"logits": 2 * torch.randn(users, width, spread, generator=g)}


def call(arguments: dict[str, Any], device: str = "cpu", **more: Any) -> dict[str, Any]:
    """Keyword arguments for flr_kernels.trie_step."""
    trie, allows = arguments["trie"], arguments["allows"]
    kind, listed, offset, entries = allows.flat(len(arguments["node"]))
    tensors = {
        "logits": arguments["logits"], "score": arguments["score"], "node": arguments["node"],
        "children": trie.children, "tokens": trie.tokens, "leaf_begin": trie.leaf_begin, "leaf_end": trie.leaf_end,
        "listed": listed, "offset": offset,
    }  # fmt: skip
    on_device = {name: None if x is None else x.to(device) for name, x in tensors.items()}
    node = arguments["node"]
    widest = int((trie.children[node + 1] - trie.children[node]).max())
    return on_device | {"filter": kind, "entries": entries, "widest": widest} | more


def naive(arguments: dict[str, Any], user: int, unique: bool, normalise: bool) -> list[tuple[float, int, int, bool]]:
    """(score, node, parent, complete) of every continuation of a user, best first."""
    trie, logits = arguments["trie"], arguments["logits"][user].double()
    allows, found = arguments["allows"], []
    for parent, (node, score) in enumerate(
        zip(arguments["node"][user].tolist(), arguments["score"][user].tolist(), strict=True)
    ):
        if score == -math.inf:
            continue
        children = range(int(trie.children[node]), int(trie.children[node + 1]))
        users = len(arguments["node"])
        low = trie.leaf_begin[list(children)].long().expand(users, -1)
        high = trie.leaf_end[list(children)].long().expand(users, -1)
        counts = dict(zip(children, allows.count(low, high)[user].tolist(), strict=True))
        children = [c for c in children if counts[c]]
        if not children:
            continue
        x = {c: float(logits[parent, int(trie.tokens[c])]) for c in children}
        norm = float(torch.tensor(list(x.values()), dtype=torch.float64).logsumexp(0)) if normalise else float(
            logits[parent].logsumexp(0)
        )  # fmt: skip
        for c in children:
            leaf = int(trie.children[c]) == int(trie.children[c + 1])
            found.append((score + x[c] - norm, c, parent, counts[c] == 1 if unique else leaf))
    return sorted(found, key=lambda f: (-f[0], int(trie.leaf_begin[f[1]])))
