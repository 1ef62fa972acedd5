"""The Triton backend of `flr_kernels.token_logprob` against float64."""

import sys

import pytest
import torch

import flr_kernels
from flr_kernels import dispatch, reference
from tests.helpers.triton import DEVICE, DTYPES, INTERPRETED, MARKS, apart

pytestmark = MARKS
REFERENCE = sys.modules["flr_kernels.ops.token_logprob.reference"]


def inputs(rows, vocabulary, size, dtype):
    torch.manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, size).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, size) / size**0.5 * 4).to(DEVICE, dtype).requires_grad_()
    target = torch.randint(0, vocabulary, (rows,)).to(DEVICE)
    return hidden, weight, target, torch.randn(rows).to(DEVICE)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [*DTYPES, *([torch.float64] if INTERPRETED else [])])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 63), (2, 64), (5, 65), (4, 1009), (0, 9)])
def test_values_and_gradients(rows, vocabulary, dtype, kept, monkeypatch):
    monkeypatch.setattr(REFERENCE, "kept", lambda _: rows * vocabulary if kept else -1)
    monkeypatch.setattr(REFERENCE, "CHUNK", 70)  # of one row, or few
    hidden, weight, target, grad = inputs(rows, vocabulary, 16, dtype)
    assert dispatch.select("token_logprob", hidden, weight, target) == "triton"
    found = flr_kernels.token_logprob(hidden, weight, target)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = reference.token_logprob(*wide, target)
    bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)
    grads = torch.autograd.grad(found, (hidden, weight), grad.to(found.dtype), retain_graph=True)
    again = torch.autograd.grad(found, (hidden, weight), grad.to(found.dtype))
    assert all(map(torch.equal, grads, again))
    scattered = flr_kernels.token_logprob(hidden, weight, apart(target))
    assert all(map(torch.equal, grads, torch.autograd.grad(scattered, (hidden, weight), grad.to(found.dtype))))
    wanted = torch.autograd.grad(expected, wide, grad.double())
    for x, y in zip(grads, wanted, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x.double(), y, rtol=bound, atol=bound)


def test_a_target_far_below_the_others():
    """Its log-probability is very negative, and its gradient that of one whole token."""
    hidden, weight, target, _ = inputs(3, 130, 16, torch.float32)
    weight = torch.zeros_like(weight)
    weight[7] = hidden.detach()[0] * 50
    weight.requires_grad_()
    found = flr_kernels.token_logprob(hidden, weight, torch.full_like(target, 9))
    expected = reference.token_logprob(hidden.double(), weight.double(), torch.full_like(target, 9))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    mine, theirs = (torch.autograd.grad(x.sum(), (hidden, weight)) for x in (found, expected.float()))
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
