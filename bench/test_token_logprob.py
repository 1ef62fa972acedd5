"""Log-probability of a target token a row: ours in blocks of rows, all logits at once (eager, compiled), the libraries.

``torch`` is PyTorch's own linear_cross_entropy in blocks (from 2.13); ``liger`` and ``cce`` run where they are
installed (Liger from 0.8.2: before, its gradients of single losses were wrong). ``frozen`` trains the hidden states
alone, as RL does.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flr_kernels import reference, token_logprob

from .baselines import logprob
from .harness import kernel_clock, label
from .machine import DEVICE, ON_GPU


def shape_of(rows: int, size: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> dict:
    return {"M": rows, "D": size, "V": vocabulary, "dtype": dtype}


def libraries() -> dict:
    found = {}
    if options := getattr(torch.nn, "LinearCrossEntropyOptions", None):
        found["torch"] = lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none", options=options())
    if ON_GPU and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["liger"] = lambda h, w, t: -liger_fused_linear_cross_entropy(h, w, t, reduction="none")
    if ON_GPU and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cce"] = lambda h, w, t: -linear_cross_entropy(h, w, t, reduction="none", impl="cce_exact")
    return found


def in_float64(hidden: Tensor, weight: Tensor, target: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients of what has them, or log-probabilities, by blocks of rows so that they fit any memory."""
    w = weight.detach().double().requires_grad_(weight.requires_grad)
    values, d_hidden, d_weight = [], [], torch.zeros_like(w)
    for rows in torch.arange(len(hidden), device=hidden.device).split(max(1, (1 << 27) // len(weight))):
        h = hidden.detach()[rows].double().requires_grad_(hidden.requires_grad)
        out = reference.token_logprob(h, w, target[rows])
        values.append(out.detach())
        if h.requires_grad:
            dh, *dw = torch.autograd.grad(out, (h, w) if w.requires_grad else h, grad[rows].double())
            d_hidden.append(dh)
            d_weight += dw[0] if dw else 0
    return [torch.cat(d_hidden), *([d_weight] if w.requires_grad else [])] if d_hidden else [torch.cat(values)]


@pytest.mark.cases(
    quick=[shape_of(64, 64, 2000)],
    default=[shape_of(512, 512, 10432), shape_of(4096, 512, 10432)],
    full=[shape_of(512, 896, 151936)],
    gpu=[shape_of(512, 1536, 151936, torch.bfloat16), shape_of(8192, 1536, 151936, torch.bfloat16)],
)
@pytest.mark.parametrize("mode", ["forward", "frozen", "train"])
def test_token_logprob(shape, mode, tier, race):
    rows, size, vocabulary, dtype = shape["M"], shape["D"], shape["V"], shape["dtype"]
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(rows, size, generator=generator, device=DEVICE).to(dtype).requires_grad_(mode != "forward")
    weight = (torch.randn(vocabulary, size, generator=generator, device=DEVICE) * size**-0.5).to(dtype)
    weight.requires_grad_(mode == "train")
    target = torch.randint(0, vocabulary, (rows,), generator=generator, device=DEVICE)
    grad = torch.rand(rows, generator=generator, device=DEVICE)
    wanted = [x for x in (hidden, weight) if x.requires_grad]

    def step(call):
        def run():
            out = call(hidden, weight, target)
            return torch.autograd.grad(out, wanted, grad.to(out.dtype)) if wanted else out

        return run

    variants = {"flr": token_logprob, "eager": logprob.token_logprob, **libraries()}
    if tier != "quick":
        variants["compiled"] = torch.compile(logprob.token_logprob, dynamic=False)

    exact: list[Tensor] = []

    def agree(name, found):
        for a, b in zip(found if wanted else (found,), exact, strict=True):
            error = float((a.double() - b).norm() / b.norm())
            if not error <= (1e-5 if dtype == torch.float32 else 2e-2):
                raise AssertionError(f"{name}: expected what float64 gives, got a relative error of {error}")

    def check():
        exact.extend(in_float64(hidden, weight, target, grad))
        agree("flr", step(token_logprob)())

    race(
        f"{mode} {label(shape)}",
        {name: step(call) for name, call in variants.items()},
        suite="token_logprob",
        clock=kernel_clock(),
        shape=shape,
        check=check,
        agree=agree,
        # hidden states and weight; in the backward once more, and the gradients that are wanted
        bytes_moved=dtype.itemsize
        * size
        * (
            (rows + vocabulary) * (1 if mode == "forward" else 2)
            + rows * (mode != "forward")
            + vocabulary * (mode == "train")
        ),
        # the products that cannot be saved: logits, and dh, dw; without [M, V] kept, logits once more
        flops=2 * rows * size * vocabulary * {"forward": 1, "frozen": 2, "train": 3}[mode],
    )
