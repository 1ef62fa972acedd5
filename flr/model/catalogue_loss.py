"""Cross-entropy under the catalogue's normalisation: a target token competes with the children of its trie node only.

    -log P(item) = Σ_s  logsumexp_{c child of n_s} x_s(c)  -  x_s(token s)     n_s: node before token s, x_s: its logits

so that Σ_items P(item) = 1, a token without siblings costs 0, and the value is the one that ``flr.decode`` ranks by
under ``scoring="catalogue"``. Only logits of children are needed:
    root    every user's first token: one matrix product with the children's rows of lm_head
    below   few children each: their rows gathered, one dot product a (token, child) pair; or, where the vocabulary is
            so small that the whole product is cheaper, or lm_head is no plain matrix, the children among all logits
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout, linear
from torch.utils.checkpoint import checkpoint

from flr.config import IGNORE
from flr.data.trie import CatalogueTrie

from .backbone import may_look
from .head import MAX_LOSS_LOGITS, head, is_linear, scale_logits
from .token_table import TokenTable, is_unhooked, table_of

#: What a gathered dot product costs, in those of a matrix product (one CPU thread, D of 128 and 1024: 67 to 290).
_GATHER_COST = 100


class _Arrays(NamedTuple):
    """The trie on one device, int64; nodes as ``CatalogueTrie`` numbers them."""

    children: Tensor  # [M + 1]
    tokens: Tensor  # [M]
    parents: Tensor  # [M], -1 for the root


class CatalogueLoss:
    """What a patched model's forward takes as ``catalogue_loss=``, with ``labels=`` its :meth:`target_nodes`.

    Args:
        trie: the catalogue, of two items at least.
        output_dropout: on the hidden states, while the model trains; in [0, 1).

    Raises:
        ValueError: an argument out of range.

    >>> trie = CatalogueTrie.from_sequences([5, 7, 5, 8, 6], [0, 2, 4, 5])     # items (5, 7), (5, 8), (6,)
    >>> CatalogueLoss(trie).target_nodes(torch.tensor([[-100, 5, 8], [-100, -100, 6]])).tolist()
    [[-100, 1, 4], [-100, -100, 2]]
    """

    def __init__(self, trie: CatalogueTrie, output_dropout: float = 0.0) -> None:
        if trie.num_items < 2:
            raise ValueError(f"trie: expected at least two items to choose from, got {trie.num_items}")
        if not 0 <= output_dropout < 1:
            raise ValueError(f"output_dropout: expected a number in [0, 1), got {output_dropout}")
        self.trie = trie
        self.output_dropout = output_dropout
        host = self._arrays(torch.device("cpu"))
        fanout = host.children.diff()
        self._root, self._widest = int(host.children[1]), int(fanout[1:].max()) if len(fanout) > 1 else 0
        self._span = trie.max_token + 1
        self._keys = host.parents[1:] * self._span + host.tokens[1:]  # ascending, as nodes are numbered

    @functools.cache  # noqa: B019 - one entry a device, as long-lived as the trainer
    def _arrays(self, device: torch.device) -> _Arrays:
        children = self.trie.children.long()
        parents = torch.arange(self.trie.num_nodes, device=children.device).repeat_interleave(children.diff())
        parents = torch.cat([parents.new_full((1,), -1), parents])
        return _Arrays(*(x.to(device) for x in (children, self.trie.tokens.long(), parents)))

    def target_nodes(self, labels: Tensor) -> Tensor:
        """Tokens of one item a row, -100 elsewhere, as the nodes that they lead to.

        Args:
            labels: int64 [B, L] on the CPU.

        Returns:
            int64 [B, L], -100 where labels are.

        Raises:
            ValueError: a row's tokens are not an item's whole sequence.
        """
        node = labels.new_zeros(len(labels))
        target_nodes = labels.clone()
        for column in (labels != IGNORE).any(0).nonzero()[:, 0].tolist():
            token = labels[:, column]
            here = token != IGNORE
            key = node * self._span + token
            index = torch.searchsorted(self._keys, key).clamp_max(len(self._keys) - 1)
            strange = here & ((self._keys[index] != key) | (token >= self._span))
            if bool(strange.any()):
                row = int(strange.int().argmax())
                raise ValueError(
                    f"labels: expected an item's tokens, got token {int(token[row])} in column {column} of row {row}, "
                    "with which none of the catalogue goes on"
                )
            node = torch.where(here, index + 1, node)
            target_nodes[:, column] = torch.where(here, node, IGNORE)
        children = self._arrays(labels.device).children
        short = (node > 0) & (children[node] < children[node + 1])
        if bool(short.any()):
            raise ValueError(f"labels: expected an item's whole sequence, row {int(short.int().argmax())} breaks off")
        return target_nodes

    def __call__(self, model: Any, hidden: Tensor, target_nodes: Tensor, smoothing: float = 0.0) -> Tensor:
        """Loss of every target token.

        Args:
            model: patched causal LM. hidden: its last hidden states [M, D] before the tokens. target_nodes: int64 [M].
            smoothing: share of the target that goes to all children alike, in [0, 1).

        Returns:
            float32 (float64 for such hidden states) [M]; 0 where target_nodes are -100 or a node has one child.
        """
        children, tokens, parents = self._arrays(target_nodes.device)
        if self.output_dropout and model.training:
            hidden = dropout(hidden, self.output_dropout)
        child = target_nodes.clamp_min(1)
        parent = parents[child]
        begin = children[parent]
        fanout = (children[parent + 1] - begin).masked_fill(target_nodes == IGNORE, 0)
        if not may_look(target_nodes):
            return self._of_all_rows(model, hidden, (parent, begin, fanout, child), smoothing)
        losses = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        lm_head = model.get_output_embeddings()
        table = table_of(lm_head) if is_linear(model) and is_unhooked(lm_head) else None

        first = ((fanout > 1) & (parent == 0)).nonzero()[:, 0]
        if len(first):
            scores = _at(model, hidden[first], tokens[1 : self._root], table).to(losses.dtype)
            values = cross_entropy(scores, child[first] - 1, reduction="none", label_smoothing=smoothing)
            losses = losses.index_copy(0, first, values)

        later = ((fanout > 1) & (parent > 0)).nonzero()[:, 0]
        if len(later):
            vocabulary = model.config.get_text_config(decoder=True).vocab_size
            if int(fanout[later].sum()) * _GATHER_COST > len(later) * vocabulary:
                table = None
            cost = torch.full_like(later, vocabulary) if table is None else fanout[later] * hidden.shape[1]
            place = ((cost.cumsum(0) - 1) // MAX_LOSS_LOGITS).unique_consecutive(return_counts=True)[1].tolist()
            recompute = len(place) > 1 and torch.is_grad_enabled()
            parts = []
            for rows in later.split(place):
                block = (model, hidden[rows], tokens, begin[rows], fanout[rows], child[rows], smoothing, table)
                parts.append(checkpoint(_below, *block, use_reentrant=False) if recompute else _below(*block))
            losses = losses.index_copy(0, later, torch.cat(parts))
        return losses

    def _of_all_rows(self, model: Any, hidden: Tensor, places: tuple[Tensor, ...], smoothing: float) -> Tensor:
        """Losses [M] whose shapes do not depend on the targets: all logits, a block of rows at a time."""
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        step = max(1, MAX_LOSS_LOGITS // vocabulary)
        if len(hidden) <= step:
            return self._of_rows(model, hidden, smoothing, *places)
        parts = [
            checkpoint(self._of_rows, model, h, smoothing, *rest, use_reentrant=False)
            for h, *rest in zip(*(x.split(max(1, step // 4)) for x in (hidden, *places)), strict=True)
        ]
        return torch.cat(parts)

    def _of_rows(
        self, model: Any, hidden: Tensor, smoothing: float, parent: Tensor, begin: Tensor, fanout: Tensor, child: Tensor
    ) -> Tensor:
        tokens = self._arrays(hidden.device).tokens
        logits = head(model, hidden).to(torch.promote_types(hidden.dtype, torch.float32))
        first = logits[:, tokens[1 : self._root]]
        column = torch.arange(self._widest, device=hidden.device)
        inside = column < fanout.masked_fill(parent == 0, 1).clamp_min(1)[:, None]
        among = tokens[(begin[:, None] + column).clamp_max(len(tokens) - 1)]
        below = logits.gather(1, among)
        at_root = parent == 0
        total = first.logsumexp(-1)
        own = logits.gather(1, tokens[child][:, None])[:, 0]
        if self._widest:
            total = torch.where(at_root, total, below.masked_fill(~inside, -torch.inf).logsumexp(-1))
        if smoothing:
            mean = first.mean(-1)
            if self._widest:
                mean = torch.where(at_root, mean, below.masked_fill(~inside, 0).sum(-1) / inside.sum(-1))
            own = (1 - smoothing) * own + smoothing * mean
        return torch.where(fanout > 1, total - own, 0)

    def first_tokens(self, device: torch.device) -> Tensor:
        """int64 [F]: what a first token competes with."""
        return self._arrays(device).tokens[1 : self._root]


def _at(model: Any, hidden: Tensor, tokens: Tensor, table: TokenTable | None) -> Tensor:
    """Logits [M, F] of ``tokens`` [F]."""
    if table is None:
        return head(model, hidden)[:, tokens]
    bias = None if table.bias is None else table.bias[tokens]
    return scale_logits(model, linear(hidden, table.rows(tokens), bias))


def _below(
    model: Any,
    hidden: Tensor,
    tokens: Tensor,
    begin: Tensor,
    fanout: Tensor,
    child: Tensor,
    smoothing: float,
    table: TokenTable | None,
) -> Tensor:
    """Losses [n] of tokens whose node's children are ``begin .. begin + fanout - 1``: segments of one flat array."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    start = fanout.cumsum(0) - fanout
    row = torch.arange(len(fanout), device=fanout.device).repeat_interleave(fanout)  # [P]
    token = tokens[torch.arange(len(row), device=row.device) + (begin - start)[row]]
    if table is not None:
        scores = (hidden[row].to(dtype) * table.rows(token).to(dtype)).sum(-1)
        scores = scale_logits(model, scores if table.bias is None else scores + table.bias[token])
    else:
        scores = head(model, hidden)[row, token].to(dtype)
    top = scores.detach().new_full(fanout.shape, -torch.inf).scatter_reduce(0, row, scores.detach(), "amax")
    total = torch.zeros_like(top).index_add(0, row, (scores - top[row]).exp())
    own = scores[start + child - begin]
    if smoothing:
        mean = torch.zeros_like(top).index_add(0, row, scores) / fanout
        own = (1 - smoothing) * own + smoothing * mean
    return top + total.log() - own
