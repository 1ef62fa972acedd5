"""Backend "cuda" of `flr_kernels.factor_attention`: its backward, as test_cuda_factor_attention.py has its forward."""

from __future__ import annotations

import math

import pytest
import torch

import flr_kernels
from flr_kernels import reference
from flr_kernels.backends import extension
from flr_kernels.ops.factor_attention import cuda_host
from tests.helpers.extension import needs_extension

from .test_cuda_factor_attention import NAMES, inputs, view


@needs_extension
@pytest.mark.parametrize(
    ("argument", "field", "value", "message"),
    [
        ("h", 3, (2, 3, 72), "h: expected D a multiple of 16 from 16 to 8192"),
        ("h", 1, "float16", "u: expected float16, got bfloat16"),
        ("u", 3, (2, 5, 64), r"u: expected \[B, K, D\] with K from 1 to 4"),
        ("mask", 3, (2, 4), "mask: expected shape"),
        ("context", 3, (2, 2, 65), "^context: expected shape"),
        ("lse", 1, "float64", "^lse: expected float32"),
        ("d_context", 0, 4096 + 4, "d_context: expected an address that 16 divides"),
        ("d_overlap", 5, 31, "d_overlap: expected 7 elements and one more"),
        ("d_entropy", 4, (1, 2), "d_entropy: expected a contiguous tensor"),
        ("dh", 1, "float32", "dh: expected bfloat16"),
        ("dh", 4, (200, 64, 1), "dh: expected .* within its storage"),
        ("dh", 0, 4096 + 8, "dh: expected an address that 16 divides"),
        ("du", 3, (2, 3, 64), "du: expected shape"),
        ("device", None, -1, "device: expected a device index"),
    ],
)
def test_the_bindings_backward_refuses(argument, field, value, message):
    if not extension.load().has_factor_attention:
        pytest.skip("no kernel for compute capability 9.0")
    single = torch.float32
    shapes = ((2, 2, 64), (2, 2), (2, 2, 2), (2, 2))
    arguments = {"h": view(2, 3, 64), "u": view(2, 2, 64), "mask": view(2, 3, dtype=torch.bool)}
    for prefix in ("", "d_"):
        arguments |= {prefix + name: view(*shape, dtype=single) for name, shape in zip(NAMES, shapes, strict=True)}
    arguments |= {"dh": view(2, 3, 64), "du": view(2, 2, 64), "device": 0, "stream": 0}
    if field is None:
        arguments[argument] = value
    else:
        arguments[argument][field] = value
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in arguments.items()}
    groups = [[given.pop(prefix + name) for name in NAMES] for prefix in ("", "d_")]
    h, u, mask, *rest = given.values()
    with pytest.raises(ValueError, match=message):
        extension.load().factor_attention_backward(h, u, mask, *groups, *rest)


def test_the_backward_that_it_has():
    shapes = {(64, 4): True, (64, 5): False, (72, 4): False, (4096, 1): True, (8192, 4): True}
    for (size, factors), has in shapes.items():
        assert cuda_host.has_backward(*inputs(2, 3, size, factors)[:2]) == has
    assert not cuda_host.has_backward(*inputs(2, 3, 64, 4, torch.float16)[:2])


def _gradients(h, u, mask, needs_dh=True, seed=0):
    """dh and du of random gradients of every result, and the same in float64."""
    generator = torch.Generator(h.device).manual_seed(seed)
    leaves = (h.clone().requires_grad_(needs_dh), u.clone().requires_grad_())
    out = flr_kernels.factor_attention(*leaves, mask)
    grads = [torch.randn(x.shape, generator=generator, device=h.device) for x in out]
    if h.shape[2] > 2048:  # there the kernel rounds them
        grads[0] = grads[0].bfloat16().float()
    found = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], grads)
    clean = (h if mask is None else h.masked_fill(~mask[..., None], 0)).double()
    exact = reference.factor_attention(clean, u.double(), mask)
    doubles = tuple(x.double() for x in grads)
    expected = reference.factor_attention_backward(clean, u.double(), mask, exact, doubles, needs_dh)
    return found, expected[0 if needs_dh else 1 :]


def _assert_gradients(found, expected):
    """Within what a bfloat16 result loses: 2^-8 of a row's largest value, if that is not small beside all of them."""
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == torch.bfloat16
        largest = wanted.abs().amax(-1)
        error = (actual.double() - wanted).abs().amax(-1) / largest.clamp(min=0.1 * float(largest.max()))
        assert error.max() <= 4.2e-3, f"{error.max():.1e}"  # not for NaN


@pytest.mark.gpu
@needs_extension
@pytest.mark.usefixtures("backend_cuda")
class TestBackwardOnADevice:
    @pytest.mark.parametrize("mask", [None, "random", "left"])
    @pytest.mark.parametrize(
        "shape",
        [
            *((64, 512, 1536, 4), (64, 512, 4096, 4), (512, 64, 1536, 4), (1, 4096, 4096, 4), (16, 2048, 2048, 4)),
            *((5, 37, 896, 1), (3, 1000, 3072, 3), (150, 1, 576, 4), (200, 129, 4000, 3), (7, 64, 48, 2)),
            *((70, 60, 8192, 4), (3, 900, 5136, 2)),
        ],
    )
    def test_equals_float64(self, shape, mask):
        h, u, valid = inputs(*shape, torch.bfloat16, mask, "cuda")
        if valid is not None:
            h = h.masked_fill(~valid[..., None], math.nan)  # neither read nor computed
        found, expected = _gradients(h, u, valid)
        _assert_gradients(found, expected)
        if valid is not None:
            assert not found[0][~valid].any()
        for a, b in zip(found, _gradients(h, u, valid)[0], strict=True):
            assert torch.equal(a, b)
        only = _gradients(h, u, valid, needs_dh=False)[0]
        assert torch.equal(only[0], found[1])

    def test_strided_inputs(self):
        h, u, valid = inputs(6, 90, 640, 4, device="cuda")
        wide = torch.full((90, 6, 656), math.nan, dtype=h.dtype, device="cuda")
        wide[..., 8:648] = h.transpose(0, 1)
        views = wide[..., 8:648].transpose(0, 1), u.transpose(0, 1).contiguous().transpose(0, 1)
        out = flr_kernels.factor_attention(h, u, valid)
        grads = tuple(torch.randn_like(x) for x in out)
        odd = tuple(torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in grads)  # not at 16 bytes
        expected = cuda_host.backward(h, u, valid, tuple(out), grads, True)
        found = cuda_host.backward(*views, valid.repeat_interleave(2, 1)[:, ::2], tuple(out), odd, True)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)

    def test_a_user_of_nan_leaves_the_others_alone(self):
        h, u, _ = inputs(300, 20, 1008, 4, mask=None, device="cuda")
        expected = _gradients(h, u, None)[0]
        h[::3] = math.nan
        for a, b in zip(_gradients(h, u, None)[0], expected, strict=True):
            assert a[::3].isnan().all()
            for first in (1, 2):
                assert torch.equal(a[first::3], b[first::3])

    @pytest.mark.parametrize(
        ("size", "factors", "dtype"), [(64, 8, torch.bfloat16), (72, 4, torch.bfloat16), (64, 4, torch.float16)]
    )
    def test_what_it_does_not_take_is_tritons(self, size, factors, dtype, monkeypatch):
        h, u, valid = inputs(4, 200, size, factors, dtype, device="cuda")
        found = _gradients(h, u, valid)[0]
        monkeypatch.setenv("FLR_BACKEND", "triton")
        for a, b in zip(found, _gradients(h, u, valid)[0], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3 * float(b.abs().max()))

    @pytest.mark.parametrize("shape", [(4, 300, 256, 4), (200, 40, 1536, 4)])
    def test_in_a_cuda_graph(self, shape):
        h, u, valid = inputs(*shape, device="cuda")
        saved = tuple(flr_kernels.factor_attention(h, u, valid))
        grads = tuple(torch.randn_like(x) for x in saved)
        cuda_host.backward(h, u, valid, saved, grads, True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = cuda_host.backward(h, u, valid, saved, grads, True)
        for seed in (1, 2):
            for old, new in zip(grads, [torch.randn_like(x) * seed for x in grads], strict=True):
                old.copy_(new)
            for result in found:
                result.fill_(math.nan)
            graph.replay()
            for a, b in zip(found, cuda_host.backward(h, u, valid, saved, grads, True), strict=True):
                assert torch.equal(a, b)
