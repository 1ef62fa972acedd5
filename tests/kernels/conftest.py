"""What the tests of the kernels have in common: uninitialised memory holds NaN where they ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["auto", "reference"])
def cpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves a CPU here, which is the extension where one is built, and the definition in PyTorch."""
    monkeypatch.setenv("FLR_BACKEND", request.param)


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only Triton, and every tensor that is allocated without being filled starts as NaN."""
    monkeypatch.setenv("FLR_BACKEND", "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def backend_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same for the CUDA kernels of compute capability 9.0; skips on other devices."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not compute capability 9.0")
    monkeypatch.setenv("FLR_BACKEND", "cuda")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
