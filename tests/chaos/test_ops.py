"""A short form of ``python -m tests.chaos.ops``, and that it finds faults."""

import pytest
import torch

import flr_kernels
from tests.chaos import ops


def test_a_thousand_calls():
    figures = ops.run(1000, seed=1)
    assert not figures["failures"], figures["first_failures"]
    assert min(figures["outcomes"][name] for name in ("equal", "ValueError", "BackendUnavailable")) > 50, figures


@pytest.mark.parametrize("planted", ["values", "exception", "message"])
def test_a_planted_fault_is_found(planted, monkeypatch):
    real = flr_kernels.log_normaliser

    def faulty(logits):
        result = real(logits)
        if planted == "values":
            return result + 1
        raise RuntimeError("no") if planted == "exception" else ValueError("no argument is named")

    monkeypatch.setattr(flr_kernels, "log_normaliser", faulty)
    figures = ops.run(150, seed=1)
    assert figures["failures"] > 0
    assert all("log_normaliser" in failure for failure in figures["first_failures"])


def test_what_is_compared_is_the_definition():
    arguments = {"logits": torch.zeros(2, 3)}
    assert ops.different(torch.tensor([1.0986, 1.0986]), arguments, flr_kernels.reference.log_normaliser, "x") is None
    assert "values" in ops.different(torch.ones(2), arguments, flr_kernels.reference.log_normaliser, "x")
