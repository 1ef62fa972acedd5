"""What the tests of the kernels have in common: uninitialised memory holds NaN where they ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only Triton, and every tensor that is allocated without being filled starts as NaN."""
    monkeypatch.setenv("FLR_BACKEND", "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
