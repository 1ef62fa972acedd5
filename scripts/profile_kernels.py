"""Run each main kernel once, after warming up, between cudaProfilerStart and Stop; for Nsight Compute.

ncu --profile-from-start off --clock-control none [...] python scripts/profile_kernels.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from flr_kernels import factor_aggregate, factor_attention


def main() -> int:
    if not torch.cuda.is_available():
        print("profile_kernels: no GPU here, nothing to profile")
        return 0
    h = torch.randn(64, 512, 1536, device="cuda", dtype=torch.bfloat16).requires_grad_()
    u = (torch.randn(64, 4, 1536, device="cuda") / 1536**0.5).bfloat16().requires_grad_()
    logits = torch.randn(64, 4, device="cuda")

    def once() -> None:
        out = factor_attention(h, u)
        torch.autograd.grad((out.context, out.overlap), (h, u), (out.context, out.overlap))
        with torch.no_grad():
            factor_aggregate(out.context.detach(), logits)

    for _ in range(3):
        once()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    once()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
