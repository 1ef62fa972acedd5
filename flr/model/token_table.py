"""Rows of an lm_head's weight by token: of an ordinary matrix, and of one of which an adapter trains some rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding


class TokenTable(NamedTuple):
    """What gives the row of a token. Gradients reach the weight, and of trained rows only those."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    trained: Tensor | None = None  # [N, D], which stand in the place of rows of the weight
    place: Tensor | None = None  # int64 [V], which row of trained it is, -1 where it is the weight's
    at_end: bool = False  # whether the trained rows are the last N of the weight's, in their order

    def rows(self, token: Tensor) -> Tensor:
        """Rows [..., D] of the tokens int64 [...], in the weight's dtype.

        >>> table = TokenTable(torch.zeros(3, 2), None, torch.ones(1, 2), torch.tensor([-1, 0, -1]))
        >>> table.rows(torch.tensor([1, 2])).tolist()
        [[1.0, 1.0], [0.0, 0.0]]
        """
        rows = self.weight[token]
        return rows if self.trained is None else with_trained(rows, self.trained, self.place, token)


def with_trained(rows: Tensor, trained: Tensor, place: Tensor | None, token: Tensor) -> Tensor:
    """``rows`` [..., D] of the tokens int64 [...], but for tokens that have a place among ``trained`` [N, D]."""
    assert place is not None
    where = place[token]
    return torch.where((where >= 0)[..., None], embedding(where.clamp_min(0), trained).to(rows.dtype), rows)


def table_of(module: Any) -> TokenTable | None:
    """The table of an lm_head, None where rows cannot be read from it one by one."""
    if has_rows(module):
        return TokenTable(module.weight, module.bias)
    table = getattr(getattr(module, "token_adapter", None), "table", None)
    return None if table is None else table()


def embedding_width(model: Any) -> int:
    """Channels of an embedding, asked of the table itself: what wraps it makes a copy to answer."""
    table = model.get_input_embeddings()
    adapter = getattr(table, "token_adapter", None)
    return (table if adapter is None else adapter.base_layer).weight.shape[-1]


def has_rows(module: Any) -> bool:
    """Whether rows of the lm_head may be read from its weight: an ordinary matrix, whole in this process.

    What more is asked differs on purpose. :class:`~flr.model.head.HeadRows` also compares with logits that the model
    itself computed, so hooks do not matter. The catalogue's loss has nothing to compare with in a training step and
    wants no hooks either. :func:`~flr.model.head.head_logprob` calls the module, hooks and all, with another
    ``forward``: it may be sharded, but must be a matrix and nothing more, without bias, scale or softcap.
    """
    return type(module) is nn.Linear and is_whole(module.weight)


def is_whole(weight: Tensor) -> bool:
    """Whether all of a weight is in this process, as it is."""
    return (
        type(weight) in (nn.Parameter, Tensor)  # not sharded
        and weight.numel() > 0  # not partitioned away
    )


def is_unhooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` is its forward, and that of what is in it, and nothing more."""
    return not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())
