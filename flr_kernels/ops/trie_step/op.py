"""One step of beam search in a catalogue trie: children of all hypotheses, their scores, the best of them.

A hypothesis is a trie node n with a log-probability s. With n's children c, tokens t_c and the logits x after n,

    s_c = s + x[t_c] - norm,    norm given, or log Σ_c exp x[t_c] over the children that lead to allowed items

and the best of all hypotheses' children go on. Equal scores: the smaller first leaf position wins, so order is total.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch
from ...backends import triton_config
from . import reference

FILTERS = ("none", "prefix", "only", "exclude")
#: The widest selection that the Triton kernel makes, and the widest of all.
MAX_WIDTH, MOST = 256, 1 << 20


class Continuations(NamedTuple):
    """Continuations of a user that made it into a selection, best first; [B, n] each."""

    score: Tensor  # float32, -inf for none
    node: Tensor  # int64
    parent: Tensor  # int64 column of the hypothesis it continues
    key: Tensor  # int64 that sorts by (score, -leaf position), the smallest number for none


class TrieStep(NamedTuple):
    """The best unfinished continuations, the best of all, and users with a hypothesis without finite normaliser."""

    unfinished: Continuations
    all: Continuations
    invalid: Tensor  # bool [B]


def _triton_check(logits: Tensor, *args: Any) -> None:
    _triton_takes(logits, max(args[10:12]))


def _triton_takes(logits: Tensor, width: int) -> None:
    triton_config.check_device(logits)
    triton_config.check_rows("logits", logits)
    if width > MAX_WIDTH:
        raise ValueError(f"num_unfinished, num_all: the triton backend selects at most {MAX_WIDTH}, got {width}")


def runs_as_kernel(logits: Tensor, width: int) -> bool:
    """Whether :func:`trie_step` of these logits and at most ``width`` continuations runs as a kernel."""

    def accepts(backend: str) -> None:
        if backend == "triton":
            _triton_takes(logits, width)

    return dispatch.select("trie_step", logits, accepts=accepts) != "reference"


def _reference(*args: Any) -> tuple[Tensor, ...]:
    """The definition; on a CPU an index out of range is an IndexError in every case, and none wraps around."""
    if args[0].device.type == "cpu":
        reference.check_indices(*args)
    try:
        return reference.trie_step(*args)
    except (IndexError, RuntimeError) as error:
        if "out of bounds" not in str(error):
            raise
        arrays = "children, tokens, leaf_begin, leaf_end, listed, entries"
        raise IndexError(f"{arrays}: expected those of one trie and vocabulary, got an {error}") from None


_OP = dispatch.op("trie_step")
_TRITON = f"{__package__}.triton_kernels"
_OP.register("reference", _reference)
_OP.register("triton", dispatch.on_use(_TRITON, "forward"), check=_triton_check)


@dispatch.forward_op("trie_step")
def _forward(
    logits: Tensor, score: Tensor, node: Tensor, norm: Tensor | None, children: Tensor, tokens: Tensor,
    leaf_begin: Tensor, leaf_end: Tensor, listed: Tensor | None, offset: Tensor | None, entries: int,
    num_unfinished: int, num_all: int, widest: int, unique: bool, filter: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def some(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        number = node.new_empty((len(node), width))
        return torch.empty_like(number, dtype=score.dtype), number, torch.empty_like(number), torch.empty_like(number)

    return *some(num_unfinished), *some(num_all), node.new_empty((len(node),), dtype=torch.bool)


def _check_shapes(logits: Tensor, score: Tensor, node: Tensor, norm: Tensor | None) -> None:
    checks.tensor("logits", logits, "B w V")
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits: expected w >= 1 and V >= 1, got {tuple(logits.shape)}")
    others = {"score": (score, torch.float32), "node": (node, torch.int64), "norm": (norm, torch.float32)}
    for name, (x, dtype) in others.items():
        if name != "norm" or x is not None:
            checks.same(
                name,
                tuple(checks.tensor(name, x, "B w", dtypes=(dtype,), beside=("logits", logits)).shape),
                tuple(logits.shape[:2]),
                "[B, w] of logits",
            )


def check_nodes(beside: tuple[str, Tensor], by: str, **arrays: Tensor) -> None:
    """ValueError unless these are int32 arrays of one trie's nodes, [M] as ``by``, and ``children`` [M + 1]."""
    for name, x in arrays.items():
        checks.tensor(name, x, "M", dtypes=(torch.int32,), beside=beside)
    for name, x in arrays.items():
        checks.same(name, len(x), len(arrays[by]) + (name == "children"), f"length by M of {by}")


def check_filter(
    beside: tuple[str, Tensor], filter: str, listed: Tensor | None, offset: Tensor | None, entries: int
) -> None:
    """ValueError unless these are a filter for the users of ``beside``, another argument's name and value."""
    checks.choice("filter", filter, FILTERS)
    if (filter == "none") != (listed is None) or (listed is None) != (offset is None):
        raise ValueError(f"listed, offset: expected both with filter {filter!r} and none with 'none'")
    checks.integer("entries", entries, 0, (1 << 31) - 1)
    if listed is not None and offset is not None:
        checks.tensor("listed", listed, "n", dtypes=(torch.int32, torch.int64), beside=beside)
        checks.integer("entries", entries, 0, len(listed))
        checks.tensor("offset", offset, "B", dtypes=(torch.int64,), beside=beside)
        checks.same("offset", len(offset), len(beside[1]), "B of node")


def trie_step(
    logits: Tensor,
    score: Tensor,
    node: Tensor,
    children: Tensor,
    tokens: Tensor,
    leaf_begin: Tensor,
    leaf_end: Tensor,
    *,
    num_unfinished: int,
    num_all: int,
    widest: int,
    norm: Tensor | None = None,
    unique: bool = False,
    filter: str = "none",
    listed: Tensor | None = None,
    offset: Tensor | None = None,
    entries: int = 0,
) -> TrieStep:
    """The best continuations of w hypotheses a user in a catalogue trie of M nodes over C items.

    Args:
        logits: [B, w, V], w >= 1 and V >= 1, float32, float64, bfloat16 or float16; the column of a child is
            ``tokens[child]``.
        score: float32 [B, w], log-probability of each hypothesis; -inf for none.
        node: int64 [B, w]; ranges of leaves of a user's hypotheses are disjoint.
        children: int32 [M + 1], the first child of every node; children of a node are neighbours.
        tokens: int32 [M].
        leaf_begin, leaf_end: int32 [M], leaf positions below a node; siblings' rise.
        num_unfinished: how many continuations that do not end an item are returned, at most 2²⁰.
        num_all: the same of all continuations, those that end an item included.
        widest: at least the number of children of any of the nodes; work and memory grow with it.
        norm: float32 [B, w], or None for the softmax over allowed children.
        unique: an item is complete where one allowed leaf is below a node; False: at a leaf.
        filter: what ``listed`` and ``offset`` hold: "none" nothing, all items are allowed; "prefix" ascending counts of
            allowed items, C + 1 a row; "only" and "exclude" ascending leaf positions, C past the end, that alone are
            allowed, or are not.
        listed: int32 or int64, flat, rows one after another; offset: int64 [B], where a user's row begins; entries:
            length of a row.

    Returns:
        :class:`TrieStep` of ``unfinished`` [B, num_unfinished], ``all`` [B, num_all] and ``invalid`` [B].

    Raises:
        ValueError: a shape, dtype, device or number does not fit; on the CPU also where a node has more children than
            ``widest``.
        IndexError: a node, a child, its token, or a place in ``listed`` is out of range, on the CPU. On a GPU looking
            would be a wait: there such a number reads memory that is not the arrays', and results mean nothing.
        BackendUnavailable: ``FLR_BACKEND`` names a backend that cannot run here.

    Example:
        >>> import torch
        >>> def ints(*x):
        ...     return torch.tensor(x, dtype=torch.int32)
        >>> children, tokens = ints(1, 3, 5, 5, 5, 5), ints(-1, 0, 1, 2, 3)      # items (0, 2), (0, 3), (1,)
        >>> begin, end = ints(0, 0, 2, 0, 1), ints(3, 2, 3, 1, 2)
        >>> root, start = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
        >>> found = trie_step(torch.tensor([[[1.0, 2, 0, 0]]]), start, root, children, tokens, begin, end,
        ...                   num_unfinished=1, num_all=2, widest=2)
        >>> found.all.node.tolist(), found.unfinished.node.tolist()
        ([[2, 1]], [[1]])
    """
    _check_shapes(logits, score, node, norm)
    nodes = {"tokens": tokens, "children": children, "leaf_begin": leaf_begin, "leaf_end": leaf_end}
    check_nodes(("logits", logits), "tokens", **nodes)
    check_filter(("logits", logits), filter, listed, offset, entries)
    for name, value in (("num_unfinished", num_unfinished), ("num_all", num_all)):
        checks.integer(name, value, 0, MOST)
    widest = min(checks.integer("widest", widest, 1, (1 << 31) - 1), max(len(tokens), 1))
    checks.flag("unique", unique)
    norm = None if norm is None else norm.contiguous()
    out = _forward(
        logits, score.contiguous(), node.contiguous(), norm, children, tokens, leaf_begin, leaf_end, listed, offset,
        entries, num_unfinished, num_all, widest, unique, filter,
    )  # fmt: skip
    return TrieStep(Continuations(*out[:4]), Continuations(*out[4:8]), out[8])
