"""What the factors do while a model is evaluated: gate shares, attention entropy and overlap, for the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flr.model.backbone import causal_lm


class FactorTrace:
    """Means over thoughts of what a reasoner's last refinement did; sums stay on the device until the end."""

    def __init__(self) -> None:
        self._thoughts = 0
        self._attending: Any = 0.0  # thoughts whose history has two tokens or more
        self._gates: Any = 0.0  # [K]
        self._entropy: Any = 0.0  # [K], of those
        self._overlap: Any = 0.0

    def add(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook of :class:`~flr.model.reasoner.Reasoner`."""
        gates = output.gates[:, -1].detach().double()  # [B, K]
        attention = output.attention[:, -1].double()  # [B, K, L]
        mask = inputs[1] if len(inputs) > 1 else None
        valid = torch.full((len(gates),), attention.shape[-1], device=gates.device) if mask is None else mask.sum(-1)
        seen = ((valid > 1) & (attention.sum((1, 2)) > 0)).double()  # learned vectors attend to nothing
        entropy = -torch.special.xlogy(attention, attention).sum(-1) / valid.clamp_min(2).double().log()[:, None]
        unit = attention / attention.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        factors = gates.shape[1]
        cosines = (unit @ unit.transpose(1, 2)).sum((1, 2)) - factors
        self._thoughts += len(gates)
        self._attending = self._attending + seen.sum()
        self._gates = self._gates + gates.sum(0)
        self._entropy = self._entropy + (entropy * seen[:, None]).sum(0)
        self._overlap = self._overlap + (cosines * seen).sum() / max(factors * (factors - 1), 1)

    def figures(self) -> dict[str, float]:
        """``gate_k`` and ``attention_entropy_k`` of factors k = 1..K, and ``attention_overlap``, each in [0, 1].

        Entropies are divided by the logarithm of the history's tokens; the overlap is the mean cosine of two factors'
        attention. Empty where no thought was seen; attention is left out where nothing attends.
        """
        if not self._thoughts:
            return {}
        gates = (self._gates / self._thoughts).tolist()
        found = {f"gate_{k + 1}": gate for k, gate in enumerate(gates)}
        attending = float(self._attending)
        if attending:
            found |= {f"attention_entropy_{k + 1}": x for k, x in enumerate((self._entropy / attending).tolist())}
            if len(gates) > 1:
                found["attention_overlap"] = float(self._overlap) / attending
        return found


@contextmanager
def tracing(model: Any) -> Iterator[FactorTrace]:
    """What the factors of a patched model do within; nothing where its variant has none."""
    trace, reasoner = FactorTrace(), getattr(causal_lm(model), "flr", None)
    handle = reasoner.register_forward_hook(trace.add) if isinstance(reasoner, nn.Module) else None
    try:
        yield trace
    finally:
        if handle is not None:
            handle.remove()
