"""The Triton kernels together: in a compiled graph, in the reasoner, and the environment that they are tested in."""

import os

import pytest
import torch

import flr_kernels
from tests.helpers.triton import DEVICE, MARKS, aggregate_inputs, attention_inputs, masks

pytestmark = MARKS


def test_opcheck_and_fullgraph_compile():
    h, u, valid = attention_inputs(2, 17, 32, 3, torch.float32, "mixed")
    f, logits = aggregate_inputs(2, 32, 3, torch.float32)
    torch.library.opcheck(torch.ops.flr.factor_attention.default, (h, u, valid))
    torch.library.opcheck(torch.ops.flr.factor_aggregate.default, (f, logits, 1e-6))

    def step(h, u):
        out = flr_kernels.factor_attention(h, u, valid)
        return flr_kernels.factor_aggregate(out.context, out.entropy).thought

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h, u), step(h, u), rtol=0, atol=0)
    actual, expected = (torch.autograd.grad(fn(h, u).sum(), (h, u)) for fn in (compiled, step))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_reasoner_thinks_the_same_on_the_kernels(autocast, monkeypatch):
    from flr.config import FLRConfig
    from flr.model.reasoner import FactorizedReasoner

    torch.manual_seed(0)
    reasoner = FactorizedReasoner(64, FLRConfig(num_factors=4, num_refinements=2)).to(DEVICE)
    h, mask = torch.randn(3, 21, 64, device=DEVICE), masks("left", 3, 21)
    h = h.to(torch.bfloat16 if autocast else torch.float32)
    results = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("FLR_BACKEND", backend)
        reasoner.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = reasoner(h, mask)
        loss = out.thought.square().sum() + sum(x.sum() for x in out.user_losses.values())
        results[backend] = [out.thought, *torch.autograd.grad(loss, list(reasoner.parameters()))]
    for a, e in zip(results["triton"], results["reference"], strict=True):
        bound = (2e-2 if autocast else 1e-4) * e.abs().max() + 1e-6
        assert (a - e).abs().max() <= bound


def test_the_environment_is_what_this_file_needs():
    assert os.environ["FLR_BACKEND"] == "triton"
    assert torch.isnan(torch.empty(3)).all(), "uninitialised memory is not filled with NaN"
