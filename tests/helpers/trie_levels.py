"""Arguments of ``flr_kernels.trie_advance`` and ``trie_collect``, and their results in plain Python."""

from __future__ import annotations

import math
from typing import Any

import torch

from flr_kernels import Continuations, trie_step

from .trie_steps import call, case


def _filter(allows: Any, users: int, device: str) -> dict[str, Any]:
    kind, listed, offset, entries = allows.flat(users)
    tensors = {"listed": listed, "offset": offset}
    return {k: None if x is None else x.to(device) for k, x in tensors.items()} | {"filter": kind, "entries": entries}


def allowed_leaves(allows: Any, trie: Any, users: int) -> list[list[int]]:
    """Every user's allowed leaf positions."""
    position = torch.arange(trie.num_items).expand(users, -1)
    return [row.nonzero()[:, 0].tolist() for row in allows.count(position, position + 1)]


def advance_case(
    seed: int, users: int, items: int, beams: int, depth: int, spread: int, kind: str = "none", ways: bool = True,
    behind: int = 5, room: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Hypotheses at ``depth`` behind others with a token less; ``room`` tokens each can be read."""
    made = case(seed, users, items, beams, depth, spread, kind)
    g = torch.Generator().manual_seed(seed)
    trie, allows, node, score = made["trie"], made["allows"], made["node"], made["score"]
    count = allows.count(trie.leaf_begin[node].long(), trie.leaf_end[node].long())
    score, width, earlier = score.masked_fill(count == 0, -torch.inf), node.shape[1], 4
    return {
        "score": score,
        "node": node,
        "parent": torch.randint(earlier, node.shape, generator=g).masked_fill(score == -torch.inf, 0),
        "sees": torch.rand(users, earlier, behind, generator=g) < 0.5,
        "depth": torch.full((users, earlier), max(depth - 1, 0)),
        "position": torch.randint(20, (users,), generator=g),
        "overflow": torch.rand(users, generator=g) < 0.3,
        "trie": trie,
        "allows": allows,
        "columns": width * room if ways else width,
        "ways": ways,
    }


def advance_call(made: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """Keyword arguments for flr_kernels.trie_advance."""
    trie, names = made["trie"], ("score", "node", "parent", "sees", "depth", "position", "overflow")
    given = {name: made[name].to(device) for name in names} | {"columns": made["columns"]}
    given |= {name: getattr(trie, name).to(device) for name in ("tokens", "leaf_begin", "leaf_end", "lengths")}
    if made["ways"]:
        given |= {"keys": trie.node_key.to(device), "deepest": trie.depth}
        given |= _filter(made["allows"], len(made["node"]), device)
    return given


def naive_advance(made: dict[str, Any], user: int) -> dict[str, list]:
    """What a user's hypotheses read, by walking: lists under the names of ``Advance``'s fields."""
    trie, n = made["trie"], made["columns"]
    mine = allowed_leaves(made["allows"], trie, len(made["node"]))[user]
    begin, end = trie.leaf_begin.tolist(), trie.leaf_end.tolist()
    out: dict[str, list] = {name: [] for name in ("node", "depth", "lengths", "tokens", "positions", "sees", "seen")}
    start, columns = int(made["position"][user]), []  # columns: hypothesis, token, position
    for h, (node, score, parent) in enumerate(
        zip(*(made[x][user].tolist() for x in ("node", "score", "parent")), strict=True)
    ):
        before, path = int(made["depth"][user, parent]), [node] if node else []
        if made["ways"] and score == -math.inf:
            path = []
        elif made["ways"]:
            below = [leaf for leaf in mine if begin[node] <= leaf < end[node]]
            while True:
                above = [
                    child
                    for child in range(int(trie.children[node]), int(trie.children[node + 1]))
                    if all(begin[child] <= leaf < end[child] for leaf in below)
                ]
                if not above:
                    break
                node = above[0]
                path.append(node)
        out["node"].append(node)
        tokens = [int(trie.tokens[step]) for step in path] if made["ways"] else [int(trie.tokens[max(node, 1)])]
        out["depth"].append(before + len(tokens))
        out["lengths"].append(len(tokens))
        columns += [(h, token, start + before + place) for place, token in enumerate(tokens)]
    for h, parent in enumerate(made["parent"][user].tolist()):
        own = [place < len(columns) and columns[place][0] == h for place in range(n)]
        out["sees"].append([*made["sees"][user, parent].tolist(), *own])
    for column in range(min(n, len(columns))):
        h, token, position = columns[column]
        out["tokens"].append(token)
        out["positions"].append(position)
        width = len(out["sees"][h]) - n
        own = [seen and place <= column for place, seen in enumerate(out["sees"][h][width:])]
        out["seen"].append([*out["sees"][h][:width], *own])
    out["overflow"] = [bool(made["overflow"][user]) or len(columns) > n]
    return out


def collect_case(
    seed: int, users: int, items: int, beams: int, depth: int, spread: int, kind: str = "none", unique: bool = False,
    k: int = 4, widths: tuple[int, int] = (3, 5), penalty: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """The best so far of which some are missing, and selections of :func:`flr_kernels.trie_step`."""
    made, g = case(seed, users, items, beams, depth, spread, kind), torch.Generator().manual_seed(seed)
    norm = made["logits"].logsumexp(-1)
    step = trie_step(**call(made, norm=norm, num_unfinished=widths[0], num_all=widths[1], unique=unique))
    scores = (-4 * torch.rand(users, k, generator=g)).sort(1, descending=True).values
    scores = scores.masked_fill(torch.arange(k) >= torch.randint(k + 1, (users, 1), generator=g), -torch.inf)
    found = torch.stack([torch.randperm(items, generator=g)[:k] for _ in range(users)])
    return {
        "items": found.masked_fill(scores == -torch.inf, -1),
        "scores": scores,
        "broken": torch.rand(users, generator=g) < 0.3,
        "invalid": torch.rand(users, generator=g) < 0.3,
        "unfinished": step.unfinished,
        "all": step.all,
        "trie": made["trie"],
        "allows": made["allows"],
        "scale": torch.arange(made["trie"].depth + 1).clamp_min(1).float() ** penalty,
        "depth": depth + 1,
        "longest": depth + 2,
        "unique": unique,
    }


def collect_call(made: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """Keyword arguments for flr_kernels.trie_collect."""
    trie, names = made["trie"], ("children", "leaf_begin", "leaf_end", "lengths")
    given = {name: made[name].to(device) for name in ("items", "scores", "broken", "invalid", "scale")}
    given |= {name: Continuations(*(x.to(device) for x in made[name])) for name in ("unfinished", "all")}
    given |= {name: getattr(trie, name).to(device) for name in names} | {"item": trie.items.to(device)}
    given |= {name: made[name] for name in ("depth", "longest", "unique")}
    return given | _filter(made["allows"], len(made["items"]), device)


def naive_collect(made: dict[str, Any], user: int) -> tuple[list[tuple[float, int]], list[float], list[int]]:
    """The best (score, item), the scores that go on, and what is left."""
    trie, unique = made["trie"], made["unique"]
    mine = allowed_leaves(made["allows"], trie, len(made["items"]))[user]
    scale = made["scale"].tolist()
    best = [(s, i) for s, i in zip(made["scores"][user].tolist(), made["items"][user].tolist(), strict=True) if i >= 0]
    for score, node in zip(made["all"].score[user].tolist(), made["all"].node[user].tolist(), strict=True):
        below = [leaf for leaf in mine if trie.leaf_begin[node] <= leaf < trie.leaf_end[node]]
        is_item = len(below) == 1 if unique else trie.children[node] == trie.children[node + 1]
        if score > -math.inf and is_item:
            best.append((score / scale[int(trie.lengths[below[0]])], int(trie.items[below[0]])))
    k = made["items"].shape[1]
    best = sorted(best, key=lambda found: (-found[0], found[1]))[:k]
    least = best[-1][0] if len(best) == k else -math.inf
    going, left = [], [0, 0, 0]
    for score, node in zip(
        made["unfinished"].score[user].tolist(), made["unfinished"].node[user].tolist(), strict=True
    ):
        live = score > -math.inf and score / scale[made["longest"]] >= least
        going.append(score if live else -math.inf)
        if live:
            several = trie.leaf_end[node] - trie.leaf_begin[node] > 1
            length = int(trie.lengths[trie.leaf_begin[node]])
            left[0] += 1
            if not unique:
                left[1] = max(left[1], trie.depth + 1 if several else length)
                left[2] += max(length - made["depth"], 0)
    return best, going, left
