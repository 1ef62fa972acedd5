"""Assertions that several test modules make."""

from __future__ import annotations

import numpy as np
import torch


def gradients_of(model, loss):
    """The gradient of every trainable parameter by name, zeros where the loss does not depend on it."""
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    values = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, values, strict=True)}


def assert_same_gradients(actual, expected, relative):
    """Every parameter's gradient within ``relative`` of the expected one, by norm; none trivially zero."""
    assert actual.keys() == expected.keys()
    largest = max(g.norm() for g in expected.values())
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        error = (actual[name] - value).norm()
        assert error <= relative * max(value.norm(), 1e-2 * largest), (name, float(error), float(value.norm()))


def assert_ranked(result, scores: torch.Tensor, k: int, tolerance: float = 1e-4) -> None:
    """``result`` holds the k best finite entries of ``scores`` [B, C] by descending score."""
    order = scores.sort(dim=1, descending=True, stable=True)
    expected = torch.full((len(scores), k), -1)
    best = torch.full((len(scores), k), -torch.inf)
    n = min(k, scores.shape[1])
    best[:, :n] = order.values[:, :n]
    expected[:, :n] = order.indices[:, :n].masked_fill(order.values[:, :n] == -torch.inf, -1)
    assert result.items.dtype == torch.int64
    assert result.scores.dtype == torch.float32
    assert result.items.tolist() == expected.tolist()
    torch.testing.assert_close(result.scores, best, atol=tolerance, rtol=1e-5)


def assert_same_recommendations(a, b):
    """Equal items in equal order, with scores and contributions that are close."""
    assert [r.index for r in a] == [r.index for r in b]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.score, y.score, atol=2e-5)
        np.testing.assert_allclose(x.contributions, y.contributions, atol=5e-5)
        np.testing.assert_allclose(x.factor_shares, y.factor_shares, atol=5e-3)
