"""`flr_kernels.log_normaliser`: its definition, the C++ kernel of CPUs, and the blocks where that is missing."""

import sys

import pytest
import torch

import flr_kernels
from flr.decode.scoring import log_normaliser
from flr_kernels import dispatch
from flr_kernels.backends import extension
from tests.helpers.extension import needs_extension


@needs_extension
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 64, 2047, 2048, 2049, 100_003])
def test_log_normaliser_of_rows_on_a_cpu(size):
    torch.manual_seed(size)
    logits = 5 * torch.randn(6, size + 3)[:, :size]  # rows further apart than V
    logits[0, size // 2], logits[1], logits[2] = 1e4, logits[1] - 1e4, logits[2] + 1e4
    logits[3, : size - 1] = -torch.inf
    assert dispatch.select("log_normaliser", logits) == "host"
    found = flr_kernels.log_normaliser(logits)
    expected = logits.double().logsumexp(-1)
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=2e-6)
    assert torch.equal(found, flr_kernels.log_normaliser(logits))
    broken = logits.clone()
    broken[0, -1], broken[1, 0], broken[2] = torch.nan, torch.inf, -torch.inf
    assert flr_kernels.log_normaliser(broken).isfinite().tolist() == [False] * 3 + [True] * 3


@needs_extension
def test_log_normaliser_takes_what_the_kernel_does_not(monkeypatch):
    logits = torch.randn(4, 50)
    for other in (logits.double(), logits.bfloat16(), logits.T):
        assert dispatch.select("log_normaliser", other) == "reference"
        found = flr_kernels.log_normaliser(other)
        torch.testing.assert_close(found.double(), other.double().logsumexp(-1))
        assert found.dtype == (torch.float64 if other.dtype == torch.float64 else torch.float32)
        monkeypatch.setenv("FLR_BACKEND", "log_normaliser=host")
        with pytest.raises(ValueError, match="backend 'host' expects"):
            flr_kernels.log_normaliser(other)
        monkeypatch.delenv("FLR_BACKEND")
    module = extension.load()
    view, out = extension._view(logits), extension._view(torch.empty(4))
    assert extension._view(logits[2:, 1:])[-1] == 4 * (200 - 101)  # of its storage, what is left
    for views, message in (
        ((extension._view(logits.double()), out, -1, 0), "logits: expected float32"),
        ((extension._view(logits.T), out, -1, 0), "contiguous last dimension"),
        ((view, extension._view(torch.empty(3)), -1, 0), "out: expected shape"),
        (((*view[:5], 796), out, -1, 0), "within its storage"),
        ((extension._view(logits[0]), out, -1, 0), r"logits: expected \[R, V\]"),
        ((view, out, 0, 0), "no CUDA half"),
    ):
        with pytest.raises(ValueError, match=message):
            module.log_normaliser(*views)


def test_log_normaliser_is_a_log_sum_of_exponentials():
    torch.manual_seed(0)
    logits = 5 * torch.randn(4, 1000)
    expected = logits.double().exp().sum(1).log()
    torch.testing.assert_close(flr_kernels.log_normaliser(logits).double(), expected, rtol=1e-6, atol=1e-6)
    compiled = torch.compile(flr_kernels.log_normaliser, fullgraph=True, backend="eager")
    assert torch.equal(compiled(logits), flr_kernels.log_normaliser(logits))
    for bad in (torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"logits: expected (shape|dtype|V >= 1, got 0)"):
            flr_kernels.log_normaliser(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normaliser(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 100_003, generator=generator).mul_(5).to(dtype)
    logits[0, 0, 7], logits[0, 1, :-1], logits[0, 2] = 1e4, -torch.inf, logits[0, 2] - 1e4
    logits[1, 0, :64] = -1e9  # as models forbid tokens
    expected = torch.logsumexp(logits.double(), -1).float()
    torch.testing.assert_close(log_normaliser(logits), expected, atol=1e-5, rtol=1e-6)
    broken = torch.tensor([[1.0, float("nan")], [1.0, float("inf")], [-float("inf"), -float("inf")]])
    assert not log_normaliser(broken).isfinite().any()


@pytest.mark.parametrize("cells", [10, 1 << 18])
@pytest.mark.parametrize("far", [1e3, 1e6])
def test_a_row_whose_first_logits_are_far_below_keeps_its_digits(far, cells, monkeypatch):
    """The reference's form for a CPU looks at 64 of them first, of as many rows as there is room for, or of one."""
    module = sys.modules["flr_kernels.ops.log_normaliser.reference"]
    monkeypatch.setattr(module, "CACHED_CELLS", cells)
    logits = torch.randn(3, 500)
    logits[1, :64] -= far
    found = module.blockwise(logits)
    torch.testing.assert_close(found.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
