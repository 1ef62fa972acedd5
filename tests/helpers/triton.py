"""What the tests of the Triton kernels share: the device, inputs, and comparison with float64.

Importing it skips the module where neither ``TRITON_INTERPRET=1`` is set nor there is a CUDA device.
``test_triton_backend.py`` sets it in a process of its own, because it must be set before the kernels are imported.
"""

import functools
import inspect
import math

import pytest
import torch

from flr_kernels import reference
from flr_kernels.backends import triton_config


def quicken():
    """The interpreter finds the language's members once, and not at every call of a function within a kernel."""
    from triton.runtime import interpreter

    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache  # first called before anything is replaced
    def builtins(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package, builder, scope):
        for name in builtins(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


INTERPRETED = triton_config.interpreted()
if INTERPRETED:
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)
if INTERPRETED:
    quicken()
#: Every module takes them as its ``pytestmark``.
MARKS = [pytest.mark.usefixtures("triton_backend"), *([] if INTERPRETED else [pytest.mark.gpu])]

cuda_only = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Relative to the largest reference value: rounding of the result itself, and of what differs in summation order. A
#: device sums the 8,192 products of a score in float32 one after another: 7e-6 was seen there at the largest sizes.
FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 4e-6 if INTERPRETED else 1e-5,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}


def masks(kind, batch, length):
    """bool [B, L]"""
    position = torch.arange(length).expand(batch, length)
    count = torch.arange(batch)[:, None] * length // max(batch, 1) + 1  # 1 .. L valid tokens
    valid = {
        "left": position >= length - count,
        "right": position < count,
        "scattered": torch.rand(batch, length) < 0.4,
        "false": torch.zeros(batch, length, dtype=torch.bool),
        "one": position == (torch.arange(batch)[:, None] * 7 + length // 2) % length,
        "mixed": (torch.rand(batch, length) < 0.5) & (torch.arange(batch)[:, None] != 1),
    }
    return None if kind is None else valid[kind].to(DEVICE)


def attention_inputs(batch, length, size, factors, dtype, mask=None, scale=1.0):
    """Hidden states, queries and a mask, seeded by their sizes."""
    torch.manual_seed(batch * 1000 + length * 100 + size + factors)
    h = torch.randn(batch, length, size).to(DEVICE, dtype).requires_grad_()
    u = (torch.randn(batch, factors, size) * (scale / math.sqrt(size))).to(DEVICE, dtype).requires_grad_()
    return h, u, masks(mask, batch, length)


def aggregate_inputs(batch, size, factors, dtype):
    """Factors and logits of gates, seeded by their sizes."""
    torch.manual_seed(batch * 100 + size + factors)
    common = torch.randn(batch, 1, size)  # so that the factors are not orthogonal
    f = (torch.randn(batch, factors, size) + common).to(DEVICE, dtype).requires_grad_()
    return f, torch.randn(batch, factors).to(DEVICE, dtype).requires_grad_()


def apart(x):
    """A tensor with something else between its elements in memory."""
    return torch.stack([x, torch.ones_like(x)], -1)[..., 0] if isinstance(x, torch.Tensor) else x


def gradients_for(outputs, seed=0):
    """Incoming gradients, zero where an output is infinite."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) * torch.isfinite(o) for o in outputs]


def assert_close(name, actual, expected, baseline, floor):
    """Largest and root-mean-square error against float64 within twice the error of same-dtype PyTorch, plus a floor."""
    assert actual.shape == expected.shape, name
    infinite = torch.isneginf(expected)
    assert torch.equal(torch.isneginf(actual), infinite), name
    actual, expected, baseline = (x.double().masked_fill(infinite, 0) for x in (actual, expected, baseline))
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    if actual.numel() == 0:
        return
    size = expected.abs().max().clamp_min(1e-3)
    for kind, norm in (("max", lambda x: x.abs().max()), ("rms", lambda x: x.square().mean().sqrt())):
        error, bound = norm(actual - expected), 2 * norm(baseline - expected).nan_to_num(0) + floor * size
        assert error <= bound, f"{name}: {kind} error {error:.2e}, expected at most {bound:.2e}"


def run(op, names, inputs, differentiated, eager):
    """Values and gradients of the op, of its float64 reference and of ``eager`` in the inputs' dtype."""
    outputs = op(*inputs)
    wide = [
        x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x
        for x in inputs
    ]
    exact = getattr(reference, op.__name__)(*wide)
    plain = eager(*inputs)
    grads = gradients_for(exact)
    results = []
    for values, arguments in ((outputs, inputs), (exact, wide), (plain, inputs)):
        wanted = [x for x, d in zip(arguments, differentiated, strict=True) if d]
        g = [grad.to(v.dtype) for grad, v in zip(grads, values, strict=True)]
        results.append([*values, *torch.autograd.grad(values, wanted, g)])
    return [*names, *(f"gradient {i}" for i, d in enumerate(differentiated) if d)], results
