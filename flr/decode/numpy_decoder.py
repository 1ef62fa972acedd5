"""The search over the catalogue in NumPy: what an engine of others has to do, to be read and copied.

It needs NumPy and safetensors alone, not torch and nothing of this package. It is slow and gives the lists of
:func:`flr.decode.beam_search`; docs/engines.md has the file's layout and where such code would sit in an engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

#: For hypotheses, each the tokens after the prompt (none at the first call), the model's logits behind them, [n, V].
NextLogits = Callable[[list[list[int]]], np.ndarray]
FORMAT = "flr-catalogue-trie-1"


def load_trie(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays that ``CatalogueTrie.save`` wrote; ValueError where the file is another."""
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        if (file.metadata() or {}).get("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT!r}, got {file.metadata()!r:.200}")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def decode(
    trie: Mapping[str, np.ndarray],
    next_logits: NextLogits,
    num_beams: int = 20,
    k: int = 10,
    scoring: str = "full",
    allowed: Sequence[bool] | np.ndarray | None = None,
) -> tuple[list[int], list[float]]:
    """The k best items of one user, and their log-probabilities.

    Args:
        trie: of :func:`load_trie`.
        next_logits: asks the model; see :data:`NextLogits`.
        num_beams, k, scoring: as for :func:`flr.decode.beam_search`.
        allowed: bool [C], items that may be given; None for all.

    Example:
        >>> arrays = {"children": [1, 3, 5, 5, 5, 5], "tokens": [-1, 5, 6, 7, 8], "items": [0, 1, 2],
        ...           "leaf_begin": [0, 0, 2, 0, 1], "leaf_end": [3, 2, 3, 1, 2]}      # items (5, 7), (5, 8), (6,)
        >>> trie = {name: np.array(values) for name, values in arrays.items()}
        >>> items, scores = decode(trie, lambda paths: np.zeros((len(paths), 9)), k=3, scoring="catalogue")
        >>> items, np.exp(scores).round(2).tolist()
        ([2, 0, 1], [0.5, 0.25, 0.25])
    """
    children, tokens, items = trie["children"], trie["tokens"], trie["items"]
    begin, end = trie["leaf_begin"], trie["leaf_end"]
    permitted = np.ones(len(items), bool) if allowed is None else np.asarray(allowed, bool)[items]
    before = np.concatenate([[0], np.cumsum(permitted)])  # allowed leaf positions before each position
    below = before[end] - before[begin]  # allowed items below each node
    local = scoring == "catalogue"

    def branches(node: int) -> np.ndarray:
        """Children with an allowed item below."""
        every = np.arange(children[node], children[node + 1])
        return every[below[every] > 0]

    def is_item(node: int) -> bool:
        return bool(below[node] == 1) if local else bool(children[node] == children[node + 1])

    def item(node: int) -> int:
        """The first allowed item below."""
        return int(items[np.searchsorted(before, before[begin[node]] + 1) - 1])

    beams: list[tuple[float, int, list[int]]] = [(0.0, 0, [])] if below[0] else []  # score, node, tokens
    found: list[tuple[float, int]] = []  # score, item
    if beams and is_item(0):
        beams, found = [], [(0.0, item(0))]
    while beams:
        if local:  # a token without alternative has log-probability 0: go on to where there is a choice
            ahead = []
            for score, node, path in beams:
                while len(only := branches(node)) == 1:
                    node, path = int(only[0]), [*path, int(tokens[only[0]])]
                ahead.append((score, node, path))
            beams = ahead
        continued: list[tuple[float, int, list[int]]] = []
        for (score, node, path), row in zip(beams, next_logits([path for _, _, path in beams]), strict=True):
            to = branches(node)
            logits = row.astype(np.float64)
            chosen = logits[tokens[to]]
            total = np.logaddexp.reduce(chosen if local else logits)
            if not np.isfinite(total):
                raise FloatingPointError("the model's logits are NaN or infinite: no ranking can be made of them")
            scored = zip(to.tolist(), (score + chosen - total).tolist(), strict=True)
            continued += [(value, child, [*path, int(tokens[child])]) for child, value in scored if value > -np.inf]
        continued.sort(key=lambda one: (-one[0], begin[one[1]]))
        ends = [(score, item(node)) for score, node, _ in continued[: max(num_beams, k)] if is_item(node)]
        found = sorted([*found, *ends], key=lambda one: (-one[0], one[1]))[:k]
        beams = [one for one in continued if not is_item(one[1])][:num_beams]
        if len(found) == k:  # probabilities only fall: who is behind the last stays behind it
            beams = [one for one in beams if one[0] >= found[-1][0]]
    return [number for _, number in found], [score for score, _ in found]
