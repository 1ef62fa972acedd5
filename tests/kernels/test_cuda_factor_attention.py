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
    @pytest.mark.parametrize(("size", "factors"), [(32, 1), (576, 4), (1536, 8), (4096, 8), (8192, 16)])
    def test_these(self, dtype, size, factors):
        cuda_host.check(*inputs(3, 5, size, factors, dtype))
        wide = torch.zeros(3, 5, size + 8, dtype=dtype)
        cuda_host.check(wide[..., 8:], inputs(3, 5, size, factors, dtype)[1])

    @pytest.mark.parametrize(
        ("h", "u", "message"),
        [
            (torch.zeros(2, 3, 64), torch.zeros(2, 2, 64), "h: expected bfloat16 or float16 .*, got torch.float32"),
            (torch.zeros(2, 3, 8200), torch.zeros(2, 2, 8200), "h: expected D a multiple of 8 from 32 to 8192"),
            (torch.zeros(2, 3, 36), torch.zeros(2, 2, 36), "h: .* got D = 36"),
            (torch.zeros(2, 3, 24), torch.zeros(2, 2, 24), "h: .* got D = 24"),
            (torch.zeros(2, 3, 64), torch.zeros(2, 17, 64), "u: expected K from 1 to 16 .*, got K = 17"),
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

    def test_auto_takes_what_has_run_on_a_device(self):
        for shape, taken in [((4, 9, 4096, 8), True), ((4, 9, 4104, 4), False), ((4, 9, 64, 9), False)]:
            assert cuda_host.fills(*inputs(*shape)) is taken
        assert cuda_host.fills(*inputs(1, 512, 64, 2))
        assert not cuda_host.fills(*inputs(1, 513, 64, 2))

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


def view(*shape, dtype=torch.bfloat16):
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
        ("h", 3, (2, 3, 60), "h: expected D a multiple of 8 from 8 to 8192"),
        ("h", 0, 4096 + 8, "h: expected rows at multiples of 16 bytes"),
        ("h", 4, (192, 65, 1), "within its storage"),
        ("h", 4, (188, 60, 1), "h: expected rows at multiples of 16 bytes"),
        ("h", 2, 1, "h: expected device 0, got 1"),
        ("u", 3, (2, 17, 64), r"u: expected \[B, K, D\] with K from 1 to 16"),
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
        "h": view(2, 3, 64),
        "u": view(2, 2, 64),
        "mask": view(2, 3, dtype=torch.bool),
        "context": view(2, 2, 64, dtype=single),
        "lse": view(2, 2, dtype=single),
        "overlap": view(2, 2, 2, dtype=single),
        "entropy": view(2, 2, dtype=single),
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
@pytest.mark.usefixtures("backend_cuda")
class TestOnTheDevice:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("mask", [None, "random", "left"])
    @pytest.mark.parametrize(
        "shape",
        [
            *((1, 4096, 1536, 4), (512, 64, 1536, 4), (64, 512, 1536, 4), (64, 512, 4096, 4), (32, 512, 1536, 8)),
            *((5, 37, 896, 1), (3, 1000, 4096, 8), (150, 1, 576, 4), (200, 129, 4000, 3), (16, 300, 2048, 8)),
            *((2, 2000, 3072, 5), (7, 64, 40, 2)),
            *((16, 300, 1536, 16), (300, 40, 2048, 9), (5, 200, 8192, 4), (70, 60, 8192, 16), (2, 900, 7000, 11)),
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

    @pytest.mark.gpu(2)
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
