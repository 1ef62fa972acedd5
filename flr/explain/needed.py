"""Which factors a trained model needs: what it loses without one, by kind of item, and without several.

The loss is the one it was trained with, -log p(target) of a user in nats, without regularisers. A factor is taken away
as :func:`flr.model.pruning.prune_factors` does: the gates share out its weight, nothing is trained again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from flr.data import InteractionDataset, Interactions, RecProcessor, SFTCollator
from flr.data.csr import distinct_texts, numbered
from flr.decode import CatalogueTrie
from flr.model.backbone import evaluating
from flr.model.catalogue_loss import CatalogueLoss
from flr.model.pruning import only_factors, own_factors

from .interest import assign_factors, attended

_Z = 1.959964  # of a 95 % interval


class Change(NamedTuple):
    """Loss more than with all factors, nats a user, with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class FactorsNeeded:
    """What a model's K factors are worth on some rows.

    Attributes:
        loss, error: mean loss with all factors, nats a user, and its standard error over users.
        gates: mean gate of every factor.
        without: loss more without each factor alone.
        kinds, rows: names of the kinds of targets and how many rows have each; one kind where none were given.
        by_kind: [K][kinds], loss more of the rows of a kind without a factor.
        path: factors kept, from all down to one, each time without the one that is missed least, and the loss more.
        enough: how many of that path are enough: the fewest within one standard error of the loss with all.
    """

    loss: float
    error: float
    gates: list[float]
    without: list[Change]
    kinds: list[str]
    rows: list[int]
    by_kind: list[list[float]]
    path: list[tuple[list[int], Change]]
    enough: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def kept(self, count: int | None = None) -> list[int]:
        """The factors of the path that ``count`` leaves; by default those that are enough.

        Raises:
            ValueError: more than there are, or none.
        """
        count = self.enough if count is None else count
        if not 1 <= count <= len(self.path):
            raise ValueError(f"keep: expected 1 to {len(self.path)}, got {count}")
        return self.path[len(self.path) - count][0]


class _Rows:
    """Rows in batches, the longest histories together, and a model's loss on each of them."""

    def __init__(self, model: Any, processor: RecProcessor, rows: Interactions, size: int) -> None:
        self.model = model
        self.loss = None
        if processor.scoring == "catalogue":
            self.loss = CatalogueLoss(CatalogueTrie.from_codec(processor.item_codec))
        self.order = np.argsort(-rows.histories.lengths, kind="stable")
        collate, data = SFTCollator(processor), InteractionDataset(rows)
        parts = np.split(self.order, range(size, len(rows), size))
        self.batches = [collate([data[row] for row in part.tolist()]) for part in parts]
        self.users = numbered(rows.users)

    @torch.no_grad()
    def losses(self) -> np.ndarray:
        """-log p(target) of every row, float64 [rows]."""
        found, device = [], next(self.model.parameters()).device
        with evaluating(self.model):
            for batch in self.batches:
                inputs = {name: x for name, x in batch.items() if name != "item_positions"}
                if self.loss is not None:
                    inputs["labels"] = self.loss.target_nodes(inputs["labels"])
                inputs = {name: x.to(device) for name, x in inputs.items()}
                out = self.model(**inputs, catalogue_loss=self.loss, row_losses=True, skip_logits=True)
                found.append(out.loss.double())
        losses = np.empty(len(self.order))
        losses[self.order] = torch.cat(found).cpu().numpy()
        return losses

    def change(self, before: np.ndarray, after: np.ndarray) -> Change:
        """Mean difference of a row, with the interval of a ratio of sums over users, whose rows go together."""
        each, sizes = np.bincount(self.users, after - before), np.bincount(self.users)
        rows, users = sizes.sum(), len(sizes)
        mean = each.sum() / rows
        half = _Z * np.sqrt(((each - mean * sizes) ** 2).sum() * users / (users - 1)) / rows
        return Change(float(mean), float(mean - half), float(mean + half))


def factors_needed(
    model: Any,
    processor: RecProcessor,
    rows: Interactions,
    kinds: Sequence[str] | None = None,
    batch_size: int = 16,
    note: Callable[[str], None] = lambda text: None,
) -> FactorsNeeded:
    """Measure what each factor, and ever fewer of them, are worth.

    Args:
        model: patched, variant "flr" or "offsets", merged. processor: its own.
        rows: what to measure on, e.g. a thousand of valid, of two users or more; K (K + 1) / 2 forwards of each.
        kinds: of every item of the catalogue, [C]; rows are told apart by that of their target.
        batch_size: rows at a time; no influence on results.
        note: is told what is being measured.

    Raises:
        ValueError: no factors to take away, no rows or those of one user, kinds of another number of items.
    """
    catalogue = len(processor.catalogue)
    if kinds is not None and len(kinds) != catalogue:
        raise ValueError(f"kinds: expected {catalogue}, one an item, got {len(kinds)}")
    if len(rows) == 0 or batch_size < 1:
        name, got = ("rows", "none") if len(rows) == 0 else ("batch_size", batch_size)
        raise ValueError(f"{name}: expected at least 1, got {got}")
    if len(set(rows.users)) < 2:
        raise ValueError("rows: expected those of two users or more, between whom losses vary, got one user's")
    count = own_factors(model).config.num_factors
    if count == 1:
        raise ValueError("model: expected two factors or more, got 1, without which there is no thought")
    measured = _Rows(model, processor, rows, batch_size)

    def without(left: list[int]) -> np.ndarray:
        with only_factors(model, left):
            return measured.losses()

    note(f"all {count} factors")
    left = list(range(count))
    with _noting_gates(model) as noted:
        whole = measured.losses()
    gates, path = torch.stack(noted).sum(0), [(left, Change(0.0, 0.0, 0.0))]
    alone: dict[int, np.ndarray] = {}
    while len(left) > 1:
        note(f"{len(left) - 1} of {count} factors")
        tried = {gone: without([k for k in left if k != gone]) for gone in left}
        alone = alone or tried
        least = min(left, key=lambda gone: tried[gone].sum())
        left = [k for k in left if k != least]
        path.append((left, measured.change(whole, tried[least])))
    total = measured.change(np.zeros_like(whole), whole)
    error = (total.high - total.low) / 2 / _Z
    enough = next(n for n in range(len(path), 0, -1) if path[n - 1][1].mean <= error)
    more = [x - whole for _, x in sorted(alone.items())]
    every, labels = (["all"], np.zeros(catalogue, np.int64)) if kinds is None else distinct_texts(kinds)
    kind = labels[rows.targets]
    shown = np.unique(kind)
    return FactorsNeeded(
        loss=total.mean,
        error=error,
        gates=(gates / gates.sum()).tolist(),
        without=[measured.change(np.zeros_like(whole), x) for x in more],
        kinds=[every[n] for n in shown],
        rows=[int((kind == n).sum()) for n in shown],
        by_kind=[[float(x[kind == n].mean()) for n in shown] for x in more],
        path=path,
        enough=count - enough + 1,
    )


@contextlib.contextmanager
def _noting_gates(model: Any) -> Iterator[list[torch.Tensor]]:
    """Sums [K] over users of the last refinement's gates, one of each forward within."""
    sums: list[torch.Tensor] = []
    handle = own_factors(model).register_forward_hook(lambda _, __, out: sums.append(out.gates[:, -1].double().sum(0)))
    try:
        yield sums
    finally:
        handle.remove()


def factor_stability(
    models: Sequence[tuple[Any, RecProcessor]], rows: Interactions, batch_size: int = 64
) -> list[list[float]]:
    """How alike several models' factors divide the same histories: normalised mutual information, [models][models].

    Every history item goes to one factor of each model (:func:`flr.explain.assign_factors`). 1 where two models, e.g.
    of different seeds, divide alike, whatever their factors' numbers; near 0 where one says nothing of the other.

    Raises:
        ValueError: fewer than two models, one whose factors attend to nothing, models that see different items.
    """
    from sklearn.metrics import normalized_mutual_info_score

    if len(models) < 2:
        raise ValueError(f"models: expected at least 2, got {len(models)}")
    divided = []
    for model, processor in models:
        found = {row: assign_factors(x) for row, _, x in attended(model, processor, rows.histories, batch_size)}
        divided.append([found[row] for row in sorted(found)])
    if len({tuple(map(len, each)) for each in divided}) > 1:
        raise ValueError("models: expected the same max_history, got models that see different items of the histories")
    labels = [np.concatenate(each) for each in divided]
    table = np.eye(len(models))
    for a, b in itertools.combinations(range(len(models)), 2):
        table[a, b] = table[b, a] = normalized_mutual_info_score(labels[a], labels[b])
    return table.tolist()
