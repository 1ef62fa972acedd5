"""The Triton kernels of `flr_kernels.factor_attention` against the reference in float64."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import flr_kernels
from flr_kernels import checks, reference
from flr_kernels.backends import triton_config
from tests.helpers.triton import (
    DEVICE,
    DTYPES,
    FLOOR,
    INTERPRETED,
    MARKS,
    assert_close,
    attention_inputs,
    cuda_only,
    gradients_for,
    run,
)

pytestmark = MARKS

ATTENTION = ("context", "lse", "overlap", "entropy")


def eager_attention(h, u, mask):
    """What a user of PyTorch would write in the inputs' own dtype."""
    scores = u @ h.transpose(1, 2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -math.inf)
    some = torch.isfinite(scores).any(-1, keepdim=True)
    alpha = torch.where(some, scores, 0).softmax(-1) * some
    entropy = -torch.where(alpha > 0, alpha * torch.where(alpha > 0, alpha, 1).log(), 0).sum(-1)
    return alpha @ h, scores.logsumexp(-1), alpha @ alpha.transpose(1, 2), entropy


ATTENTION_CASES = [
    # B, L, D, K, mask
    (1, 1, 32, 1, None),
    (2, 15, 40, 3, "right"),
    (1, 16, 32, 16, "scattered"),
    (3, 17, 72, 4, "left"),
    (2, 53, 136, 5, "mixed"),
    (2, 33, 64, 4, "one"),
    (2, 20, 32, 2, "false"),
    (1, 97, 32, 4, None),
]


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES] if INTERPRETED else DTYPES)
@pytest.mark.parametrize(("batch", "length", "size", "factors", "mask"), ATTENTION_CASES)
def test_attention_matches_float64(batch, length, size, factors, mask, dtype):
    inputs = attention_inputs(batch, length, size, factors, dtype, mask)
    eager = reference.factor_attention if dtype in (torch.float32, torch.float64) else eager_attention
    names, (actual, exact, plain) = run(flr_kernels.factor_attention, ATTENTION, inputs, (True, True, False), eager)
    acc = checks.accumulation_dtype(dtype)
    for index, (name, a, e, p) in enumerate(zip(names, actual, exact, plain, strict=True)):
        assert a.dtype == (acc if index < 4 else dtype), name
        # results are accumulated and stored in float32: they must not show the inputs' 16 bits
        baseline, floor = (e, 5e-5 if a.dtype != dtype else FLOOR[dtype]) if index < 4 else (p, FLOOR[dtype])
        assert_close(name, a, e, baseline if dtype != torch.float32 else p, floor)


@cuda_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "size", "factors", "mask"),
    [(1, 4096, 1536, 4, None), (64, 64, 1536, 4, "mixed"), (3, 517, 4096, 8, "left"), (2, 1000, 8192, 16, "scattered")],
)
def test_attention_matches_float64_at_full_size(batch, length, size, factors, mask, dtype):
    test_attention_matches_float64(batch, length, size, factors, mask, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_extreme_logits(dtype):
    h, u, mask = attention_inputs(2, 37, 40, 3, dtype, "mixed", scale=1e4)
    names, (actual, exact, plain) = run(
        flr_kernels.factor_attention, ATTENTION, (h, u, mask), (True, True, False), reference.factor_attention
    )
    for name, a, e, p in zip(names, actual, exact, plain, strict=True):
        # one logit's rounding can move the whole weight between two tokens, hence finite and of the same size only
        assert torch.isfinite(a).all() or name == "lse"
        assert (
            a.double().abs().masked_fill(torch.isinf(a), 0).max()
            <= 4 * e.abs().masked_fill(torch.isinf(e), 0).max() + 1
        )
        if name in ("context", "overlap"):
            assert_close(name, a, e, p, 2e-2)


def test_attention_does_not_read_masked_tokens():
    h, u, mask = attention_inputs(2, 37, 40, 3, torch.float32, "scattered")
    poisoned = h.detach().masked_fill(~mask[..., None], math.nan).requires_grad_()
    expected, actual = (flr_kernels.factor_attention(x, u, mask) for x in (h, poisoned))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    grads = gradients_for(expected)
    (dh, du), (dh_poisoned, du_poisoned) = (
        torch.autograd.grad(out, (x, u), grads) for out, x in ((expected, h), (actual, poisoned))
    )
    assert torch.equal(dh, dh_poisoned)
    assert torch.equal(du, du_poisoned)
    assert dh[~mask].abs().max() == 0


def test_user_without_a_valid_token():
    h, u, mask = attention_inputs(3, 20, 32, 4, torch.float32, "mixed")
    for length in (20, 9):  # several splits, one split
        out = flr_kernels.factor_attention(h[:, :length], u, mask[:, :length])
        assert torch.isneginf(out.lse[1]).all()
        for value in (out.context, out.overlap, out.entropy):
            assert value[1].abs().max() == 0
        total = out.context.sum() + out.overlap.sum() + out.entropy.sum() + out.lse[[0, 2]].sum()
        dh, du = torch.autograd.grad(total, (h, u))
        assert dh[1].abs().max() == 0
        assert du[1].abs().max() == 0
        assert torch.isfinite(dh).all()
        assert torch.isfinite(du).all()


def test_one_token_is_copied_and_has_no_entropy():
    h, u, mask = attention_inputs(2, 33, 64, 4, torch.float32, "one")
    out = flr_kernels.factor_attention(h, u, mask)
    torch.testing.assert_close(out.context, h[mask][:, None].expand_as(out.context), rtol=0, atol=0)
    assert out.entropy.abs().max() == 0
    assert (out.overlap == 1).all()


@pytest.mark.parametrize("mask", [None, "mixed"])
def test_runs_are_bitwise_equal_and_dh_changes_nothing(mask):
    h, u, valid = attention_inputs(2, 37, 72, 4, torch.float32, mask)
    runs = []
    for history in (h, h, h.detach()):
        out = flr_kernels.factor_attention(history, u, valid)
        wanted = (u, history) if history.requires_grad else (u,)
        runs.append([*out, *torch.autograd.grad(out, wanted, gradients_for(out))])
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=False):
            assert torch.equal(a, b)


@pytest.mark.parametrize("block_l", [16, 64])
def test_any_tile_gives_the_same_result(block_l):
    from flr_kernels.ops.factor_attention import triton_host

    h, u, valid = attention_inputs(2, 60, 72, 4, torch.float32, "mixed")
    h, u = h.detach(), u.detach()
    tile = triton_config.Tile("test", block_l, 32, 4, 1)
    exact = reference.factor_attention(h.double(), u.double(), valid)
    out = triton_host.forward(h, u, valid, tile=tile)
    for name, a, e in zip(ATTENTION, out, exact, strict=True):
        assert_close(name, a, e, e, 4e-6)
    grads = gradients_for(exact)
    gradients = triton_host.backward(h, u, valid, out, tuple(g.float() for g in grads), True, tile=tile)
    expected = reference.factor_attention_backward(h.double(), u.double(), valid, exact, grads, True)
    for name, a, e in zip(("dh", "du"), gradients, expected, strict=True):
        assert_close(name, a, e, e, 8e-6)


@pytest.mark.parametrize("length", [9, 150])
def test_order_of_users_does_not_change_a_bit(length):
    h, u, valid = attention_inputs(3, length, 40, 4, torch.float32, "mixed")
    runs = []
    for last_first in (False, True):
        out = flr_kernels.factor_attention(h, u, valid, last_first=last_first)
        loss = sum((x.nan_to_num(neginf=0) * (1 + i)).square().sum() for i, x in enumerate(out))
        runs.append([*out, *torch.autograd.grad(loss, (h, u))])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_strided_inputs_and_gradients():
    h, u, valid = attention_inputs(3, 21, 40, 4, torch.float32, "mixed")
    expected = flr_kernels.factor_attention(h, u, valid)
    grads = gradients_for(expected)
    wanted = torch.autograd.grad(expected, (h, u), grads)
    # rows of a wider tensor, tokens before users, mask columns apart, gradients transposed
    wide = torch.zeros(21, 3, 48, device=DEVICE)
    wide[..., 8:] = h.detach().transpose(0, 1)
    strided = wide[..., 8:].transpose(0, 1).requires_grad_()
    queries = u.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    mask = valid.repeat_interleave(2, 1)[:, ::2]
    actual = flr_kernels.factor_attention(strided, queries, mask)
    transposed = [g.transpose(0, -1).contiguous().transpose(0, -1) for g in grads]
    got = torch.autograd.grad(actual, (strided, queries), transposed)
    for a, e in zip((*actual, *got), (*expected, *wanted), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("size", "factors", "message"),
    [
        (24, 2, "D a multiple of 8 from 32"),
        (36, 2, "D a multiple of 8"),
        (8200, 2, "to 8192, got D = 8200"),
        (32, 17, "K from 1 to 16, got K = 17"),
    ],
)
def test_sizes_out_of_range_raise(size, factors, message):
    with pytest.raises(ValueError, match=message):
        flr_kernels.factor_attention(
            torch.zeros(1, 2, size, device=DEVICE), torch.zeros(1, factors, size, device=DEVICE)
        )
    with pytest.raises(ValueError, match=message):
        flr_kernels.factor_aggregate(
            torch.zeros(1, factors, size, device=DEVICE), torch.zeros(1, factors, device=DEVICE)
        )


def test_rows_that_are_not_contiguous_raise():
    with pytest.raises(ValueError, match=r"h: .*contiguous last dimension, got strides"):
        flr_kernels.factor_attention(
            torch.zeros(1, 3, 64, device=DEVICE)[..., ::2], torch.zeros(1, 2, 32, device=DEVICE)
        )
    with pytest.raises(ValueError, match=r"u: .*contiguous last dimension"):
        flr_kernels.factor_attention(
            torch.zeros(1, 3, 32, device=DEVICE), torch.zeros(1, 2, 64, device=DEVICE)[..., ::2]
        )
    with pytest.raises(ValueError, match=r"f: .*contiguous last dimension"):
        flr_kernels.factor_aggregate(torch.zeros(1, 2, 64, device=DEVICE)[..., ::2], torch.zeros(1, 2, device=DEVICE))


def test_empty_batch():
    h, u = torch.zeros(0, 5, 32, device=DEVICE, requires_grad=True), torch.zeros(0, 2, 32, device=DEVICE)
    out = flr_kernels.factor_attention(h, u)
    assert out.context.shape == (0, 2, 32)
    assert torch.autograd.grad(out.context.sum(), h)[0].shape == h.shape
    assert flr_kernels.factor_aggregate(u, torch.zeros(0, 2, device=DEVICE)).thought.shape == (0, 32)


@pytest.mark.skipif(not INTERPRETED, reason="float64 accumulators are for the interpreter")
@pytest.mark.parametrize(("length", "mask"), [(17, None), (9, "mixed")])  # two splits, one split
def test_gradcheck_on_the_kernels_themselves(length, mask):
    h, u, valid = attention_inputs(1, length, 32, 2, torch.float64, mask)
    assert gradcheck(lambda h, u: flr_kernels.factor_attention(h, u, valid), (h, u), fast_mode=True)


@cuda_only
def test_offsets_beyond_32_bits():
    length, size = 1 << 18, 4096  # the third user starts at 2³¹ elements
    h = torch.zeros(3, length, size, dtype=torch.bfloat16, device=DEVICE)
    h[2] = torch.randn(length, size, dtype=torch.bfloat16, device=DEVICE)
    u = torch.randn(3, 2, size, dtype=torch.bfloat16, device=DEVICE) / 64
    out = flr_kernels.factor_attention(h, u)
    alone = flr_kernels.factor_attention(h[2:], u[2:])
    for a, b in zip(out, alone, strict=True):
        torch.testing.assert_close(a[2:], b, rtol=1e-5, atol=1e-6)


@cuda_only
def test_cuda_graph_capture():
    h, u, valid = attention_inputs(4, 300, 256, 4, torch.bfloat16, "mixed")
    h, u = h.detach(), u.detach()
    flr_kernels.factor_attention(h, u, valid)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.use_deterministic_algorithms(False)
    with torch.cuda.graph(graph):
        out = flr_kernels.factor_attention(h, u, valid)
    h.copy_(torch.randn_like(h))
    graph.replay()
    for a, b in zip(out, flr_kernels.factor_attention(h, u, valid), strict=True):
        assert torch.equal(a, b)


@cuda_only
@pytest.mark.parametrize("offset", [0, 3])  # 3: rows of the history do not begin at multiples of 16 bytes
def test_short_launches_compute_what_tritons_own_do(offset, monkeypatch):
    from flr_kernels.backends.triton_plan import _Shortcut

    wide, u, mask = attention_inputs(3, 300, 256 + offset, 4, torch.bfloat16, "mixed")
    h, u = wide.detach()[..., offset:].requires_grad_(), u.detach()[..., offset:].contiguous().requires_grad_()
    runs = []
    for own in (True, False, False, False):
        monkeypatch.setattr(_Shortcut, "_closed", own)
        with torch.cuda.stream(torch.cuda.Stream()) if len(runs) == 3 else torch.cuda.device(h.device):
            out = flr_kernels.factor_attention(h, u, mask)
            runs.append([*out, *torch.autograd.grad(out, (h, u), gradients_for(out))])
            torch.cuda.synchronize()
        assert _Shortcut._closed == own
    assert len(_Shortcut.compiled) > 0
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)
