"""The whole reasoner, T refinements, forward and training step: fused, reference ops, compiled, and LatentR3's projection.

``flr`` is FactorizedReasoner with the ops that dispatch picks, ``reference`` the same with the PyTorch reference ops,
``compiled`` the former under torch.compile(fullgraph=True), ``latentr3`` the single-factor predecessor, which projects all
L tokens to keys and values (K = 1, T = 1 by definition: compare it with T = 1).
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, ON_GPU, rotation

from flr.config import FLRConfig
from flr.reasoner import FactorizedReasoner, LatentR3Reasoner

GPU_CASES = [(64, 512, 1536, torch.bfloat16), (64, 512, 4096, torch.bfloat16), (8, 4096, 1536, torch.bfloat16)]
CPU_CASES = [(4, 256, 1536, torch.float32)]
GPU_VARIANTS, CPU_VARIANTS = ("flr", "reference", "compiled", "latentr3"), ("flr", "latentr3")


def build(variant, size, refinements):
    torch.manual_seed(0)
    if variant == "latentr3":
        return LatentR3Reasoner(size, FLRConfig(variant="latentr3", num_factors=1, num_refinements=1)).to(DEVICE)
    module = FactorizedReasoner(size, FLRConfig(num_factors=4, num_refinements=refinements)).to(DEVICE)
    return torch.compile(module, fullgraph=True, dynamic=False) if variant == "compiled" else module


@pytest.mark.parametrize("variant", GPU_VARIANTS if ON_GPU else CPU_VARIANTS)
@pytest.mark.parametrize("refinements", [1, 2, 3])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize(("batch", "length", "size", "dtype"), GPU_CASES if ON_GPU else CPU_CASES)
def test_reasoner(batch, length, size, dtype, backward, refinements, variant, measure, monkeypatch):
    if variant == "latentr3" and refinements > 1:
        pytest.skip("LatentR3 has one refinement")
    if variant == "reference":
        monkeypatch.setenv("FLR_BACKEND", "reference")
    module = build(variant, size, refinements)
    generator = torch.Generator(DEVICE).manual_seed(1)
    history = batch * length * size * dtype.itemsize
    sets = []
    for _ in range(rotation(history)):
        h = torch.randn(batch, length, size, generator=generator, device=DEVICE).to(dtype).requires_grad_(backward)
        first = torch.randint(0, max(length // 8, 1), (batch, 1), generator=generator, device=DEVICE)
        sets.append((h, torch.arange(length, device=DEVICE) >= first))

    if variant != "latentr3":  # no speed without a right answer
        with torch.no_grad():
            h, mask = (x[:2] for x in sets[0])
            exact = build("flr", size, refinements).double()
            monkeypatch.setenv("FLR_BACKEND", "reference")
            expected = exact(h.double(), mask).thought
            if variant != "reference":
                monkeypatch.delenv("FLR_BACKEND")
            eager = build("flr", size, refinements)
            error = (eager(h, mask).thought.double() - expected).norm() / expected.norm()
        assert error < (1e-4 if dtype == torch.float32 and not ON_GPU else 3e-2), error

    def think(h, mask):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return module(h, mask)

    def forward(h, mask):
        with torch.no_grad():
            think(h, mask)

    def train(h, mask):
        out = think(h, mask)
        loss = out.thought.square().sum() + sum(x.sum() for x in out.user_losses.values())
        torch.autograd.grad(loss, (h, *module.parameters()), allow_unused=True)

    # what one pass must move: the history (twice, and its gradient, in the backward) and the 4 D² weights
    weights = 4 * size * size * 4
    moved = (history * 3 + weights * 3) if backward else history + weights
    short = str(dtype).removeprefix("torch.")
    case = f"{'train' if backward else 'forward'} T{refinements} B{batch} L{length} D{size} {short}"
    measure(train if backward else forward, sets, moved, case=case, variant=variant)
