"""The Triton kernel of `flr_kernels.log_normaliser` against float64."""

import math

import pytest
import torch

import flr_kernels
from flr_kernels import checks, reference
from flr_kernels.ops.log_normaliser import triton_kernels as triton_log_normaliser
from tests.helpers.triton import DEVICE, DTYPES, INTERPRETED, MARKS

pytestmark = MARKS
#: More rows than programs worth starting; under the interpreter, where every row takes long, of a smaller device.
MANY = (30, 610) if INTERPRETED else (600, 130)
#: Rows of several parts.
LONG = (4, 2600) if INTERPRETED else (7, 5000)


@pytest.mark.parametrize("dtype", [*DTYPES, *([torch.float64] if INTERPRETED else [])])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 63), (2, 64), (5, 65), (1, 1009), LONG, (0, 9), MANY])
def test_log_normaliser(rows, vocabulary, dtype, monkeypatch):
    if INTERPRETED and (rows, vocabulary) == MANY:
        monkeypatch.setattr(triton_log_normaliser, "PROGRAMS", 0)
    torch.manual_seed(rows + vocabulary)
    logits = (5 * torch.randn(rows, vocabulary + 3)).to(DEVICE, dtype)[:, :vocabulary]  # rows apart by more than V
    if rows > 2:
        logits[1, 0], logits[2] = 1e4, logits[2] - 1e4
        logits[0, 1:] = -math.inf
    found = flr_kernels.log_normaliser(logits)
    expected = reference.log_normaliser(logits.double())
    assert found.shape == (rows,)
    assert found.dtype == checks.accumulation_dtype(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found, flr_kernels.log_normaliser(logits))


def test_log_normaliser_of_broken_rows_is_not_finite():
    logits = torch.zeros(4, 300, device=DEVICE)
    logits[0, 7], logits[1, 299], logits[2] = math.nan, math.inf, -math.inf
    assert flr_kernels.log_normaliser(logits).isfinite().tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="contiguous last dimension"):
        flr_kernels.log_normaliser(torch.zeros(4, 300, device=DEVICE).T)
    with pytest.raises(ValueError, match="V >= 1"):
        flr_kernels.log_normaliser(torch.zeros(4, 0, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [200, 203, 208])
def test_rows_masked_by_the_least_number_and_rows_that_begin_anywhere(stride, dtype):
    torch.manual_seed(stride)
    logits = torch.randn(5, stride).to(DEVICE, dtype)[:, 1:200] * 5
    least = torch.finfo(dtype).min
    logits[0, :64], logits[1, 9:], logits[2], logits[3, 70:140] = least, least, least, -least
    logits[4, 5:] = -math.inf
    found, expected = flr_kernels.log_normaliser(logits), reference.log_normaliser(logits.double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


def test_log_normaliser_is_registered():
    logits = torch.randn(5, 200, device=DEVICE)
    torch.library.opcheck(torch.ops.flr.log_normaliser.default, (logits,))
