"""The whole reasoner, T refinements: ours, the same with the reference ops, compiled, and LatentR3's projection.

``flr`` is FactorizedReasoner with the ops that dispatch picks, ``reference`` the same with the PyTorch reference ops
(on a GPU; on the CPU they are what dispatch picks), ``compiled`` is under torch.compile(fullgraph=True), ``latentr3``
the single-factor predecessor, which projects all L tokens to keys and values (K = 1, T = 1 by definition: raced at T =
1 only). On a GPU, forward, T > 1: ``blocks`` is ours with all refinements of 16 users before the next 16.
"""

from __future__ import annotations

import copy

import pytest
import torch

from flr.config import FLRConfig
from flr.model.reasoner import FactorizedReasoner
from flr.model.variants import LatentR3Reasoner

from .backends import backend
from .harness import kernel_clock, label, rotating, rotation
from .machine import DEVICE, ON_GPU


def shape_of(batch: int, length: int, size: int, refinements: int, dtype: torch.dtype = torch.float32) -> dict:
    return {"B": batch, "L": length, "D": size, "K": 4, "T": refinements, "dtype": dtype}


def build(shape: dict):
    torch.manual_seed(0)
    return FactorizedReasoner(shape["D"], FLRConfig(num_factors=shape["K"], num_refinements=shape["T"])).to(DEVICE)


def in_blocks(call, users: int):
    """``call`` on one block of ``users`` after another."""

    def run(h, mask):
        for part in zip(h.split(users), mask.split(users), strict=True):
            out = call(*part)
        return out

    return run


@pytest.mark.cases(
    quick=[shape_of(2, 128, 512, 1)],
    default=[shape_of(4, 256, 1536, t) for t in (1, 2, 3)],
    gpu=[shape_of(64, 512, d, t, torch.bfloat16) for d in (1536, 4096) for t in (1, 2, 3)]
    + [shape_of(8, 4096, 1536, 1, torch.bfloat16)],
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
def test_reasoner(shape, backward, tier, race):
    size, dtype = shape["D"], shape["dtype"]
    module = build(shape)
    generator = torch.Generator(DEVICE).manual_seed(1)
    history = shape["B"] * shape["L"] * size * dtype.itemsize
    sets = []
    for _ in range(rotation(history)):
        h = torch.randn(shape["B"], shape["L"], size, generator=generator, device=DEVICE).to(dtype)
        first = torch.randint(0, max(shape["L"] // 8, 1), (shape["B"], 1), generator=generator, device=DEVICE)
        sets.append((h.requires_grad_(backward), torch.arange(shape["L"], device=DEVICE) >= first))

    def step(model):
        def think(h, mask):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=h.dtype == torch.bfloat16):
                return model(h, mask)

        def train(h, mask):
            out = think(h, mask)
            loss = out.thought.square().sum() + sum(x.sum() for x in out.user_losses.values())
            return torch.autograd.grad(loss, (h, *model.parameters()), allow_unused=True)

        return train if backward else torch.no_grad()(think)

    def first_two(results):
        """Of two users the thought, or the gradient of the history."""
        return (results[0] if backward else results.thought)[:2]

    with backend("reference"):
        h, mask = (x[:2].detach() for x in sets[0])
        expected = first_two(step(copy.deepcopy(module).double())(h.double().requires_grad_(backward), mask))

    def agree(name, results):
        if name in ("latentr3", "blocks"):  # another function; of the last users alone
            return
        error = float((first_two(results).double() - expected).norm() / expected.norm())
        bound = 1e-4 if dtype == torch.float32 and not ON_GPU else 3e-2
        if not error < bound:
            raise AssertionError(f"{name}: expected a relative error below {bound}, got {error}")

    variants = {"flr": step(module)}
    if ON_GPU:
        variants["reference"] = backend("reference")(step(module))
    if tier != "quick":
        variants["compiled"] = step(torch.compile(module, fullgraph=True, dynamic=False))
    if shape["T"] == 1:
        config = FLRConfig(variant="latentr3", num_factors=1, num_refinements=1)
        variants["latentr3"] = step(LatentR3Reasoner(size, config).to(DEVICE))
    if ON_GPU and shape["T"] > 1 and not backward:
        variants["blocks"] = in_blocks(step(module), 16)
    weights = 4 * size * size * 4  # the queries', keys', values' and output's; 2 operations an element and user
    race(
        f"{'train' if backward else 'forward'} {label(shape)}",
        {name: rotating(call, sets) for name, call in variants.items()},
        suite="reasoner",
        clock=kernel_clock(),
        shape=shape,
        check=lambda: agree("flr", step(module)(*sets[0])),
        agree=agree,
        # what one pass must move: the history (twice, and its gradient, in the backward) and the 4 D² weights
        bytes_moved=(history + weights) * (3 if backward else 1),
    )
