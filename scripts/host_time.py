"""What a call of factor_attention costs the host: microseconds of Python and Triton around the kernels.

``python scripts/host_time.py [--json FILE]``. On a CUDA device calls are queued without waiting for their kernels.
Without one, CPU tensors go the same way to a driver that drops the launches. Every figure is the least of many short
batches, since a shared machine's clock measures its neighbours too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' driver without a device

from flr_kernels import factor_aggregate, factor_attention, log_normaliser
from flr_kernels.backends import triton_config


def least(call: Callable[[], Any], batches: int) -> float:
    """Microseconds of a call, the least of ``batches`` of three."""
    for _ in range(20):
        call()
    best = float("inf")
    for number in range(batches):
        if number % 50 == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()  # so that the queue is never full
        start = time.perf_counter()
        for _ in range(3):
            call()
        best = min(best, (time.perf_counter() - start) / 3)
    return best * 1e6


def measure(device: str, batches: int) -> dict[str, float]:
    """Microseconds by what was called; two launches a forward, three a backward."""
    from flr_kernels.backends.triton_plan import _Shortcut

    h = torch.randn(2, 100, 64, dtype=torch.bfloat16, device=device)
    u = torch.randn(2, 4, 64, dtype=torch.bfloat16, device=device)
    mask = torch.ones(2, 100, dtype=torch.bool, device=device)
    f, gates, logits = u.float(), torch.zeros(2, 4, device=device), torch.randn(4, 5000, device=device)
    recorded = h.clone().requires_grad_()
    out = factor_attention(recorded, u, mask)
    gradients = [torch.ones_like(x) for x in out]
    found = {"torch.Tensor.new_empty": least(lambda: h.new_empty((2, 4, 64)), batches)}
    calls: dict[str, Callable[[], Any]] = {
        "factor_attention": lambda: factor_attention(h, u, mask),
        "factor_attention, autograd recorded": lambda: factor_attention(recorded, u, mask),
        "its backward, by torch.autograd.grad": lambda: torch.autograd.grad(
            out, recorded, gradients, retain_graph=True
        ),
        "factor_aggregate": lambda: factor_aggregate(f, gates),
        "log_normaliser": lambda: log_normaliser(logits),
    }
    found |= {name: least(call, batches) for name, call in calls.items()}
    if not _Shortcut._closed:
        _Shortcut._closed = True
        found["factor_attention, launched by Triton's binder"] = least(calls["factor_attention"], batches // 4)
        _Shortcut._closed = False
    else:
        print("launches went Triton's own way: the log says why")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", type=int, default=2000)
    arguments = parser.parse_args()
    os.environ["FLR_BACKEND"] = "triton"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    driver: Any = contextlib.nullcontext()
    if device == "cpu":
        from tests.helpers.triton_driver import Driver, recording

        triton_config.check_device = lambda _: None  # type: ignore[assignment]
        Driver.launcher_cls = lambda *_: lambda *_: None  # type: ignore[method-assign]
        driver = recording()
    with driver:
        found = measure(device, arguments.batches)
    for name, microseconds in found.items():
        print(f"{name:48} {microseconds:7.1f} µs")
    if arguments.json:
        import triton

        where = torch.cuda.get_device_name() if device == "cuda" else "no device"
        report = {"device": where, "triton": triton.__version__, "torch": torch.__version__, "microseconds": found}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
