"""Backend "cuda" of `flr_kernels.factor_attention`: what it takes, what its binding refuses, and results on a device.

Without a GPU its arithmetic is tested by test_emulator.py.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import flr_kernels
from flr_kernels import dispatch, reference
from flr_kernels.backends import extension
from flr_kernels.ops.factor_attention import cuda_host
from tests.helpers.extension import needs_extension

NAMES = ("context", "lse", "overlap", "entropy")
#: Largest error of a result whose inputs are of order 1, against float64.
BOUNDS = {"context": 5e-5, "lse": 2e-5, "overlap": 2e-5, "entropy": 1e-4}


def inputs(batch, length, size, factors, dtype=torch.bfloat16, mask="random", device="cpu", seed=0):
    """h [B, L, D], u [B, K, D] with logits of order 3, and a mask under which user 1 has no token."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(batch, length, size, generator=generator).to(dtype)
    u = (3 * torch.randn(batch, factors, size, generator=generator) / math.sqrt(size)).to(dtype)
    valid = torch.rand(batch, length, generator=generator) < 0.7
    if mask == "left":
        valid = torch.arange(length) >= torch.randint(length, (batch, 1), generator=generator)
    if batch > 1:
        valid[1] = False
    return h.to(device), u.to(device), None if mask is None else valid.to(device)


class TestWhatItTakes:
    """The checks read metadata alone, so that a CPU tensor can stand for one of a device."""

    @pytest.fixture(autouse=True)
    def _device(self, monkeypatch):
        self.capability, self.module = (9, 0), SimpleNamespace(has_factor_attention=True)
        monkeypatch.setattr(extension, "check_cuda", lambda *_: None)
        monkeypatch.setattr(extension, "load", lambda: self.module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: self.capability)
        extension.attention_problem.cache_clear()
        yield
        extension.attention_problem.cache_clear()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("size", "factors"), [(32, 1), (576, 4), (1536, 8), (4096, 8)])
    def test_these(self, dtype, size, factors):
        cuda_host.check(*inputs(3, 5, size, factors, dtype))
        wide = torch.zeros(3, 5, size + 8, dtype=dtype)
        cuda_host.check(wide[..., 8:], inputs(3, 5, size, factors, dtype)[1])

    @pytest.mark.parametrize(
        ("h", "u", "message"),
        [
            (torch.zeros(2, 3, 64), torch.zeros(2, 2, 64), "h: expected bfloat16 or float16 .*, got torch.float32"),
            (torch.zeros(2, 3, 4104), torch.zeros(2, 2, 4104), "h: expected D a multiple of 8 from 32 to 4096"),
            (torch.zeros(2, 3, 36), torch.zeros(2, 2, 36), "h: .* got D = 36"),
            (torch.zeros(2, 3, 24), torch.zeros(2, 2, 24), "h: .* got D = 24"),
            (torch.zeros(2, 3, 64), torch.zeros(2, 9, 64), "u: expected K from 1 to 8 .*, got K = 9"),
            (torch.zeros(2, 3, 68)[..., :64], torch.zeros(2, 2, 64), "h: expected contiguous rows at multiples of 16"),
            (torch.zeros(2, 3, 72)[..., 4:68], torch.zeros(2, 2, 64), "h: expected contiguous rows at multiples of 16"),
            (torch.zeros(2, 3, 128)[..., ::2], torch.zeros(2, 2, 64), "h: expected contiguous rows"),
            (torch.zeros(2, 3, 64), torch.zeros(2, 2, 68)[..., :64], "u: expected contiguous rows"),
        ],
    )
    def test_not_these(self, h, u, message):
        if "float32" not in message:
            h, u = _as_bfloat16(h), _as_bfloat16(u)
        with pytest.raises(ValueError, match=message):
            cuda_host.check(h, u)

    def test_not_on_another_device_or_without_the_kernel(self):
        arguments = inputs(2, 3, 64, 2)
        self.capability = (10, 0)
        with pytest.raises(flr_kernels.BackendUnavailable, match=r"for compute capability 9.0, device None is 10.0"):
            cuda_host.check(*arguments)
        extension.attention_problem.cache_clear()
        self.capability, self.module.has_factor_attention = (9, 0), False
        with pytest.raises(flr_kernels.BackendUnavailable, match="built without its kernel for compute"):
            cuda_host.check(*arguments)


def _as_bfloat16(x):
    """A bfloat16 tensor of the shape, strides and offset of ``x``."""
    size = x.untyped_storage().nbytes() // x.itemsize
    return torch.zeros(size, dtype=torch.bfloat16).as_strided(x.shape, x.stride(), x.storage_offset())


def _view(*shape, dtype=torch.bfloat16):
    """What the binding is told of a tensor of device 0; nothing lies at its address."""
    strides = torch.empty(shape, device="meta").stride()
    return [4096, str(dtype).removeprefix("torch."), 0, shape, strides, math.prod(shape) * dtype.itemsize]


@needs_extension
@pytest.mark.parametrize(
    ("argument", "field", "value", "message"),
    [
        ("h", 5, 2 * 3 * 64 * 2 - 1, "h: expected 383 elements and one more within its storage"),
        ("h", 1, "float64", "h: expected 383 elements"),
        ("h", 3, (2, 0, 64), r"h: expected \[B, L, D\] with L >= 1"),
        ("h", 3, (2, 3, 60), "h: expected D a multiple of 8 from 8 to 4096"),
        ("h", 0, 4096 + 8, "h: expected rows at multiples of 16 bytes"),
        ("h", 4, (192, 65, 1), "within its storage"),
        ("h", 4, (188, 60, 1), "h: expected rows at multiples of 16 bytes"),
        ("h", 2, 1, "h: expected device 0, got 1"),
        ("u", 3, (2, 9, 64), r"u: expected \[B, K, D\] with K from 1 to 8"),
        ("u", 3, (1, 2, 64), "u: expected shape"),
        ("u", 1, "float16", "u: expected bfloat16"),
        ("u", 0, 4096 + 2, "u: expected rows at multiples of 16 bytes"),
        ("mask", 3, (2, 4), "mask: expected shape"),
        ("mask", 1, "float32", "mask: expected bool"),
        ("context", 3, (2, 2, 65), "context: expected shape"),
        ("context", 0, 4096 + 4, "context: expected an address that 16 divides"),
        ("lse", 1, "float64", "lse: expected float32"),
        ("overlap", 5, 31, "overlap: expected 7 elements and one more"),
        ("entropy", 4, (1, 2), "entropy: expected a contiguous tensor"),
        ("device", None, -1, "device: expected a device index"),
    ],
)
def test_the_binding_refuses(argument, field, value, message):
    if not extension.load().has_factor_attention:
        pytest.skip("no kernel for compute capability 9.0")
    single = torch.float32
    arguments = {
        "h": _view(2, 3, 64),
        "u": _view(2, 2, 64),
        "mask": _view(2, 3, dtype=torch.bool),
        "context": _view(2, 2, 64, dtype=single),
        "lse": _view(2, 2, dtype=single),
        "overlap": _view(2, 2, 2, dtype=single),
        "entropy": _view(2, 2, dtype=single),
        "last_first": False,
        "device": 0,
        "stream": 0,
    }
    if field is None:
        arguments[argument] = value
    else:
        arguments[argument][field] = value
    with pytest.raises(ValueError, match=message):
        extension.load().factor_attention(*(tuple(x) if isinstance(x, list) else x for x in arguments.values()))


@needs_extension
@pytest.mark.parametrize(
    ("argument", "field", "value", "message"),
    [
        ("h", 3, (2, 3, 72), "h: expected D a multiple of 16 from 16 to 4096"),
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
    arguments = {"h": _view(2, 3, 64), "u": _view(2, 2, 64), "mask": _view(2, 3, dtype=torch.bool)}
    for prefix in ("", "d_"):
        arguments |= {prefix + name: _view(*shape, dtype=single) for name, shape in zip(NAMES, shapes, strict=True)}
    arguments |= {"dh": _view(2, 3, 64), "du": _view(2, 2, 64), "device": 0, "stream": 0}
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
    shapes = {(64, 4): True, (64, 5): False, (72, 4): False, (4096, 1): True}
    for (size, factors), has in shapes.items():
        assert cuda_host.has_backward(*inputs(2, 3, size, factors)[:2]) == has
    assert not cuda_host.has_backward(*inputs(2, 3, 64, 4, torch.float16)[:2])


def _assert_equals_float64(out, h, u, mask):
    exact = reference.factor_attention(h.double(), u.double(), mask)
    empty = torch.zeros(len(h), dtype=torch.bool, device=h.device) if mask is None else ~mask.any(1)
    for name, actual, wanted in zip(NAMES, out, exact, strict=True):
        assert actual.dtype == torch.float32, name
        assert torch.equal(torch.isneginf(actual), torch.isneginf(wanted)), name
        finite = ~torch.isneginf(wanted)
        error = (actual.double() - wanted)[finite].abs().max()
        assert error <= BOUNDS[name], f"{name}: {error:.1e}"
        if name != "lse":
            assert (actual[empty] == 0).all(), name


@pytest.mark.gpu
@needs_extension
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnTheDevice:
    @pytest.fixture(autouse=True)
    def _cuda(self, monkeypatch):
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("not compute capability 9.0")
        monkeypatch.setenv("FLR_BACKEND", "cuda")
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("mask", [None, "random", "left"])
    @pytest.mark.parametrize(
        "shape",
        [
            *((1, 4096, 1536, 4), (512, 64, 1536, 4), (64, 512, 1536, 4), (64, 512, 4096, 4), (32, 512, 1536, 8)),
            *((5, 37, 896, 1), (3, 1000, 4096, 8), (150, 1, 576, 4), (200, 129, 4000, 3), (16, 300, 2048, 8)),
            *((2, 2000, 3072, 5), (7, 64, 40, 2)),
        ],
    )
    def test_equals_float64(self, shape, mask, dtype):
        h, u, valid = inputs(*shape, dtype, mask, "cuda")
        if valid is not None:
            h = h.masked_fill(~valid[..., None], math.nan)  # neither read nor computed
        out = flr_kernels.factor_attention(h, u, valid)
        again = flr_kernels.factor_attention(h, u, valid, last_first=True)
        clean = h if valid is None else h.masked_fill(~valid[..., None], 0)
        _assert_equals_float64(out, clean, u, valid)
        for a, b in zip(out, again, strict=True):
            assert torch.equal(a, b)

    def test_strided_inputs(self):
        h, u, valid = inputs(6, 90, 640, 4, device="cuda")
        wide = torch.full((90, 6, 656), math.nan, dtype=h.dtype, device="cuda")
        wide[..., 8:648] = h.transpose(0, 1)
        queries = u.transpose(0, 1).contiguous().transpose(0, 1)
        columns = valid.repeat_interleave(2, 1)[:, ::2]
        expected = flr_kernels.factor_attention(h, u, valid)
        for a, b in zip(
            flr_kernels.factor_attention(wide[..., 8:648].transpose(0, 1), queries, columns), expected, strict=True
        ):
            assert torch.equal(a, b)

    def test_a_user_of_nan_leaves_the_others_alone(self):
        h, u, _ = inputs(300, 20, 1000, 4, mask=None, device="cuda")
        expected = flr_kernels.factor_attention(h, u)
        h[::3] = math.nan
        out = flr_kernels.factor_attention(h, u)
        for a, b in zip(out, expected, strict=True):
            assert a[::3].isnan().all()
            for first in (1, 2):
                assert torch.equal(a[first::3], b[first::3])

    @pytest.mark.parametrize("shape", [(4, 300, 256, 4), (200, 40, 1536, 4)])
    def test_in_a_cuda_graph(self, shape):
        h, u, valid = inputs(*shape, device="cuda")
        flr_kernels.factor_attention(h, u, valid)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flr_kernels.factor_attention(h, u, valid)
        for seed in (1, 2):
            h.copy_(inputs(*shape, seed=seed)[0])
            for result in out:
                result.fill_(math.nan)
            graph.replay()
            _assert_equals_float64(out, h, u, valid)

    def test_on_the_callers_stream(self):
        h, u, valid = inputs(40, 300, 1536, 4, device="cuda")
        expected = flr_kernels.factor_attention(h, u, valid)
        late = torch.full_like(h, math.nan)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # 10 ms: a launch on another stream would read NaN
            late.copy_(h)
            out = flr_kernels.factor_attention(late, u, valid)
        torch.cuda.synchronize()
        for a, b in zip(out, expected, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
    def test_on_another_device_than_the_current_one(self):
        h, u, valid = inputs(4, 100, 512, 4, device="cuda:1")
        out = flr_kernels.factor_attention(h, u, valid)
        assert torch.cuda.current_device() == 0
        _assert_equals_float64(out, h, u, valid)

    def test_an_empty_batch(self):
        h, u, _ = inputs(0, 5, 64, 2, mask=None, device="cuda")
        assert flr_kernels.factor_attention(h, u).context.shape == (0, 2, 64)

    def test_auto_takes_it_and_does_not_wait(self, monkeypatch):
        monkeypatch.setenv("FLR_BACKEND", "auto")
        h, u, valid = inputs(16, 64, 512, 4, device="cuda")
        assert dispatch.select("factor_attention", h, u, valid) == "cuda"
        assert dispatch.select("factor_attention", h.float(), u.float(), valid) != "cuda"
        torch.cuda.set_sync_debug_mode("error")
        try:
            flr_kernels.factor_attention(h, u, valid)
        finally:
            torch.cuda.set_sync_debug_mode("default")


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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestBackwardOnADevice:
    @pytest.fixture(autouse=True)
    def _cuda(self, monkeypatch):
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("not compute capability 9.0")
        monkeypatch.setenv("FLR_BACKEND", "cuda")
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("mask", [None, "random", "left"])
    @pytest.mark.parametrize(
        "shape",
        [
            *((64, 512, 1536, 4), (64, 512, 4096, 4), (512, 64, 1536, 4), (1, 4096, 4096, 4), (16, 2048, 2048, 4)),
            *((5, 37, 896, 1), (3, 1000, 3072, 3), (150, 1, 576, 4), (200, 129, 4000, 3), (7, 64, 48, 2)),
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
