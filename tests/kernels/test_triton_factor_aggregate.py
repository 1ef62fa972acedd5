"""The Triton kernels of `flr_kernels.factor_aggregate` against the reference in float64."""

import pytest
import torch
from torch.autograd import gradcheck

import flr_kernels
from flr_kernels import reference
from tests.helpers.triton import DEVICE, DTYPES, FLOOR, INTERPRETED, MARKS, aggregate_inputs, assert_close, run

pytestmark = MARKS

AGGREGATE = ("thought", "gates", "orthogonality", "gate_entropy")


def eager_aggregate(f, logits, eps):
    gates = logits.softmax(-1)
    unit = f * (f.square().sum(-1, keepdim=True) + eps * eps).rsqrt()
    cosines = (unit @ unit.transpose(1, 2)).square()
    factors = f.shape[1]
    off_diagonal = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(-1)
    entropy = -(gates * logits.log_softmax(-1)).sum(-1)
    return (gates[..., None] * f).sum(1), gates, off_diagonal / max(factors * (factors - 1), 1), entropy


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES] if INTERPRETED else DTYPES)
@pytest.mark.parametrize(("batch", "size", "factors"), [(1, 32, 1), (3, 40, 3), (2, 72, 4), (1, 136, 16)])
def test_aggregate_matches_float64(batch, size, factors, dtype):
    f, logits = aggregate_inputs(batch, size, factors, dtype)
    eager = reference.factor_aggregate if dtype in (torch.float32, torch.float64) else eager_aggregate
    names, (actual, exact, plain) = run(
        flr_kernels.factor_aggregate, AGGREGATE, (f, logits, 1e-3), (True, True, False), eager
    )
    for index, (name, a, e, p) in enumerate(zip(names, actual, exact, plain, strict=True)):
        floor = FLOOR[a.dtype] if index < 4 else FLOOR[dtype]
        assert_close(name, a, e, p if index >= 4 or dtype == torch.float32 else e, floor)


def test_aggregate_with_extreme_logits_and_strides():
    f, _ = aggregate_inputs(2, 40, 3, torch.float32)
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], device=DEVICE, requires_grad=True)
    out = flr_kernels.factor_aggregate(f, logits)
    strided = f.detach().transpose(0, 1).contiguous().transpose(0, 1)
    again = flr_kernels.factor_aggregate(strided, logits.detach().T.contiguous().T)
    for a, b in zip(out, again, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(out.gates, torch.tensor([[1.0, 0, 0], [1 / 3] * 3], device=DEVICE))
    total = out.thought.sum() + out.gate_entropy.sum() + out.orthogonality.sum() + out.gates[:, 0].sum()
    first = torch.autograd.grad(total, (f, logits), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(total, (f, logits)), strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


@pytest.mark.skipif(not INTERPRETED, reason="float64 accumulators are for the interpreter")
def test_gradcheck_of_the_aggregation():
    f, logits = aggregate_inputs(1, 32, 3, torch.float64)
    assert gradcheck(lambda f, x: flr_kernels.factor_aggregate(f, x, 1e-3), (f, logits), fast_mode=True)
