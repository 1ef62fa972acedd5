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

from flr_kernels import token_logprob

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

    def check():
        if rows * vocabulary > 1 << 28:
            return
        h, w = (x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight))
        out = logprob.token_logprob(h, w, target).double()
        exact = torch.autograd.grad(out, [x for x in (h, w) if x.requires_grad], grad.double()) if wanted else (out,)
        found = step(token_logprob)() if wanted else (step(token_logprob)(),)
        for a, b in zip(found, exact, strict=True):
            assert (a.double() - b).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * b.norm()

    race(
        f"{mode} {label(shape)}",
        {name: step(call) for name, call in variants.items()},
        suite="token_logprob",
        clock=kernel_clock(),
        shape=shape,
        check=check,
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
