"""From token log-probabilities to advantages: ours, the usual PyTorch, compiled.

``flr`` is what dispatch picks: the CUDA kernel on a GPU, its C++ twin on the CPU; ``reference`` is ours in plain
PyTorch, in float64.
"""

from __future__ import annotations

import pytest
import torch

from flr_kernels import group_advantage

from .backends import backend
from .baselines import logprob
from .harness import kernel_clock, label
from .machine import DEVICE, ON_GPU

EPS = 1e-4


def shape_of(users: int, size: int, length: int, dtype: torch.dtype = torch.float32) -> dict:
    return {"B": users, "G": size, "S": length, "dtype": dtype}


@pytest.mark.cases(
    quick=[shape_of(4, 8, 16)],
    default=[shape_of(4, 8, 16), shape_of(64, 8, 16), shape_of(64, 64, 256)],
    gpu=[shape_of(4, 8, 16), shape_of(64, 8, 16), shape_of(64, 8, 16, torch.bfloat16), shape_of(256, 64, 1024)],
)
@pytest.mark.parametrize("kind", ["grpo", "latentr3"])
def test_group_advantage(kind, shape, tier, race, monkeypatch):
    monkeypatch.delenv("FLR_BACKEND", raising=False)
    users, size, length = shape["B"], shape["G"], shape["S"]
    generator = torch.Generator(DEVICE).manual_seed(0)
    logp = (-4 * torch.rand(users * size, length, generator=generator, device=DEVICE)).to(shape["dtype"])
    mask = torch.arange(length, device=DEVICE) < torch.randint(
        1, length + 1, (users * size, 1), generator=generator, device=DEVICE
    )
    compiled = torch.compile(logprob.group_advantages, dynamic=False)
    variants = {
        "flr": lambda: group_advantage(logp, mask, size, kind, eps=EPS),
        "eager": lambda: logprob.group_advantages(logp, mask, size, kind, EPS),
    }
    if not ON_GPU:
        variants["reference"] = backend("group_advantage=reference")(variants["flr"])
    if tier != "quick":
        variants["compiled"] = lambda: compiled(logp, mask, size, kind, EPS)

    expected = logprob.group_advantages(logp.double(), mask, size, kind, EPS)

    def agree(_, results):
        for found, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(found.double(), exact.double(), rtol=1e-4, atol=1e-4)

    rows = users * size
    race(
        f"{kind} {label(shape)}",
        variants,
        suite="group_advantage",
        clock=kernel_clock(),
        shape=shape,
        check=lambda: agree("flr", variants["flr"]()),
        agree=agree,
        bytes_moved=rows * length * (shape["dtype"].itemsize + 1) + rows * 8 + users * 8,
        target={"eager": 10.0} if ON_GPU else None,
    )
