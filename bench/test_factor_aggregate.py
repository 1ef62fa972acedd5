"""Aggregation of K contributions with orthogonality and gate entropy: ours, PyTorch eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flr_kernels import factor_aggregate, reference

from .harness import kernel_clock, label, rotating, rotation
from .machine import DEVICE, ON_GPU

EPS = 1e-6


def shape_of(batch: int, factors: int, size: int) -> dict:
    return {"B": batch, "K": factors, "D": size, "dtype": torch.float32}


def eager(f, logits):
    return reference.factor_aggregate(f, logits, EPS)


@pytest.mark.cases(
    quick=[shape_of(8, 4, 256)],
    default=[shape_of(64, 4, 1536)],
    full=[shape_of(64, k, 1536) for k in (2, 8, 16)] + [shape_of(512, 4, 1536)],
    gpu=[shape_of(64, 4, 1536), shape_of(512, 4, 4096), shape_of(512, 16, 1536)],
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
def test_factor_aggregate(shape, backward, tier, race):
    size = shape["B"] * shape["K"] * shape["D"] * 4
    generator = torch.Generator(DEVICE).manual_seed(0)

    def inputs():
        f = torch.randn(shape["B"], shape["K"], shape["D"], generator=generator, device=DEVICE)
        logits = torch.randn(shape["B"], shape["K"], generator=generator, device=DEVICE)
        return f.requires_grad_(backward), logits.requires_grad_(backward)

    sets = [inputs() for _ in range(rotation(size))]

    def ours(f, logits):
        return factor_aggregate(f, logits, eps=EPS)

    def step(call: Callable) -> Callable:
        def train(f, logits):
            thought, _, orthogonality, entropy = call(f, logits)
            return torch.autograd.grad(thought.square().sum() + orthogonality.sum() + entropy.sum(), (f, logits))

        return train if backward else torch.no_grad()(call)

    expected = step(eager)(*(x.detach().double().requires_grad_(backward) for x in sets[0]))

    def agree(_, results):
        for found, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=1e-4 if not ON_GPU else 1e-3, atol=1e-4)

    variants = {"flr": ours, "eager": eager}
    if tier != "quick":
        variants["compiled"] = torch.compile(eager, dynamic=False)
    race(
        f"{'train' if backward else 'forward'} {label(shape)}",
        {name: rotating(step(call), sets) for name, call in variants.items()},
        suite="factor_aggregate",
        clock=kernel_clock(),
        shape=shape,
        check=lambda: agree("flr", step(ours)(*sets[0])),
        agree=agree,
        bytes_moved=size * (3 if backward else 1) + shape["B"] * shape["D"] * 4,
    )
